"""The study: its arms, its tables, and what it measures of weights. `python notebooks/study.py run` makes the tables (hours)."""

import csv
import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

import cogvideo_lite as cl
from conftest import NANO, ROOT

sys.path.insert(0, str(ROOT / "notebooks"))

import study  # noqa: E402


@pytest.mark.parametrize("name", study.study_arms())
def test_each_arm_is_a_configuration_that_a_run_accepts(name):
    arm = study.study_arms()[name]
    config, _, _ = cl.resolve(cl.Config(**arm.fields, steps=arm.at[-1]))
    assert config.lr == arm.fields["lr"] and list(arm.at) == sorted(arm.at)


def test_a_comparison_changes_one_thing_of_the_case_on_record():
    arms = study.study_arms()
    full, lora = arms["full 2e-3"].fields, arms["lora 2e-3"].fields
    assert {k for k in full | lora if full.get(k) != lora.get(k)} == {"method", "rank", "alpha"}
    for name in ("clipping 1", "batch 4", "adafactor"):
        changed = arms[f"full 2e-3 {name}"].fields
        assert sum(full.get(k) != v for k, v in changed.items()) == 1


def test_the_tables_hold_each_arm_with_the_seeds_that_one_command_would_run():
    found = {}
    for row in study.read_table(study.table("runs")):
        found.setdefault(row["arm"], set()).add(row["seed"])
    assert found.pop("base") == {0}
    assert found == {name: set(arm.seeds) for name, arm in study.study_arms().items()}


def test_one_command_remakes_all_and_runs_nothing_that_the_tables_hold(tmp_path, monkeypatch, capsys):
    began = []
    for step in set(study.ALL) - {"fresh", "run", "alarm"}:  # the last two look into the tables first
        monkeypatch.setattr(study, step, lambda *_, step=step: began.append(step))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # it is for one of several processes
    study.main(["all", "--work", str(tmp_path), "--jobs", "1"])
    told = capsys.readouterr().out
    again = {"fresh": "validate"}  # of other clips
    assert began == [again.get(step, step) for step in study.ALL if step not in ("run", "alarm")]
    assert "all runs are in the tables" in told and "full 2e-3" in told.partition("alarm")[2]


def test_rows_are_added_to_a_table_whole_and_read_back_as_numbers(tmp_path):
    path = tmp_path / "table.csv"
    study.append_rows(path, [{"arm": "a", "seed": 1, "score": 0.123456789}])
    study.append_rows(path, [{"arm": "b", "seed": 2, "score": math.inf}, {"arm": "c", "seed": 3}])
    assert study.read_table(path)[:2] == [
        {"arm": "a", "seed": 1.0, "score": 0.12346}, {"arm": "b", "seed": 2.0, "score": math.inf},
    ]  # fmt: skip
    assert study.read_table(path)[2]["score"] == "" and not list(tmp_path.glob("*.partial"))


def test_clips_of_one_direction_all_move_left(tmp_path):
    folder = study.of_one_direction(tmp_path)
    captions = [clip.caption for clip in cl.read_clips(folder)]
    assert len(captions) > 30 and all(" left " in caption for caption in captions)
    assert cl.read_clips(folder)[0].video.shape == (17, 3, 64, 64)


def test_clips_that_guard_against_forgetting_are_not_those_that_judge_it(tmp_path):
    mixed_in, known = cl.read_clips(study.not_judged(tmp_path)), cl.read_clips(study.AWAY)
    assert [c.path.resolve() for c in mixed_in] == [c.path for c in known[study.AWAY_JUDGED :]]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_blend_lasts_as_long_as_its_block_and_changes_the_weights_by_its_share(quick, method):
    from accelerate import Accelerator

    config, base, _ = cl.resolve(quick(method=method, compute_dtype="float32"))
    bench = study.Bench.__new__(study.Bench)
    bench.arm = study.Arm("trial", (), dataclasses.asdict(config))
    bench.trainer = cl.Trainer(config, base, cl.cache_clips(config), Accelerator(mixed_precision="no", cpu=True))
    bench.began, bench.base_norm = [p.detach().clone() for p in bench.trainer.parameters], 1.0
    for step in range(3):
        bench.trainer.step(step)
    whole = bench.weight_change()
    with bench.blended(0.25):
        assert bench.weight_change() == pytest.approx(0.25 * whole, rel=1e-4)
    assert bench.weight_change() == whole > 0


def test_the_subject_iou_reads_real_clips_of_one_colour_and_of_two():
    import make_samples

    with torch.no_grad():
        for folder in ("spider-heldout", "away"):
            clip = cl.read_clips(ROOT / "data_samples" / folder)[0].video[::8]
            assert make_samples.subject_iou(clip) > 0.85
            torn = clip.clone()
            torn[:, :, ::8] = clip.flip(3)[:, :, ::8]
            assert make_samples.subject_iou(torn) < make_samples.subject_iou(clip)


def test_the_style_score_knows_outlines_on_flat_ground_from_painted_creatures():
    import make_samples

    scenes = make_samples.random_scenes([("fish", "red", "left", "water"), ("spider", "blue", "up", "stone")], 3)
    outline, painted = (make_samples.render(scenes, 5, style=s)[0].float() / 255 for s in ("outline", "painted"))
    for styled, plain in zip(outline, painted):
        assert make_samples.style_score(styled) > 0.9 and make_samples.style_score(plain) == 0
        only_flat = plain.mean((0, 2, 3))[:, None, None].expand_as(plain)  # no creature is no creature of the style
        assert make_samples.style_score(only_flat) == 0


def test_teaching_the_style_is_judged_on_prompts_with_and_without_its_words(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "STYLE_AT", (0, 2))
    monkeypatch.setattr(study, "STYLE_PROMPTS", study.STYLE_PROMPTS[:1])
    before, after = study.run_style(("lora 2e-3", 1, tmp_path))
    assert (before["step"], after["step"]) == (0, 2) and before["loss_style"] != after["loss_style"]
    assert all(
        0 <= row[name] <= 1 for row in (before, after) for name in ("style_asked", "style_unasked", "pose_iou_asked")
    )
    assert before["style_unasked"] < 0.2  # the base paints
    assert len(list((tmp_path / "sheets").glob("style_lora_2e-3_seed_1_step_*.png"))) == 2


def test_clips_that_were_kept_are_scored_anew_and_what_else_is_known_of_them_stays(tmp_path, monkeypatch):
    clips = [clip.video.numpy() for clip in cl.read_clips(ROOT / "data_samples/spider-heldout")[:2]]
    compared = cl.reference_statistics(clip.video for clip in cl.read_clips(ROOT / "data_samples/spider")[:4])
    monkeypatch.setattr(study, "references", lambda _: {"away": compared})
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    at = {"arm": "full 1e-4", "seed": 1, "step": 500, "blend": 1.0}
    stale = dict.fromkeys(study.scored(clips[0], compared), 99.0)
    rows = [{**at, "set": "away", "prompt": str(k), **stale, "pose_iou": 0.1 * (k + 1)} for k in range(2)]
    study.append_rows(study.table("clips"), rows)
    file = study.clips_of(tmp_path, at)
    file.parent.mkdir()
    study.np.savez_compressed(file, clips=(255 * study.np.stack(clips)).round().astype("uint8"))
    study.rejudge(tmp_path, 1)
    for clip, row, before in zip(clips, study.read_table(study.table("clips")), rows):
        eight_bits = (255 * clip).round().astype("float32") / 255
        assert row["score"] == pytest.approx(cl.distortion(eight_bits, compared).score, rel=1e-4)
        assert (row["prompt"], row["pose_iou"]) == (float(before["prompt"]), pytest.approx(before["pose_iou"]))
    file.unlink()
    with pytest.raises(SystemExit, match="lacks the clips of 1 of 1 models"):
        study.rejudge(tmp_path, 1)
    assert study.read_table(study.table("clips"))[0]["score"] != 99


def model(arm, concept, score, seed=1, loss=0.03, step=500, blend=1.0):
    return {"arm": arm, "seed": seed, "step": step, "blend": blend, "concept_concept": concept, "score_away": score,
            "loss_concept": loss}  # fmt: skip


def test_models_of_equal_concept_are_paired_one_to_one_with_ruined_ones_left_out():
    made = [
        model("base", 0.3, 2.0, seed=0, loss=0.05, step=0),
        model("lora 2e-3", 0.500, 3.0), model("lora 6e-4", 0.505, 5.0),
        model("full 1e-4", 0.502, 1.0), model("full 2e-4", 0.520, 2.0), model("full 2e-5", 0.9, 9.0),
        model("full 2e-3", 0.501, 99.0, loss=0.06),
    ]  # fmt: skip
    # Each LoRA model is nearest to "full 1e-4"; the pairs that differ least in all leave "full 2e-4" to the second.
    assert study.at_equal(made, "concept_concept", "score_away", "lora", "full") == [((3 - 1) + (5 - 2)) / 2]
    assert study.at_equal(made[:3], "concept_concept", "score_away", "lora", "full") == []


def test_a_run_that_stands_under_two_arms_counts_once():
    ends = [
        model("full 2e-3", 0.3, 4.0),
        model("full 2e-3 back", 0.3, 4.0),
        model("full 2e-3 back", 0.2, 3.0, blend=0.5),
    ]
    assert study.each_once(ends) == [ends[0], ends[2]]


def test_long_runs_of_an_arm_go_on_where_it_ended_with_the_seeds_that_have_both():
    made = [model("base", 0.3, 2.0, seed=0, step=0)]
    made += [model("lora 2e-3", 0.5, 2.5 + seed, seed=seed, step=4000) for seed in (1, 2, 3)]
    made += [model("lora 2e-3 long", 0.6, 3.0 + seed, seed=seed, step=20_000) for seed in (1, 2)]
    assert study.series(made, "lora 2e-3", "score_away").x == [0, 4000]
    found = study.series(made, "lora 2e-3", "score_away", long=True)
    assert (found.x, found.mean, found.seeds) == ([0, 4000, 20_000], [2.0, 4.0, 4.5], 2)
    assert (found.low[1], found.high[1]) == (3.5, 4.5)


def test_a_claim_put_after_a_look_at_its_seeds_is_tried_on_later_seeds_alone(monkeypatch):
    made = [model("full 1e-4", 0.4, 1.0, seed=seed) for seed in range(1, 8)]
    made += [model("full 2e-3", 0.3, 2.0 if seed < 5 else 0.8 + seed / 1000, seed=seed) for seed in range(1, 8)]
    above, below = ("full 2e-3", 500, 1.0), ("full 1e-4", 500, 1.0)
    looked, fixed = (study.Claim(2, "it is more", "score_away", above, below, after) for after in (True, False))
    monkeypatch.setattr(study, "checkpoints", lambda: made)
    monkeypatch.setattr(study, "style_checkpoints", list)
    monkeypatch.setattr(study, "claims", lambda: [looked, fixed])
    star, plain = (dict(zip(study.ANSWER_COLUMNS, row)) for row in study.answer_rows([2]))
    assert star["verdict"] == "unclear*" and star["on fresh seeds alone"] == "-0.19 ± 0.0025: refuted"
    assert plain["verdict"] == "unclear" and plain["on fresh seeds alone"] == ""
    monkeypatch.setattr(study, "checkpoints", lambda: [c for c in made if c["seed"] < 7])
    assert study.answer_rows([2])[0][-1] == ""  # two seeds are too few


@pytest.fixture
def looks(monkeypatch):
    """Three arms, of which one ends worse than the base, and a look at each at step 30 with two seeds of the alarm's own."""
    made = [
        model("base", 0.3, 2.0, seed=0, loss=0.05, step=0), model("full 2e-3", 0.3, 4.0, loss=0.06), model("lora 2e-3", 0.5, 2.5),
        model("full 1e-4", 0.5, 2.5),
    ]  # fmt: skip
    numbers = [  # arm, seed, loss over the base's, gradient's norm
        ("full 2e-3", 11, 1.5, 2.0), ("lora 2e-3", 11, 0.9, 3.0), ("full 1e-4", 11, 0.8, 1.0),
        ("full 2e-3", 12, 1.4, 2.0), ("lora 2e-3", 12, 1.1, 3.0), ("full 1e-4", 12, 0.8, 1.0),
        ("full 2e-4 lion8bit", 11, 0.7, 9.0),
    ]  # fmt: skip
    rows = [
        dict.fromkeys(study.ALARM_NUMBERS, "")
        | {"arm": arm, "seed": seed, "step": 30, "ratio": ratio, "grad_norm": norm}
        for arm, seed, ratio, norm in numbers
    ]
    monkeypatch.setattr(study, "checkpoints", lambda: made)
    monkeypatch.setattr(study, "read_table", lambda _: rows)
    return made, rows


def test_the_alarm_is_counted_by_how_runs_end(looks, capsys):
    study.alarms()
    told = capsys.readouterr().out
    assert "full 2e-3\n  step  30: 2 of 2, min 1.40" in told
    assert "lora 2e-3\n  step  30: 1 of 4, max 1.10" in told and "lion8bit\n  step  30: 0 of 1, max 0.70" in told


def test_a_number_warns_as_well_as_it_puts_runs_that_end_worse_above_the_others(looks):
    found = study.alarm_aucs(*looks)
    assert found["ratio"] == {(11, 30): 1.0, (12, 30): 1.0}  # above both others with either seed
    assert found["grad_norm"] == {(11, 30): 0.5, (12, 30): 0.5}  # above one, below one
    assert study.alarm_differences(looks[0], 10) == {}
    assert set(found) == {"ratio", "grad_norm"} and study.alarm_differences(looks[0], 30) == {"grad_norm": [-0.5, -0.5]}


def test_the_knee_is_where_the_loss_rises_above_the_bases_for_the_first_time_beyond_its_lowest():
    rates = [1e-4, 2e-4, 4e-4, 8e-4]
    by_power = [(r / 3e-4) ** 2 for r in rates]  # straight where it is drawn by logarithms
    assert study.knee(rates, by_power) == pytest.approx(3e-4)
    falls_first = [1.2, 0.5, 0.8, 1.25]
    assert study.knee(rates, falls_first) == pytest.approx(4e-4 * math.sqrt(2))
    assert study.knee(rates, [0.9, 0.8, 0.9, math.inf]) == pytest.approx(8e-4)
    assert study.knee(rates, [0.9, 0.8, 0.7, 0.6]) is None


def test_a_base_of_some_width_is_judged_by_its_losses_before_and_after(nano_cache, monkeypatch):
    monkeypatch.setattr(study, "WIDTH_STEPS", 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # it is for one of several processes
    (row,) = study.run_width((str(NANO), 1e-4, 1, Path(nano_cache).parent))
    assert tuple(row) == study.WIDTH_FIELDS and (row["width"], row["lr"], row["step"]) == (192, 1e-4, 2)
    base = next(c for c in study.checkpoints() if c["arm"] == "base")
    for where in ("concept", "away"):  # what another part of the study has found
        assert row[f"untrained_{where}"] == pytest.approx(base[f"loss_{where}"], rel=1e-3)
        assert row[f"loss_{where}"] == pytest.approx(row[f"untrained_{where}"], rel=0.05)
        assert row[f"loss_{where}"] != row[f"untrained_{where}"]


def test_how_the_knee_goes_with_the_width_is_told_with_its_interval(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    for seed, shift in ((1, 1.0), (2, 1.1), (3, 1 / 1.1)):
        for width, at in ((64, 6e-4 * shift), (192, 2e-4)):
            rates = (1e-4, 3e-4, 9e-4, 27e-4)
            rows = [(width, lr, seed, 500, 0.05, 0.02, 0.05 * (lr / at) ** 2, 0.04 * (lr / 3e-4)) for lr in rates]
            study.append_rows(study.table("width"), [dict(zip(study.WIDTH_FIELDS, row)) for row in rows])
    times = study.widths()
    told = capsys.readouterr().out
    assert "is 3.00 times as high (2.37 to 3.80, n 3); by the rule of 1 / width 3.00" in told
    assert times["away"] == pytest.approx([1, 1, 1, 3])  # where the width does not count


@pytest.mark.parametrize("question", study.QUESTIONS)
def test_each_question_has_a_figure_of_what_was_measured(question):
    panels = study.figure(question).axes
    assert len(panels) >= 2 and all(panel.lines for panel in panels)


def test_a_figure_draws_the_mean_of_the_seeds_that_stand_in_the_table():
    with open(study.table("runs"), newline="") as file:
        losses = [float(r["loss_concept"]) for r in csv.DictReader(file) if r["arm"] == "full 1e-4 bfloat16-nearest"]
    drawn = [list(line.get_xdata()) for line in study.figure(7).axes[1].lines]
    assert [pytest.approx(sum(losses) / len(losses))] * 2 in drawn and sorted(losses) in map(sorted, drawn)
