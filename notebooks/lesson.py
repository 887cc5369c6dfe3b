"""What only the notebooks need: pictures with a sentence under them, clips that play, training that is seen, sliders
that look up.

Every picture is PNG, animations too (APNG): GitHub, Jupyter, VS Code, Colab and nbconvert all show them. Everything
works for any model and any folder of clips; what needs the renderer of the bundled clips asks `has_truth` first.

Letters in shapes: F frames, C channels, H height, W width.
"""

import contextlib
import html
import io
import itertools
import json
import platform
import re
import shutil
import sys
import textwrap
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython.display import Image, Markdown, display
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data_samples"), str(ROOT / "notebooks")]

import cogvideo_lite as cl  # noqa: E402

judge = cl.load_instrument("judge")
pictures = cl.load_instrument("pictures")
cl.quiet_libraries()  # before anything imports bitsandbytes

from diffusers.pipelines import pipeline_utils  # noqa: E402
from diffusers.utils import logging as diffusers_logging  # noqa: E402

diffusers_logging.set_verbosity_error()  # a blend of --full casts its model, of which diffusers warns
pipeline_utils.tqdm = tqdm  # in a notebook it would be a widget, of which the saved notebook keeps a bar at 0 %

COLOURS = {"full": "tab:red", "lora": "tab:blue", "qlora": "tab:green", "base": "0.4"}  # of the methods, everywhere
MOST_FRAMES = 17  # of an animation: a clip of 49 would make the notebook too large to be shown on GitHub


def versions():
    """One line: what the lesson runs on."""
    import diffusers

    threads = torch.get_num_threads()
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    )
    return f"Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}, {device}"


def has_truth(data):
    """Whether the clips of a folder were drawn by data_samples/make_samples.py, which then knows mask and pose of every
    frame."""
    metadata = cl.resolve_path(data) / "metadata.jsonl"
    return metadata.exists() and "motion" in json.loads(metadata.read_text("utf-8").splitlines()[0])


def new_folder(name):
    """An empty folder below runs/lessons, which git ignores. What an earlier execution of the lesson left there is
    removed."""
    folder = ROOT / "runs/lessons" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return str(folder)


# ------------------------------------------------------------------------------------------------------------- pictures


def coarser(picture, step):
    """A PIL picture with each colour rounded to a multiple of `step`, which no eye sees up to 6, and which PNG
    compresses better."""
    values = np.asarray(picture.convert("RGB")).astype(np.int16)
    return Picture.fromarray(((values + step // 2) // step * step).clip(0, 255).astype(np.uint8))


def png(picture):
    """PNG bytes of a PIL picture or a matplotlib figure."""
    data = io.BytesIO()
    if isinstance(picture, plt.Figure):
        picture.savefig(data, format="png", dpi=90, bbox_inches="tight")
        plt.close(picture)  # or the inline backend shows it once more
        picture, data = Picture.open(data), io.BytesIO()
    coarser(picture, 4).save(data, format="png")
    return data.getvalue()


def show(picture, caption):
    """A matplotlib figure, a PIL picture or PNG bytes, and the sentence that describes it: its alt text, and shown
    below."""
    data = picture if isinstance(picture, bytes) else png(picture)
    display(Image(data, format="png", alt=html.escape(caption)))
    display(Markdown(f"*Figure: {caption}*"))


def resized(clip, px):
    """A clip (F, C, H, W) about `px` high: whole multiples of a small one, so that its pixels stay sharp, and a large
    one shrunk."""
    if clip.shape[2] <= px:
        return clip.repeat_interleave(px // clip.shape[2], 2).repeat_interleave(px // clip.shape[2], 3)
    return F.interpolate(clip, size=(px, round(clip.shape[3] * px / clip.shape[2])), mode="area")


def sheet(clips, labels, caption, columns=6, px=128):
    """Clips as rows of frames, a label above each: the still picture that stands before any animation."""
    show(pictures.contact_sheet([resized(clip, px) for clip in clips], labels, columns, least_px=1), caption)


def strip(frames, px):
    """Frames (C, H, W) side by side as one PIL picture."""
    row = torch.cat(list(resized(torch.stack(list(frames)), px)), dim=2)
    return pictures.to_image(row)


def side_by_side(columns, rows, caption, frames=2, px=128):
    """Clips as a table. columns: header -> a clip for each row; rows: their labels. Each cell shows a few frames."""
    chosen = lambda clip: clip[torch.linspace(0, len(clip) - 1, frames).round().long()]  # noqa: E731
    strips = [[strip(chosen(clip), px) for clip in clips] for clips in columns.values()]
    width, height = strips[0][0].size
    picture = Picture.new("RGB", (len(columns) * (width + 8) - 8, 18 + len(rows) * (height + 18)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for x, (header, cells) in enumerate(zip(columns, strips)):
        draw.text((x * (width + 8) + width / 2, 1), header, fill="black", font=font, anchor="ma")
        for y, (label, cell) in enumerate(zip(rows, cells)):
            top = 18 + y * (height + 18)
            picture.paste(cell, (x * (width + 8), top + 18))
            if x == 0:
                draw.text((2, top + 1), label, fill="dimgray", font=font)
    show(picture, caption)


def stacked(rows):
    """PIL pictures of one width, one above the other."""
    return Picture.fromarray(np.concatenate([np.asarray(row) for row in rows]))


def animation(clips, labels, fps, per_row=4, px=128):
    """APNG bytes: clips in step, a label above each."""
    step = -(-len(clips[0]) // MOST_FRAMES)
    clips = [resized(clip[::step], px) for clip in clips]
    labels = [textwrap.wrap(label, clips[0].shape[3] // 6) for label in labels]  # letters are about 6 px wide
    head = 4 + 12 * max(map(len, labels))
    height, width = clips[0].shape[2] + head, clips[0].shape[3] + 4
    columns = min(per_row, len(clips))
    frames = []
    for k in range(len(clips[0])):
        picture = Picture.new("RGB", (columns * width, -(-len(clips) // columns) * height), "white")
        draw = ImageDraw.Draw(picture)
        for i, (clip, lines) in enumerate(zip(clips, labels)):
            x, y = i % columns * width, i // columns * height
            draw.multiline_text((x + 2, y + 1), "\n".join(lines), fill="black", spacing=1)
            picture.paste(pictures.to_image(clip[k]), (x, y + head))
        frames.append(coarser(picture, 6))
    data = io.BytesIO()
    how = dict(duration=round(1000 * step / fps), loop=0)
    frames[0].save(data, format="png", save_all=True, append_images=frames[1:], **how)
    return data.getvalue()


def player(clips, labels, caption, fps=8, per_row=4, px=128):
    """Clips that play in step, over and over."""
    show(animation(clips, labels, fps, per_row, px), caption)


def step_axis(ax, ticks):
    """Steps on a logarithmic axis, in front of which there is room for step 0 if it is among the ticks."""
    if 0 in ticks:
        ax.set_xscale("symlog", linthresh=min(filter(None, ticks)))
    else:
        ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel("step")


# ---------------------------------------------------------------------------------------------------------- long work


class Bars(io.TextIOBase):
    """Takes what tqdm writes to stderr and shows the newest bar in one line that changes in place. The rest is passed
    on."""

    encoding = "utf-8"  # tqdm draws smooth bars then

    def __init__(self, stderr):
        self.stderr, self.shown, self.started = stderr, 0.0, time.perf_counter()
        self.handle = display({"text/plain": "starting"}, raw=True, display_id=True)

    def write(self, text):
        now, line = time.perf_counter(), text.strip()
        if text.startswith("\r") and line and now - self.shown > 0.5:
            self.handle.update({"text/plain": line}, raw=True)
            self.shown = now
        elif not text.startswith("\r") and line:
            self.stderr.write(text)
        return len(text)

    def done(self):
        self.handle.update({"text/plain": f"done in {time.perf_counter() - self.started:.0f} s"}, raw=True)


class WithoutPaths(io.TextIOBase):
    """Passes text on with paths below this repository made relative, so that a notebook looks the same on every
    machine."""

    encoding = "utf-8"

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        self.stream.write(text.replace(f"{ROOT}/", ""))
        return len(text)


@contextlib.contextmanager
def progress():
    """Progress bars of what runs inside become one line that changes in place, and ends as the time taken."""
    bars = Bars(sys.stderr)
    with contextlib.redirect_stderr(bars), contextlib.redirect_stdout(WithoutPaths(sys.stdout)):
        yield
    bars.done()


class LossCurve:
    """A callback for `cl.train` that redraws the loss every other second, in place."""

    def __init__(self, config, label):
        self.config, self.label, self.metrics, self.drawn = config, label, [], 0.0
        self.handle = display({"text/plain": ""}, raw=True, display_id=True)
        self.told = display(Markdown(""), display_id=True)

    def __call__(self, metrics):
        self.metrics.append(metrics)
        if time.perf_counter() - self.drawn > 2:
            self.draw()

    def draw(self, caption=None):
        steps, losses = [m["step"] for m in self.metrics], [m["loss"] for m in self.metrics]
        heldout = [(m["step"], m["heldout_loss"]) for m in self.metrics if "heldout_loss" in m]
        heldout = [(0, m["heldout_before"]) for m in self.metrics[:1] if "heldout_before" in m] + heldout
        width = max(1, len(losses) // 10)
        means = [cl.mean(losses[max(0, i - width) : i + 1]) for i in range(len(losses))]
        figure, axes = plt.subplots(figsize=(7, 2.6))
        axes.plot(steps, losses, color="0.8", label="batch")
        axes.plot(steps, means, color=COLOURS[self.config.method], label=f"mean of the last {width + 1}")
        if heldout:
            axes.plot(*zip(*heldout), "ko-", label="held-out")
        axes.set(xlabel="step", ylabel="loss", xlim=(0, self.config.steps), title=self.label)
        axes.legend()
        caption = caption or f"loss of {self.label} so far."
        self.handle.update(Image(png(figure), format="png", alt=html.escape(caption)))
        self.told.update(Markdown(f"*Figure: {caption}*"))
        self.drawn = time.perf_counter()


def train(config, label=None, judged=True):
    """`cl.train`, seen: what the program decides and why, a line of progress, a loss curve that grows. Then its samples
    are judged, as the command line does, unless there is no time for it. Returns the run."""
    resolved = cl.resolve(config)[0]
    curve = LossCurve(resolved, label or f"--{resolved.method}, learning rate {resolved.lr:g}")
    with progress():
        run = cl.train(config, callbacks=[curve])
        run = judge.judge(run.folder) if judged else run
    s = run.summary
    caption = (
        f"loss of {curve.label} over {s['steps']} steps (seed {resolved.seed}, batches of {resolved.batch_size}); "
        f"on held-out clips, at fixed timesteps and under fixed noise, {s['heldout_before']:.4f} before and "
        f"{s['heldout_after']:.4f} after."
    )
    curve.draw(caption)
    for line in judge.verdict(s):
        print(line)
    return run


def samples(run, when):
    """What a judged run sampled: prompt -> clip. when: "before" or "after"."""
    rows = json.loads((run.folder / "samples/distortion.json").read_text("utf-8"))
    return {row["prompt"]: cl.read_video(run.folder / f"samples/{when}-{k}.mp4") for k, row in enumerate(rows)}


@dataclass
class ShortRun:
    """A training without samples and files: the trainer with its model, one dict of metrics a step, and the held-out
    losses."""

    trainer: object
    metrics: list
    heldout_before: float
    heldout_after: float


def new_trainer(config):
    """The `cl.Trainer` that `cl.train` would make of a configuration."""
    from accelerate import Accelerator

    cl.quiet_libraries()
    config, base, _ = cl.resolve(config)
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    dtype, _ = cl.choose_compute_dtype(accelerator.device, base, config.compute_dtype)
    config.compute_dtype = str(dtype).removeprefix("torch.")
    return cl.Trainer(config, base, cl.cache_clips(config, accelerator.device), accelerator)


def short_run(config, each=None, clips=None):
    """The steps of `cl.train`, without samples, checkpoints and files, so that many runs fit in a lesson. `each` is
    called with the trainer and the metrics after every step. clips: how many held-out clips the losses are of [as many
    as in `cl.train`, which takes as long as a dozen steps]."""
    trainer = new_trainer(config)
    heldout = trainer.cache.heldout[:clips]
    before, metrics = trainer.heldout_loss(heldout), []
    for step in range(trainer.config.steps):
        metrics.append(trainer.step(step))
        if each:
            each(trainer, metrics[-1])
    return ShortRun(trainer, metrics, before, trainer.heldout_loss(heldout))


def save_run(trainer, name):
    """What `cl.sample` and `cl.merge` read of a finished run, for a model that was trained here step by step. Returns
    its folder."""
    folder = Path(new_folder(name))
    cl.save_trained(trainer.transformer, trainer.config.method, folder)
    cl.write_json(folder / "config.json", asdict(trainer.config))
    cl.write_json(folder / "summary.json", {"steps": trainer.updates.step_number + 1})
    return folder


class PeakMemory(TorchDispatchMode):
    """Peak of the memory that tensors made inside hold at once, in MiB, on any device: every new storage is counted
    until it is freed. Weights that were there before are not in it."""

    def __enter__(self):
        self.live, self.now, self.peak = set(), 0, 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage(), known)
        return out

    def count(self, storage, known):
        key, size = storage._cdata, storage.nbytes()
        if key in self.live or key in known:
            return
        self.live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key, size):
        self.live.discard(key)
        self.now -= size

    @property
    def mib(self):
        return self.peak / 2**20


# -------------------------------------------------------------------------------------------------------------- sliders


class Dashboard(widgets.VBox):
    """Sliders over results that are there already: it looks up, and never trains.

    choices: label -> list of values, one control each. pages: (value, value, ...) in that order -> (PNG bytes, a
    sentence).
    """

    def __init__(self, choices, pages):
        absent = [key for key in itertools.product(*choices.values()) if key not in pages]
        if absent:
            raise ValueError(f"no picture for {absent[0]}, and {len(absent) - 1} more")
        self.pages, self.controls = pages, []
        for label, values in choices.items():
            how = dict(options=[(str(v), v) for v in values], description=label, style={"description_width": "initial"})
            numbers = all(isinstance(v, (int, float)) for v in values)
            control = widgets.SelectionSlider(**how) if numbers else widgets.ToggleButtons(**how)
            control.observe(self.look_up, names="value")
            self.controls.append(control)
        self.picture, self.sentence = widgets.Image(format="png"), widgets.HTML()
        super().__init__([*self.controls, self.picture, self.sentence])
        self.look_up()

    def look_up(self, change=None):
        data, sentence = self.pages[tuple(control.value for control in self.controls)]
        self.picture.value, self.sentence.value = data, html.escape(sentence)

    def __repr__(self):  # what stands in the saved notebook
        return "Sliders appear here while the notebook runs."


# ------------------------------------------------------------------------------------------------------------- numbers


def table(rows, head):
    """Rows as a Markdown table; numbers as they are given, so round them as far as they are known."""
    line = lambda cells: "| " + " | ".join(re.sub(r"\|", r"\\|", str(c)) for c in cells) + " |"  # noqa: E731
    display(Markdown("\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])))


def answers(*questions, about=""):
    """What the study says to its questions of these numbers, as a table, and how such a table is read. about: a regular
    expression that is found in the claims to show."""
    import findings

    rows = [row for row in findings.verdict_rows(questions) if re.search(about, row["claim"])]
    table([[row[name] for name in findings.ANSWER_COLUMNS] for row in rows], findings.ANSWER_COLUMNS)
    display(Markdown(
        "*Differences are taken seed by seed; a plus speaks for the claim. ± is half of the 95 % interval of their "
        "mean (Student's t), n the number of seeds. Confirmed or refuted: the interval leaves out 0. Cannot tell: it "
        "does not, which three seeds often cannot help; there may still be a difference. Put: before the seeds were "
        "seen, or after a look at them, so that the claim asks for new ones. Where seeds 5 to 7, run when every claim "
        "stood, can try it again, the last column has what they say alone.*"
    ))  # fmt: skip
