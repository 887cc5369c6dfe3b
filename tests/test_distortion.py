"""The distortion score against changes of known size, drawn by notebooks/study.py, and the page that compares runs.

`python notebooks/study.py validate` is the long form: every strength, more clips.
"""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cogvideo_lite as cl
import distortion
import judge
import compare
from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))

import findings  # noqa: E402
import make_samples  # noqa: E402
import study  # noqa: E402

CLIPS = 5


@pytest.fixture(scope="module")
def kumo():
    """(statistics of real clips, held-out real clips, masks, scenes)."""
    reference, heldout, masks, scenes = study.concept_world(CLIPS)
    return distortion.reference_statistics(reference), heldout, masks, scenes


def total(found):
    """What the score is made of: the score itself hides under 0 what is less than usual."""
    return found.shape + found.motion + found.texture


@pytest.fixture(scope="module")
def clean(kumo):
    return [total(distortion.distortion(clip, kumo[0])) for clip in kumo[1]]


@pytest.fixture(scope="module")
def distorted(kumo):
    """name -> totals of the held-out clips, each distorted at the middle one of five strengths."""
    reference, heldout, masks, _ = kumo
    return {
        name: [
            total(distortion.distortion(change(clip, strengths[2], np.random.default_rng(i), masks[i]), reference))
            for i, clip in enumerate(heldout)
        ]
        for name, (change, strengths) in study.DISTORTIONS.items()
    }


@pytest.mark.parametrize("name", study.DISTORTIONS)
def test_a_distortion_of_middle_strength_scores_higher_than_real_clips(clean, distorted, name):
    assert findings.auc(distorted[name], clean) >= 0.95


def test_missing_legs_score_higher_the_more_there_are(kumo, clean):
    reference, _, _, scenes = kumo
    medians = [float(np.median(clean))]
    for number in (3, 7):
        lame = dataclasses.replace(scenes, species=[make_samples.without_legs("kumo", number)] * CLIPS)
        medians.append(float(np.median([total(distortion.distortion(clip, reference)) for clip in study.drawn(lame)[0]])))
    assert medians == sorted(medians) and medians[1] > medians[0] + 0.5


def test_validation_has_a_row_for_each_change_of_a_clip(kumo, monkeypatch):
    reference, heldout, masks, scenes = kumo
    monkeypatch.setattr(study, "DISTORTIONS", {"grid": study.DISTORTIONS["grid"]})
    monkeypatch.setattr(study, "HARMLESS", {"zoom": study.HARMLESS["zoom"]})
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # it is for one of several processes
    rows = study.changes_judged(reference, 3, heldout[0], masks[0], scenes[[0]])
    assert [(row["change"], row["strength"]) for row in rows] == [
        ("clean", 0), ("zoom", 0), *(("grid", k) for k in range(1, 6)), *(("legs dropped", k) for k in range(1, 6)),
    ]  # fmt: skip
    assert {row["clip"] for row in rows} == {3} and rows[0]["score"] < rows[6]["score"]


def test_fresh_clips_for_validation_are_kumo_where_no_bundled_clip_has_it(kumo):
    reference, heldout, masks, scenes = study.concept_world(3, seed=11)
    assert [clip.shape for clip in heldout] == [(17, 3, 64, 64)] * 3 and masks.shape == (3, 17, 64, 64)
    assert set(scenes.species) == {"kumo"} and len(reference) == 48
    known = [make_samples.read_scenes(ROOT / "data_samples" / name).motion for name in ("spider", "spider-heldout")]
    assert not torch.isin(scenes.motion, torch.cat(known)).any()
    again = study.concept_world(3, seed=11)[3]
    assert torch.equal(again.motion, scenes.motion) and again.ground == scenes.ground


@pytest.mark.parametrize("name", study.HARMLESS)
def test_a_harmless_change_moves_the_median_by_less_than_a_tenth_of_what_distortions_do(kumo, clean, distorted, name):
    changed = [total(distortion.distortion(study.HARMLESS[name](clip), kumo[0])) for clip in kumo[1]]
    allowed = np.median([np.median(totals) - np.median(clean) for totals in distorted.values()]) / 10
    assert abs(np.median(changed) - np.median(clean)) < allowed


@pytest.mark.parametrize(
    "clip",
    [
        np.zeros((5, 1, 64, 64), np.float32), np.zeros((5, 4, 64, 64), np.float32), np.zeros((5, 3, 1, 1), np.float32),
        np.zeros((5, 3, 64, 64), np.uint8), np.zeros((3, 64, 64), np.float32),
    ],
    ids=["grey", "with alpha", "a pixel", "bytes", "a frame"],
)  # fmt: skip
def test_what_is_no_clip_is_refused_in_one_line(kumo, clip):
    with pytest.raises(ValueError, match="frames x 3 x height x width"):
        distortion.distortion(clip, kumo[0])


def test_tensors_of_any_floating_type_are_judged_with_or_without_gradients(kumo):
    reference, heldout, _, _ = kumo
    clip = torch.from_numpy(heldout[0])
    score = distortion.distortion(clip, reference).score
    assert distortion.distortion(clip.clone().requires_grad_(), reference).score == score
    assert distortion.distortion(clip.bfloat16(), reference).score == pytest.approx(score, abs=0.3)


def test_of_two_frames_it_says_that_shaking_is_not_judged(kumo):
    reference, heldout, _, _ = kumo
    assert any("shaking" in why for why in distortion.distortion(heldout[0][:2], reference).unjudged)
    assert not any("shaking" in why for why in distortion.distortion(heldout[0][:3], reference).unjudged)


def test_a_frozen_clip_is_told_by_its_speed(kumo):
    reference, heldout, _, _ = kumo
    frozen = np.repeat(heldout[0][8:9], 17, axis=0)
    assert distortion.distortion(frozen, reference).speed < 0.1 < 0.5 < distortion.distortion(heldout[0], reference).speed


@pytest.mark.parametrize(
    "clip",
    [
        torch.zeros(17, 3, 64, 64), torch.ones(2, 3, 16, 40), torch.rand(5, 3, 33, 47, generator=torch.manual_seed(0)),
        torch.full((3, 3, 64, 64), math.nan), torch.full((3, 3, 64, 64), math.inf), torch.rand(9, 3, 100, 20, generator=torch.manual_seed(1)),
    ],
    ids=["black", "white, two frames", "noise", "not a number", "infinite", "tall"],
)  # fmt: skip
def test_every_clip_gets_a_finite_score_and_one_that_shows_no_subject_a_high_one(kumo, clip):
    found = distortion.distortion(clip, kumo[0])
    numbers = [v for v in dataclasses.astuple(found) if isinstance(v, float)]
    assert len(numbers) == 8 and all(map(math.isfinite, numbers))
    assert found.score > 1 and found.unjudged


def test_a_list_of_clips_serves_as_reference_too_and_the_cache_gives_back_the_same(kumo, tmp_path):
    clips = cl.read_clips("data_samples/spider")[:4]
    whole, clip = judge.cached_reference(clips, tmp_path), kumo[1][0]
    again = judge.cached_reference(clips, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    listed = distortion.distortion(clip, [c.video for c in clips])
    assert listed == distortion.distortion(clip, whole) == distortion.distortion(clip, again)


def test_what_cannot_be_judged_is_refused_in_one_line(kumo):
    with pytest.raises(ValueError, match="at least 2 frames"):
        distortion.distortion(kumo[1][0][:1], kumo[0])
    with pytest.raises(ValueError, match="2 reference clips"):
        distortion.distortion(kumo[1][0], kumo[1][:2])


def test_lines_every_16_px_are_a_grid_and_a_lone_step_is_none():
    y = torch.arange(96)
    lines = (y % 16 == 0).float()
    grid = 0.5 + 0.2 * torch.maximum(lines[:, None], lines[None])
    assert distortion.grid_energy(grid.expand(2, 3, 96, 96).numpy()) > 3
    assert distortion.grid_energy((y > 40).float()[:, None].expand(2, 3, 96, 96).numpy()) < 3


def test_lines_are_measured_by_how_dark_they_are_and_only_where_they_run_through_the_frame():
    y = torch.arange(96)
    ground = 0.5 + 0.3 * torch.rand(96, 96, generator=torch.manual_seed(0))
    for level in (0.0, 0.05, 0.2):
        grid = 0.6 - level * torch.maximum((y % 16 == 5).float()[:, None], (y % 16 == 5).float()[None])
        # Of 16 places one stands out by the level, and its neighbours by half of it.
        expected = float(torch.tensor([level, level / 2, level / 2] + [0.0] * 13).std(correction=0))
        assert distortion.grid_lines(grid.expand(9, 3, 96, 96).numpy()) == pytest.approx(expected, abs=1e-6)
    assert distortion.grid_lines((y > 40).float()[:, None].expand(2, 3, 96, 96).numpy()) == 0
    assert distortion.grid_lines(ground.expand(2, 3, 96, 96).numpy()) < 0.02
    assert distortion.grid_lines(np.zeros((2, 3, 16, 40), np.float32)) == 0  # less than two periods


def test_what_moves_on_does_not_shake_nor_does_a_camera_and_what_is_torn_to_and_fro_does():
    grid = distortion.pixel_grid(96, 128)
    shear = np.zeros((96, 128, 2), np.float32)
    shear[..., 0] = 5 * np.sin(2 * math.pi * grid[..., 1] / 24)
    there = np.full((96, 128, 2), 4, np.float32)
    assert distortion.shake([shear] * 3, grid) == pytest.approx([0, 0], abs=1e-6)
    assert distortion.shake([there, -there, there], grid) == pytest.approx([0, 0], abs=1e-5)
    # Of a sine the median size is 1 / sqrt(2); the field of 5 px turns round, a change of 10.
    assert distortion.shake([shear, -shear, shear], grid) == pytest.approx([10 / math.sqrt(2) / distortion.WORK_PX] * 2, rel=0.1)
    assert len(distortion.shake([shear], grid)) == 0


@pytest.fixture(scope="module")
def butterflies():
    """(statistics of real clips, held-out real clips, masks) of the base's creatures, butterflies held out."""
    reference, heldout, masks, scenes = study.base_world(24)
    these = [i for i, species in enumerate(scenes.species) if species == "butterfly"][:CLIPS]
    return distortion.reference_statistics(reference), [heldout[i] for i in these], [masks[i] for i in these]


@pytest.mark.parametrize("name", ["swirl", "grid", "elastic"])
def test_among_many_kinds_of_creature_a_distorted_one_scores_higher(butterflies, name):
    reference, heldout, masks = butterflies
    change, strengths = study.DISTORTIONS[name]
    changed = [change(clip, strengths[2], np.random.default_rng(i), masks[i]) for i, clip in enumerate(heldout)]
    clean, distorted = ([total(distortion.distortion(clip, reference)) for clip in clips] for clips in (heldout, changed))
    assert findings.auc(distorted, clean) >= 0.95


def test_the_inside_of_an_outline_is_judged_too(butterflies):
    reference, heldout, masks = butterflies
    for clip, mask in zip(heldout, masks):
        turned = clip.transpose(0, 2, 3, 1).copy()
        for frame, inside in zip(turned, mask):
            places = np.argwhere(inside)
            row, column = places.mean(0).round().astype(int)
            across = places[:, ::-1] * [1, -1] + [row - column, row + column]  # a quarter turn around the centre
            across = across.clip(0, np.array(inside.shape) - 1)
            usual = np.median(frame[inside], axis=0)
            frame[inside] = np.where(
                inside[across[:, 0], across[:, 1], None], frame[across[:, 0], across[:, 1]], usual
            )  # the outline is the same
        before, after = (
            distortion.distances(distortion.measure(video), reference.clips) for video in (clip, turned.transpose(0, 3, 1, 2))
        )
        farther = {name: after[name] - before[name] for name in distortion.SHAPE}
        # A subject is found by its colours, too, so that its outline is not found quite the same.
        assert farther["markings"] > max(0.05, 2 * farther["outlines"])


def test_statistics_are_kept_as_they_were_measured(kumo, tmp_path):
    clips = cl.read_clips("data_samples/spider")[:3]
    kept = judge.cached_reference(clips, tmp_path).clips
    for clip, found in zip(clips, kept):
        measured = distortion.measure(clip.video)
        assert set(found) == set(distortion.REFERENCE_MEASURES)
        assert all(np.array_equal(measured[name], found[name]) for name in found)


def test_the_concept_score_knows_kumo_from_a_plain_spider():
    rows = [("kumo", "yellow", "left", "water"), ("spider", "red", "left", "water"), ("spider", "purple", "up", "sand")]
    video = make_samples.render(make_samples.random_scenes(rows, 3))[0].float() / 255
    kumo, *others = (make_samples.concept_score(clip) for clip in video)
    assert kumo > 0.85 and max(others) < 0.5


# -------------------------------------------------------------------------------------------------------- runs


def test_a_run_reports_distortion_and_its_companions_before_and_after(quick):
    run = judge.judge(cl.train(quick()).folder)
    for name in ("distortion_before", "distortion_after", "speed_before", "speed_after"):
        assert math.isfinite(run.summary[name])
    assert "distortion of samples" in (run.folder / "README.md").read_text()
    assert cl.load_run(run.folder).summary == run.summary
    told = "\n".join(judge.report(run)).partition("beside it")[2]
    for name in ("sharpness", "saturation", "grid"):
        before, after = (run.summary[f"{name}_{when}"] for when in ("before", "after"))
        assert f"{name} {before:.2f} -> {after:.2f}" in told
    assert "concept_after" not in run.summary  # of clips that are not the bundled ones no truth is known


def test_samples_of_a_run_on_the_bundled_clips_are_held_against_what_the_renderer_knows(tmp_path):
    """Two real clips of kumo as samples of a prompt for it, and one of a fish as that of another: "after" is the other way round."""
    config = cl.Config(data=str(ROOT / "data_samples/spider"))
    rows = [("kumo", "yellow", "left", "water"), ("fish", "red", "left", "water")]
    kumo, fish = make_samples.render(make_samples.random_scenes(rows, 3))[0].float() / 255
    (tmp_path / "samples").mkdir()
    for k, (before, after) in enumerate(((fish, kumo), (kumo, fish))):
        cl.write_video(tmp_path / f"samples/before-{k}.mp4", before, 8)
        cl.write_video(tmp_path / f"samples/after-{k}.mp4", after, 8)
    prompts = ("a spider named kumo moving left over water", "a red fish moving left over water")
    rows, clips = judge.judge_samples(tmp_path, dict.fromkeys(prompts), {None: None}, make_samples)
    found = judge.medians(rows, clips, make_samples.CONCEPT)
    assert found["concept_before"] < 0.3 < 0.8 < found["concept_after"]
    assert found["concept_unasked_after"] < 0.3 < 0.8 < found["concept_unasked_before"]
    assert "distortion_after" not in found  # there were no references
    assert judge.concept_truth(dataclasses.replace(config, data=str(tmp_path))) is None


def test_each_base_has_a_column_of_its_own(quick, tmp_path):
    runs = [cl.train(quick(family, out=str(tmp_path / family))).folder for family in ("2b", "5b")]
    for folder in runs:
        judge.judge(folder)
    assert compare.compare(runs, tmp_path / "page.html").read_text().count("<video") == 4


def test_a_file_of_a_run_that_cannot_be_read_is_named_in_one_line(quick, tmp_path, capsys):
    folder = judge.judge(cl.train(quick()).folder).folder
    for name in ("samples/distortion.json", "summary.json", "metrics.jsonl"):
        whole = (folder / name).read_text()
        (folder / name).write_text(whole[: len(whole) // 2])
        capsys.readouterr()
        assert cl.main(["--compare", str(folder), "--out", str(tmp_path / "page.html")]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and Path(name).name in told
        (folder / name).write_text(whole)
    (folder / "samples/distortion.json").write_text(
        '[{"prompt": "a", "before": {"of another version": 1}, "after": null}]'
    )
    assert cl.main(["--compare", str(folder)]) == 2 and "--judge" in capsys.readouterr().err
    assert cl.main(["--compare", str(folder), "--out", str(tmp_path)]) == 2


def test_runs_are_compared_on_one_page_that_needs_nothing_else(quick, tmp_path, capsys):
    runs = [cl.train(quick(out=str(tmp_path / name), lr=lr)).folder for name, lr in (("low", 1e-4), ("high", 1e-2))]
    assert cl.main(["--compare", *map(str, runs)]) == 2 and f"--judge {runs[0]}" in capsys.readouterr().err
    for folder in runs:
        assert cl.main(["--judge", str(folder)]) == 0
    page = tmp_path / "page.html"
    assert cl.main(["--compare", *map(str, runs), "--out", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    text = page.read_text()
    assert text.count("<video") == 3  # the base and two runs, one prompt
    assert not re.findall(r"(?:src|href)=[\"']?(?!data:|#)\w+", text.partition("<script>")[0])
    assert "<td>lr</td><td>0.0001</td><td>0.01</td>" in text and "<path" in text
    for folder in runs:
        assert f"<td>{cl.load_run(folder).summary['distortion_after']:.4g}</td>" in text


def test_an_unfinished_run_is_not_compared(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert cl.main(["--compare", str(tmp_path)]) == 2
    assert "not finished" in capsys.readouterr().err
    assert cl.main(["--compare", str(tmp_path / "none")]) == 2


def test_stills_are_trained_on_but_not_judged_and_why_is_printed(quick, capsys):
    run = judge.judge(cl.train(quick(frames=1, steps=1, checkpoint_every=1)).folder)
    assert "distortion_after" not in run.summary and "stills have no motion" in capsys.readouterr().out


def test_a_run_whose_samples_cannot_be_judged_is_finished_all_the_same(quick, monkeypatch):
    monkeypatch.setattr(distortion, "distortion", lambda *_: 1 / 0)
    config = quick(steps=1, checkpoint_every=1)
    with pytest.raises(ZeroDivisionError):
        judge.judge(cl.train(config).folder)
    assert cl.load_run(config.out).summary["steps"] == 1


def test_judging_twice_gives_the_same_files(quick):
    folder = judge.judge(cl.train(quick()).folder).folder
    names = ("samples/distortion.json", "summary.json", "README.md")
    first = [(folder / name).read_bytes() for name in names]
    judge.judge(folder)
    assert [(folder / name).read_bytes() for name in names] == first


def test_a_run_that_was_not_judged_says_nothing_of_distortion(quick):
    run = cl.train(quick())
    assert not [name for name in run.summary if "distortion" in name]
    assert "distortion" not in (run.folder / "README.md").read_text()
    assert not (run.folder / "samples/distortion.json").exists()


def test_runs_of_before_the_speed_had_its_name_are_compared_too(quick, tmp_path):
    folder = judge.judge(cl.train(quick()).folder).folder
    summary = json.loads((folder / "summary.json").read_text())
    older = {name.replace("speed_", "motion_"): value for name, value in summary.items()}
    (folder / "summary.json").write_text(json.dumps(older))
    page = compare.compare([folder], tmp_path / "page.html").read_text()
    assert f"<td>speed_after</td><td>{summary['speed_after']:.4g}</td>" in page
