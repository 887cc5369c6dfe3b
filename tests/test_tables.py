"""tests/README.md and its csv files: the page says what they say, they follow from what was measured, README.md agrees."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import bench_plan
import pytest
import tables
from conftest import ROOT

import cogvideo_lite as cl
import plan

CARDS = tables.read("cards")


def measured_on_a_card():
    return [row for row in tables.read("measured_gpu") if row["reserved_gib"]]


def percent(measured, predicted):
    return pytest.approx(100 * (float(predicted) / float(measured) - 1), abs=0.15)  # both are rounded


def test_the_page_is_what_its_command_makes_of_the_csv_files(tmp_path):
    for path in (tables.PAGE, *tables.HERE.glob("*.csv"), Path(tables.__file__)):
        shutil.copy(path, tmp_path)
    text = tables.PAGE.read_text("utf-8")
    worn = re.sub(r"(?m)^\|.*\n", "", text)
    (tmp_path / "README.md").write_text(worn, encoding="utf-8")
    for _ in range(2):  # from nothing, and from what it made
        subprocess.run([sys.executable, tmp_path / "tables.py"], check=True)
        assert (tmp_path / "README.md").read_text("utf-8") == text


def test_the_page_is_short_and_names_every_csv_file_and_every_test():
    text = tables.PAGE.read_text("utf-8")
    assert len(text.split()) <= 1500
    for path in tables.HERE.glob("*.csv"):
        assert f"]({path.name})" in text, path.name
    for path in tables.HERE.glob("test_*.py"):
        assert f"`{path.stem}`" in text, path.name


def test_what_stands_beside_the_plan_is_what_was_measured_on_the_card():
    measured = {(row["row"], row["phase"]): row for row in measured_on_a_card() if row["phase"] != "loading"}
    rows = tables.read("plan_against_h200")
    assert [(row["row"], row["phase"]) for row in rows] == list(measured) and len(rows) == 41
    for row in rows:
        there = measured[row["row"], row["phase"]]
        held = float(there["held_before_gib"])
        assert row["day"] == there["day"] and float(row["cap_gib"]) == float(there["cap_gib"])
        assert row["tensors_gib"] == f"{float(there['allocated_gib']) - held:.2f}"
        assert row["reserved_gib"] == ("" if held > 0.01 else f"{float(there['reserved_gib']):.2f}")
        for kind in ("tensors", "reserved"):
            if row[f"{kind}_gib"]:
                told = float(row[f"{kind}_error"].removesuffix("%"))
                assert told == percent(row[f"{kind}_gib"], row[f"{kind}_predicted_gib"])


def test_times_of_a_step_are_those_measured_on_the_card():
    measured = {row["row"]: row for row in measured_on_a_card() if row["phase"] == "training"}
    rows = tables.read("h200_step_times")
    assert [row["row"] for row in rows] == list(measured)
    for row in rows:
        there, rate = measured[row["row"]], float(row["flops_predicted"]) / float(row["step_s"]) / 1e12
        assert row["step_s"] == f"{float(there['seconds']):.2f}" and row["day"] == there["day"]
        assert float(row["tflops"]) == pytest.approx(rate, rel=0.02)
        assert float(row["share_of_published_rate"]) == pytest.approx(rate / plan.CARDS["H200"][0], abs=0.006)


def test_published_peaks_stand_beside_the_plan_as_they_were_published():
    published = bench_plan.read_rows(ROOT / "tests/published_memory.csv")
    rows = tables.read("plan_against_published")
    assert len(rows) == len(published)
    for row, there in zip(rows, published):
        assert all(row[name] == there[name] for name in ("source", "model", "method", "rank", "batch", "kind"))
        assert (row["before_published_gib"], row["peak_published_gib"]) == (there["before_gib"], there["train_gib"])
        reason = bench_plan.left_out(there)
        if reason:
            assert row["judged"] == f"left out: {reason}" and not row["peak_predicted_gib"]
        elif row["kind"] == "peak":
            told = float(row["judged"].removesuffix("%"))
            assert told == percent(row["peak_published_gib"], row["peak_predicted_gib"])
        elif row["kind"] == "bound":
            peaks = float(row["peak_predicted_gib"]), float(row["peak_published_gib"])
            assert row["judged"] == bench_plan.bound(there["note"], *peaks)


def test_what_is_said_of_a_card_follows_from_the_peak_and_the_time():
    natively = {(row["model"], row["method"]): row for row in tables.read("capacity")}
    for row in CARDS:
        vram, peak = plan.CARDS[row["card"]][2], float(row["peak_gib"])
        assert float(row["torch_finds_gib"]) == vram
        roomy = (1 - plan.TIGHT) * vram
        verdict = "fits" if peak <= roomy else "tight" if peak <= vram else "does not fit"
        assert row["verdict"] == verdict and bool(row["instead"]) == (verdict != "fits")
        for name in ("", "instead_"):
            if row[f"{name}step_s"]:
                assert float(row[f"{name}hours"]) == pytest.approx(float(row[f"{name}step_s"]) * 1500 / 3600, rel=0.06)
                assert name == "" or float(row["instead_peak_gib"]) <= roomy + 0.05
        if row["model"] in bench_plan.IMAGE_TO_VIDEO:  # of which capacity.csv has no rows
            continue
        gb = next(gb for gb in bench_plan.CAPACITY if row["card"] in bench_plan.CARDS and gb >= vram)
        there = natively[row["model"], row["method"]][f"{gb}_gb"]
        assert there.startswith("49x480x720") == (verdict != "does not fit")


@pytest.mark.parametrize("card, model, method", [
    ("RTX 3060", "2b", "lora"), ("RTX 3060", "5b", "qlora"), ("RTX 4090", "5b", "full"),
])  # fmt: skip
def test_the_commands_for_a_card_need_what_is_said(card, model, method):
    (row,) = [row for row in CARDS if (row["card"], row["model"], row["method"]) == (card, model, method)]
    for name, prefix in (("command", ""), ("instead", "instead_")):
        if row[name]:
            given = vars(cl.parser().parse_args(shlex.split(row[name])[2:]))
            asked = cl.Config(**{field: value for field, value in given.items() if field in vars(cl.Config())})
            planned = bench_plan.plan_of(**bench_plan.options_said(asked))
            for figure, value in bench_plan.predicted_on(card, planned).items():
                assert row[prefix + figure] == value


def test_the_readme_says_of_each_card_what_was_planned():
    """A row of its table that names cards and a command has, beside it, a peak and hours planned for one of these cards."""
    lines = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("|")]
    told = [(line, command) for line in lines for command in re.findall(r"`(python cogvideo_lite.py [^`]*)`", line)]
    assert len(told) >= 10  # five cards, two models
    for line, command in told:
        planned = [
            (row[f"{prefix}peak_gib"], row[f"{prefix}hours"])
            for row in CARDS
            for name, prefix in (("command", ""), ("instead", "instead_"))
            if row["card"] in line and row[name] == command
        ]
        assert any(re.search(rf"\b{peak} GiB.*\b{hours} h", line) for peak, hours in planned), line
