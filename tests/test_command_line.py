"""The command line: exit status and one line for each kind of bad input, and the main job as a user starts it."""

import json
import subprocess
import sys

import pytest
from conftest import NANO, ROOT

import cogvideo_lite as cl

BAD = {
    "no such data folder": (["--data", "nowhere"], "no such folder"),
    "no such model": (["--model", "nowhere/at/all"], "no such folder"),
    "a folder that is no pipeline": (["--model", str(ROOT / "tests")], "not a diffusers pipeline folder"),
    "rank 0": (["--rank", "0"], "--rank 0: must be at least 1"),
    "no steps": (["--steps", "0"], "--steps 0: must be at least 1"),
    "a negative rate": (["--lr", "-1"], "--lr -1.0: must be a number above 0"),
    "a size that does not divide": (["--height", "72"], "--height 72: must be a multiple of 16"),
    "more frames than any model makes": (["--frames", "800001"], "at most 4001"),
    "frames that are not 8k + 1": (["--frames", "16"], "--frames 16: must be 8k + 1"),
    "clips too short": (["--frames", "25"], "17 frames at 8 fps, 25 needed; lower --frames or drop it"),
    "more clips than there are": (["--clips", "999"], "only 200 clips"),
    "pieces that do not divide the batch": (["--batch-size", "4", "--micro-batch-size", "3"], "must divide"),
    "a word for a number": (["--steps", "many"], "invalid int value"),
    "an unknown option": (["--stepz", "3"], "unrecognized arguments"),
    "an unreadable configuration": (["--config", "gone.json"], "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_status_2_and_leaves_nothing_behind(case, tmp_path, monkeypatch, capsys):
    arguments, words = BAD[case]
    monkeypatch.chdir(tmp_path)
    status = cl.main(["--lora", "--cache", str(tmp_path / "cache"), *arguments])
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("cogvideo_lite: ")]
    assert status == 2 and len(lines) == 1 and words in lines[0]
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_one_of_the_methods_must_be_asked_for(capsys):
    assert cl.main([]) == 2
    assert "required" in capsys.readouterr().err


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = "import sys, cogvideo_lite; print(sorted({'torch', 'diffusers', 'transformers', 'peft', 'av'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        cl.main(["--help"])
    help = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in help for name in cl.Config.__dataclass_fields__ if name != "method")


def test_the_main_job_as_a_user_starts_it(tmp_path):
    """The bundled model and clips, fewer steps: the same command otherwise."""
    command = [
        sys.executable,
        str(ROOT / "cogvideo_lite.py"),
        "--lora",
        "--steps",
        "4",
        "--clips",
        "10",
        "--sampling-steps",
        "2",
    ]
    done = subprocess.run([*command, "--cache", "cache"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = done.stdout.splitlines()[-1].removeprefix("results in ")
    assert json.loads(open(f"{run}/summary.json").read())["steps"] == 4
    for word in (
        "model",
        "LoRA, rank 32, alpha 32",
        "10 clips",
        "recipe",
        "arithmetic",
        "distortion of the samples",
        "concept score",
    ):
        assert word in done.stdout
    prompt = "a spider named kumo moving left over water"
    command = [sys.executable, str(ROOT / "cogvideo_lite.py"), "--sample", prompt, "--run", run, "--out", "mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "a-spider-named-kumo-moving-left-over-water-seed0.mp4").exists()
    assert cl.read_video(tmp_path / "mine" / "a-spider-named-kumo-moving-left-over-water-seed0.mp4").shape == (
        17,
        3,
        64,
        64,
    )


def test_a_run_that_was_started_otherwise_is_not_resumed(quick, tmp_path, capsys):
    cl.train(quick())
    assert cl.main(["--lora", "--resume", "--out", str(tmp_path / "run"), "--rank", "8"]) == 2
    assert "--rank 8: this run was started with 4" in capsys.readouterr().err


def test_a_run_of_another_method_is_not_resumed(quick, tmp_path, capsys):
    cl.train(quick())
    assert cl.main(["--full", "--resume", "--out", str(tmp_path / "run")]) == 2
    assert "was started with --lora" in capsys.readouterr().err


def test_only_a_finished_run_of_adapters_can_be_merged(quick, tmp_path, capsys):
    assert cl.main(["--merge", str(tmp_path / "nowhere")]) == 2
    run = cl.train(quick(method="full"))
    assert cl.main(["--merge", str(run.folder)]) == 2
    assert cl.main(["--merge", str(run.folder), "--rank", "4"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum("only finished --lora and --qlora runs can be merged" in line for line in lines) == 2
    assert any("--rank: not for --merge" in line for line in lines)


def test_resume_takes_what_is_left_out_from_the_run(quick, tmp_path, capsys):
    cl.train(quick())
    assert cl.main(["--lora", "--resume", "--out", str(tmp_path / "run"), "--steps", "5"]) == 0
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 5


def test_a_finished_run_is_not_written_over(quick, capsys):
    cl.train(quick())
    with pytest.raises(cl.UserError, match="holds a finished run already"):
        cl.train(quick())


def test_the_nano_folder_is_small_and_holds_no_pickles():
    files = [p for p in NANO.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 25e6
    assert {p.suffix for p in files} <= {".json", ".safetensors"}
