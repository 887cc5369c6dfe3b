"""The study: its settings ("arms"), its tables, and what it measures of weights. test_findings.py has what came of it.

`python notebooks/study.py run` makes the tables (hours).
"""

import dataclasses
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import cogvideo_lite as cl
import distortion
from conftest import NANO, ROOT

sys.path.insert(0, str(ROOT / "notebooks"))

import findings  # noqa: E402
import study  # noqa: E402


@pytest.mark.parametrize("name", study.study_arms())
def test_each_arm_is_a_configuration_that_a_run_accepts(name):
    arm = study.study_arms()[name]
    config, _, _ = cl.resolve(cl.Config(**arm.fields, steps=arm.at[-1]))
    assert config.lr == arm.fields["lr"] and list(arm.at) == sorted(arm.at)


def test_a_comparison_changes_one_thing_of_the_reported_case():
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
    for step in ("validate", "run_arm", "run_alarm", "run_style", "run_width"):
        monkeypatch.setattr(study, step, lambda *_, step=step: began.append(step))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # it is for one of several processes
    study.main(["all", "--work", str(tmp_path), "--jobs", "1"])
    printed = capsys.readouterr().out
    assert began == ["validate", "validate"]  # of the held-out clips, and of fresh ones
    assert re.findall(r"^\w+$", printed, re.M) == list(study.ALL)
    assert "all runs are in the tables" in printed and printed.endswith("python notebooks/findings.py all\n")


def test_what_a_table_lacks_is_run_and_added(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    done = []

    def at_once(function, tasks, jobs, what, tasks_each=None):  # in this process
        return enumerate([function(*task) for task in tasks])

    def row_of(name, seed, work):
        done.append((name, seed))
        return {"runs": [{"arm": name, "seed": seed}], "clips": [{"arm": name, "score": 1.0}]}

    monkeypatch.setattr(study, "in_processes", at_once)
    study.fill("runs", ("arm", "seed"), row_of, [("a", 1)], tmp_path, 1)
    study.fill("runs", ("arm", "seed"), row_of, [("a", 1), ("a", 2)], tmp_path, 1)
    assert done == [("a", 1), ("a", 2)]
    assert [r["seed"] for r in study.read_table(study.table("runs"))] == [1, 2]
    assert len(study.read_table(study.table("clips"))) == 2


def test_tasks_are_done_in_processes_of_their_own():
    found = dict(study.in_processes(divmod, [(7, 2), (9, 4)], 1, "divide"))
    assert found == {0: (3, 1), 1: (2, 1)}


def test_a_training_is_looked_at_where_it_is_asked_for_and_ends_with_a_loss_that_is_not_finite():
    class Trainer:
        def step(self, number):
            if number == 4:
                raise cl.RunError("the loss is not finite")
            return number

    assert list(study.looks_along(Trainer(), (0, 2, 3))) == [(0, []), (2, [0, 1]), (3, [2])]
    assert list(study.looks_along(Trainer(), (2, 9))) == [(2, [0, 1]), (5, None)]


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
    monkeypatch.setattr(study, "STYLE_PICTURED", (0, 2))
    monkeypatch.setattr(study, "STYLE_PROMPTS", study.STYLE_PROMPTS[:1])
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    before, after = study.run_style("style lora 2e-3", 1, tmp_path)["style"]
    assert (before["step"], after["step"]) == (0, 2) and before["loss_style"] != after["loss_style"]
    for row in (before, after):
        assert all(0 <= row[name] <= 1 for name in ("style_asked", "style_unasked", "pose_iou_asked"))
    assert before["style_unasked"] < 0.2  # the base paints
    assert len(list((tmp_path / "sheets").glob("style_lora_2e-3_seed_1_step_*.webp"))) == 2


def test_a_contact_sheet_gives_back_the_frames_of_its_clips(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    clips = [clip.video for clip in cl.read_clips(ROOT / "data_samples/spider-heldout")[:2]]
    at = {"arm": "full 1e-4", "seed": 1, "step": 500, "blend": 1}
    study.save_picture(at, clips, ["one", "two"])
    study.save_picture({**at, "seed": 2}, clips, ["one", "two"])  # which no lesson shows
    study.save_picture({**at, "arm": "full 6e-4 ema 0.99"}, clips, ["one", "two"])
    assert list((tmp_path / "sheets").iterdir()) == [study.picture_of(at)]
    for clip, frames in zip(clips, study.on_sheet(study.picture_of(at), 2)):
        assert frames.shape == (study.SHEET_FRAMES, 3, 64, 64)
        assert (frames[[0, -1]] - clip[[0, -1]]).abs().mean() < 0.03


def test_captions_are_read_part_by_part_from_the_clips():
    import make_samples

    clip, other = cl.read_clips(ROOT / "data_samples/away")[:2]
    frames = clip.video[study.CAPTION_FRAMES]
    shown = make_samples.captions_shown({clip.caption: frames, other.caption: frames})
    assert all(shown[clip.caption].values())  # a real clip
    known = {make_samples.caption(*row): row for rows in make_samples.combinations() for row in rows}
    alike = [a == b for a, b in zip(known[clip.caption], known[other.caption])]
    assert list(shown[other.caption].values()) == alike and not all(alike)


def test_clips_that_were_kept_are_scored_anew_and_what_else_is_known_of_them_stays(tmp_path, monkeypatch):
    clips = [clip.video.numpy() for clip in cl.read_clips(ROOT / "data_samples/spider-heldout")[:2]]
    compared = distortion.reference_statistics(clip.video for clip in cl.read_clips(ROOT / "data_samples/spider")[:4])
    monkeypatch.setattr(study, "references", lambda _: {"away": compared})
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    at = {"arm": "full 1e-4", "seed": 1, "step": 500, "blend": 1.0}
    stale = dict.fromkeys(study.scored(clips[0], compared), 99.0)
    rows = [{**at, "set": "away", "prompt": str(k), **stale, "pose_iou": 0.1 * (k + 1)} for k in range(2)]
    study.append_rows(study.table("clips"), rows)
    file = study.clips_of(tmp_path, at)
    file.parent.mkdir()
    study.np.savez_compressed(file, clips=(255 * study.np.stack(clips)).round().astype("uint8"))
    study.rejudge(tmp_path)
    for clip, row, before in zip(clips, study.read_table(study.table("clips")), rows):
        eight_bits = (255 * clip).round().astype("float32") / 255
        assert row["score"] == pytest.approx(distortion.distortion(eight_bits, compared).score, rel=1e-4)
        assert (row["prompt"], row["pose_iou"]) == (float(before["prompt"]), pytest.approx(before["pose_iou"]))
    file.unlink()
    with pytest.raises(SystemExit, match="lacks the clips of 1 of 1 models"):
        study.rejudge(tmp_path)
    assert study.read_table(study.table("clips"))[0]["score"] != 99


def test_a_base_of_some_width_is_judged_by_its_losses_before_and_after(nano_cache, monkeypatch):
    monkeypatch.setattr(study, "WIDTH_STEPS", 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # it is for one of several processes
    (row,) = study.run_width({192: NANO}, 192, 1e-4, 1, Path(nano_cache).parent)["width"]
    assert tuple(row) == study.WIDTH_FIELDS and (row["width"], row["lr"], row["step"]) == (192, 1e-4, 2)
    base = next(c for c in findings.checkpoints() if c["arm"] == "base")
    for where in ("concept", "away"):  # what another part of the study has found
        assert row[f"untrained_{where}"] == pytest.approx(base[f"loss_{where}"], rel=1e-3)
        assert row[f"loss_{where}"] == pytest.approx(row[f"untrained_{where}"], rel=0.05)
        assert row[f"loss_{where}"] != row[f"untrained_{where}"]
