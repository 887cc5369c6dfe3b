"""The study: its arms, its tables, and what it measures of weights. `python notebooks/study.py run` makes the tables (hours)."""

import csv
import dataclasses
import math
import sys

import pytest
import torch

import cogvideo_lite as cl
from conftest import ROOT

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


def test_rows_are_added_to_a_table_whole_and_read_back_as_numbers(tmp_path):
    path = tmp_path / "table.csv"
    study.append_rows(path, [{"arm": "a", "seed": 1, "score": 0.123456789}])
    study.append_rows(path, [{"arm": "b", "seed": 2, "score": math.inf}, {"arm": "c", "seed": 3}])
    assert study.read_table(path)[:2] == [
        {"arm": "a", "seed": 1.0, "score": 0.12346}, {"arm": "b", "seed": 2.0, "score": math.inf},
    ]  # fmt: skip
    assert study.read_table(path)[2]["score"] == "" and not list(tmp_path.glob("*.partial"))


def test_clips_of_one_direction_all_move_left(tmp_path):
    folder = study.subset_of_one_direction(tmp_path)
    captions = [clip.caption for clip in cl.read_clips(folder)]
    assert len(captions) > 30 and all(" left " in caption for caption in captions)
    assert cl.read_clips(folder)[0].video.shape == (17, 3, 64, 64)


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


@pytest.mark.parametrize("question", study.QUESTIONS)
def test_each_question_has_a_figure_of_what_was_measured(question):
    panels = study.figure(question).axes
    assert len(panels) >= 2 and all(panel.lines for panel in panels)


def test_a_figure_draws_the_mean_of_the_seeds_that_stand_in_the_table():
    with open(study.table("runs"), newline="") as file:
        losses = [float(r["loss_concept"]) for r in csv.DictReader(file) if r["arm"] == "full 1e-4 bfloat16-nearest"]
    drawn = [list(line.get_xdata()) for line in study.figure(7).axes[1].lines]
    assert [pytest.approx(sum(losses) / len(losses))] * 2 in drawn and sorted(losses) in map(sorted, drawn)
