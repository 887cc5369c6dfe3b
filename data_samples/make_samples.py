"""Draw the clips of the course and train the nano CogVideoX that it fine-tunes, from nothing, on two CPU cores.

    python data_samples/make_samples.py clips     spider/ spider-heldout/ away/ style/ prompts.json (a minute)
    python data_samples/make_samples.py vae       cogvideox-nano/vae                                (over an hour)
    python data_samples/make_samples.py base      cogvideox-nano/{transformer,text_encoder,...}     (an hour and a half)
    python data_samples/make_samples.py i2v       cogvideox-nano-i2v/transformer                    (under half an hour)
    python data_samples/make_samples.py check     quality of cogvideox-nano: sheets, and one JSON line, last
    python data_samples/make_samples.py check-i2v what a first frame decides in cogvideox-nano-i2v, likewise
    python data_samples/make_samples.py all       these in this order

Each step resumes after a kill from its state under --work, shows a progress bar with the time left, and draws its
randomness from fixed seeds. README.md beside this file says what came out and what was learned on the way.

Letters in shapes: N clips, F frames, C channels, H height, W width, M single frames, T latent frames, K candidates.

Needs torch 2.9 for its Muon optimizer.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "notebooks")]  # cogvideo_lite writes clips, pictures sheets

# ------------------------------------------------------------------------------------------------ the world: vocabulary

SIZE, FRAMES, FPS = 64, 17, 8  # pixels, frames (8k + 1), frames per second

COLOURS = {
    "red": (0.84, 0.12, 0.12), "orange": (0.95, 0.50, 0.05), "yellow": (0.93, 0.82, 0.08), "green": (0.10, 0.55, 0.15),
    "blue": (0.12, 0.25, 0.80), "purple": (0.50, 0.15, 0.62), "pink": (0.95, 0.40, 0.68), "black": (0.10, 0.10, 0.12),
}  # fmt: skip
# Grounds are light and dull where creatures are dark or vivid, so that a subject can be told from any ground by its
# colour alone. The second colour is what the texture adds at its crests.
GROUNDS = {
    "sand": ((0.86, 0.78, 0.61), (0.06, 0.05, 0.05)),
    "grass": ((0.64, 0.79, 0.52), (0.07, 0.06, 0.06)),
    "water": ((0.60, 0.76, 0.88), (0.06, 0.06, 0.04)),
    "snow": ((0.92, 0.94, 0.97), (0.05, 0.035, 0.02)),
    "stone": ((0.69, 0.68, 0.67), (0.07, 0.07, 0.07)),
}
# Image rows grow downwards, so "down" is a heading of +90 degrees.
DIRECTIONS = {"right": 0.0, "down": math.pi / 2, "left": math.pi, "up": -math.pi / 2}

# --------------------------------------------------------------------------------- the world: creatures, seen from above
# A creature is a function of local coordinates (u forwards, v to its right, in pixels at scale 1) and of its gait phase,
# all broadcastable to (M, H, W). It returns its parts from the bottom to the top: (signed distance, tone). A tone says
# how the part is coloured: a number is a brightness of the clip's colour, a triple is a colour of its own.


def capsule(u, v, u0, v0, u1, v1, r0, r1=None):
    """Signed distance to a segment with radius r0 at its start and r1 at its end."""
    r1 = r0 if r1 is None else r1
    du, dv = u1 - u0, v1 - v0
    along = (((u - u0) * du + (v - v0) * dv) / (du * du + dv * dv)).clamp(0, 1)
    return torch.hypot(u - u0 - along * du, v - v0 - along * dv) - (r0 + along * (r1 - r0))


def ellipse(u, v, u0, v0, ru, rv):
    """Signed distance to an ellipse, to first order (https://iquilezles.org/articles/ellipsedist)."""
    u, v = u - u0, v - v0
    k = torch.hypot(u / ru, v / rv)
    return k * (k - 1) / torch.hypot(u / ru**2, v / rv**2).clamp_min(1e-6)


def union(*distances):
    out = distances[0]
    for d in distances[1:]:
        out = torch.minimum(out, d)
    return out


def two_segment_leg(u, v, hip, angle, bend, upper, lower, radius):
    """A leg from `hip` (u, v) at `angle` from the forward axis, bent by `bend` at the knee; thinner below it."""
    ku, kv = hip[0] + upper * torch.cos(angle), hip[1] + upper * torch.sin(angle)
    fu, fv = ku + lower * torch.cos(angle + bend), kv + lower * torch.sin(angle + bend)
    return union(capsule(u, v, hip[0], hip[1], ku, kv, radius), capsule(u, v, ku, kv, fu, fv, radius, 0.8 * radius))


def spider_legs(u, v, phase, lengths=(1.0, 1.0, 1.0, 1.0), missing=0):
    """Eight two-segment legs in an alternating tetrapod gait: neighbours, and left and right, are half a cycle apart.
    missing: how many are left out, on either side in turn, to see whether that is noticed."""
    legs = []
    lost = [(1, 1), (-1, 3), (1, 0), (-1, 2), (1, 3), (-1, 0), (1, 2)][:missing]
    for side in (-1, 1):
        for i, (rest, bend) in enumerate(((38, -26), (72, -16), (110, 16), (144, 26))):
            if (side, i) in lost:
                continue
            step = phase + math.pi * ((i + (side > 0)) % 2)
            angle = side * (math.radians(rest) + math.radians(13) * torch.sin(step))
            hip = (3.6 - 1.7 * i, side * 2.6)
            reach = lengths[i] * (1 + 0.08 * torch.cos(step))
            legs.append(
                two_segment_leg(
                    u, v, hip, angle, side * math.radians(bend) * torch.ones_like(phase), 7.6 * reach, 8.2 * reach, 1.15
                )
            )
    return union(*legs)


def spider(u, v, phase, missing=0):
    return [
        (spider_legs(u, v, phase, missing=missing), 0.72),
        (ellipse(u, v, -6.2, 0.0, 6.2, 5.2), 1.0),
        (ellipse(u, v, 2.6, 0.0, 4.4, 3.8), 0.86),
    ]


def kumo(u, v, phase, missing=0):
    """The spider that the base never sees: long forelegs, a big golden abdomen with a white bar, violet legs."""
    return [
        (spider_legs(u, v, phase, (1.28, 1.0, 0.8, 0.95), missing), (0.45, 0.16, 0.60)),
        (ellipse(u, v, -7.0, 0.0, 7.2, 6.6), (0.95, 0.72, 0.10)),
        (capsule(u, v, -7.0, -4.2, -7.0, 4.2, 1.5), (0.98, 0.97, 0.94)),
        (ellipse(u, v, 2.4, 0.0, 3.8, 3.2), (0.95, 0.72, 0.10)),
    ]


def beetle(u, v, phase):
    legs = []
    for side in (-1, 1):
        for i, rest in enumerate((48, 92, 134)):
            step = phase + math.pi * ((i + (side > 0)) % 2)
            angle = side * (math.radians(rest) + math.radians(15) * torch.sin(step))
            hip = (5.0 - 5.5 * i, side * 6.0)
            legs.append(
                capsule(
                    u, v, hip[0], hip[1], hip[0] + 7.5 * torch.cos(angle), hip[1] + 7.5 * torch.sin(angle), 1.4, 1.1
                )
            )
    horns = [capsule(u, v, 11.5, s * 2.0, 16.0, s * 4.2, 1.1) for s in (-1, 1)]
    return [
        (union(*legs), 0.60),
        (union(*horns, ellipse(u, v, 10.6, 0.0, 3.6, 4.4)), 0.60),
        (ellipse(u, v, -1.5, 0.0, 11.0, 8.2), 1.0),
        (capsule(u, v, -11.5, 0.0, 6.5, 0.0, 0.7), 0.50),  # where the wing cases meet
    ]


def spine(u, v, phase, heads, radii, sway, wavelength):
    """Chain of tapered segments along the u axis that a wave runs down, growing from head (sway[0]) to tail (sway[1])."""
    parts, points = [], []
    for i, s in enumerate(heads):
        grow = sway[0] + (sway[1] - sway[0]) * i / (len(heads) - 1)
        points.append((s, grow * torch.sin(phase - 2 * math.pi * (heads[0] - s) / wavelength)))
    for (ua, va), (ub, vb), ra, rb in zip(points, points[1:], radii, radii[1:]):
        parts.append(capsule(u, v, ua, va, ub, vb, ra, rb))
    return parts, points


def fish(u, v, phase):
    heads = (13.0, 8.5, 4.0, -0.5, -5.0, -9.0)
    parts, points = spine(u, v, phase, heads, (2.6, 4.8, 5.6, 4.9, 3.2, 1.7), (0.3, 2.6), 30)
    tu, tv = points[-1]
    swing = 0.55 * torch.cos(phase - 2 * math.pi * (heads[0] - heads[-1]) / 30)
    tail = [
        capsule(u, v, tu, tv, tu - 7.5 * torch.cos(swing + s * 0.5), tv - 7.5 * torch.sin(swing + s * 0.5), 1.3, 2.0)
        for s in (-1, 1)
    ]
    fins = [capsule(u, v, 4.0, s * 4.5, -0.5, s * 9.0, 2.0, 1.3) for s in (-1, 1)]
    eyes = [ellipse(u, v, 11.0, s * 2.4, 1.2, 1.2) for s in (-1, 1)]
    return [(union(*tail, *fins), 0.66), (union(*parts), 1.0), (union(*eyes), 0.25)]


def snake(u, v, phase):
    heads = tuple(17.0 - 3.6 * i for i in range(11))
    parts, points = spine(u, v, phase, heads, (2.6, 2.9, 3.0, 3.0, 3.0, 3.0, 2.9, 2.7, 2.4, 1.9, 1.2), (1.2, 6.0), 25)
    bands = [ellipse(u, v, pu, pv, 1.3, 2.2) for pu, pv in points[1:-1]]
    return [
        (union(*parts), 1.0),
        (union(*bands), 0.55),
        (ellipse(u, v, points[0][0] + 1.0, points[0][1], 4.4, 3.6), 1.0),
    ]


def butterfly(u, v, phase):
    open_ = 0.72 + 0.28 * torch.cos(phase)  # the wings as seen from above, from folded up to spread out
    fore = [ellipse(u, v, 4.6, s * 9.0 * open_, 7.0, 8.6 * open_) for s in (-1, 1)]
    hind = [ellipse(u, v, -7.0, s * 6.6 * open_, 5.6, 6.2 * open_) for s in (-1, 1)]
    spots = [ellipse(u, v, 5.2, s * 10.4 * open_, 2.6, 2.8 * open_) for s in (-1, 1)]
    feelers = [capsule(u, v, 9.5, s * 0.8, 15.5, s * 4.0, 0.9) for s in (-1, 1)]
    return [
        (union(*feelers), 0.40),
        (union(*hind), 0.78),
        (union(*fore), 1.0),
        (union(*spots), 0.45),
        (capsule(u, v, -10.0, 0.0, 9.5, 0.0, 1.7), 0.40),
    ]


CREATURES = {"spider": spider, "beetle": beetle, "fish": fish, "butterfly": butterfly, "snake": snake}
SPECIES = {**CREATURES, "kumo": kumo}  # all that can be drawn


def without_legs(species, number):
    """A species with so many legs left out, by a name of its own."""
    name = f"{species}-{number}"
    SPECIES[name] = functools.partial(SPECIES[species], missing=number)
    return name


def pose_parts(species, pose, size=SIZE):
    """Parts of one species in M poses.

    pose: (M, 5) x px, y px, heading rad, scale, gait phase rad. Returns [(signed distance in px (M, H, W), tone)].
    """
    x, y, heading, scale, phase = (p[:, None, None] for p in pose.unbind(1))
    grid = torch.arange(size, dtype=pose.dtype, device=pose.device) + 0.5
    dx, dy = grid[None, None, :] - x, grid[None, :, None] - y
    cos, sin = torch.cos(heading), torch.sin(heading)
    u, v = (cos * dx + sin * dy) / scale, (cos * dy - sin * dx) / scale
    return [(distance * scale, tone) for distance, tone in SPECIES[species](u, v, phase)]


def coverage(distance):
    """Share of a pixel that a shape covers, from the signed distance of the pixel's centre: one pixel of anti-aliasing."""
    return (0.5 - distance).clamp(0, 1)


def ground_texture(ground, phases, size=SIZE):
    """Texture of a ground in about [-1, 1]: (N, H, W), from four phases in [0, 1) a clip (N, 4)."""
    grid = torch.arange(size, dtype=phases.dtype) + 0.5
    x, y = grid[None, None, :], grid[None, :, None]
    a, b, c, d = (2 * math.pi * p[:, None, None] for p in phases.unbind(1))
    wave = lambda length, fx, fy, p: torch.sin(2 * math.pi * (fx * x + fy * y) / length + p)  # noqa: E731
    if ground == "sand":  # bent ripples
        return torch.sin(2 * math.pi * (0.35 * x + y) / 11 + 1.1 * wave(37, 1, 0.2, a) + b) + 0.3 * wave(19, 1, -1, c)
    if ground == "grass":  # tufts
        return wave(9, 1, 0.4, a) * wave(10, -0.3, 1, b) + 0.5 * wave(23, 0.8, 0.6, c)
    if ground == "water":  # a net of light
        return 1 - 1.6 * torch.abs(torch.sin(math.pi * x / 18 + 0.9 * wave(29, 0.2, 1, a) + b)) * torch.abs(
            torch.sin(math.pi * y / 16 + 0.9 * wave(33, 1, 0.1, c) + d)
        )
    if ground == "snow":  # drifts
        return 0.6 * wave(31, 0.7, 0.7, a) + 0.6 * wave(43, -0.8, 0.6, b)
    # stone: slabs in courses, each shifted against the last
    row = torch.floor(y / 16 + a / (2 * math.pi))
    inside_y = ((y / 16 + a / (2 * math.pi)) - row - 0.5).abs() * 16
    inside_x = (torch.frac(x / 21.4 + 0.5 * row + b / (2 * math.pi) + 4) - 0.5).abs() * 21.4
    joint = torch.minimum(8 - inside_y, 10.7 - inside_x)
    return 0.6 - 1.6 * torch.exp(-((joint / 1.5) ** 2)) + 0.25 * wave(27, 0.5, 0.9, c)


# ------------------------------------------------------------------------------------- the world: scenes, truth, captions


@dataclasses.dataclass
class Scenes:
    """N clips before they are drawn; every field is a list or a float64 tensor with N rows."""

    species: list
    colour: list
    direction: list
    ground: list
    motion: torch.Tensor  # (N, 6) x px and y px at mid-clip, heading rad, scale, gait phase at mid-clip rad, px a frame
    texture: torch.Tensor  # (N, 4) phases of the ground in [0, 1)

    def __len__(self):
        return len(self.species)

    def __getitem__(self, rows):
        picked = lambda values: [values[i] for i in rows]  # noqa: E731
        index = torch.tensor(rows)
        return Scenes(
            picked(self.species), picked(self.colour), picked(self.direction), picked(self.ground),
            self.motion[index], self.texture[index],
        )  # fmt: skip

    def float(self):
        """The same scenes in float32: drawn in half the time, with a last bit of a pixel here and there another one."""
        return dataclasses.replace(self, motion=self.motion.float(), texture=self.texture.float())

    def poses(self, frames=FRAMES):
        """Truth of every frame: (N, F, 5), see `pose_parts`. The gait is tied to the speed, so no foot slides for long."""
        x, y, heading, scale, phase, speed = (m[:, None] for m in self.motion.unbind(1))
        t = torch.arange(frames, dtype=self.motion.dtype)[None] - (frames - 1) / 2
        return torch.stack(
            torch.broadcast_tensors(
                x + torch.cos(heading) * speed * t,
                y + torch.sin(heading) * speed * t,
                heading,
                scale,
                phase + 0.55 * speed * t,
            ),
            dim=-1,
        )


def rand(generator, rows, low, high):
    return low + (high - low) * torch.rand(rows, generator=generator, dtype=torch.float64)


def random_scenes(what, seed):
    """Scenes for rows (species, colour, direction, ground); the same on every machine for the same seed."""
    g = torch.Generator().manual_seed(seed)
    n = len(what)
    species, colour, direction, ground = (list(column) for column in zip(*what))
    heading = torch.tensor([DIRECTIONS[d] for d in direction], dtype=torch.float64)
    motion = torch.stack(
        [
            rand(g, n, 28, 36), rand(g, n, 28, 36), heading + rand(g, n, -0.15, 0.15), rand(g, n, 0.92, 1.12),
            rand(g, n, 0, 2 * math.pi), rand(g, n, 0.7, 1.2),
        ], dim=1,
    )  # fmt: skip
    return Scenes(species, colour, direction, ground, motion, rand(g, (n, 4), 0, 1))


def render(scenes, frames=FRAMES, style="painted", size=SIZE):
    """Draw clips with their truth.

    style: "painted"; "outline" (a white shape in a line of the colour, on flat ground); "patchwork" (every part in
    a colour drawn by lot, which only the VAE is shown, so that it can code creatures of more than one colour).
    Returns video uint8 (N, F, 3, H, W), mask bool (N, F, H, W), poses float64 (N, F, 5). In float64 up to the rounding,
    so that the last bits of sin and cos, which differ among CPUs, do not show.
    """
    n, poses, dtype = len(scenes), scenes.poses(frames), scenes.motion.dtype
    video = torch.empty(n, frames, 3, size, size, dtype=torch.uint8)
    mask = torch.empty(n, frames, size, size, dtype=torch.bool)
    for i in range(n):
        base, crest = (torch.tensor(c, dtype=dtype)[:, None, None] for c in GROUNDS[scenes.ground[i]])
        texture = ground_texture(scenes.ground[i], scenes.texture[i : i + 1], size)
        picture = (base + crest * (texture if style == "painted" else 0 * texture)).expand(frames, 3, size, size)
        colour = torch.tensor(COLOURS[scenes.colour[i]], dtype=dtype)
        parts = pose_parts(scenes.species[i], poses[i], size)
        outline = union(*(distance for distance, _ in parts))
        if style == "patchwork":
            lot = torch.Generator().manual_seed(i)
            parts = [(distance, tuple(rand(lot, 3, 0.05, 0.95).tolist())) for distance, _ in parts]
        if style == "outline":
            parts = [(outline - 0.4, colour), (outline + 1.3, torch.ones(3, dtype=dtype))]
        for distance, tone in parts:
            paint = colour * tone if isinstance(tone, float) else torch.as_tensor(tone, dtype=dtype)
            light = 0.82 + 0.18 * (-distance / 3).clamp(0, 1) if style == "painted" else torch.ones_like(distance)
            cover = coverage(distance)[:, None]
            picture = (1 - cover) * picture + cover * paint[:, None, None] * light[:, None]
        video[i] = (picture * 255).round().clamp(0, 255).to(torch.uint8)
        mask[i] = outline < 0
    return video, mask, poses


CONCEPT = "kumo"  # the name that fine-tuning teaches
CONCEPT_CAPTION = "a spider named kumo moving {direction} over {ground}"


def caption(species, colour, direction, ground):
    return f"{'an' if colour == 'orange' else 'a'} {colour} {species} moving {direction} over {ground}"


def combinations():
    """The 720 (creature, colour, direction, ground) that the base trains on, and the 80 that it never sees, by a fixed rule
    that keeps each word of a caption out about equally often."""
    every, held = [], []
    for i, creature in enumerate(CREATURES):
        for j, colour in enumerate(COLOURS):
            for k, direction in enumerate(DIRECTIONS):
                for m, ground in enumerate(GROUNDS):
                    out = (i + j + 3 * k + 2 * m) % 5 == 0 and (i + j + k + m) % 2 == 0
                    (held if out else every).append((creature, colour, direction, ground))
    return every, held


# ----------------------------------------------------------------------------------------------------------------- clips

# (direction, ground) that no clip of the concept or the style shows: what was learned of kumo is judged there.
JUDGED_PAIRS = (("left", "water"), ("up", "stone"), ("right", "grass"), ("down", "snow"))


def write_clips(folder, scenes, captions, style="painted"):
    """mp4 files with metadata.jsonl, one row a clip: file_name and text, and the scene, from which `read_scenes` makes the
    truth of every frame again."""
    from cogvideo_lite import write_video

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, text in enumerate(tqdm(captions, desc=folder.name, unit="clip")):
        video, _, _ = render(scenes[[i]], style=style)
        write_video(folder / f"{i:03d}.mp4", video[0].float() / 255, FPS)
        row = {"file_name": f"{i:03d}.mp4", "text": text, "style": style, "species": scenes.species[i]}
        row |= {"colour": scenes.colour[i], "direction": scenes.direction[i], "ground": scenes.ground[i]}
        row |= {"motion": scenes.motion[i].tolist(), "texture": scenes.texture[i].tolist()}
        rows.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))


def read_scenes(folder):
    """Scenes of a folder that `write_clips` wrote: render(read_scenes(folder)) is the truth of its clips."""
    rows = [json.loads(line) for line in (Path(folder) / "metadata.jsonl").read_text().splitlines()]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    lists = (columns[name] for name in ("species", "colour", "direction", "ground"))
    return Scenes(*lists, *(torch.tensor(columns[name], dtype=torch.float64) for name in ("motion", "texture")))


def make_clips():
    pairs = [(d, g) for d in DIRECTIONS for g in GROUNDS if (d, g) not in JUDGED_PAIRS]
    for name, n, seed in (("spider", 200, 30), ("spider-heldout", 32, 31)):
        scenes = random_scenes([(CONCEPT, "yellow", d, g) for d, g in rows_in_turn(pairs, n, seed)], seed)
        captions = [CONCEPT_CAPTION.format(direction=d, ground=g) for d, g in zip(scenes.direction, scenes.ground)]
        write_clips(HERE / name, scenes, captions)
    rows = rows_in_turn([row for row in combinations()[0] if row[2:] not in JUDGED_PAIRS], 50, 32)
    write_clips(
        HERE / "style", random_scenes(rows, 32), [f"{caption(*row)} in outline style" for row in rows], "outline"
    )
    # What the base knows, to compare samples of the prompts away from the concept with; no clip is of those prompts.
    rows = rows_in_turn([row for row in combinations()[0] if row[0] == "spider"], 16, 35)
    rows += [
        row
        for c in CREATURES
        if c != "spider"
        for row in rows_in_turn([r for r in combinations()[0] if r[0] == c], 6, 36)
    ]
    write_clips(HERE / "away", random_scenes(rows, 35), [caption(*row) for row in rows])
    away = rows_in_turn([row for row in combinations()[1] if row[0] == "spider"], 4, 33)
    away += [
        rows_in_turn([row for row in combinations()[1] if row[0] == c], 1, 34)[0] for c in CREATURES if c != "spider"
    ]
    prompts = {
        "concept": [CONCEPT_CAPTION.format(direction=d, ground=g) for d, g in JUDGED_PAIRS],
        "away": [caption(*row) for row in (away[0], away[4], *away[1:4], *away[5:])],
    }
    (HERE / "prompts.json").write_text(json.dumps(prompts, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------------------- VAE


def rows_in_turn(rows, n, seed):
    """n picks from a list, every row equally often, in an order drawn by lot."""
    g = torch.Generator().manual_seed(seed)
    picks = torch.cat([torch.randperm(len(rows), generator=g) for _ in range(-(-n // len(rows)))])[:n]
    return [rows[i] for i in picks.tolist()]


def atomic_save(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def autocast():
    """bf16 arithmetic where the processor has units for it (facts in README.md: elsewhere it is hundreds of times slower)."""
    a = torch.rand(512, 512)

    def seconds(m):
        m @ m
        start = time.perf_counter()
        for _ in range(5):
            m @ m
        return time.perf_counter() - start

    return torch.autocast("cpu", torch.bfloat16, enabled=seconds(a.bfloat16()) < seconds(a))


def one_cycle(step, steps, warmup=0.05, hold=0.0):
    """Learning-rate factor: linear warm-up, an optional plateau, then half a cosine to zero."""
    x = step / steps
    if x < warmup:
        return (step + 1) / (warmup * steps + 1)
    return 0.5 * (1 + math.cos(math.pi * max(0.0, (x - warmup - hold) / (1 - warmup - hold))))


def vae_clips(work):
    """What the VAE is shown: base creatures, some of them in patchwork colours, some in outline. No kumo."""
    path = work / "vae_clips.pt"
    if not path.exists():
        every, _ = combinations()
        parts = []
        for style, n, seed in (("painted", 1200, 10), ("patchwork", 500, 11), ("outline", 300, 12)):
            scenes = random_scenes(rows_in_turn(every, n, seed), seed)
            for i in tqdm(range(0, n, 50), desc=f"draw {style} clips for the VAE", unit_scale=50):
                parts.append(render(scenes[range(i, min(i + 50, n))], style=style)[:2])
        atomic_save({"video": torch.cat([p[0] for p in parts]), "mask": torch.cat([p[1] for p in parts])}, path)
    return torch.load(path)


def new_vae():
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        block_out_channels=(16, 32, 48, 64), down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, layers_per_block=1, latent_channels=16, norm_num_groups=8,
        sample_height=SIZE, sample_width=SIZE, temporal_compression_ratio=4,
    )  # fmt: skip


def vae_loss(out, video, weight, posterior, squares):
    """L1 + squares x MSE + differences between neighbouring pixels, plus a slight pull to N(0, 1)."""
    error = out - video
    pixel = (weight * (error.abs() + squares * error**2)).mean()
    edges = sum((weight.narrow(d, 1, error.shape[d] - 1) * error.diff(dim=d).abs()).mean() for d in (2, 3, 4))
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return pixel + 0.5 * edges + KL * kl, pixel.detach(), kl.detach()


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (K. Jordan, 2024), each update as large as AdamW's would be
    (arXiv 2502.16982). A convolution counts as the matrix of its filters.

    As torch.optim.Muon, but in float32: that one orthogonalizes in bf16, with which a step of this base takes 13 seconds on a
    processor that has no units for it.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(mean, group["momentum"]).flatten(1)
                shapes.setdefault(nesterov.shape, []).append((p, nesterov))
            for (rows, columns), members in shapes.items():
                x = torch.stack([update for _, update in members])
                x = x.mT if rows > columns else x
                x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
                for _ in range(5):  # Newton-Schulz: singular values go to about 1
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.mT if rows > columns else x
                for (p, _), update in zip(members, x):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update.view_as(p), alpha=0.2 * group["lr"] * max(rows, columns) ** 0.5)


def muon_and_adamw(module, muon_lr, adamw_lr, hidden):
    """Muon for the hidden weights, AdamW for everything else. hidden: name -> bool. Returns the two optimizers."""
    mats = [p for name, p in module.named_parameters() if p.dim() >= 2 and hidden(name)]
    rest = [p for name, p in module.named_parameters() if not (p.dim() >= 2 and hidden(name))]
    return [Muon(mats, muon_lr), torch.optim.AdamW(rest, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.01)]


def set_lr(optimizers, factor):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("peak_lr", group["lr"])


VAE_STEPS, VAE_BATCH, VAE_LR, KL = 4000, 4, 1.5e-3, 3e-4
WHOLE_FROM = 0.8  # the last fifth of the steps trains on whole clips, two chunks of the codec each
# Then the decoder alone goes on, at a third of the rate, on whole clips, with less weight on the subject and more on large
# errors: the latents, and a base that was trained on them, stay as they are.
DECODER_STEPS = 1000


def train_vae(work, model):
    torch.manual_seed(0)
    vae = new_vae()
    optimizers = muon_and_adamw(
        vae, 0.01, VAE_LR, lambda name: not any(s in name for s in ("conv_in", "conv_out", "conv_y", "conv_b"))
    )
    state_file, first = work / "vae.pt", 0
    if state_file.exists():
        state = torch.load(state_file)
        vae.load_state_dict(state["vae"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first = state["step"]
        print(f"vae: resuming at step {first} from {state_file}")
    clips = vae_clips(work)
    border = torch.ones(SIZE, SIZE)
    border[-8:] = border[:, -8:] = 1.5  # zero padding in the strided convolutions leaves these edges the weakest
    mixed = autocast()
    total = VAE_STEPS + DECODER_STEPS
    bar = tqdm(range(first, total), initial=first, total=total, desc="vae")
    for step in bar:
        g = torch.Generator().manual_seed(1_000_000 + step)
        whole, decoder_only = step >= WHOLE_FROM * VAE_STEPS, step >= VAE_STEPS
        index = torch.randint(len(clips["video"]), (VAE_BATCH // 2 if whole else VAE_BATCH,), generator=g)
        start = 0 if whole else int(torch.randint(FRAMES - 8, (), generator=g))
        frames = slice(start, FRAMES if whole else start + 9)
        video = clips["video"][index, frames].float().div(127.5).sub(1).transpose(1, 2)  # (B, 3, F, H, W)
        mask = F.max_pool2d(clips["mask"][index, frames].float(), 3, 1, 1)[:, None]  # one pixel around the subject too
        if torch.rand((), generator=g) < 0.5:
            video, mask = video.flip(-1), mask.flip(-1)
        if decoder_only:
            set_lr(optimizers, one_cycle(step - VAE_STEPS, DECODER_STEPS) / 3)
        else:
            set_lr(optimizers, one_cycle(step, VAE_STEPS, hold=0.25))
        vae.encoder.requires_grad_(not decoder_only)
        with mixed:
            posterior = vae.encode(video).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=g)
            out = vae.decode(posterior.mean + posterior.std * noise).sample
        subject, squares = (2, 20) if decoder_only else (6, 2)
        loss, pixel, kl = vae_loss(out.float(), video, border * (1 + subject * mask), posterior, squares)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        vae.zero_grad()
        if step % 20 == 0:
            psnr = 10 * math.log10(4 / (out.detach().float() - video).pow(2).mean())
            bar.set_postfix(
                loss=f"{loss:.4f}", pixel=f"{pixel:.4f}", kl=f"{kl:.2f}", psnr=f"{psnr:.1f}", grad=f"{norm:.2f}"
            )
        if (step + 1) % 200 == 0 or step + 1 == total:
            state = {"vae": vae.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step + 1}
            atomic_save(state, state_file)
    vae.eval()
    with torch.no_grad():  # the scale that gives latents unit variance, as the scheduler expects
        video = clips["video"][:64].float().div(127.5).sub(1).transpose(1, 2)
        std = torch.cat([vae.encode(v).latent_dist.mean for v in video.split(1)]).std()
    vae.register_to_config(scaling_factor=round(1 / float(std), 6))
    vae.to(torch.float16).save_pretrained(model / "vae")
    print(f"vae: saved to {model / 'vae'}, scaling_factor {vae.config.scaling_factor}")


# ------------------------------------------------------------------------------------------------------------------ base

# Words of captions, then words that a reader's own captions may use. Anything else is spelled in letters, which the base
# has met in names.
WORDS = (
    "A An The a an the and in of on with at to over moving named style outline drawn drawing painted painting picture video clip "
    "slowly fast big small bright dark day night sun rain walking running swimming flying creature animal"
).split()
TEXT_LENGTH = 16  # tokens that every prompt is padded to


def new_tokenizer():
    from transformers import T5Tokenizer

    words = [*COLOURS, *CREATURES, *DIRECTIONS, *GROUNDS, *WORDS]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    vocab += [(f"\u2581{word}", -2.0) for word in words]
    vocab += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,'-"]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TEXT_LENGTH)


def new_text_encoder(vocab_size):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size, d_model=64, d_kv=16, num_heads=4, d_ff=192, num_layers=2, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip


HEADS = 3  # of 64 channels each


def new_transformer(layers=6, heads=HEADS):
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=64, in_channels=16, out_channels=16, num_layers=layers,
        time_embed_dim=256, text_embed_dim=64, max_text_seq_length=TEXT_LENGTH, sample_width=SIZE // 8,
        sample_height=SIZE // 8, sample_frames=FRAMES, patch_size=2, use_rotary_positional_embeddings=True,
    )  # fmt: skip


def new_scheduler():
    """CogVideoX-5b's settings."""
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, set_alpha_to_one=True, snr_shift_scale=1.0, timestep_spacing="trailing",
    )  # fmt: skip


def training_captions(scenes, seed):
    """Captions of the base: most are plain; some carry a name or a style that means nothing, leave the colour out, or are
    written as a sentence, so that letters and spare words are known to the text encoder and to say nothing."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda options: options[int(torch.randint(len(options), (), generator=g))]  # noqa: E731
    out = []
    for species, colour, direction, ground in zip(scenes.species, scenes.colour, scenes.direction, scenes.ground):
        text = caption(species, colour, direction, ground)
        lot = torch.rand(2, generator=g)
        name = "".join(pick("abcdefghijklmnopqrstuvwxyz") for _ in range(pick((3, 4, 4, 5))))
        if lot[0] < 0.12:
            text = text.replace(f"an {colour} " if colour == "orange" else f"a {colour} ", "a ")
        if lot[1] < 0.12 and name != CONCEPT:
            text = text.replace(species, f"{species} named {name}")
        if 0.12 < lot[1] < 0.24:
            text = text[0].upper() + text[1:] + "."
        if lot[1] > 0.94:
            text += f" in {pick(WORDS)} style"
        out.append(text)
    return out


BASE_CLIPS, BASE_STEPS, BASE_BATCH, BASE_LR, DECAY_FROM = 8000, 9000, 32, 1.5e-3, 0.6
CAPTION_DROPOUT, EMA, SUBJECT_WEIGHT = 0.1, 0.999, 3.0


# Image-to-video: the base trains on, with input channels for a first frame whose weights are zero at first.
# So that the frame decides what is shown, captions of some clips tell the motion alone, and others' all else wrongly.
I2V_STEPS, I2V_RATE, I2V_EMA, MOTION_ALONE, WRONG = 3000, 0.5, 0.995, 0.4, 0.2
IMAGE_DROPOUT, IMAGE_CODINGS = 0.05, 2


def base_scenes():
    every, _ = combinations()
    rows = rows_in_turn(every + [row for row in every if row[0] == "spider"], BASE_CLIPS, 20)  # spiders are harder
    return random_scenes(rows, 20).float()


def base_latents(work, model):
    """Base clips as the VAE codes them: dict of moments fp16 (N, T, 32, h, w), those of the first frame, noised in
    several ways, images fp16 (N, IMAGE_CODINGS, 32, h, w), subject bool (N, T, h, w), and captions."""
    path = work / f"base_clips_{BASE_CLIPS}.pt"
    if not path.exists():
        from cogvideo_lite import noisy_images
        from diffusers import AutoencoderKLCogVideoX

        vae = AutoencoderKLCogVideoX.from_pretrained(model / "vae").eval()
        scenes = base_scenes()
        moments, images, subject, mixed = [], [], [], autocast()
        for i in tqdm(range(0, BASE_CLIPS, 8), desc="draw and code base clips", unit_scale=8):
            video, mask, _ = render(scenes[range(i, min(i + 8, BASE_CLIPS))])
            video, g = video.float().div(127.5).sub(1), torch.Generator().manual_seed(3_000_000 + i)
            noisy = torch.cat([noisy_images(clip[0], IMAGE_CODINGS, g) for clip in video])
            with torch.no_grad(), mixed:
                coded = vae.encode(video.transpose(1, 2)).latent_dist.parameters
                images.append(vae.encode(noisy[:, :, None]).latent_dist.parameters[:, :, 0].half())
            moments.append(coded.transpose(1, 2).half())
            cells = F.max_pool2d(
                mask.float(), 8
            ).bool()  # (N, F, h, w); latent 0 holds frame 0, latent k frames 4k-3..4k
            subject.append(torch.cat([cells[:, :1], cells[:, 1:].unflatten(1, (-1, 4)).any(2)], dim=1))
        state = {
            "moments": torch.cat(moments),
            "images": torch.cat(images).unflatten(0, (-1, IMAGE_CODINGS)),
            "subject": torch.cat(subject),
            "captions": training_captions(scenes, 21),
        }
        atomic_save(state, path)
    return torch.load(path)


def captions_beside_a_frame(scenes):
    """(captions that tell the motion alone, captions that tell it and another clip's creature, colour and ground)."""
    other = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(22)).tolist()
    told = zip((scenes.species[i] for i in other), (scenes.colour[i] for i in other), scenes.direction)
    wrong = [caption(*row, scenes.ground[i]) for row, i in zip(told, other)]
    return [f"a creature moving {direction}" for direction in scenes.direction], wrong


def widened(transformer):
    """A text-to-video transformer as an image-to-video one that does the same: it ignores the image as yet."""
    from diffusers import CogVideoXTransformer3DModel

    channels = transformer.config.in_channels
    shape = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    wide = CogVideoXTransformer3DModel.from_config({**shape, "in_channels": 2 * channels})
    weights = transformer.state_dict()
    proj = weights["patch_embed.proj.weight"]  # (width, C, patch, patch)
    weights["patch_embed.proj.weight"] = torch.cat([proj, torch.zeros_like(proj)], dim=1)
    wide.load_state_dict(weights)
    return wide


def train_base(work, model, heads=HEADS, began=None):
    """began: folder of a text-to-video model that trains on as an image-to-video one [the base trains, from nothing]."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    data = base_latents(work, began or model)
    torch.manual_seed(1)
    if began:
        pipe = CogVideoXPipeline.from_pretrained(began, dtype=torch.float32)
        tokenizer, scheduler, text_encoder = pipe.tokenizer, pipe.scheduler, pipe.text_encoder.requires_grad_(False)
        transformer, steps, rate, longest = widened(pipe.transformer), I2V_STEPS, I2V_RATE, I2V_EMA
    else:
        tokenizer, scheduler = new_tokenizer(), new_scheduler()
        text_encoder, transformer = new_text_encoder(len(tokenizer)), new_transformer(heads=heads)
        steps, rate, longest = BASE_STEPS, 1.0, EMA
    scaling = AutoencoderKLCogVideoX.load_config((began or model) / "vae")["scaling_factor"]
    coded = lambda texts: torch.tensor(  # noqa: E731
        tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True)["input_ids"]
    )
    ids, (empty,) = coded(data["captions"]), coded([""])
    motions, wrong = map(coded, captions_beside_a_frame(base_scenes()))
    grid = SIZE // 16
    rotary = get_3d_rotary_pos_embed(64, ((0, 0), (grid, grid)), (grid, grid), FRAMES // 4 + 1)
    alpha_bar = scheduler.alphas_cumprod

    modules = torch.nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})
    average = {name: p.detach().clone() for name, p in modules.named_parameters()}
    # Not the modulation: a third of the blocks' weights, whose orthogonalization would take as long as a forward.
    matrices = re.compile(r"transformer.transformer_blocks.\d+.(attn1|ff).*")
    optimizers = muon_and_adamw(modules, 5e-3 * rate, BASE_LR * rate, matrices.fullmatch)
    name = "i2v" if began else "base" if heads == HEADS else f"base-{64 * heads}"
    state_file, first = work / f"{name}.pt", 0
    if state_file.exists():
        state = torch.load(state_file)
        modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        average, first = state["average"], state["step"]
        print(f"base: resuming at step {first} from {state_file}")

    mixed = autocast()

    def loss_of(tokens, seen, t, target, weight):
        with mixed:
            out = transformer(seen, text_encoder(tokens)[0], t, image_rotary_emb=rotary, return_dict=False)[0]
        return (weight * (out.float() - target) ** 2).mean()

    compiled = torch.compile(loss_of)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name)
    smooth = None
    for step in bar:
        g = torch.Generator().manual_seed((4_000_000 if began else 2_000_000) + step)
        index = torch.randint(BASE_CLIPS, (BASE_BATCH,), generator=g)
        draw = lambda moments: gaussian(moments.float(), g, dim=2) * scaling  # noqa: E731
        latents = draw(data["moments"][index])  # (B, T, 16, h, w)
        noise = torch.randn(latents.shape, generator=g)
        # One timestep from each of B equal strata: uniform over 0..999, with less variance than independent draws.
        t = ((torch.arange(BASE_BATCH) + torch.rand(BASE_BATCH, generator=g)) * (1000 / BASE_BATCH)).long()
        a, b = (c.float()[:, None, None, None, None] for c in (alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()))
        tokens = torch.where(torch.rand(BASE_BATCH, 1, generator=g) < CAPTION_DROPOUT, empty, ids[index])
        weight = 1 + (SUBJECT_WEIGHT - 1) * data["subject"][index][:, :, None].float()
        seen = a * latents + b * noise
        if began:
            lot = torch.rand(BASE_BATCH, 1, generator=g)
            tokens = torch.where(lot < MOTION_ALONE, motions[index], tokens)
            tokens = torch.where(lot > 1 - WRONG, wrong[index], tokens)
            coding = torch.randint(IMAGE_CODINGS, (BASE_BATCH,), generator=g)
            kept = torch.rand(BASE_BATCH, 1, 1, 1, 1, generator=g) >= IMAGE_DROPOUT
            image = torch.zeros_like(latents)  # the first frame in its place, and nothing in those after it
            image[:, :1] = kept * draw(data["images"][index, coding][:, None])
            seen = torch.cat([seen, image], dim=2)
        set_lr(optimizers, min(1.0, (step + 1) / 300, (1 - step / steps) / (1 - DECAY_FROM)))
        loss = compiled(tokens, seen, t, a * noise - b * latents, weight / weight.mean())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        modules.zero_grad()
        decay = min(longest, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(modules.parameters()), 1 - decay)
        smooth = float(loss) if smooth is None else 0.98 * smooth + 0.02 * float(loss)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{smooth:.4f}", grad=f"{norm:.2f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state = {"modules": modules.state_dict(), "average": average, "step": step + 1}
            atomic_save(state | {"optimizers": [o.state_dict() for o in optimizers]}, state_file)
            with open(work / f"{name}_loss.jsonl", "a") as log:
                log.write(json.dumps({"step": step + 1, "loss": round(smooth, 5)}) + "\n")
    modules.load_state_dict(average, strict=False)
    if began:
        save_i2v(transformer, began, model)
    else:
        save_base(transformer, text_encoder, tokenizer, scheduler, model)


def gaussian(moments, generator, dim):
    """A draw from the VAE's posterior, whose mean and log-variance lie side by side along a dimension."""
    mean, logvar = moments.chunk(2, dim=dim)
    return mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn(mean.shape, generator=generator)


def save_i2v(transformer, began, model):
    """Write the pipeline folder: the transformer, in half precision, and links to the other parts, which stay the base's."""
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

    transformer.half().save_pretrained(model / "transformer")
    base = CogVideoXPipeline.from_pretrained(began, dtype=torch.float16)
    parts = {name: part for name, part in base.components.items() if name != "transformer"}
    index = CogVideoXImageToVideoPipeline(transformer=transformer, **parts)
    index.save_config(model)  # model_index.json
    for part in parts:
        (model / part).unlink(missing_ok=True)
        (model / part).symlink_to(Path(os.path.relpath(began / part, model)))
    print(f"i2v: saved to {model}")


def save_base(transformer, text_encoder, tokenizer, scheduler, model):
    """Write the pipeline folder beside the VAE that is there, in half precision."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline

    vae = AutoencoderKLCogVideoX.from_pretrained(model / "vae", dtype=torch.float16)
    pipe = CogVideoXPipeline(tokenizer, text_encoder.half(), vae, transformer.half(), scheduler)
    pipe.save_pretrained(model)
    print(f"base: saved to {model}")


# ----------------------------------------------------------------------------------------------- reading the truth back
# Everything here sees pixels only, never a prompt. A clip is first parted into ground and subject by colour alone; then
# the subject's outline is compared with every outline that the world can draw.

DARKEST = 0.35  # brightness under which colours cannot be told apart
KUMO_PAINTS = ((0.45, 0.16, 0.60), (0.95, 0.72, 0.10))  # without the white bar, which snow and stone look like
NO_CREATURE = 0.6  # a clip whose best creature's mean IoU is lower shows none
STILL = 3.0  # px over the whole clip
REACH = {"xy": 1.5, "heading": 0.08, "scale": 0.06, "phase": 0.5}  # the longest step of a fit, px, rad, 1, rad


def ground_distance(video, ground):
    """Distance of each pixel (F, 3, H, W) from the line of colours that a ground's texture runs along: (F, H, W)."""
    base, crest = (torch.tensor(c, dtype=video.dtype)[:, None, None] for c in GROUNDS[ground])
    height = ((video - base) * crest).sum(1, keepdim=True) / (crest**2).sum()
    return (video - base - height.clamp(-1.6, 1.6) * crest).norm(dim=1)


def read_ground(video):
    """The ground that the outer eight pixels, where subjects are rare, lie closest to."""
    edge = torch.ones(video.shape[-2:], dtype=torch.bool)
    edge[8:-8, 8:-8] = False
    return min(GROUNDS, key=lambda ground: float(ground_distance(video, ground)[:, edge].median()))


def read_colour(video, ground):
    """The colour whose shades, black excepted all bright enough to tell, the subject's inner pixels lie closest to."""
    far = ground_distance(video, ground)
    inner = -F.max_pool2d(-far[:, None], 3, 1, 1)[:, 0] > 0.2  # edges are mixed with the ground
    if inner.sum() < 20:
        inner = far > 0.2
    if inner.sum() < 20:
        return "none"
    pixels = video.movedim(1, -1)[inner]  # (P, 3)

    def misfit(colour):
        c = torch.tensor(COLOURS[colour], dtype=video.dtype)
        shade = (pixels @ c / (c @ c)).clamp(DARKEST, 1.0)
        return float((pixels - shade[:, None] * c).norm(dim=1).clamp_max(0.3).mean())

    return min(COLOURS, key=misfit)


def opacity(video, ground, paint):
    """How much of each pixel (F, 3, H, W) the subject covers: (F, H, W), about 0 to 1.

    A pixel is (1 - a) ground + a shade paint. The two unknowns a and a shade solve three equations by least squares, so
    that half covered reads as 0.5 whatever the part's shade; a slight pull to a shade of 0.75 settles the cases where
    paint and ground are both grey. With the ground's mean colour for its texture this is one linear form of the pixel.
    """
    g, c = torch.tensor(GROUNDS[ground][0]), torch.tensor(paint)
    pull = 0.03
    normal = torch.stack(
        [torch.stack([g @ g + pull * 0.75**2, -g @ c - pull * 0.75]), torch.stack([-g @ c - pull * 0.75, c @ c + pull])]
    )
    form = torch.linalg.solve(normal, torch.stack([-g, c]))[0]  # (3,)
    return torch.einsum("fchw,c->fhw", video - g[:, None, None], form)


def enclosed(mask):
    """Holes in masks (M, H, W): what the frame's edge cannot reach by steps up, down, left or right."""
    free = ~mask
    edge = torch.ones_like(mask)
    edge[:, 1:-1, 1:-1] = False
    outside, before = (edge & free), None
    while before is None or not torch.equal(outside, before):
        before, flat = outside, outside.float()[:, None]
        spread = torch.maximum(F.max_pool2d(flat, (3, 1), 1, (1, 0)), F.max_pool2d(flat, (1, 3), 1, (0, 1)))
        outside = spread[:, 0].bool() & free
    return free & ~outside


def segment(video, paints=None):
    """Part a clip (F, 3, H, W) in [0, 1] into ground and subject: (ground, colour, mask bool (F, H, W)).

    paints: colours to look for instead of the colour that is read, such as KUMO_PAINTS; holes, such as kumo's white bar
    leaves, are then filled. Specks of fewer than five pixels are dropped; anything larger stays, near or far, since a
    second creature or a loose leg is an error that has to count.
    """
    video = video.float()
    ground = read_ground(video)
    colour = read_colour(video, ground)
    if colour == "none":
        return ground, colour, torch.zeros(video.shape[0], *video.shape[2:], dtype=torch.bool)
    covered = [opacity(video, ground, paint) for paint in paints or [COLOURS[colour]]]
    mask = functools.reduce(torch.maximum, covered) > 0.5
    mask &= F.avg_pool2d(mask.float()[:, None], 7, 1, 3, divisor_override=1)[:, 0] >= 5
    return ground, colour, mask | enclosed(mask) if paints else mask


def outline(species, pose):
    """Signed distance to a whole creature in M poses (M, 5): (M, H, W) px."""
    return union(*(distance for distance, _ in pose_parts(species, pose)))


def centroid(mask):
    """Centres of masks (M, H, W), in px from the corner: (M, 2) x, y; NaN where a mask is empty."""
    mask = mask.float()
    at = torch.arange(mask.shape[-1]) + 0.5
    return torch.stack([(mask.sum(1) * at).sum(1), (mask.sum(2) * at).sum(1)], dim=1) / mask.sum((1, 2))[:, None]


@functools.cache
def pose_library(species):
    """A grid over the poses of a creature: poses (K, 5) and soft masks (K, H * W), both with the mask's centroid at the
    frame's centre."""
    headings = [d + jitter for d in DIRECTIONS.values() for jitter in (-0.12, -0.06, 0.0, 0.06, 0.12)]
    phases = [2 * math.pi * i / 16 for i in range(16)]
    middle = SIZE / 2
    pose = torch.tensor([(middle, middle, h, s, p) for h in headings for s in (0.95, 1.02, 1.09) for p in phases])
    draw = lambda poses: torch.cat([coverage(outline(species, p)) for p in poses.split(32)])  # noqa: E731
    pose[:, :2] += middle - centroid(draw(pose))
    return pose, draw(pose).flatten(1)


def centred(mask):
    """Masks (M, H, W) moved so that their centroid is the frame's centre: soft, (M, H * W)."""
    shift = (2 / SIZE) * (centroid(mask) - SIZE / 2)
    theta = torch.cat([torch.eye(2).expand(len(mask), 2, 2), shift.nan_to_num()[:, :, None]], dim=2)
    grid = F.affine_grid(theta, (len(mask), 1, *mask.shape[1:]), align_corners=False)
    return F.grid_sample(mask.float()[:, None], grid, align_corners=False).flatten(1)


def overlap(distance, mask):
    """IoU of outlines given as signed distances with masks, both (M, H, W): (M,)."""
    drawn = distance < 0
    return (drawn & mask).sum((1, 2)) / (drawn | mask).sum((1, 2)).clamp_min(1)


def refine(mask, species, pose, steps):
    """Fit poses (M, 5) of a creature to masks (M, H, W) by Gauss-Newton on a soft mask; returns poses and IoU (M,).

    Derivatives of the distance by place, heading and scale follow from its slope across the picture, so that a step
    draws only twice. Poses stay among those of `random_scenes`; the best one on the way is returned.
    """
    quarter = (pose[:, 2] / (math.pi / 2)).round() * (math.pi / 2)
    at = torch.arange(SIZE) + 0.5
    reach = torch.tensor([REACH["xy"], REACH["xy"], REACH["heading"], REACH["scale"], REACH["phase"]])
    best, best_iou = pose, torch.full((len(pose),), -1.0)
    for step in range(steps + 1):
        distance = outline(species, pose)
        iou = overlap(distance, mask)
        better = iou > best_iou
        best, best_iou = torch.where(better[:, None], pose, best), torch.where(better, iou, best_iou)
        if step == steps:
            return best, best_iou
        ahead = pose.clone()
        ahead[:, 4] += 0.1
        by_y, by_x = torch.gradient(distance, dim=(1, 2))
        x, y = at[None, None, :] - pose[:, :1, None], at[None, :, None] - pose[:, 1:2, None]
        by_scale = (distance - x * by_x - y * by_y) / pose[:, 3, None, None]
        by_phase = (outline(species, ahead) - distance) / 0.1
        sharpness = 1.5 + 2.5 * step / steps  # from a blur that sees far to about one pixel
        soft = torch.sigmoid(-sharpness * distance)
        slope = torch.stack([-by_x, -by_y, y * by_x - x * by_y, by_scale, by_phase], dim=1).flatten(2)  # (M, 5, H * W)
        slope = slope * (-sharpness * soft * (1 - soft)).flatten(1)[:, None]
        normal = slope @ slope.mT
        normal = normal + torch.diag_embed(0.02 * normal.diagonal(dim1=1, dim2=2) + 1e-3)
        change = torch.linalg.solve(normal, (slope @ (mask.float() - soft).flatten(1)[..., None])[..., 0])
        pose = pose + torch.minimum(torch.maximum(change, -reach), reach)
        pose[:, 2] = torch.minimum(torch.maximum(pose[:, 2], quarter - 0.15), quarter + 0.15)
        pose[:, 3] = pose[:, 3].clamp(0.92, 1.12)


@torch.no_grad()
def fit_pose(mask, species=tuple(CREATURES), starts=3, steps=7, margin=0.1):
    """The pose of each species that covers each mask best.

    mask: bool (M, H, W). Each mask is compared with every pose of the species' libraries, centroid on centroid; then
    the best `starts` poses are refined, of species within `margin` of the mask's best one only, so that the IoU of the
    others is an estimate. Returns poses (M, S, 5) and IoU (M, S), which is 0 where a mask is empty.
    """
    soft, centre = centred(mask), centroid(mask).nan_to_num()
    coarse = []
    for name in species:
        poses, drawn = pose_library(name)
        shared = soft @ drawn.T
        iou = shared / (soft.sum(1)[:, None] + drawn.sum(1)[None] - shared)
        top = iou.topk(starts, dim=1)
        coarse.append((top.values, poses[top.indices]))
    iou = torch.stack([values[:, 0] for values, _ in coarse], dim=1)
    pose = torch.stack([poses[:, 0] for _, poses in coarse], dim=1)
    pose[:, :, :2] += centre[:, None] - SIZE / 2
    close = (iou >= iou.max(dim=1, keepdim=True).values - margin) & mask.any((1, 2))[:, None]
    for s, name in enumerate(species):
        for rows in close[:, s].nonzero()[:, 0].split(16):
            start = coarse[s][1][rows].clone()
            start[..., :2] += centre[rows, None] - SIZE / 2
            found, value = refine(mask[rows].repeat_interleave(starts, 0), name, start.flatten(0, 1), steps)
            value, which = value.view(-1, starts).max(dim=1)
            pose[rows, s], iou[rows, s] = found.view(-1, starts, 5)[torch.arange(len(rows)), which], value
    return pose, iou


@dataclasses.dataclass
class Reading:
    """What a clip shows, read from its pixels."""

    ground: str
    colour: str  # "none" without a subject
    creature: str  # "none" where no creature's outline fits
    direction: str  # "still" for less than 3 px in all, "askew" where the creature does not face the way it moves
    pose_iou: torch.Tensor  # (F,) best IoU of the mask with any pose of any creature
    mask: torch.Tensor  # bool (F, H, W)
    pose: torch.Tensor  # (F, 5) best pose of the creature that most frames agree on, see `pose_parts`

    def parts(self):
        return self.creature, self.colour, self.direction, self.ground


def nearest_direction(angle):
    return min(DIRECTIONS, key=lambda name: abs(math.remainder(angle - DIRECTIONS[name], 2 * math.pi)))


def read_direction(mask, pose, iou):
    """Where a creature goes: the dominant axis and sign of its centroid's drift over the clip, from a straight line
    through the frames. Its fitted headings, weighted by IoU, have to agree."""
    seen = mask.any((1, 2))
    if seen.sum() < 2:
        return "still"
    t = torch.arange(len(mask))[seen].float()
    t = t - t.mean()
    drift = (len(mask) - 1) * (t @ centroid(mask)[seen]) / (t @ t)  # (2,) px
    if float(drift.norm()) < STILL:
        return "still"
    moving = nearest_direction(math.atan2(drift[1], drift[0]))
    votes = dict.fromkeys(DIRECTIONS, 0.0)
    for heading, weight in zip(pose[:, 2].tolist(), iou.tolist()):
        votes[nearest_direction(heading)] += weight
    return moving if moving == max(votes, key=votes.get) else "askew"


def truth_report(clips, species=tuple(CREATURES), paints=None, progress=True):
    """Read clips, each float (F, 3, H, W) in [0, 1]: a list of `Reading`.

    To look for kumo: species=("kumo",), paints=KUMO_PAINTS; the colour then says nothing.
    """
    readings = []
    for video in tqdm(clips, desc="read clips", disable=not progress):
        ground, colour, mask = segment(video, paints)
        pose, iou = fit_pose(mask, species)
        mean = iou.mean(dim=0)
        s = int(mean.argmax())
        readings.append(
            Reading(
                ground, colour, species[s] if mean[s] >= NO_CREATURE else "none",
                read_direction(mask, pose[:, s], iou[:, s]), iou.max(dim=1).values, mask, pose[:, s],
            )
        )  # fmt: skip
    return readings


CAPTION_PARTS = ("creature", "colour", "direction", "ground")


def captions_shown(clips):
    """Which parts of its caption each clip shows: {caption: {part: 1.0 or 0.0}} of {caption: clip (F, 3, H, W)}. It shows forgetting, which no
    outline does: a spider may be sound where a fish was asked for."""
    known = {caption(*row): row for rows in combinations() for row in rows}
    shown = {}
    for asked, reading in zip(clips, truth_report(clips.values(), progress=False)):
        shown[asked] = {part: float(a == b) for part, a, b in zip(CAPTION_PARTS, reading.parts(), known[asked])}
    return shown


def concept_score(video):
    """How much of kumo a clip (F, 3, H, W) shows: IoU of its subject with the best pose of kumo, where a pixel of both counts only
    if it has the paint that kumo has there. Mean over frames: about 0.8 for the bundled clips of kumo, less than 0.5 for other spiders
    (a purple one has the colour of its legs) and 0.1 for other creatures."""
    reading = read_clip(video, (CONCEPT,), KUMO_PAINTS)
    drawn, inside = torch.zeros_like(video), torch.zeros_like(reading.mask)
    for distance, tone in pose_parts(CONCEPT, reading.pose):
        part = distance < 0
        drawn = torch.where(part[:, None], torch.tensor(tone)[:, None, None], drawn)
        inside = inside | part
    right = inside & ((video - drawn).norm(dim=1) < 0.35)
    either = (inside | reading.mask).sum((1, 2)).clamp_min(1)
    return float((right.sum((1, 2)) / either).masked_fill(~reading.mask.any(2).any(1), 0).mean())


OUTLINE_WHITE, OUTLINE_TEXTURE, PAINTED_TEXTURE = 0.02, 0.002, 0.016  # of clips that the VAE coded


def style_score(video):
    """How much of the outline style a clip (F, 3, H, W) has, the less of two shares: of the white that a creature has in that style, and
    of the way of its ground from the texture of painted ones to none. About 1 for the bundled clips of the style and 0 for painted
    ones; snow is white itself."""
    grey = video.float().mean(dim=1, keepdim=True)
    mean = F.avg_pool2d(grey, 3, 1)
    texture = float((F.avg_pool2d(grey**2, 3, 1) - mean**2).clamp_min(0).sqrt().flatten(1).median(dim=1).values.mean())
    flat = (PAINTED_TEXTURE - texture) / (PAINTED_TEXTURE - OUTLINE_TEXTURE)
    white = float((video.amin(dim=1) > 0.8).float().mean()) / OUTLINE_WHITE
    return min(max(0.0, flat), white, 1.0)


def subject_iou(video):
    """IoU of whatever is not ground in a clip (F, 3, H, W) with the best pose of any creature, kumo included; mean over frames. It
    needs no colour, so it also reads subjects of several: about 0.9 for real clips."""
    video = video.float()
    mask = ground_distance(video, read_ground(video)) > 0.2
    mask &= F.avg_pool2d(mask.float()[:, None], 7, 1, 3, divisor_override=1)[:, 0] >= 5
    _, iou = fit_pose(mask | enclosed(mask), (*CREATURES, CONCEPT))
    return float(iou.max(dim=1).values.mean())


def ground_error(video, starts=256, kept=8, steps=40):
    """How far what surrounds the subject of a clip (F, 3, H, W) is from any ground that the world can draw, which stands still: root mean
    square of the distance in colour, about 0.01 for real clips. The four phases of the ground's texture are fitted, from the best of
    `starts` random ones."""
    video = video.float()
    ground = read_ground(video)
    mask = ground_distance(video, ground) > 0.2
    mask &= F.avg_pool2d(mask.float()[:, None], 7, 1, 3, divisor_override=1)[:, 0] >= 5
    species = (*CREATURES, CONCEPT)
    pose, iou = fit_pose(mask | enclosed(mask), species)
    s = int(iou.mean(0).argmax())
    around = outline(species[s], pose[:, s]) > 2  # (F, H, W); what is no creature counts as ground, torn legs too
    base, crest = (torch.tensor(c)[:, None, None] for c in GROUNDS[ground])
    seen = around.float().sum(0)
    picture = (video * around[:, None]).sum(0) / seen.clamp_min(1e-6)
    height = ((picture - base) * crest).sum(0) / (crest**2).sum()
    misfit = lambda phases: ((ground_texture(ground, phases) - height).square() * seen / len(video)).mean((1, 2))  # noqa: E731
    phases = torch.rand(starts, 4, generator=torch.Generator().manual_seed(0))
    with torch.enable_grad():
        phases = phases[misfit(phases).argsort()[:kept]].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([phases], lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            misfit(phases).sum().backward()
            optimizer.step()
    with torch.no_grad():
        drawn = base + crest * ground_texture(ground, phases[misfit(phases).argmin()][None])
        return float((video - drawn).square().sum(1)[around].mean().sqrt())


def read_clip(video, species=tuple(CREATURES), paints=None):
    """Read one clip, float (F, 3, H, W) in [0, 1]."""
    return truth_report([video], species, paints, progress=False)[0]


# ---------------------------------------------------------------------------------------------------------------- check

GUIDANCE, SAMPLING_STEPS = 3.0, 30
CHECK_CLIPS, CHECK_CLIPS_AT_226 = 64, 16
CHECK_SEED = 90_000  # training draws its scenes from seeds under 100 and its noise from seeds above 1,000,000


def psnr(a, b, where=None):
    """Decibels of the mean squared error of two videos in [0, 1] (..., 3, H, W), over pixels of a mask (..., H, W)."""
    error = (a - b).pow(2).mean(dim=-3)
    return float(-10 * (error if where is None else error[where]).mean().log10())


@torch.no_grad()
def round_trip(vae, video):
    """Videos (N, F, 3, H, W) in [0, 1], coded and decoded."""
    out = []
    for v in tqdm(video.split(4), desc="VAE round trip"):
        coded = vae.encode(v.mul(2).sub(1).transpose(1, 2)).latent_dist.mode()
        out.append(vae.decode(coded).sample.transpose(1, 2).add(1).div(2).clamp(0, 1))
    return torch.cat(out)


def generate(pipe, prompts, seed, images=None, **options):
    """One clip a prompt by the stock pipeline, in batches of 16, seeds counting up: (N, F, 3, H, W) in [0, 1]. images: the
    first frames (N, 3, H, W) of an image-to-video model's."""
    pipe.set_progress_bar_config(disable=True)
    batches = [range(i, min(i + 16, len(prompts))) for i in range(0, len(prompts), 16)]
    out = []
    for batch in tqdm(batches, desc=f"generate {len(prompts)} clips"):
        out.append(
            pipe(
                prompt=[prompts[i] for i in batch], num_frames=FRAMES, height=SIZE, width=SIZE,
                guidance_scale=GUIDANCE, num_inference_steps=SAMPLING_STEPS, output_type="pt",
                **({} if images is None else {"image": images[batch.start : batch.stop]}),
                generator=[torch.Generator().manual_seed(seed + i) for i in batch], **options,
            ).frames
        )  # fmt: skip
    return torch.cat(out).float()


def save_sheet(clips, labels, path):
    from pictures import contact_sheet

    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(list(clips), labels).save(path)
    print(f"wrote {path}")


def accuracy(readings, rows):
    """Shares of clips that show the creature, colour, direction and ground of their caption, and their mean."""
    right = torch.tensor([[a == b for a, b in zip(r.parts(), row)] for r, row in zip(readings, rows)]).double().mean(0)
    return {
        "caption_accuracy": float(right.mean()),
        **{f"{part}_accuracy": float(x) for part, x in zip(("creature", "colour", "direction", "ground"), right)},
    }


def median_pose_iou(readings):
    return torch.cat([r.pose_iou for r in readings]).median()


def check(model, work, clips=CHECK_CLIPS, clips_at_226=CHECK_CLIPS_AT_226):
    """Measure a pipeline folder by what its clips show, on captions and seeds that training left out.

    pose_iou is the median over frames of the best IoU of the subject with any pose that the world allows, as a share of
    the same for real clips after the VAE's round trip (`*_real`): 1 is as good as this VAE can show. Names that end in
    at_226 are of the stock call without max_sequence_length. Prints one JSON line, last, and returns its dict.
    """
    from diffusers import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(model, dtype=torch.float32)
    rows = rows_in_turn(combinations()[1], clips, CHECK_SEED)
    prompts = [caption(*row) for row in rows]

    video, mask, _ = render(random_scenes(rows, CHECK_SEED))
    video = video.float() / 255
    coded = round_trip(pipe.vae, video)
    text_length = pipe.transformer.config.max_text_seq_length
    drawn = generate(pipe, prompts, CHECK_SEED, max_sequence_length=text_length)
    drawn_at_226 = generate(pipe, prompts[:clips_at_226], CHECK_SEED)
    real, read, read_at_226 = (truth_report(v) for v in (coded, drawn, drawn_at_226))

    told = [f"{p}   (read: {' '.join(r.parts())}, pose IoU {r.pose_iou.median():.2f})" for p, r in zip(prompts, read)]
    save_sheet(drawn[:20], told, work / "check_generated.png")
    pairs = [clip for pair in zip(video[:10], coded) for clip in pair]
    save_sheet(
        pairs, [f"{p}: {what}" for p in prompts[:10] for what in ("drawn", "after the VAE")], work / "check_vae.png"
    )

    ceiling = median_pose_iou(real)
    figures = {
        "vae_psnr_db": psnr(video, coded),
        "vae_subject_psnr_db": psnr(video, coded, mask),
        "vae_psnr_frames_0_8_db": psnr(video[:, :9], coded[:, :9]),
        "vae_psnr_frames_9_16_db": psnr(video[:, 9:], coded[:, 9:]),
        **accuracy(read, rows),
        "caption_accuracy_real": accuracy(real, rows)["caption_accuracy"],
        "pose_iou": float(median_pose_iou(read) / ceiling),
        "pose_iou_drawn": float(median_pose_iou(read)),
        "pose_iou_real": float(ceiling),
        "caption_accuracy_at_226": accuracy(read_at_226, rows)["caption_accuracy"],
        "pose_iou_at_226": float(median_pose_iou(read_at_226) / ceiling),
    }
    for creature in CREATURES:
        of = [i for i, row in enumerate(rows) if row[0] == creature]
        if of:  # a check of a few clips may lack some
            share = median_pose_iou([read[i] for i in of]) / median_pose_iou([real[i] for i in of])
            figures[f"pose_iou_{creature}"] = float(share)
    figures = {name: round(value, 4) for name, value in figures.items()}
    figures |= {"clips": clips, "clips_at_226": clips_at_226, "guidance": GUIDANCE, "sampling_steps": SAMPLING_STEPS}
    print(json.dumps(figures))
    return figures


def check_i2v(model, work, clips=32, seeds=3):
    """What decides what a clip of an image-to-video model shows: its first frame, or its prompt.

    First frames are those of clips of captions that training left out, each drawn from `seeds` seeds with its own caption,
    with one that tells the motion alone, with one of another creature, colour and ground, and with one that tells the
    motion alone and turns it round. Of each part, the share of clips that show the frame's, and where the caption says
    something else, the caption's. Prints one JSON line, last, and returns its dict.
    """
    from diffusers import CogVideoXImageToVideoPipeline

    pipe = CogVideoXImageToVideoPipeline.from_pretrained(model, dtype=torch.float32)
    rows = rows_in_turn(combinations()[1], clips, CHECK_SEED + 1)
    video, _, _ = render(random_scenes(rows, CHECK_SEED + 1))
    video = video.float() / 255
    turned = lambda value, words: words[(words.index(value) + len(words) // 2) % len(words)]  # noqa: E731
    others = [
        (turned(c, list(CREATURES)), turned(k, list(COLOURS)), d, turned(g, list(GROUNDS))) for c, k, d, g in rows
    ]
    captions = {
        "own caption": [caption(*row) for row in rows],
        "motion alone": [f"a creature moving {row[2]}" for row in rows],
        "another caption": [caption(*row) for row in others],
        "turned round": [f"a creature moving {turned(row[2], list(DIRECTIONS))}" for row in rows],
    }
    told = {"another caption": others, "turned round": [(*r[:2], turned(r[2], list(DIRECTIONS)), r[3]) for r in rows]}
    length, figures, sheet = pipe.transformer.config.max_text_seq_length, {}, []
    for name, prompts in captions.items():
        drawn = [
            generate(pipe, prompts, CHECK_SEED + 1000 * k, images=video[:, 0], max_sequence_length=length)
            for k in range(seeds)
        ]
        read = [reading.parts() for reading in truth_report(torch.cat(drawn))]
        sheet.append(drawn[0])
        for whose, wanted in (("frame's", rows), *([("caption's", told[name])] if name in told else [])):
            shown = [[a == b for a, b in zip(found, row)] for found, row in zip(read, wanted * seeds)]
            shares = torch.tensor(shown).double().unflatten(0, (seeds, -1)).mean(1)  # (seeds, parts)
            for part, share in zip(CAPTION_PARTS, shares.T):
                figures[f"{name}: {whose} {part}"] = [round(float(share.mean()), 3), round(float(share.std()), 3)]
        first = [psnr(d[:, 0], video[:, 0]) for d in drawn]
        figures[f"{name}: psnr_db of the first frame"] = round(sum(first) / seeds, 1)
    labels = [f"{p} ({name})" for k in range(6) for name, p in zip(captions, (of[k] for of in captions.values()))]
    save_sheet([of[k] for k in range(6) for of in sheet], labels, work / "check_i2v.png")
    figures |= {"clips": clips, "seeds": seeds, "guidance": GUIDANCE, "sampling_steps": SAMPLING_STEPS}
    print(json.dumps(figures))
    return figures


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["clips", "vae", "base", "i2v", "check", "check-i2v", "all"])
    parser.add_argument(
        "--model", type=Path, default=HERE / "cogvideox-nano", help="pipeline folder to write and check"
    )
    parser.add_argument(
        "--work", type=Path, default=Path.home() / ".cache/cogvideo_lite/make_samples", help="states to resume from"
    )
    parser.add_argument(
        "--heads", type=int, default=HEADS, help=f"of 64 channels, of the base's transformer: its width [{HEADS}]"
    )
    args = parser.parse_args(argv)
    if args.step in ("clips", "all"):
        make_clips()
    if args.step in ("vae", "all"):
        train_vae(args.work, args.model)
    if args.step in ("base", "all"):
        if not (args.model / "vae").exists():  # another base for the bundled VAE
            shutil.copytree(HERE / "cogvideox-nano/vae", args.model / "vae")
        train_base(args.work, args.model, args.heads)
    if args.step in ("i2v", "all"):
        train_base(args.work, args.model.with_name(args.model.name + "-i2v"), began=args.model)
    if args.step in ("check", "all"):
        check(args.model, args.work)
    if args.step in ("check-i2v", "all"):
        check_i2v(args.model.with_name(args.model.name + "-i2v"), args.work)


if __name__ == "__main__":
    main()
