"""The command line: its options, and the main job as a user starts it. What it refuses is in test_faults.py."""

import inspect
import json
import shutil
import subprocess
import sys

import pytest
from conftest import NANO, ROOT, SPIDER

import cogvideo_lite as cl


def test_nothing_heavy_is_imported_before_it_is_needed():
    slow = {"diffusers", "transformers", "peft", "bitsandbytes", "accelerate", "huggingface_hub", "cv2", "matplotlib"}
    code = f"import sys, cogvideo_lite; print(sorted({slow} & set(sys.modules)))"
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


# --------------------------------------------------------------------------------------------------- the script alone


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder that holds nothing but the script, and what starts it there: arguments -> CompletedProcess."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(ROOT / "cogvideo_lite.py", folder)

    def start(*arguments):
        command = [sys.executable, "cogvideo_lite.py", *map(str, arguments)]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    start.folder = folder
    return start


def test_the_script_alone_says_what_to_give_it(alone, tiny):
    for arguments, words in (((), "--model"), (("--model", tiny("5b")), "--data")):
        done = alone("--lora", *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr
    done = alone("--plan", "--lora", "--model", tiny("5b"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "notebooks/plan.py is not there" in done.stderr


def test_the_script_alone_trains_resumes_samples_merges_and_blends(alone, tiny, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for row in (SPIDER / "metadata.jsonl").read_text().splitlines()[:4]:
        name, text = json.loads(row)["file_name"], json.loads(row)["text"]
        shutil.copy(SPIDER / name, clips)
        (clips / name).with_suffix(".txt").write_text(text)
    options = ["--steps", 2, "--checkpoint-every", 2, "--sampling-steps", 2, "--validation-prompts", "a red spider"]
    done = alone("--lora", "--model", tiny("5b"), "--data", clips, *options, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "left out: " in done.stdout and "results in" in done.stdout.splitlines()[-1]
    done = alone("--lora", "--resume", "--out", "run", "--steps", 3)
    assert done.returncode == 0, done.stderr
    assert len((alone.folder / "run/metrics.jsonl").read_text().splitlines()) == 3
    assert alone("--sample", "a blue fish", "--run", "run", "--out", "clips").returncode == 0
    assert [p.suffix for p in sorted((alone.folder / "clips").iterdir())] == [".mp4"]
    assert alone("--merge", "run").returncode == 0 and (alone.folder / "run/merged/transformer").is_dir()
    assert alone("--blend", "run", "0.5").returncode == 0 and (alone.folder / "run/blend-0.5/summary.json").exists()


# ------------------------------------------------------------------------------------------------------ one sitting


def test_the_script_can_be_read_in_one_sitting():
    lines = (ROOT / "cogvideo_lite.py").read_text("utf-8").splitlines()
    assert len(lines) <= 2600 and max(map(len, lines)) <= 120
    assert max(len(inspect.getsource(f).splitlines()) for f in (cl.train, cl.Trainer.step)) <= 60


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 1500
