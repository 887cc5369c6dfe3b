"""cogvideo_lite: fine-tune CogVideoX without ruining it, in one file.

    python cogvideo_lite.py --lora                                                   the bundled nano model, on any CPU
    python cogvideo_lite.py --qlora --model THUDM/CogVideoX-5b --data my_clips       the real one, its base in 4 bits
    python cogvideo_lite.py --full --model THUDM/CogVideoX-2b --data my_clips        all its weights, at a low rate
    python cogvideo_lite.py --plan --full --model THUDM/CogVideoX-5b                 will that fit, and what would?
    python cogvideo_lite.py --sample "a spider named kumo moving left over water" --run runs/lora-...
    python cogvideo_lite.py --merge runs/lora-...                                    adapter plus base as one transformer
    python cogvideo_lite.py --blend runs/full-... 0.5                                halfway back to the base
    python cogvideo_lite.py --compare runs/lora-... runs/full-...                    a page that puts runs side by side

It reads top to bottom, in the order in which data flows: configuration, clips, base model, how weights are kept and computed,
cache, diffusion, adapters, optimizers, checkpoints, sampling, distortion, training, comparison and blending, memory plan, command
line. The model classes are diffusers' own; so is the sampler. What is written here is what happens between a folder of clips and weights
that stock diffusers loads, and how to tell whether they bent the subject.

Letters in shapes: B clips, F frames, C channels, H height and W width in pixels, T latent frames, h and w latent height
and width, L text tokens, D text width.

What it does not do (yet): image-to-video, LoRA on the text encoder, buckets of several sizes in one run.
"""

import argparse
import bisect
import collections
import contextlib
import csv
import dataclasses
import datetime
import functools
import gc
import glob
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import sys
import time
import tomllib
import traceback
import weakref
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
    lora_targets: str = option(
        "which matrices of a block get adapters: the attention's, as in the reference trainers, or all",
        "attention",
        choices=["attention", "all"],
    )
    optimizer: str = option("optimizer", choices=["adamw", "adamw8bit", "adafactor", "lion8bit"])
    weight_decay: float = option("weight decay of the optimizer", 1e-4)
    l2_to_base: float = option(
        "with --full, pull each weight back to where it began by this share of its distance, times the rate, in each step "
        "(L2-SP, arXiv 1802.01483) [no pull]"
    )
    max_grad_norm: float = option("gradients are clipped to this global norm (not with --fused-backward)", 1.0)
    max_update_rms: float = option(
        "with --fused-backward or adafactor: each tensor's update is clipped to this root mean square, in units of the rate",
        1.0,
    )
    trained_dtype: str = option(
        "how --full keeps the weights; bfloat16 rounds each step stochastically, bfloat16-nearest is there to show why "
        "[float32; bfloat16 if > 0.5 B parameters]",
        choices=["float32", "bfloat16", "bfloat16-nearest"],
    )
    fused_backward: bool = option(
        "step each weight as soon as backward has its gradient, then free the gradient "
        "[--full of > 0.5 B parameters in one process]"
    )
    ema: float = option("decay of a running average of the trained weights, which is then what is kept [no average]")
    ema_on_cpu: bool = option("keep that average in host memory", False)
    prior: str = option("folder of clips of other things, mixed in so that they are not forgotten (arXiv 2208.12242)")
    prior_share: float = option("share of the samples that comes from --prior", 0.5)
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
    stop_on_distortion: bool = option(
        "end the run where its loss on a few held-out clips is above the untrained base's [a warning]", False
    )
    resume: bool = option("continue from the newest complete checkpoint in OUT [the newest run of the method]", False)
    gradient_checkpointing: bool = option(
        "recompute activations in backward: less memory, more time [if > 0.5 B parameters]"
    )
    offload_activations: bool = option("keep activations that backward needs in host memory meanwhile", False)
    quantize_text_encoder: str = option("hold T5 in few bits while it codes prompts", choices=["4bit", "8bit"])
    compile: bool = option("torch.compile the transformer before the first step", False)
    compute_dtype: str = option("arithmetic [chosen by a probe]", choices=["float32", "bfloat16", "float16"])


# What is left out on the command line comes from here; of what is taken the `source` is printed, option by option.
NANO = dict(steps=400, warmup=20, batch_size=4, sampling_steps=20, guidance_scale=3.0, checkpoint_every=200)
LARGE = dict(steps=1500, warmup=100, batch_size=1, sampling_steps=50, guidance_scale=6.0, checkpoint_every=250)
NANO_LORA = dict(
    NANO, lr=2e-3, optimizer="adamw",
    source=dict(
        lr="the lowest held-out loss of five after 500 steps of one clip each, and of three after 400 of four each "
        "(notebooks/study.py results --questions 3 6)",
    ),
)  # fmt: skip
LARGE_LORA = dict(
    LARGE, lr=1e-4, optimizer="adamw",
    source=dict(
        lr="1e-4..1e-3 of CogVideo#116, from below", steps="1500-2000 for 50 clips in diffusers' CogVideoX example",
    ),
)  # fmt: skip
LION = 5  # AdamW's rate over one of Lion's that does as much
RECIPES = {
    ("nano", "lora"): NANO_LORA,
    ("nano", "qlora"): NANO_LORA,
    ("nano", "full"): dict(
        NANO, lr=1e-4, optimizer="adamw",
        source=dict(
            lr="the lowest held-out loss of seven after 500 steps of one clip each, and of three after 400 of four each "
            "(notebooks/study.py results --questions 3 6)",
        ),
    ),
    ("large", "lora"): LARGE_LORA,
    ("large", "qlora"): LARGE_LORA,
    ("large", "full"): dict(
        LARGE, lr=1e-5, optimizer="adafactor",
        source=dict(
            lr="1e-5 of CogVideo#116 (a tenth of the nano's, too, as muP would have it, which did not hold between two small "
            "bases: sweep)",
            optimizer="a 5B model's states do not fit 24 GB otherwise",
        ),
    ),
}  # fmt: skip


FUSED_IN_FP16 = "--fused-backward: fp16 gradients must be unscaled all together; use --no-fused-backward"


MOST_FRAMES = 4001  # more would keep a plan busy for minutes, and mean nothing


def check_numbers(config):
    """Refuse what cannot work before anything is read or written. Raises UserError."""
    for name in ("steps", "batch_size", "micro_batch_size", "rank", "clips", "sampling_steps", "checkpoint_every", "fps",
                 "height", "width", "checkpoints_limit"):  # fmt: skip
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("lr", "alpha", "max_grad_norm", "max_update_rms", "l2_to_base"):
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')} {value}: must be a number above 0")
    for f in dataclasses.fields(Config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        if choices and value is not None and value not in choices:
            raise UserError(f"--{f.name.replace('_', '-')} {value}: must be one of {', '.join(choices)}")
    if not 0 <= config.caption_dropout < 1:
        raise UserError(f"--caption-dropout {config.caption_dropout}: must be in [0, 1)")
    if config.ema is not None and not 0 < config.ema < 1:
        raise UserError(f"--ema {config.ema}: must lie between 0 and 1, such as 0.999")
    if config.ema_on_cpu and config.ema is None:
        raise UserError("--ema-on-cpu: needs --ema DECAY")
    if not 0 < config.prior_share < 1:
        raise UserError(f"--prior-share {config.prior_share}: must lie between 0 and 1")
    if config.l2_to_base and config.method != "full":
        raise UserError("--l2-to-base: only for --full; --weight-decay pulls an adapter towards the base")
    if config.trained_dtype and config.method != "full":
        raise UserError("--trained-dtype: only for --full; adapters are always kept in float32")
    if config.offload_activations and config.gradient_checkpointing is False:
        raise UserError("--offload-activations: would copy the weights out too; use it with gradient checkpointing")
    if config.frames is not None and (config.frames < 1 or config.frames % 8 != 1):
        raise UserError(f"--frames {config.frames}: must be 8k + 1, such as {max(9, config.frames // 8 * 8 + 1)}")
    if config.frames is not None and config.frames > MOST_FRAMES:
        raise UserError(f"--frames {config.frames}: at most {MOST_FRAMES}; the models were made for 49 or 81")


def resolve(config, base=None):
    """Fill what the user left out, from the model's own configuration and the recipe. Returns (config, base, why).

    `why` is a list of (what, reason) lines for the banner. Raises UserError.
    """
    check_numbers(config)
    base = base or find_base(config.model)
    recipe = dict(RECIPES["nano" if base.width < 1000 else "large", config.method])
    source, why = dict(recipe.pop("source")), []
    taken = {k: v for k, v in recipe.items() if getattr(config, k) is None}
    native = {"frames": base.frames, "height": base.height, "width": base.width_px, "fps": base.fps}
    native = {k: v for k, v in native.items() if getattr(config, k) is None}
    config = dataclasses.replace(config, **taken, **native)
    if config.optimizer == "lion8bit" and "lr" in taken:
        taken["lr"] = config.lr = config.lr / LION
        source["lr"] += f"; over {LION} for Lion, each of whose steps is a full one (arXiv 2302.06675: 3 to 10)"
    if taken:
        told = ", ".join(f"{k} {v if isinstance(v, str) else f'{v:g}'}" for k, v in taken.items())
        reasons = "; ".join(f"{k}: {reason}" for k, reason in source.items() if k in taken)
        why.append(("recipe", f"{told} ({reasons})" if reasons else told))
    cell = base.spatial * base.patch
    for name in ("height", "width"):
        if getattr(config, name) % cell:
            raise UserError(f"--{name} {getattr(config, name)}: must be a multiple of {cell} for this model")
        most = base.spatial * base.transformer[f"sample_{name}"]
        if base.patch_t and getattr(config, name) > most:  # CogVideoX1.5 cuts its positions from a table
            raise UserError(f"--{name} {getattr(config, name)}: must be at most {most} for this model")
    if config.micro_batch_size is not None and config.batch_size % config.micro_batch_size:
        raise UserError(f"--micro-batch-size {config.micro_batch_size}: must divide --batch-size {config.batch_size}")
    if config.clips is None and resolve_path(config.data) == HERE / "data_samples/spider":
        config.clips = 50
        why.append(
            ("clips", "the first 50, as in the case that the course is about (CogVideo#116); --clips 200 takes all")
        )
    if config.gradient_checkpointing is None:
        config.gradient_checkpointing = base.large or config.offload_activations
    if config.method == "full" and config.trained_dtype is None:
        config.trained_dtype = "bfloat16" if base.large else "float32"
        why.append(("weights", {
            "float32": "float32, in which no step is too small to be kept",
            "bfloat16": "bfloat16 with stochastic rounding: half the memory of float32, and small steps survive on average",
        }[config.trained_dtype]))  # fmt: skip
    processes = int(os.environ.get("WORLD_SIZE", 1))
    accumulates = (config.micro_batch_size or config.batch_size) != config.batch_size
    if config.fused_backward is None:
        config.fused_backward = config.method == "full" and base.large and processes == 1 and not accumulates
        if config.fused_backward:
            told = "runs inside backward, so that gradients never live together; no clipping to a global norm"
            why.append(("optimizer", told))
        elif config.method == "full" and base.large:
            why.append(("optimizer", "after backward, with all gradients in memory at once, since they are "
                        + ("averaged over processes" if processes > 1 else "summed up over --micro-batch-size")))  # fmt: skip
    if config.fused_backward and processes > 1:  # hooks would step before the gradients of all processes are averaged
        raise UserError(
            f"--fused-backward: in {processes} processes the weights would drift apart; use --no-fused-backward"
        )
    if config.fused_backward and accumulates:
        raise UserError("--micro-batch-size: gradients cannot be summed up when --fused-backward frees them at once; "
                        "use --no-fused-backward")  # fmt: skip
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

    for module in ("backends.cpu.ops", "autograd._functions"):
        logging.getLogger(f"bitsandbytes.{module}").setLevel(logging.ERROR)
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
    height = property(lambda self: self.native[0])
    width_px = property(lambda self: self.native[1])
    sampled_at_once = property(lambda self: 1 if self.large else 8)  # clips
    fps = property(lambda self: 16 if self.patch_t else 8)  # what CogVideoX1.5, and the others, were trained on
    text_length = property(lambda self: self.transformer["max_text_seq_length"])

    @property
    def native(self):
        """(height, width) in pixels that the model was trained at. CogVideoX1.5 is configured for 300 x 300 cells, which bounds
        its positions; what it was trained at is in its model card."""
        cells = self.transformer["sample_height"], self.transformer["sample_width"]
        return (768, 1360) if cells == (300, 300) else tuple(self.spatial * cell for cell in cells)

    def latent_frames(self, frames):
        """Latent frames of a clip, and how many more CogVideoX1.5 puts before them to fill its temporal patches."""
        t = (frames - 1) // self.temporal + 1
        return t, -t % (self.patch_t or 1)

    @functools.cached_property
    def parameters(self):
        """How many the transformer has, from the heads of its weight files."""
        from safetensors import safe_open

        shapes = []
        for path in (self.folder / "transformer").glob("*.safetensors"):
            with safe_open(str(path), "pt") as file:
                shapes += [file.get_slice(name).get_shape() for name in file.keys()]
        return sum(math.prod(shape) for shape in shapes)

    def cls(self, part):
        """The class of a part of the pipeline, diffusers' or transformers'."""
        import diffusers
        import transformers

        library, name = json.loads((self.folder / "model_index.json").read_text())[part]
        return getattr({"diffusers": diffusers, "transformers": transformers}[library], name)

    def load(self, part, dtype=None):
        """One part of the pipeline in its own class, frozen, in eval mode."""
        cls = self.cls(part)
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


def find_base(model, weights=True):
    """Base of a local pipeline folder or of a Hub id (downloaded once, without pickled weights, or without any). Raises UserError."""
    folder, model = resolve_path(model), model.rstrip("/") or model
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
            raise UserError(
                f"model '{model}': no such folder; give a diffusers pipeline folder or a Hub id such as THUDM/CogVideoX-2b"
            )
        from huggingface_hub import snapshot_download

        try:
            patterns = ["*.json", *(["*.safetensors", "*.model", "*.txt"] if weights else [])]
            folder = Path(snapshot_download(model, allow_patterns=patterns))
        except Exception as error:  # the Hub's client raises a dozen kinds; each means that the model cannot be had
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"model '{model}': no such folder, and not to be had from the Hugging Face Hub ({reason})")
    try:
        index = json.loads((folder / "model_index.json").read_text())
        transformer, vae = (json.loads((folder / p / "config.json").read_text()) for p in ("transformer", "vae"))
    except (FileNotFoundError, ValueError) as error:  # no JSON, or no text
        raise UserError(f"model '{model}': not a diffusers pipeline folder ({error})")
    refuse_incomplete(model, "model_index.json", index, {})
    refuse_incomplete(model, "transformer/config.json", transformer, READ_OF_TRANSFORMER)
    refuse_incomplete(model, "vae/config.json", vae, READ_OF_VAE)
    if index.get("_class_name") != "CogVideoXPipeline" or transformer.get("in_channels") != vae.get("latent_channels"):
        raise UserError(
            f"model '{model}': a {index.get('_class_name')}; only text-to-video CogVideoX models can be trained here"
        )
    return Base(folder, transformer, vae)


READ_OF_TRANSFORMER = dict.fromkeys(
    ("num_attention_heads", "attention_head_dim", "num_layers", "in_channels", "patch_size", "max_text_seq_length", "sample_frames",
     "sample_height", "sample_width"), int,
)  # fmt: skip
READ_OF_VAE = dict(
    block_out_channels=list, latent_channels=int, scaling_factor=(int, float), temporal_compression_ratio=(int, float)
)


def refuse_incomplete(model, file, values, needed):
    """diffusers writes every argument of a model into its config.json; what is not as it writes it is told in a line. Raises UserError."""
    if not isinstance(values, dict):
        raise UserError(f"model '{model}': {file} is no table of settings; save it again with save_pretrained")
    for name, kind in needed.items():
        value = values.get(name)
        if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or value < 1)):
            raise UserError(f"model '{model}': {file} has {name} {value!r}; save it again with save_pretrained")


def dtype_on_disk(folder):
    """Of a model's weights."""
    import torch
    from safetensors import safe_open

    with safe_open(str(next(folder.glob("*.safetensors"))), "pt") as file:
        spelled = file.get_slice(next(iter(file.keys()))).get_dtype()
    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[spelled]


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
        if dtype_on_disk(base.folder / "transformer") == torch.float16:
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


# ---------------------------------------------------------------------------------- how weights are kept, and computed
# Two settings. A weight may be kept in 4 bits or in bf16 to save memory and be computed with in fp32, because the processor
# has no bf16 units; or be kept in fp32, because it is trained, and be computed with in bf16. The arithmetic is that of the
# activations, everywhere: no autocast, which would keep fp32 copies of every layer norm's input.

QUANTIZED = {
    "transformer": re.compile(r"transformer_blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"),
    "text_encoder": re.compile(r"encoder\.block\.\d+\..*\.(q|k|v|o|wi|wi_0|wi_1)"),  # T5 reads the dtype of its own wo
}


def load_quantized(base, part, dtype, device, bits=4):
    """Transformer or T5 on a device, its big matrices in few bits, the rest (adaLN, embeddings, norms, projections in and out)
    as `frozen_dtype` says. Returns the module, frozen, in eval mode.

    bits: 4 is NF4 with double quantization (arXiv 2305.14314), 8 is LLM.int8 (arXiv 2208.07339). Each matrix is quantized when
    it is read, so that the whole model is never in memory in 16 bits. diffusers' own loader does the same, but on a GPU only.
    """
    import bitsandbytes as bnb
    import torch
    from accelerate import init_empty_weights
    from accelerate.utils import set_module_tensor_to_device
    from safetensors import safe_open

    cls, folder, chosen = base.cls(part), base.folder / part, QUANTIZED[part]
    rest = dtype if part == "text_encoder" else frozen_dtype(base, dtype)  # T5's norms would change the arithmetic
    with init_empty_weights(include_buffers=False):  # buffers are computed, not read
        if part == "transformer":
            model = cls.from_config(cls.load_config(folder))
        else:
            model = cls(cls.config_class.from_pretrained(folder))

    def quantized(weight, plain):
        size = plain.in_features, plain.out_features
        if bits == 8:
            layer = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
            layer.weight = bnb.nn.Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False).to(
                device
            )
        else:
            layer = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=dtype, device="meta")
            # From the numbers on disk, so that the same base has the same bits whatever the arithmetic, to which they come back.
            layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", module=layer).to(device)
            layer.weight.quant_state.dtype = dtype
            layer.support_avx512bf16_for_cpu = False  # it repacks the weights in place at the first sample, for good
        layer.bias = plain.bias
        return layer

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt", backend="pread") as opened:  # mapped files would stay resident as a whole
            for key in opened.keys():
                owner, _, leaf = key.rpartition(".")
                tensor = opened.get_tensor(key)
                if leaf == "weight" and chosen.fullmatch(owner):
                    model.set_submodule(owner, quantized(tensor, model.get_submodule(owner)))
                else:
                    # What T5 adds to its activations after each block overflows in fp16; transformers keeps it in float32 too.
                    kept = torch.float32 if rest == torch.float16 and ".wo." in key else rest
                    set_module_tensor_to_device(model, key, device, value=tensor, dtype=kept)
    if part == "text_encoder":
        model.tie_weights()
    absent = [name for name, p in model.named_parameters() if p.is_meta]
    if absent:
        raise UserError(f"model '{base.folder}': {len(absent)} weights are not in its files, {absent[0]} among them")
    model.is_loaded_in_4bit = bits == 4  # peft makes its 4-bit layers only if told so
    return model.requires_grad_(False).eval().to(device)  # 2B's table of positions is no weight, and not there yet


def frozen_dtype(base, dtype, part="transformer"):
    """How weights that are not trained are kept: as they are computed with, but a large model's in no more bits than on disk. part: of
    the base, or a run's folder with a transformer of its own."""
    on_disk = dtype_on_disk(base.folder / part)
    return on_disk if base.large and dtype.itemsize > on_disk.itemsize else dtype


def load_transformer(config, base, dtype, device):
    """The base transformer as a method keeps it, frozen."""
    import torch

    if config.method == "qlora":
        return load_quantized(base, "transformer", dtype, device)
    kept = frozen_dtype(base, dtype)
    if config.method == "full":
        kept = torch.float32 if config.trained_dtype == "float32" else torch.bfloat16
    return base.load("transformer", kept).to(device)


@functools.cache
def converting_layers():
    """{layer of torch: the same layer, converting its weights when it needs them}. Classes, and no function an instance: to
    torch.compile each of those would be another model, so that it compiled anew for every block, and gave up after eight."""
    import torch
    import torch.nn.functional as F

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(x if weight.requires_grad else None, weight)
            ctx.bias = bias is not None and bias.requires_grad, None if bias is None else bias.dtype
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            dx = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
            rows = grad.flatten(0, -2)
            dw = (rows.T @ x.flatten(0, -2)).to(weight.dtype) if ctx.needs_input_grad[1] else None
            return dx, dw, rows.sum(0).to(ctx.bias[1]) if ctx.bias[0] else None

    def converted(p, x):
        return None if p is None else p.to(x.dtype)

    class Linear(torch.nn.Linear):
        def forward(self, x):
            return Function.apply(x, self.weight, self.bias)

    class LayerNorm(torch.nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x, self.normalized_shape, converted(self.weight, x), converted(self.bias, x), self.eps)

    class Conv2d(torch.nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, converted(self.weight, x), converted(self.bias, x))

    return {torch.nn.Linear: Linear, torch.nn.LayerNorm: LayerNorm, torch.nn.Conv2d: Conv2d}


def compute_in_dtype_of_input(model, dtype):
    """Let every layer whose weights are not in `dtype` convert them when it needs them, forward and backward, and forget the
    converted copy: the memory of one layer, not of the model. Gradients arrive in the dtype in which the weight is kept."""
    from peft.tuners.lora import LoraLayer

    converting = converting_layers()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # peft would keep a float32 copy of every input instead
        if type(module) in converting and any(p.dtype != dtype for p in module.parameters(recurse=False)):
            module.__class__ = converting[type(module)]


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
    prior: list = field(default_factory=list)  # clips of --prior, as in `train`


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


def clip_size(config):
    return config.frames, config.height, config.width, config.fps


def split_clips(config):
    """(training clips, held-out clips, a sentence on how they were told apart). Raises UserError."""
    clips = read_clips(config.data, *clip_size(config))
    data = resolve_path(config.data)
    folder = resolve_path(config.heldout) if config.heldout else data.with_name(data.name + "-heldout")
    if config.heldout or folder.is_dir():
        heldout, told = read_clips(folder, *clip_size(config)), f"held out: the clips of {folder.name}"
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
    """Prompts sampled before and after: those given, two of each set in prompts.json beside the data, or held-out captions.

    Returns prompt -> folder of the real clips that its samples are compared with: that of the set's name beside
    prompts.json, if there is one, else the data.
    """
    data = resolve_path(config.data)
    if config.validation_prompts:
        return dict.fromkeys(config.validation_prompts, data)
    file = data.parent / "prompts.json"
    if not file.exists():
        return dict.fromkeys(list(dict.fromkeys(clip.caption for clip in heldout))[:3], data)
    found = {}
    for name, prompts in json.loads(file.read_text()).items():
        folder = data.parent / name
        found |= dict.fromkeys(prompts[:2], folder if folder.is_dir() else data)
    return found


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
    prior = read_clips(config.prior, *clip_size(config)) if config.prior else []
    folder = cache_folder(config)
    settings = digest(base.fingerprint("vae"), config.frames, config.height, config.width, config.fps, dtype)
    text_settings = digest(
        base.fingerprint("text_encoder"),
        base.fingerprint("tokenizer"),
        base.text_length,
        dtype,
        config.quantize_text_encoder,
    )

    def clip_file(clip):
        content = hashlib.sha256(clip.path.read_bytes()).hexdigest()
        return folder / f"{clip.path.stem}-{digest(settings, content)}.safetensors"

    def prompt_file(prompt):
        return folder / f"prompt-{digest(text_settings, prompt)}.safetensors"

    files = {clip: clip_file(clip) for clip in train + heldout + prior}
    missing = {clip: file for clip, file in files.items() if not is_cached(file, "moments")}
    if missing:
        stale = sum(drop_stale(clip, file, settings) for clip, file in missing.items())
        if stale:
            print(f"cache: {stale} clips have changed since they were coded; coding them again", flush=True)
        encode_clips(base, missing, settings, device, dtype)
    prompts = {p: prompt_file(p) for p in ["", *(c.caption for c in files), *validation_prompts(config, heldout)]}
    missing = {p: file for p, file in prompts.items() if not is_cached(file, "prompt_embeds")}
    if missing:
        for file, embeds in zip(
            missing.values(), encode_prompts(base, list(missing), device, dtype, config.quantize_text_encoder)
        ):
            save_tensor(file, "prompt_embeds", embeds)
    pairs = {clip: (file, prompts[clip.caption]) for clip, file in files.items()}
    return Cache(
        [pairs[c] for c in train], [pairs[c] for c in heldout], prompts[""],
        {p: prompts[p] for p in validation_prompts(config, heldout)}, [pairs[c] for c in prior],
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
    if base.large:
        tile_beyond_own_size(vae)
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


def tile_beyond_own_size(vae):
    """Let clips that are larger than what the VAE is configured for, such as those of CogVideoX1.5, be coded in overlapping tiles of that
    size: whole, one of 81x768x1360 would take 30 GiB (predicted). Others are coded whole."""
    vae.enable_tiling(vae.config.sample_height, vae.config.sample_width)


def encode_prompts(base, prompts, device, dtype, quantize=None):
    """T5's embeddings of prompts, padded as the model was trained: a list of (L, D). quantize: None, "4bit" or "8bit"."""
    import torch
    from diffusers import CogVideoXPipeline

    if quantize:
        text_encoder = load_quantized(base, "text_encoder", dtype, device, int(quantize.removesuffix("bit")))
    else:
        text_encoder = base.load("text_encoder", frozen_dtype(base, dtype, "text_encoder")).to(device)
        convert_while_running(text_encoder, dtype)
    pipe = CogVideoXPipeline(base.load("tokenizer"), text_encoder, None, None, None)
    how = dict(do_classifier_free_guidance=False, max_sequence_length=base.text_length, device=device, dtype=dtype)
    with torch.no_grad():
        found = [pipe.encode_prompt(prompt, None, **how)[0][0].cpu() for prompt in prompts]
    del pipe, text_encoder
    free_memory()
    return found


def convert_while_running(text_encoder, dtype):
    """Let T5, kept in fewer bits than `dtype`, compute in it: one block at a time is converted, and given back when it has run. Layer by
    layer, as `compute_in_dtype_of_input` has it, will not do, since T5 converts its activations to the dtype of its weights."""
    if text_encoder.dtype == dtype:
        return

    def convert(block, inputs):
        block.kept = [(p, p.data) for p in block.parameters()]
        for p, stored in block.kept:
            p.data = stored.to(dtype)

    def give_back(block, inputs, outputs):
        for p, stored in block.kept:
            p.data = stored
        del block.kept

    text_encoder.shared.register_forward_hook(lambda module, inputs, out: out.to(dtype))
    text_encoder.encoder.final_layer_norm.to(dtype)
    for block in text_encoder.encoder.block:
        block.register_forward_pre_hook(convert)
        block.register_forward_hook(give_back)


def free_memory():
    """Give back what models left behind that refer to themselves, as those with quantized layers do."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------------- diffusion


def keyed_generator(seed, purpose, step=0, sample=0, device="cpu"):
    """A generator for one draw, made from what the draw is for. Randomness then has no state to save: a resumed run, and one
    cut into smaller batches or over more processes, draws the same numbers."""
    import torch

    key = hashlib.blake2b(f"{seed}/{purpose}/{step}/{sample}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key, "little") >> 1)


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
        """Every clip once, in an order drawn by lot, then all again in another order; now and then one of the prior instead."""
        import torch

        if self.cache.prior:
            drawn = keyed_generator(self.config.seed, "prior", sample=position)
            if torch.rand((), generator=drawn) < self.config.prior_share:
                return self.cache.prior[torch.randint(len(self.cache.prior), (), generator=drawn)]
        epoch, place = divmod(position, len(self.cache.train))
        order = torch.randperm(len(self.cache.train), generator=keyed_generator(self.config.seed, "order", epoch))
        return self.cache.train[order[place]]

    def training(self, position):
        import torch

        draw = lambda purpose: keyed_generator(self.config.seed, purpose, sample=position)  # noqa: E731
        t = torch.randint(self.timesteps, (), generator=draw("timestep"))
        dropped = torch.rand((), generator=draw("caption dropout")) < self.config.caption_dropout
        return self.sample(self.clip_at(position), t, draw("posterior"), draw("noise"), dropped)

    def heldout(self, files, index, t):
        """The held-out clip number `index` at a fixed timestep under fixed noise, the same for every seed of a run."""
        import torch

        draw = lambda purpose: keyed_generator("held-out", purpose, t, index)  # noqa: E731
        return self.sample(files, torch.tensor(t), draw("posterior"), draw("noise"), False)

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

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LORA_TARGETS = {"attention": ATTENTION, "all": ATTENTION + ["ff.net.0.proj", "ff.net.2"]}


def add_lora(transformer, rank, alpha, seed, targets="attention"):
    """LoRA on matrices of every block, in float32 whatever the base is in. Returns the trainable parameters."""
    import torch
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_TARGETS[targets], init_lora_weights=True)
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


# ---------------------------------------------------------------------------------------------------------- optimizers


def new_optimizer(config, parameter):
    """A kept library's optimizer of one tensor. Rates mean the same for all but Lion, whose every step is a full one."""
    import bitsandbytes as bnb
    import torch
    from transformers.optimization import Adafactor

    shared = dict(lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW([parameter], betas=(0.9, 0.95), foreach=False, **shared)
    if config.optimizer == "adamw8bit":
        return bnb.optim.AdamW8bit([parameter], betas=(0.9, 0.95), **shared)
    if config.optimizer == "lion8bit":
        return bnb.optim.Lion8bit([parameter], betas=(0.9, 0.99), **shared)
    # Row and column sums in place of second moments, no first moments. torch's own Adafactor would multiply the rate by
    # the size of the weights, and could not be told not to.
    return Adafactor(
        [parameter], scale_parameter=False, relative_step=False, clip_threshold=config.max_update_rms, **shared
    )


def round_stochastically(x, generator):
    """float32 to bfloat16, up or down with probabilities that make the mean exact: a step a tenth as large as the gap between
    two bfloat16 numbers is taken one time in ten. Rounding to nearest drops it every time."""
    import torch

    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = (x.contiguous().view(torch.int32) + noise) & -(2**16)  # bfloat16 is the upper half of float32
    return torch.where(x.isfinite(), bits.view(torch.float32), x).bfloat16()


def squares(tensor):
    """Sum of squares, in float32, in one pass."""
    flat = tensor.detach().float().flatten()
    return flat.dot(flat)


class Updates:
    """Steps the trained weights, one tensor at a time, each with an optimizer of its own.

    Where weights are kept in bf16, the optimizer is shown a float32 copy of the one tensor that it is stepping, and what comes
    out is rounded. With --fused-backward that happens as soon as backward has the tensor's gradient, which is then freed, so
    that gradients never live together. The price: no clipping to a global norm (each tensor's update is clipped instead, as in
    arXiv 1804.04235) and no summing up of gradients. Otherwise, `step` does it for all.
    """

    def __init__(self, config, parameters):
        import torch

        self.config, self.parameters, self.lr, self.step_number = config, parameters, config.lr, 0
        self.param_groups = [{"params": parameters}]  # what torch's GradScaler looks for
        self.shown = [
            p if p.dtype == torch.float32 else torch.nn.Parameter(torch.empty(0, device=p.device)) for p in parameters
        ]
        self.optimizers = [new_optimizer(config, p) for p in self.shown]
        self.began = [p.detach().clone() for p in parameters] if config.l2_to_base else None
        # Of a step: squares of change, weights and gradients, and the number of weights whose bits changed.
        self.sums = torch.zeros(4, dtype=torch.float64, device=parameters[0].device)
        self.under_way = False  # weights have changed in a step that is not written down yet: no state to keep
        if config.fused_backward:
            me = weakref.ref(self)  # the weights would keep what keeps them, where Python's collector does not see it
            for i, p in enumerate(parameters):
                p.register_post_accumulate_grad_hook(lambda _, i=i: me().update(i))

    def update(self, i):
        """One optimizer step of tensor i, which frees its gradient."""
        import torch

        with torch.no_grad():
            self.under_way = True
            p, shown, optimizer = self.parameters[i], self.shown[i], self.optimizers[i]
            old, gradients = p.detach().clone(), squares(p.grad)
            if shown is not p:
                shown.data, shown.grad = p.float(), p.grad.float()
            optimizer.param_groups[0]["lr"] = self.lr
            optimizer.step()
            if self.began:
                shown.lerp_(self.began[i].to(shown), self.lr * self.config.l2_to_base)
            if self.config.fused_backward:
                change = shown - old.float()
                excess = change.square().mean().sqrt() / (self.lr * self.config.max_update_rms)
                shown.copy_(torch.where(excess > 1, old.float() + change / excess, shown))
            if shown is not p:
                if self.config.trained_dtype == "bfloat16":
                    draw = keyed_generator(self.config.seed, "rounding", self.step_number, i, p.device)
                    p.copy_(round_stochastically(shown.data, draw))
                else:
                    p.copy_(shown.data)
                shown.grad, shown.data = None, torch.empty(0, device=p.device)
            p.grad = None
            change = p.float() - old.float()
            self.sums += torch.stack([squares(change), squares(old), gradients, change.count_nonzero()])

    def step(self):
        if not self.config.fused_backward:
            for i in range(len(self.parameters)):
                self.update(i)

    def measured(self):
        """Of the step just made: norm of the gradients, norm of the change over norm of the weights, and the share of weights
        whose stored bits changed (in bf16, small steps are rounded away, and nobody is told)."""
        change, weights, gradients, changed = self.sums.tolist()
        self.sums.zero_()
        return {
            "grad_norm": gradients**0.5,
            "update_ratio": (change / max(weights, 1e-60)) ** 0.5,
            "changed_share": changed / sum(p.numel() for p in self.parameters),
        }

    def state(self):
        """(tensors by name, numbers by name)."""
        import torch

        states = {
            f"{i}.{k}": v for i, o in enumerate(self.optimizers) for k, v in o.state.get(self.shown[i], {}).items()
        }
        tensors = {k: v.detach().contiguous() for k, v in states.items() if torch.is_tensor(v)}
        return tensors, {k: v for k, v in states.items() if k not in tensors}

    def load_state(self, tensors, numbers):
        for name, value in {**tensors, **numbers}.items():
            i, key = name.split(".", 1)
            shown = self.shown[int(i)]
            if name in tensors and value.dim():  # counters stay on the CPU
                value = value.to(shown.device)
            self.optimizers[int(i)].state[shown][key] = value


class Average:
    """Exponential moving average of weights, in float32: in bf16 a share of 0.001 of a change would be rounded away."""

    def __init__(self, parameters, decay, device=None):
        import torch

        self.parameters, self.decay = parameters, decay
        self.tensors = [p.detach().to(device or p.device, torch.float32, copy=True) for p in parameters]

    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))  # as diffusers' EMAModel: a short memory at first
        for average, p in zip(self.tensors, self.parameters):
            average.lerp_(p.detach().to(average), 1 - decay)

    @contextlib.contextmanager
    def in_place(self):
        """The average stands where the weights are, for a while."""
        import torch

        with torch.no_grad():
            weights = [p.detach().to(a.device, copy=True) for p, a in zip(self.parameters, self.tensors)]
            for p, average in zip(self.parameters, self.tensors):
                p.copy_(average)
            try:
                yield
            finally:
                for p, weight in zip(self.parameters, weights):
                    p.copy_(weight)


# --------------------------------------------------------------------------------------------------------- checkpoints


def save_trained(transformer, method, folder):
    """What a run gives: adapter weights, or the whole transformer as a diffusers folder."""
    if method != "full":
        return save_lora(transformer, folder)
    partial = folder / "transformer.partial"
    shutil.rmtree(partial, ignore_errors=True)
    transformer.save_pretrained(partial)
    shutil.rmtree(folder / "transformer", ignore_errors=True)
    os.replace(partial, folder / "transformer")


def load_trained(transformer, method, folder):
    """Put what save_trained wrote back into a transformer that is ready for it."""
    from safetensors.torch import load_file

    if method != "full":
        return load_lora(transformer, folder)
    weights = dict(transformer.named_parameters())
    for file in (folder / "transformer").glob("*.safetensors"):
        for name, tensor in load_file(str(file)).items():
            weights[name].data.copy_(tensor)


def save_checkpoint(folder, step, config, transformer, updates, average, scaler):
    """Write checkpoint-STEP whole or not at all, then remove the oldest past the limit. Nothing is pickled."""
    from safetensors.torch import save_file

    final = folder / f"checkpoint-{step}"
    partial = folder / f"checkpoint-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_trained(transformer, config.method, partial)
    tensors, numbers = updates.state()
    save_file(tensors, str(partial / "optimizer.safetensors"))
    if average:
        save_file({str(i): a for i, a in enumerate(average.tensors)}, str(partial / "average.safetensors"))
    # Data order and random draws follow from the seed and the step (keyed_generator), so the step is all there is to keep.
    kept = {"step": step, "optimizer": numbers, "scaler": scaler.state_dict()}
    (partial / "state.json").write_text(json.dumps(kept, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in checkpoints(folder)[: -config.checkpoints_limit]:
        shutil.rmtree(old)


def checkpoints(folder):
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if (p / "state.json").exists()), key=lambda p: int(p.name.split("-")[1]))


def load_checkpoint(folder, config, transformer, updates, average, scaler):
    """Put a checkpoint's weights, optimizer state and average back. Returns its step."""
    from safetensors.torch import load_file

    load_trained(transformer, config.method, folder)
    saved = json.loads((folder / "state.json").read_text())
    updates.load_state(load_file(str(folder / "optimizer.safetensors")), saved["optimizer"])
    if average:
        for i, tensor in load_file(str(folder / "average.safetensors")).items():
            average.tensors[int(i)].copy_(tensor)
    scaler.load_state_dict(saved["scaler"])
    return saved["step"]


# ------------------------------------------------------------------------------------------------------------ sampling


def generate(pipe, base, prompt_embeds, empty, config, seed):
    """Clips from the stock pipeline, given embeddings (N, L, D), so that T5 need not be in memory. Clip k starts from the
    noise of seed + k. Returns a list of float (F, C, H, W) in [0, 1] on the CPU."""
    import torch

    clips, at_once = [], base.sampled_at_once
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
    if is_run and not (run / "summary.json").exists():
        raise UserError(f"run '{run}': not finished; finish it with --{config.method} --resume --out {run}")
    quiet_libraries()
    import torch
    from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, _ = choose_compute_dtype(device, base, changes.get("compute_dtype"))  # the run may come from another machine
    *embeds, empty = encode_prompts(base, [*prompts, ""], device, dtype, config.quantize_text_encoder)
    if is_run and config.method == "full":
        kept = frozen_dtype(base, dtype, (run / "transformer").resolve())
        transformer = CogVideoXTransformer3DModel.from_pretrained(run / "transformer", dtype=kept).to(device)
    else:
        transformer = load_transformer(config, base, dtype, device)
    if is_run and config.method != "full":
        add_lora(transformer, config.rank, config.alpha, config.seed, config.lora_targets)
        load_lora(transformer, run)
    compute_in_dtype_of_input(transformer.requires_grad_(False), dtype)
    vae = base.load("vae", dtype).to(device)
    if base.large:
        vae.enable_tiling()
    pipe = CogVideoXPipeline(None, None, vae, transformer.eval(), base.load("scheduler"))
    pipe.set_progress_bar_config(desc="sampling", leave=False)
    return generate(pipe, base, torch.stack(embeds).to(device), empty.to(device), config, seed)


def merge(run, out=None):
    """Add a run's adapter to the weights of its base and write the sum as `out`/transformer [RUN/merged], which stock diffusers
    loads. Returns what was rounded, as a dict:

    rounding: norm of what the dtype of the base cannot hold, over the norm of the adapter's change; unchanged_share: adapted
    weights that are the same bits as before; nf4_error (QLoRA): norm of what NF4 had changed in the base that the adapter was
    trained on, over the norm of the adapter's change. Raises UserError.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import LoraLayer

    run = Path(run).expanduser()
    if not (run / "pytorch_lora_weights.safetensors").exists():
        raise UserError(
            f"run '{run}': no pytorch_lora_weights.safetensors; only finished --lora and --qlora runs can be merged"
        )
    config, out = load_config(run / "config.json"), Path(out).expanduser() if out else run / "merged"
    refuse_pipeline(out)
    quiet_libraries()
    base = find_base(config.model)
    dtype = dtype_on_disk(base.folder / "transformer")
    transformer = base.load("transformer", dtype)
    quantized = load_quantized(base, "transformer", torch.float32, "cpu") if config.method == "qlora" else None
    add_lora(transformer, config.rank, config.alpha, config.seed, config.lora_targets)
    load_lora(transformer, run)
    change = rounding = nf4 = 0.0
    unchanged = adapted = 0
    with torch.no_grad():
        for name, layer in transformer.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            weight, delta = layer.get_base_layer().weight, layer.get_delta_weight("default").float()
            old, exact = weight.clone(), weight.float() + delta
            if quantized:
                coarse = quantized.get_submodule(name).weight
                nf4 += float((dequantize_4bit(coarse.data, coarse.quant_state) - old.float()).square().sum())
            weight.copy_(exact)
            change += float(delta.square().sum())
            rounding += float((weight.float() - exact).square().sum())
            unchanged, adapted = unchanged + int((weight == old).sum()), adapted + weight.numel()
    transformer.unload_lora()
    out.mkdir(parents=True, exist_ok=True)
    save_trained(transformer, "full", out)
    found = {"dtype": str(dtype).removeprefix("torch."), "rounding": (rounding / change) ** 0.5,
             "unchanged_share": unchanged / adapted}  # fmt: skip
    return found | ({"nf4_error": (nf4 / change) ** 0.5} if quantized else {})


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


# ---------------------------------------------------------------------------------------------------------- distortion
# Is the subject bent out of shape? No downloaded network judges: optical flow and geometry do, against real clips of the same
# kind. Where the subject is, how it changes from frame to frame, which outlines it has and what surrounds it are measured;
# each measure then says how far the clip lies from the reference, in units of how far reference clips lie from each other.

WORK_PX = 128  # clips are measured with their short side scaled to this
ANGLES, RADII = 64, 24  # of an outline in polar coordinates around its centroid
LEAST_SUBJECT_PX = 40  # at working size
OWN_COLOURS_GAIN = 0.15  # see subject_masks
LEAST_REFERENCE = 3  # clips
SUBJECT_MOTION = ("residual", "strain", "folding", "vanishing")
SHAPE = ("outlines", "markings")
MOTION = (*SUBJECT_MOTION, "wobble", "shake")
TEXTURE = ("pattern", "flicker", "grid", "lines")
# What no eye would notice, however alike the reference clips are.
LEAST_SPREAD = {"outlines": 0.01, "markings": 0.02, "residual": 0.002, "strain": 0.005, "folding": 0.02, "vanishing": 0.02,
                "wobble": 0.004, "shake": 0.004, "pattern": 0.12, "flicker": 0.01, "grid": 0.5, "lines": 0.002}  # fmt: skip
TO_LUMA_CHROMA = ((0.299, -0.299, 0.701), (0.587, -0.587, -0.587), (0.114, 0.886, -0.114))  # Y, B - Y, R - Y (BT.601)
REFERENCE_MEASURES = (*SHAPE, *MOTION, *TEXTURE)
COMPANIONS = ("speed", "sharpness", "saturation", "grid")


@dataclass
class Distortion:
    """How a clip compares with real clips of its kind. All finite, whatever the clip."""

    score: float  # 0 for clips like the reference, larger is more distorted: shape + motion + texture, less `Reference.usual`
    shape: float  # outlines or markings that no reference clip shows, in any rotation, size or mirror image
    motion: float  # changes between frames that no shift, turn or zoom of the subject explains
    texture: float  # of the surroundings: grid patterns, noise, blur
    # Companions, each as a ratio to the reference's median: 1 is like the reference.
    speed: float  # of the subject, in its own sizes a frame; a frozen clip is no undistorted one
    sharpness: float
    saturation: float  # of the subject
    grid: float  # energy at the period of the codec's patches, 16 px (CogVideo#590)
    unjudged: tuple  # what could not be measured, and why


@dataclass
class Reference:
    """Statistics of real clips, made once by `reference_statistics`."""

    clips: list  # of each clip, what `measure` found of it (REFERENCE_MEASURES)
    typical: dict  # measure -> (median, spread) of how far one reference clip lies from the others
    companions: dict  # companion -> median
    usual: float  # median over reference clips of shape + motion + texture


def scaled_for_measuring(clip):
    """Colours float32 (F, h, w, 3) with a short side of WORK_PX; a contrast image uint8 (F, h, w): the colours' first
    principal component over its spread, since brightness alone would not tell a green subject from green ground; the spread."""
    import cv2
    import numpy as np

    video = clip.transpose(0, 2, 3, 1)  # (F, H, W, C)
    scale = WORK_PX / min(video.shape[1:3])
    size = [min(4 * WORK_PX, round(s * scale)) for s in video.shape[2:0:-1]]
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    video = np.stack([cv2.resize(frame, size, interpolation=how) for frame in video]).clip(0, 1)
    colours = video.reshape(-1, 3)
    centred = colours - colours.mean(0)
    _, axes = np.linalg.eigh(centred[::7].T @ centred[::7])
    main = axes[:, -1] * (np.sign(axes[:, -1].sum()) or 1)
    contrast = (centred @ main).reshape(video.shape[:3])
    spread = max(float(contrast.std()), 1e-3)
    return video, (128 + 42 * contrast / spread).clip(0, 255).astype(np.uint8), spread


def pixel_grid(height, width):
    """Coordinates (h, w, 2) as x, y."""
    import numpy as np

    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)


def without_camera(flow, grid):
    """Flow (h, w, 2) less the similarity that most of it follows."""
    import cv2
    import numpy as np

    here = grid[4::8, 4::8].reshape(-1, 2)
    camera, _ = cv2.estimateAffinePartial2D(here, here + flow[4::8, 4::8].reshape(-1, 2), ransacReprojThreshold=0.5)
    camera = np.eye(2, 3) if camera is None else camera
    return flow - (grid @ camera[:, :2].T + camera[:, 2] - grid).astype(np.float32)


def subject_masks(video, speed):
    """Masks bool (F, h, w) of the subject, and how it was found: "moves" (against its surroundings) or "stands out".

    speed: (F, h, w) px a frame, the camera's taken off. Flow finds the place, colour the outline: a pixel near the motion
    belongs to the subject if its colour is met there more often than elsewhere. Motion may show a part of the subject only;
    then the rest has the same colours. So a second guess, in which the frame's border stands for the surroundings, is taken
    where its colours are much more its own and it moves, and where nothing or everything moves.
    """
    import cv2
    import numpy as np

    code = (video * 15.999).astype(np.int32) @ np.array([256, 16, 1])  # colours in 16 steps a channel

    def colours(where):
        counts = np.bincount(code[where], minlength=4096).reshape(16, 16, 16).astype(np.float32)
        for axis in range(3):  # neighbouring colours count a little too
            padded = np.pad(counts, [(int(a == axis),) * 2 for a in range(3)])
            counts = sum(w * np.take(padded, range(k, k + 16), axis) for k, w in enumerate((0.25, 0.5, 0.25)))
        return counts

    def parted(inside, balance):
        here, elsewhere = colours(inside), colours(~inside)
        elsewhere *= inside.sum() / max((~inside).sum(), 1) if balance else 1
        likely = (here / (here + elsewhere + 1e-3)).reshape(-1)[code] > 0.5
        near = np.ones((WORK_PX // 10, WORK_PX // 10), np.uint8)
        masks = [(own & (cv2.dilate(m.astype(np.uint8), near) > 0)).astype(np.uint8) for own, m in zip(likely, inside)]
        return np.stack([cv2.medianBlur(mask, 3) > 0 for mask in masks])

    def own(masks):
        """How much the colours of masks are met there alone: 0 to 1."""
        if np.median(masks.sum((1, 2))) < LEAST_SUBJECT_PX:
            return 0.0
        here, elsewhere = colours(masks), colours(~masks)
        return float((here / (here + elsewhere + 1e-3)).reshape(-1)[code[masks]].mean())

    top = max(float(np.percentile(speed, 99.5)), 1e-6)
    scaled = (255 * speed / top).clip(0, 255).astype(np.uint8)
    threshold, _ = cv2.threshold(scaled.reshape(-1, 1), 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    moving = parted(speed > max(threshold / 255 * top, 0.2), balance=False)
    rim, middle = WORK_PX // 12, np.zeros(speed.shape, bool)
    middle[:, rim:-rim, rim:-rim] = True
    standing_out = parted(middle, balance=True)
    owned = own(moving)
    gain = own(standing_out) - owned
    moves = standing_out.any() and speed[standing_out].mean() > speed[~standing_out].mean()
    if owned and not (gain > OWN_COLOURS_GAIN and moves):
        return moving, "moves"
    return standing_out, "moves" if owned else "stands out"


AREAS = [radius + 0.5 for radius in range(RADII)]  # of an outline's cells, which grow outwards


def outlines_and_markings(video, masks):
    """What a subject (masks (F, h, w)) looks like, its outline and its markings, each (F', ANGLES, RADII): in polar coordinates
    around its centroid, scaled to its spread. A rotated subject is shifted along the angles, a larger or a moved one is the same.
    Frames without a subject are left out.

    Markings are how far the colours (F, h, w, 3) inside lie from their median, whatever that is, at a norm of 1; fainter ones
    than an eye would notice have less.
    """
    import cv2
    import numpy as np

    found, usual = [], np.median(video[masks], axis=0) if masks.any() else 0
    for colours, mask in zip(video, masks):
        y, x = np.nonzero(mask)
        if len(x) >= LEAST_SUBJECT_PX:
            spread = np.sqrt(x.var() + y.var())
            both = np.dstack([mask, mask * np.linalg.norm(colours - usual, axis=-1)]).astype(np.float32)
            how = cv2.INTER_LINEAR | cv2.WARP_FILL_OUTLIERS
            found.append(cv2.warpPolar(both, (RADII, ANGLES), (x.mean(), y.mean()), 2.6 * spread, how))
    found = np.stack(found) if found else np.zeros((0, ANGLES, RADII, 2), np.float32)
    outlines, marked = (np.ascontiguousarray(found[..., k]) for k in (0, 1))
    sizes, norms = ((a**2 @ np.float32(AREAS)).sum(1)[:, None, None] ** 0.5 for a in (outlines, marked))
    return outlines, marked / np.maximum(norms, 0.03 * sizes)


def unlike(some, others):
    """1 - IoU of each of some outlines (F, ANGLES, RADII) with the most similar of others (N, ANGLES, RADII), in any rotation
    and mirror image: (F,). All rotations at once, as a correlation along the angles. Of markings, which are not 0 or 1, it is 1 -
    Tanimoto's coefficient, which for outlines is the IoU."""
    import numpy as np

    area = np.float32(AREAS)
    waves = np.fft.rfft(some * area, axis=1).astype(np.complex64).transpose(1, 0, 2)  # (K, F, RADII)
    shared = np.zeros((len(some), len(others)), np.float32)
    for mirrored in (others, others[:, ::-1]):
        other = np.fft.rfft(mirrored, axis=1).astype(np.complex64).transpose(1, 2, 0)  # (K, RADII, N)
        shared = np.maximum(shared, np.fft.irfft(waves @ other.conj(), ANGLES, axis=0).max(0))
    areas = (some**2 @ area).sum(1)[:, None] + (others**2 @ area).sum(1)[None]
    return 1 - (shared / np.maximum(areas - shared, 1e-6)).max(1)


def non_rigid(flow, back, mask, grid, size):
    """What a shift, turn and zoom does not explain of a subject's flow (h, w, 2): SUBJECT_MOTION's measures.

    residual: root mean square, in subject sizes. strain: half the mean log of the stretch along over that across (singular
    values of the flow's Jacobian). folding: share of the subject turned inside out, or nearly so. vanishing: share whose flow there and
    back does not meet.
    """
    import cv2
    import numpy as np

    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3))) > 0
    inner = inner if inner.sum() >= LEAST_SUBJECT_PX // 2 else mask
    (x, y), (dx, dy) = grid[inner].T, flow[inner].T
    z, d = x - x.mean() + 1j * (y - y.mean()), dx + 1j * dy
    turn = (z.conj() * d).sum() / max(
        float((abs(z) ** 2).sum()), 1e-6
    )  # least squares; a similarity is turn * z + shift
    residual = np.sqrt((abs(d - d.mean() - turn * z) ** 2).mean()) / size
    within = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 1.5)[..., None]  # the still surroundings must not count
    smooth = cv2.GaussianBlur(flow * mask[..., None], (0, 0), 1.5) / np.maximum(within, 1e-3)
    (xy, xx), (yy, yx) = (np.gradient(smooth[..., k]) for k in (0, 1))
    a, b, c, e = 1 + xx[inner], xy[inner], yx[inner], 1 + yy[inner]
    det, half = a * e - b * c, (a * a + b * b + c * c + e * e) / 2
    root = np.sqrt(np.maximum(half**2 - det**2, 0))
    strain = (
        np.log((half + root) / np.maximum(half - root, 1e-2)).mean() / 4
    )  # 0 for a zoom, which stretches both alike
    there = grid + flow
    home = flow + cv2.remap(back, there[..., 0], there[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    vanishing = (np.linalg.norm(home[mask], axis=-1) > 0.05 * size).mean()
    return residual, strain, (det < 0.2).mean(), vanishing


def surroundings(planes, masks, ahead, grid):
    """What is not the subject: its pattern (9,), flicker (F - 1,) and wobble (F - 1,).

    planes: luma and chroma in units of the clip's contrast (F, h, w, 3). ahead: flow to the next frame, whole and without the
    camera's, F - 1 times. pattern: log energies in three bands of each plane, mean over frames; blotches show in the chroma,
    blur in the luma. flicker: what of a frame is not kept in the next. wobble: root mean square of the flow that a camera does
    not explain, in frame sizes.
    """
    import cv2
    import numpy as np

    bands, flicker, wobble = [], [], []
    for i, (picture, mask) in enumerate(zip(planes, masks)):
        around = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)) == 0
        around = around if around.sum() > around.size / 10 else np.ones_like(around)
        levels = [picture] + [cv2.GaussianBlur(picture, (0, 0), s) for s in (1.5, 3, 6)]
        energy = [((a - b)[around] ** 2).mean(0) ** 0.5 for a, b in zip(levels, levels[1:])]
        bands.append(np.log(np.concatenate(energy) + 0.01))  # less than that no eye would notice
        if i < len(ahead):
            there = grid + ahead[i][0]
            next = cv2.remap(
                planes[i + 1], there[..., 0], there[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
            lost = cv2.GaussianBlur(next - picture, (0, 0), 1.5)[around]
            flicker.append((lost**2).mean() ** 0.5)
            wobble.append(np.sqrt((ahead[i][1][around] ** 2).sum(-1).mean()) / WORK_PX)
    return np.mean(bands, axis=0), np.array(flicker), np.array(wobble)


def shake(flows, grid):
    """How much flows (h, w, 2), one a pair of frames, change from one pair to the next along their paths, less what a camera
    explains: the median over the frame, in frame sizes, (pairs - 1,). What moves goes on moving; what is torn to and fro does not."""
    import cv2
    import numpy as np

    found = []
    for flow, next in zip(flows, flows[1:]):
        there = grid + flow
        later = cv2.remap(next, there[..., 0], there[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        found.append(np.median(np.linalg.norm(without_camera(later - flow, grid), axis=-1)) / WORK_PX)
    return np.array(found)


LEAST_PX = 16  # of a side of a clip that can be measured


def as_clip(clip):
    """A clip as an array (F, 3, H, W) float32 in [0, 1]; what is no number is black. Raises UserError where it is none."""
    import numpy as np

    if hasattr(clip, "detach"):
        clip = clip.detach().cpu()
        clip = (clip.float() if clip.is_floating_point() else clip).numpy()
    clip = np.asarray(clip)
    if clip.ndim != 4 or clip.shape[1] != 3 or min(clip.shape[2:]) < LEAST_PX or clip.dtype.kind != "f":
        shape = " x ".join(map(str, clip.shape)) or "a number"
        raise UserError(
            f"distortion: a clip must be frames x 3 x height x width of floats from 0 to 1, {LEAST_PX} px or more a side, not {shape} of {clip.dtype}"
        )
    if len(clip) < 2:
        raise UserError("distortion: needs clips of at least 2 frames")
    return np.nan_to_num(clip.astype(np.float32)).clip(0, 1)


def measure(clip):
    """All that is measured of one clip (F, C, H, W): a dict of MOTION's values and `flicker`, some for each pair of frames, of SHAPE's, of
    `pattern`, `grid` and `lines`, of the number of `frames`, and of COMPANIONS. `why` lists what could not be measured.
    Raises UserError."""
    import cv2
    import numpy as np

    clip = as_clip(clip)
    video, contrast, spread = scaled_for_measuring(clip)
    grid = pixel_grid(*contrast.shape[1:])
    flow_of = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    pairs = list(zip(contrast, contrast[1:]))
    ahead, back = (
        [(flow, without_camera(flow, grid)) for flow in (flow_of.calc(*way, None) for way in ways)]
        for ways in (pairs, [(b, a) for a, b in pairs])
    )
    to_next, to_last = ([np.linalg.norm(own, axis=-1) for _, own in way] for way in (ahead, back))
    still = np.zeros_like(to_next[0])  # the last frame has no next one, the first none before it
    masks, found = subject_masks(video, np.maximum([*to_next, still], [still, *to_last]))
    areas = masks.sum((1, 2))
    why, seen = [], areas >= LEAST_SUBJECT_PX
    if found == "stands out":
        why.append("no subject told by its motion: found by its colour")
    out, rows = {"frames": len(masks)}, []
    out["outlines"], out["markings"] = outlines_and_markings(video, masks)
    if seen.any():
        size = np.sqrt(areas[seen].mean())
        for i in range(len(pairs)):
            for (flow, own), (other, _), k in ((ahead[i], back[i], i), (back[i], ahead[i], i + 1)):
                if seen[k]:  # its speed is that against its surroundings, without the camera's
                    speed = np.linalg.norm(own[masks[k]].mean(0)) / size
                    rows.append((*non_rigid(flow, other, masks[k], grid, size), speed))
    else:
        why.append("no subject: counts as an outline like no other; motion not judged")
    columns = np.ascontiguousarray(np.array(rows, dtype=np.float64).reshape(-1, 5).T)
    out.update(zip(SUBJECT_MOTION, columns))
    out["speed"] = float(np.median(columns[4])) if rows else 0.0
    planes = video @ np.float32(TO_LUMA_CHROMA) / spread
    out["pattern"], out["flicker"], out["wobble"] = surroundings(planes, masks, ahead, grid)
    out["shake"] = shake([flow for flow, _ in ahead], grid)
    if not len(out["shake"]):
        why.append("two frames: shaking not judged")
    edges = np.abs(np.diff(contrast.astype(np.float32), axis=2))
    out["sharpness"] = float(np.percentile(edges, 99))
    colourful = video.max(-1) - video.min(-1)
    out["saturation"] = float(colourful[masks].mean() if masks.any() else colourful.mean())
    out["grid"], out["lines"] = np.array(grid_energy(clip)), np.array(grid_lines(clip))
    out["why"] = tuple(why)
    return out


def grid_energy(clip, period=16):
    """How much stronger steps between neighbouring pixels are at some places of a period than at others, over what chance
    gives: about 1 without a grid. clip: array (F, C, H, W) at its own size, where codec and patches together make 16 px."""
    import numpy as np

    found = []
    for axis in (2, 3):
        # Frame by frame, which stays in the processor's cache. (n - 1,)
        steps = sum(np.abs(np.diff(frame, axis=axis - 1)).mean((0, 4 - axis)) for frame in clip) / len(clip)
        whole = len(steps) // period * period
        if whole >= 2 * period:
            folded = steps[:whole].reshape(-1, period)
            found.append(folded.mean(0).var() * len(folded) / max(folded.var(), 1e-12))
    return float(np.mean(found)) if found else 1.0


def grid_lines(clip, period=16):
    """How much sharper whole rows and columns of pixels stand out at some places of a period than at others, as a share of full
    brightness: 0 without a grid. It sees what runs through the frame only, and that well: medians along the rows and over
    eight moments do not see an edge that is shorter, nor medians over the periods a single one."""
    import numpy as np

    grey, found = clip[:: -(-len(clip) // 8)].mean(1), []
    for axis in (1, 2):
        lines = np.moveaxis(grey, axis, 0)  # (n, F', the other axis)
        ridges = np.abs(lines[1:-1] - (lines[2:] + lines[:-2]) / 2)
        sharp = np.pad(np.median(ridges.reshape(len(ridges), -1), axis=1), 1, "edge")
        whole = len(sharp) // period * period
        if whole >= 2 * period:
            found.append(np.median(sharp[:whole].reshape(-1, period), axis=0).std())
    return float(np.mean(found)) if found else 0.0


def distances(measured, reference):
    """How far one clip lies from reference clips, each as `measure` returns it: for MOTION's measures and the flicker the
    Wasserstein distance between the clip's values and theirs, for the pattern that from the most similar one's, for the
    grid the logarithm of how much stronger it is than usual, for the lines the difference, for outlines and markings the mean of
    `unlike`. Measures that the clip or all others lack are left out."""
    import numpy as np

    at, far = (np.arange(32) + 0.5) / 32, {}
    for name in (*MOTION, "flicker"):
        pool = np.concatenate([other[name] for other in reference])
        if len(measured[name]) and len(pool):
            far[name] = float(np.abs(np.quantile(measured[name], at) - np.quantile(pool, at)).mean())
    far["grid"] = max(
        0.0, math.log(max(measured["grid"], 0.1) / max(np.median([other["grid"] for other in reference]), 0.1))
    )
    far["pattern"] = min(float(np.abs(measured["pattern"] - other["pattern"]).mean()) for other in reference)
    far["lines"] = max(0.0, float(measured["lines"] - np.median([other["lines"] for other in reference])))
    for name in SHAPE:
        others = np.concatenate([other[name] for other in reference])
        if len(others):  # a frame without a subject is like no outline at all
            mine, frames = measured[name], measured["frames"]
            seen = unlike(mine, others).sum() if len(mine) else 0.0
            far[name] = float(seen + frames - len(mine)) / frames
    return far


def aspects(far, typical):
    """Shape, motion and texture from distances: 0 within what reference clips differ, else the logarithm of 1 + the square of a
    third of the excess, in units of the reference's own (a Cauchy likelihood: what real clips do, too, counts little, and a
    wild measure does not hide the rest), of the worst measure of each."""

    excess = {n: max(0.0, far[n] - typical[n][0]) / typical[n][1] for n in far if n in typical}
    return [
        max([math.log1p((excess[n] / 3) ** 2) for n in group if n in excess], default=0.0)
        for group in (SHAPE, MOTION, TEXTURE)
    ]


def reference_statistics(clips):
    """Statistics of real clips (each (F, C, H, W) in [0, 1]; any iterable, of which one at a time is kept) for `distortion`.
    Raises UserError for fewer than 3."""
    import numpy as np

    measured = [measure(clip) for clip in clips]
    if len(measured) < LEAST_REFERENCE:
        raise UserError(
            f"distortion: {len(measured)} reference clips; real ones differ, and it takes {LEAST_REFERENCE} to know how much"
        )

    far = [distances(m, [other for other in measured if other is not m]) for m in measured]
    typical = {}
    for name in {name for f in far for name in f}:
        middle, high = np.quantile([f[name] for f in far if name in f], (0.5, 0.9))
        typical[name] = (float(middle), max(float(high - middle), 0.1 * float(middle), LEAST_SPREAD[name]))
    companions = {name: float(np.median([m[name] for m in measured])) for name in COMPANIONS}
    usual = float(np.median([sum(aspects(f, typical)) for f in far]))
    return Reference([{k: m[k] for k in REFERENCE_MEASURES} for m in measured], typical, companions, usual)


def distortion(clip, reference):
    """How far a clip lies from real clips of its kind.

    clip: float (F, C, H, W) in [0, 1], any size, at least 2 frames. reference: a list of at least 3 such clips, or what
    `reference_statistics` made of one. Returns Distortion. Raises UserError.
    """
    if not isinstance(reference, Reference):
        reference = reference_statistics(reference)
    measured = measure(clip)
    parts = aspects(distances(measured, reference.clips), reference.typical)
    ratios = [float(measured[name]) / max(reference.companions[name], 0.01) for name in COMPANIONS]
    why = measured["why"]
    if "outlines" not in reference.typical:
        why += ("the reference shows no subject: shape not judged",)
    return Distortion(max(0.0, sum(parts) - reference.usual), *parts, *ratios, why)


def similarity(clips):
    """How alike some clips are that should differ, such as those of different prompts: the mean correlation over all pairs, at 8
    moments and 16 x 16 px. 1: all the same, as where a model has memorised one clip. Clips of one colour throughout, which correlate
    with nothing, are like each other and unlike all else. clips: at least 2, each (F, C, H, W)."""
    import numpy as np
    import torch

    clips = [torch.nan_to_num(clip.float()).transpose(0, 1)[None] for clip in clips]
    small = [torch.nn.functional.interpolate(clip, size=(8, 16, 16), mode="area").flatten() for clip in clips]
    apart = torch.stack(small).numpy().astype(np.float64)
    apart -= apart.mean(1, keepdims=True)
    lengths = np.linalg.norm(apart, axis=1)
    plain = lengths < 1e-6
    apart /= np.where(plain, 1, lengths)[:, None]
    alike = apart @ apart.T + np.outer(plain, plain)
    return float(alike[np.triu_indices(len(small), 1)].mean())


REFERENCE_CLIPS = 48  # as many are enough to know how much real clips differ
MEASURES = 5  # to be raised when `measure` changes, so that statistics kept in a cache are made again


def spread(clips):
    """Up to REFERENCE_CLIPS of a list, evenly."""
    number = min(len(clips), REFERENCE_CLIPS)
    return [clips[k * len(clips) // number] for k in range(number)]


def cached_reference(clips, folder):
    """`reference_statistics` of the `spread` of some clips (Clip); made once, then kept in `folder`."""
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import save_file
    from tqdm import tqdm

    clips = spread(clips)
    content = [(hashlib.sha256(c.path.read_bytes()).hexdigest(), c.frames, c.height, c.width, c.fps) for c in clips]
    file = folder / f"reference-{digest(MEASURES, content)}.safetensors"
    if not is_cached(file, "0.outlines"):
        made = reference_statistics(clip.video for clip in tqdm(clips, desc="measuring real clips", unit="clip"))
        numbers = {name: json.dumps(getattr(made, name)) for name in ("typical", "companions", "usual")}
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"{i}.{k}": np.asarray(v, order="C") for i, m in enumerate(made.clips) for k, v in m.items()}
        save_file(arrays, str(partial), numbers)  # which would write a view of another array out of order
        os.replace(partial, file)
    with safe_open(str(file), "numpy") as opened:
        numbers = {name: json.loads(text) for name, text in opened.metadata().items()}
        kept = [{k: opened.get_tensor(f"{i}.{k}") for k in REFERENCE_MEASURES} for i in range(len(clips))]
        return Reference(kept, **numbers)


def run_references(config):
    """What the samples of a run are compared with: validation prompt -> Reference, or None where that cannot be, which is
    printed with its reason."""
    train, heldout, _ = split_clips(config)
    prompts, found = validation_prompts(config, heldout), {}
    for folder in dict.fromkeys(prompts.values()):
        try:
            if config.frames < 2:
                raise UserError("stills have no motion")
            clips = train if folder == resolve_path(config.data) else read_clips(folder, *clip_size(config))
            found[folder] = cached_reference(clips, cache_folder(config))
        except UserError as error:  # no reason not to train
            found[folder] = None
            print(f"distortion: samples will not be compared with the clips of {folder}: {error}", flush=True)
    return {prompt: found[folder] for prompt, folder in prompts.items()}


def concept_truth(config):
    """Of a run on the bundled clips, whose renderer knows what its concept looks like: the module that does (`concept_score`, and the
    name in `CONCEPT`). None for other clips: of these, the held-out loss tells whether they were learned."""
    if resolve_path(config.data) != HERE / "data_samples/spider":
        return None
    if "make_samples" in sys.modules:  # as in the lessons
        return sys.modules["make_samples"]
    spec = importlib.util.spec_from_file_location("make_samples", HERE / "data_samples/make_samples.py")
    truth = importlib.util.module_from_spec(spec)
    sys.modules["make_samples"] = truth  # dataclasses look their module up
    spec.loader.exec_module(truth)
    return truth


def judge_samples(folder, references, truth=None):
    """Write samples/distortion.json: a row a validation prompt, with the fields of Distortion for "before" and "after", or
    null where it has no reference, and with `concept` by the truth, if there is one. Returns the rows."""
    import torch

    rows = []
    for k, (prompt, reference) in enumerate(references.items()):
        clips = {when: read_video(folder / f"samples/{when}-{k}.mp4") for when in ("before", "after")}
        rows.append({"prompt": prompt})
        for when, clip in clips.items():
            rows[-1][when] = dataclasses.asdict(distortion(clip, reference)) if reference else None
        if truth:
            with torch.no_grad():  # of every fourth frame, which tells as much
                rows[-1]["concept"] = {when: truth.concept_score(clip[::4]) for when, clip in clips.items()}
    write_json(folder / "samples/distortion.json", rows)
    return rows


def judged_summary(folder, config, references):
    """Judge a run's samples; returns what of it belongs into its summary: medians over the prompts."""
    truth, found = concept_truth(config), {}
    rows = judge_samples(folder, references, truth)
    judged = [row for row in rows if row["after"]]
    for when in ("before", "after"):
        if judged:
            found[f"distortion_{when}"] = statistics.median(row[when]["score"] for row in judged)
            for name in COMPANIONS:
                called = "motion" if name == "speed" else name
                found[f"{called}_{when}"] = statistics.median(row[when][name] for row in judged)
        if len(references) > 1:
            clips = [read_video(folder / f"samples/{when}-{k}.mp4") for k in range(len(references))]
            found[f"similarity_{when}"] = similarity(clips)
        for where, asked in (("concept", True), ("concept_unasked", False)):
            of = [row["concept"][when] for row in rows if truth and (truth.CONCEPT in row["prompt"].split()) == asked]
            if of:
                found[f"{where}_{when}"] = statistics.median(of)
    return found


# ------------------------------------------------------------------------------------------------------------ training

HELDOUT_TIMESTEPS = (100, 300, 500, 700, 900)
HELDOUT_CLIPS = 32  # at most, so that the measurement stays cheap
WATCHED_CLIPS = 4  # of the held-out ones
WATCHED_FROM = 50  # steps: before, sound runs too may stumble


def is_watched(step):
    """Steps 50, 100, 200, ...: what goes wrong mostly does so early."""
    rounds, rest = divmod(step, WATCHED_FROM)
    return rest == 0 and rounds > 0 and rounds & (rounds - 1) == 0


@dataclass
class Run:
    """A finished run: its folder, configuration, summary and one dict of metrics a step."""

    folder: Path
    config: Config
    summary: dict
    metrics: list


class Trainer:
    """The model, its optimizer and its samples, as `train` puts them together; one method for each thing done with them."""

    def __init__(self, config, base, cache, accelerator):
        import torch

        self.config, self.base, self.cache, self.accelerator = config, base, cache, accelerator
        self.device, self.dtype = accelerator.device, getattr(torch, config.compute_dtype)
        self.scheduler = base.load("scheduler")
        self.alpha_bar = self.scheduler.alphas_cumprod.double()
        self.samples = Samples(config, base, cache, self.scheduler.config.num_train_timesteps)
        self.transformer = load_transformer(config, base, self.dtype, self.device)
        if config.method == "full":
            self.parameters = list(self.transformer.requires_grad_(True).parameters())
        else:
            self.parameters = add_lora(self.transformer, config.rank, config.alpha, config.seed, config.lora_targets)
        compute_in_dtype_of_input(self.transformer, self.dtype)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.rotary = rotary_embedding(base, self.transformer, config.frames, config.height, config.width, self.device)
        self.model = accelerator.prepare(self.transformer)  # wrapped, where there are several processes
        self.updates = Updates(config, self.parameters)
        self.average = (
            Average(self.parameters, config.ema, "cpu" if config.ema_on_cpu else None) if config.ema else None
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if config.compile:
            for (
                block
            ) in self.transformer.transformer_blocks:  # one graph for all, and gradients that come block by block
                block.compile()

    def losses(self, model, samples):
        """One velocity loss a sample: (B,)."""
        batch = collate(samples, self.device)
        return velocity_loss(model, batch, self.alpha_bar, self.rotary, self.dtype)

    def step(self, step):
        """One optimizer step on batch_size clips. Returns its metrics; raises RunError if the loss is not finite."""
        import torch

        config, accelerator = self.config, self.accelerator
        tic = time.perf_counter()
        self.updates.step_number = step
        self.updates.lr = config.lr * min(1.0, (step + 1) / max(1, config.warmup))
        # Each process takes every n-th sample of the step; each sample's draws follow from its number alone.
        mine = range(step * config.batch_size, (step + 1) * config.batch_size)
        mine = mine[accelerator.process_index :: accelerator.num_processes]
        micro, loss = config.micro_batch_size or len(mine), torch.zeros((), device=self.device)
        for k in range(0, len(mine), micro):
            samples = [self.samples.training(n) for n in mine[k : k + micro]]
            kept = contextlib.nullcontext()
            if config.offload_activations:
                kept = torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")
            with kept:
                part = self.losses(self.model, samples).sum() / len(mine)
            loss += part.detach()
            if config.fused_backward:  # backward is the step
                self.refuse_if_not_finite(float(loss), step)
            accelerator.backward(self.scaler.scale(part))
        loss = float(accelerator.reduce(loss, "mean"))
        self.refuse_if_not_finite(loss, step)
        measured = {}
        if not config.fused_backward:
            self.scaler.unscale_(self.updates)
            norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in self.parameters]  # not in bf16
            norm = torch.stack(norms).norm()
            torch.nn.utils.clip_grads_with_norm_(self.parameters, config.max_grad_norm, norm)
            measured = {
                "grad_norm": float(norm) if norm.isfinite() else None
            }  # of a step that fp16's scaler leaves out
        self.scaler.step(self.updates)
        self.scaler.update()
        for p in self.parameters:  # those of a step that the scaler left out
            p.grad = None
        if self.average:
            self.average.update(step)
        metrics = {"step": step + 1, "loss": loss, "lr": self.updates.lr, **self.updates.measured(), **measured}
        return {**metrics, "step_s": time.perf_counter() - tic}

    def refuse_if_not_finite(self, loss, step):
        if not math.isfinite(loss):
            raise RunError(f"step {step + 1}: the loss is {loss}; lower --lr (now {self.config.lr:g})")

    def judged(self):
        """A context in which the weights are those that the run would give: the average, if there is one."""
        return self.average.in_place() if self.average else contextlib.nullcontext()

    def heldout_loss(self, clips=None):
        """Mean over held-out clips, or others of a cache (its `heldout` or `train`, or a part), at fixed timesteps and under fixed
        noise: comparable between steps, runs and seeds."""
        import torch

        self.transformer.eval()
        clips = self.cache.heldout if clips is None else clips
        jobs = [(clips[i], i, t) for i in range(min(HELDOUT_CLIPS, len(clips))) for t in HELDOUT_TIMESTEPS]
        at_once, losses = 1 if self.base.large else 16, []
        with torch.no_grad(), self.judged():
            for k in range(0, len(jobs), at_once):
                batch = [self.samples.heldout(*job) for job in jobs[k : k + at_once]]
                losses.append(self.losses(self.transformer, batch))
        self.transformer.train()
        return float(torch.cat(losses).mean())

    def generated(self, seed=0, told="sampling"):
        """A clip of each validation prompt from the weights as they are; clip k starts from the noise of seed + k."""
        import torch
        from diffusers import CogVideoXPipeline

        self.transformer.eval()
        vae = self.base.load("vae", self.dtype).to(self.device)
        pipe = CogVideoXPipeline(None, None, vae, self.transformer, self.scheduler)
        pipe.set_progress_bar_config(desc=told, leave=False)
        if self.base.large:
            vae.enable_tiling()
        embeds = torch.stack([load_tensor(file, "prompt_embeds") for file in self.cache.prompts.values()])
        embeds, empty = (e.to(self.device, self.dtype) for e in (embeds, self.samples.empty))
        with self.judged():
            clips = generate(pipe, self.base, embeds, empty, self.config, seed)
        self.transformer.train()
        return clips

    def draw_samples(self, folder, when):
        """The validation prompts, always from the same seeds, as files."""
        clips = self.generated(told=f"sampling {when}")
        save_samples(folder / "samples", when, clips, list(self.cache.prompts), self.config.fps)

    def save_checkpoint(self, folder, step):
        save_checkpoint(folder, step, self.config, self.transformer, self.updates, self.average, self.scaler)

    def load_checkpoint(self, folder):
        return load_checkpoint(folder, self.config, self.transformer, self.updates, self.average, self.scaler)


def train(config, callbacks=()):
    """Fine-tune, from clips on disk to an adapter or a transformer on disk. Returns Run. Raises UserError or RunError.

    Each callback is called with the metrics of every step (a dict, see README.md), after they were written.
    """
    started = time.perf_counter()
    asked = config.fused_backward
    config, base, why = resolve(config)
    config.model, config.data = portable(config.model), portable(config.data)
    config.heldout, config.prior = (portable(p) if p else None for p in (config.heldout, config.prior))
    folder = run_folder(config)
    train_clips, heldout_clips, told = split_clips(config)

    quiet_libraries()
    import torch
    from accelerate import Accelerator
    from tqdm import tqdm

    accelerator = Accelerator(
        mixed_precision="no", cpu=not torch.cuda.is_available()
    )  # compute_in_dtype_of_input does it
    newest, first = checkpoints(folder)[-1:] if config.resume else [], 0
    if newest and config.compute_dtype is None:  # a measurement could fall otherwise this time, and rounding with it
        config.compute_dtype = load_config(folder / "config.json").compute_dtype
        dtype, reason = getattr(torch, config.compute_dtype), "as the run began; --compute-dtype overrides it"
    else:
        dtype, reason = choose_compute_dtype(accelerator.device, base, config.compute_dtype)
    config.compute_dtype = str(dtype).removeprefix("torch.")
    why.append(("arithmetic", f"{config.compute_dtype}: {reason}"))
    main = accelerator.is_main_process
    if accelerator.distributed_type.name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):  # no whole tensors for `Updates`
        raise UserError(
            f"accelerate launch: {accelerator.distributed_type.value} spreads weights over processes, and each must hold them whole "
            "here; launch with --multi_gpu in its place"
        )
    if config.batch_size % accelerator.num_processes:
        raise UserError(
            f"--batch-size {config.batch_size}: must be a multiple of the {accelerator.num_processes} processes"
        )
    if config.fused_backward and dtype == torch.float16:
        if asked:
            raise UserError(FUSED_IN_FP16)
        config.fused_backward = False
        why.append(("optimizer", "after backward, since fp16 gradients must be unscaled all together"))
    with accelerator.main_process_first():
        cache = cache_clips(config, accelerator.device)
        references = run_references(config) if main else None
    free_memory()
    if torch.cuda.is_available():
        why.append(("memory", f"{peak_memory_gib():.1f} GiB at most while clips and prompts were coded"))
        torch.cuda.reset_peak_memory_stats()

    trainer = Trainer(config, base, cache, accelerator)
    if newest:
        first = trainer.load_checkpoint(newest[0])
        if first > config.steps:
            raise UserError(f"--steps {config.steps}: the checkpoint {newest[0].name} is past that already")
    if main:
        if config.resume:
            none = f"no complete checkpoint in {folder}, starting from the beginning"
            print(f"resume: {newest[0] if newest else none}")
        folder.mkdir(parents=True, exist_ok=True)
        # Without `resume`, so that --config repeats the run rather than goes on with one.
        write_json(folder / "config.json", dataclasses.asdict(dataclasses.replace(config, resume=False)))
        trim_metrics(folder / "metrics.jsonl", first)
        data = f"{len(train_clips)} clips of {config.frames}x{config.height}x{config.width} at {config.fps} fps; {told}"
        banner(trainer, data, why, folder)
    history = read_metrics(folder / "metrics.jsonl") if main else []
    if main and not all((folder / f"samples/before-{k}.mp4").exists() for k in range(len(cache.prompts))):
        trainer.draw_samples(folder, "before")
    few = cache.heldout[:WATCHED_CLIPS]
    if first:
        began = read_metrics(folder / "metrics.jsonl")[0]
    else:
        began = {"heldout_before": trainer.heldout_loss(), "watched_before": trainer.heldout_loss(few)}

    step = first
    bar = tqdm(total=config.steps, initial=first, desc="training", disable=not main)
    try:
        while step < config.steps:
            try:
                metrics = trainer.step(step)
            except RunError as error:
                raise RunError(f"{error}; {left_behind(folder)}")
            step += 1
            if step == 1:
                metrics |= began
            if is_watched(step):
                metrics["watched_loss"] = trainer.heldout_loss(few)
            pause = step % config.checkpoint_every == 0 or step == config.steps
            if pause:
                metrics["heldout_loss"] = trainer.heldout_loss()
            if main:
                append_json(folder / "metrics.jsonl", metrics)
                history.append(metrics)
                trainer.updates.under_way = False
                bar.update()
                shown = dict(loss=f"{metrics['loss']:.3f}", update=f"{metrics['update_ratio']:.1e}")
                bar.set_postfix(**shown, s=f"{metrics['step_s']:.2f}")
                if pause:
                    trainer.save_checkpoint(folder, step)
                for callback in callbacks:
                    callback(metrics)
            if metrics.get("watched_loss", 0) > began["watched_before"]:
                alarm = (
                    f"step {step}: the loss on {len(few)} held-out clips is {metrics['watched_loss']:.4f}, above the "
                    f"{began['watched_before']:.4f} before training, as in runs that distort; lower --lr (now {config.lr:g})"
                )
                if config.stop_on_distortion:
                    raise RunError(f"{alarm}; {left_behind(folder)}")
                bar.write(f"warning: {alarm}; --stop-on-distortion would end the run here")
    except KeyboardInterrupt:
        if main and step > first and not trainer.updates.under_way:
            trainer.save_checkpoint(folder, step)
        raise RunError(f"stopped at step {step}; go on with --{config.method} --resume --out {folder}")
    finally:
        bar.close()
    if not main:
        return None
    with trainer.judged():
        save_trained(trainer.transformer, config.method, folder)
    trainer.draw_samples(folder, "after")
    summary = {
        "steps": config.steps,
        "loss_first": mean([m["loss"] for m in history[: max(1, len(history) // 10)]]),
        "loss_last": mean([m["loss"] for m in history[-max(1, len(history) // 10) :]]),
        "heldout_before": history[0]["heldout_before"],
        "heldout_after": history[-1]["heldout_loss"],
        "seconds": time.perf_counter() - started,
        "steps_per_s": 1 / mean([m["step_s"] for m in history[len(history) // 10 :]]),
        "peak_memory_gib": peak_memory_gib(),
    }
    write_json(folder / "summary.json", summary)  # the run is finished, whatever comes of judging it
    summary |= judged_summary(folder, config, references)
    write_json(folder / "summary.json", summary)
    write_model_card(folder, config, base, summary, list(cache.prompts))
    return Run(folder, config, summary, history)


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


def refuse_pipeline(folder):
    """A run and a merged model write their own transformer/; another's must not go for it. Raises UserError."""
    if (folder / "model_index.json").exists():
        raise UserError(f"--out '{folder}': a pipeline folder, whose transformer would be written over; give another")


def left_behind(folder):
    return f"earlier checkpoints are in {folder}" if checkpoints(folder) else f"no checkpoint yet in {folder}"


def run_folder(config):
    """The folder of this run: --out, the newest run of the method with --resume, or a new one."""
    if config.out:
        folder = Path(config.out).expanduser().resolve()
        refuse_pipeline(folder)
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


def banner(trainer, data, why, folder):
    """What is about to happen, and why so: one line for each thing that was decided."""
    config, base = trainer.config, trainer.base
    trained, total = sum(p.numel() for p in trainer.parameters), base.parameters
    if config.method == "full":
        method = f"full fine-tuning: all {trained / 1e6:,.2f} M parameters, kept in {config.trained_dtype}"
    else:
        kept = "LoRA on NF4" if config.method == "qlora" else "LoRA"
        share = 100 * trained / (total + trained)
        method = f"{kept}, rank {config.rank}, alpha {config.alpha:g}: {trained / 1e6:,.2f} M trainable ({share:.1f} %)"
    checkpointing = "on" if config.gradient_checkpointing else "off"
    lines = [
        ("model", f"{config.model}: {total / 1e6:,.1f} M parameters, width {base.width}, {base.transformer['num_layers']} layers"),
        ("method", method),
        ("data", data),
        ("memory", f"{peak_memory_gib():.1f} GiB so far; gradient checkpointing {checkpointing}"),
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
        tags=["text-to-video", "cogvideox", "diffusers", "cogvideo_lite"] + ["lora"] * (config.method != "full"),
        instance_prompt=prompts[0] if prompts else None,
    )  # fmt: skip
    call = f", max_sequence_length={base.text_length}" if base.text_length != 226 else ""
    if config.method == "full":
        what, rows = "Full fine-tuning", [("weights kept in", config.trained_dtype)]
        load = f"""from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

transformer = CogVideoXTransformer3DModel.from_pretrained("transformer")  # in this folder
pipe = CogVideoXPipeline.from_pretrained("{config.model}", transformer=transformer)"""
    else:
        what, rows = "LoRA", [("rank, alpha", f"{config.rank}, {config.alpha:g}")]
        rows += [("base while training", "NF4 with double quantization")] * (config.method == "qlora")
        load = f"""from diffusers import CogVideoXPipeline

pipe = CogVideoXPipeline.from_pretrained("{config.model}")
pipe.load_lora_weights(".")  # this folder; alpha is stored with the weights"""
    rows += [
        ("optimizer", config.optimizer),
        ("learning rate, steps, batch", f"{config.lr:g}, {config.steps}, {config.batch_size}"),
        ("held-out loss before, after", f"{summary['heldout_before']:.4f}, {summary['heldout_after']:.4f}"),
        *(
            [
                (
                    "distortion of samples before, after",
                    f"{summary['distortion_before']:.2f}, {summary['distortion_after']:.2f}",
                )
            ]
            if "distortion_after" in summary
            else []
        ),
        *(
            [
                (
                    "concept score of samples before, after",
                    f"{summary['concept_before']:.2f}, {summary['concept_after']:.2f}",
                )
            ]
            if "concept_after" in summary
            else []
        ),
        ("time, peak memory", f"{summary['seconds']:.0f} s, {summary['peak_memory_gib']:.1f} GiB"),
    ]
    (folder / "README.md").write_text(
        f"""---
{data.to_yaml()}
---

# {what} of {Path(config.model).name} on {Path(config.data).name}

![before and after](samples/before_and_after.png)

Left: the base model. Right: after {summary["steps"]} steps. Same prompts, same seeds:

{chr(10).join(f"- {prompt}" for prompt in prompts)}

```python
{load}
clip = pipe("{prompts[0]}", num_frames={config.frames}, height={config.height}, width={config.width},
            num_inference_steps={config.sampling_steps}, guidance_scale={config.guidance_scale:g}{call}).frames[0]
```

| | |
| --- | --- |
{chr(10).join(f"| {name} | {value} |" for name, value in rows)}

Everything that decided this run is in `config.json`; `python cogvideo_lite.py --{config.method} --config config.json` repeats it.
Made with cogvideo_lite.
"""
    )


# ------------------------------------------------------------------------------------------- comparison and blending


def load_run(folder):
    """Run of a finished run's folder. Raises UserError."""
    folder = Path(folder).expanduser()
    if not (folder / "config.json").exists():
        raise UserError(f"run '{folder}': no config.json there; give the folder of a run")
    if not (folder / "summary.json").exists():
        raise UserError(f"run '{folder}': not finished; finish it with --METHOD --resume --out {folder}")
    config = load_config(folder / "config.json")
    try:
        summary = json.loads((folder / "summary.json").read_text())
        return Run(folder, config, summary, read_metrics(folder / "metrics.jsonl"))
    except ValueError as error:  # no JSON, or cut short
        raise UserError(f"run '{folder}': its summary.json or metrics.jsonl cannot be read ({error})")


def blend(run, share, out=None):
    """Go back from a finished run towards its base: base + share * (trained - base), in every weight, or in the adapter by its
    alpha. A share above 1 goes further on. Writes a run's folder [RUN/blend-SHARE] with the samples of the same prompts and seeds,
    judged, so that it can be sampled from and compared. Returns Run. Raises UserError.

    Weights between base and tuned model often keep what both can do (arXiv 2109.01903).
    """
    import torch

    run, share = load_run(run), float(share)
    config, out = run.config, Path(out).expanduser() if out else run.folder / f"blend-{share:g}"
    refuse_pipeline(out)
    if not (share > 0 and math.isfinite(share)):
        raise UserError(f"--blend {share:g}: must be a number above 0; 1 is the run, 0.5 halfway back to its base")
    if (out / "summary.json").exists():
        raise UserError(f"--out '{out}': holds a finished run already; give another folder")
    quiet_libraries()
    base, references = find_base(config.model), run_references(config)
    if config.method == "full":
        kept = torch.float32 if config.trained_dtype == "float32" else torch.bfloat16
        transformer = base.load("transformer", torch.float32)
        tuned = base.cls("transformer").from_pretrained(run.folder / "transformer", dtype=kept)
        with torch.no_grad():
            for p, other in zip(transformer.parameters(), tuned.parameters()):
                p.lerp_(other.float(), share)
        transformer = transformer.to(kept)
    else:
        transformer = base.load("transformer", frozen_dtype(base, torch.float32))
        config.alpha = config.alpha * share
        add_lora(transformer, config.rank, config.alpha, config.seed, config.lora_targets)
        load_lora(transformer, run.folder)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    save_trained(transformer, config.method, out)
    write_json(out / "config.json", dataclasses.asdict(config))
    summary = {"blend_of": str(run.folder.resolve()), "blend_share": share, "steps": run.summary["steps"]}
    write_json(out / "summary.json", summary)  # with it, `sample` takes the folder for a run's
    for k in range(len(references)):
        shutil.copy(run.folder / f"samples/before-{k}.mp4", out / "samples")
    save_samples(out / "samples", "after", sample(out, list(references), seed=0), list(references), config.fps)
    summary |= judged_summary(out, config, references)
    write_json(out / "summary.json", summary)
    return Run(out, config, summary, [])


def compare(runs, out=None):
    """Write one HTML page, with everything inside, that puts finished runs side by side: clips of the same prompts and seeds in
    step, their distortion with its companions, what differs in the configurations, and curves. Returns its path
    [runs/compare-TIME.html]. Raises UserError."""
    runs = [load_run(folder) for folder in runs]
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    configs = [dataclasses.asdict(run.config) for run in runs]
    differing = [k for k in configs[0] if k != "out" and len({json.dumps(c[k]) for c in configs}) > 1]
    pairs = ("heldout", "concept", "concept_unasked", "distortion", "motion", *COMPANIONS[1:], "similarity")
    shown = [
        "steps",
        *(f"{name}_{when}" for name in pairs for when in ("before", "after")),
        "seconds",
        "peak_memory_gib",
    ]
    tables = [(name, [c.get(name) for c in configs]) for name in differing]
    tables += [
        (name, [run.summary.get(name) for run in runs]) for name in shown if any(name in r.summary for r in runs)
    ]

    bases = list(dict.fromkeys(run.config.model for run in runs))
    prompts = {}  # prompt -> one cell a column, those of the bases first: (label, video file, Distortion or None, concept score or None)
    for column, run in enumerate(runs):
        judged = run.folder / "samples/distortion.json"
        if not judged.exists():
            raise UserError(
                f"run '{run.folder}': its samples were not judged; finish it with --METHOD --resume --out {run.folder}"
            )
        try:
            for k, row in enumerate(json.loads(judged.read_text())):
                cells = prompts.setdefault(row["prompt"], [None] * (len(bases) + len(runs)))
                before = bases.index(run.config.model), "before", f"before ({names[column]})"
                for at, when, name in (before, (len(bases) + column, "after", names[column])):
                    found = Distortion(**row[when]) if row[when] else None
                    file, concept = run.folder / f"samples/{when}-{k}.mp4", row.get("concept", {}).get(when)
                    cells[at] = cells[at] or (name, file, found, concept)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{judged}: not what this version writes ({error}); judge the run anew with --blend {run.folder} 1"
            )
    out = Path(out).expanduser() if out else Path(f"runs/compare-{datetime.datetime.now():%Y%m%d-%H%M%S}.html")
    if out.is_dir():
        raise UserError(f"--out '{out}': a folder; --compare writes one HTML file")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(comparison_page(names, tables, prompts, curves(names, runs)), encoding="utf-8")
    os.replace(partial, out)
    return out


def curves(names, runs):
    """SVG of loss, held-out loss and update ratio over steps."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for name, run in zip(names, runs):
        if not run.metrics:  # a blend of two models was never trained
            continue
        steps = [m["step"] for m in run.metrics]
        width = max(1, len(steps) // 40)
        for panel, key in zip(panels[::2], ("loss", "update_ratio")):
            values = [m[key] for m in run.metrics]
            means = [mean(values[max(0, i - width) : i + 1]) for i in range(len(values))]
            panel.plot(steps, means, label=name, linewidth=1)
        measured = [(0, run.summary["heldout_before"])] if "heldout_before" in run.summary else []
        measured += [(m["step"], m["heldout_loss"]) for m in run.metrics if "heldout_loss" in m]
        panels[1].plot(
            [step for step, _ in measured], [loss for _, loss in measured], marker="o", markersize=3, linewidth=1
        )
    for panel, title in zip(panels, ("training loss (running mean)", "held-out loss", "update ratio")):
        panel.set(title=title, xlabel="step")
        panel.set_yscale("log")
    panels[0].legend(fontsize=7)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "cogvideo_lite"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().partition("<svg")[2]


def comparison_page(names, tables, prompts, svg):
    """HTML of `compare`."""
    import base64
    from html import escape

    def number(value):
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    def row(cells, tag="td"):
        return "<tr>" + "".join(f"<{tag}>{escape(number(c))}</{tag}>" for c in cells) + "</tr>"

    def clip(cell):
        if cell is None:
            return "<div class=clip>not sampled</div>"
        name, file, found, concept = cell
        data = base64.b64encode(file.read_bytes()).decode()
        told = "not judged: too few real clips to compare with"
        if found:
            told = (
                f"<b>distortion {found.score:.2f}</b>: shape {found.shape:.2f}, motion {found.motion:.2f}, texture {found.texture:.2f}"
                f"<br>of real clips': speed {found.speed:.2f}, sharpness {found.sharpness:.2f}, saturation {found.saturation:.2f}, "
                f"grid {found.grid:.2f}" + "".join(f"<br>{escape(why)}" for why in found.unjudged)
            )
        if concept is not None:
            told += f"<br><b>concept score {concept:.2f}</b>"
        video = f'<video muted loop playsinline src="data:video/mp4;base64,{data}"></video>'
        return f"<div class=clip><div class=name>{escape(name)}</div>{video}<div class=told>{told}</div></div>"

    rows = "".join(
        f"<h3>{escape(prompt)}</h3><div class=row>{''.join(map(clip, cells))}</div>"
        for prompt, cells in prompts.items()
    )
    return f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>{escape(", ".join(names))}</title>
<style>
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem; color: #1b1b1b; background: #fff }}
table {{ border-collapse: collapse; margin: .6rem 0 }} td, th {{ border: 1px solid #ccc; padding: .2rem .6rem; text-align: left }}
.row {{ display: flex; gap: 1rem; flex-wrap: wrap }} .clip {{ width: 15rem }} .name {{ font-weight: 600; overflow-wrap: anywhere }}
video {{ width: 100%; image-rendering: pixelated; background: #eee }} .told {{ font-size: 12px; color: #444 }}
.bar {{ position: sticky; top: 0; background: #fff; padding: .5rem 0; z-index: 1; border-bottom: 1px solid #ddd }}
svg {{ max-width: 100%; height: auto }} h3 {{ margin: 1.2rem 0 .4rem }}
</style>
<h1>Runs side by side</h1>
<p>What differs in their configurations, then what came out. Distortion: 0 is like real clips, larger is more bent; speed: how fast
subjects move, where real ones are 1, so that a frozen clip does not pass for a good one. Each run is compared with its own real
clips: scores of runs on other data are in other units. Concept score, of the bundled clips alone: how much of the subject is the
concept, about 0.8 for real clips of it; wanted where the prompt asks for it.</p>
<table>{row(["", *names], "th")}{"".join(row([name, *values]) for name, values in tables)}</table>
<svg{svg}
<h2>The same prompts, the same seeds</h2>
<div class=bar><button id=play>pause</button> <label>frame <input id=at type=range min=0 max=1000 value=0></label>
<label>speed <input id=speed type=range min=10 max=200 value=100></label></div>
{rows}
<script>
const videos = [...document.querySelectorAll("video")], play = document.getElementById("play"), at = document.getElementById("at");
const lead = videos[0], speed = document.getElementById("speed");
let running = true;
function follow() {{  // clips of other lengths keep step by their share of the way
  if (lead.duration) {{
    for (const v of videos) if (v !== lead && v.duration) {{
      const there = lead.currentTime / lead.duration * v.duration;
      v.playbackRate = speed.value / 100 * v.duration / lead.duration;
      if (Math.abs(v.currentTime - there) > 0.07) v.currentTime = there;
    }}
    if (running) at.value = 1000 * lead.currentTime / lead.duration;
  }}
  requestAnimationFrame(follow);
}}
function set(on) {{ running = on; play.textContent = on ? "pause" : "play"; for (const v of videos) on ? v.play() : v.pause(); }}
play.onclick = () => set(!running);
at.oninput = () => {{ set(false); for (const v of videos) v.currentTime = at.value / 1000 * v.duration; }};
speed.oninput = () => {{ lead.playbackRate = speed.value / 100; }};
set(true); follow();
</script></html>
"""


# --------------------------------------------------------------------------------------------------------- memory plan
# Will it fit, how long will it take, and which knob helps? The code that trains is run for a step, with the real
# architecture, on tensors that have a shape but no contents (torch's FakeTensorMode), and what it takes and gives back is
# written down. That needs no weights and no GPU. Five of the transformer's blocks are run; what the middle one did is written
# down once for each of the others. All that is then played to a model of CUDA's allocator.

GIB = 2**30
# Of the transformer are run: the fewest of which one is not beside the first or the last, nor its neighbours.
FEW_BLOCKS = 5
CONTEXT_GIB = 0.75  # assumed, not predicted: the driver's context and kernels, as on an H200 (tests/measured_gpu.csv)
KINDS = ("weights", "adapters", "gradients", "optimizer", "saved activations", "working space")

# The published models' config.json files, as far as they differ from the constructors' defaults or are read here.
SHARED = dict(
    attention_head_dim=64, in_channels=16, out_channels=16, patch_size=2, max_text_seq_length=226,
    sample_frames=49, sample_height=60, sample_width=90, spatial_interpolation_scale=1.875,
)  # fmt: skip
NARROW = dict(SHARED, num_attention_heads=30, num_layers=30, use_rotary_positional_embeddings=False)
WIDE = dict(SHARED, num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
LONG = dict(WIDE, sample_frames=81, sample_height=300, sample_width=300, patch_size_t=2, patch_bias=False)
PUBLISHED = {  # name -> (transformer, scaling factor of its latents, dtype of its files)
    "CogVideoX-2b": (NARROW, 1.15258426, "float16"),
    "CogVideoX-5b": (WIDE, 0.7, "bfloat16"),
    "CogVideoX1.5-5B": (LONG, 0.7, "bfloat16"),
}
PUBLISHED_VAE = dict(
    block_out_channels=(128, 256, 256, 512), layers_per_block=3, latent_channels=16, temporal_compression_ratio=4,
    down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
)  # fmt: skip
T5_XXL = dict(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)

# Dense TFLOP/s in bf16 (T4: fp16) with sums in fp32, and in fp32, from NVIDIA's data sheets (RTX 3060: its cores and clock); GiB
# that torch finds, from users' out-of-memory messages, whose last digit varies with the driver.
CARDS = {
    "T4": (65, 8.1, 14.7), "L4": (121, 30, 22.0), "A10": (125, 31, 22.0), "RTX 3060": (25, 12.7, 11.7), "RTX 3090": (71, 36, 23.6),
    "RTX 4080": (97, 48.7, 15.7), "RTX 4090": (165, 83, 23.6), "RTX 5090": (209, 105, 31.3), "RTX A6000": (155, 39, 47.4),
    "L40S": (362, 92, 44.4), "A100 40GB": (312, 19.5, 39.5), "A100 80GB": (312, 19.5, 79.1), "H100": (989, 67, 79.1),
    "H200": (989, 67, 139.8),
}  # fmt: skip
WITHOUT_BF16 = ("T4",)
USUAL_CARD = "RTX 4090"  # what a plan is held against where nothing is said and no card is there
# Of a card's memory: predictions were up to so much below others' peaks and an H200's (tests/bench_plan.py, bench_gpu.py).
TIGHT = 0.07
UTILISATION = 0.35  # share of that rate that a run gets: an H200 gave 0.28 to 0.37 (tests/measured_gpu.csv)


@dataclass(frozen=True)
class Described(Base):
    """A Base of which the weights need not be there."""

    text_encoder: dict
    stored: str  # dtype of its files

    def frozen_dtype(self, dtype):
        """What `frozen_dtype` says of it."""
        import torch

        stored = getattr(torch, self.stored)
        return stored if self.large and dtype.itemsize > stored.itemsize else dtype


def describe(model):
    """Described of a published model's id, without the network, or of a pipeline folder. Raises UserError."""
    from safetensors import SafetensorError

    owner, _, name = model.lower().partition("/")
    published = {known.lower(): what for known, what in PUBLISHED.items()}
    if owner in ("thudm", "zai-org") and name in published and not resolve_path(model).is_dir():
        transformer, scaling_factor, stored = published[name]
        return Described(Path(model), transformer, dict(PUBLISHED_VAE, scaling_factor=scaling_factor), T5_XXL, stored)
    base = find_base(model, weights=False)
    try:
        text_encoder = json.loads((base.folder / "text_encoder/config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"model '{model}': a plan needs its text_encoder/config.json ({error})")
    refuse_incomplete(model, "text_encoder/config.json", text_encoder, dict(d_model=int, num_layers=int))
    try:
        stored = str(dtype_on_disk(base.folder / "transformer")).removeprefix("torch.")
    except (
        StopIteration,
        KeyError,
        SafetensorError,
    ):  # no weights there yet, or not whole: as they are usually published
        stored = "bfloat16" if base.large else "float32"
    return Described(base.folder, base.transformer, base.vae, text_encoder, stored)


@dataclass(eq=False, slots=True)
class Memory:
    """A piece of memory, from when it is taken until it is given back."""

    bytes: int
    kind: str = "working space"
    block: int | None = None  # of the transformer, that took it


class Ledger:
    """What memory was taken and given back, in order, by what ran inside `watch`, and how much it computed.

    It sees every operation below autograd and notes the storage of each tensor that comes out. card: whether the run is one
    on a GPU, whose kernels take a little more and whose allocator rounds.
    """

    def __init__(self, card=True):
        self.card = card
        self.events = []  # (Memory, whether it was taken, block of the transformer that did so or None)
        self.begun = []  # (phase, number of events before it)
        self.held = {}  # storage -> (Memory, weak reference to the storage)
        # (phase, block) -> of matrix products, convolutions and attention; a multiplication and an addition are two
        self.flops = collections.Counter()
        self.block, self.inside = None, False  # whether forward or backward of that block is running

    def note(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            memory = Memory(storage.nbytes(), block=self.block)

            def given_back(_):
                del self.held[key]
                if memory.bytes:
                    self.events.append((memory, False, self.block if self.inside else memory.block))

            self.held[key] = memory, weakref.ref(storage, given_back)
            if memory.bytes:
                self.events.append((memory, True, self.block))
        return self.held[key][0]

    def label(self, kind, tensors):
        for tensor in tensors:
            self.note(tensor).kind = kind

    def begin(self, phase):
        self.begun.append((phase, len(self.events)))
        self.block, self.inside = None, False

    def enter(self, block):
        self.block, self.inside = block, True

    def enter_when_run(self, blocks):
        """Let the blocks of a transformer tell when their forward begins, and their backward."""
        import torch

        def watch_backward(k, outputs):
            for tensor in outputs:
                if torch.is_tensor(tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: self.enter(k))

        for k, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, k=k: self.enter(k))
            block.register_forward_hook(lambda _, inputs, outputs, k=k: watch_backward(k, outputs))

    @contextlib.contextmanager
    def watch(self):
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves
        from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(_, func, types, args=(), kwargs=None):
                kwargs = kwargs or {}
                if (
                    not self.inside
                ):  # it belongs to the block whose memory it reads; if it reads none, to that of the last
                    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
                    known = [self.held[key][0] for t in read if (key := t.untyped_storage()._cdata) in self.held]
                    if known:
                        self.block = next((memory.block for memory in known if memory.block is not None), None)
                out = func(*args, **kwargs)
                for tensor in tree_leaves(out):
                    if isinstance(tensor, torch.Tensor):
                        self.note(tensor)
                kind, flops = func._overloadpacket, 0
                if kind is attention:
                    flops = sdpa_flop_count(*(a.shape for a in args[:3]))
                elif kind is attention_backward:
                    flops = sdpa_backward_flop_count(*(a.shape for a in args[:4]))
                    if self.card:  # FlashAttention adds up the queries' gradient in float32
                        sums = Memory(4 * args[1].numel(), block=self.block)
                        self.events += [(sums, True, self.block), (sums, False, self.block)]
                elif kind in flop_registry:
                    flops = flop_registry[kind](*args, **kwargs, out_val=out)
                if flops:
                    what = "attention" if kind in (attention, attention_backward) else "matrices"
                    self.flops[self.begun[-1][0], self.block, what] += flops
                return out

        with Watch():
            yield
        self.held.clear()  # what is destroyed later is no part of it

    def stretches(self):
        """(phase, first, last + 1 of its events), for each time that one began."""
        ends = [at for _, at in self.begun[1:]] + [len(self.events)]
        return [(phase, start, end) for (phase, start), end in zip(self.begun, ends)]

    def spans(self, phase):
        return [(start, end) for name, start, end in self.stretches() if name == phase]

    def of_blocks(self, blocks):
        """The ledger of a transformer of so many blocks, told from this one of FEW_BLOCKS, or itself if there are no more.

        All blocks but the first and the last do the same, in the same order. So in each phase what the middle one of five does
        is written down once for each that is missing, up in forward and down in backward, and where it gives back its neighbour's
        memory, they give back their neighbours'."""
        missing, middle = blocks - FEW_BLOCKS, FEW_BLOCKS // 2
        if missing <= 0:
            return self

        def stands_for(block):  # range of blocks
            return range(block + missing * (block > middle), block + missing * (block >= middle) + 1)

        pieces, number, count = {}, {}, collections.Counter()
        for memory, taken, _ in self.events:
            if taken and memory.block is not None:
                number[memory] = count[memory.block]
                count[memory.block] += 1
                for k in stands_for(memory.block):
                    copy = memory if k == memory.block else dataclasses.replace(memory, block=k)
                    pieces[k, number[memory]] = copy

        def counterparts(memory, block, k):
            if memory.block is None:
                return [memory] if block != middle or k == middle else []
            if abs(memory.block - block) > 1:  # not a neighbour's: something that all keep
                return [pieces[other, number[memory]] for other in stands_for(memory.block)]
            return [pieces[k + memory.block - block, number[memory]]]

        told = Ledger(self.card)
        for phase, start, end in self.stretches():
            told.begin(phase)
            last = 0
            for block, events in itertools.groupby(self.events[start:end], key=lambda event: event[2]):
                events = list(events)
                if block is None:
                    told.events += events
                    continue
                order = stands_for(block)
                for k in order if last < middle else reversed(order):
                    for memory, taken, _ in events:
                        told.events += [(piece, taken, k) for piece in counterparts(memory, block, k)]
                last = last if block == middle else block
        for (phase, block, what), flops in self.flops.items():
            told.flops[phase, block, what] = flops * (1 + missing if block == middle else 1)
        return told

    def peak_bytes(self, phase):
        """Most that is held at once in a phase."""
        held = most = 0
        spans = self.spans(phase)
        for k, (memory, taken, _) in enumerate(self.events):
            held += memory.bytes if taken else -memory.bytes
            if held > most and any(a <= k < b for a, b in spans):
                most = held
        return most

    def step_flops(self, kinds=("matrices", "attention")):
        """Of a training step."""
        return sum(flops for (phase, _, what), flops in self.flops.items() if phase == "training" and what in kinds)

    def split(self, phase):
        """GiB of each kind at the moment in a phase when most is held. On a card also what its allocator reserves beyond
        that by the end of the phase, if it began without holes, and the context."""
        spans = self.spans(phase)
        start, end = spans[0][0], spans[-1][1]
        held = dict.fromkeys(memory for memory, taken, _ in self.events[:start] if taken)
        for memory, taken, _ in self.events[:start]:
            if not taken:
                del held[memory]
        allocator, now = Allocator(), collections.Counter()
        for memory in held:
            allocator.take(memory)
            now[memory.kind] += memory.bytes
        most = now.copy()
        for memory, taken, _ in self.events[start:end]:
            (allocator.take if taken else allocator.give_back)(memory)
            now[memory.kind] += memory.bytes if taken else -memory.bytes
            if now.total() > most.total():
                most = now.copy()
        parts = {kind: most[kind] / GIB for kind in KINDS}
        if self.card:
            parts["allocator"] = (allocator.most - most.total()) / GIB
            parts["context"] = CONTEXT_GIB
        return parts


@dataclass(eq=False)
class Block:
    """A piece of a segment that the allocator has from the card, between its neighbours."""

    address: int
    bytes: int
    small: bool
    before: "Block" = None
    after: "Block" = None
    free: bool = False


class Allocator:
    """torch's caching allocator for CUDA, one stream, default settings (c10/cuda/CUDACachingAllocator.cpp).

    Sizes are rounded up to 512 bytes. Pieces of up to 1 MiB are cut from segments of 2 MiB, those below 10 MiB from segments of
    20 MiB, larger ones get a segment of their own, rounded up to 2 MiB. What is given back is merged with free neighbours
    and kept for the next that fits best; the rest of it is cut off, if more than 1 MiB (512 bytes of a small one) is left.
    """

    def __init__(self):
        self.free = {True: [], False: []}  # for small pieces, for others: sorted (bytes, address, Block)
        self.blocks = {}  # Memory -> Block
        self.reserved = self.most = self.addresses = 0  # bytes; each segment lies behind the last

    def take(self, memory):
        if not memory.bytes:
            return
        size = -(-memory.bytes // 512) * 512
        small = size <= 2**20
        pool = self.free[small]
        at = bisect.bisect_left(pool, (size,))
        if at < len(pool):
            block = pool.pop(at)[2]
            block.free = False
        else:
            segment = 2 * 2**20 if small else 20 * 2**20 if size < 10 * 2**20 else -(-size // 2**21) * 2**21
            self.reserved += segment
            self.most = max(self.most, self.reserved)
            block = Block(self.addresses, segment, small)
            self.addresses += segment
        if block.bytes - size >= (512 if small else 2**20 + 512):
            rest = Block(block.address + size, block.bytes - size, small, block, block.after)
            if rest.after:
                rest.after.before = rest
            block.after, block.bytes = rest, size
            self.set_free(rest)
        self.blocks[memory] = block

    def give_back(self, memory):
        if memory.bytes:
            self.set_free(self.blocks.pop(memory))

    def set_free(self, block):
        pool = self.free[block.small]
        for side in ("before", "after"):
            other = getattr(block, side)
            if other and other.free:
                pool.pop(bisect.bisect_left(pool, (other.bytes, other.address)))
                first, second = (other, block) if side == "before" else (block, other)
                first.bytes, first.after = first.bytes + second.bytes, second.after
                if first.after:
                    first.after.before = first
                block = first
        block.free = True
        bisect.insort(pool, (block.bytes, block.address, block))

    def empty_cache(self):
        """Give whole free segments back to the driver."""
        for pool in self.free.values():
            for entry in [e for e in pool if not e[2].before and not e[2].after]:
                pool.remove(entry)
                self.reserved -= entry[0]


def shapes_only(model, dtype):
    """A model on the meta device with its weights in a dtype, frozen, in eval mode, as if it had been loaded."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model.requires_grad_(False).eval()


def take_memory(ledger, model, adapters=False):
    """Give the weights and buffers of a model on the meta device the memory that they need, or those of its adapters."""
    for name, module in model.named_modules():
        if ("lora_" in name) == adapters:
            block = re.match(r"transformer_blocks\.(\d+)\.", name)
            ledger.enter(int(block[1]) if block else None)
            module.to_empty(device="cpu", recurse=False)
            mine = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            ledger.label("adapters" if adapters else "weights", mine)
    ledger.block, ledger.inside = None, False


def as_if_quantized(model, part, dtype, bits=4):
    """Put something of the same size in the place of what `load_quantized` quantizes: bitsandbytes' own needs contents."""
    import bitsandbytes as bnb
    import torch
    import torch.nn.functional as F

    class Multiply(torch.autograd.Function):
        @staticmethod
        def weight(layer, like):  # in 16 bits, for the time of one product; so does bitsandbytes
            if bits == 8:
                return torch.empty(layer.out_features, layer.in_features, dtype=torch.int8).to(like.dtype)
            maxima = torch.empty(layer.weight.numel() // 32)  # no longer quantized themselves
            weight = torch.empty(layer.out_features, layer.in_features, dtype=like.dtype)
            del maxima
            return weight

        @staticmethod
        def forward(ctx, x, layer):
            ctx.layer = layer
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            return F.linear(x, Multiply.weight(layer, x), bias)

        @staticmethod
        def backward(ctx, grad):
            return grad @ Multiply.weight(ctx.layer, grad), None

    class Quantized(bnb.nn.Linear4bit):  # so that peft adds the adapter that it adds to the real one
        def __init__(self, plain):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features, self.bias = plain.in_features, plain.out_features, plain.bias
            self.compute_dtype, n = dtype, plain.weight.numel()
            self.weight = torch.nn.Parameter(torch.empty(n * bits // 8, dtype=torch.uint8, device="meta"), False)
            self.weight.compress_statistics, self.weight.quant_type = True, "nf4"
            # Of each block of 64 weights the maximum, in 8 bits; of each 256 of those theirs, in 32; and two tables.
            maxima = (n // 64, -(-n // 64 // 256) * 4, 16 * 4, 256 * 4, 4) if bits == 4 else (self.out_features * 4,)
            for k, size in enumerate(maxima):
                self.register_buffer(f"maxima{k}", torch.empty(size, dtype=torch.uint8, device="meta"))

        def forward(self, x):
            return Multiply.apply(x, self)

    for name, module in list(model.named_modules()):
        if QUANTIZED[part].fullmatch(name):
            model.set_submodule(name, Quantized(module))
    model.is_loaded_in_4bit = bits == 4
    return model


def once_for(*fields):
    """Remember a rehearsal by the model and what it depends on of the configuration: knobs are turned one after another."""

    def remembering(rehearsal):
        made = {}

        @functools.wraps(rehearsal)
        def remembered(config, base, card=True):
            model = base.transformer, base.vae, base.text_encoder, base.stored, base.large
            key = repr((*model, *(getattr(config, field) for field in fields), card))
            if key not in made:
                made[key] = rehearsal(config, base, card)
            return made[key]

        return remembered

    return remembering


SHAPES_SEEN = collections.defaultdict(
    dict
)  # method of a VAE, what else it depends on -> what `once_for_a_shape` wrote down


@contextlib.contextmanager
def once_for_a_shape(ledger, vae, *methods):
    """Let methods of a VAE, which it calls for tile after tile and stretch after stretch, be run once for tensors of the same shapes;
    after that, and for clips of other sizes, what they took and gave back is written down again, but not what they computed. What
    they return must be what they were given, or share no memory. methods: (object, name)."""
    import torch
    from torch.utils._pytree import tree_flatten, tree_unflatten

    def repeating(method):
        made = SHAPES_SEEN[repr((method.__qualname__, vae.config, vae.dtype, ledger.card))]

        def repeated(*args, **kwargs):
            leaves, structure = tree_flatten((args, kwargs))
            key = structure, *(leaf.shape if torch.is_tensor(leaf) else leaf for leaf in leaves)
            if key not in made:
                start = len(ledger.events)
                outputs, structure = tree_flatten(method(*args, **kwargs))
                given = {k: i for k, out in enumerate(outputs) for i, leaf in enumerate(leaves) if leaf is out}
                stays = {ledger.note(t): (k, t.shape, t.dtype) for k, t in enumerate(outputs) if k not in given}
                made[key] = ledger.events[start:], given, stays, structure
                return tree_unflatten(outputs, structure)
            events, given, stays, structure = made[key]
            copies, outputs = {}, {k: leaves[i] for k, i in given.items()}
            for memory, taken, block in events:
                if memory in stays:  # the ledger notes a tensor by itself
                    k, shape, dtype = stays[memory]
                    outputs[k] = torch.empty(shape, dtype=dtype)
                else:
                    if taken:
                        copies[memory] = dataclasses.replace(memory)
                    ledger.events.append((copies[memory], taken, block))
            return tree_unflatten([outputs[k] for k in range(len(outputs))], structure)

        return repeated

    for owner, name in methods:
        setattr(owner, name, repeating(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in methods:
            delattr(owner, name)  # which would keep it alive


@once_for("frames", "height", "width", "compute_dtype", "quantize_text_encoder")
def rehearse_caching(config, base, card):
    """Ledger of the phase "caching": the VAE codes a clip, T5 a prompt, as `cache_clips` does one after another."""
    import torch
    from diffusers import AutoencoderKLCogVideoX
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import T5Config, T5EncoderModel

    ledger, dtype = Ledger(card), getattr(torch, config.compute_dtype)
    with torch.device("meta"):
        vae = shapes_only(AutoencoderKLCogVideoX.from_config(base.vae), dtype)
        kept = dtype if config.quantize_text_encoder else base.frozen_dtype(dtype)
        text_encoder = shapes_only(T5EncoderModel(T5Config(**base.text_encoder)), kept)
    text_encoder.set_input_embeddings(text_encoder.shared)  # one table, as when it is loaded
    if kept == torch.float16:  # as transformers keeps it
        for name, p in text_encoder.named_parameters():
            p.data = p.data.float() if ".wo." in name else p.data
    if config.quantize_text_encoder:
        as_if_quantized(text_encoder, "text_encoder", dtype, int(config.quantize_text_encoder.removesuffix("bit")))
    convert_while_running(text_encoder, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), ledger.watch():
        ledger.begin("caching")
        take_memory(ledger, vae)
        clip = torch.empty(1, 3, config.frames, config.height, config.width, dtype=dtype)
        if base.large:
            tile_beyond_own_size(vae)
        with once_for_a_shape(ledger, vae, (vae.encoder, "forward"), (vae, "blend_v"), (vae, "blend_h")):
            vae.encode(clip)
        del vae, clip
        take_memory(ledger, text_encoder)
        text_encoder(torch.zeros(1, base.text_length, dtype=torch.long))
    return ledger


def offloaded():
    """What `--offload-activations` does, on a device that is the host: a saved tensor's memory is given back, and taken anew."""
    import torch

    def pack(tensor):
        return tensor.shape, tensor.dtype

    def unpack(packed):
        return torch.empty(packed[0], dtype=packed[1])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


@contextlib.contextmanager
def tables_with_contents():
    """Let bitsandbytes' optimizers compute their tables of 256 numbers for real, since they read them."""
    import bitsandbytes.functional as functional
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    compute = functional.create_dynamic_map

    def outside(*args, **kwargs):
        with unset_fake_temporarily():
            return compute(*args, **kwargs)

    functional.create_dynamic_map = outside
    try:
        yield
    finally:
        functional.create_dynamic_map = compute


def rehearse(config, base, blocks, card=True, sampling=True):
    """Ledger of the phases "training" (one step) and "sampling", with so many of the transformer's blocks.

    What is done is what Trainer does, except what reads numbers.
    """
    import torch
    from diffusers import CogVideoXTransformer3DModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    ledger, dtype = Ledger(card), getattr(torch, config.compute_dtype)
    kept = base.frozen_dtype(dtype)
    if config.method == "full":
        kept = torch.float32 if config.trained_dtype == "float32" else torch.bfloat16
    with torch.device("meta"):
        shape = {**base.transformer, "num_layers": blocks}
        transformer = shapes_only(CogVideoXTransformer3DModel.from_config(shape), kept)
    if config.method == "qlora":
        as_if_quantized(transformer, "transformer", dtype)
    if config.method == "full":
        transformer.requires_grad_(True)
    else:
        with torch.device("meta"):
            add_lora(transformer, config.rank, config.alpha, config.seed, config.lora_targets)
    compute_in_dtype_of_input(transformer, dtype)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    ledger.enter_when_run(transformer.transformer_blocks)
    size = config.height // base.spatial, config.width // base.spatial
    shape = sum(base.latent_frames(config.frames)), base.transformer["in_channels"], *size  # (T, C, h, w)
    text = base.text_length, base.transformer.get("text_embed_dim", 4096)
    micro = config.micro_batch_size or config.batch_size
    passes = min(2, config.batch_size // micro)  # a third adds nothing to two
    decoding = rehearse_decoding(config, base, card) if sampling else None

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        tables_with_contents(),
        ledger.watch(),
    ):
        ledger.begin("loading")
        take_memory(ledger, transformer)
        take_memory(ledger, transformer, adapters=True)
        parameters = [p for p in transformer.parameters() if p.requires_grad]
        for p in parameters:
            p.register_post_accumulate_grad_hook(lambda p: ledger.label("gradients", [p.grad]))
        rotary = rotary_embedding(base, transformer, config.frames, config.height, config.width, torch.device("cpu"))
        updates = Updates(config, parameters)
        average = Average(parameters, config.ema) if config.ema and not config.ema_on_cpu else None
        ledger.label("optimizer", [*(average.tensors if average else []), *(updates.began or [])])
        alpha_bar = torch.empty(1000, dtype=torch.float64)
        for p in parameters:  # one update on nothing, since from the first on the optimizer has its state
            p.grad = torch.empty_like(p)
        for i in range(len(parameters)):
            updates.update(i)
        states = [state.values() for o in updates.optimizers for state in o.state.values()]
        ledger.label("optimizer", [t for state in states for t in state if torch.is_tensor(t)])
        transformer.train()
        for _ in range(passes):
            ledger.begin("training")  # forward
            batch = {
                "latents": torch.empty(micro, *shape), "noise": torch.empty(micro, *shape),
                "timesteps": torch.empty(micro, dtype=torch.long), "prompt_embeds": torch.empty(micro, *text, dtype=dtype),
            }  # fmt: skip
            older = {memory for memory, _ in ledger.held.values()}
            with offloaded() if config.offload_activations else contextlib.nullcontext():
                loss = velocity_loss(transformer, batch, alpha_bar, rotary, dtype).sum() / config.batch_size
            for memory, _ in ledger.held.values():
                if memory not in older:
                    memory.kind = "saved activations"
            ledger.begin("training")  # backward
            loss.backward()
        ledger.begin("training")  # update
        if not config.fused_backward:
            norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters]
            torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, torch.stack(norms).norm())
        updates.step()
        for p in parameters:
            p.grad = None
        if average:
            average.update(1)
        for key in ledger.flops:
            ledger.flops[key] = ledger.flops[key] * (config.batch_size // micro) // passes
        del batch, loss
        if decoding:  # as `Trainer.draw_samples` after training: one of the denoising steps, and one decoding
            ledger.begin("sampling")  # denoising
            (loading,), (working,) = decoding.spans("loading"), decoding.spans("sampling")
            ledger.events += decoding.events[slice(*loading)]
            transformer.eval()
            inputs = 2 * base.sampled_at_once  # each clip with its prompt and without
            with torch.no_grad(), average.in_place() if average else contextlib.nullcontext():
                transformer(
                    torch.empty(inputs, *shape, dtype=dtype), torch.empty(inputs, *text, dtype=dtype),
                    torch.empty(inputs, dtype=torch.long), image_rotary_emb=rotary, return_dict=False,
                )  # fmt: skip
                ledger.begin("sampling")  # decoding
                ledger.events += decoding.events[slice(*working)]
    return ledger


@once_for("frames", "height", "width", "compute_dtype")
def rehearse_decoding(config, base, card):
    """Ledger of what sampling does with the VAE: "loading" it, and decoding, which stands under "sampling"."""
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
    from torch._subclasses.fake_tensor import FakeTensorMode

    ledger, dtype = Ledger(card), getattr(torch, config.compute_dtype)
    with torch.device("meta"):
        vae = shapes_only(AutoencoderKLCogVideoX.from_config(base.vae), dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), ledger.watch():
        ledger.begin("loading")
        take_memory(ledger, vae)
        ledger.begin("sampling")
        size = config.height // base.spatial, config.width // base.spatial
        shape = base.sampled_at_once, sum(base.latent_frames(config.frames)), base.vae["latent_channels"], *size
        latents, pipe = torch.empty(shape, dtype=dtype), CogVideoXPipeline(None, None, vae, None, None)
        if base.large:
            vae.enable_tiling()
        with once_for_a_shape(ledger, vae, (vae.decoder, "forward"), (vae, "blend_v"), (vae, "blend_h")):
            frames = pipe.decode_latents(latents)
        pipe.video_processor.postprocess_video(frames, output_type="pt").float()
    return ledger


@dataclass
class Plan:
    """What a run is predicted to need. `phases` has the parts of each phase's peak, in the order of a stacked bar."""

    asked: Config
    config: Config  # resolved
    phases: dict  # "caching", "training", "sampling" -> part -> GiB
    flops: float  # of a training step
    attention_flops: float = 0.0  # of these, in attention

    @property
    def needs_gib(self):
        """Phase -> GiB."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak_gib(self):
        """What the card must have: the need of the phase that needs most."""
        return max(self.needs_gib.values())


def plan(config, card=True):
    """Predict what a run would need, without its weights or clips. Returns Plan. Raises UserError.

    card: on a GPU, with what its allocator reserves and the context; otherwise the tensors alone, as on a CPU. One process, no
    torch.compile. The arithmetic, if the configuration does not say, is bf16 for a large model and float32 for a small one.
    """
    resolved, base = resolve_plan(config)
    quiet_libraries()
    blocks = base.transformer["num_layers"]
    try:
        ledger = rehearse(resolved, base, min(blocks, FEW_BLOCKS), card=card).of_blocks(blocks)
        phases = {"caching": rehearse_caching(resolved, base, card).split("caching")}
    except Exception as error:  # values that diffusers, transformers or torch cannot build or run raise a dozen kinds
        here = traceback.extract_tb(error.__traceback__)[-1].filename == __file__
        if here or not base.folder.is_dir():  # a fault of this program's; a published model, so none of a folder's
            raise
        reason = f"{type(error).__name__}: {str(error).strip() or 'no reason given'}".splitlines()[0]
        size = f"{resolved.frames}x{resolved.height}x{resolved.width}"
        raise UserError(
            f"model '{resolved.model}' at {size}: it cannot be built and run as its config.json files say ({reason})"
        )
    phases |= {phase: ledger.split(phase) for phase in ("training", "sampling")}
    return Plan(config, resolved, phases, ledger.step_flops(), ledger.step_flops(["attention"]))


def changed(config, **changes):
    """A configuration with some options changed; another method leaves out what only --full has, and its learning rate."""
    changed = dataclasses.replace(config, **changes)
    if changes.get("method", "full") != "full":
        changed.trained_dtype = changed.fused_backward = changed.l2_to_base = None
        if config.method == "full":
            changed.lr = None
    return changed


def resolve_plan(config, **changes):
    """(resolved Config, Described) of a configuration with some options changed. Raises UserError."""
    asked = changed(config, **changes)
    config, base, _ = resolve(asked, describe(asked.model))
    config.compute_dtype = config.compute_dtype or ("bfloat16" if base.large else "float32")
    if config.compute_dtype == "float16" and config.fused_backward:  # as `train`
        if asked.fused_backward:
            raise UserError(FUSED_IN_FP16)
        config.fused_backward = False
    return config, base


def arithmetic_on(card, model):
    """What `choose_compute_dtype` says on a card of CARDS, or on the one that is here; None where neither is. Raises UserError."""
    import torch

    if not card and not torch.cuda.is_available():
        return None
    if card not in WITHOUT_BF16 if card else torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float16" if describe(model).stored == "float16" else "float32"


def planner(asked, compute_dtype=None):
    """A function of options to change that gives the Plan with them, in this arithmetic where none is asked for. Each is made
    once. It raises UserError where the options do not go together."""
    made, dtype = {}, {"compute_dtype": asked.compute_dtype or compute_dtype}

    def planned_with(**changes):
        key = frozenset(changes.items())
        if key not in made:
            made[key] = plan(changed(asked, **changes, **dtype))
        return made[key]

    return planned_with


def knobs(config):
    """(what to change, the options for it) that could lower the peak of a resolved configuration, the gentlest first."""
    full = config.method == "full"
    shorter = max((frames for frames in (9, 17, 25, 49) if frames < config.frames), default=None)
    height, width = (max(32, round(side * 2 / 3 / 32) * 32) for side in (config.height, config.width))
    all_of_them = [
        (not config.gradient_checkpointing, "recompute activations", {"gradient_checkpointing": True}),
        ((config.micro_batch_size or config.batch_size) > 1 and not config.fused_backward,
         "one clip in memory at a time", {"micro_batch_size": 1}),
        (not config.quantize_text_encoder, "T5 in 4 bits", {"quantize_text_encoder": "4bit"}),
        (config.ema and not config.ema_on_cpu, "the average in host memory", {"ema_on_cpu": True}),
        (full and config.trained_dtype == "float32", "weights in bf16, rounded stochastically", {"trained_dtype": "bfloat16"}),
        (full and not config.fused_backward and not config.micro_batch_size and config.compute_dtype != "float16",
         "optimizer inside backward", {"fused_backward": True}),
        (config.optimizer == "adamw", "optimizer's state in 8 bits", {"optimizer": "adamw8bit"}),
        (config.optimizer != "adafactor", "optimizer's state factored", {"optimizer": "adafactor"}),
        (config.gradient_checkpointing and not config.offload_activations, "saved activations in host memory",
         {"offload_activations": True}),
        (config.batch_size > 1 and config.fused_backward, "one clip a step", {"batch_size": 1, "micro_batch_size": None}),
        (full and config.batch_size > 1 and not config.fused_backward and config.compute_dtype != "float16",
         "one clip a step, optimizer inside backward", {"batch_size": 1, "micro_batch_size": None, "fused_backward": True}),
        (config.method == "lora", "base in 4 bits", {"method": "qlora"}),
        (full, "adapters, on a base in 4 bits", {"method": "qlora"}),
        (shorter, "shorter clips", {"frames": shorter}),
        (min(config.height, config.width) > 128, "smaller clips", {"height": height, "width": width}),
    ]  # fmt: skip
    return [(name, changes) for useful, name, changes in all_of_them if useful]


def spending(config):
    """The same of what takes more memory, and is worth it where there is some."""
    kept = {"gradient_checkpointing": False} | ({"offload_activations": False} if config.offload_activations else {})
    more = {"batch_size": config.batch_size + 1}
    return [("no gradient checkpointing", kept)] * config.gradient_checkpointing + [("one more clip a step", more)]


def fitting(planned_with, vram):
    """Turn one knob after another, the gentlest first, as far as it takes something off a phase that does not fit, until the run
    fits; then turn back, the harshest first, what is not needed any more, or not so far. planned_with: a `planner`. Returns (options changed,
    Plan), or (None, Plan of the least that was found)."""

    def too_much(planned):
        return sum(max(0.0, need - vram) for need in planned.needs_gib.values())

    changes, best, turned, useless = {}, planned_with(), [], []
    while too_much(best):
        change = next((change for _, change in knobs(best.config) if change not in useless), None)
        if change is None:
            return None, best
        useless.append(change)
        with contextlib.suppress(UserError):  # it does not go with what was asked for
            found = planned_with(**{**changes, **change})
            if too_much(found) < 0.995 * too_much(best):
                changes, best = {**changes, **change}, found
                turned.append(change)
                useless.clear()  # what did not help may do so now
    for names in dict.fromkeys(tuple(change) for change in reversed(turned)):
        for gentler in [{}, *(change for change in turned if tuple(change) == names)]:
            fewer = {name: value for name, value in changes.items() if name not in names} | gentler
            with contextlib.suppress(UserError):  # some options need others
                if fewer != changes and planned_with(**fewer).peak_gib <= vram:
                    changes, best = fewer, planned_with(**fewer)
                    break
    return changes, best


def digits(number, count):
    """A number to so many digits, written out."""
    return f"{float(f'{number:.{count}g}'):,.12g}"


def as_options(values):
    """Fields of Config as the command line spells them."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if value is None:  # back to what it is where nothing is said
            continue
        if name == "method":
            words.append(f"--{value}")
        elif isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag}", *(shlex.quote(str(v)) for v in values)]
    return " ".join(words)


def measured_rate(work, flops, device, seconds):
    """FLOP/s of something that is done again and again for some seconds on a device."""
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    work()  # the first call sets its kernels up
    wait()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or not count:
        work()
        wait()
        count += 1
    return count * flops / (time.perf_counter() - start)


def matrix_rate(device, dtype, seconds=2):
    """FLOP/s of matrix products on a device, measured."""
    import torch

    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    return measured_rate(lambda: a @ b, 2 * n**3, device, seconds)


def attention_rate(device, dtype, seconds=2):
    """FLOP/s of attention on a device, measured: its kernels are others, on a CPU several times as slow."""
    import torch

    q = torch.randn(1, 4, 4096, 64, device=device).to(dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    return measured_rate(lambda: attend(q, q, q), 4 * 4 * 4096**2 * 64, device, seconds)


def time_of_step(planned, card=None):
    """(seconds of a training step, what that assumes): on a card by its published rate, or by rates measured here."""
    import torch

    dtype = planned.config.compute_dtype
    if card:
        rate = CARDS[card][dtype == "float32"]
        told = f"{UTILISATION:g} (assumed) of the {rate} TFLOP/s that are published for {dtype} on {card}"
        return planned.flops / (rate * 1e12 * UTILISATION), told
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, dtype)
    if device.type == "cpu":  # as a run here would choose
        dtype, _ = choose_compute_dtype(device, describe(planned.config.model), planned.asked.compute_dtype)
    rates = matrix_rate(device, dtype, 1), attention_rate(device, dtype, 1)
    seconds = (planned.flops - planned.attention_flops) / rates[0] + planned.attention_flops / rates[1]
    told = f"least, at the {rates[0] / 1e12:.2g} TFLOP/s of matrix products and {rates[1] / 1e12:.2g} of attention"
    return seconds, f"{told} in {str(dtype).removeprefix('torch.')} measured now on this {device.type}"


def plan_command(config, vram=None, card=None):
    """Print the plan of a run, what would change it, and a command that fits. vram: GiB. Raises UserError."""
    import torch

    if card:
        asked, card = card, next((name for name in CARDS if name.lower() == card.lower()), None)
        if not card:
            raise UserError(f"--card '{asked}': must be one of {', '.join(CARDS)}")
    if vram is not None and not 0 < vram < math.inf:
        raise UserError(f"--vram {vram:g}: must be a number of GiB above 0")
    held_against = "" if vram else f", what torch finds on the {card}" if card else ", the card that is here"
    if not vram and not card and not torch.cuda.is_available():
        vram, held_against = (
            CARDS[USUAL_CARD][2],
            f", what torch finds on a 24 GB card ({USUAL_CARD}); --vram or --card holds it against another",
        )
    vram = vram or (CARDS[card][2] if card else torch.cuda.get_device_properties(0).total_memory / GIB)
    planned_with = planner(config, arithmetic_on(card, config.model))
    planned = planned_with()
    c, needs = planned.config, planned.needs_gib
    print(f"plan of --{c.method} on {c.model}: batch {c.batch_size}, {c.frames}x{c.height}x{c.width}, arithmetic in "
          f"{c.compute_dtype}, {c.optimizer}, gradient checkpointing {'on' if c.gradient_checkpointing else 'off'}")  # fmt: skip
    print(f"\n{'GiB at the peak of each phase, predicted':40}" + "".join(f"{phase:>10}" for phase in needs))
    for part in planned.phases["training"]:
        print(f"  {part:38}" + "".join(f"{parts[part]:10.2f}" for parts in planned.phases.values()))
    print(f"  {'together':38}" + "".join(f"{need:10.2f}" for need in needs.values()))
    print("(allocator: what CUDA's reserves beyond the tensors, emulated; context: the driver and libraries, assumed;\n"
          "not known: workspaces of convolutions, which were seen to take 1 to 2 GiB more for caching where those are free,\n"
          "--compile, several processes, what else is on the card)")  # fmt: skip

    def tight(found):
        if found.peak_gib <= (1 - TIGHT) * vram or found.peak_gib > vram:
            return ""
        return (
            f"; tight, since predictions of training and sampling were up to {100 * TIGHT:.0f} % below measured peaks"
        )

    def command(changes):
        wanted = dataclasses.asdict(changed(config, **changes))
        said = {
            f.name: wanted[f.name]
            for f in dataclasses.fields(Config)
            if f.name == "method" or wanted[f.name] != f.default
        }
        return f"python cogvideo_lite.py {as_options(said)}"

    print(f"\n{'fits' if planned.peak_gib <= vram else 'does not fit'} in {vram:g} GiB{held_against}: {planned.peak_gib:.1f} needed, by "
          f"{max(needs, key=needs.get)}{tight(planned)}")  # fmt: skip
    seconds, told = time_of_step(planned, card)
    print(f"\ntime, estimated: {planned.flops:.3g} FLOP a step, {digits(seconds, 3)} s at {told};\n"
          f"{digits(seconds * c.steps / 3600, 2)} hours for {c.steps} steps, without caching and sampling")  # fmt: skip
    if card and seconds < 1:
        print("(so short a step takes longer: the host, which starts each operation, sets its pace, not the card)")
    if seconds > 1 and not card and not torch.cuda.is_available():  # a card has no time to show with a small model
        there, _ = time_of_step(planned, USUAL_CARD)
        print(f"(that is this CPU; on the {USUAL_CARD} {digits(there, 3)} s a step, estimated as with --card)")
    print("\nwhat would change the peak, predicted, and the work of a step:", flush=True)
    rows = []
    for name, changes in [*knobs(c), *spending(c)]:
        with contextlib.suppress(UserError):  # it does not go with what was asked for
            then = planned_with(**changes)
            by_phase = {phase: then.needs_gib[phase] - need for phase, need in needs.items()}
            work = 100 * (then.flops / planned.flops - 1)
            rows.append((then.peak_gib - planned.peak_gib, sum(by_phase.values()), name, changes, by_phase, work))
    for change, _, name, changes, by_phase, work in sorted(rows, key=lambda row: row[:2]):
        where = [f"{phase} {gib:+.1f}" for phase, gib in by_phase.items() if abs(gib) >= 0.05]
        where += [f"work {work:+.0f} %"] * (abs(work) >= 0.5)
        print(f"  {round(change, 1) + 0.0:+6.1f} GiB  {name:38} {as_options(changes):56} {', '.join(where)}")
    if planned.peak_gib > vram:
        print("\nlooking for a command that fits", flush=True)
    changes, found = fitting(planned_with, vram)
    if changes is None:
        print(f"\nnothing found that fits in {vram:g} GiB: the least that was found needs {found.peak_gib:.1f}")
        return
    print(f"\nthis fits, with {found.peak_gib:.1f} GiB{tight(found)}:\n  {command(changes)}", flush=True)
    if tight(found):
        changes, found = fitting(planned_with, (1 - TIGHT) * vram)
        if changes is not None:
            print(f"and this with room to spare, with {found.peak_gib:.1f} GiB:\n  {command(changes)}")


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
        "--qlora", action="store_const", const="qlora", dest="method", help="the same on a base that is kept in 4 bits"
    )
    action.add_argument("--full", action="store_const", const="full", dest="method", help="train all weights")
    action.add_argument("--merge", metavar="RUN", help="write the base with a run's adapter added to its weights")
    action.add_argument(
        "--sample", nargs="+", metavar="PROMPT", help="generate clips, from --run or from --model alone"
    )
    action.add_argument(
        "--compare", nargs="+", metavar="RUN", help="one HTML page that puts finished runs side by side"
    )
    action.add_argument(
        "--blend",
        nargs=2,
        metavar=("RUN", "SHARE"),
        help="base + SHARE x (trained - base): go back from a run that went too far",
    )
    out.add_argument("--run", help="folder of a finished run, for --sample")
    out.add_argument(
        "--plan", action="store_true", help="with --lora, --qlora or --full: predict memory and time, and stop"
    )
    out.add_argument(
        "--vram", type=float, metavar="GIB", help="with --plan: memory that the run must fit in [what the card has; 24]"
    )
    out.add_argument("--card", metavar="NAME", help=f"with --plan: a card's memory and speed ({', '.join(CARDS)})")
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
    names = ("sample", "run", "config", "method", "merge", "compare", "blend", "plan", "vram", "card")
    prompts, run, file, method, merged, compared, blended, planning, vram, card = (given.pop(name) for name in names)
    if planning and not method:
        raise UserError("--plan: goes with --lora, --qlora or --full")
    if not planning and (vram is not None or card):
        raise UserError("--vram and --card: only with --plan")
    if prompts:
        sample_command(prompts, run, given)
        return
    if run:
        raise UserError("--run: only for --sample; a run is continued with --resume --out RUN")
    if merged:
        only_out(given, "--merge")
        merge_command(merged, given)
        return
    if compared:
        only_out(given, "--compare")
        print(f"comparison in {compare(compared, given.get('out'))}")
        return
    if blended:
        only_out(given, "--blend")
        print(f"blend in {report(blend(blended[0], number(blended[1], '--blend'), given.get('out')))}")
        return
    if given.get("resume") and not file:
        folder = run_folder(Config(method=method, out=given.get("out"), resume=True))
        if (folder / "config.json").exists():  # what is left out stays as it was
            file, given["out"] = folder / "config.json", str(folder)
            before = load_config(file)
            if before.method != method:
                raise UserError(f"--{method}: the run in {folder} was started with --{before.method}; start a new one")
            fixed = "model rank alpha lora_targets seed frames height width fps batch_size optimizer trained_dtype ema"
            for name in fixed.split():
                if name in given and given[name] != getattr(before, name):
                    raise UserError(
                        f"--{name.replace('_', '-')} {given[name]}: this run was started with {getattr(before, name)}; start a new one"
                    )
    config = load_config(file, **{**given, "method": method}) if file else Config(**given, method=method)
    if file and "out" not in given and not config.resume:
        config.out = None  # a repeated run gets a folder of its own
    if planning:
        plan_command(config, vram, card)
        return
    result = train(config)
    if result is None:
        return
    print(f"results in {report(result)}")


def report(run):
    """Print what came of a run; returns its folder."""
    s = run.summary
    if "heldout_after" in s:
        print(f"held-out loss {s['heldout_before']:.4f} -> {s['heldout_after']:.4f} in {s['seconds']:.0f} s, "
              f"peak {s['peak_memory_gib']:.1f} GiB")  # fmt: skip
    if "distortion_after" in s:
        print(f"distortion of the samples {s['distortion_before']:.2f} -> {s['distortion_after']:.2f} (0: like real clips), "
              f"speed of their subjects {s['motion_before']:.2f} -> {s['motion_after']:.2f} of real ones'")  # fmt: skip
        print("beside it, of real clips': " + ", ".join(
              f"{name} {s[f'{name}_before']:.2f} -> {s[f'{name}_after']:.2f}" for name in COMPANIONS[1:])
              + (f"; likeness of the samples {s['similarity_before']:.2f} -> {s['similarity_after']:.2f}" if "similarity_after" in s else ""))  # fmt: skip
    for where, asked in (("concept", "where it is asked for"), ("concept_unasked", "where not")):
        if f"{where}_after" in s:
            print(f"concept score {asked} {s[f'{where}_before']:.2f} -> {s[f'{where}_after']:.2f}")
    print(f"see {run.folder / 'samples' / 'contact_sheet.png'}")
    return run.folder


def number(text, option):
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option}: '{text}' is no number")


def only_out(given, action):
    if set(given) - {"out"}:
        raise UserError(f"--{min(set(given) - {'out'}).replace('_', '-')}: not for {action}, which takes --out only")


def merge_command(run, given):
    out = given.get("out") or Path(run) / "merged"
    told = merge(run, out)
    print(f"merged into {told['dtype']}: rounding takes {100 * told['rounding']:.2g} % of the adapter's change (norm), and leaves "
          f"{100 * told['unchanged_share']:.2g} % of the adapted weights as they were")  # fmt: skip
    if "nf4_error" in told:
        print(
            f"the adapter was trained on NF4 weights; those it stands on now differ from them by {told['nf4_error']:.2g} times its change"
        )
    print(f"transformer in {Path(out) / 'transformer'}")


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
