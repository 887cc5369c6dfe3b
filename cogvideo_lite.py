"""cogvideo_lite: fine-tune CogVideoX without ruining it, in one file.

    python cogvideo_lite.py --lora                                                   the bundled nano model, on any CPU
    python cogvideo_lite.py --lora --model THUDM/CogVideoX-2b --data my_clips        the real one, on a 24 GB card
    python cogvideo_lite.py --sample "a spider named kumo moving left over water" --run runs/lora-...

It reads top to bottom, in the order in which data flows: configuration, clips, cache, base model, diffusion, adapters,
checkpoints, sampling, training, command line. The model classes are diffusers' own; so is the sampler. What is written
here is what happens between a folder of clips and an adapter that stock diffusers loads.

Letters in shapes: B clips, F frames, C channels, H height and W width in pixels, T latent frames, h and w latent height
and width, L text tokens, D text width.

What it does not do (yet): image-to-video, LoRA on the text encoder, buckets of several sizes in one run.
"""

import argparse
import csv
import dataclasses
import datetime
import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif"}


class UserError(Exception):
    """Something that the user can put right: one line saying what, where, and what to do. Exit status 2."""


class RunError(Exception):
    """A failure while running (a loss that is not finite, a full disk): one line. Exit status 1."""


# ------------------------------------------------------------------------------------------------------- configuration


def option(help, default=None, **kw):
    """A field of Config; `help` is also its help on the command line. None means: taken from the recipe or the model."""
    return field(default=default, metadata={"help": help, **kw})


@dataclass
class Config:
    """Everything that decides a run. `resolve` fills what is None; the result is saved as the run's config.json."""

    method: str = field(default="lora", metadata={"help": None})
    model: str = option("pipeline folder or Hub id of a CogVideoX text-to-video model", "data_samples/cogvideox-nano")
    data: str = option(
        "folder of clips with captions (metadata.jsonl/.csv, prompts.txt + videos.txt, or clip.txt)",
        "data_samples/spider",
    )
    heldout: str = option(
        "folder of clips that are only ever held out [DATA-heldout if there is one, else every tenth clip]"
    )
    out: str = option("folder of the run [runs/METHOD-TIME]")
    cache: str = option("folder for coded clips and prompts [.cache beside DATA]")
    clips: int = option("train on the first N clips [all; 50 of the bundled ones]")
    steps: int = option("optimizer steps")
    lr: float = option("learning rate, constant after the warm-up")
    warmup: int = option("steps of linear warm-up")
    batch_size: int = option("clips per optimizer step, all processes together")
    micro_batch_size: int = option("clips in memory at a time, per process [all of its share]")
    rank: int = option("LoRA rank", 32)
    alpha: float = option("LoRA alpha: the update is scaled by alpha / rank", 32.0)
    optimizer: str = option("optimizer", "adamw", choices=["adamw"])
    weight_decay: float = option("weight decay of the optimizer", 1e-4)
    max_grad_norm: float = option("gradients are clipped to this global norm", 1.0)
    caption_dropout: float = option("share of samples trained on the empty prompt, as CogVideoX was", 0.1)
    seed: int = option("seed of every random draw", 0)
    frames: int = option("frames of a clip, 8k + 1 [the model's]")
    height: int = option("pixels [the model's]")
    width: int = option("pixels [the model's]")
    fps: int = option("frames per second that clips are resampled to [8; 16 for CogVideoX1.5]")
    validation_prompts: list = option("prompts sampled before and after [DATA/../prompts.json, else held-out captions]")
    sampling_steps: int = option("denoising steps of a sample")
    guidance_scale: float = option("classifier-free guidance of a sample")
    checkpoint_every: int = option("steps between checkpoints, and between measurements of the held-out loss")
    checkpoints_limit: int = option("older checkpoints than the newest N are removed", 2)
    resume: bool = option("continue from the newest complete checkpoint in OUT [the newest run of the method]", False)
    gradient_checkpointing: bool = option(
        "recompute activations in backward: less memory, more time [if > 0.5 B parameters]"
    )
    compile: bool = option("torch.compile the transformer before the first step", False)
    compute_dtype: str = option("arithmetic [chosen by a probe]", choices=["float32", "bfloat16", "float16"])


# What is left out on the command line comes from here; `source` is printed with it.
RECIPES = {
    ("nano", "lora"): dict(
        steps=400, lr=2e-3, warmup=20, batch_size=4, sampling_steps=20, guidance_scale=4.0, checkpoint_every=200,
        source="1e-4..1e-3 of CogVideo#116, a few times higher since the model is a tenth as wide (arXiv 2406.08447)",
    ),
    ("large", "lora"): dict(
        steps=1500, lr=1e-4, warmup=100, batch_size=1, sampling_steps=50, guidance_scale=6.0, checkpoint_every=250,
        source="1e-4..1e-3 of CogVideo#116, from below; 1500-2000 steps for 50 clips in diffusers' CogVideoX example",
    ),
}  # fmt: skip


def check_numbers(config):
    """Refuse what cannot work before anything is read or written. Raises UserError."""
    for name in ("steps", "batch_size", "micro_batch_size", "rank", "clips", "sampling_steps", "checkpoint_every", "fps",
                 "height", "width", "checkpoints_limit"):  # fmt: skip
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("lr", "alpha", "max_grad_norm"):
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a number above 0")
    if not 0 <= config.caption_dropout < 1:
        raise UserError(f"--caption-dropout {config.caption_dropout}: must be in [0, 1)")
    if config.frames is not None and (config.frames < 1 or config.frames % 8 != 1):
        raise UserError(f"--frames {config.frames}: must be 8k + 1, such as {max(9, config.frames // 8 * 8 + 1)}")


def resolve(config):
    """Fill what the user left out, from the model's own configuration and the recipe. Returns (config, base, why).

    `why` is a list of (what, reason) lines for the banner. Raises UserError.
    """
    check_numbers(config)
    base = find_base(config.model)
    recipe = dict(RECIPES["nano" if base.width < 1000 else "large", config.method])
    source, why = recipe.pop("source"), []
    taken = {k: v for k, v in recipe.items() if getattr(config, k) is None}
    native = {"frames": base.frames, "height": base.height, "width": base.width_px, "fps": base.fps}
    native = {k: v for k, v in native.items() if getattr(config, k) is None}
    config = dataclasses.replace(config, **taken, **native)
    if taken:
        why.append(("recipe", ", ".join(f"{k} {v:g}" for k, v in taken.items()) + f" ({source})"))
    cell = base.spatial * base.patch
    for name in ("height", "width"):
        if getattr(config, name) % cell:
            raise UserError(f"--{name} {getattr(config, name)}: must be a multiple of {cell} for this model")
    if config.micro_batch_size is not None and config.batch_size % config.micro_batch_size:
        raise UserError(f"--micro-batch-size {config.micro_batch_size}: must divide --batch-size {config.batch_size}")
    if config.clips is None and resolve_path(config.data) == HERE / "data_samples/spider":
        config.clips = 50
        why.append(
            ("clips", "the first 50, as in the case that the course is about (CogVideo#116); --clips 200 takes all")
        )
    if config.gradient_checkpointing is None:
        config.gradient_checkpointing = base.large
    return config, base, why


def portable(path):
    """How a run remembers a path: relative to this file where it lies below, else absolute; a Hub id as it is."""
    found = resolve_path(path)
    return str(found.relative_to(HERE) if found.is_relative_to(HERE) else found) if found.exists() else path


def resolve_path(path):
    """A path as given, or, where that does not exist, relative to this file (so that the defaults work from anywhere)."""
    path = Path(path).expanduser()
    return path.resolve() if path.exists() or path.is_absolute() else (HERE / path).resolve()


def quiet_libraries():
    """Leave the terminal to what this program says: no bars for loading weights, no note on an optional kernel."""
    import logging

    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import diffusers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


# --------------------------------------------------------------------------------------------------------------- clips


@dataclass(frozen=True)
class Clip:
    """A video file with its caption. `video` decodes it anew each time: float (F, C, H, W) in [0, 1]."""

    path: Path
    caption: str
    frames: int | None = None  # None in these four: as the file has it
    height: int | None = None
    width: int | None = None
    fps: float | None = None

    @property
    def video(self):
        return read_video(self.path, self.frames, self.height, self.width, self.fps)


def read_clips(folder, frames=None, height=None, width=None, fps=None):
    """Clips of a folder, in any of three forms: metadata.jsonl or .csv with file_name and text (Hugging Face), prompts.txt
    beside videos.txt (CogVideo), or clip.mp4 beside clip.txt. Nothing is decoded yet. Raises UserError."""
    folder = resolve_path(folder)
    if not folder.is_dir():
        raise UserError(f"data '{folder}': no such folder; give a folder of clips with --data")
    pairs = []
    try:
        if (folder / "metadata.jsonl").exists():
            rows = [
                json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines() if line.strip()
            ]
            pairs = [(row["file_name"], row["text"]) for row in rows]
        elif (folder / "metadata.csv").exists():
            with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
                pairs = [(row["file_name"], row["text"]) for row in csv.DictReader(file)]
        elif (folder / "videos.txt").exists() and (folder / "prompts.txt").exists():
            names, texts = ((folder / f).read_text("utf-8").splitlines() for f in ("videos.txt", "prompts.txt"))
            names, texts = ([line.strip() for line in lines if line.strip()] for lines in (names, texts))
            if len(names) != len(texts):
                raise UserError(
                    f"data '{folder}': {len(names)} lines in videos.txt, {len(texts)} in prompts.txt; they must pair up"
                )
            pairs = list(zip(names, texts))
        else:
            for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES):
                text = path.with_suffix(".txt")
                if not text.exists():
                    raise UserError(
                        f"clip '{path}': no caption; write it to {text.name}, or list all in metadata.jsonl"
                    )
                pairs.append((path.name, text.read_text("utf-8").strip()))
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"data '{folder}': captions cannot be read ({type(error).__name__}: {error}); metadata needs file_name and text"
        )
    if not pairs:
        raise UserError(
            f"data '{folder}': no clips; it needs video files ({', '.join(sorted(VIDEO_SUFFIXES))}) with captions"
        )
    for name, text in pairs:
        if not (folder / name).is_file():
            raise UserError(
                f"clip '{folder / name}': listed in the captions but not there; remove the line or add the file"
            )
        if not (text or "").strip():
            raise UserError(f"clip '{folder / name}': empty caption; say what is to be seen, or drop the clip")
    return [Clip(folder / name, text.strip(), frames, height, width, fps) for name, text in pairs]


def read_video(path, frames=None, height=None, width=None, fps=None):
    """Decode a video: at `fps` (the nearest source frame for each instant), from its start, `frames` of them, scaled to
    cover height x width and cropped around the centre. Returns float (F, C, H, W) in [0, 1]. Raises UserError."""
    import av
    import torch
    import torch.nn.functional as F

    pictures = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            start, period = None, 1 / float(stream.average_rate or 8)
            for frame in container.decode(stream):
                now = frame.time if frame.time is not None else len(pictures) * period
                start = now if start is None else start
                # A frame stands for every instant of the new clip that comes less than half its own time after it.
                while (len(pictures) / fps if fps else 0) < now - start + period / 2:
                    pictures.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))  # (H, W, C)
                    if not fps or len(pictures) == frames:
                        break
                if len(pictures) == frames:
                    break
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        raise UserError(f"clip '{path}': cannot be read ({type(error).__name__}: {error}); replace or drop it")
    if len(pictures) < (frames or 1):
        at = f" at {fps:g} fps" if fps else ""
        raise UserError(f"clip '{path}': {len(pictures)} frames{at}, {frames or 1} needed; lower --frames or drop it")
    video = torch.stack(pictures).permute(0, 3, 1, 2).float() / 255  # (F, C, H, W)
    if height and width and video.shape[2:] != (height, width):
        scale = max(height / video.shape[2], width / video.shape[3])
        size = [max(height, round(video.shape[2] * scale)), max(width, round(video.shape[3] * scale))]
        video = F.interpolate(video, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        video = video[:, :, top : top + height, left : left + width].contiguous()
    return video


def write_video(path, video, fps):
    """Encode float (F, C, H, W) in [0, 1] as H.264, yuv420p, which every player and browser shows."""
    import av

    path = Path(path)
    frames = (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    with av.open(str(partial), "w") as container:
        stream = container.add_stream("libx264", rate=int(fps), options={"crf": "12", "preset": "slow"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------------- base model


@dataclass(frozen=True)
class Base:
    """What a CogVideoX pipeline folder says about itself, read from its JSON files alone."""

    folder: Path
    transformer: dict  # config.json of the transformer
    vae: dict

    @property
    def width(self):  # of the transformer
        return self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"]

    @property
    def large(self):  # too large to spend memory freely: above half a billion parameters
        return self.width**2 * self.transformer["num_layers"] * 12 > 5e8

    patch = property(lambda self: self.transformer["patch_size"])
    patch_t = property(lambda self: self.transformer.get("patch_size_t"))  # 2 in CogVideoX1.5, else None
    spatial = property(lambda self: 2 ** (len(self.vae["block_out_channels"]) - 1))  # pixels per latent cell
    temporal = property(lambda self: int(self.vae["temporal_compression_ratio"]))  # frames per latent frame
    frames = property(lambda self: self.transformer["sample_frames"])
    height = property(lambda self: self.transformer["sample_height"] * self.spatial)
    width_px = property(lambda self: self.transformer["sample_width"] * self.spatial)
    fps = property(lambda self: 16 if self.patch_t else 8)  # what CogVideoX1.5, and the others, were trained on
    text_length = property(lambda self: self.transformer["max_text_seq_length"])

    def latent_frames(self, frames):
        """Latent frames of a clip, and how many more CogVideoX1.5 puts before them to fill its temporal patches."""
        t = (frames - 1) // self.temporal + 1
        return t, -t % (self.patch_t or 1)

    @property
    def stored_dtype(self):
        """Of the transformer's weights on disk, as safetensors spells it: F32, F16 or BF16."""
        from safetensors import safe_open

        with safe_open(str(next((self.folder / "transformer").glob("*.safetensors"))), "pt") as file:
            return file.get_slice(next(iter(file.keys()))).get_dtype()

    def load(self, part, dtype=None):
        """One part of the pipeline in its own class, frozen, in eval mode."""
        import diffusers
        import transformers

        library, name = json.loads((self.folder / "model_index.json").read_text())[part]
        cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
        if part in ("tokenizer", "scheduler"):
            return cls.from_pretrained(self.folder / part)
        return cls.from_pretrained(self.folder / part, dtype=dtype).requires_grad_(False).eval()

    def fingerprint(self, part):
        """Changes when the weights of a part do: its JSON files, and size, head and tail of each weight file."""
        digest = hashlib.sha256()
        for path in sorted((self.folder / part).iterdir()):
            if path.suffix == ".json":
                digest.update(path.read_bytes())
            elif path.suffix in (".safetensors", ".model"):
                with open(path, "rb") as file:
                    digest.update(str(path.stat().st_size).encode() + file.read(2**20))
                    file.seek(max(0, path.stat().st_size - 2**20))
                    digest.update(file.read())
        return digest.hexdigest()[:16]


def find_base(model):
    """Base of a local pipeline folder or of a Hub id (downloaded once, without pickled weights). Raises UserError."""
    folder = resolve_path(model)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
            raise UserError(
                f"model '{model}': no such folder; give a diffusers pipeline folder or a Hub id such as THUDM/CogVideoX-2b"
            )
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
        except Exception as error:  # the Hub's client raises a dozen kinds; each means that the model cannot be had
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"model '{model}': no such folder, and not to be had from the Hugging Face Hub ({reason})")
    try:
        index = json.loads((folder / "model_index.json").read_text())
        transformer, vae = (json.loads((folder / p / "config.json").read_text()) for p in ("transformer", "vae"))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"model '{model}': not a diffusers pipeline folder ({error})")
    if index.get("_class_name") != "CogVideoXPipeline" or transformer.get("in_channels") != vae.get("latent_channels"):
        raise UserError(
            f"model '{model}': a {index.get('_class_name')}; only text-to-video CogVideoX models can be trained here"
        )
    return Base(folder, transformer, vae)


def choose_compute_dtype(device, base, wanted=None):
    """Arithmetic for a device, and the reason: (torch dtype, str).

    Not every processor that accepts bf16 has units for it: without them a matrix product is hundreds of times slower than in
    fp32, and torch does not say so. A few milliseconds of measurement decide instead.
    """
    import torch

    if wanted:
        return getattr(torch, wanted), "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the card has bf16 units"
        if base.stored_dtype == "F16":
            return torch.float16, "the model is stored in fp16 and the card has no bf16 units"
        return torch.float32, "the card has no bf16 units, and fp16 overflows in a model trained in bf16"
    if not base.large:
        return torch.float32, "the model is small enough for it on a CPU"
    x, weight = torch.rand(512, base.width), torch.rand(base.width, base.width)

    def seconds(dtype):
        a, b, times = x.to(dtype), weight.to(dtype), []
        for _ in range(4):  # the first call sets its kernels up
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        return min(times[1:])

    ratio = seconds(torch.float32) / seconds(torch.bfloat16)
    chosen = torch.bfloat16 if ratio > 1 else torch.float32
    return (
        chosen,
        f"a {base.width}-wide matrix product in bf16 takes {1 / ratio:.2g} times as long as in fp32 on this processor",
    )


# --------------------------------------------------------------------------------------------------------------- cache
# VAE and T5 never change during training, so each clip and each prompt is coded once, kept on disk, and both models are
# freed before the transformer is loaded. A file's name carries a hash of everything that its content depends on.


@dataclass
class Cache:
    """Coded clips and prompts on disk. Each entry of `train` and `heldout` is (clip file, prompt file)."""

    train: list
    heldout: list
    empty: Path  # the empty prompt, for caption dropout and guidance
    prompts: dict  # validation prompt -> file


def digest(*parts):
    return hashlib.sha256("\0".join(str(p) for p in parts).encode()).hexdigest()[:16]


def load_tensor(path, name):
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        return file.get_tensor(name)


def save_tensor(path, name, tensor, **metadata):
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file({name: tensor.contiguous().cpu()}, str(partial), metadata)
    os.replace(partial, path)  # a reader sees the whole file or none


def is_cached(path, name):
    """Whether a cache file is there and whole (a torn copy, say from a full disk, is coded again)."""
    from safetensors import SafetensorError

    if not path.exists():
        return False
    try:
        load_tensor(path, name)
        return True
    except SafetensorError:
        path.unlink()
        return False


def cache_folder(config):
    if config.cache:
        return Path(config.cache).expanduser().resolve()
    beside = resolve_path(config.data).parent / ".cache"
    if os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return beside
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "cogvideo_lite"


def split_clips(config):
    """(training clips, held-out clips, a sentence on how they were told apart). Raises UserError."""
    size = dict(frames=config.frames, height=config.height, width=config.width, fps=config.fps)
    clips = read_clips(config.data, **size)
    data = resolve_path(config.data)
    folder = resolve_path(config.heldout) if config.heldout else data.with_name(data.name + "-heldout")
    if config.heldout or folder.is_dir():
        heldout, told = read_clips(folder, **size), f"held out: the clips of {folder.name}"
    elif len(clips) >= 2:
        heldout = clips[9::10] or clips[-1:]
        clips = [c for c in clips if c not in heldout]
        told = f"held out: every tenth clip ({len(heldout)}), since there is no folder {folder.name}"
    else:
        raise UserError(
            f"data '{data}': one clip only; at least two are needed, one of them to measure the held-out loss"
        )
    if config.clips and config.clips > len(clips):
        raise UserError(f"--clips {config.clips}: only {len(clips)} clips to train on in '{data}'")
    return clips[: config.clips], heldout, told


def validation_prompts(config, heldout):
    """Prompts sampled before and after: those given, two of each set in prompts.json beside the data, or held-out captions."""
    if config.validation_prompts:
        return list(config.validation_prompts)
    file = resolve_path(config.data).parent / "prompts.json"
    if file.exists():
        return [prompt for prompts in json.loads(file.read_text()).values() for prompt in prompts[:2]]
    return list(dict.fromkeys(clip.caption for clip in heldout))[:3]


def cache_clips(config, device=None):
    """Code clips and prompts that are not in the cache yet. Returns Cache. Raises UserError, with all bad clips named.

    What is kept of a clip is the posterior of the VAE, mean and log-variance (2C, T, h, w), not one sample of it: a latent is
    drawn anew at each step, as in pretraining.
    """
    import torch

    config, base, _ = resolve(config)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, _ = choose_compute_dtype(device, base, config.compute_dtype)
    train, heldout, _ = split_clips(config)
    folder = cache_folder(config)
    settings = digest(base.fingerprint("vae"), config.frames, config.height, config.width, config.fps, dtype)
    text_settings = digest(base.fingerprint("text_encoder"), base.fingerprint("tokenizer"), base.text_length, dtype)

    def clip_file(clip):
        content = hashlib.sha256(clip.path.read_bytes()).hexdigest()
        return folder / f"{clip.path.stem}-{digest(settings, content)}.safetensors"

    def prompt_file(prompt):
        return folder / f"prompt-{digest(text_settings, prompt)}.safetensors"

    files = {clip: clip_file(clip) for clip in train + heldout}
    missing = {clip: file for clip, file in files.items() if not is_cached(file, "moments")}
    if missing:
        stale = sum(drop_stale(clip, file, settings) for clip, file in missing.items())
        if stale:
            print(f"cache: {stale} clips have changed since they were coded; coding them again", flush=True)
        encode_clips(base, missing, settings, device, dtype)
    prompts = {p: prompt_file(p) for p in ["", *(c.caption for c in files), *validation_prompts(config, heldout)]}
    missing = {p: file for p, file in prompts.items() if not is_cached(file, "prompt_embeds")}
    if missing:
        for file, embeds in zip(missing.values(), encode_prompts(base, list(missing), device, dtype)):
            save_tensor(file, "prompt_embeds", embeds)
    pairs = {clip: (file, prompts[clip.caption]) for clip, file in files.items()}
    return Cache(
        [pairs[c] for c in train], [pairs[c] for c in heldout], prompts[""],
        {p: prompts[p] for p in validation_prompts(config, heldout)},
    )  # fmt: skip


def drop_stale(clip, file, settings):
    """Remove entries of an earlier content of this very clip under the same settings. True if there was one."""
    from safetensors import safe_open

    found = False
    for old in file.parent.glob(f"{glob.escape(clip.path.stem)}-*.safetensors"):
        if not is_cached(old, "moments"):
            continue
        with safe_open(str(old), "pt") as opened:
            metadata = opened.metadata() or {}
        if old != file and metadata.get("source") == str(clip.path) and metadata.get("settings") == settings:
            old.unlink()
            found = True
    return found


def encode_clips(base, missing, settings, device, dtype):
    """Code clips with the VAE, one at a time, so that a clip's code does not depend on its neighbours."""
    import torch
    from tqdm import tqdm

    vae, bad = base.load("vae", dtype).to(device), []
    for clip, file in tqdm(missing.items(), desc="coding clips", unit="clip"):
        try:
            video = clip.video
        except UserError as error:
            bad.append(error)
            continue
        video = (2 * video - 1).to(device, dtype).transpose(0, 1)[None]  # (1, C, F, H, W) in [-1, 1]
        with torch.no_grad():
            moments = vae.encode(video).latent_dist.parameters[0]  # (2C, T, h, w)
        save_tensor(file, "moments", moments, source=str(clip.path), settings=settings)
    if bad:
        more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; {len(missing) - len(bad)} others were fine and are kept in the cache")


def encode_prompts(base, prompts, device, dtype):
    """T5's embeddings of prompts, padded as the model was trained: a list of (L, D)."""
    import torch
    from diffusers import CogVideoXPipeline

    pipe = CogVideoXPipeline(base.load("tokenizer"), base.load("text_encoder", dtype).to(device), None, None, None)
    with torch.no_grad():
        embed = lambda p: pipe.encode_prompt(p, None, False, max_sequence_length=base.text_length, device=device)[0][0]  # noqa: E731
        return [embed(prompt).cpu() for prompt in prompts]


# ----------------------------------------------------------------------------------------------------------- diffusion


def keyed_generator(seed, purpose, step=0, sample=0):
    """A generator for one draw, made from what the draw is for. Randomness then has no state to save: a resumed run, and one
    cut into smaller batches or over more processes, draws the same numbers."""
    import torch

    key = hashlib.blake2b(f"{seed}/{purpose}/{step}/{sample}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)


def draw_latents(moments, scaling_factor, generator, patch_t=None):
    """A latent from the VAE's posterior, scaled as the transformer knows it.

    moments: (2C, T, h, w). Returns float32 (T, C, h, w), with T filled up to a multiple of patch_t by copies of the first
    latent frame put before it: where the pipeline of CogVideoX1.5 has them, and drops them.
    """
    import torch

    mean, logvar = moments.float().chunk(2)
    std = torch.exp(0.5 * logvar.clamp(-30, 20))  # diffusers' DiagonalGaussianDistribution
    latents = scaling_factor * (mean + std * torch.randn(mean.shape, generator=generator)).transpose(0, 1)
    if patch_t and len(latents) % patch_t:
        latents = torch.cat([latents[:1]] * (-len(latents) % patch_t) + [latents])
    return latents


def noisy_and_velocity(latents, noise, alpha_bar):
    """What the transformer sees, and what it should say, both (B, T, C, h, w).

    alpha_bar: float64 (B,). The same as scheduler.add_noise and scheduler.get_velocity, except that those first round alpha_bar
    to the latents' dtype: in bf16 the first timesteps would get no noise at all. Here everything stays in float32.
    """
    a, b = (c.to(latents)[:, None, None, None, None] for c in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    return a * latents + b * noise, a * noise - b * latents


def velocity_loss(transformer, batch, alpha_bar, rotary, dtype):
    """Mean squared error of the predicted velocity, in float32, one number a sample: (B,).

    The reference trainers compare predicted and true clean latents and weight by 1 / (1 - alpha_bar): the same number.
    """
    noisy, target = noisy_and_velocity(batch["latents"], batch["noise"], alpha_bar[batch["timesteps"].cpu()])
    output = transformer(
        hidden_states=noisy.to(dtype), encoder_hidden_states=batch["prompt_embeds"].to(dtype), timestep=batch["timesteps"],
        image_rotary_emb=rotary, return_dict=False,
    )[0]  # fmt: skip
    return ((output.float() - target) ** 2).mean(dim=(1, 2, 3, 4))


def rotary_embedding(base, transformer, frames, height, width, device):
    """What the pipeline would give the transformer as image_rotary_emb: cosines and sines, or None for 2B, which adds sines to
    its patches instead. It is the pipeline's own helper: the grid differs between 5B and 1.5, and at other sizes than the
    native one, where trainers have gone wrong (CogVideo#663)."""
    from diffusers import CogVideoXPipeline

    if not transformer.config.use_rotary_positional_embeddings:
        return None
    pipe = CogVideoXPipeline(None, None, None, transformer, None)
    pipe.vae_scale_factor_spatial = base.spatial
    return pipe._prepare_rotary_positional_embeddings(height, width, sum(base.latent_frames(frames)), device)


class Samples:
    """Training samples by position: everything about sample number n of a run follows from the seed and n."""

    def __init__(self, config, base, cache, scheduler_steps):
        self.config, self.base, self.cache, self.timesteps = config, base, cache, scheduler_steps
        self.empty = load_tensor(cache.empty, "prompt_embeds")

    def clip_at(self, position):
        """Every clip once, in an order drawn by lot, then all again in another order."""
        import torch

        epoch, place = divmod(position, len(self.cache.train))
        order = torch.randperm(len(self.cache.train), generator=keyed_generator(self.config.seed, "order", epoch))
        return self.cache.train[order[place]]

    def training(self, position):
        import torch

        draw = lambda purpose: keyed_generator(self.config.seed, purpose, sample=position)  # noqa: E731
        t = torch.randint(self.timesteps, (), generator=draw("timestep"))
        dropped = torch.rand((), generator=draw("caption dropout")) < self.config.caption_dropout
        return self.sample(self.clip_at(position), t, draw("posterior"), draw("noise"), dropped)

    def heldout(self, index, t):
        """A held-out clip at a fixed timestep under fixed noise, the same for every seed of a run."""
        import torch

        draw = lambda purpose: keyed_generator("held-out", purpose, t, index)  # noqa: E731
        return self.sample(self.cache.heldout[index], torch.tensor(t), draw("posterior"), draw("noise"), False)

    def sample(self, files, t, posterior, noise, dropped):
        import torch

        latents = draw_latents(
            load_tensor(files[0], "moments"), self.base.vae["scaling_factor"], posterior, self.base.patch_t
        )
        return {
            "latents": latents,  # (T, C, h, w)
            "noise": torch.randn(latents.shape, generator=noise),
            "timesteps": t,
            "prompt_embeds": self.empty if dropped else load_tensor(files[1], "prompt_embeds"),  # (L, D)
        }


def collate(samples, device):
    import torch

    return {name: torch.stack([s[name] for s in samples]).to(device) for name in samples[0]}


# ------------------------------------------------------------------------------------------------------------ adapters

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # the attention, as in the reference trainers


def add_lora(transformer, rank, alpha, seed):
    """LoRA on every attention matrix, in float32 whatever the base is in. Returns the trainable parameters."""
    import torch
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_TARGETS, init_lora_weights=True)
        )
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    return parameters


def save_lora(transformer, folder):
    """Write pytorch_lora_weights.safetensors as diffusers does, with the LoraConfig (alpha included) in its metadata, so that
    pipe.load_lora_weights(folder) applies alpha / rank, once."""
    from diffusers import CogVideoXPipeline
    from peft import get_peft_model_state_dict

    layers = {name: p.detach().cpu().contiguous() for name, p in get_peft_model_state_dict(transformer).items()}
    metadata = transformer.peft_config["default"].to_dict()
    CogVideoXPipeline.save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata
    )


def load_lora(transformer, folder):
    """Put saved adapter weights into the adapter that is there already."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(str(Path(folder) / "pytorch_lora_weights.safetensors"))
    missing = set_peft_model_state_dict(transformer, {k.removeprefix("transformer."): v for k, v in state.items()})
    if missing.unexpected_keys:
        raise UserError(f"checkpoint '{folder}': its adapter does not fit this run; start anew without --resume")


# --------------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(folder, step, transformer, optimizer, scaler, limit):
    """Write checkpoint-STEP whole or not at all, then remove the oldest past the limit. Nothing is pickled."""
    import torch
    from safetensors.torch import save_file

    final = folder / f"checkpoint-{step}"
    partial = folder / f"checkpoint-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_lora(transformer, partial)
    state = optimizer.state_dict()
    tensors = {
        f"{i}.{k}": v.contiguous() for i, s in state["state"].items() for k, v in s.items() if torch.is_tensor(v)
    }
    save_file(tensors, str(partial / "optimizer.safetensors"))
    # Data order and random draws follow from the seed and the step (keyed_generator), so the step is all there is to keep.
    kept = {"step": step, "param_groups": state["param_groups"], "scaler": scaler.state_dict() if scaler else None}
    (partial / "state.json").write_text(json.dumps(kept, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in checkpoints(folder)[:-limit]:
        shutil.rmtree(old)


def checkpoints(folder):
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if (p / "state.json").exists()), key=lambda p: int(p.name.split("-")[1]))


def load_checkpoint(folder, transformer, optimizer, scaler):
    """Put a checkpoint's weights and optimizer state back. Returns its step."""
    from safetensors.torch import load_file

    load_lora(transformer, folder)
    saved = json.loads((folder / "state.json").read_text())
    state = {}
    for name, tensor in load_file(str(folder / "optimizer.safetensors")).items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    if scaler:
        scaler.load_state_dict(saved["scaler"])
    return saved["step"]


# ------------------------------------------------------------------------------------------------------------ sampling


def generate(pipe, base, prompt_embeds, empty, config, seed):
    """Clips from the stock pipeline, given embeddings (N, L, D), so that T5 need not be in memory. Clip k starts from the
    noise of seed + k. Returns a list of float (F, C, H, W) in [0, 1] on the CPU."""
    import torch

    clips, at_once = [], 1 if base.large else 8
    for first in range(0, len(prompt_embeds), at_once):
        embeds = prompt_embeds[first : first + at_once]
        video = pipe(
            prompt_embeds=embeds, negative_prompt_embeds=empty.expand_as(embeds), num_frames=config.frames,
            height=config.height, width=config.width, num_inference_steps=config.sampling_steps,
            guidance_scale=config.guidance_scale, max_sequence_length=base.text_length, output_type="pt",
            generator=[torch.Generator().manual_seed(seed + first + k) for k in range(len(embeds))],
        ).frames  # (N, F, C, H, W)  # fmt: skip
        clips += list(video.float().cpu())
    return clips


def sample(run_or_model, prompts, seed=0, **changes):
    """Clips for prompts: from a run (its base with its adapter) or from a model folder or id.

    changes: fields of Config to differ from the run's or the recipe's, such as frames, sampling_steps, guidance_scale. Returns
    a list of float (F, C, H, W) in [0, 1]. Raises UserError.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    run = Path(run_or_model).expanduser()
    is_run = (run / "config.json").exists() and not (run / "model_index.json").exists()
    config = load_config(run / "config.json") if is_run else Config(model=str(run_or_model))
    config, base, _ = resolve(dataclasses.replace(config, resume=False, **changes))
    if is_run and not (run / "pytorch_lora_weights.safetensors").exists():
        raise UserError(
            f"run '{run}': not finished, no pytorch_lora_weights.safetensors; finish it with --resume --out {run}"
        )
    quiet_libraries()
    import torch
    from diffusers import CogVideoXPipeline

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, _ = choose_compute_dtype(device, base, changes.get("compute_dtype"))  # the run may come from another machine
    *embeds, empty = encode_prompts(base, [*prompts, ""], device, dtype)
    pipe = CogVideoXPipeline(
        None, None, base.load("vae", dtype), base.load("transformer", dtype), base.load("scheduler")
    )
    if is_run:
        pipe.load_lora_weights(str(run))
    pipe.to(device).set_progress_bar_config(desc="sampling", leave=False)
    if base.large:
        pipe.vae.enable_tiling()
    return generate(pipe, base, torch.stack(embeds).to(device), empty.to(device), config, seed)


def contact_sheet(rows, labels, columns=6, least_px=96):
    """A PIL image: one clip a row, its frames from left to right, its label above it."""
    import torch
    from PIL import Image, ImageDraw

    zoom = max(1, round(least_px / rows[0].shape[2]))
    frames, height, width = rows[0].shape[0], rows[0].shape[2] * zoom, rows[0].shape[3] * zoom
    shown = torch.linspace(0, frames - 1, min(columns, frames)).round().long()
    sheet = Image.new("RGB", (len(shown) * (width + 2), len(rows) * (height + 18)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (clip, label) in enumerate(zip(rows, labels)):
        draw.text((2, r * (height + 18) + 3), label, fill="black")
        for c, picture in enumerate(clip[shown]):
            sheet.paste(
                to_image(picture).resize((width, height), Image.NEAREST), (c * (width + 2), r * (height + 18) + 16)
            )
    return sheet


def to_image(picture):
    """PIL image of a float (C, H, W) in [0, 1]."""
    from PIL import Image

    return Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def save_animation(path, columns, fps, least_px=128):
    """An animated PNG (which GitHub and notebooks show): columns of clips side by side, each column a list of clips."""
    import torch
    from PIL import Image

    grid = torch.cat([torch.cat(list(column), dim=2) for column in columns], dim=3)  # (F, C, rows * H, columns * W)
    zoom = max(1, round(least_px / columns[0][0].shape[2]))
    pictures = [to_image(f) for f in grid]
    pictures = [p.resize((p.width * zoom, p.height * zoom), Image.NEAREST) for p in pictures]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)


def save_samples(folder, when, clips, prompts, fps):
    """samples/WHEN-K.mp4 for each prompt; once both moments are there, one contact sheet and one animation of the two."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, clip in enumerate(clips):
        write_video(folder / f"{when}-{k}.mp4", clip, fps)
    if when == "after":
        before = [read_video(folder / f"before-{k}.mp4") for k in range(len(clips))]
        rows = [clip for pair in zip(before, clips) for clip in pair]
        contact_sheet(rows, [f"{w}: {p}" for p in prompts for w in ("before", "after")]).save(
            folder / "contact_sheet.png"
        )
        save_animation(folder / "before_and_after.png", [before, clips], fps)


# ------------------------------------------------------------------------------------------------------------ training

HELDOUT_TIMESTEPS = (100, 300, 500, 700, 900)
HELDOUT_CLIPS = 32  # at most, so that the measurement stays cheap


@dataclass
class Run:
    """A finished run: its folder, configuration, summary and one dict of metrics a step."""

    folder: Path
    config: Config
    summary: dict
    metrics: list


def train(config, callbacks=()):
    """Fine-tune, from clips on disk to an adapter on disk. Returns Run. Raises UserError or RunError.

    Each callback is called with the metrics of every step (a dict, see README.md), after they were written.
    """
    started = time.perf_counter()
    config, base, why = resolve(config)
    config.model, config.data = portable(config.model), portable(config.data)
    config.heldout = portable(config.heldout) if config.heldout else None
    folder = run_folder(config)
    train_clips, heldout_clips, told = split_clips(config)

    quiet_libraries()
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from diffusers import CogVideoXPipeline
    from tqdm import tqdm

    cpu = not torch.cuda.is_available()
    device = torch.device("cpu" if cpu else "cuda")
    dtype, reason = choose_compute_dtype(device, base, config.compute_dtype)
    config.compute_dtype = str(dtype).removeprefix("torch.")
    why.append(("arithmetic", f"{config.compute_dtype}: {reason}"))
    AcceleratorState._reset_state()  # runs of one process, such as a notebook's, may differ in their arithmetic
    accelerator = Accelerator(
        mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[config.compute_dtype], cpu=cpu
    )
    device, processes, main = accelerator.device, accelerator.num_processes, accelerator.is_main_process
    share = config.batch_size // processes
    if config.batch_size % processes:
        raise UserError(f"--batch-size {config.batch_size}: must be a multiple of the {processes} processes")

    with accelerator.main_process_first():
        cache = cache_clips(config, device)
    # The base is kept in the dtype of the arithmetic; adapters are float32.
    scheduler, transformer = base.load("scheduler"), base.load("transformer", dtype)
    samples_of = Samples(config, base, cache, scheduler.config.num_train_timesteps)
    alpha_bar = scheduler.alphas_cumprod.double()
    total = sum(p.numel() for p in transformer.parameters())
    parameters = add_lora(transformer, config.rank, config.alpha, config.seed)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    newest = checkpoints(folder)[-1:] if config.resume else []
    if config.resume and main:
        print(
            f"resume: {newest[0]}"
            if newest
            else f"resume: no complete checkpoint in {folder}, starting from the beginning"
        )
    model, optimizer = accelerator.prepare(transformer, optimizer)
    first = load_checkpoint(newest[0], transformer, optimizer, accelerator.scaler) if newest else 0
    if first > config.steps:
        raise UserError(f"--steps {config.steps}: the checkpoint {newest[0].name} is past that already")
    if config.compile:
        transformer.compile()
    rotary = rotary_embedding(base, transformer, config.frames, config.height, config.width, device)

    if main:
        folder.mkdir(parents=True, exist_ok=True)
        # Without `resume`, so that --config repeats the run rather than goes on with one.
        write_json(folder / "config.json", dataclasses.asdict(dataclasses.replace(config, resume=False)))
        trim_metrics(folder / "metrics.jsonl", first)
        banner(
            config,
            base,
            folder,
            total,
            sum(p.numel() for p in parameters),
            len(train_clips),
            len(heldout_clips),
            told,
            why,
        )

    def heldout_loss():
        """Mean over held-out clips at fixed timesteps and under fixed noise: comparable between steps, runs and seeds."""
        transformer.eval()
        jobs = [(i, t) for i in range(min(HELDOUT_CLIPS, len(cache.heldout))) for t in HELDOUT_TIMESTEPS]
        at_once, losses = 1 if base.large else 16, []
        with torch.no_grad(), accelerator.autocast():
            for k in range(0, len(jobs), at_once):
                batch = collate([samples_of.heldout(*job) for job in jobs[k : k + at_once]], device)
                losses.append(velocity_loss(transformer, batch, alpha_bar, rotary, dtype))
        transformer.train()
        return float(torch.cat(losses).mean())

    def draw_samples(when):
        """The validation prompts from the weights as they are, one seed each, always the same."""
        transformer.eval()
        pipe = CogVideoXPipeline(None, None, base.load("vae", dtype).to(device), transformer, scheduler)
        pipe.set_progress_bar_config(desc=f"sampling {when}", leave=False)
        if base.large:
            pipe.vae.enable_tiling()
        embeds = torch.stack([load_tensor(file, "prompt_embeds") for file in cache.prompts.values()]).to(device, dtype)
        clips = generate(pipe, base, embeds, samples_of.empty.to(device, dtype), config, seed=0)
        save_samples(folder / "samples", when, clips, list(cache.prompts), config.fps)
        transformer.train()

    history = read_metrics(folder / "metrics.jsonl") if main else []
    if main and not all((folder / f"samples/before-{k}.mp4").exists() for k in range(len(cache.prompts))):
        draw_samples("before")
    before = history[0]["heldout_before"] if history else heldout_loss()
    step = first
    bar = tqdm(total=config.steps, initial=first, desc="training", disable=not main)
    try:
        while step < config.steps:
            tic = time.perf_counter()
            lr = config.lr * min(1.0, (step + 1) / max(1, config.warmup))
            for group in optimizer.param_groups:
                group["lr"] = lr
            old = [p.detach().clone() for p in parameters]
            positions = range(
                step * config.batch_size + accelerator.process_index, (step + 1) * config.batch_size, processes
            )
            micro, loss = config.micro_batch_size or share, 0.0
            for k in range(0, share, micro):
                batch = collate([samples_of.training(n) for n in positions[k : k + micro]], device)
                with accelerator.autocast():
                    part = velocity_loss(model, batch, alpha_bar, rotary, dtype).sum() / share
                accelerator.backward(part)
                loss += float(part.detach())
            norm = float(accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
            loss = float(accelerator.reduce(torch.tensor(loss, device=device), "mean"))
            if not math.isfinite(loss):
                raise RunError(
                    f"step {step + 1}: the loss is {loss}; lower --lr (now {config.lr:g}); earlier checkpoints are in {folder}"
                )
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            metrics = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, **weight_change(old, parameters)}
            metrics["step_s"] = time.perf_counter() - tic
            if step == 1:
                metrics["heldout_before"] = before
            if step % config.checkpoint_every == 0 or step == config.steps:
                metrics["heldout_loss"] = heldout_loss()
            if main:
                append_json(folder / "metrics.jsonl", metrics)
                history.append(metrics)
                bar.update()
                bar.set_postfix(
                    loss=f"{loss:.3f}", update=f"{metrics['update_ratio']:.1e}", s=f"{metrics['step_s']:.2f}"
                )
                if step % config.checkpoint_every == 0 or step == config.steps:
                    save_checkpoint(folder, step, transformer, optimizer, accelerator.scaler, config.checkpoints_limit)
                for callback in callbacks:
                    callback(metrics)
    except KeyboardInterrupt:
        if main and step > first:
            save_checkpoint(folder, step, transformer, optimizer, accelerator.scaler, config.checkpoints_limit)
        raise RunError(f"stopped at step {step}; go on with --{config.method} --resume --out {folder}")
    finally:
        bar.close()
    if not main:
        return None
    save_lora(transformer, folder)
    draw_samples("after")
    summary = {
        "steps": config.steps,
        "loss_first": mean([m["loss"] for m in history[: max(1, len(history) // 10)]]),
        "loss_last": mean([m["loss"] for m in history[-max(1, len(history) // 10) :]]),
        "heldout_before": before,
        "heldout_after": history[-1]["heldout_loss"],
        "seconds": time.perf_counter() - started,
        "steps_per_s": 1 / mean([m["step_s"] for m in history[len(history) // 10 :]]),
        "peak_memory_gib": peak_memory_gib(),
    }
    write_json(folder / "summary.json", summary)
    write_model_card(folder, config, base, summary, list(cache.prompts))
    return Run(folder, config, summary, history)


def weight_change(old, parameters):
    """How far a step moved the weights: its norm over theirs, and the share of weights whose stored bits changed (in bf16
    small updates are rounded away, and nobody is told)."""
    import torch

    parameters = [p.detach() for p in parameters]
    change = torch.stack(torch._foreach_norm(torch._foreach_sub(parameters, old))).norm()
    norm = torch.stack(torch._foreach_norm(old)).norm().clamp_min(1e-30)
    changed = sum(int((p != o).sum()) for p, o in zip(parameters, old)) / sum(p.numel() for p in old)
    return {"update_ratio": float(change / norm), "changed_share": changed}


def mean(values):
    return sum(values) / len(values)


def peak_memory_gib():
    """Peak of this process: of the card's reserved memory, or of resident memory on a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ------------------------------------------------------------------------------------------------------- a run's folder


def run_folder(config):
    """The folder of this run: --out, the newest run of the method with --resume, or a new one."""
    if config.out:
        folder = Path(config.out).expanduser().resolve()
        if (folder / "metrics.jsonl").exists() and not config.resume:
            kind = "a finished" if (folder / "summary.json").exists() else "an unfinished"
            raise UserError(
                f"--out '{folder}': holds {kind} run already; give another folder, or --resume to go on with it"
            )
        return folder
    if config.resume:
        runs = [p.parent for p in Path("runs").glob(f"{config.method}-*/config.json")]
        if runs:
            return max(runs, key=lambda p: p.stat().st_mtime).resolve()
    return Path(f"runs/{config.method}-{datetime.datetime.now():%Y%m%d-%H%M%S}").resolve()


def write_json(path, value):
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def append_json(path, value):
    with open(path, "a") as file:
        file.write(json.dumps(value) + "\n")


def read_metrics(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trim_metrics(path, step):
    """Keep the metrics of the first `step` steps: later ones will be made again."""
    kept = [m for m in read_metrics(path) if m["step"] <= step]
    path.write_text("".join(json.dumps(m) + "\n" for m in kept))


def banner(config, base, folder, total, trainable, train_count, heldout_count, told, why):
    lines = [
        ("model", f"{config.model}: {total / 1e6:,.1f} M parameters, width {base.width}, {base.transformer['num_layers']} layers"),
        ("method", f"LoRA, rank {config.rank}, alpha {config.alpha:g}: {trainable / 1e6:,.2f} M trainable ({100 * trainable / (total + trainable):.1f} %)"),
        ("data", f"{train_count} clips of {config.frames}x{config.height}x{config.width} at {config.fps} fps; {told}"),
        ("memory", f"{peak_memory_gib():.1f} GiB so far; gradient checkpointing {'on' if config.gradient_checkpointing else 'off'}"),
        *why,
        ("run", str(folder)),
    ]  # fmt: skip
    print("\n".join(f"{name:>10}  {text}" for name, text in lines), flush=True)


def write_model_card(folder, config, base, summary, prompts):
    """README.md of the run, with the metadata that the Hugging Face Hub reads."""
    from huggingface_hub import ModelCardData

    hub_id = config.model if not resolve_path(config.model).exists() else None
    data = ModelCardData(
        base_model=hub_id, library_name="diffusers", pipeline_tag="text-to-video", license="other",
        tags=["text-to-video", "cogvideox", "lora", "diffusers", "cogvideo_lite"],
        instance_prompt=prompts[0] if prompts else None,
    )  # fmt: skip
    call = f", max_sequence_length={base.text_length}" if base.text_length != 226 else ""
    (folder / "README.md").write_text(
        f"""---
{data.to_yaml()}
---

# LoRA of {Path(config.model).name} on {Path(config.data).name}

![before and after](samples/before_and_after.png)

Left: the base model. Right: with this adapter, after {summary["steps"]} steps. Same prompts, same seeds:

{chr(10).join(f"- {prompt}" for prompt in prompts)}

```python
import torch
from diffusers import CogVideoXPipeline

pipe = CogVideoXPipeline.from_pretrained("{config.model}")
pipe.load_lora_weights(".")  # this folder; alpha is stored with the weights
clip = pipe("{prompts[0]}", num_frames={config.frames}, height={config.height}, width={config.width},
            num_inference_steps={config.sampling_steps}, guidance_scale={config.guidance_scale:g}{call}).frames[0]
```

| | |
| --- | --- |
| rank, alpha | {config.rank}, {config.alpha:g} |
| learning rate, steps, batch | {config.lr:g}, {config.steps}, {config.batch_size} |
| held-out loss before, after | {summary["heldout_before"]:.4f}, {summary["heldout_after"]:.4f} |
| time, peak memory | {summary["seconds"]:.0f} s, {summary["peak_memory_gib"]:.1f} GiB |

Everything that decided this run is in `config.json`; `python cogvideo_lite.py --lora --config config.json` repeats it.
Made with cogvideo_lite.
"""
    )


# -------------------------------------------------------------------------------------------------------- command line


def load_config(path, **changes):
    """Config from a JSON or TOML file. Raises UserError."""
    path = Path(path).expanduser()
    try:
        values = tomllib.loads(path.read_text()) if path.suffix == ".toml" else json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"configuration '{path}': cannot be read ({error})")
    if not isinstance(values, dict):
        raise UserError(f"configuration '{path}': not a table of options")
    types = {f.name: f.type for f in dataclasses.fields(Config)}
    for name, value in values.items():
        if name not in types:
            raise UserError(f"configuration '{path}': unknown option {name}; see python cogvideo_lite.py --help")
        fits = isinstance(value, (int, float) if types[name] is float else types[name])
        if value is not None and (not fits or (isinstance(value, bool) and types[name] is not bool)):
            raise UserError(f"configuration '{path}': {name} is {value!r}, {types[name].__name__} needed")
    return Config(**{**values, **changes})


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see python cogvideo_lite.py --help")


def parser():
    """The command line, made from the fields of Config."""
    out = Parser(prog="cogvideo_lite.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = out.add_argument_group("what to do").add_mutually_exclusive_group(required=True)
    action.add_argument("--lora", action="store_const", const="lora", dest="method", help="train low-rank adapters")
    action.add_argument(
        "--sample", nargs="+", metavar="PROMPT", help="generate clips, from --run or from --model alone"
    )
    out.add_argument("--run", help="folder of a finished run, for --sample")
    out.add_argument(
        "--config", help="JSON or TOML file of options, such as a run's config.json; the command line wins over it"
    )
    for f in dataclasses.fields(Config):
        help, choices = f.metadata["help"], f.metadata.get("choices")
        if help is None:
            continue
        name = "--" + f.name.replace("_", "-")
        shown = help if f.default in (None, False) else f"{help} [{f.default}]"
        if f.type is bool:
            out.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=shown)
        else:
            kind, more = (str, {"nargs": "+"}) if f.type is list else (f.type, {})
            out.add_argument(
                name,
                type=kind,
                choices=choices,
                default=argparse.SUPPRESS,
                help=shown,
                metavar=kind.__name__.upper(),
                **more,
            )
    return out


def command_line(argv):
    """Do what the command line says. Returns nothing; raises UserError or RunError."""
    given = vars(parser().parse_args(argv))
    prompts, run, file, method = (given.pop(name) for name in ("sample", "run", "config", "method"))
    if prompts:
        sample_command(prompts, run, given)
        return
    if run:
        raise UserError("--run: only for --sample; a run is continued with --resume --out RUN")
    if given.get("resume") and not file:
        folder = run_folder(Config(method=method, out=given.get("out"), resume=True))
        if (folder / "config.json").exists():  # what is left out stays as it was
            file, given["out"] = folder / "config.json", str(folder)
            before = load_config(file)
            for name in ("model", "rank", "alpha", "seed", "frames", "height", "width", "fps", "batch_size"):
                if name in given and given[name] != getattr(before, name):
                    raise UserError(
                        f"--{name.replace('_', '-')} {given[name]}: this run was started with {getattr(before, name)}; start a new one"
                    )
    config = load_config(file, **{**given, "method": method}) if file else Config(**given, method=method)
    if file and "out" not in given and not config.resume:
        config.out = None  # a repeated run gets a folder of its own
    result = train(config)
    if result is None:
        return
    s = result.summary
    print(
        f"held-out loss {s['heldout_before']:.4f} -> {s['heldout_after']:.4f} in {s['seconds']:.0f} s, peak {s['peak_memory_gib']:.1f} GiB"
    )
    print(f"see {result.folder / 'samples' / 'contact_sheet.png'}")
    print(f"results in {result.folder}")


def sample_command(prompts, run, given):
    if run and not (Path(run) / "config.json").exists():
        raise UserError(f"--run '{run}': no config.json there; give the folder of a run")
    if run and "model" in given:
        raise UserError("--model: the run names its own; leave one of the two out")
    seed = given.pop("seed", 0)
    source = run or given.pop("model", Config.model)
    out = Path(given.pop("out", None) or (Path(run) / "samples" if run else "samples")).expanduser()
    fps = given.get("fps")
    clips = sample(source, prompts, seed=seed, **given)
    fps = fps or (load_config(Path(run) / "config.json").fps if run else find_base(str(source)).fps)
    out.mkdir(parents=True, exist_ok=True)
    for k, (prompt, clip) in enumerate(zip(prompts, clips)):
        slug = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "empty"
        write_video(out / f"{slug}-seed{seed + k}.mp4", clip, fps)
        print(out / f"{slug}-seed{seed + k}.mp4")
    contact_sheet(clips, [f"{p} (seed {seed + k})" for k, p in enumerate(prompts)]).save(out / "sheet.png")
    print(out / "sheet.png")


def main(argv=None):
    """Returns the exit status: 0, 2 for bad input, 1 for a failure while running."""
    try:
        command_line(argv)
        return 0
    except UserError as error:
        print(f"cogvideo_lite: {error}", file=sys.stderr)
        return 2
    except (RunError, OSError, MemoryError) as error:
        print(f"cogvideo_lite: {error or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cogvideo_lite: stopped", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
