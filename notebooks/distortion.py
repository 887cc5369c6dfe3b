"""Is the subject of a clip bent out of shape? A score from optical flow and geometry; no downloaded network judges.

    from distortion import distortion, reference_statistics
    reference = reference_statistics(real_clips)     # once, of at least 3 real clips of the same kind
    distortion(clip, reference).score                # 0: like the real clips; larger: more distorted

Where the subject is, how it changes from frame to frame, which outlines it has and what surrounds it are measured. Each
measure then says how far the clip lies from the reference, in units of how far reference clips lie from each other.
A clip is a float array or tensor (F, 3, H, W) in [0, 1]. Nothing here knows of models, runs or files.

Letters in shapes: F frames, C channels, H and W height and width in pixels, h and w the same at working size, N frames
of other clips, K frequencies.
"""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

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
LEAST_SPREAD = dict(
    outlines=0.01, markings=0.02, residual=0.002, strain=0.005, folding=0.02, vanishing=0.02, wobble=0.004, shake=0.004,
    pattern=0.12, flicker=0.01, grid=0.5, lines=0.002,
)  # fmt: skip
TO_LUMA_CHROMA = ((0.299, -0.299, 0.701), (0.587, -0.587, -0.587), (0.114, 0.886, -0.114))  # Y, B - Y, R - Y (BT.601)
REFERENCE_MEASURES = (*SHAPE, *MOTION, *TEXTURE)
COMPANIONS = ("speed", "sharpness", "saturation", "grid")


@dataclass
class Distortion:
    """How a clip compares with real clips of its kind. All finite, whatever the clip."""

    score: float  # shape + motion + texture, less `Reference.usual`; 0 for clips like the reference, never below
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
    noticed: float | None = None  # how well clips of this kind that were bent on purpose are noticed, see `noticed`


def scaled_for_measuring(clip):
    """Colours float32 (F, h, w, 3) with a short side of WORK_PX; a contrast image uint8 (F, h, w): the colours' first
    principal component over its spread, since brightness alone would not tell a green subject from green ground; the
    spread."""
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
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)


def without_camera(flow, grid):
    """Flow (h, w, 2) less the similarity that most of it follows."""
    here = grid[4::8, 4::8].reshape(-1, 2)
    camera, _ = cv2.estimateAffinePartial2D(here, here + flow[4::8, 4::8].reshape(-1, 2), ransacReprojThreshold=0.5)
    camera = np.eye(2, 3) if camera is None else camera
    return flow - (grid @ camera[:, :2].T + camera[:, 2] - grid).astype(np.float32)


def subject_masks(video, speed):
    """Masks bool (F, h, w) of the subject, and how it was found: "moves" (against its surroundings) or "stands out".

    speed: (F, h, w) px a frame, the camera's taken off. Flow finds the place, colour the outline: a pixel near the
    motion belongs to the subject if its colour is met there more often than elsewhere. Motion may show a part of the
    subject only; then the rest has the same colours. So a second guess, in which the frame's border stands for the
    surroundings, is taken where its colours are much more its own and it moves, and where nothing or everything moves.
    """
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
    """What a subject (masks (F, h, w)) looks like, its outline and its markings, each (F', ANGLES, RADII): in polar
    coordinates around its centroid, scaled to its spread. A rotated subject is shifted along the angles, a larger or a
    moved one is the same. Frames without a subject are left out.

    Markings are how far the colours (F, h, w, 3) inside lie from their median, whatever that is, at a norm of 1;
    fainter ones than an eye would notice have less.
    """
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
    """1 - IoU of each of some outlines (F, ANGLES, RADII) with the most similar of others (N, ANGLES, RADII), in any
    rotation and mirror image: (F,). All rotations at once, as a correlation along the angles. Of markings, which are
    not 0 or 1, it is 1 - Tanimoto's coefficient, which for outlines is the IoU."""
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

    residual: root mean square, in subject sizes. strain: half the mean log of the stretch along over that across
    (singular values of the flow's Jacobian). folding: share of the subject turned inside out, or nearly so. vanishing:
    share whose flow there and back does not meet.
    """
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

    planes: luma and chroma in units of the clip's contrast (F, h, w, 3). ahead: flow to the next frame, whole and
    without the camera's, F - 1 times. pattern: log energies in three bands of each plane, mean over frames; blotches
    show in the chroma, blur in the luma. flicker: what of a frame is not kept in the next. wobble: root mean square of
    the flow that a camera does not explain, in frame sizes.
    """
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
    """How much flows (h, w, 2), one a pair of frames, change from one pair to the next along their paths, less what a
    camera explains: the median over the frame, in frame sizes, (pairs - 1,). What moves goes on moving; what is torn to
    and fro does not."""
    found = []
    for flow, next in zip(flows, flows[1:]):
        there = grid + flow
        later = cv2.remap(next, there[..., 0], there[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        found.append(np.median(np.linalg.norm(without_camera(later - flow, grid), axis=-1)) / WORK_PX)
    return np.array(found)


LEAST_PX = 16  # of a side of a clip that can be measured


def as_clip(clip):
    """A clip as an array (F, 3, H, W) float32 in [0, 1]; what is no number is black. Raises ValueError where it is
    none."""
    if hasattr(clip, "detach"):
        clip = clip.detach().cpu()
        clip = (clip.float() if clip.is_floating_point() else clip).numpy()
    clip = np.asarray(clip)
    if clip.ndim != 4 or clip.shape[1] != 3 or min(clip.shape[2:]) < LEAST_PX or clip.dtype.kind != "f":
        shape = " x ".join(map(str, clip.shape)) or "a number"
        raise ValueError(
            f"distortion: a clip must be frames x 3 x height x width of floats from 0 to 1, {LEAST_PX} px or more a side, "
            f"not {shape} of {clip.dtype}"
        )
    if len(clip) < 2:
        raise ValueError("distortion: needs clips of at least 2 frames")
    return np.nan_to_num(clip.astype(np.float32)).clip(0, 1)


def measure(clip):
    """All that is measured of one clip (F, C, H, W): a dict of MOTION's values and `flicker`, some for each pair of
    frames, of SHAPE's, of `pattern`, `grid` and `lines`, of the number of `frames`, and of COMPANIONS. `why` lists what
    could not be measured. Raises ValueError."""
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
    """How much stronger steps between neighbouring pixels are at some places of a period than at others, over what
    chance gives: about 1 without a grid. clip: array (F, C, H, W) at its own size, where codec and patches together
    make 16 px."""
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
    """How much sharper whole rows and columns of pixels stand out at some places of a period than at others, as a share
    of full brightness: 0 without a grid. It sees what runs through the frame only, and that well: medians along the
    rows and over eight moments do not see an edge that is shorter, nor medians over the periods a single one."""
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
    """How far one clip lies from reference clips, each as `measure` returns it: for MOTION's measures and the flicker
    the Wasserstein distance between the clip's values and theirs, for the pattern that from the most similar one's, for
    the grid the logarithm of how much stronger it is than usual, for the lines the difference, for outlines and
    markings the mean of `unlike`. Measures that the clip or all others lack are left out."""
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
    """Shape, motion and texture from distances: 0 within what reference clips differ, else the logarithm of 1 + the
    square of a third of the excess, in units of the reference's own (a Cauchy likelihood: what real clips do, too,
    counts little, and a wild measure does not hide the rest), of the worst measure of each."""

    excess = {n: max(0.0, far[n] - typical[n][0]) / typical[n][1] for n in far if n in typical}
    return [
        max([math.log1p((excess[n] / 3) ** 2) for n in group if n in excess], default=0.0)
        for group in (SHAPE, MOTION, TEXTURE)
    ]


def reference_statistics(clips):
    """Statistics of real clips (each (F, C, H, W) in [0, 1]; any iterable, of which one at a time is kept) for
    `distortion`. Raises ValueError for fewer than 3."""
    measured = [measure(clip) for clip in clips]
    if len(measured) < LEAST_REFERENCE:
        raise ValueError(
            f"distortion: {len(measured)} reference clips; it takes {LEAST_REFERENCE} to know how much real ones differ"
        )

    far = [distances(m, [other for other in measured if other is not m]) for m in measured]
    typical = {}
    for name in {name for f in far for name in f}:
        middle, high = np.quantile([f[name] for f in far if name in f], (0.5, 0.9))
        typical[name] = (float(middle), max(float(high - middle), 0.1 * float(middle), LEAST_SPREAD[name]))
    companions = {name: float(np.median([m[name] for m in measured])) for name in COMPANIONS}
    usual = float(np.median([sum(aspects(f, typical)) for f in far]))
    return Reference([{k: m[k] for k in REFERENCE_MEASURES} for m in measured], typical, companions, usual)


def noticed(clips, reference):
    """How well the score separates real clips from the same clips bent on purpose, by `swirl` and `elastic` at middle
    strength: AUC, 1 for always, 0.5 for not at all. It says whether the score can be relied on for clips of this kind.
    clips: those that the reference was made of, or the first of them."""
    clean, bent = [], []
    for k, clip in enumerate(map(as_clip, clips)):
        rest = replace(reference, clips=reference.clips[:k] + reference.clips[k + 1 :])
        clean.append(distortion(clip, rest).score)
        for change, strengths in (DISTORTIONS["swirl"], DISTORTIONS["elastic"]):
            changed = change(clip, strengths[len(strengths) // 2], np.random.default_rng(k), None)
            bent.append(distortion(changed, rest).score)
    return float(np.mean([(b > c) + (b == c) / 2 for b in bent for c in clean]))


def distortion(clip, reference):
    """How far a clip lies from real clips of its kind.

    clip: float (F, C, H, W) in [0, 1], any size, at least 2 frames. reference: a list of at least 3 such clips, or what
    `reference_statistics` made of one. Returns Distortion. Raises ValueError.
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


def shrunk(clip, sizes=(8, 16, 16)):
    """Means of a clip (C, F, H, W) over boxes that divide frames, rows and columns evenly: (C, *sizes)."""
    for axis, size in enumerate(sizes, start=1):
        length = clip.shape[axis]
        edges = [(k * length // size, -(-(k + 1) * length // size)) for k in range(size)]
        clip = np.stack([clip.take(range(*edge), axis).mean(axis) for edge in edges], axis)
    return clip


def similarity(clips):
    """How alike some clips are that should differ, such as those of different prompts: the mean correlation over all
    pairs, at 8 moments and 16 x 16 px. 1: all the same, as where a model has memorised one clip. Clips of one colour
    throughout, which correlate with nothing, are like each other and unlike all else. clips: at least 2, each (F, C, H,
    W)."""
    small = [shrunk(np.nan_to_num(np.asarray(clip, np.float64)).transpose(1, 0, 2, 3)).ravel() for clip in clips]
    apart = np.stack(small)
    apart -= apart.mean(1, keepdims=True)
    lengths = np.linalg.norm(apart, axis=1)
    plain = lengths < 1e-6
    apart /= np.where(plain, 1, lengths)[:, None]
    alike = apart @ apart.T + np.outer(plain, plain)
    return float(alike[np.triu_indices(len(small), 1)].mean())


# ----------------------------------------------------------------------------------------- distortions of known size
# What the score is tried on. Clips are float32 arrays (F, C, H, W) in [0, 1]; lengths are pixels of a frame 64 px high,
# scaled for others. A distortion is called with its strength, a random generator and the subject's masks (F, H, W), or
# None where the truth is unknown.


def each_frame(clip, change):
    """A clip of what `change` makes of each frame (H, W, C) and its number."""
    frames = [change(np.ascontiguousarray(frame.transpose(1, 2, 0)), i) for i, frame in enumerate(clip)]
    return np.stack(frames).clip(0, 1).transpose(0, 3, 1, 2)


def resampled(clip, dx, dy):
    """Each pixel from dx, dy px further on (F, H, W)."""
    height, width = clip.shape[2:]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    maps = [(x + np.float32(u), y + np.float32(v)) for u, v in zip(dx, dy)]
    edge = cv2.BORDER_REFLECT_101
    return each_frame(clip, lambda frame, i: cv2.remap(frame, *maps[i], cv2.INTER_CUBIC, borderMode=edge))


def centre_of(masks, i, height, width):
    subject = np.argwhere(masks[i]) if masks is not None else ()
    return subject.mean(0) if len(subject) else (height / 2, width / 2)


def elastic(clip, px, rng, masks):
    """A smooth random field of displacements, `px` in root mean square, turns into another along the clip."""
    frames, _, height, width = clip.shape
    unit = height / 64
    noise = [rng.standard_normal((height, width)) for _ in range(4)]
    noise = [cv2.GaussianBlur(n, (0, 0), 5 * unit, borderType=cv2.BORDER_REFLECT) for n in noise]
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
    """Parts of 16 px, smoothly joined, each moved at random in every frame anew."""
    frames, _, height, width = clip.shape
    unit, cells = height / 64, (5, 1 + round(4 * width / height))
    shifts = [rng.standard_normal(cells) for _ in range(2 * frames)]
    shifts = [px * unit * cv2.resize(s, (width, height), interpolation=cv2.INTER_CUBIC) for s in shifts]
    return resampled(clip, shifts[:frames], shifts[frames:])


def shuffle(clip, patches, rng, masks):
    """So many of the sixteen patches of 8 px around the subject's centre change places, the same in all frames."""
    frames, _, height, width = clip.shape
    side, out, picked = height // 8, clip.copy(), rng.permutation(16)[:patches]
    for i in range(frames):
        row, column = centre_of(masks, i, height, width)
        top, left = (int(np.clip(c - 2 * side, 0, n - 4 * side)) for c, n in ((row, height), (column, width)))
        corners = [(top + k // 4 * side, left + k % 4 * side) for k in range(16)]
        for k, source in zip(picked, np.roll(picked, 1)):
            (y, x), (v, u) = corners[k], corners[source]
            out[i, :, y : y + side, x : x + side] = clip[i, :, v : v + side, u : u + side]
    return out


def grid(clip, level, rng, masks):
    """Every 16th row and column darker by `level`, as the pattern of CogVideo#590."""
    height, width = clip.shape[2:]
    rows, columns = np.arange(height) % 16 == 0, np.arange(width) % 16 == 0
    return (clip - np.float32(level) * (rows[:, None] | columns[None])).clip(0, 1)


def blotches(clip, level, rng, masks):
    """Coloured spots of some 3 px on everything, `level` in root mean square, turn into others along the clip."""
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


def moved(clip, turn_deg=0.0, zoom=1.0, dx=0.0, dy=0.0):
    """A clip turned, enlarged and shifted as a whole."""
    height, width = clip.shape[2:]
    matrix = cv2.getRotationMatrix2D((width / 2 - 0.5, height / 2 - 0.5), turn_deg, zoom)
    matrix[:, 2] += dx * height / 64, dy * height / 64
    options = dict(flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    return each_frame(clip, lambda frame, _: cv2.warpAffine(frame, matrix, (width, height), **options))


HARMLESS = {  # changes that bend nothing
    "translation": lambda clip: moved(clip, dx=3, dy=-2),
    "rotation": lambda clip: moved(clip, turn_deg=20),
    "zoom": lambda clip: moved(clip, zoom=1.1),
    "brightness": lambda clip: 0.85 * clip,
    "contrast": lambda clip: (0.8 * (clip - clip.mean()) + clip.mean()).clip(0, 1),
    "mirror image": lambda clip: clip[..., ::-1].copy(),
    "reversed play": lambda clip: clip[::-1].copy(),
}
