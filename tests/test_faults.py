"""What goes wrong around a run: bad input, a disk that fills up, a process that is killed, other platforms. Each ends
in one line and the right status, before what is dear where that can be, and no later run trips on what it leaves."""

import errno
import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import safetensors.torch
import torch
from conftest import ROOT, SPIDER, tiny_pipeline

import bench_faults
import cogvideo_lite as cl

CLIPS = [json.loads(row) for row in (SPIDER / "metadata.jsonl").read_text("utf-8").splitlines()[:4]]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
DIFFUSION = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def samples_as_drawn():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cl, "save_samples", bench_faults.keeping(cl.save_samples))
        yield


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """A folder with everything that a bad input is made of: a tiny model, clips, and a run of each kind."""
    folder = tmp_path_factory.mktemp("master")
    tiny_pipeline(folder / "model", "5b")
    (folder / "clips").mkdir()
    for row in CLIPS:
        shutil.copy(SPIDER / row["file_name"], folder / "clips")
    (folder / "clips/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CLIPS), "utf-8")
    how = dict(
        model=str(folder / "model"), data=str(folder / "clips"), cache=str(folder / "cache"), steps=2, rank=4,
        checkpoint_every=2, batch_size=2, sampling_steps=1, validation_prompts=["a red spider"], lr=1e-2,
    )  # fmt: skip
    cl.train(cl.Config(**how, method="lora", out=str(folder / "lora")))
    cl.train(cl.Config(**how, method="full", out=str(folder / "full")))
    return folder


@pytest.fixture
def here(master, tmp_path, monkeypatch):
    """A copy of all that, to be spoiled; nothing dear may happen in it."""
    folder = tmp_path / "here"
    shutil.copytree(master, folder, copy_function=os.link)  # `spoil` writes new files and never into old ones
    for run in ("lora", "full"):
        text = (folder / run / "config.json").read_text("utf-8")
        write(folder / run / "config.json", text.replace(str(master), str(folder)))
    monkeypatch.chdir(folder)

    def dear(*arguments, **more):
        raise AssertionError("something dear came first")

    monkeypatch.setattr(cl, "encode_clips", dear)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", dear)
    load = cl.Base.load
    monkeypatch.setattr(cl.Base, "load", lambda *a, **k: load(*a, **k) if a[1] == "tokenizer" else dear())
    return folder


def write(path, data):
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def spoil(path, data):
    """A file with other contents: text or bytes, half of its own (0.5), None, or changes of its JSON (dict)."""
    if data is None:
        return shutil.rmtree(path) if path.is_dir() else path.unlink()
    if isinstance(data, float):
        data = path.read_bytes()[: int(path.stat().st_size * data)]
    if isinstance(data, dict):
        table = json.loads(path.read_text("utf-8")) | data
        data = json.dumps({k: v for k, v in table.items() if v is not ...})
    write(path, data)


def shards(names):
    return json.dumps({"metadata": {}, "weight_map": {str(k): name for k, name in enumerate(names)}})


# name -> (arguments after --lora with the tiny model and clips, file -> how it is spoilt, words of the line)
OPTIONS = {
    "rank 0": (["--rank", "0"], {}, "--rank 0: must be at least 1"),
    "no steps": (["--steps", "0"], {}, "--steps 0: must be at least 1"),
    "a negative rate": (["--lr", "-1"], {}, "--lr -1.0: must be a number above 0"),
    "a rate that is no number": (["--lr", "nan"], {}, "--lr nan: must be a number above 0"),
    "a rate without end": (["--lr", "inf"], {}, "--lr inf: must be a number above 0"),
    "a size that does not divide": (["--height", "72"], {}, "--height 72: must be a multiple of 16"),
    "more frames than any model makes": (["--frames", "800001"], {}, "at most 4001"),
    "frames that are not 8k + 1": (["--frames", "16"], {}, "--frames 16: must be 8k + 1"),
    "more clips than there are": (["--clips", "999"], {}, "only 3 to train on"),
    "pieces that do not divide the batch": (["--batch-size", "4", "--micro-batch-size", "3"], {}, "must divide"),
    "a word for a number": (["--steps", "many"], {}, "invalid int value"),
    "a fraction of a step": (["--steps", "1.5"], {}, "invalid int value"),
    "an unknown option": (["--stepz", "3"], {}, "unrecognized arguments"),
    "an unknown optimizer": (["--optimizer", "sgd"], {}, "invalid choice"),
    "dropout of all captions": (["--caption-dropout", "1"], {}, "--caption-dropout 1.0: must be in [0, 1)"),
    "an average of nothing": (["--ema", "1"], {}, "--ema 1.0: must lie between 0 and 1"),
    "a pull on adapters": (["--l2-to-base", "1"], {}, "--l2-to-base: only for --full"),
    "kept weights of adapters": (["--trained-dtype", "bfloat16"], {}, "--trained-dtype: only for --full"),
    "a negative seed": (["--seed", "-1"], {}, "--seed -1: must be at least 0"),
    "a seed beyond generators": (["--seed", str(2**70)], {}, "must be at most 4294967295"),
    "guidance that is no number": (["--guidance-scale", "nan"], {}, "--guidance-scale nan: must be at least 0"),
    "two methods": (["--full"], {}, "not allowed with argument --lora"),
    "a plan's option": (["--vram", "24"], {}, "--vram, --card and --processes: only with --plan"),
    "a run to train from": (["--run", "lora"], {}, "--run: only for --sample"),
    "activations in memory and not": (["--offload-activations", "--no-gradient-checkpointing"], {}, "would copy"),
}
FILES = {
    "no such configuration": (["--config", "gone.json"], {}, "configuration 'gone.json': cannot be read"),
    "a configuration that is a folder": (["--config", "clips"], {}, "configuration 'clips': cannot be read"),
    "a configuration that is no JSON": (["--config", "c.json"], {"c.json": "rank: 4"}, "cannot be read"),
    "a configuration that is no TOML": (["--config", "c.toml"], {"c.toml": '{"rank": 4}'}, "cannot be read"),
    "a configuration in UTF-16": (["--config", "c.json"], {"c.json": '{"rank": 4}'.encode("utf-16")}, "cannot be read"),
    "a list of options": (["--config", "c.json"], {"c.json": "[4]"}, "not a table of options"),
    "an option that is none": (["--config", "c.json"], {"c.json": '{"ranks": 4}'}, "unknown option ranks"),
    "a word for a number in a file": (["--config", "c.toml"], {"c.toml": 'rank = "4"'}, "rank is '4', int needed"),
    "yes for a number": (["--config", "c.toml"], {"c.toml": "rank = true"}, "rank is True, int needed"),
    "a date for a seed": (["--config", "c.toml"], {"c.toml": "seed = 2026-01-01"}, "int needed"),
    "one prompt for a list": (["--config", "c.toml"], {"c.toml": 'validation_prompts = "a"'}, "list needed"),
    "prompts that are numbers": (["--config", "c.toml"], {"c.toml": "validation_prompts = [1]"}, "list needed"),
    "a bad value in a file": (["--config", "c.toml"], {"c.toml": "rank = 0"}, "--rank 0: must be at least 1"),
    "a run's folder in a file": (["--config", "c.toml"], {"c.toml": 'out = "lora"'}, "holds a finished run already"),
}
MODELS = {
    "no such model": (["--model", "nowhere/at/all"], {}, "no such folder"),
    "a folder that is no pipeline": (["--model", "clips"], {}, "not a diffusers pipeline folder"),
    "a file for a model": (["--model", "f"], {"f": "x"}, "no such folder"),
    "a pipeline of another kind": ([], {"model/model_index.json": {"_class_name": "FluxPipeline"}}, "a FluxPipeline"),
    "an index of the model that is a pointer": ([], {"model/model_index.json": POINTER}, "not a diffusers pipeline"),
    "an index of the model without a part": ([], {"model/model_index.json": {"vae": ...}}, "model_index.json has vae"),
    "settings of the transformer that are a list": (
        [],
        {"model/transformer/config.json": "[]"},
        "no table of settings",
    ),
    "settings of the transformer without a size": (
        [],
        {"model/transformer/config.json": {"num_layers": ...}},
        "config.json has num_layers None",
    ),
    "settings of the VAE with a word": (
        [],
        {"model/vae/config.json": {"scaling_factor": "x"}},
        "config.json has scaling_factor 'x'",
    ),
    "no settings of T5": ([], {"model/text_encoder/config.json": None}, "no text_encoder/config.json; download it"),
    "settings of T5 that are half": ([], {"model/text_encoder/config.json": 0.5}, "config.json': missing, cut short"),
    "no tokenizer": ([], {"model/tokenizer/tokenizer.json": None}, "no tokenizer/tokenizer.json or tokenizer/spiece"),
    "no folder of a tokenizer": ([], {"model/tokenizer": None}, "no tokenizer/tokenizer.json or tokenizer/spiece"),
    "a tokenizer that is a pointer": ([], {"model/tokenizer/tokenizer.json": POINTER}, "or a Git LFS pointer"),
    "a tokenizer that is none": ([], {"model/tokenizer/tokenizer.json": "{}"}, "its tokenizer cannot be read"),
    "a tokenizer in the other form that is a pointer": (
        [],
        {"model/tokenizer/tokenizer.json": None, "model/tokenizer/spiece.model": POINTER},
        "tokenizer cannot be read",
    ),
    "no scheduler": ([], {"model/scheduler/scheduler_config.json": None}, "no scheduler/scheduler_config.json"),
    "weights that are a pointer": ([], {f"model/transformer/{DIFFUSION}": POINTER}, "or a Git LFS pointer"),
    "half of the weights": ([], {f"model/vae/{DIFFUSION}": 0.5}, f"vae/{DIFFUSION}': missing, cut short"),
    "an empty file of weights": ([], {"model/text_encoder/model.safetensors": ""}, "missing, cut short"),
    "weights as a pickle": (
        [],
        {"model/text_encoder/model.safetensors": None, "model/text_encoder/pytorch_model.bin": b"x"},
        "no text_encoder/model.safetensors; download it again (.bin is not read)",
    ),
    "weights under another name": (
        [],
        {f"model/vae/{DIFFUSION}": None, "model/vae/half.safetensors": safetensors.torch.save({"x": torch.zeros(1)})},
        "no vae/diffusion_*.safetensors; download it again",
    ),
    "a shard that is missing": (
        [],
        {f"model/transformer/{DIFFUSION}.index.json": shards([DIFFUSION, "second.safetensors"])},
        "second.safetensors",
    ),
    "an index of shards that is half": (
        [],
        {f"model/transformer/{DIFFUSION}.index.json": '{"weight'},
        "index.json': missing",
    ),
    "an index of shards that is a list": (
        [],
        {f"model/transformer/{DIFFUSION}.index.json": "[]"},
        "index.json': missing",
    ),
}
DATA = {
    "no such data folder": (["--data", "nowhere"], {}, "data '{here}/nowhere': no such folder"),
    "a file for a data folder": (["--data", "clips/000.mp4"], {}, "no such folder"),
    "a home that nobody has": (["--data", "~nobody-of-this-name/clips"], {}, "no such folder"),
    "an empty data folder": (["--data", "empty"], {"empty/x.txt": "x"}, "no clips"),
    "one clip only": ([], {"clips/metadata.jsonl": json.dumps(CLIPS[0])}, "every clip is held out, none left to train on"),
    "metadata that is no JSON": ([], {"clips/metadata.jsonl": "{\n"}, "metadata.jsonl', line 1: no JSON"),
    "metadata in UTF-16": ([], {"clips/metadata.jsonl": "x".encode("utf-16")}, "metadata.jsonl', line 1: not UTF-8"),
    "a clip that is not there": ([], {"clips/001.mp4": None}, "line 2: clip '001.mp4' is not there"),
    "a caption of nothing": (
        [],
        {"clips/metadata.jsonl": json.dumps(CLIPS[0] | {"text": " "})},
        "line 1: caption ' ' of '000.mp4' is empty",
    ),
    "a clip without a caption": ([], {"clips/metadata.jsonl": None, "clips/000.txt": "x"}, "001.mp4': no caption"),
    "held-out clips that are not there": (["--heldout", "gone"], {}, "gone': no such folder"),
    "clips that are all held out": (["--heldout", "clips"], {}, "every clip is held out, none left"),
    "a prior that is not there": (["--prior", "gone"], {}, "gone': no such folder"),
    "a prior without captions": (["--prior", "p"], {"p/a.mp4": b"x"}, "a.mp4': no caption"),
}
OUT = {
    "out is a pipeline": (["--out", "model"], {}, "a pipeline folder, whose transformer would be written over"),
    "out is a file": (["--out", "f"], {"f": "x"}, "--out '{here}/f': '{here}/f' is no folder that may be written to"),
    "out is below a file": (["--out", "f/run"], {"f": "x"}, "'{here}/f' is no folder that may be written to"),
    "out is a finished run": (["--out", "lora"], {}, "holds a finished run already"),
    "out is an unfinished run": (["--out", "lora"], {"lora/summary.json": None}, "holds an unfinished run already"),
}
RESUMED = ["--resume", "--out", "lora"]
RUNS = {
    "resumed by another method": (["--full", *RESUMED], {}, "was started with --lora; start a new one"),
    "resumed with other prompts": (
        ["--lora", *RESUMED, "--validation-prompts", "b"],
        {},
        "it has drawn samples of other prompts",
    ),
    "resumed to fewer steps than made": (["--lora", *RESUMED, "--steps", "1"], {}, "is past that already"),
    "resumed with a configuration cut short": (["--lora", *RESUMED], {"lora/config.json": 0.5}, "cannot be read"),
    "resumed with metrics that are none": (
        ["--lora", *RESUMED],
        {"lora/metrics.jsonl": "x\n"},
        "metrics.jsonl': damaged",
    ),
    "resumed with metrics that are gone": (["--lora", *RESUMED], {"lora/metrics.jsonl": None}, "lacks lines of the 2"),
    "resumed with prompts that are none": (
        ["--lora", *RESUMED],
        {"lora/samples/prompts.json": "["},
        "prompts.json': missing",
    ),
    "resumed with a list of prompts": (
        ["--lora", *RESUMED],
        {"lora/samples/prompts.json": "[]"},
        "prompts.json': missing",
    ),
    "merged from nowhere": (["--merge", "nowhere"], {}, "only finished --lora and --qlora runs can be merged"),
    "merged though full": (["--merge", "full"], {}, "only finished --lora and --qlora runs can be merged"),
    "merged with an option": (["--merge", "lora", "--rank", "4"], {}, "--rank: not for --merge"),
    "merged with a configuration": (["--merge", "lora", "--config", "c.json"], {"c.json": "{}"}, "--config: goes with"),
    "merged into a pipeline": (["--merge", "lora", "--out", "model"], {}, "a pipeline folder, whose transformer"),
    "merged into a file": (["--merge", "lora", "--out", "f"], {"f": "x"}, "is no folder that may be written to"),
    "merged before it is finished": (
        ["--merge", "lora"],
        {"lora/summary.json": None},
        "not finished; go on with --lora",
    ),
    "merged with half an adapter": (
        ["--merge", "lora"],
        {"lora/pytorch_lora_weights.safetensors": 0.5},
        "weights.safetensors': missing, cut short",
    ),
    "merged without its model": (["--merge", "lora"], {"model": None}, "here/model': no such folder"),
    "blended from nowhere": (["--blend", "nowhere", "0.5"], {}, "run 'nowhere': no config.json there"),
    "blended by a word": (["--blend", "lora", "half"], {}, "--blend half: must be a number above 0"),
    "blended by nothing": (["--blend", "lora", "0"], {}, "--blend 0: must be a number above 0"),
    "blended without a share": (["--blend", "lora"], {}, "expected 2 arguments"),
    "blended over a run": (["--blend", "lora", "0.5", "--out", "full"], {}, "full': holds a finished run already"),
    "blended with half its weights": (
        ["--blend", "full", "0.5"],
        {f"full/transformer/{DIFFUSION}": 0.5},
        "missing, cut short",
    ),
    "judged before it is finished": (["--judge", "lora"], {"lora/summary.json": None}, "not finished; go on with"),
    "judged from nowhere": (["--judge", "nowhere"], {}, "run 'nowhere': no config.json there"),
    "judged with a summary cut short": (["--judge", "lora"], {"lora/summary.json": 0.5}, "summary.json': missing"),
    "judged with a list for a summary": (["--judge", "lora"], {"lora/summary.json": "[]"}, "summary.json': missing"),
    "judged without a sample": (
        ["--judge", "lora"],
        {"lora/samples/after-0.mp4": None},
        "1 samples are gone, after-0.mp4",
    ),
    "compared before it is judged": (["--compare", "lora", "full"], {}, "its samples were not judged"),
    "compared with nothing": (["--compare"], {}, "expected at least one argument"),
    "compared with a judgement cut short": (
        ["--compare", "lora"],
        {"lora/samples/distortion.json": "["},
        "cannot be read",
    ),
    "compared with another judgement": (
        ["--compare", "lora"],
        {"lora/samples/distortion.json": '[{"prompt": "a", "before": {"x": 1}}]'},
        "judge the run anew",
    ),
    "compared with a judgement of numbers": (
        ["--compare", "lora"],
        {"lora/samples/distortion.json": "[1]"},
        "judge the run anew",
    ),
    "sampled from nowhere": (["--sample", "a", "--run", "nowhere"], {}, "run 'nowhere': no config.json there"),
    "sampled before it is finished": (["--sample", "a", "--run", "lora"], {"lora/summary.json": None}, "not finished"),
    "sampled from a run and a model": (
        ["--sample", "a", "--run", "lora", "--model", "model"],
        {},
        "leave one of the two",
    ),
    "sampled with an option of training": (
        ["--sample", "a", "--run", "lora", "--rank", "8"],
        {},
        "--rank: not for --sample",
    ),
    "sampled into a file": (
        ["--sample", "a", "--run", "lora", "--out", "f"],
        {"f": "x"},
        "is no folder that may be written",
    ),
    "sampled in frames that are none": (["--sample", "a", "--run", "lora", "--frames", "10"], {}, "must be 8k + 1"),
    "sampled with a seed beyond generators": (
        ["--sample", "a", "--run", "lora", "--seed", str(2**70)],
        {},
        "at most 4294967295",
    ),
    "sampled from half an adapter": (
        ["--sample", "a", "--run", "lora"],
        {"lora/pytorch_lora_weights.safetensors": 0.5},
        "missing, cut short",
    ),
    "planned without a method": (["--plan", "--judge", "lora"], {}, "--plan: goes with"),
    "planned for a card that is none": (["--plan", "--lora", "--card", "RTX 1"], {}, "--card 'RTX 1': must be one of"),
    "planned for no memory": (["--plan", "--lora", "--vram", "0"], {}, "--vram 0: must be a number of GiB above 0"),
    "nothing asked for": ([], {}, "is required"),
}
AFTER_LOADING = {name for name in RUNS if name.startswith(("resumed to fewer", "resumed with metrics"))}
BAD = OPTIONS | FILES | MODELS | DATA | OUT | RUNS


def tree(folder):
    """Every file with its size and time of change."""
    return {p: p.is_file() and (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_status_2_before_any_work_and_leaves_nothing_behind(case, here, capsys, monkeypatch):
    arguments, spoilt, words = BAD[case]
    if case not in RUNS:
        arguments = ["--lora", "--model", "model", "--data", "clips", "--cache", "cache", *arguments]
    if case in AFTER_LOADING:
        monkeypatch.undo()
        monkeypatch.chdir(here)
    for name, data in spoilt.items():
        spoil(here / name, data)
    if any(name.startswith("model/") for name in spoilt):
        shutil.rmtree(here / "cache")  # so that captions are to be coded
    before = tree(here)
    status = cl.main(arguments)
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and error.startswith("cogvideo_lite: "), error
    assert words.replace("{here}", str(here)) in error and "Traceback" not in error, error
    if case not in AFTER_LOADING:
        assert tree(here) == before


def test_the_table_is_long():
    assert len(BAD) >= 60


def test_several_bad_clips_are_a_line_each(here, capsys, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(here)
    spoil(here / "clips/001.mp4", b"no video")
    spoil(here / "clips/002.mp4", 0.1)
    assert cl.main(["--lora", "--model", "model", "--data", "clips", "--cache", "cache", "--frames", "17"]) == 2
    first, *others = [line for line in capsys.readouterr().err.split("\n") if "clip" in line and "%" not in line]
    assert first.startswith("cogvideo_lite: 2 of 4 clips cannot be used; 2 others were fine")
    assert [f"clips/{name}.mp4'" in line for name, line in zip(("001", "002"), others)] == [True, True] and len(
        others
    ) == 2
    assert not (here / "runs").exists() and not list(here.rglob("*.partial"))


# What a run began with, when it goes on.

CHANGED = dict(
    model="clips", rank=8, alpha=8.0, lora_targets="all", seed=1, frames=17, height=64, width=64, fps=4, batch_size=1,
    optimizer="lion8bit", trained_dtype="bfloat16", ema=0.9,
)  # fmt: skip


@pytest.mark.parametrize("by", ["flags", "json", "toml"])
@pytest.mark.parametrize("name", cl.FIXED)
def test_what_is_fixed_in_a_run_is_refused_by_flags_and_by_files_alike(here, capsys, name, by):
    value = CHANGED[name]
    arguments = [cl.flag(name), str(value)]
    if by != "flags":
        text = json.dumps({name: value}) if by == "json" else f"{name} = {json.dumps(value)}"
        write(here / f"other.{by}", text)
        arguments = ["--config", f"other.{by}"]
    before = tree(here)
    assert cl.main(["--lora", "--resume", "--out", "lora", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{cl.flag(name)} " in error and "this run was started with" in error
    assert tree(here) == before


def test_what_a_file_says_as_the_run_began_is_accepted(here):
    """A model by another path to it, numbers written otherwise, and null, which says nothing."""
    write(
        here / "same.json", json.dumps({"model": "model/../model", "alpha": 32, "ema": None, "rank": None, "lr": 0.5})
    )
    spoil(here / "lora/config.json", {"ema": 0.9})
    config = cl.configured("lora", {"resume": True, "out": "lora"}, "same.json")
    assert (config.rank, config.alpha, config.ema, config.lr) == (4, 32.0, 0.9, 0.5)


def test_out_in_a_configuration_file_is_honoured(here):
    write(here / "c.toml", 'out = "elsewhere"')
    assert cl.run_folder(cl.configured("lora", {}, "c.toml")) == here / "elsewhere"
    assert cl.run_folder(cl.configured("lora", {"out": "there"}, "c.toml")) == here / "there"


# A model of the Hub: what is cheap comes before its weights.


@pytest.mark.parametrize("arguments, spoilt, words", [
    (["--data", "nowhere"], {}, "no such folder"),
    (["--clips", "999"], {}, "only 3 to train on"),
    (["--height", "72"], {}, "must be a multiple of 16"),
    (["--out", "lora"], {}, "holds a finished run"),
    (["--out", "f"], {"f": "x"}, "is no folder that may be written to"),
    (["--heldout", "nowhere"], {}, "no such folder"),
    ([], {"clips/metadata.jsonl": "x"}, "no JSON"),
    ([], {"clips/003.mp4": None}, "is not there"),
])  # fmt: skip
def test_weights_are_downloaded_after_all_that_is_cheap_was_found_right(
    here, capsys, monkeypatch, arguments, spoilt, words
):
    def download(model, allow_patterns):
        assert model == "some/model" and allow_patterns == ["*.json"], "weights came first"
        return str(here / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name, data in spoilt.items():
        spoil(here / name, data)
    assert cl.main(["--lora", "--model", "some/model", "--data", "clips", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error, error


# A disk that fills up.


@pytest.fixture(scope="module")
def unbroken(master):
    """method -> the folder of a run of four steps, and what it was started with."""
    runs = {}

    def run(method):
        how = dict(
            method=method, model=str(master / "model"), data=str(master / "clips"), cache=str(master / "cache"),
            steps=4, lr=1e-2, rank=4, checkpoint_every=1, batch_size=2, sampling_steps=1,
            validation_prompts=["a red spider"],
        )  # fmt: skip
        if method not in runs:
            runs[method] = cl.train(cl.Config(**how, out=str(master / f"unbroken-{method}"))).folder
        return runs[method], how

    return run


@pytest.mark.parametrize(
    "method, what, number",
    [("lora", "tensors", 1), ("full", "tensors", 4), ("lora", "tensors", 9), ("full", "tensors", 9),
     ("lora", "rows", 3), ("lora", "moves", 6), ("full", "clips", 2)],
)  # fmt: skip
def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_from_whole_checkpoints(
    unbroken, tmp_path, monkeypatch, capsys, method, what, number
):
    whole, how = unbroken(method)
    number_of_writes = 0
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if what == "tensors":  # as safetensors words it
        full = cl.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def filling(module, name, place=1):
        call = getattr(module, name)

        def write_or_fail(*arguments, **more):
            nonlocal number_of_writes
            if "checkpoint" in str(arguments[place]) or "run" in str(arguments[place]):
                number_of_writes += 1
                if number_of_writes >= number:  # and it stays full
                    if name != "replace":
                        with open(arguments[place], "ab") as file:
                            file.write(b'{"half": ')
                    raise full
            return call(*arguments, **more)

        monkeypatch.setattr(module, name, write_or_fail)

    if what == "tensors":
        filling(safetensors.torch, "save_file"), filling(cl, "save_file")
    else:
        filling(*{"rows": (cl, "append_json", 0), "moves": (os, "replace"), "clips": (cl, "write_video", 0)}[what])
    out = tmp_path / "run"
    write(tmp_path / "c.json", json.dumps(how | {"out": str(out)}))
    capsys.readouterr()
    assert cl.main([f"--{method}", "--config", str(tmp_path / "c.json")]) == 1
    lines = capsys.readouterr().err.split("cogvideo_lite: ")[1:]  # a bar stands before it
    assert len(lines) == 1 and "No space left on device" in lines[0] and lines[0].count("\n") == 1
    monkeypatch.undo()
    for checkpoint in out.glob("checkpoint-*[0-9]"):
        assert checkpoint in cl.checkpoints(out) and not list(cl.damage(checkpoint.rglob("*.*")))
    assert cl.main([f"--{method}", "--resume", "--out", str(out), *rest(out, tmp_path)]) == 0
    assert bench_faults.same(whole, out)


def rest(out, folder):
    """The options of a run that did not come as far as to write them down."""
    return [] if (out / "config.json").exists() else ["--config", str(folder / "c.json")]


def test_a_damaged_checkpoint_is_passed_over(unbroken, tmp_path, capsys):
    whole, _ = unbroken("lora")
    adapter, optimizer = "pytorch_lora_weights.safetensors", "optimizer.safetensors"
    for name, data in [("state.json", "{"), (optimizer, 0.5), (optimizer, None), (adapter, POINTER)]:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "run")
        spoil(tmp_path / "run/checkpoint-4" / name, data)
        assert [p.name for p in cl.checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert cl.main(["--lora", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert "checkpoint-3" in capsys.readouterr().out and bench_faults.same(whole, tmp_path / "run")


# A process that is killed. tests/bench_faults.py does the same at random.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a fork spares the libraries' import for each kill")
def test_a_run_that_is_killed_ends_with_the_bits_of_one_that_is_not():
    command = [sys.executable, str(ROOT / "tests/bench_faults.py"), "--at", *bench_faults.MOMENTS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("killed")] == [  # libraries print, too
        "killed while coding (coding): same bits",
        "killed while saving (saving): same bits",
        "killed while sampling (sampling after): same bits",
    ]


# Other platforms.

ELSEWHERE = """
import sys, warnings
import bitsandbytes, peft
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from transformers import T5EncoderModel, T5Tokenizer
sys.modules["resource"] = None  # as on Windows; others' code asks for the system and not for the module
import cogvideo_lite as cl
names = "cogvideo_lite|judge|compare|pictures|plan|distortion"
warnings.filterwarnings("error", category=EncodingWarning, module=f"({names})$")
arguments = ["--lora", "--model", sys.argv[1], "--data", "clips", "--cache", "cache", "--out", "run", "--steps", "2"]
arguments += ["--checkpoint-every", "1", "--batch-size", "2", "--rank", "4", "--sampling-steps", "1"]
statuses = [cl.main(a) for a in (
    arguments, ["--lora", "--resume", "--out", "run", "--steps", "3"], ["--judge", "run"],
    ["--compare", "run", "--out", "page.html"], ["--sample", "a “red” 🕷", "--run", "run", "--out", "drawn"],
)]
print(statuses)
sys.exit(max(statuses))
"""
STRANGE = ["蜘蛛 идёт 🕷", "a “red” spider — naïve, Łódź", "a spider", "κόκκινη αράχνη"]  # the last is held out


def test_encodings_and_modules_of_other_platforms_do_no_harm(master, tmp_path):
    shutil.copytree(master / "clips", tmp_path / "clips")
    rows = [row | {"text": text} for row, text in zip(CLIPS, STRANGE)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "clips/metadata.jsonl").write_text(text, "utf-8")
    (tmp_path / "go.py").write_text(ELSEWHERE, "utf-8")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    env |= dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", PYTHONIOENCODING="cp1252", PYTHONPATH=str(ROOT))
    command = [
        sys.executable,
        "-X",
        "warn_default_encoding",
        "-W",
        "ignore",
        str(tmp_path / "go.py"),
        str(master / "model"),
    ]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout.decode("cp1252") + done.stderr.decode("cp1252")
    assert STRANGE[3] in (tmp_path / "page.html").read_text("utf-8")


