"""cogvideo_lite: fine-tune CogVideoX without ruining it, in one file.

    python cogvideo_lite.py --lora                                                   the bundled nano model, on any CPU
    python cogvideo_lite.py --qlora --model THUDM/CogVideoX-5b --data my_clips       the real one, its base in 4 bits
    python cogvideo_lite.py --full --model THUDM/CogVideoX-2b --data my_clips        all its weights, at a low rate
    python cogvideo_lite.py --sample "a spider moving left over water" --run runs/lora-... [--image first.png]
    torchrun --nproc_per_node 2 cogvideo_lite.py --full --shard                      two cards, each with half of it

It reads top to bottom, in the order in which data flows: configuration, clips, base model, how weights are kept, cache,
diffusion, adapters, several processes, optimizers, checkpoints, sampling, training, a run's folder, command line. The
model classes are diffusers' own, and so is the sampler. What is written here is what happens between a folder of clips
and weights that stock diffusers loads. What looks at that from outside (check, plan, judge, compare), and the way to
DeepSpeed's engine (zero), lie in notebooks/.

Letters in shapes: B clips, F frames, C channels, H height and W width in pixels, T latent frames, h and w latent height
and width, L text tokens, D text width.

What it does not do: LoRA on the text encoder, buckets of several sizes in one run.
"""

import argparse
import contextlib
import csv
import dataclasses
import datetime
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import struct
import sys
import time
import timeit
import tomllib
import weakref
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from statistics import fmean as mean, geometric_mean

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """Something that the user can put right: one line saying what, where, and what to do. Exit status 2."""


class RunError(Exception):
    """A failure while running (a loss that is not finite, a full disk): one line. Exit status 1."""


# ------------------------------------------------------------------------------------------------------- configuration
def option(help, default=None, **rules):
    """A field of Config and its help on the command line. rules, for `check_options`: least, most, above, choices."""
    return field(default=default, metadata={"help": help, **rules})


@dataclass
class Config:
    """Everything that decides a run. `resolve` fills what is None; the result is saved as the run's config.json."""

    method: str = option(None, "lora", choices=["lora", "qlora", "full"])
    model: str = option("folder or Hub id of a text- or image-to-video CogVideoX", "data_samples/cogvideox-nano")
    data: str = option("folder of clips with captions, in any form that README.md lists", "data_samples/spider")
    heldout: str = option("folder of clips that are only held out [DATA-heldout if it exists, else every tenth clip]")
    out: str = option("folder of the run [runs/METHOD-TIME]")
    cache: str = option("folder for coded clips and prompts [.cache beside DATA]")
    clips: int = option("train on the first N clips [all; 50 of the bundled ones]", least=1)
    steps: int = option("optimizer steps", least=1)
    lr: float = option("learning rate, constant after the warm-up", above=0)
    warmup: int = option("steps of linear warm-up", least=0)
    batch_size: int = option("clips per optimizer step, all processes together", least=1)
    micro_batch_size: int = option("clips in memory at a time, per process [all of its share]", least=1)
    rank: int = option("LoRA rank", 32, least=1)
    alpha: float = option("LoRA alpha: the update is scaled by alpha / rank", 32.0, above=0)
    lora_targets: str = option("matrices of a block that get adapters", "attention", choices=["attention", "all"])
    optimizer: str = option("optimizer", choices=["adamw", "adamw8bit", "adafactor", "lion8bit"])
    weight_decay: float = option("weight decay of the optimizer", 1e-4, least=0)
    l2_to_base: float = option("strength of a pull of --full to its base (L2-SP, arXiv 1802.01483) [no pull]", above=0)
    max_grad_norm: float = option("clip gradients to this global norm (not with --fused-backward)", 1.0, above=0)
    trained_dtype: str = option(  # -nearest is there to show why
        "how --full keeps weights; bfloat16 rounds each step stochastically [float32; bfloat16 if > 0.5 B parameters]",
        choices=["float32", "bfloat16", "bfloat16-nearest"],
    )
    fused_backward: bool = option("run the optimizer inside backward [--full of > 0.5 B parameters]")
    ema: float = option("decay of a running average of the trained weights, which then is the result [no average]")
    prior: str = option("folder of clips of other things, mixed in so that they are not forgotten (arXiv 2208.12242)")
    skip_bad: bool = option("go on without clips that cannot be read, and say which", False)
    caption_dropout: float = option("share of samples trained on the empty prompt, as CogVideoX was", 0.1)
    seed: int = option("seed of every random draw", 0, least=0, most=2**32 - 1)
    frames: int = option("frames of a clip, 8k + 1 [the model's]", least=1, most=4001)
    height: int = option("pixels [the model's]", least=1)
    width: int = option("pixels [the model's]", least=1)
    fps: int = option("frames per second that clips are resampled to [8; 16 for CogVideoX1.5]", least=1)
    validation_prompts: list = option("prompts sampled before and after [DATA/../prompts.json, or held-out captions]")
    sample_every: int = option("draw samples every so many steps, too [before and after only]", least=1)
    sampling_steps: int = option("denoising steps of a sample", least=1)
    guidance_scale: float = option("classifier-free guidance of a sample", least=0)
    checkpoint_every: int = option("steps between checkpoints, and between held-out losses", least=1)
    checkpoints_limit: int = option("older checkpoints than the newest N are removed", 2, least=1)
    stop_on_distortion: bool = option("end a run whose held-out loss is above the untrained base's [a warning]", False)
    resume: bool = option("continue from the newest complete checkpoint in OUT [the newest run of the method]", False)
    gradient_checkpointing: bool = option("recompute activations: less memory, more time [if > 0.5 B parameters]")
    offload_activations: bool = option("keep activations that backward needs in host memory meanwhile", False)
    quantize_text_encoder: str = option("quantize T5 while it encodes prompts", choices=["4bit", "8bit"])
    compile: bool = option("torch.compile the transformer before the first step", False)
    deepspeed: str = option("--full by DeepSpeed as in a JSON file; none: ZeRO-2, optimizer on the host", const="zero2")
    shard: bool = option("spread weights, gradients and states over torchrun's processes [each holds all]", False)
    compute_dtype: str = option("arithmetic [chosen by a probe]", choices=["float32", "bfloat16", "float16"])


# What is left out on the command line comes from here; the `source` of each value that has one is printed.
NANO = dict(steps=400, warmup=20, batch_size=4, sampling_steps=20, guidance_scale=3.0, checkpoint_every=200)
LARGE = dict(steps=1500, warmup=100, batch_size=1, sampling_steps=50, guidance_scale=6.0, checkpoint_every=250)
SWEPT = "the lowest held-out loss of {} after 500 steps of one clip, and of three after 400 of four (notebooks/results)"
RECIPES = {  # those of LoRA are QLoRA's, too
    ("nano", "lora"): dict(NANO, lr=2e-3, optimizer="adamw", source=dict(lr=SWEPT.format("five"))),
    ("nano", "full"): dict(NANO, lr=1e-4, optimizer="adamw", source=dict(lr=SWEPT.format("seven"))),
    ("large", "lora"): dict(LARGE, lr=1e-4, optimizer="adamw", source=dict(
        lr="1e-4..1e-3 of CogVideo#116, from below", steps="1500-2000 for 50 clips in diffusers' CogVideoX example",
    )),
    ("large", "full"): dict(LARGE, lr=1e-5, optimizer="adafactor", source=dict(
        lr="1e-5 of CogVideo#116; sweep", optimizer="a 5B model's states do not fit 24 GB otherwise",
    )),
}  # fmt: skip
LION_DIVISOR = 5  # AdamW's learning rate over one of Lion's that does as much
FUSED_IN_FP16 = "--fused-backward: fp16 gradients must be unscaled all together; use --no-fused-backward"


def flag(name):
    """A field of Config as the command line spells it."""
    return "--" + name.replace("_", "-")


def refuse(*conditions):
    """Raise UserError with the message of the first (condition, message) that holds."""
    for holds, message in conditions:
        if holds:
            raise UserError(message)


def check_options(config):
    """Refuse what cannot work before anything is read or written. Raises UserError."""
    for f in dataclasses.fields(Config):
        value, rules, words = getattr(config, f.name), f.metadata, f"{flag(f.name)} {getattr(config, f.name)}: must be"
        if value is not None:
            choices = rules.get("choices", [value])
            refuse(
                ("least" in rules and not value >= rules["least"], f"{words} at least {rules.get('least')}"),
                ("most" in rules and value > rules["most"], f"{words} at most {rules.get('most')}"),
                ("above" in rules and not 0 < value < math.inf, f"{words} a number above 0"),
                (value not in choices, f"{words} one of {', '.join(map(str, choices))}"),
            )
    c, frames = config, config.frames or 1
    refuse(
        (not 0 <= c.caption_dropout < 1, f"--caption-dropout {c.caption_dropout}: must be in [0, 1)"),
        (c.ema is not None and not 0 < c.ema < 1, f"--ema {c.ema}: must lie between 0 and 1, such as 0.999"),
        (c.l2_to_base and c.method != "full", "--l2-to-base: only for --full; --weight-decay pulls adapters"),
        (c.trained_dtype and c.method != "full", "--trained-dtype: only for --full; adapters are kept in float32"),
        (c.offload_activations and c.gradient_checkpointing is False,
         "--offload-activations: would copy the weights out too; use it with gradient checkpointing"),
        (frames % 8 != 1, f"--frames {frames}: must be 8k + 1, such as {max(9, frames // 8 * 8 + 1)}"),
    )  # fmt: skip


def resolve(config, base=None, processes=None):
    """Fill what the user left out, from the model's own configuration and the recipe, for so many processes
    [torchrun's]. Returns (config, base, reasons): (what, reason) of each decision, for the banner. Raises UserError."""
    check_options(config)
    base = base or find_base(config.model)
    recipe = dict(RECIPES["nano" if base.width < 1000 else "large", config.method.removeprefix("q")])
    source, reasons = dict(recipe.pop("source")), []
    processes = processes or int(os.environ.get("WORLD_SIZE", 1))
    recipe["batch_size"] = math.ceil(recipe["batch_size"] / processes) * processes
    if config.deepspeed == "none":
        config = dataclasses.replace(config, deepspeed=None)
    recipe |= dict(optimizer="adamw", trained_dtype="float32") if config.deepspeed else {}  # on float32 copies
    native = dict(frames=base.frames, height=base.native[0], width=base.native[1], fps=base.fps)
    taken, native = ({k: v for k, v in d.items() if getattr(config, k) is None} for d in (recipe, native))
    config = dataclasses.replace(config, **taken, **native)
    if config.optimizer == "lion8bit" and "lr" in taken:
        taken["lr"] = config.lr = config.lr / LION_DIVISOR
        source["lr"] += f"; over {LION_DIVISOR} for Lion, each of whose steps is a full one (arXiv 2302.06675: 3 to 10)"
    if taken:
        values = ", ".join(f"{k} {v if isinstance(v, str) else f'{v:g}'}" for k, v in taken.items())
        sources = "; ".join(f"{k}: {reason}" for k, reason in source.items() if k in taken)
        reasons.append(("recipe", f"{values} ({sources})" if sources else values))
    if base.own_size_alone:
        size = dict(frames=base.frames, height=base.native[0], width=base.native[1])
        alone = f"this model has learned its positions, for {'x'.join(map(str, size.values()))} alone"
        for name, own in size.items():
            value = getattr(config, name)
            refuse((value != own, f"--{name} {value}: must be {own}: {alone}"))
    cell, micro = base.spatial * base.patch, config.micro_batch_size or config.batch_size
    for name in ("height", "width"):
        value, most = getattr(config, name), base.spatial * base.transformer[f"sample_{name}"]
        refuse(
            (value % cell, f"--{name} {value}: must be a multiple of {cell} for this model"),
            # CogVideoX1.5 cuts its positions from a table
            (base.patch_t and value > most, f"--{name} {value}: must be at most {most} for this model"),
        )
    words = f"--batch-size {config.batch_size}: must be a multiple of the {processes} processes"
    refuse((config.batch_size % processes, words))
    refuse((config.batch_size % micro, f"--micro-batch-size {micro}: must divide --batch-size {config.batch_size}"))
    if config.clips is None and resolve_path(config.data) == HERE / "data_samples/spider":
        config.clips = 50
        reasons.append(("clips", "the first 50, as in the reported case (CogVideo#116); --clips 200 takes all"))
    if config.gradient_checkpointing is None:
        config.gradient_checkpointing = base.large or config.offload_activations
    if config.method == "full" and config.trained_dtype is None:
        config.trained_dtype, reason = "float32", "float32, in which no step is too small to be kept"
        if base.large:
            config.trained_dtype = "bfloat16"
            reason = "bfloat16 with stochastic rounding: half the memory, and small steps survive on average"
        reasons.append(("weights", reason))
    accumulates, large_full = config.batch_size > processes * micro, config.method == "full" and base.large
    if config.fused_backward is None:
        config.fused_backward = large_full and not accumulates and not config.deepspeed
        reason = "after backward, all gradients in memory at once, since they are summed up over --micro-batch-size"
        if config.fused_backward:
            reason = "runs inside backward, so that gradients never live together; no clipping to a global norm"
        reasons += [("optimizer", reason)] * (large_full and not config.deepspeed)
    how = "each holds everything, and gradients are averaged after backward; where that does not fit, --shard does"
    if config.deepspeed:
        how = "DeepSpeed spreads states and gradients over them (--deepspeed), or moves them to the host"
    elif config.shard:
        how = "each holds some rows of every tensor (--shard), so that cards too small for all of it can train it"
    elif config.fused_backward:
        how = "each holds everything; each gradient is averaged, and stepped, as soon as backward has it"
    reasons += [("processes", f"{processes}: {how}")] * (processes > 1)
    refuse(
        (config.fused_backward and accumulates,
         "--micro-batch-size: gradients cannot be summed up when --fused-backward frees them at once; "
         "use --no-fused-backward"),
    )  # fmt: skip
    return config, base, reasons


def resolve_path(path):
    """A path as given, or, where that does not exist, relative to this file, so that defaults work from anywhere."""
    path = Path(os.path.expanduser(path))
    return (HERE / path if (HERE / path).exists() and not path.exists() else path).resolve()


def portable(path):
    """How a run remembers a path: relative to this file where it lies below, else absolute; a Hub id as it is."""
    place = resolve_path(path)
    return str(place.relative_to(HERE) if place.is_relative_to(HERE) else place) if place.exists() else path


def load_instrument(name):
    """A file of notebooks/: one that looks at a run from outside, or zero. Raises UserError where it is not there."""
    path = HERE / f"notebooks/{name}.py"
    refuse((not path.exists(), f"{path} is not there; it comes with the whole repository (training works without it)"))
    sys.modules.setdefault("cogvideo_lite", sys.modules[__name__])  # this may be __main__; not to be loaded twice
    module = sys.modules.get(name)
    if not module or Path(module.__file__).resolve() != path:
        spec = importlib.util.spec_from_file_location(name, path)  # by its place: such names are common elsewhere
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


def quiet_libraries():
    """Leave the terminal to what this program says: no bars for loading weights, no note on an optional kernel."""
    for module in ("backends.cpu.ops", "autograd._functions"):  # before anything imports it
        logging.getLogger(f"bitsandbytes.{module}").setLevel(logging.ERROR)
    import diffusers
    import transformers

    transformers.utils.logging.set_verbosity_error()  # it warns of errors where captions are too long
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


# --------------------------------------------------------------------------------------------------------------- clips

# What FFmpeg plays, by name: films, then streams without a container. Other files of a folder are not taken for clips.
VIDEO_SUFFIXES = frozenset(
    ".3g2 .3gp .apng .asf .avi .divx .dv .f4v .flv .gif .ivf .m2ts .m2v .m4v .mjpeg .mjpg .mkv .mov .mp4 .mpeg .mpg "
    ".mts .mxf .nut .ogg .ogv .qt .rm .rmvb .ts .vob .webm .wmv .y4m .264 .265 .av1 .h264 .h265 .hevc .obu".split()
)
TEXT_SUFFIXES = frozenset(".csv .html .json .jsonl .md .toml .tsv .txt .yaml .yml".split())
SYSTEM_FILES = frozenset(["desktop.ini", "thumbs.db", "ehthumbs.db", "__macosx"])
print_once = functools.cache(print)


@dataclass(frozen=True)
class Clip:
    """A video file with its captions. `video` decodes it anew each time: float (F, C, H, W) in [0, 1]."""

    path: Path
    caption: str  # the first of `captions`
    frames: int | None = None  # None in these four: as the file has it
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    captions: tuple = ()  # one is drawn for each training sample

    def __post_init__(self):
        object.__setattr__(self, "captions", self.captions or (self.caption,))

    @property
    def video(self):
        return read_video(self.path, self.frames, self.height, self.width, self.fps)


def read_clips(folder, frames=None, height=None, width=None, fps=None):
    """Clips of a folder, as a list of Clip. Nothing is decoded yet. The first of these forms that is there is read:

    1. metadata.jsonl, {"file_name": ..., "text": ...} a line (Hugging Face); a list of texts is several captions
    2. metadata.csv with these two columns, separated by comma, semicolon or tab
    3. videos.txt beside prompts.txt or prompt.txt: line n of one belongs to line n of the other (CogVideo, Disney)
    4. videos/NAME.mp4 with labels/NAME.txt (CogVideo's SAT)
    5. NAME.mp4 beside NAME.txt, whose whole text is one caption

    In 1 and 2 the column of captions may be called caption or prompt too. Subfolders are read: a listed name may be a
    path in the folder, and lead out of it by a link only. A file that is listed again adds a caption to its clip. Text
    is UTF-8, with or without a byte-order mark; line breaks inside a caption stay. Hidden and system files are passed
    over; what else is left out is printed. Raises UserError, naming file and line.
    """
    folder = resolve_path(folder)
    refuse((not folder.is_dir(), f"data '{folder}': no such folder; give a folder of clips with --data"))
    readers = {"metadata.jsonl": rows_of_jsonl, "metadata.csv": rows_of_csv, "videos.txt": rows_of_two_files}
    lists = [name for name in readers if (folder / name).is_file()]
    rows = readers[lists[0]](folder / lists[0]) if lists else rows_of_captions_beside(folder)
    captions = {}  # real path -> (path, captions)
    for place, row in rows:
        path, texts = checked_row(folder, place, row)
        known = captions.setdefault(path.resolve(), (path, []))[1]
        known += [text for text in texts if text not in known]
    refuse((not captions, f"data '{folder}': no clips; it needs video files (.mp4, .mov, .webm, ...) with captions"))
    if lists[1:]:
        print_once(f"data '{folder}': {lists[0]} is read, {' and '.join(lists[1:])} left out")
    others = [p for p in files_below(folder) if p.suffix.lower() not in TEXT_SUFFIXES and p.resolve() not in captions]
    if others:
        example = others[0].relative_to(folder)
        print_once(f"data '{folder}': {len(others)} files are left out, having no caption or being no video: {example}")
    return [Clip(path, texts[0], frames, height, width, fps, tuple(texts)) for path, texts in captions.values()]


def files_below(folder):
    """Files of a folder and its subfolders, by name, without those that are hidden or that systems leave behind."""
    for path in sorted(folder.rglob("*")):  # which follows no linked folder: it may lead in a circle
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") or part.lower() in SYSTEM_FILES for part in parts):
            yield path


def read_text(path):
    """A text file in UTF-8, with or without a byte-order mark, \\r\\n as \\n. Raises UserError."""
    try:
        data = path.read_bytes().replace(b"\0", b"\xff")  # a zero is UTF-16 without a mark, and 0xff no UTF-8
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"'{path}', line {line}: not UTF-8; save it as UTF-8, which editors offer under Save As")
    except OSError as error:
        raise UserError(f"'{path}': cannot be read ({error.strerror})")


# The four readers below give (place, row): file and line, and {"file_name": ..., "text": ...}, unchecked.
# Only line feeds end lines: str.splitlines() would cut a caption at U+2028, U+0085 or a form feed.


def rows_of_jsonl(path):
    for number, line in enumerate(read_text(path).split("\n"), 1):
        try:
            if line.strip():
                yield f"'{path}', line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            example = '{"file_name": ..., "text": ...}'
            raise UserError(f"'{path}', line {number}: no JSON ({error}); write one {example} a line")


def rows_of_csv(path):
    text, names, line = read_text(path), None, 1
    separator = max(",;\t", key=text.split("\n", 1)[0].count)
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=separator, strict=True)
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if names and any(cells):
                if len(cells) != len(names):
                    raise csv.Error(f"{len(cells)} cells, {len(names)} in the first line")
                yield f"'{path}', line {line}", dict(zip(names, cells))
            names, line = names or cells, reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"'{path}', line {line}: {error}; put captions in double quotes, and double those in them")


def rows_of_two_files(videos):
    prompts = videos.with_name("prompts.txt" if videos.with_name("prompts.txt").exists() else "prompt.txt")
    names, texts = (read_text(path).rstrip().split("\n") for path in (videos, prompts))
    for number, (name, text) in enumerate(itertools.zip_longest(names, texts, fillvalue=""), 1):
        place = f"'{prompts if name.strip() else videos}', line {number}"
        counts = f"{len(names)} lines in {videos.name} and {len(texts)} in {prompts.name} pair up by number"
        refuse((not name.strip() or not text.strip(), f"{place}: empty or missing; {counts}"))
        yield place, {"file_name": name, "text": text}


def rows_of_captions_beside(folder):
    apart = (folder / "videos").is_dir() and (folder / "labels").is_dir()
    videos, labels = (folder / "videos", folder / "labels") if apart else (folder, folder)
    for path in files_below(videos):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            text = labels / path.relative_to(videos).with_suffix(".txt")
            refuse((not text.is_file(), f"clip '{path}': no caption; write {text.name}, or list all in metadata.jsonl"))
            yield f"'{text}'", {"file_name": str(path.relative_to(folder)), "text": read_text(text)}


def checked_row(folder, place, row):
    """(path, captions) of what a reader gives. Raises UserError."""
    row = row if isinstance(row, dict) else {}
    titles = [title for title in ("text", "caption", "prompt") if title in row]
    name = row.get("file_name")
    if not isinstance(name, str) or len(titles) != 1:
        raise UserError(f"{place}: file_name is {name!a:.40}; it needs the name of a file, and text, caption or prompt")
    spelled = [Path(os.path.normpath(s)) for s in (name, name.strip().replace("\\", "/"))]  # the second from Windows
    leads_out = any(inside.is_absolute() or ".." in inside.parts for inside in spelled)
    path = next((folder / inside for inside in spelled if os.path.isfile(folder / inside)), None)
    refuse(
        (leads_out, f"{place}: '{name}' leads out of the data folder; link or copy the file into it"),
        (not path, f"{place}: clip {name!a:.200} is not there; remove the line or add the file"),
    )
    texts = row[titles[0]]
    texts = texts if isinstance(texts, list) and texts else [texts]
    for text in texts:
        if not isinstance(text, str) or not text.strip() or re.search("[\ud800-\udfff]", text):
            raise UserError(f"{place}: caption {text!a:.40} of '{path.name}' is empty or no text; mend or drop it")
    return path, [text.strip() for text in texts]


# How a clip is read: as a player shows it. FFmpeg decodes; what a player adds to that is here. Times are fractions of
# a second, so that no rounding moves an instant to the frame beside.

TO_SDR = (  # these two are for ffmpeg -vf
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:param=0.5:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p"
)
TO_BT709 = "colorspace=all=bt709:iall=bt2020:format=yuv420p"


class Footage(contextlib.ExitStack):
    """An open video file: what it says of itself, and its frames. For use in a `with`. fps: frames a second, on
    average. duration_s: as its header has it, or None. Raises UserError."""

    def __init__(self, path):
        import av

        super().__init__()
        self.path = path
        try:
            self.container = self.enter_context(av.open(os.path.abspath(path), metadata_errors="replace"))
        except (av.FFmpegError, OSError, ValueError) as error:
            raise self.error(f"cannot be read ({type(error).__name__}): it is empty, no video, or only a part of one")
        self.stream = stream = self.container.streams.best("video")
        if stream is None or stream.disposition & stream.disposition.attached_pic:  # such as an album's cover
            raise self.error("sound, but no video")
        if re.search("_pipe$|^image2", self.container.format.name):
            raise self.error("a picture, no video")
        if stream.codec_context is None:
            raise self.error("in a codec that FFmpeg does not know")
        stream.thread_type, stream.codec_context.thread_count = "AUTO", min(4, os.cpu_count())  # each holds frames
        stream.codec_context.options = {"err_detect": "explode"}  # an error, where a decoder would paint something over
        self.fps = stream.guessed_rate or stream.average_rate or 25
        length, microseconds = (stream.duration or 0) * stream.time_base, self.container.duration or 0
        self.duration_s = float(length or microseconds / 1_000_000) or None
        # Where frames fall between the ticks of a file's clock (24 a second in milliseconds), each is up to half a tick
        # off, and so may be the first, from which instants count.
        exact = (1 / (stream.average_rate or self.fps) / stream.time_base).denominator == 1
        self.rounding_s = 0 if exact else stream.time_base / (1 if stream.start_time else 2)

    def error(self, reason, remedy="replace or drop it"):
        return UserError(f"clip '{self.path}': {reason}; {remedy}")

    def frames(self):
        """Decoded frames with start and end, in seconds on the file's own clock."""
        import av

        decoder, end, avi = self.stream.codec_context, None, self.container.format.name == "avi"
        transparent = any(key.lower() == "alpha_mode" and on == "1" for key, on in self.stream.metadata.items())
        if transparent and decoder.name in ("vp8", "vp9"):  # FFmpeg's own decoders of these leave transparency out
            decoder = av.CodecContext.create({"vp8": "libvpx", "vp9": "libvpx-vp9"}[decoder.name], "r")
        try:
            for packet in self.container.demux(self.stream):
                try:
                    decoded = decoder.decode(packet)
                except av.InvalidDataError:
                    if end is not None or packet.is_corrupt:
                        raise
                    continue  # recorded from amid a stream: it is shown from its first whole picture
                for frame in decoded:
                    if frame.is_corrupt:
                        raise ValueError
                    stamp = frame.dts if avi else frame.pts  # AVI has no times of display, and those guessed are wrong
                    start = end or Fraction(0) if stamp is None else stamp * self.stream.time_base
                    end = start + (frame.duration * self.stream.time_base if frame.duration else 1 / self.fps)
                    yield frame, start, end
        except (av.FFmpegError, ValueError):
            raise self.error(f"damaged or cut short {float(end or 0):.2f} s after its start")

    def turn(self, frame):
        """(a, b, c, d): the pixel at (x, y) of a decoded frame is shown at (a x + c y, b x + d y), but for a shift."""
        with contextlib.suppress(ValueError):  # which side data of a kind that PyAV does not know raises
            matrix = frame.side_data.get("DISPLAYMATRIX")
            a, b, _, c, d, *_ = struct.unpack("9i", bytes(matrix)) if matrix else (1, 0, 0, 0, 1)
            return a, b, c, d
        turned = math.radians(frame.rotation)
        return math.cos(turned), -math.sin(turned), math.sin(turned), math.cos(turned)

    def shown_size(self, frame):
        """(height, width) in pixels, turned, and stretched where pixels are not square."""
        wide = self.stream.sample_aspect_ratio or 1
        height, width = round(frame.height / min(wide, 1)), round(frame.width * max(wide, 1))
        a, b, _, _ = self.turn(frame)
        return (width, height) if abs(b) > abs(a) else (height, width)

    def picture(self, frame, height, width):
        """A frame as it is shown, scaled to cover height x width and cropped around the centre: float (H, W, C) in
        [0, 1], transparency on white. An untagged matrix is BT.709 for HD and BT.601 for less, as players take it."""
        picture = on_white(self.pixels(frame))
        a, b, c, d = self.turn(frame)
        if abs(b) > abs(a):
            picture, a, d = picture.transpose(0, 1), c, b
        picture = picture.flip([axis for axis, sign in ((1, a), (0, d)) if sign < 0])
        return cover(picture, self.shown_size(frame), height, width)

    def pixels(self, frame):
        """float (H, W, C) in [0, 1] as decoded; C is 4 where a frame may be transparent."""
        import av

        convert, matrix = "convert it: ffmpeg -i IN -vf {} OUT", frame.colorspace
        wide = {16: "HDR (PQ)", 18: "HDR (HLG)"}.get(frame.color_trc, frame.color_primaries == 9 and "BT.2020")
        if wide:  # Display P3 is no wider than some screens, and is left as it is
            reason = f"{wide}, where models are trained on what ordinary screens show"
            raise self.error(reason, convert.format(TO_SDR if "HDR" in wide else TO_BT709))
        if frame.format.is_rgb:
            matrix = None
        elif matrix in (2, 3):  # unspecified, reserved
            matrix = 1 if frame.width >= 1280 or frame.height > 576 else 5
        elif matrix not in (1, 4, 5, 6, 7, 9):  # those that swscale knows
            raise self.error(f"colour matrix {matrix}", convert.format("zscale=m=bt709:r=tv"))
        clear = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
        try:
            pixels = frame.to_ndarray(format="rgba" if clear else "rgb24", src_colorspace=matrix)
        except (av.FFmpegError, ValueError) as error:
            raise self.error(f"pixels in {frame.format.name}, which cannot be converted ({type(error).__name__})")
        return torch.from_numpy(pixels).float() / 255


def on_white(picture):
    """float (H, W, 3) of a picture (H, W, 3), or (H, W, 4) with transparency."""
    return picture[..., :3] * picture[..., 3:] + (1 - picture[..., 3:]) if picture.shape[2] == 4 else picture


def cover(picture, shown_size, height, width):
    """A picture (H, W, C), which is shown at a size of (high, wide), scaled to cover height x width and cropped around
    the centre."""
    high, wide = shown_size
    scale = max(height / high, width / wide)
    size = max(height, round(high * scale)), max(width, round(wide * scale))
    if picture.shape[:2] != size:
        picture = picture.permute(2, 0, 1)[None]
        picture = F.interpolate(picture, size=size, mode="bicubic", antialias=True)[0].clamp(0, 1).permute(1, 2, 0)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return picture[top : top + height, left : left + width].contiguous()


def on_show(frames, fps=None, count=None, rounding_s=0):
    """Of (frame, start, end) in the order of time, the frame that is on show at each instant k / fps after the first
    start: the last that has started by then, until its successor, or the end of the last. `count` of them at most; each
    once without fps. rounding_s: a frame that starts so little after an instant is on show at it."""
    rate, shown, origin = Fraction(fps or 1).limit_denominator(1001), 0, None
    for (frame, start, end), successor in itertools.pairwise(itertools.chain(frames, [None])):
        origin = start if origin is None else origin
        until = (successor[1] if successor else end) - origin - rounding_s
        due = math.ceil(until * rate) if fps else shown + 1  # as many instants lie before `until`
        for shown in range(shown + 1, min(due, count or due) + 1):
            yield frame
        if shown == count:
            return


def read_video(path, frames=None, height=None, width=None, fps=None):
    """Decode a video as a player shows it, turned, with square pixels: the frame on show at each instant k / fps from
    its start, `frames` of them, each scaled to cover height x width and cropped around the centre. Returns float
    (F, C, H, W) in [0, 1]. Raises UserError."""
    pictures, last = [], None
    with Footage(path) as footage:
        for frame in on_show(footage.frames(), fps, frames, footage.rounding_s):
            if not (height and width):
                height, width = footage.shown_size(frame)
            pictures.append(pictures[-1] if frame is last else footage.picture(frame, height, width))
            last = frame
        if len(pictures) < (frames or 1):
            cut = fps and frames and (footage.duration_s or 0) > (frames - 1) / fps
            announced = f" (cut short: its header announces {footage.duration_s:.2f} s)" if cut else ""
            reason = f"{len(pictures)} frames{f' at {fps:g} fps' if fps else ''}{announced}, {frames or 1} needed"
            raise footage.error(reason, "lower --frames or drop it")
    return torch.stack(pictures).permute(0, 3, 1, 2)  # (F, C, H, W)


def read_image(path, height, width):
    """A picture as a viewer shows it, turned as its EXIF says, scaled and cropped as `read_video` does with frames; it
    prints how much is lost where that is much. Returns float (C, H, W) in [0, 1]. Raises UserError."""
    from PIL import Image, ImageOps

    try:
        with Image.open(os.path.expanduser(path)) as opened:
            refuse((re.match("[IF]", opened.mode), f"image '{path}': of more than 8 bits; save it as PNG or JPEG of 8"))
            picture = np.array(ImageOps.exif_transpose(opened).convert("RGBA"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = f"{type(error).__name__}: it is missing, damaged, or no picture"
        raise UserError(f"image '{path}': cannot be read ({reason}); give a PNG or JPEG")
    picture, (high, wide) = on_white(torch.from_numpy(picture).float() / 255), picture.shape[:2]
    lost = 1 - height * width / (high * wide * max(height / high, width / wide) ** 2)
    if lost > 0.2:
        print_once(f"image '{path}': {100 * lost:.0f} % of it is cropped away, around the centre; crop it yourself")
    return cover(picture, (high, wide), height, width).permute(2, 0, 1)


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
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------------- base model
@dataclass(frozen=True)
class Base:
    """What a CogVideoX pipeline folder says about itself, read from its JSON files alone."""

    folder: Path
    transformer: dict  # config.json of the transformer
    vae: dict

    width = property(lambda self: self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"])
    patch = property(lambda self: self.transformer["patch_size"])
    patch_t = property(lambda self: self.transformer.get("patch_size_t"))  # 2 in CogVideoX1.5, else None
    spatial = property(lambda self: 2 ** (len(self.vae["block_out_channels"]) - 1))  # pixels per latent cell
    temporal = property(lambda self: int(self.vae["temporal_compression_ratio"]))  # frames per latent frame
    frames = property(lambda self: self.transformer["sample_frames"])
    sampled_at_once = property(lambda self: 1 if self.large else 8)  # clips
    fps = property(lambda self: 16 if self.patch_t else 8)  # what CogVideoX1.5, and the others, were trained on
    text_length = property(lambda self: self.transformer["max_text_seq_length"])
    # Beside the latents of a clip, such a model is shown those of its first frame.
    image_to_video = property(lambda self: self.transformer["in_channels"] == 2 * self.vae["latent_channels"])

    # CogVideoX-5b-I2V has learned its positions, and there are no others.
    own_size_alone = property(lambda self: bool(self.transformer.get("use_learned_positional_embeddings")))

    @property
    def image_scale(self):
        """Of the first frame's latents, as the transformer knows them: CogVideoX1.5's are divided, not multiplied."""
        scale = self.vae["scaling_factor"]
        return 1 / scale if self.vae.get("invert_scale_latents") else scale

    @property
    def pipeline(self):
        """Its class, diffusers' own."""
        return getattr(importlib.import_module("diffusers"), PIPELINES[self.image_to_video])

    @property
    def large(self):  # too large to spend memory freely: above half a billion parameters
        return self.width**2 * self.transformer["num_layers"] * 12 > 5e8

    @property
    def native(self):
        """(height, width) in pixels that the model was trained at. CogVideoX1.5's configuration has its largest."""
        cells = self.transformer["sample_height"], self.transformer["sample_width"]
        return (768, 1360) if cells == (300, 300) else tuple(self.spatial * cell for cell in cells)

    def latent_frames(self, frames):
        """Latent frames of a clip, and how many more CogVideoX1.5 puts before them to fill its temporal patches."""
        t = (frames - 1) // self.temporal + 1
        return t, -t % (self.patch_t or 1)

    @functools.cached_property
    def parameters(self):
        """How many the transformer has, from the heads of its weight files."""
        shapes = []
        for path in (self.folder / "transformer").glob("*.safetensors"):
            with safe_open(str(path), "pt") as file:
                shapes += [file.get_slice(name).get_shape() for name in file.keys()]
        return sum(math.prod(shape) for shape in shapes)

    def cls(self, part):
        """The class of a part of the pipeline, diffusers' or transformers'."""
        library, name = json.loads((self.folder / "model_index.json").read_text("utf-8"))[part]
        return getattr(importlib.import_module({"diffusers": "diffusers"}.get(library, "transformers")), name)

    def load(self, part, dtype=None):
        """One part of the pipeline in its own class, frozen, in eval mode."""
        cls, how = self.cls(part), {} if part in ("tokenizer", "scheduler") else {"dtype": dtype}
        try:
            loaded = cls.from_pretrained(self.folder / part, **how)
        except Exception as error:  # the tokenizers library raises nothing narrower
            reason = " ".join(str(error).split())
            refuse((part == "tokenizer", f"model '{self.folder}': its tokenizer cannot be read ({reason})"))
            raise
        return loaded.requires_grad_(False).eval() if how else loaded

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


PIPELINES = "CogVideoXPipeline", "CogVideoXImageToVideoPipeline"
READ = {  # settings that are read here, with their types
    "model_index.json": dict.fromkeys("tokenizer text_encoder transformer vae scheduler".split(), list),
    "transformer": dict.fromkeys(
        "num_attention_heads attention_head_dim num_layers in_channels patch_size max_text_seq_length sample_frames "
        "sample_height sample_width".split(), int,
    ),
    "vae": dict(block_out_channels=list, latent_channels=int, scaling_factor=float, temporal_compression_ratio=float),
}  # fmt: skip
NEEDED = """tokenizer/tokenizer.json|tokenizer/spiece.model scheduler/scheduler_config.json text_encoder/config.json
text_encoder/model.safetensors* transformer/diffusion_pytorch_model.safetensors* vae/diffusion_*.safetensors*"""


def find_base(model, weights=True):
    """Base of a pipeline folder or of a Hub id, downloaded once, without pickles. Raises UserError."""
    folder, model = resolve_path(model), model.rstrip("/") or model
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith(".") or model == Config.model:
            advice = "give a diffusers pipeline folder or a Hub id such as THUDM/CogVideoX-2b with --model"
            raise UserError(f"model '{model}': no such folder; {advice}")
        from huggingface_hub import snapshot_download

        try:
            patterns = ["*.json", *(["*.safetensors", "*.model", "*.txt"] if weights else [])]
            folder = Path(snapshot_download(model, allow_patterns=patterns))
        except Exception as error:  # the Hub's client raises a dozen kinds; each means that the model cannot be had
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"model '{model}': no such folder, and not available from the Hugging Face Hub ({reason})")
    try:
        files = ("model_index.json", "transformer/config.json", "vae/config.json")
        index, transformer, vae = (json.loads((folder / file).read_text("utf-8")) for file in files)
    except (OSError, ValueError) as error:  # a part that is no folder; no JSON, or no text
        raise UserError(f"model '{model}': not a diffusers pipeline folder ({error})")
    for file, values in zip(files, (index, transformer, vae)):
        refuse_incomplete(model, file, values, READ[file.partition("/")[0]])
    kind = index.get("_class_name")
    channels = {name: (k + 1) * vae["latent_channels"] for k, name in enumerate(PIPELINES)}
    words = f"a {kind} of {transformer['in_channels']} channels; only text- or image-to-video CogVideoX can be trained"
    refuse((channels.get(kind) != transformer["in_channels"], f"model '{model}': {words} here"))
    for forms in NEEDED.split() if weights else ():  # T5's tokenizer without its file would be one without words
        words = f"model '{model}': no {forms.rstrip('*').replace('|', ' or ')}; download it again (.bin is not read)"
        refuse((not any(path for form in forms.split("|") for path in folder.glob(form)), words))
    refuse(*damage(path for form in ("*/*.json", "*/*.safetensors") for path in folder.glob(form) if weights))
    return Base(folder, transformer, vae)


def damage(files):
    """For `refuse`: files of JSON that are not whole, and of tensors, by their heads alone."""
    for file in sorted(files):
        try:
            table = json.loads(file.read_text("utf-8")) if file.suffix == ".json" else safe_open(str(file), "pt") and {}
            [os.stat(file.parent / name) for name in table.get("weight_map", {}).values()]
        except (SafetensorError, OSError, ValueError, AttributeError, TypeError) as error:
            yield True, f"'{file}': missing, cut short, or a Git LFS pointer ({error}); get it again"


def refuse_incomplete(model, file, values, needed):
    """diffusers writes every argument of a model into its config.json; anything else is refused. Raises UserError."""
    place, remedy = f"model '{model}': {file}", "save it again with save_pretrained"
    refuse((not isinstance(values, dict), f"{place} is no table of settings; {remedy}"))
    for name, kind in needed.items():
        value = values.get(name)
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        refuse((not fits or (kind is int and value < 1), f"{place} has {name} {value!r}; {remedy}"))


def dtype_on_disk(folder):
    """Of a model's weights."""
    with safe_open(str(next(folder.glob("*.safetensors"))), "pt") as file:
        name = file.get_slice(next(iter(file.keys()))).get_dtype()
    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]


def choose_compute_dtype(device, base, wanted=None):
    """Arithmetic for a device, and the reason: (torch dtype, str). Not every processor that accepts bf16 has units for
    it. Without them a product is hundreds of times slower than in fp32, and torch does not say so: a few milliseconds
    of measurement decide."""
    if wanted:
        return getattr(torch, wanted), "asked for"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the card has bf16 units"
    if device.type == "cuda" and dtype_on_disk(base.folder / "transformer") == torch.float16:
        return torch.float16, "the model is stored in fp16 and the card has no bf16 units"
    if device.type == "cuda":
        return torch.float32, "the card has no bf16 units, and fp16 overflows in a model trained in bf16"
    if not base.large:
        return torch.float32, "the model is small enough for it on a CPU"

    def seconds(dtype):
        x, weight = torch.rand(512, base.width).to(dtype), torch.rand(base.width, base.width).to(dtype)
        return min(timeit.repeat(lambda: x @ weight, number=1, repeat=4)[1:])  # the first call sets its kernels up

    ratio = seconds(torch.float32) / seconds(torch.bfloat16)
    reason = f"a {base.width}-wide product in bf16 takes {1 / ratio:.2g} times as long as in fp32 on this processor"
    return torch.bfloat16 if ratio > 1 else torch.float32, reason


# ---------------------------------------------------------------------------------- how weights are kept, and computed
# Two settings. A weight may be kept in 4 bits or in bf16 to save memory and be computed with in fp32, because the
# processor has no bf16 units; or be kept in fp32, because it is trained, and be computed with in bf16. The arithmetic
# is that of the activations, everywhere: no autocast, which would keep fp32 copies of every layer norm's input.

QUANTIZED = {
    "transformer": re.compile(r"transformer_blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"),
    "text_encoder": re.compile(r"encoder\.block\.\d+\..*\.(q|k|v|o|wi|wi_0|wi_1)"),  # T5 reads the dtype of its own wo
}


def load_quantized(base, part, dtype, device, bits=4):
    """Transformer or T5 on a device, frozen: its big matrices in few bits, the rest (adaLN, embeddings, norms,
    projections in and out) as `frozen_dtype` says. bits: 4 is NF4 with double quantization (arXiv 2305.14314), 8 is
    LLM.int8 (2208.07339). Each matrix is quantized when it is read, so the whole model is never in memory in 16 bits.
    diffusers' own loader does the same, on a GPU only. Raises UserError where weights are missing."""
    from accelerate import init_empty_weights
    from accelerate.utils import set_module_tensor_to_device

    cls, folder, device = base.cls(part), base.folder / part, torch.device(device)
    device = torch.device("cpu") if device.type == "cpu" else device  # of cpu:0, torchrun's, tensors stay no parameters
    rest = dtype if part == "text_encoder" else frozen_dtype(base, dtype)  # T5's norms would change the arithmetic
    with init_empty_weights(include_buffers=False):  # buffers are computed, not read
        if part == "transformer":
            model = cls.from_config(cls.load_config(folder))
        else:
            model = cls(cls.config_class.from_pretrained(folder))
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt", backend="pread") as opened:  # mapped files would stay resident as a whole
            for key in opened.keys():
                owner, _, leaf = key.rpartition(".")
                tensor = opened.get_tensor(key)
                if leaf == "weight" and QUANTIZED[part].fullmatch(owner):
                    layer = quantized_linear(tensor, model.get_submodule(owner), dtype, device, bits)
                    model.set_submodule(owner, layer)
                else:
                    # What T5 adds to its activations overflows in fp16; transformers keeps it in float32 too.
                    stored = torch.float32 if rest == torch.float16 and ".wo." in key else rest
                    set_module_tensor_to_device(model, key, device, value=tensor, dtype=stored)
    if part == "text_encoder":
        model.tie_weights()
    absent = [name for name, p in model.named_parameters() if p.is_meta]
    refuse((absent, f"model '{base.folder}': {len(absent)} weights are not in its files, {absent[:1]} among them"))
    model.is_loaded_in_4bit = bits == 4  # peft makes its 4-bit layers only if told so
    return model.requires_grad_(False).eval().to(device)  # 2B's table of positions is no weight, and not there yet


def quantized_linear(weight, plain, dtype, device, bits):
    """A Linear of bitsandbytes with a weight in few bits, in the place of a plain one. dtype: of the arithmetic."""
    import bitsandbytes as bnb

    size = plain.in_features, plain.out_features
    if bits == 8:
        layer = bnb.nn.Linear8bitLt(*size, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
        layer.weight = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False).to(device)
    else:
        layer = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=dtype, device="meta")
        # From the numbers on disk, so that the same base has the same bits whatever the arithmetic.
        layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", module=layer).to(device)
        layer.weight.quant_state.dtype = dtype
        layer.support_avx512bf16_for_cpu = False  # it repacks the weights in place at the first sample, for good
    layer.bias = plain.bias
    return layer


def frozen_dtype(base, dtype, part="transformer"):
    """How frozen weights are kept: as they are computed with, but a large model's in no more bits than on disk."""
    on_disk = dtype_on_disk(base.folder / part)
    return on_disk if base.large and dtype.itemsize > on_disk.itemsize else dtype


def trained_dtype(config):
    """How --full keeps the weights."""
    return torch.float32 if config.trained_dtype == "float32" else torch.bfloat16


def load_transformer(config, base, dtype, device):
    """The base transformer as a method keeps it, frozen."""
    if config.method == "qlora":
        return load_quantized(base, "transformer", dtype, device)
    stored = trained_dtype(config) if config.method == "full" else frozen_dtype(base, dtype)
    return base.load("transformer", dtype if config.deepspeed else stored).to(device)


class ConvertingProduct(torch.autograd.Function):
    """A linear layer's product in the dtype of its input. It keeps the weight as stored, not the converted copy."""

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


def converted(parameter, x):
    return None if parameter is None else parameter.to(x.dtype)


# Classes, not a function for each instance: to torch.compile each of those would be another model.
CONVERTING = {kind: type(f"Converting{kind.__name__}", (kind,), {"forward": forward}) for kind, forward in {
    torch.nn.Linear: lambda self, x: ConvertingProduct.apply(x, self.weight, self.bias),
    torch.nn.Conv2d: lambda self, x: self._conv_forward(x, converted(self.weight, x), converted(self.bias, x)),
    torch.nn.LayerNorm: lambda self, x: F.layer_norm(
        x, self.normalized_shape, converted(self.weight, x), converted(self.bias, x), self.eps
    ),
}.items()}  # fmt: skip


def compute_in_dtype_of_input(model, dtype):
    """Let every layer whose weights are not in `dtype` convert them when it needs them, forward and backward, and
    forget the copy: the memory of one layer, not of the model. Gradients arrive in the stored dtype."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # peft would keep a float32 copy of every input instead
        if type(module) in CONVERTING and any(p.dtype != dtype for p in module.parameters(recurse=False)):
            module.__class__ = CONVERTING[type(module)]


# --------------------------------------------------------------------------------------------------------------- cache
# VAE and T5 never change during training, so each clip and each prompt is coded once, kept on disk, and both models are
# freed before the transformer is loaded. A file's name carries a hash of everything that its content depends on.


IMAGE_CODINGS = 8  # of a clip's first frame, each with noise of its own


@dataclass
class Cache:
    """Coded clips and prompts on disk. Each entry of `train` and `heldout` is (clip file, a prompt file a caption). A
    clip file of an image-to-video model also holds its first frame, uint8 (C, H, W), and codings of it."""

    train: list
    heldout: list
    empty: Path  # the empty prompt, for caption dropout and guidance
    prompts: dict  # validation prompt -> file
    prior: list = field(default_factory=list)  # clips of --prior, as in `train`
    images: dict = field(default_factory=dict)  # validation prompt -> file of the clip whose first frame it begins with


def digest(*parts):
    return hashlib.sha256("\0".join(str(p) for p in parts).encode()).hexdigest()[:16]


def load_tensor(path, name):
    with safe_open(str(path), "pt") as file:
        return file.get_tensor(name)


def save_tensors(path, tensors, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, str(partial), metadata)
        os.replace(partial, path)  # a reader sees the whole file or none
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"'{path}': cannot be written ({error}); make room there, or give another folder with --cache")


def is_cached(path, name):
    """Whether a cache file is there and whole (a torn copy, say from a full disk, is coded again)."""
    with contextlib.suppress(FileNotFoundError, SafetensorError):
        return load_tensor(path, name) is not None
    return False


def cache_folder(config):
    if config.cache:
        folder = Path(os.path.expanduser(config.cache)).resolve()
        refuse((folder.is_file(), f"--cache '{folder}': a file; give a folder"))
        return folder
    beside = resolve_path(config.data).parent / ".cache"
    if os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return beside
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "cogvideo_lite"


def clip_size(config):
    return config.frames, config.height, config.width, config.fps


def content_of(path):
    """Hash of a clip, which is read in pieces. Raises UserError."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"clip '{path}': cannot be read ({error.strerror}); replace or drop it")


def other_than(heldout, clips):
    """Clips that are not held out, whatever their names and captions."""
    sizes = {clip.path.stat().st_size for clip in heldout}  # clips of other sizes need not be hashed
    contents = {content_of(clip.path) for clip in heldout}
    return [c for c in clips if c.path.stat().st_size not in sizes or content_of(c.path) not in contents]


def split_clips(config):
    """(training clips, held-out clips, a sentence on how they were told apart). Raises UserError."""
    clips, data = read_clips(config.data, *clip_size(config)), resolve_path(config.data)
    folder = resolve_path(config.heldout) if config.heldout else data.with_name(data.name + "-heldout")
    if config.heldout or folder.is_dir():
        heldout, told = read_clips(folder, *clip_size(config)), f"held out: the clips of {folder.name}"
    else:
        heldout = clips[9::10] or clips[-1:]
        clips = [clip for clip in clips if clip not in heldout]
        told = f"held out: every tenth clip ({len(heldout)}), since there is no folder {folder.name}"
    train = other_than(heldout, clips)
    if len(train) < len(clips):
        told += f"; {len(clips) - len(train)} training clips are copies of those and left out"
    refuse(
        (not train, f"data '{data}': every clip is held out, none left to train on; add some or change --heldout"),
        ((config.clips or 0) > len(train), f"--clips {config.clips}: only {len(train)} to train on in '{data}'"),
    )
    return train[: config.clips], heldout, told


def validation_prompts(config, heldout, image_to_video=False):
    """Prompts sampled before and after: those given, two of each set in prompts.json beside the data (not of an
    image-to-video model, since no frame goes with them), or held-out captions. Returns prompt -> folder of the real
    clips that its samples are compared with: that of the set's name beside prompts.json, if there is one, else the
    data."""
    data = resolve_path(config.data)
    file, folders = data.with_name("prompts.json"), {}
    if config.validation_prompts:
        return dict.fromkeys(config.validation_prompts, data)
    try:
        for name, prompts in json.loads(read_text(file)).items() if file.exists() and not image_to_video else ():
            if not isinstance(prompts, list) or not all(isinstance(p, str) and p.strip() for p in prompts or [None]):
                raise ValueError
            folder = data.with_name(name)
            folders |= dict.fromkeys(prompts[:2], folder if folder.is_dir() else data)
    except (UserError, AttributeError, OSError, ValueError, RecursionError):
        print_once(f"'{file}' is left out: it is not of the form {{name of a set: [prompt, ...]}}")
        folders = {}
    return folders or dict.fromkeys(list(dict.fromkeys(clip.caption for clip in heldout))[:3], data)


def begun_with(prompts, heldout):
    """prompt -> the held-out clip with whose first frame it begins: its own, or else one after another."""
    own = {caption: clip for clip in reversed(heldout) for caption in clip.captions}
    return {prompt: own.get(prompt, heldout[k % len(heldout)]) for k, prompt in enumerate(prompts)}


def cache_clips(config, device=None):
    """Code clips and prompts that are not in the cache yet. Returns Cache. Raises UserError, with all bad clips named.
    What is kept of a clip is the posterior of the VAE, mean and log-variance (2C, T, h, w), not one sample of it: a
    latent is drawn anew at each step, as in pretraining. The noise on the first frame, which image-to-video models are
    shown, is in pixels, before the VAE, so it cannot be drawn anew: IMAGE_CODINGS of them are kept, each with noise of
    its own, (IMAGE_CODINGS, 2C, h, w), and each step draws one, and a latent of it."""
    config, base, _ = resolve(config)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, _ = choose_compute_dtype(device, base, config.compute_dtype)
    train, heldout, _ = split_clips(config)
    prior = other_than(heldout, read_clips(config.prior, *clip_size(config))) if config.prior else []
    folder, validation = cache_folder(config), validation_prompts(config, heldout, base.image_to_video)
    images = [f"{IMAGE_CODINGS} images"] * base.image_to_video
    settings = digest(base.fingerprint("vae"), *clip_size(config), dtype, "as a player shows it", *images)
    text_model = [base.fingerprint(part) for part in ("text_encoder", "tokenizer")]
    text_settings = digest(*text_model, base.text_length, dtype, config.quantize_text_encoder)
    files = {c: folder / f"clip-{digest(settings, content_of(c.path))}.safetensors" for c in train + heldout + prior}
    texts = ["", *(text for clip in files for text in clip.captions), *validation]
    prompts = {text: folder / f"prompt-{digest(text_settings, text)}.safetensors" for text in texts}
    missing = {clip: file for clip, file in files.items() if not is_cached(file, "moments")}
    missing_prompts = {text: file for text, file in prompts.items() if not is_cached(file, "prompt_embeds")}
    latent_frames = base.latent_frames(config.frames)[0] + IMAGE_CODINGS * base.image_to_video
    cells = latent_frames * (config.height // base.spatial) * (config.width // base.spatial)
    of_clips = len(missing) * cells * 2 * base.vae["latent_channels"]  # mean and log-variance
    of_prompts = len(missing_prompts) * base.text_length * base.transformer.get("text_embed_dim", 4096)
    words = f"{len(missing)} clips and {len(missing_prompts)} prompts; make room, or give another folder with --cache"
    refuse_full_disk(folder, 4 * (of_clips + of_prompts), words)  # float32
    if missing_prompts:
        base.load("tokenizer")  # one that cannot be read is refused before the clips are coded
    bad = encode_clips(base, missing, settings, device, dtype) if missing else {}
    if bad:
        go_on_without(bad, config.skip_bad, {"training": train, "held-out": heldout, "prior": prior})
    if missing_prompts:
        coded = encode_prompts(base, list(missing_prompts), device, dtype, config.quantize_text_encoder)
        for file, embeds in zip(missing_prompts.values(), coded):
            save_tensors(file, {"prompt_embeds": embeds})
    entries = {clip: (files[clip], *(prompts[text] for text in clip.captions)) for clip in files if clip not in bad}
    first = begun_with(validation, [clip for clip in heldout if clip in entries]) if base.image_to_video else {}
    images = {prompt: files[clip] for prompt, clip in first.items()}
    train, heldout, prior = ([entries[clip] for clip in clips if clip in entries] for clips in (train, heldout, prior))
    return Cache(train, heldout, prompts[""], {prompt: prompts[prompt] for prompt in validation}, prior, images)


def go_on_without(bad, skip_bad, groups):
    """Name bad clips (clip -> UserError). Raises UserError, unless each of the groups (name -> clips) has others."""
    reasons, number = "\n".join(map(str, bad.values())), len(set().union(*groups.values()))
    others = f"{number - len(bad)} others were fine and are kept in the cache"
    words = f"{len(bad)} of {number} clips cannot be used; {others}; --skip-bad goes on without these:\n{reasons}"
    refuse((not skip_bad, words))
    for name, clips in groups.items():
        refuse((clips and bad.keys() >= set(clips), f"--skip-bad: no {name} clip is left; mend one:\n{reasons}"))
    print(f"--skip-bad: {len(bad)} of {number} clips are left out:\n{reasons}", flush=True)


def refuse_full_disk(folder, needed, words):
    """Raises UserError, before any work, where the disk of a folder has less than `needed` bytes free."""
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    refuse((needed > free, f"'{folder}': {free / 2**30:.2f} GiB free, {needed / 2**30:.2f} needed for {words}"))


def encode_clips(base, missing, settings, device, dtype):
    """Code clips with the VAE, one at a time, so that a clip's code does not depend on its neighbours. missing: clip ->
    file. Prints in how many frames repeat. Returns those that cannot be read: clip -> UserError."""
    vae, bad, repeats = base.load("vae", dtype).to(device), {}, {}
    if base.large:
        tile(vae, 1)
    for clip, file in tqdm(missing.items(), desc="coding clips", unit="clip"):
        try:
            video = clip.video
        except UserError as error:
            bad[clip] = error.with_traceback(None)  # which would hold the frames that were read
            continue
        repeats[clip] = int((video[1:] == video[:-1]).flatten(1).all(1).sum())
        frame = video[0]
        video = (2 * video - 1).to(device, dtype).transpose(0, 1)[None]  # (1, C, F, H, W) in [-1, 1]
        with torch.no_grad():
            coded = {"moments": vae.encode(video).latent_dist.parameters[0]}  # (2C, T, h, w)
            if base.image_to_video:
                noisy = noisy_images(2 * frame - 1, IMAGE_CODINGS, keyed_generator("first frame", file.stem))
                noisy = noisy.to(device, dtype)[:, None, :, None]  # each (1, C, 1, H, W)
                coded["images"] = torch.cat([vae.encode(image).latent_dist.parameters[:, :, 0] for image in noisy])
                coded["first_frame"] = (frame * 255).round().byte()
        save_tensors(file, coded, settings=settings, clip=ascii(clip.path.name))  # the names for people
    if any(repeats.values()):
        worst, number = max(repeats, key=repeats.get), sum(map(bool, repeats.values()))
        example = f"'{worst.path.name}' at {repeats[worst]} of {worst.frames - 1} steps"
        print(f"cache: frames repeat in {number} of {len(repeats)} clips, such as {example}; lower --fps", flush=True)
    return bad


def noisy_images(image, count, generator):
    """An image (C, H, W) in [-1, 1], `count` times, as image-to-video models are shown it in training: with noise of
    a strength exp(N(-3, 0.5)), one from each of so many equal parts of that distribution. (count, C, H, W)."""
    parts = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    strengths = torch.exp(-3 + 0.5 * torch.special.ndtri(parts.clamp(1e-6, 1 - 1e-6)))[:, None, None, None]
    return image + strengths * torch.randn(count, *image.shape, generator=generator)


def tile(vae, parts):
    """Let clips larger than a part of what the VAE is configured for be coded, or decoded, in overlapping tiles of that
    size. 1 to code: CogVideoX1.5's are larger, and whole, one of 81x768x1360 would take 30 GiB (predicted)."""
    vae.enable_tiling(vae.config.sample_height // parts, vae.config.sample_width // parts)


def encode_prompts(base, prompts, device, dtype, quantize=None):
    """T5's embeddings of prompts, padded as in training: a list of (L, D). quantize: None, "4bit" or "8bit"."""
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
    """Let T5, kept in fewer bits than `dtype`, compute in it: a block is converted when it runs, and back. Not layer by
    layer, as `compute_in_dtype_of_input` has it: T5 converts its activations to the dtype of its weights."""
    stored = text_encoder.dtype

    def convert(block, dtype):
        for p in block.parameters():
            p.data = p.data.to(dtype)

    if stored != dtype:
        text_encoder.shared.register_forward_hook(lambda module, inputs, out: out.to(dtype))
        text_encoder.encoder.final_layer_norm.to(dtype)
        for block in text_encoder.encoder.block:
            block.register_forward_pre_hook(lambda block, inputs: convert(block, dtype))
            block.register_forward_hook(lambda block, inputs, outputs: convert(block, stored))


def free_memory():
    """Give back what models left behind that refer to themselves, as those with quantized layers do."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------------- diffusion
def keyed_generator(seed, purpose, step=0, sample=0, device="cpu"):
    """A generator for one draw, made from what the draw is for. Randomness then has no state to save: a resumed run,
    and one cut into smaller batches or over more processes, draws the same numbers."""
    key = hashlib.blake2b(f"{seed}/{purpose}/{step}/{sample}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(key, "little") >> 1)


def draw_latents(moments, scaling_factor, generator, patch_t=None):
    """A latent from the VAE's posterior, scaled as the transformer knows it. moments: (2C, T, h, w). Returns float32
    (T, C, h, w), with T filled up to a multiple of patch_t by copies of the first latent frame put before it: where the
    pipeline of CogVideoX1.5 has them, and drops them."""
    mean, logvar = moments.float().chunk(2)
    std = torch.exp(0.5 * logvar.clamp(-30, 20))  # diffusers' DiagonalGaussianDistribution
    latents = scaling_factor * (mean + std * torch.randn(mean.shape, generator=generator)).transpose(0, 1)
    if patch_t and len(latents) % patch_t:
        latents = torch.cat([latents[:1]] * (-len(latents) % patch_t) + [latents])
    return latents


def noisy_and_velocity(latents, noise, alpha_bar):
    """What the transformer sees, and what it should say, both (B, T, C, h, w). alpha_bar: float64 (B,). The same as
    scheduler.add_noise and scheduler.get_velocity, except that those first round alpha_bar to the latents' dtype: in
    bf16 the first timesteps would get no noise at all. Here all stays in float32."""
    a, b = (c.to(latents)[:, None, None, None, None] for c in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    return a * latents + b * noise, a * noise - b * latents


def velocity_loss(transformer, batch, alpha_bar, rotary, dtype):
    """Mean squared error of the predicted velocity, in float32, one number a sample: (B,). The reference trainers
    compare predicted and true clean latents and weight by 1 / (1 - alpha_bar): the same number."""
    noisy, target = noisy_and_velocity(batch["latents"], batch["noise"], alpha_bar[batch["timesteps"].cpu()])
    seen = torch.cat([noisy, batch["image"]], dim=2) if "image" in batch else noisy
    output = transformer(
        hidden_states=seen.to(dtype), encoder_hidden_states=batch["prompt_embeds"].to(dtype), ofs=batch.get("ofs"),
        timestep=batch["timesteps"], image_rotary_emb=rotary, return_dict=False,
    )[0]  # fmt: skip
    return ((output.float() - target) ** 2).mean(dim=(1, 2, 3, 4))


def rotary_embedding(base, transformer, frames, height, width, device):
    """What the pipeline would give the transformer as image_rotary_emb: cosines and sines, or None for 2B, which adds
    sines to its patches instead. It is the pipeline's own helper: the grid differs between 5B and 1.5, and at other
    sizes than the native one, where trainers have gone wrong (CogVideo#663)."""
    from diffusers import CogVideoXPipeline

    if not transformer.config.use_rotary_positional_embeddings:
        return None
    pipe = CogVideoXPipeline(None, None, None, transformer, None)
    pipe.vae_scale_factor_spatial = base.spatial
    return pipe._prepare_rotary_positional_embeddings(height, width, sum(base.latent_frames(frames)), device)


PRIOR_SHARE = 0.5  # of the samples comes from --prior
IMAGE_DROPOUT = 0.05  # share of samples trained without their first frame, as image-to-video models were


class Samples:
    """Training samples by position: everything about sample number n of a run follows from the seed and n."""

    def __init__(self, config, base, cache, timesteps):
        self.config, self.base, self.cache, self.timesteps = config, base, cache, timesteps  # timesteps: how many
        self.empty = load_tensor(cache.empty, "prompt_embeds")

    def clip_at(self, position):
        """Every clip once, in random order, then all again in another; PRIOR_SHARE from the prior instead."""
        if self.cache.prior:
            generator = keyed_generator(self.config.seed, "prior", sample=position)
            if torch.rand((), generator=generator) < PRIOR_SHARE:
                return self.cache.prior[torch.randint(len(self.cache.prior), (), generator=generator)]
        epoch, place = divmod(position, len(self.cache.train))
        order = torch.randperm(len(self.cache.train), generator=keyed_generator(self.config.seed, "order", epoch))
        return self.cache.train[order[place]]

    def training(self, position):
        """Sample number `position` of the run."""
        draw = functools.partial(keyed_generator, self.config.seed, sample=position)
        t = torch.randint(self.timesteps, (), generator=draw("timestep"))
        dropped = torch.rand((), generator=draw("caption dropout")) < self.config.caption_dropout
        clip, *captions = self.clip_at(position)
        caption = torch.randint(len(captions), (), generator=draw("caption"))
        return self.sample((clip, captions[caption]), t, draw, dropped, IMAGE_DROPOUT)

    def heldout(self, files, index, t):
        """The held-out clip number `index` at a fixed timestep under fixed noise, the same for every seed of a run."""
        draw = functools.partial(keyed_generator, "held-out", step=t, sample=index)
        return self.sample(files, torch.tensor(t), draw)

    def drawn(self, latents, prompt, t, image=None):
        """A clip that a model drew of a prompt, and of an image, at a timestep under noise that is the same for all."""
        draw, embeds = functools.partial(keyed_generator, "drawn", step=t), load_tensor(prompt, "prompt_embeds")
        noise, more = torch.randn(latents.shape, generator=draw("noise")), self.condition(image, draw, len(latents))
        return {"latents": latents, "noise": noise, "timesteps": torch.tensor(t), "prompt_embeds": embeds, **more}

    def sample(self, files, t, draw, caption_dropped=False, image_dropout=0.0):
        """draw: purpose -> a generator."""
        moments = load_tensor(files[0], "moments")
        latents = draw_latents(moments, self.base.vae["scaling_factor"], draw("posterior"), self.base.patch_t)
        return {
            "latents": latents,  # (T, C, h, w)
            "noise": torch.randn(latents.shape, generator=draw("noise")),
            "timesteps": t,
            "prompt_embeds": self.empty if caption_dropped else load_tensor(files[1], "prompt_embeds"),  # (L, D)
            **self.condition(files[0], draw, len(latents), image_dropout),
        }

    def condition(self, file, draw, count, dropout=0.0):
        """What an image-to-video model is shown besides, of `count` latent frames: those of a clip's first frame in the
        first place, where the pipeline has them, and zeros in all others; in CogVideoX1.5 a constant, too."""
        if not self.base.image_to_video:
            return {}
        generator, codings = draw("image"), load_tensor(file, "images")  # (IMAGE_CODINGS, 2C, h, w)
        kept = torch.rand((), generator=generator) >= dropout
        coding = codings[torch.randint(len(codings), (), generator=generator)][:, None]
        first = draw_latents(coding, self.base.image_scale, generator) * kept  # (1, C, h, w)
        constant = {"ofs": torch.tensor(2.0)} if self.base.transformer.get("ofs_embed_dim") else {}
        return {"image": torch.cat([first, first.new_zeros(count - 1, *first.shape[1:])]), **constant}


def collate(samples, device):
    return {name: torch.stack([s[name] for s in samples]).to(device) for name in samples[0]}


# ------------------------------------------------------------------------------------------------------------ adapters

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LORA_TARGETS = {"attention": ATTENTION, "all": ATTENTION + ["ff.net.0.proj", "ff.net.2"]}


def add_lora(transformer, rank, alpha, seed, targets="attention"):
    """LoRA on matrices of every block, in float32 whatever the base is in. Returns the trainable parameters."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_TARGETS[targets]))
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    return parameters


def save_lora(transformer, folder, weights=None):
    """Write pytorch_lora_weights.safetensors as diffusers does, with the LoraConfig (alpha included) in its metadata,
    so that pipe.load_lora_weights(folder) applies alpha / rank, once. weights: by name [the transformer's]."""
    from diffusers import CogVideoXPipeline
    from peft import get_peft_model_state_dict

    layers = {k: p.detach().cpu().contiguous() for k, p in get_peft_model_state_dict(transformer, weights).items()}
    metadata = transformer.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set, in another order at each start
    CogVideoXPipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)


def add_trained_lora(transformer, config, folder):
    """The adapter of a run, weights and all."""
    add_lora(transformer, config.rank, config.alpha, config.seed, config.lora_targets)
    load_trained(transformer, folder)


# --------------------------------------------------------------------------------------------------- several processes
# Each trains on its share of a batch. With --shard torch's FSDP2 cuts every tensor by rows, a block's are put together
# while it runs, and gradients are averaged and cut again. What follows is about such a tensor, or any other.
def processes():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def summed(tensor):
    """Its sum over all processes, in its place."""
    torch.distributed.all_reduce(tensor)
    return tensor


def local(tensor):
    """What this process holds of a tensor."""
    return getattr(tensor, "to_local", lambda: tensor)()


def rows_here(tensor):
    """Which rows of a tensor this process holds. The last processes may hold fewer than the others, or none."""
    if local(tensor) is tensor:
        return slice(None)
    first = tensor.device_mesh.get_local_rank() * math.ceil(len(tensor) / processes())
    return slice(first, first + len(tensor.to_local()))


def gathered(rows):
    """The rows of all processes, one after another, in the first one's memory; None elsewhere."""
    parts = [None] * processes() if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(rows.cpu().clone(), parts)
    return parts and torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------- optimizers

LEAST_IN_8_BITS, BLOCK = 4096, 256  # weights: of a tensor whose states bitsandbytes keeps so, and that share a scale
MAX_UPDATE_RMS = 1.0  # of a tensor's update, in units of the learning rate (arXiv 1804.04235)


def new_optimizer(config, parameter, whole):
    """An optimizer of one tensor. To add one: a branch here, its name among the choices of Config.optimizer. whole: the
    tensor of which `parameter` is this process's rows, or all."""
    import bitsandbytes as bnb
    from transformers.optimization import Adafactor

    shared, sharded = dict(lr=config.lr, weight_decay=config.weight_decay), local(whole) is not whole
    least = LEAST_IN_8_BITS
    if sharded:  # in 8 bits as the whole is, unless weights that share a scale lie in two processes
        across = math.ceil(len(whole) / processes()) * whole.shape[1:].numel() % BLOCK
        least = math.inf if across or whole.numel() < least else 0
    if config.optimizer == "adamw":
        return torch.optim.AdamW([parameter], betas=(0.9, 0.95), foreach=False, **shared)
    if config.optimizer == "adamw8bit":
        return bnb.optim.AdamW8bit([parameter], betas=(0.9, 0.95), min_8bit_size=least, **shared)
    if config.optimizer == "lion8bit":
        return bnb.optim.Lion8bit([parameter], betas=(0.9, 0.99), min_8bit_size=least, **shared)
    # Row and column sums in place of second moments, no first moments. torch's own Adafactor would multiply the
    # learning rate by the size of the weights, and could not be told not to.
    shared |= dict(scale_parameter=False, relative_step=False, clip_threshold=MAX_UPDATE_RMS)
    optimizer = Adafactor([parameter], **shared)
    if sharded:
        optimizer._rms = lambda tensor: (summed(squares(tensor)) / whole.numel()).sqrt()
        if whole.dim() == 2:  # of more dimensions each row has factors of its own
            optimizer._approx_sq_grad = functools.partial(inverse_root_of_product, len(whole))
    return optimizer


def inverse_root_of_product(rows, row, col):
    """Adafactor's estimate, of factors for this process's part of so many rows; those of columns become the whole's."""
    columns = col * len(row) if len(row) else torch.zeros_like(col)  # of no rows, the mean is no number
    sums = summed(torch.cat([columns, row.sum()[None]])) / rows
    return (row / sums[-1]).rsqrt()[:, None] * col.copy_(sums[:-1]).rsqrt()


def round_stochastically(x, generator, shape=None, rows=slice(None)):
    """float32 to bfloat16, up or down with probabilities that make the mean exact: a step a tenth as large as the gap
    between two bfloat16 numbers is taken one time in ten. Rounding to nearest drops it every time. x may be some rows
    of a tensor of another shape, which are rounded as they would be within it."""
    noise = torch.randint(0, 2**16, shape or x.shape, dtype=torch.int32, device=x.device, generator=generator)[rows]
    bits = (x.contiguous().view(torch.int32) + noise) & -(2**16)  # bfloat16 is the upper half of float32
    return torch.where(x.isfinite(), bits.view(torch.float32), x).bfloat16()


def squares(tensor):
    """Sum of squares, in float32, in one pass."""
    flat = tensor.detach().float().flatten()
    return flat.dot(flat)


class Updates:
    """Steps the trained weights, one tensor at a time, each with an optimizer of its own. Where weights are kept in
    bf16, the optimizer steps a float32 copy of one tensor at a time, and the result is rounded. With --fused-backward
    that happens as soon as backward has the tensor's gradient, which is then freed, so that gradients never live
    together. The price: no clipping to a global norm (each tensor's update is clipped instead) and no summing up of
    gradients. Otherwise, `step` does it for all. With --shard each process steps its rows of every tensor, `kept`;
    norms are those of whole tensors, and so is the noise of rounding: any number of processes does the same."""

    def __init__(self, config, parameters):
        self.config, self.parameters, self.lr, self.step_number = config, parameters, config.lr, 0
        self.sharded = local(parameters[0]) is not parameters[0]
        self.kept = [torch.nn.Parameter(local(p.detach())) for p in parameters] if self.sharded else parameters
        self.param_groups = [{"params": self.kept}]  # what torch's GradScaler looks for
        empty = [torch.nn.Parameter(torch.empty(0, device=p.device)) for p in parameters]
        self.shown = [p if p.dtype == torch.float32 else copy for p, copy in zip(self.kept, empty)]
        self.optimizers = [new_optimizer(config, *two) for two in zip(self.shown, parameters)]
        self.began = [p.detach().clone() for p in self.kept] if config.l2_to_base else None
        # Of a step: squares of change, weights and gradients, and the number of weights whose bits changed.
        self.sums = torch.zeros(4, dtype=torch.float64, device=parameters[0].device)
        self.under_way = False  # weights have changed in a step that is not written down yet: no state to keep
        if config.fused_backward or self.sharded:
            me = weakref.ref(self)  # the weights would keep what keeps them, where Python's collector does not see it
            for i, p in enumerate(parameters):
                p.register_post_accumulate_grad_hook(lambda _, i=i: me().arrived(i))

    def arrived(self, i):
        """Backward has the gradient of tensor i, of this process's samples; of its rows, FSDP has averaged it."""
        p, own = self.parameters[i], self.kept[i]
        if self.sharded:
            own.grad, p.grad = local(p.grad) if own.grad is None else own.grad + local(p.grad), None
        elif processes() > 1:
            summed(p.grad).div_(processes())
        if self.config.fused_backward:
            self.update(i)

    @torch.no_grad()
    def update(self, i):
        """One optimizer step of tensor i, which frees its gradient."""
        self.under_way = True
        p, whole, shown, optimizer = self.kept[i], self.parameters[i], self.shown[i], self.optimizers[i]
        old, gradients = p.detach().clone(), squares(p.grad)
        if shown is not p:
            shown.data, shown.grad = p.float(), p.grad.float()
        optimizer.param_groups[0]["lr"] = self.lr
        if p.numel() or not hasattr(optimizer, "init_state"):
            optimizer.step()
        elif shown not in optimizer.state:  # bitsandbytes cannot step a process's share of no rows
            optimizer.init_state(optimizer.param_groups[0], shown, 0, 0)
        if self.began:
            shown.lerp_(self.began[i].to(shown), self.lr * self.config.l2_to_base)
        if self.config.fused_backward:
            change = shown - old.float()
            mean = summed(squares(change)) / whole.numel() if self.sharded else change.square().mean()
            excess = mean.sqrt() / (self.lr * MAX_UPDATE_RMS)
            shown.copy_(torch.where(excess > 1, old.float() + change / excess, shown))
        if shown is not p:
            if self.config.trained_dtype == "bfloat16":
                generator = keyed_generator(self.config.seed, "rounding", self.step_number, i, p.device)
                p.copy_(round_stochastically(shown.data, generator, whole.shape, rows_here(whole)))
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
        """Of the step just made: norm of the gradients, norm of the change over norm of the weights, and the share of
        weights whose stored bits changed (in bf16, small steps are rounded away, and nobody is told)."""
        change, weights, gradients, changed = (summed(self.sums) if self.sharded else self.sums).tolist()
        self.sums.zero_()
        share = changed / sum(p.numel() for p in self.parameters)
        return dict(grad_norm=gradients**0.5, update_ratio=(change / max(weights, 1e-60)) ** 0.5, changed_share=share)

    def state(self):
        """(tensors by name, numbers by name), of whole tensors. Where those are sharded, all processes must call."""
        states = [o.state.get(shown, {}) for o, shown in zip(self.optimizers, self.shown)]
        values = {f"{i}.{k}": v for i, state in enumerate(states) for k, v in state.items()}
        tensors = {k: v.detach().contiguous() for k, v in values.items() if torch.is_tensor(v)}
        numbers = {k: v for k, v in values.items() if k not in tensors}
        return {k: gathered(v) if self.is_cut(k, v) else v for k, v in tensors.items()}, numbers

    def is_cut(self, name, value):
        """Whether processes have different rows of a state: of all but a counter, a table, factors of columns."""
        return self.sharded and value.dim() and not (value.dim() == 1 and re.search("qmap|_col$", name))

    def load_state(self, tensors, numbers):
        """What `state` gave, or of each tensor this process's rows."""
        from bitsandbytes.functional import dequantize_blockwise

        for name, value in {**tensors, **numbers}.items():
            i, key = int(name.split(".")[0]), name.split(".", 1)[1]
            shown, whole, state = self.shown[i], self.parameters[i], self.optimizers[i].state
            if name in tensors and self.is_cut(name, value):
                rows, width = rows_here(whole), whole.shape[1:].numel()
                if value.dtype == torch.uint8 and self.optimizers[i].args.min_8bit_size == math.inf:
                    scale, table = (tensors[name.replace("state", other)] for other in ("absmax", "qmap"))
                    value = dequantize_blockwise(value, absmax=scale, code=table, blocksize=BLOCK)
                each = BLOCK if "absmax" in key else width  # weights for which a row of this state stands
                value = value[rows.start * width // each : -(-rows.stop * width // each)].clone()
            if name in tensors and value.dim():  # counters stay on the CPU
                value = value.to(shown.device)
            state[shown][key] = value


class Average:
    """Exponential moving average of weights, in float32: in bf16 a share of 0.001 of a change would be rounded away."""

    def __init__(self, parameters, decay):
        self.parameters, self.decay = parameters, decay
        self.tensors = [p.detach().to(torch.float32, copy=True) for p in parameters]

    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))  # as diffusers' EMAModel: a short memory at first
        for average, p in zip(self.tensors, self.parameters):
            average.lerp_(p.detach().to(average), 1 - decay)

    @contextlib.contextmanager
    def in_place(self):
        """Put the average in place of the weights, for a while."""
        with torch.no_grad():
            weights = [p.detach().clone() for p in self.parameters]
            for p, average in zip(self.parameters, self.tensors):
                p.copy_(average)
            try:
                yield
            finally:
                for p, weight in zip(self.parameters, weights):
                    p.copy_(weight)


# --------------------------------------------------------------------------------------------------------- checkpoints
def save_trained(transformer, method, folder, weights=None):
    """What a run gives: an adapter, or a whole transformer as a diffusers folder. weights: by name [transformer's]."""
    if method != "full":
        return save_lora(transformer, folder, weights)
    if weights:
        from diffusers import CogVideoXTransformer3DModel

        with torch.device("meta"):
            transformer = CogVideoXTransformer3DModel.from_config(transformer.config)
        transformer.load_state_dict(weights, assign=True)
    partial = folder / "transformer.partial"
    shutil.rmtree(partial, ignore_errors=True)
    transformer.save_pretrained(partial)
    shutil.rmtree(folder / "transformer", ignore_errors=True)
    os.replace(partial, folder / "transformer")


def load_trained(transformer, folder):
    """Put what save_trained wrote back into a transformer that is ready for it. Raises UserError where it is not."""
    weights, folder = dict(transformer.named_parameters()) | dict(transformer.named_buffers()), Path(folder)
    files = [*folder.glob("pytorch_lora_weights.safetensors"), *folder.glob("transformer/*.safetensors")]
    try:
        for name, tensor in (pair for file in files for pair in load_file(str(file)).items()):
            name = re.sub(r"(lora_.)\.weight$", r"\1.default.weight", name.removeprefix("transformer."))
            local(weights[name].detach()).copy_(tensor[rows_here(weights[name])])
    except (KeyError, RuntimeError):  # another name, another rank
        files = []
    refuse((not files, f"checkpoint '{folder}': its weights do not fit this run; start a new one"))


def checkpoints(folder):
    """Complete checkpoints of a run, oldest first."""
    folders = [p for p in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    needed = {p: [p / "state.json", p / "optimizer.safetensors", *p.rglob("*.safetensors")] for p in folders}
    return sorted((p for p in folders if not any(damage(needed[p]))), key=lambda p: int(p.name.split("-")[1]))


# ------------------------------------------------------------------------------------------------------------ sampling
def sampling_pipeline(base, transformer, dtype, device, description):
    """The stock pipeline without T5 around a transformer."""
    vae = base.load("vae", dtype).to(device)
    pipe = base.pipeline(None, None, vae, transformer.eval(), base.load("scheduler"))
    pipe.set_progress_bar_config(desc=description, leave=False)
    return pipe


@torch.no_grad()
def generate(pipe, base, prompt_embeds, empty, config, seed, images=None):
    """Clips of the stock pipeline for embeddings (N, L, D), without T5 in memory. Clip k starts from the noise of
    seed + k; an image-to-video model's from image k of (N, C, H, W), too. A large model's are decoded in tiles.
    Returns, on the CPU, a list of float (F, C, H, W) in [0, 1], and their latents (N, T, C, h, w)."""
    clips, drawn, at_once, padding = [], [], base.sampled_at_once, base.latent_frames(config.frames)[1]
    for first in range(0, len(prompt_embeds), at_once):
        embeds = prompt_embeds[first : first + at_once]
        image = {} if images is None else {"image": images[first : first + at_once]}
        if base.large:
            tile(pipe.vae, 1)  # a first frame is coded as it was for training
        latents = pipe(
            **image,
            prompt_embeds=embeds, negative_prompt_embeds=empty.expand_as(embeds), num_frames=config.frames,
            height=config.height, width=config.width, num_inference_steps=config.sampling_steps,
            guidance_scale=config.guidance_scale, max_sequence_length=base.text_length, output_type="latent",
            generator=[torch.Generator().manual_seed(seed + first + k) for k in range(len(embeds))],
        ).frames  # fmt: skip
        if base.large:
            tile(pipe.vae, 2)
        video = pipe.video_processor.postprocess_video(pipe.decode_latents(latents[:, padding:]), output_type="pt")
        clips += list(video.float().cpu())  # (N, F, C, H, W)
        drawn.append(latents.float().cpu())
    return clips, torch.cat(drawn)


def sample(run_or_model, prompts, seed=0, images=None, **changes):
    """Clips for prompts: from a run (its base with its adapter) or from a model folder or id. images: the picture file
    that an image-to-video model's clips begin with, or a list of one a prompt. changes: fields of Config to differ from
    the run's or the recipe's, such as frames, sampling_steps, guidance_scale. Returns a list of float (F, C, H, W) in
    [0, 1]. Raises UserError."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    run = Path(os.path.expanduser(run_or_model))
    is_run = (run / "config.json").exists() and not (run / "model_index.json").exists()
    config = load_run(run).config if is_run else Config(model=str(run_or_model))
    base = find_base(config.model, weights=False)
    config, _, _ = resolve(dataclasses.replace(config, resume=False, seed=seed, **changes), base)
    images = [images] if isinstance(images, (str, Path)) else list(images or [])
    images, model = images * len(prompts) if len(images) == 1 else images, f"model '{config.model}'"
    refuse(
        (images and not base.image_to_video, f"--image: {model} is text-to-video; give another, or leave it out"),
        (base.image_to_video and not images, f"{model}: its clips begin with a picture; give one with --image FILE"),
        (len(images) not in (0, len(prompts)), f"--image: {len(images)} for {len(prompts)} prompts; one, or one each"),
    )  # fmt: skip
    images = torch.stack([read_image(i, config.height, config.width) for i in images]) if images else None
    base = find_base(config.model)  # downloads the weights of a Hub id, now that all else was found right
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, _ = choose_compute_dtype(device, base, changes.get("compute_dtype"))  # the run may be of another machine
    *embeds, empty = encode_prompts(base, [*prompts, ""], device, dtype, config.quantize_text_encoder)
    if is_run and config.method == "full":
        stored = frozen_dtype(base, dtype, (run / "transformer").resolve())
        transformer = base.cls("transformer").from_pretrained(run / "transformer", dtype=stored).to(device)
    else:
        transformer = load_transformer(config, base, dtype, device)
    if is_run and config.method != "full":
        add_trained_lora(transformer, config, run)
    compute_in_dtype_of_input(transformer.requires_grad_(False), dtype)
    pipe = sampling_pipeline(base, transformer, dtype, device, "sampling")
    return generate(pipe, base, torch.stack(embeds).to(device), empty.to(device), config, seed, images)[0]


def save_samples(folder, when, clips, fps):
    """WHEN-K.mp4 for the clip of each prompt, K by their order in prompts.json."""
    for k, clip in enumerate(clips):
        partial = folder / f"partial-{when}-{k}.mp4"
        write_video(partial, clip, fps)
        os.replace(partial, folder / f"{when}-{k}.mp4")


# ------------------------------------------------------------------------------------------------------------ training

HELDOUT_TIMESTEPS, CRITIC_TIMESTEPS = (100, 300, 500, 700, 900), (100, 300, 500)  # the base judges by the latter
HELDOUT_CLIPS, WATCHED_CLIPS = 32, 4  # at most, so that measurements stay cheap
SAMPLED = dict(before=0, again=1000, after=0)  # sets of samples: the seed of the first prompt, the next one's is one up
# Not before step 50, where sound runs stumble too; then ever more seldom, since what goes wrong mostly does so early.
WATCHED_STEPS = {50 * 2**k for k in range(20)}


class Trainer:
    """The model, its optimizer and its samples; a method for each thing done with them."""

    def __init__(self, config, base, cache, accelerator):
        self.config, self.base, self.cache, self.accelerator = config, base, cache, accelerator
        self.device, self.dtype = accelerator.device, getattr(torch, config.compute_dtype)
        scheduler = base.load("scheduler")
        self.alpha_bar = scheduler.alphas_cumprod.double()
        self.samples = Samples(config, base, cache, scheduler.config.num_train_timesteps)
        place = "cpu" if config.shard and config.method != "qlora" else self.device  # from there block by block
        self.transformer = load_transformer(config, base, self.dtype, place)
        if config.method == "full":
            self.transformer.requires_grad_(True)
        else:
            add_lora(self.transformer, config.rank, config.alpha, config.seed, config.lora_targets)
        compute_in_dtype_of_input(self.transformer, self.dtype)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.rotary = rotary_embedding(base, self.transformer, config.frames, config.height, config.width, self.device)
        self.share_out()
        self.average = Average(self.updates.kept, config.ema) if config.ema else None
        scaler = torch.amp.GradScaler
        if config.shard:  # all leave a step out, or none
            from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as scaler
        self.scaler = scaler(self.device.type, enabled=self.dtype == torch.float16)
        if config.compile:
            for block in self.transformer.transformer_blocks:  # one graph for all, and gradients block by block
                block.compile()

    def share_out(self):
        """Make the updates, and what they train: spread over processes, wrapped to average gradients, or as it is."""
        self.model, self.run_backward = self.transformer, self.accelerator.backward
        if self.config.shard:
            from torch.distributed.fsdp import fully_shard

            mesh = torch.distributed.init_device_mesh(self.device.type, (processes(),))
            for module in [*self.transformer.transformer_blocks, self.transformer]:
                fully_shard(module, mesh=mesh, reshard_after_forward=True)  # or the root's stay whole after a sample
        elif not self.config.fused_backward:
            self.model = self.accelerator.prepare(self.transformer)  # wrapped, where there are several processes
        self.parameters = [p for p in self.transformer.parameters() if p.requires_grad]
        self.updates = Updates(self.config, self.parameters)

    def whole_weights(self):
        """The trained weights by name, in the first process; None where each holds them whole. All must take part."""
        trained = ((name, p.detach()) for name, p in self.transformer.named_parameters() if p.requires_grad)
        whole = {name: gathered(p.to_local()) for name, p in trained} if self.config.shard else None
        return whole and whole | self.tables()

    def tables(self):
        """What files of weights hold besides: CogVideoX-5b-I2V's positions, which diffusers does not train."""
        weights = dict(self.transformer.named_parameters())
        state = self.transformer.state_dict() if self.config.method == "full" else {}
        return {name: tensor for name, tensor in state.items() if name not in weights}

    def losses(self, model, samples):
        """One velocity loss a sample: (B,)."""
        batch = collate(samples, self.device)
        return velocity_loss(model, batch, self.alpha_bar, self.rotary, self.dtype)

    def step(self, step):
        """One optimizer step on batch_size clips. Returns its metrics; raises RunError if the loss is not finite."""
        started = time.perf_counter()
        self.updates.step_number = step
        self.updates.lr = self.config.lr * min(1.0, (step + 1) / max(1, self.config.warmup))
        loss = self.backward(step)
        self.refuse_if_not_finite(loss, step)
        clipped = {} if self.config.fused_backward else {"grad_norm": self.clip_gradients()}
        self.scaler.step(self.updates)
        self.scaler.update()
        for p in self.updates.kept:  # of a step that the scaler left out
            p.grad = None
        if self.average:
            self.average.update(step)
        metrics = {"step": step + 1, "loss": loss, "lr": self.updates.lr, **self.updates.measured(), **clipped}
        return {**metrics, "step_s": time.perf_counter() - started}

    def backward(self, step):
        """Loss and gradients of a step; with --fused-backward the update, too. Returns the loss, of all processes."""
        config, accelerator = self.config, self.accelerator
        # Each process takes every n-th sample of the step; each sample's draws follow from its number alone.
        positions = range(step * config.batch_size, (step + 1) * config.batch_size)
        positions = positions[accelerator.process_index :: accelerator.num_processes]
        micro, loss = config.micro_batch_size or len(positions), torch.zeros((), device=self.device)
        for k in range(0, len(positions), micro):
            samples = [self.samples.training(n) for n in positions[k : k + micro]]
            elsewhere = contextlib.nullcontext()
            if config.offload_activations:
                elsewhere = torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")
            with elsewhere:
                part = self.losses(self.model, samples).sum() / len(positions)
            loss += part.detach()
            if config.fused_backward:  # backward is the step
                self.refuse_if_not_finite(float(accelerator.reduce(loss, "mean")), step)
            self.run_backward(self.scaler.scale(part))
        return float(accelerator.reduce(loss, "mean"))

    def clip_gradients(self):
        """Clip to a global norm, taken in float32. Returns it, or None in a step that fp16's scaler leaves out."""
        self.scaler.unscale_(self.updates)
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in self.updates.kept]
        norm = torch.stack(norms).norm()
        if self.config.shard:
            norm = summed(norm.square()).sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.updates.kept, self.config.max_grad_norm, norm)
        return float(norm) if norm.isfinite() else None

    def refuse_if_not_finite(self, loss, step):
        if not math.isfinite(loss):
            raise RunError(f"step {step + 1}: the loss is {loss}; lower --lr (now {self.config.lr:g})")

    def judged(self):
        """A context in which the weights are those that the run would give: the average, if there is one."""
        return self.average.in_place() if self.average else contextlib.nullcontext()

    def heldout_loss(self, clips=None):
        """Mean over held-out clips, or others of a cache (its `heldout` or `train`, or a part), at fixed timesteps and
        under fixed noise: comparable between steps, runs and seeds."""
        clips = (self.cache.heldout if clips is None else clips)[:HELDOUT_CLIPS]
        at = [functools.partial(self.samples.heldout, clip, i) for i, clip in enumerate(clips)]
        with self.judged():
            return float(self.losses_at(HELDOUT_TIMESTEPS, at).mean())

    @torch.no_grad()
    def losses_at(self, timesteps, clips):
        """The loss of clips at timesteps, by the weights as they are: (clips, timesteps). Each clip is a function of a
        timestep that returns a sample, see `Samples`."""
        self.transformer.eval()
        jobs, at_once, losses = [(clip, t) for clip in clips for t in timesteps], 1 if self.base.large else 16, []
        for k in range(0, len(jobs), at_once):
            losses.append(self.losses(self.transformer, [clip(t) for clip, t in jobs[k : k + at_once]]))
        self.transformer.train()
        return torch.cat(losses).view(-1, len(timesteps))

    def measurements(self, step):
        """Held-out losses that are due after `step` steps, by name; 0: those of the base."""
        watched = self.cache.heldout[:WATCHED_CLIPS]
        if step == 0:
            return {"heldout_before": self.heldout_loss(), "watched_before": self.heldout_loss(watched)}
        due = {"watched_loss": self.heldout_loss(watched)} if step in WATCHED_STEPS else {}
        return due | ({"heldout_loss": self.heldout_loss()} if self.pauses(step) else {})

    def warn_if_worse(self, metrics, began, bar):
        """Compare the loss on a few held-out clips with the untrained base's. Raises RunError if asked to."""
        if metrics.get("watched_loss", 0) <= began["watched_before"]:
            return
        clips, rate = min(WATCHED_CLIPS, len(self.cache.heldout)), self.config.lr
        alarm = (
            f"step {metrics['step']}: the loss on {clips} held-out clips is {metrics['watched_loss']:.4f}, above the "
            f"{began['watched_before']:.4f} before training, as in runs that distort; lower --lr (now {rate:g})"
        )
        if self.config.stop_on_distortion:
            raise RunError(alarm)
        bar.write(f"warning: {alarm}; --stop-on-distortion would end the run here")

    def pauses(self, step):
        """Whether a checkpoint is due after `step` steps."""
        return step % self.config.checkpoint_every == 0 or step == self.config.steps

    def generated(self, seed=0, description="sampling"):
        """A clip of each validation prompt, and their latents, from the weights as they are: see `generate`."""
        pipe = sampling_pipeline(self.base, self.transformer, self.dtype, self.device, description)
        embeds = torch.stack([load_tensor(file, "prompt_embeds") for file in self.cache.prompts.values()])
        embeds, empty = (e.to(self.device, self.dtype) for e in (embeds, self.samples.empty))
        images = [load_tensor(file, "first_frame") / 255 for file in self.cache.images.values()]
        with self.judged():
            images = torch.stack(images) if images else None
            drawn = generate(pipe, self.base, embeds, empty, self.config, seed, images)
        self.transformer.train()
        return drawn

    def draw_samples(self, folder, when):
        """A set of samples, always from the same seeds, with their latents. All processes take part, and one writes."""
        clips, latents = self.generated(SAMPLED.get(when, 0), f"sampling {when}")
        if self.accelerator.is_main_process:
            save_file({"latents": latents}, str(folder / f"samples/{when}.safetensors"))
            save_samples(folder / "samples", when, clips, self.config.fps)
        self.accelerator.wait_for_everyone()

    def base_losses(self, folder, *sets):
        """The base's loss on sets of samples, each clip under its own prompt: a list for each set. It says how strange
        they are to it. The weights must be the base's."""
        prompts = [(file, self.cache.images.get(prompt)) for prompt, file in self.cache.prompts.items()]
        drawn = self.samples.drawn
        for when in sets:
            latents = load_tensor(folder / f"samples/{when}.safetensors", "latents")  # (K, T, C, h, w)
            at = [functools.partial(drawn, *of, image=image) for *of, image in zip(latents, *zip(*prompts))]
            yield self.losses_at(CRITIC_TIMESTEPS, at).mean(1).tolist()

    def look(self, folder, step):
        """Samples on the way; of adapters also `strangeness`: times as strange to the base as its own."""
        self.draw_samples(folder, f"step-{step}")
        if self.config.method == "full":  # the base is not at hand
            return {}
        self.transformer.disable_adapters()
        before, now = map(geometric_mean, self.base_losses(folder, "before", f"step-{step}"))
        self.transformer.enable_adapters()
        return {"strangeness": now / before}

    def judge_by_base(self, folder):
        """Write samples/base_losses.json: the base's loss on samples before and after training, and on real held-out
        clips. It puts the base's weights back first: those that were trained must be written."""
        if self.config.method == "full":
            load_trained(self.transformer, self.base.folder)
        else:
            self.transformer.disable_adapters()
        before, after = self.base_losses(folder, "before", "after")
        real = [functools.partial(self.samples.heldout, c, i) for i, c in enumerate(self.cache.heldout[:WATCHED_CLIPS])]
        losses = dict(before=before, after=after, heldout=self.losses_at(CRITIC_TIMESTEPS, real).mean(1).tolist())
        if self.accelerator.is_main_process:
            write_json(folder / "samples/base_losses.json", {"timesteps": CRITIC_TIMESTEPS, **losses})

    def save_checkpoint(self, folder, step):
        """Write checkpoint-STEP whole or not at all, then remove the oldest past the limit. Nothing is pickled. Of data
        order and random draws the step is all there is to keep (see keyed_generator). All processes take part, and one
        writes whole tensors, so that any number of processes can go on."""
        weights, (tensors, numbers) = self.whole_weights(), self.updates.state()
        averages = enumerate(self.average.tensors if self.average else [])
        averages = {str(i): gathered(t) if self.config.shard else t for i, t in averages}
        if not self.accelerator.is_main_process:
            return
        final, partial = folder / f"checkpoint-{step}", folder / f"checkpoint-{step}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_trained(self.transformer, self.config.method, partial, weights)
        save_file(tensors, str(partial / "optimizer.safetensors"))
        if averages:
            save_file(averages, str(partial / "average.safetensors"))
        write_json(partial / "state.json", {"step": step, "optimizer": numbers, "scaler": self.scaler.state_dict()})
        (final / "state.json").unlink(missing_ok=True)  # without it a checkpoint is no complete one
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in checkpoints(folder)[: -self.config.checkpoints_limit]:
            (old / "state.json").unlink()
            shutil.rmtree(old)

    def load_checkpoint(self, folder):
        """Put a checkpoint's weights, optimizer state and average back. Returns its step."""
        load_trained(self.transformer, folder)
        state = json.loads((folder / "state.json").read_text("utf-8"))
        self.updates.load_state(load_file(str(folder / "optimizer.safetensors")), state["optimizer"])
        if self.average:
            for i, tensor in load_file(str(folder / "average.safetensors")).items():
                self.average.tensors[int(i)].copy_(tensor[rows_here(self.parameters[int(i)])])
        self.scaler.load_state_dict(state["scaler"])
        if state["step"] > self.config.steps:
            raise UserError(f"--steps {self.config.steps}: the checkpoint {folder.name} is past that already")
        return state["step"]


@dataclass
class Run:
    """A run: its folder and configuration; once it is finished its summary, and one dict of metrics a step."""

    folder: Path
    config: Config
    summary: dict
    metrics: list


def prepare(config):
    """All that comes before the model is loaded: options filled in, arithmetic chosen, clips and prompts coded. Returns
    (Run, Base, Cache, Accelerator, newest checkpoint or None, lines for the banner). Raises UserError."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import broadcast_object_list

    wanted = config.fused_backward
    config, base, reasons = resolve(config, find_base(config.model, weights=False))
    for name in ("model", "data", "heldout", "prior"):
        if getattr(config, name):
            setattr(config, name, portable(getattr(config, name)))
    _ = read_clips(config.prior) if config.prior else []  # found wanting now, if at all
    folder = run_folder(config)
    _, heldout_clips, split = split_clips(config)
    drawn, prompts = sampled_prompts(folder), validation_prompts(config, heldout_clips, base.image_to_video)
    words = "it has drawn samples of other prompts before training; give the same, or start a new run"
    refuse((drawn and list(drawn) != list(prompts), f"run '{folder}': {words}"))
    base = find_base(config.model)  # downloads the weights of a Hub id, now that all that is cheap was found right
    if config.method == "full":  # adapters are small
        states = {"adamw": 8, "adamw8bit": 2, "lion8bit": 1, "adafactor": 0}.get(config.optimizer, 8)  # bytes a weight
        weight, copies = trained_dtype(config).itemsize, config.checkpoints_limit + 1  # one while it is written
        words = f"{copies} checkpoints and the result; make room, or lower --checkpoints-limit"
        refuse_full_disk(folder, base.parameters * (weight + copies * (weight + states)), words)
    quiet_libraries()
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=1))  # others wait while the first codes clips
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available(), kwargs_handlers=[patience])
    newest = checkpoints(folder)[-1] if config.resume and checkpoints(folder) else None
    if newest and config.compute_dtype is None:  # a measurement could fall otherwise this time, and rounding with it
        config.compute_dtype = load_config(folder / "config.json").compute_dtype
        dtype, reason = getattr(torch, config.compute_dtype), "as the run began; --compute-dtype overrides it"
    else:
        dtype, reason = choose_compute_dtype(accelerator.device, base, config.compute_dtype)
    (config.compute_dtype,) = broadcast_object_list([str(dtype).removeprefix("torch.")])  # one for all processes
    reasons.append(("arithmetic", f"{config.compute_dtype}: {reason}"))
    if config.deepspeed:
        load_instrument("zero").refuse_what_it_does_not(config)
    kind, spread = accelerator.distributed_type.name, config.shard or config.deepspeed
    refuse(
        (kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"),
         f"accelerate launch: its settings for {kind} are not used; start with torchrun, and --shard or --deepspeed"),
        (spread and kind == "NO", "--shard and --deepspeed: for several processes; start with torchrun "
         "--nproc_per_node N cogvideo_lite.py, or leave them out (--no-shard, --deepspeed none)"),
        (config.shard and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10),  # its gloo summed, not averaged
         f"--shard: needs torch 2.10 or newer, and this is {torch.__version__}"),
        (wanted and dtype == torch.float16, FUSED_IN_FP16),
    )  # fmt: skip
    if config.fused_backward and dtype == torch.float16:
        config.fused_backward = False
        reasons.append(("optimizer", "after backward, since fp16 gradients must be unscaled all together"))
    with accelerator.main_process_first():
        cache = cache_clips(config, accelerator.device)
    free_memory()
    if torch.cuda.is_available():
        reasons.append(("memory", f"{peak_memory_gib():.1f} GiB at most while clips and prompts were coded"))
        torch.cuda.reset_peak_memory_stats()
    size = f"{config.frames}x{config.height}x{config.width} at {config.fps} fps"
    reasons.insert(0, ("data", f"{len(cache.train)} clips of {size}; {split}"))
    return Run(folder, config, {}, []), base, cache, accelerator, newest, reasons


def train(config, callbacks=()):
    """Fine-tune, from clips on disk to an adapter or a transformer on disk. Returns Run. Raises UserError or RunError.
    Each callback is called with the metrics of every step, a dict, after they were written: step, loss, lr, grad_norm
    (before clipping), update_ratio (norm of the change over that of the weights), changed_share (of the weights, those
    whose bits changed), step_s; at checkpoints heldout_loss, at WATCHED_STEPS watched_loss, at samples strangeness."""
    started = time.perf_counter()
    run, base, cache, accelerator, newest, reasons = prepare(config)
    config, folder, main = run.config, run.folder, accelerator.is_main_process
    engine = load_instrument("zero").Trainer if config.deepspeed else Trainer
    trainer = engine(config, base, cache, accelerator)
    done = trainer.load_checkpoint(newest) if newest else 0
    if main:
        begin_folder(run, newest, done, cache.images)
        banner(trainer, reasons, folder)
    accelerator.wait_for_everyone()
    drawn = all((folder / f"samples/before-{k}.mp4").exists() for k in range(len(cache.prompts)))
    refuse((done and not drawn, f"run '{folder}': its samples before training are gone; start a new run"))
    for when in () if drawn else ("again", "before"):  # where the latter are, all are
        trainer.draw_samples(folder, when)
    lines = read_metrics(folder / "metrics.jsonl")
    began, metrics = (lines[0], lines[-1]) if done else (trainer.measurements(0), {})
    bar = tqdm(total=config.steps, initial=done, desc="training", disable=not main)
    try:
        while done < config.steps:
            metrics = trainer.step(done)
            metrics |= (began if done == 0 else {}) | trainer.measurements(done + 1)
            if config.sample_every and (done + 1) % config.sample_every == 0:
                metrics |= trainer.look(folder, done + 1)
            done += 1
            if main:
                append_json(folder / "metrics.jsonl", metrics)
                run.metrics.append(metrics)
                trainer.updates.under_way = False
                bar.update()
                ratio = f"update {metrics['update_ratio'] or math.nan:.1e}"  # DeepSpeed does not tell
                bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {ratio}, {metrics['step_s']:.2f} s")
            if trainer.pauses(done):
                trainer.save_checkpoint(folder, done)
            for callback in callbacks if main else ():
                callback(metrics)
            trainer.warn_if_worse(metrics, began, bar)
    except (RunError, OSError, SafetensorError) as error:
        raise RunError(f"{error}; {len(checkpoints(folder))} checkpoints are in {folder}")
    except KeyboardInterrupt:
        if main and done > 0 and not (config.shard or config.deepspeed or trainer.updates.under_way):
            trainer.save_checkpoint(folder, done)
        raise RunError(f"stopped at step {done}; go on with --{config.method} --resume --out {folder}")
    finally:
        bar.close()
    with trainer.judged():
        weights = trainer.whole_weights()
        if main:
            save_trained(trainer.transformer, config.method, folder, weights)
    trainer.draw_samples(folder, "after")
    heldout = metrics.get("heldout_loss") or trainer.heldout_loss()
    trainer.judge_by_base(folder)
    if main:
        run.metrics[-1]["heldout_loss"] = heldout
        return finish(run, time.perf_counter() - started, list(cache.prompts))


def peak_memory_gib():
    """Peak of this process: of the card's reserved memory, or of resident memory (macOS counts bytes, Linux KiB)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return getattr(psutil.Process().memory_info(), "peak_wset", 0) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


# ------------------------------------------------------------------------------------------------------- a run's folder
def refuse_out(folder):
    """Whether a run or a merged model can be written there, and no pipeline's own transformer/ would go for it."""
    place = next(place for place in (folder, *folder.parents) if place.exists())
    words = f"--out '{folder}': '{place}' is no folder that may be written to; give another"
    refuse((not (place.is_dir() and os.access(place, os.W_OK)), words))
    words = f"--out '{folder}': a pipeline folder, whose transformer would be written over; give another"
    refuse(((folder / "model_index.json").exists(), words))


def run_folder(config):
    """The folder of this run: --out, the newest run of the method with --resume, or a new one. Raises UserError."""
    if config.out:
        folder = Path(os.path.expanduser(config.out)).resolve()
        refuse_out(folder)
        kind = "a finished" if (folder / "summary.json").exists() else "an unfinished"
        words = f"--out '{folder}': holds {kind} run already; give another folder, or --resume to go on with it"
        refuse(((folder / "metrics.jsonl").exists() and not config.resume, words))
        return folder
    runs = [p.parent for p in Path("runs").glob(f"{config.method}-*/config.json")] if config.resume else []
    new = Path(f"runs/{config.method}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    return max(runs, key=lambda run: run.stat().st_mtime, default=new).resolve()


def sampled_prompts(folder):
    """Prompt -> folder of the real clips that its samples are compared with; nothing before any were drawn."""
    file = folder / "samples/prompts.json"
    refuse(*damage([file] * file.exists()))
    prompts = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return {prompt: resolve_path(real) for prompt, real in prompts.items()}


def write_json(path, value):
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    os.replace(partial, path)


def append_json(path, value):
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(value) + "\n")


def read_metrics(path):
    try:  # what follows the last line feed was cut off in the writing
        return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]] if path.exists() else []
    except ValueError as error:
        raise UserError(f"'{path}': damaged ({error}); start a new run")


def begin_folder(run, newest, done, images):
    """Write config.json and samples/prompts.json, and first-K.png of the first frames that samples begin with (prompt
    -> clip file, in the cache); keep the metrics of the first `done` steps only."""
    from PIL import Image

    folder, metrics = run.folder, run.folder / "metrics.jsonl"
    if run.config.resume:
        print(f"resume: {newest or f'no complete checkpoint in {folder}, starting from the beginning'}")
    folder.mkdir(parents=True, exist_ok=True)
    # Without `resume` and `out`, so that --config repeats the run, in a folder of its own.
    write_json(folder / "config.json", dataclasses.asdict(dataclasses.replace(run.config, resume=False, out=None)))
    (folder / "samples").mkdir(exist_ok=True)
    prompts = validation_prompts(run.config, split_clips(run.config)[1], bool(images))
    write_json(folder / "samples/prompts.json", {prompt: portable(real) for prompt, real in prompts.items()})
    for k, file in enumerate(images.values()):
        frame, path = load_tensor(file, "first_frame").permute(1, 2, 0).numpy(), folder / f"samples/first-{k}.png"
        other = path.exists() and not np.array_equal(np.array(Image.open(path)), frame)
        words = "its samples before training began with another frame than held-out clips have now; start a new run"
        refuse((other, f"run '{folder}': {words}"))
        Image.fromarray(frame).save(path)
    run.metrics += [m for m in read_metrics(metrics) if m["step"] <= done]
    refuse((len(run.metrics) != done, f"'{metrics}': lacks lines of the {done} steps made; start a new run"))
    if metrics.exists():
        os.truncate(metrics, sum(len(json.dumps(m)) + 1 for m in run.metrics))  # needs no room, and is done at once


def banner(trainer, reasons, folder):
    """What is about to happen, and why so: one line for each thing that was decided."""
    config, base = trainer.config, trainer.base
    trained, total = sum(p.numel() for p in trainer.parameters), base.parameters
    method = f"full fine-tuning: all {trained / 1e6:,.2f} M parameters, kept in {config.trained_dtype}"
    if config.method != "full":
        name, share = "LoRA on NF4" if config.method == "qlora" else "LoRA", 100 * trained / (total + trained)
        method = f"{name}, rank {config.rank}, alpha {config.alpha:g}: {trained / 1e6:,.2f} M trainable ({share:.1f} %)"
    layers, checkpointing = base.transformer["num_layers"], "on" if config.gradient_checkpointing else "off"
    model = f"{config.model}: {total / 1e6:,.1f} M parameters, width {base.width}, {layers} layers"
    memory = f"{peak_memory_gib():.1f} GiB so far; gradient checkpointing {checkpointing}"
    lines = [("model", model), ("method", method), *reasons, ("memory", memory), ("run", str(folder))]
    print("\n".join(f"{name:>10}  {text}" for name, text in lines), flush=True)


def finish(run, seconds, prompts):
    """Write the summary and the model card of a trained run. Returns the run."""
    metrics, tenth = run.metrics, max(1, len(run.metrics) // 10)
    run.summary = {
        "steps": run.config.steps,
        "loss_first": mean([m["loss"] for m in metrics[:tenth]]),
        "loss_last": mean([m["loss"] for m in metrics[-tenth:]]),
        "heldout_before": metrics[0]["heldout_before"],
        "heldout_after": metrics[-1]["heldout_loss"],
        "seconds": seconds,
        "steps_per_s": 1 / mean([m["step_s"] for m in metrics[len(metrics) // 10 :]]),
        "peak_memory_gib": peak_memory_gib(),
        "processes": processes(),
    }
    write_json(run.folder / "summary.json", run.summary)
    write_model_card(run, prompts)
    return run


CARD = """---
{metadata}
---

# {method} of {model} on {data}
{more}
```python
import torch
from diffusers import {pipeline}, CogVideoXTransformer3DModel{load_image}

{load}
if torch.cuda.is_available():
    pipe.enable_model_cpu_offload()
clip = pipe({image}{prompt!r}, {call}).frames[0]
```

This run's results are in `summary.json`, clips of the base and after training in `samples/`, and everything that
decided it in `config.json`: `python cogvideo_lite.py --{method} --config config.json` repeats it.
"""


def write_model_card(run, prompts, more=""):
    """README.md of a run's folder, with the metadata of the Hugging Face Hub. more: extra Markdown."""
    from huggingface_hub import ModelCardData

    config, local = run.config, resolve_path(run.config.model)
    base, dtype = str(local) if local.exists() else config.model, f"dtype=torch.{config.compute_dtype}"
    described = find_base(config.model, weights=False)
    pipeline = PIPELINES[described.image_to_video]
    load = f"pipe = {pipeline}.from_pretrained({base!r}, {dtype})\n"
    load += 'pipe.load_lora_weights(".")  # this folder; alpha is stored with the weights'
    if config.method == "full":
        load = f'transformer = CogVideoXTransformer3DModel.from_pretrained("transformer", {dtype})  # in this folder\n'
        load += f"pipe = {pipeline}.from_pretrained({base!r}, transformer=transformer, {dtype})"
    call = dict(num_frames=config.frames, height=config.height, width=config.width)
    call |= dict(guidance_scale=config.guidance_scale, num_inference_steps=config.sampling_steps)
    call["max_sequence_length"] = described.text_length
    kind = "image-to-video" if described.image_to_video else "text-to-video"
    tags = [kind, "cogvideox", "diffusers", "cogvideo_lite"] + ["lora"] * (config.method != "full")
    image, load_image = "", ""
    if described.image_to_video:
        image, load_image = 'load_image("samples/first-0.png"), ', "\nfrom diffusers.utils import load_image"
    hub = dict(base_model=None if local.exists() else base, library_name="diffusers", pipeline_tag=tags[0], tags=tags)
    text = CARD.format(
        metadata=ModelCardData(license="other", **hub).to_yaml(), method=config.method, model=Path(config.model).name,
        data=Path(config.data).name, more=more, load=load, prompt=prompts[0], pipeline=pipeline, image=image,
        load_image=load_image,
        call=", ".join(f"{name}={value}" for name, value in call.items()),
    )  # fmt: skip
    (run.folder / "README.md").write_text(text, "utf-8")


def load_run(folder):
    """Run of a finished run's folder. Raises UserError."""
    folder = Path(os.path.expanduser(folder))
    refuse((not (folder / "config.json").exists(), f"run '{folder}': no config.json there; give the folder of a run"))
    config, file = load_config(folder / "config.json"), folder / "summary.json"
    refuse((not file.exists(), f"run '{folder}': not finished; go on with --{config.method} --resume --out {folder}"))
    refuse(*damage([file, *folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]))
    run = Run(folder, config, json.loads(file.read_text("utf-8")), read_metrics(folder / "metrics.jsonl"))
    refuse((0 < len(run.metrics) < run.summary.get("steps", 0), f"'{folder}/metrics.jsonl': lines lack; train anew"))
    return run


RETIRED = dict(max_update_rms=1.0, prior_share=0.5, ema_on_cpu=False)  # options of older runs, as they are fixed now


def load_config(path, **changes):
    """Config from a JSON or TOML file. Raises UserError."""
    return Config(**{**read_options(path), **changes})


def read_options(path):
    """Fields of Config by name, from a JSON or TOML file. Raises UserError."""
    path = Path(os.path.expanduser(path))
    try:
        text = path.read_text("utf-8-sig")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"configuration '{path}': cannot be read ({error})")
    refuse((not isinstance(values, dict), f"configuration '{path}': not a table of options"))
    types = {f.name: f.type for f in dataclasses.fields(Config)}
    values = {name: v for name, v in values.items() if v is not None and RETIRED.get(name, "") != v}
    for name, value in values.items():
        refuse((name not in types, f"configuration '{path}': unknown option {name}; see cogvideo_lite.py --help"))
        fits = isinstance(value, (int, float) if types[name] is float else types[name])
        fits = fits and isinstance(value, bool) == (types[name] is bool)
        fits = fits and (types[name] is not list or all(isinstance(part, str) for part in value))
        refuse((not fits, f"configuration '{path}': {name} is {value!r}, {types[name].__name__} needed"))
    return values


# ------------------------------------------------------------------------------------------------ merging and blending
def merge(run, out=None):
    """Add a run's adapter to the weights of its base, in the dtype of the base's files, and write the sum as
    `out`/transformer [RUN/merged], which stock diffusers loads. Returns `out`. Raises UserError."""
    from peft.tuners.lora import LoraLayer

    run = Path(os.path.expanduser(run))
    out = Path(os.path.expanduser(out)) if out else run / "merged"
    words = f"run '{run}': no pytorch_lora_weights.safetensors; only finished --lora and --qlora runs can be merged"
    refuse((not (run / "pytorch_lora_weights.safetensors").exists(), words))
    refuse_out(out)
    quiet_libraries()
    config = load_run(run).config
    base = find_base(config.model)
    transformer = base.load("transformer", dtype_on_disk(base.folder / "transformer"))
    add_trained_lora(transformer, config, run)
    with torch.no_grad():
        for layer in transformer.modules():
            if isinstance(layer, LoraLayer):  # peft's own merge would round the adapter's change before adding it
                weight = layer.get_base_layer().weight
                weight.copy_(weight.float() + layer.get_delta_weight("default").float())
    transformer.unload_lora()
    out.mkdir(parents=True, exist_ok=True)
    save_trained(transformer, "full", out)
    return out


def blend(run, share, out=None):
    """Go back from a finished run towards its base: base + share * (trained - base), in every weight, or in the adapter
    by its alpha. A share above 1 goes further on. Writes a run's folder [RUN/blend-SHARE] with samples of the same
    prompts and seeds, so that it can be sampled from, judged and compared. Returns Run. Raises UserError. Weights
    between base and tuned model often keep what both can do (arXiv 2109.01903)."""
    run, given = load_run(run), share
    with contextlib.suppress(ValueError):
        share = float(share)
    words = f"--blend {given}: must be a number above 0; 1 is the run, 0.5 halfway back to its base"
    refuse((not (isinstance(share, float) and 0 < share < math.inf), words))
    config, out = run.config, Path(os.path.expanduser(out)) if out else run.folder / f"blend-{share:g}"
    refuse_out(out)
    refuse(((out / "summary.json").exists(), f"--out '{out}': holds a finished run already; give another folder"))
    quiet_libraries()
    base, prompts = find_base(config.model), sampled_prompts(run.folder)
    prompts = prompts or validation_prompts(config, split_clips(config)[1])  # an older run
    images = [run.folder / f"samples/first-{k}.png" for k in range(len(prompts) * base.image_to_video)]
    for image in images:
        read_image(image, config.height, config.width)  # one that is gone is told before anything is written
    if config.method == "full":
        transformer = base.load("transformer", torch.float32)
        tuned = base.cls("transformer").from_pretrained(run.folder / "transformer", dtype=trained_dtype(config))
        with torch.no_grad():
            for p, other in zip(transformer.parameters(), tuned.parameters()):
                p.lerp_(other.float(), share)
        transformer = transformer.to(trained_dtype(config))
    else:
        transformer = base.load("transformer", frozen_dtype(base, torch.float32))
        config.alpha = config.alpha * share
        add_trained_lora(transformer, config, run.folder)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    save_trained(transformer, config.method, out)
    write_json(out / "config.json", dataclasses.asdict(config))
    summary = {"blend_of": str(run.folder.resolve()), "blend_share": share, "steps": run.summary["steps"]}
    write_json(out / "summary.json", summary)  # with it, `sample` takes the folder for a run's
    write_json(out / "samples/prompts.json", {prompt: portable(real) for prompt, real in prompts.items()})
    for file in (file for when in ("before", "again", "first") for file in run.folder.glob(f"samples/{when}-*.*")):
        shutil.copy(file, out / "samples")
    save_samples(out / "samples", "after", sample(out, prompts, seed=0, images=images), config.fps)
    return Run(out, config, summary, [])


# -------------------------------------------------------------------------------------------------------- command line

ACTIONS = {
    "lora": dict(action="store_const", const="lora", dest="method", help="train low-rank adapters"),
    "qlora": dict(action="store_const", const="qlora", dest="method", help="the same on a base kept in 4 bits"),
    "full": dict(action="store_const", const="full", dest="method", help="train all weights"),
    "sample": dict(nargs="+", metavar="PROMPT", help="generate clips, from --run or from --model alone"),
    "merge": dict(metavar="RUN", help="write the base with a run's adapter added to its weights"),
    "blend": dict(nargs=2, metavar=("RUN", "SHARE"), help="base + SHARE x (trained - base): go back from a run"),
    "judge": dict(metavar="RUN", help="judge the samples of a finished run (again)"),
    "compare": dict(nargs="+", metavar="RUN", help="one HTML page that puts finished runs side by side"),
}
EXTRAS = {
    "run": dict(help="folder of a finished run, for --sample"),
    "image": dict(nargs="+", metavar="FILE", help="for --sample: the picture to begin with, one or one per prompt"),
    "check": dict(action="store_true", help="say what in the clips is likely to harm, write check.html, and stop"),
    "plan": dict(action="store_true", help="with --lora, --qlora or --full: predict memory and time, and stop"),
    "vram": dict(type=float, metavar="GIB", help="with --plan: memory that the run must fit in [the card's; 24]"),
    "processes": dict(type=int, metavar="N", help="with --plan: torchrun's processes, each with a card of its own [1]"),
    "card": dict(metavar="NAME", help="with --plan: a card's memory and speed, as of 'RTX 4090'; others list all"),
    "config": dict(help="JSON or TOML file of options, such as a run's config.json; the command line wins over it"),
}
SAMPLING = "out model seed frames height width fps sampling_steps guidance_scale compute_dtype".split()
FIXED = "model rank alpha lora_targets seed frames height width fps batch_size optimizer trained_dtype ema".split()


def parser():
    """The command line, made from the fields of Config."""
    how = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out = argparse.ArgumentParser(prog="cogvideo_lite.py", **how)
    out.error = lambda message: refuse((True, f"{message}; see python cogvideo_lite.py --help"))
    group = out.add_argument_group("what to do").add_mutually_exclusive_group()
    for name, how in ACTIONS.items():
        group.add_argument(f"--{name}", **how)
    for name, how in EXTRAS.items():
        out.add_argument(f"--{name}", **how)
    for f in dataclasses.fields(Config)[1:]:  # all but the method
        help = f.metadata["help"] if f.default in (None, False) else f"{f.metadata['help']} [{f.default}]"
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        else:
            kind, many = (str, {"nargs": "+"}) if f.type is list else (f.type, {})
            many |= dict(nargs="?", const=f.metadata["const"]) if "const" in f.metadata else {}
            how = dict(type=kind, choices=f.metadata.get("choices"), metavar=kind.__name__.upper(), **many)
        out.add_argument(flag(f.name), default=argparse.SUPPRESS, help=help, **how)
    return out


def command_line(argv):
    """Do what the command line says. Raises UserError or RunError."""
    given = vars(parser().parse_args(argv))
    todo = {name: given.pop(name) for name in ("method", *list(ACTIONS)[3:], *EXTRAS)}
    method, file = todo["method"], todo["config"]
    actions = [name for name in ("method", *list(ACTIONS)[3:]) if todo[name]]
    of_plan = [todo[name] for name in ("vram", "card", "processes") if todo[name] is not None]
    refuse(
        (not actions and not todo["check"], f"one of --{', --'.join(ACTIONS)} or --check is required; see --help"),
        (todo["check"] and todo["plan"], "--check and --plan: one at a time"),
        (todo["check"] and actions not in ([], ["method"]), "--check: alone, or with --lora, --qlora or --full"),
        (todo["plan"] and not method, "--plan: goes with --lora, --qlora or --full"),
        (of_plan and not todo["plan"], "--vram, --card and --processes: only with --plan"),
        (file and not (method or todo["check"]), "--config: goes with --lora, --qlora, --full or --check"),
        (todo["run"] and not todo["sample"], "--run: only for --sample; a run is continued with --resume --out RUN"),
        (todo["image"] and not todo["sample"], "--image: only for --sample; training takes each clip's first frame"),
    )
    for action in list(ACTIONS)[3:]:
        other = min(set(given) - set({"sample": SAMPLING, "judge": []}.get(action, ["out"])), default=None)
        refuse((todo[action] and other, f"{flag(other or '')}: not for --{action}; see python cogvideo_lite.py --help"))
    out = given.get("out")
    if todo["check"]:
        load_instrument("check").check_command(method, given, file)
    elif todo["sample"]:
        sample_command(todo["sample"], todo["run"], todo["image"], given)
    elif todo["merge"]:
        out = merge(todo["merge"], out)
        report("judge", lambda judge: judge.merging_report(todo["merge"], out))
        print(f"transformer in {out / 'transformer'}")
    elif todo["compare"]:
        print(f"comparison in {load_instrument('compare').compare(todo['compare'], out)}")
    elif todo["judge"]:
        print(f"judged {judged(load_run(todo['judge']))}")
    elif todo["blend"]:
        print(f"blend in {judged(blend(*todo['blend'], out))}")
    else:
        config = configured(method, given, file)
        if todo["plan"]:
            load_instrument("plan").plan_command(config, todo["vram"], todo["card"], todo["processes"])
            return
        report("check", lambda check: check.warnings(config))
        if run := train(config):
            print(f"results in {judged(run)}")


def configured(method, given, file):
    """Config of a run from the command line, over a file of options, over the run that it goes on with."""
    options = {**(read_options(file) if file else {}), **given, "method": method}
    config = Config(**options)
    saved = run_folder(config) / "config.json" if config.resume else None
    if not (saved and saved.exists()):
        return config
    before = load_config(saved)  # what is left out stays as it was
    words = f"the run in {saved.parent} was started with --{before.method}; start a new one"
    refuse((before.method != method, f"--{method}: {words}"))
    for name in FIXED:
        old, new = getattr(before, name), options.get(name)
        new = portable(new) if new and name == "model" else new
        words = f"{flag(name)} {new}: this run was started with {old}; start a new one"
        refuse((new is not None and new != old, words))
    return load_config(saved, **{**options, "out": str(saved.parent)})


def report(name, lines):
    """Print what an instrument says, where it is at hand. lines: a function of its module that returns them."""
    try:
        instrument = load_instrument(name)
    except UserError as error:
        print(f"left out: {error}")
    else:
        print(*(f"{line}\n" for line in lines(instrument)), sep="", end="", flush=True)


def judged(run):
    """Print what came of a run or a blend, and have its samples judged. Returns the folder."""
    s = run.summary
    if "heldout_after" in s:
        change, cost = f"{s['heldout_before']:.4f} -> {s['heldout_after']:.4f}", f"peak {s['peak_memory_gib']:.1f} GiB"
        print(f"held-out loss {change} in {s['seconds']:.0f} s, {cost}")
    report("judge", lambda judge: judge.report(judge.judge(run.folder)))
    return run.folder


def sample_command(prompts, run, images, given):
    refuse((run and "model" in given, "--model: the run names its own; leave one of the two out"))
    run = run and str(load_run(run).folder)
    seed, source = given.pop("seed", 0), run or given.pop("model", Config.model)
    out = Path(os.path.expanduser(given.pop("out", None) or (Path(run) / "samples" if run else "samples")))
    refuse_out(out)
    clips = sample(source, prompts, seed=seed, images=images, **given)
    native = load_config(Path(run) / "config.json").fps if run else find_base(str(source)).fps
    out.mkdir(parents=True, exist_ok=True)
    for k, (prompt, clip) in enumerate(zip(prompts, clips)):
        slug = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "empty"
        path = out / f"{slug}-seed{seed + k}.mp4"
        write_video(path, clip, given.get("fps") or native)
        print(path)
    labels = [f"{prompt} (seed {seed + k})" for k, prompt in enumerate(prompts)]
    report("pictures", lambda pictures: [pictures.save_sheet(out / "sheet.png", clips, labels)])


def main(argv=None):
    """Returns the exit status: 0, 2 for bad input, 1 for a failure while running."""
    for stream in (s for s in (sys.stdout, sys.stderr) if hasattr(s, "reconfigure")):
        stream.reconfigure(errors="backslashreplace")  # a console that cannot show every letter
    status, wait_s = 1, 0
    if int(os.environ.get("RANK", 0)):  # of several processes the first speaks for all
        sys.stdout, wait_s = open(os.devnull, "w"), 3
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    try:
        command_line(argv)
        return 0
    except UserError as error:
        status, text = 2, str(error)
    except (RunError, OSError, MemoryError, torch.OutOfMemoryError, SafetensorError, UnicodeError) as error:
        text = str(error) or type(error).__name__
    except RuntimeError as error:
        if processes() == 1 or not re.search("(?i)gloo|nccl|connection", f"{type(error)} {error}"):
            raise
        text, wait_s = "another process has stopped", 6
    except KeyboardInterrupt:
        text = "stopped"
    time.sleep(wait_s)  # torchrun ends the others meanwhile: one line for what fails in all, or fails for one's failure
    print(f"cogvideo_lite: {text}", file=sys.stderr, flush=True)
    if processes() > 1:
        sys.stdout.flush()
        os._exit(status)  # without the seconds of a clean end, since others wait for it
    return status


if __name__ == "__main__":
    sys.exit(main())
