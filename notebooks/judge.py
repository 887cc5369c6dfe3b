"""A finished run's samples: did training ruin them, do they show the concept, are they all alike?

    python cogvideo_lite.py --judge runs/lora-...          (the command line does it by itself when a run has ended)

Two judges look at each sample beside the base's of the same prompt and seed. The base itself says how strange it finds
the sample (`strangeness`; the script measured that when it drew it). The distortion score says how much further from
real clips it lies than the base's, part by part (`changes`). `judge` writes samples/distortion.json, a contact sheet
and an animation, adds what was found to summary.json, and writes the model card anew with it. Doing it twice gives the
same files.
"""

import dataclasses
import json
import os
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "data_samples")]  # where the script and the renderer lie

import cogvideo_lite as cl  # noqa: E402

distortion = cl.load_instrument("distortion")
pictures = cl.load_instrument("pictures")

REFERENCE_CLIPS = 48  # as many are enough to know how much real clips differ
MEASURE_VERSION = 6  # to be raised when `distortion.measure` changes, so that cached statistics are made again
WHEN, JUDGED = ("before", "after"), ("before", "again", "after")  # sets of samples that are shown, and judged
PARTS = ("shape", "motion", "texture")  # of the distortion score
LEAST_SPREAD = 0.05  # of a part among the base's samples: less would be luck
WORSE = 2.0  # spreads by which a sample counts as worse than the base's
WORDS = dict(shape="outlines", motion="motion", texture="grounds")
TRIED, NOTICED = 6, 0.9  # real clips that are bent on purpose to try the score; AUC from which it can be relied on
STRANGEST = 1.5  # times as strange to the base as real clips: more marks a ruined run (results/judges.md)


def spread(clips):
    """Up to REFERENCE_CLIPS of a list, evenly."""
    number = min(len(clips), REFERENCE_CLIPS)
    return [clips[k * len(clips) // number] for k in range(number)]


def cached_reference(clips, folder, skip_bad=False):
    """`reference_statistics` of the `spread` of some clips (cogvideo_lite.Clip); made once, then kept in `folder`.
    skip_bad: without those that cannot be read. Raises UserError where a clip cannot be read, ValueError where they are
    too few."""
    clips = spread(clips)
    content = [(cl.content_of(c.path), c.frames, c.height, c.width, c.fps) for c in clips]
    file = folder / f"reference-{cl.digest(MEASURE_VERSION, content)}.safetensors"
    if not cl.is_cached(file, "0.outlines"):
        made = distortion.reference_statistics(videos(clips, skip_bad))
        made.noticed = distortion.noticed(list(videos(clips[:TRIED], skip_bad)), made)
        numbers = {name: json.dumps(getattr(made, name)) for name in ("typical", "companions", "usual", "noticed")}
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        file.parent.mkdir(parents=True, exist_ok=True)
        # safetensors would write a view of another array out of order
        arrays = {f"{i}.{k}": np.asarray(v, order="C") for i, m in enumerate(made.clips) for k, v in m.items()}
        save_file(arrays, str(partial), numbers)
        os.replace(partial, file)
    with safe_open(str(file), "numpy") as opened:
        numbers = {name: json.loads(text) for name, text in opened.metadata().items()}
        measures = distortion.REFERENCE_MEASURES
        count = len({key.partition(".")[0] for key in opened.keys()})
        measured = [{k: opened.get_tensor(f"{i}.{k}") for k in measures} for i in range(count)]
        return distortion.Reference(measured, **numbers)


def videos(clips, skip_bad):
    """Clips decoded, one at a time."""
    for clip in tqdm(clips, desc="measuring real clips", unit="clip"):
        try:
            yield clip.video.numpy()
        except cl.UserError:
            if not skip_bad:
                raise


def run_references(config, prompts):
    """What the samples of a run are compared with: folder of real clips -> Reference, or None where that cannot be,
    which is printed with its reason. prompts: prompt -> such a folder."""
    references = {}
    for folder in dict.fromkeys(prompts.values()):
        try:
            if config.frames < 2:
                raise ValueError("stills have no motion")
            ours = folder == cl.resolve_path(config.data)
            clips = cl.split_clips(config)[0] if ours else cl.read_clips(folder, *cl.clip_size(config))
            references[folder] = cached_reference(clips, cl.cache_folder(config), config.skip_bad)
        except (cl.UserError, ValueError) as error:
            references[folder] = None
            print(f"distortion: samples will not be compared with the clips of {folder}: {error}", flush=True)
    return references


def concept_truth(config):
    """The renderer of the bundled clips, if the run was trained on these: it knows what its concept looks like. None
    for other clips; there, the held-out loss says whether they were learned."""
    if cl.resolve_path(config.data) != cl.HERE / "data_samples/spider":
        return None
    import make_samples

    return make_samples


def judge_samples(folder, prompts, references, truth=None):
    """Judge the samples of a run's folder. prompts: prompt -> folder of real clips; references: that folder ->
    Reference.

    Returns (rows, clips). A row a prompt, as samples/distortion.json has them: the fields of Distortion for "before",
    "again" (the base's from another seed; older runs have none) and "after", or null where there is no reference, and
    `concept` by the truth, if there is one. clips: such a name -> list of float (F, C, H, W). Raises UserError where a
    sample is missing.
    """
    sets = [when for when in JUDGED if when in WHEN or (folder / "samples/again-0.mp4").exists()]
    clips = {when: [cl.read_video(folder / f"samples/{when}-{k}.mp4") for k in range(len(prompts))] for when in sets}
    rows = []
    for k, (prompt, real) in enumerate(prompts.items()):
        row, reference = {"prompt": prompt}, references[real]
        for when in sets:
            row[when] = None
            if reference:
                row[when] = dataclasses.asdict(distortion.distortion(clips[when][k], reference))
        if truth:
            with torch.no_grad():  # every fourth frame says as much as all
                row["concept"] = {when: truth.concept_score(clips[when][k][::4]) for when in WHEN}
        rows.append(row)
    return rows, clips


def medians(rows, clips, concept=None):
    """What a summary says of judged samples: medians over the prompts. concept: the word that names the concept."""
    found = {}
    for when in WHEN:
        judged = [row[when] for row in rows if row[when]]
        if judged:
            found[f"distortion_{when}"] = statistics.median(row["score"] for row in judged)
            for name in distortion.COMPANIONS:
                found[f"{name}_{when}"] = statistics.median(row[name] for row in judged)
        if len(rows) > 1:
            found[f"similarity_{when}"] = distortion.similarity(clips[when])
        for name, asked in (("concept", True), ("concept_unasked", False)):
            scores = [row["concept"][when] for row in rows if concept and (concept in row["prompt"].split()) == asked]
            if scores:
                found[f"{name}_{when}"] = statistics.median(scores)
    return found


def changes(rows):
    """How much further from real clips each sample lies than the base's of the same prompt and seed, part by part:
    {part: a number for each prompt}, in units of how much the base's own two samples of a prompt differ. rows: as
    `judge_samples` returns them, with "before", "again" and "after" judged."""
    out = {}
    for part in PARTS:
        first, second, after = (np.array([row[when][part] for row in rows]) for when in JUDGED)
        spread = max(float(np.sqrt(np.mean((second - first) ** 2) / 2)), LEAST_SPREAD)
        out[part] = ((after - first) / spread).tolist()
    return out


def strangeness(losses):
    """How many times as strange to the base the samples are as the base's own of the same prompts and seeds; and how
    many times real held-out clips are: geometric means over prompts. losses: samples/base_losses.json, see
    `cogvideo_lite.Trainer.judge_by_base`."""
    before, after, real = (statistics.geometric_mean(losses[name]) for name in ("before", "after", "heldout"))
    return after / before, real / before


def compared_with_base(rows, folder, references, concept=None):
    """What a summary says of a run's samples beside the base's: `strangeness`, that of real clips, and whether it is
    `ruined`; and of each part in how many prompts it is `worse`. Each only where it was measured. concept: the word
    that names the concept, by which prompts with it and without are told apart."""
    found, file = {}, folder / "samples/base_losses.json"
    if file.exists():
        losses = json.loads(file.read_text("utf-8"))
        times, real = strangeness(losses)
        found |= {"strangeness": times, "strangeness_of_real": real, "ruined": times > STRANGEST * max(real, 1.0)}
        for name, asked in (("strangeness_asked", True), ("strangeness_unasked", False)):
            of = [k for k, row in enumerate(rows) if concept and (concept in row["prompt"].split()) == asked]
            if of:
                some = {when: [losses[when][k] for k in of] for when in WHEN}
                found[name] = strangeness({**losses, **some})[0]
    judged = [row for row in rows if all(row.get(when) for when in JUDGED)]
    if judged:
        changed = changes(judged)
        found |= {f"worse_{part}": sum(x > WORSE for x in values) for part, values in changed.items()}
        found |= {f"change_{part}": statistics.fmean(values) for part, values in changed.items()}
        found["compared_prompts"] = len(judged)
    noticed = [reference.noticed for reference in references.values() if reference]
    if noticed:
        found["distortion_noticed"] = min(noticed)
    return found


def verdict(summary):
    """The first lines to print of a judged run, from its summary: is it ruined, and what is worse than the base's?"""
    lines = []
    if "strangeness" in summary:
        times, real = summary["strangeness"], summary["strangeness_of_real"]
        limit, word = STRANGEST * max(real, 1.0), "RUINED" if summary["ruined"] else "sound"
        lines += [f"verdict: {word}. The base finds these samples {times:.1f} times as strange as its own, and real "
                  f"clips {real:.1f} times; above {limit:.1f} a run is ruined"]  # fmt: skip
    if "compared_prompts" in summary:
        n = summary["compared_prompts"]
        worse = {WORDS[part]: summary[f"worse_{part}"] for part in PARTS if summary[f"worse_{part}"]}
        words = ", ".join(f"{name} in {number}" for name, number in worse.items())
        lines += [
            f"of {n} prompts, worse than the base's: {words}" if worse else f"no worse than the base's in {n} prompts"
        ]
    if summary.get("distortion_noticed", 1.0) < NOTICED:
        share = f"{summary['distortion_noticed']:.0%} from straight ones (50% is chance)"
        lines += [
            f"the distortion score cannot be relied on here: of your own clips, bent on purpose, it separates {share}"
        ]
    return lines


def save_pictures(folder, prompts, clips, fps):
    """contact_sheet.png, and before_and_after.png, which moves, with the samples before training on the left."""
    rows = [clip for pair in zip(clips["before"], clips["after"]) for clip in pair]
    labels = [f"{when}: {prompt}" for prompt in prompts for when in WHEN]
    pictures.contact_sheet(rows, labels).save(folder / "contact_sheet.png")
    pictures.save_animation(folder / "before_and_after.png", [clips["before"], clips["after"]], fps)


def judge(folder):
    """Judge the samples of a finished run or blend, in its folder. Returns its Run, with what was found in its summary.
    Raises UserError."""
    run = cl.load_run(folder)
    config, truth = run.config, concept_truth(run.config)
    prompts = cl.sampled_prompts(run.folder) or cl.validation_prompts(config, cl.split_clips(config)[1])
    files = [run.folder / f"samples/{when}-{k}.mp4" for k in range(len(prompts)) for when in WHEN]
    absent = [file for file in files if not file.exists()]
    words = f"run '{folder}': {len(absent)} samples are gone, {absent and absent[0].name} among them; train it anew"
    cl.refuse((absent, words))
    references = run_references(config, prompts)
    rows, clips = judge_samples(run.folder, prompts, references, truth)
    save_pictures(run.folder / "samples", list(prompts), clips, config.fps)
    cl.write_json(run.folder / "samples/distortion.json", rows)
    run.summary.update(compared_with_base(rows, run.folder, references, truth and truth.CONCEPT))
    run.summary.update(medians(rows, clips, truth and truth.CONCEPT))
    cl.write_json(run.folder / "summary.json", run.summary)
    if run.metrics:  # a blend was never trained, and has no card
        cl.write_model_card(run, list(prompts), card_text(run, prompts))
    return run


def card_text(run, prompts):
    """What a model card says of a judged run: a picture, the prompts, and a table, in Markdown."""
    config, summary = run.config, run.summary
    numbers = [
        ("heldout", "held-out loss", 4),
        ("distortion", "distortion of samples", 2),
        ("concept", "concept score of samples", 2),
    ]
    rows = [("learning rate, steps, batch", f"{config.lr:g}, {config.steps}, {config.batch_size}")]
    if "strangeness" in summary:
        words = f"{summary['strangeness']:.1f}; of real clips {summary['strangeness_of_real']:.1f}"
        rows.append(("strangeness to the base", words))
    for name, words, digits in numbers:
        if f"{name}_after" in summary:
            before, after = (f"{summary[f'{name}_{when}']:.{digits}f}" for when in WHEN)
            rows.append((f"{words} before, after", f"{before}, {after}"))
    rows.append(("time, peak memory", f"{summary['seconds']:.0f} s, {summary['peak_memory_gib']:.1f} GiB"))
    lines = ["", "![Left: the base model. Right: after training](samples/before_and_after.png)", ""]
    lines += [f"- {' '.join(prompt.split())}" for prompt in prompts]
    lines += ["", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows), ""]
    return "\n".join(lines)


def report(run):
    """Lines to print of a judged run: what its summary says, and where its pictures are."""
    summary, sheet = run.summary, run.folder / "samples/contact_sheet.png"

    def change(name):
        return f"{summary[f'{name}_before']:.2f} -> {summary[f'{name}_after']:.2f}"

    lines = verdict(summary)
    if "distortion_after" in summary:
        lines += [f"distortion of the samples {change('distortion')} (0: like real clips; the base is not), "
                  f"speed of their subjects {change('speed')} of real ones'"]  # fmt: skip
        lines += ["beside it, of real clips': "
                  + ", ".join(f"{name} {change(name)}" for name in distortion.COMPANIONS[1:])]  # fmt: skip
    if "similarity_after" in summary:
        lines += [f"likeness of the samples {change('similarity')} (1: all the same)"]
    if "strangeness_asked" in summary and "strangeness_unasked" in summary:
        lines += [f"strangeness where the concept is asked for {summary['strangeness_asked']:.1f}, where not "
                  f"{summary['strangeness_unasked']:.1f}"]  # fmt: skip
    for name, asked in (("concept", "where it is asked for"), ("concept_unasked", "where not")):
        if f"{name}_after" in summary:
            lines += [f"concept score {asked} {change(name)}"]
    return [*lines, f"see {sheet}"]


# ----------------------------------------------------------------------------------------------------- merged adapters


@torch.no_grad()
def merging_errors(run, merged):
    """What merging a run's adapter into its base rounded: a dict of norms over the norm of the adapter's change.

    merged: the folder that `cogvideo_lite.merge` wrote. rounding: what the dtype of the base cannot hold.
    unchanged_share: share of the adapted weights whose bits are those of the base. nf4_error (QLoRA): what NF4 had
    changed in the base that the adapter was trained on. Raises UserError.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import LoraLayer

    run, merged = Path(os.path.expanduser(run)), Path(merged)
    config = cl.load_config(run / "config.json")
    base = cl.find_base(config.model)
    dtype = cl.dtype_on_disk(base.folder / "transformer")
    transformer = base.load("transformer", dtype)
    cl.add_trained_lora(transformer, config, run)
    qlora = config.method == "qlora"
    quantized = cl.load_quantized(base, "transformer", torch.float32, "cpu") if qlora else None
    files = sorted((merged / "transformer").glob("*.safetensors"))
    owner = {key: file for file in files for key in safe_open(str(file), "pt").keys()}
    change = rounding = nf4 = 0.0  # sums of squares
    unchanged = adapted = 0  # weights
    for name, layer in transformer.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        old, delta = layer.get_base_layer().weight, layer.get_delta_weight("default").float()
        new = cl.load_tensor(owner[f"{name}.weight"], f"{name}.weight")
        change += float(delta.square().sum())
        rounding += float((new.float() - (old.float() + delta)).square().sum())
        unchanged, adapted = unchanged + int((new == old).sum()), adapted + old.numel()
        if quantized:
            coarse = quantized.get_submodule(name).weight
            nf4 += float((dequantize_4bit(coarse.data, coarse.quant_state) - old.float()).square().sum())
    errors = {"dtype": str(dtype).removeprefix("torch."), "rounding": (rounding / change) ** 0.5}
    errors["unchanged_share"] = unchanged / adapted
    return errors | ({"nf4_error": (nf4 / change) ** 0.5} if quantized else {})


def merging_report(run, merged):
    """Lines to print on what merging rounded."""
    errors = merging_errors(run, merged)
    rounding, unchanged = (f"{100 * errors[name]:.2g} %" for name in ("rounding", "unchanged_share"))
    lines = [f"merged into {errors['dtype']}: rounding takes {rounding} of the adapter's change (norm), and leaves "
             f"{unchanged} of the adapted weights as they were"]  # fmt: skip
    if "nf4_error" in errors:
        lines += ["the adapter was trained on NF4 weights; those it stands on now differ from them by "
                  f"{errors['nf4_error']:.2g} times its change"]  # fmt: skip
    return lines
