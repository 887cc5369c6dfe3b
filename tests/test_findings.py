"""What came of the study: series, pairs, claims and their verdicts, figures, and the page that is written from them."""

import csv
import math
import re

import pytest

from conftest import ROOT

import findings
import study

PAGE = ROOT / "notebooks/results/README.md"


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
    assert findings.at_equal(made, "concept_concept", "score_away", "lora", "full") == [((3 - 1) + (5 - 2)) / 2]
    assert findings.at_equal(made[:3], "concept_concept", "score_away", "lora", "full") == []


def test_a_run_that_stands_under_two_arms_counts_once():
    ends = [
        model("full 2e-3", 0.3, 4.0),
        model("full 2e-3 back", 0.3, 4.0),
        model("full 2e-3 back", 0.2, 3.0, blend=0.5),
    ]
    assert findings.each_once(ends) == [ends[0], ends[2]]


def test_long_runs_of_an_arm_go_on_where_it_ended_with_the_seeds_that_have_both():
    made = [model("base", 0.3, 2.0, seed=0, step=0)]
    made += [model("lora 2e-3", 0.5, 2.5 + seed, seed=seed, step=4000) for seed in (1, 2, 3)]
    made += [model("lora 2e-3 long", 0.6, 3.0 + seed, seed=seed, step=20_000) for seed in (1, 2)]
    assert findings.series(made, "lora 2e-3", "score_away").x == [0, 4000]
    found = findings.series(made, "lora 2e-3", "score_away", long=True)
    assert (found.x, found.mean, found.seeds) == ([0, 4000, 20_000], [2.0, 4.0, 4.5], 2)
    assert (found.low[1], found.high[1]) == (3.5, 4.5)


def test_a_claim_put_after_a_look_at_its_seeds_is_tried_on_later_seeds_alone(monkeypatch):
    made = [model("full 1e-4", 0.4, 1.0, seed=seed) for seed in range(1, 8)]
    made += [model("full 2e-3", 0.3, 2.0 if seed < 5 else 0.8 + seed / 1000, seed=seed) for seed in range(1, 8)]
    above, below = "full 2e-3, 500", "full 1e-4, 500"
    looked = findings.Claim("", 2, "it is more", "score_away", above, below, put="after", seen="seeds 1 to 4")
    fixed = findings.Claim("", 2, "it is more", "score_away", above, below)
    monkeypatch.setattr(findings, "checkpoints", lambda: made)
    monkeypatch.setattr(findings, "style_checkpoints", list)
    monkeypatch.setattr(findings, "claims", lambda: [looked, fixed])
    after, before = findings.verdict_rows([2])
    assert (after["verdict"], after["put"]) == ("cannot tell", "after")
    assert after["fresh seeds alone"] == "-0.19 ± 0.0025: refuted"
    assert (before["verdict"], before["put"], before["fresh seeds alone"]) == ("cannot tell", "before", "")
    monkeypatch.setattr(findings, "checkpoints", lambda: [c for c in made if c["seed"] < 7])
    assert findings.verdict_rows([2])[0]["fresh seeds alone"] == ""  # two seeds are too few


@pytest.fixture
def looks(monkeypatch):
    """Three arms, of which one ends worse than the base; a look at each at step 30 with two seeds."""
    made = [
        model("base", 0.3, 2.0, seed=0, loss=0.05, step=0), model("full 2e-3", 0.3, 4.0, loss=0.06),
        model("lora 2e-3", 0.5, 2.5), model("full 1e-4", 0.5, 2.5),
    ]  # fmt: skip
    numbers = [  # arm, seed, loss over the base's, gradient's norm
        ("full 2e-3", 11, 1.5, 2.0), ("lora 2e-3", 11, 0.9, 3.0), ("full 1e-4", 11, 0.8, 1.0),
        ("full 2e-3", 12, 1.4, 2.0), ("lora 2e-3", 12, 1.1, 3.0), ("full 1e-4", 12, 0.8, 1.0),
        ("full 2e-4 lion8bit", 11, 0.7, 9.0),
    ]  # fmt: skip
    rows = [
        dict.fromkeys(findings.ALARM_NUMBERS, "")
        | {"arm": arm, "seed": seed, "step": 30, "ratio": ratio, "grad_norm": norm}
        for arm, seed, ratio, norm in numbers
    ]
    monkeypatch.setattr(findings, "checkpoints", lambda: made)
    monkeypatch.setattr(study, "read_table", lambda _: rows)
    return made, rows


def test_the_alarm_is_counted_by_how_runs_end(looks):
    counts = {row["runs of"]: row["step 30"] for row in findings.alarms()}
    assert counts["full 2e-3"] == "2 of 2, min 1.40"
    assert counts["full 1e-4, lora 2e-3"] == "1 of 4, max 1.10"
    assert counts["full 2e-4 lion8bit"] == "0 of 1, max 0.70"


def test_a_number_warns_as_well_as_it_puts_runs_that_end_worse_above_the_others(looks):
    found = findings.alarm_aucs(*looks)
    assert found["ratio"] == {(11, 30): 1.0, (12, 30): 1.0}  # above both others with either seed
    assert found["grad_norm"] == {(11, 30): 0.5, (12, 30): 0.5}  # above one, below one
    assert set(found) == {"ratio", "grad_norm"}
    claim = findings.Claim("", 10, "it warns better", "auc", "grad_norm, 30", "ratio, 30")
    assert findings.differences(claim, looks[0]) == [-0.5, -0.5]
    early = findings.Claim("", 10, "it warns better", "auc", "grad_norm, 10", "ratio, 10")
    assert findings.differences(early, looks[0]) == []


def test_the_stability_limit_is_where_the_loss_rises_above_the_bases_for_the_first_time_beyond_its_lowest():
    rates = [1e-4, 2e-4, 4e-4, 8e-4]
    by_power = [(r / 3e-4) ** 2 for r in rates]  # straight where it is drawn by logarithms
    assert findings.stability_limit(rates, by_power) == pytest.approx(3e-4)
    falls_first = [1.2, 0.5, 0.8, 1.25]
    assert findings.stability_limit(rates, falls_first) == pytest.approx(4e-4 * math.sqrt(2))
    assert findings.stability_limit(rates, [0.9, 0.8, 0.9, math.inf]) == pytest.approx(8e-4)
    assert findings.stability_limit(rates, [0.9, 0.8, 0.7, 0.6]) is None


def test_how_the_stability_limit_goes_with_the_width_is_said_with_its_interval(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    for seed, shift in ((1, 1.0), (2, 1.1), (3, 1 / 1.1)):
        for width, at in ((64, 6e-4 * shift), (192, 2e-4)):
            rates = (1e-4, 3e-4, 9e-4, 27e-4)
            rows = [(width, lr, seed, 500, 0.05, 0.02, 0.05 * (lr / at) ** 2, 0.04 * (lr / 3e-4)) for lr in rates]
            study.append_rows(study.table("width"), [dict(zip(study.WIDTH_FIELDS, row)) for row in rows])
    higher, rule = findings.width_differences().values()
    mean, half, verdict = findings.tried(higher)
    assert [round(math.exp(float(mean) + k * float(half)), 2) for k in (0, -1, 1)] == [3.00, 2.37, 3.80]
    assert verdict == "confirmed" and rule == pytest.approx([math.log(3) - times for times in higher])
    away, _ = findings.width_differences("away").values()
    assert away == pytest.approx([0, 0, 0], abs=1e-9)  # where the width does not count


@pytest.mark.parametrize("question", findings.QUESTIONS)
def test_each_question_has_a_figure_of_what_was_measured(question):
    panels = findings.figure(question).axes
    assert len(panels) >= 2 and all(panel.lines for panel in panels)


def test_a_figure_draws_the_mean_of_the_seeds_that_stand_in_the_table():
    with open(study.table("runs"), newline="") as file:
        losses = [float(r["loss_concept"]) for r in csv.DictReader(file) if r["arm"] == "full 1e-4 bfloat16-nearest"]
    drawn = [list(line.get_xdata()) for line in findings.figure(7).axes[1].lines]
    assert [pytest.approx(sum(losses) / len(losses))] * 2 in drawn and sorted(losses) in map(sorted, drawn)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_and_the_verdicts_are_what_the_command_writes(tmp_path):
    findings.main(["page", "--to", str(tmp_path)])
    for name in ("README.md", "judges.md", "verdicts.csv"):
        assert (tmp_path / name).read_bytes() == (PAGE.parent / name).read_bytes()


def test_the_page_is_short_and_each_of_its_claims_stands_in_the_csv():
    text = PAGE.read_text()
    assert len(text.split()) <= 2500
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.search(r"\| (before|after) \|$", line)]
    verdicts = {row["claim"]: row for row in rows_of(PAGE.parent / "verdicts.csv")}
    assert 0 < len(rows) <= 45
    for claim, *cells in rows:
        row = verdicts[claim]
        assert cells == [row["effect"], row["n"], row["verdict"], row["put"]]
        assert row["effect"] == f"{float(row['mean']):+.2g} ± {float(row['half_interval']):.2g}"
    assert {row["verdict"] for row in verdicts.values()} == {"confirmed", "refuted", "cannot tell"}


def test_every_claim_has_words_of_its_own_and_was_tried():
    claims, verdicts = findings.claims(), rows_of(PAGE.parent / "verdicts.csv")
    assert len({claim.claim for claim in claims}) == len(claims) == len(verdicts) == 160
    keys = [claim.key for claim in claims if claim.key]
    assert len(set(keys)) == len(keys)
    assert all((claim.put == "after") <= bool(claim.seen) for claim in claims)
    assert not any(re.search("[*†]", cell) for row in verdicts for cell in row.values())


def test_the_picture_of_the_methods_is_made_from_the_sheets(tmp_path, monkeypatch):
    from PIL import Image, ImageChops

    (tmp_path / "figures").mkdir()
    (tmp_path / "sheets").symlink_to(study.RESULTS / "sheets")
    committed = study.RESULTS / "figures/methods.png"
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    findings.main(["picture"])
    made, there = (Image.open(path).convert("RGB") for path in (tmp_path / "figures/methods.png", committed))
    assert ImageChops.difference(made, there).getbbox() is None
    assert committed.stat().st_size < 400_000


@pytest.mark.parametrize("command", ["results", "claims", "validation", "agreement", "alarms"])
def test_each_table_is_printed_as_markdown(command, capsys):
    findings.main([command, *(["--questions", "7"] if command in ("results", "claims") else [])])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) > 3 and len({line.count("|") for line in lines}) == 1


def test_a_lesson_shows_the_claims_of_its_question_and_what_they_are_about(monkeypatch):
    import lesson

    shown = []
    monkeypatch.setattr(lesson, "display", shown.append)
    lesson.answers(2, about="style")
    lines = shown[0].data.splitlines()
    assert len(lines) == 2 + sum(c.question == 2 and "style" in c.claim for c in findings.claims()) == 12
    assert all("style" in line and line.startswith("| 2 |") for line in lines[2:])
    assert "Cannot tell" in shown[1].data
