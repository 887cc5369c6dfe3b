"""Several processes, started by torchrun, do what one does: sharing a batch, or the weights and states, too.

Imports take most of a launch's time, so that one launch trains many runs. Runs are told by what they wrote, and each
process writes down that it was there.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import cogvideo_lite as cl

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# What every process of a launch does: train the runs of a file one after another; `patch` may break something first.
WORKER = """
import json, os, pathlib, sys
sys.path.insert(0, {root!r})
import torch
import cogvideo_lite as cl
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
{patch}
if {runs!r} is None:
    note = pathlib.Path(__file__).with_name(f"process-{{rank}}.json")
    note.write_text(json.dumps(dict(rank=rank, world=world, pid=os.getpid())))
    sys.exit(cl.main(sys.argv[1:]))
for fields in json.loads(pathlib.Path({runs!r}).read_text()):
    cl.train(cl.Config(**fields))
    held = sum(p.numel() for p in cl.LAST.updates.kept or cl.LAST.updates.engine.optimizer.single_partition_of_fp32_groups)
    note = dict(rank=rank, world=torch.distributed.get_world_size(), kept=held)
    (pathlib.Path(fields["out"]) / f"process-{{rank}}.json").write_text(json.dumps(note))
"""
REMEMBER = """
class Trainer(cl.Trainer):
    def __init__(self, *args):
        super().__init__(*args)
        cl.LAST = self
cl.Trainer = Trainer
"""
CASES = {
    "lora": dict(method="lora"),
    "lora of one row, 8 bits": dict(method="lora", rank=1, optimizer="adamw8bit"),  # one process of two has no row
    "lora of one row, factored": dict(method="lora", rank=1, optimizer="adafactor", fused_backward=True),
    "lora in fp16": dict(method="lora", compute_dtype="float16"),
    "qlora": dict(method="qlora", lora_targets="all"),
    "full": dict(method="full", ema=0.9),
    "full, factored": dict(method="full", optimizer="adafactor", fused_backward=True),
    "full, bf16": dict(method="full", optimizer="adafactor", trained_dtype="bfloat16", fused_backward=True,
                       gradient_checkpointing=True),
    "full, bf16 in 8 bits": dict(method="full", optimizer="adamw8bit", trained_dtype="bfloat16", ema=0.9, l2_to_base=1.0,
                                 micro_batch_size=1),
    "full, image-to-video": dict(method="full", model="5b-i2v"),  # with learned positions, which are no parameters
    "lora, image-to-video": dict(method="lora", model="1.5-i2v"),
}  # fmt: skip
# Of the way from the base: in bf16 gradients are rounded, too, in fp16 sums of others.
TOLERANCE = {"lora in fp16": 0.02, "full, bf16": 0.05, "full, bf16 in 8 bits": 0.15}


def launch(folder, launcher=("--standalone", "--nproc_per_node=2"), runs=None, patch="", argv=(), wait=True):
    """Two processes by torchrun; the runs in one go, or the script's command line."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    worker = folder / "worker.py"
    patch += REMEMBER if runs else ""
    worker.write_text(WORKER.format(root=str(ROOT), patch=patch, runs=str(file) if runs else None))
    command = [*TORCHRUN, *launcher, str(worker), *argv]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    return started.communicate(timeout=300) if wait else started


def assert_two(*places):
    """That two processes of one world began, each of which left a note; places: their folders."""
    notes = [json.loads(file.read_text()) for place in places for file in sorted(place.glob("process-*.json"))]
    assert [(note["rank"], note["world"]) for note in notes] == [(0, 2), (1, 2)]
    assert notes[0]["pid"] != notes[1]["pid"]


def trained(folder):
    """What a run gave, by name."""
    folder = cl.Path(folder)
    place = folder / "transformer/diffusion_pytorch_model.safetensors"
    return load_file(str(place if place.exists() else folder / "pytorch_lora_weights.safetensors"))


def metrics(folder):
    return [json.loads(line) for line in (cl.Path(folder) / "metrics.jsonl").read_text().splitlines()]


def assert_same(one, other, way, tolerance=2e-3):
    """Same weights up to a share of the way that they went, same metrics."""
    a, b = trained(one), trained(other)
    assert a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape for k in a)
    apart = sum((a[k].float() - b[k].float()).square().sum() for k in a).sqrt()
    assert float(apart) < tolerance * way
    assert len(metrics(one)) == len(metrics(other))
    for m, n in zip(metrics(one), metrics(other)):
        assert m.keys() == n.keys()
        for name in (name for name in m.keys() - {"step_s"} if n[name] is not None):  # DeepSpeed does not tell all
            assert n[name] == pytest.approx(m[name], rel=max(1e-4, tolerance / 5)), name


def way_of(run, base):
    """How far a run went from its base."""
    weights = trained(run.folder)
    if run.config.method != "full":  # B is zero at first, A small
        return float(sum(w.float().square().sum() for name, w in weights.items() if "lora_B" in name).sqrt())
    return float(sum((weights[n].float() - p.float()).square().sum() for n, p in base.named_parameters()).sqrt())


@pytest.fixture(scope="module")
def launched(tiny, tmp_path_factory):
    """Every case by one process, by two that share the batch, by two that share the weights, and gone on with by the
    other number of processes; two launches. Returns (case, kind) -> folder, case -> Run of one process."""
    from conftest import SPIDER

    folder, data = tmp_path_factory.mktemp("processes"), tmp_path_factory.mktemp("data") / "clips"
    data.mkdir()
    rows = (SPIDER / "metadata.jsonl").read_text().splitlines()[:6]
    for row in rows:
        shutil.copy(SPIDER / json.loads(row)["file_name"], data)
    (data / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    shared = dict(
        model=str(tiny("5b")), data=str(data), cache=str(folder / "cache"), steps=4, lr=1e-3, warmup=1, batch_size=4,
        rank=4, alpha=4.0, sampling_steps=2, guidance_scale=3.0, checkpoint_every=2, validation_prompts=["a red spider"],
    )  # fmt: skip
    cases = {k: fields | ({"model": str(tiny(fields["model"]))} if "model" in fields else {}) for k, fields in CASES.items()}
    alone, runs = {}, []
    for case, fields in cases.items():
        place = str(folder / case)
        alone[case] = cl.train(cl.Config(**{**shared, **fields, "out": f"{place} one"}))
        half = f"{place} one to two"
        shutil.copytree(f"{place} one", half)
        forget_the_end(half)
        for kind, changes in {"data": {}, "shard": dict(shard=True), "one to two": dict(shard=True, resume=True)}.items():
            runs.append({**shared, **fields, **changes, "out": f"{place} {kind}"})
    launch(folder, runs=runs)
    for case, fields in cases.items():
        shutil.copytree(folder / f"{case} shard", folder / f"{case} two to one")
        forget_the_end(folder / f"{case} two to one")
        cl.train(cl.Config(**{**shared, **fields, "out": str(folder / f"{case} two to one"), "resume": True}))
    return folder, alone, shared


def forget_the_end(folder):
    """A run that was killed after its last step, before it wrote a checkpoint of it."""
    folder = cl.Path(folder)
    shutil.rmtree(folder / "checkpoint-4")
    for name in ("summary.json", "process-0.json", "process-1.json"):
        (folder / name).unlink(missing_ok=True)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(launched, case):
    """Every draw follows from a sample's number or a weight's place, so that shares of a batch add up to the same
    gradient, and shards to the same weights."""
    folder, alone, _ = launched
    base = cl.find_base(alone[case].config.model).load("transformer", torch.float32)
    way, tolerance = way_of(alone[case], base), TOLERANCE.get(case, 2e-3)
    whole = sum(w.numel() for name, w in trained(alone[case].folder).items() if "pos_embedding" not in name)
    for kind in ("data", "shard", "one to two"):
        place = folder / f"{case} {kind}"
        notes = [json.loads((place / f"process-{rank}.json").read_text()) for rank in (0, 1)]
        assert [(note["rank"], note["world"]) for note in notes] == [(0, 2), (1, 2)]
        held = [note["kept"] for note in notes]
        assert held == [whole, whole] if kind == "data" else sum(held) == whole and max(held) < whole
        assert json.loads((place / "summary.json").read_text())["processes"] == 2
        assert_same(alone[case].folder, place, way, tolerance)
    assert_same(alone[case].folder, folder / f"{case} two to one", way, tolerance)


@pytest.mark.parametrize("case", ["lora", "full", "full, bf16 in 8 bits"])
def test_checkpoints_of_shards_are_those_of_one_process(launched, case):
    """Names, shapes and kinds of numbers of all states."""
    folder, alone, _ = launched
    for file in ("optimizer.safetensors", "average.safetensors"):
        place = alone[case].folder / "checkpoint-4" / file
        assert place.exists() == (folder / f"{case} shard/checkpoint-4" / file).exists()
        if place.exists():
            one, two = load_file(str(place)), load_file(str(folder / f"{case} shard/checkpoint-4" / file))
            assert one.keys() == two.keys()
            assert all((one[k].shape, one[k].dtype) == (two[k].shape, two[k].dtype) for k in one)


def test_two_agents_of_torchrun_train_the_command_line(launched):
    """As on two machines; and each process says nothing but the first."""
    folder, alone, shared = launched
    port = 20000 + os.getpid() % 20000
    fields = {**shared, **CASES["full"], "out": str(folder / "two agents"), "shard": True}
    argv = ["--full"] + [w for k, v in fields.items() if k not in ("method", "shard") for w in (cl.flag(k), *map(str, v if isinstance(v, list) else [v]))]  # fmt: skip  # noqa: E501
    agents = []
    for node in (0, 1):
        nodes = ("--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}")
        place = folder / f"agent{node}"
        place.mkdir()
        agents.append(launch(place, nodes, argv=[*argv, "--shard"], wait=False))
    told = [agent.communicate(timeout=300) for agent in agents]
    assert [out.count("results in") for out, _ in told] == [1, 0], told
    assert "2: each holds some rows" in told[0][0]
    assert_two(folder / "agent0", folder / "agent1")
    assert json.loads((folder / "two agents/summary.json").read_text())["processes"] == 2
    way = way_of(alone["full"], cl.find_base(shared["model"]).load("transformer", torch.float32))
    assert_same(alone["full"].folder, folder / "two agents", way)


FAILURES = {
    "a loss that is not finite, on one": ("""
losses = cl.Trainer.losses
def broken(self, *args):
    here = losses(self, *args)
    if rank == 1 and self.updates.step_number == 2 and torch.is_grad_enabled():
        pathlib.Path({note!r}).touch()
        return here * float("nan")
    return here
cl.Trainer.losses = broken
""", "step 3: the loss is nan"),
    "a disk that is full": ("""
save_file = cl.save_file
def full(tensors, path):
    if "checkpoint-4.partial" in path:
        pathlib.Path({note!r}).touch()
        raise OSError(28, "No space left on device")
    save_file(tensors, path)
cl.save_file = full
""", "No space left on device"),
    "a file that the second cannot read": ("""
training = cl.Samples.training
def broken(self, position):
    if rank == 1 and position > 8:
        pathlib.Path({note!r}).touch()
        raise OSError("cache: gone")
    return training(self, position)
cl.Samples.training = broken
""", "cache: gone"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAILURES)
def test_a_process_that_fails_says_one_line_and_ends_all_soon(launched, what):
    folder, alone, shared = launched
    place = folder / what
    place.mkdir()
    patch, words = FAILURES[what]
    fields = {**shared, **CASES["full, factored"], "out": str(place / "run"), "shard": True}
    argv = ["--full", "--config", str(place / "config.json")]
    (place / "config.json").write_text(json.dumps(fields))
    out, err = launch(place, patch=patch.format(note=str(place / "failed")), argv=[*argv, "--out", fields["out"]])
    assert time.time() - (place / "failed").stat().st_mtime < 10
    assert_two(place)
    lines = [line for line in err.splitlines() if "cogvideo_lite: " in line]
    assert len(lines) == 1 and words in lines[0], err
    assert not (place / "run/summary.json").exists()
    assert [p.name for p in cl.checkpoints(place / "run")] == ["checkpoint-2"]
    config = cl.load_config(place / "run/config.json")
    run = cl.train(dataclasses.replace(config, out=fields["out"], shard=False, resume=True))  # by one process
    way = way_of(alone["full, factored"], cl.find_base(shared["model"]).load("transformer", torch.float32))
    assert_same(alone["full, factored"].folder, run.folder, way)


def test_what_only_several_processes_can_do_is_refused_with_a_way(quick):
    with pytest.raises(cl.UserError, match="--shard and .*torchrun --nproc_per_node N cogvideo_lite.py, or leave them out"):
        cl.train(quick(shard=True))


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_accelerates_own_settings_for_several_cards_are_refused_with_a_way(quick, monkeypatch, kind):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", accelerate.DistributedType[kind])
    with pytest.raises(cl.UserError, match="accelerate launch: its settings for .* start with torchrun, and --shard"):
        cl.train(quick())


# ----------------------------------------------------------------------------------------------------------- DeepSpeed

ZERO_CASES = {
    "as it comes": dict(deepspeed="zero2"),  # on the host
    "a file of the user's": dict(deepspeed="zero1.json", micro_batch_size=1),
    "bf16": dict(deepspeed="zero2", compute_dtype="bfloat16"),
}


def test_deepspeed_trains_what_one_process_does(launched):
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    folder, alone, shared = launched
    (folder / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"enabled": "auto"}}))
    shared = {**shared, "method": "full"}
    one = cl.train(cl.Config(**{**shared, "out": str(folder / "adamw one")}))
    bf16 = cl.train(cl.Config(**{**shared, "out": str(folder / "adamw bf16"), "compute_dtype": "bfloat16"}))
    shutil.copytree(one.folder, folder / "zero one to two")
    forget_the_end(folder / "zero one to two")
    runs = [
        {**shared, **fields, "out": str(folder / f"zero {case}")} | ({"deepspeed": str(folder / "zero1.json")} if "file" in case else {})
        for case, fields in ZERO_CASES.items()
    ]
    runs.append({**shared, "deepspeed": "zero2", "resume": True, "out": str(folder / "zero one to two")})
    image = {**shared, "model": alone["full, image-to-video"].config.model, "cache": str(folder / "cache")}
    other = cl.train(cl.Config(**{**image, "out": str(folder / "image one")}))
    runs.append({**image, "deepspeed": "zero2", "out": str(folder / "image zero")})
    out, err = launch(folder, runs=runs)
    shutil.copytree(folder / "zero as it comes", folder / "zero two to one")
    forget_the_end(folder / "zero two to one")
    cl.train(cl.Config(**{**shared, "out": str(folder / "zero two to one"), "resume": True}))
    way = way_of(one, cl.find_base(shared["model"]).load("transformer", torch.float32))
    whole = sum(w.numel() for w in trained(one.folder).values())
    for case in [*ZERO_CASES, "one to two", "two to one"]:
        place = folder / f"zero {case}"
        if case != "two to one":
            notes = [json.loads((place / f"process-{rank}.json").read_text()) for rank in (0, 1)]
            assert [(note["rank"], note["world"]) for note in notes] == [(0, 2), (1, 2)]
            held = [note["kept"] for note in notes]
            assert whole <= sum(held) < 1.01 * whole and max(held) < 0.51 * whole
        reference = bf16 if case == "bf16" else one
        assert_same(reference.folder, place, way, 0.3 if case == "bf16" else 2e-3)
    assert_same(other.folder, folder / "image zero", way_of(other, cl.find_base(image["model"]).load("transformer", torch.float32)))
    assert trained(folder / "zero bf16")["proj_out.weight"].dtype == torch.float32
    from diffusers import CogVideoXTransformer3DModel

    CogVideoXTransformer3DModel.from_pretrained(folder / "zero as it comes/transformer")


@pytest.mark.parametrize("fields", [dict(method="lora"), dict(optimizer="adafactor"), dict(ema=0.9), dict(shard=True)])
def test_what_deepspeed_does_not_do_is_refused(quick, fields):
    with pytest.raises(cl.UserError, match="--deepspeed: only for --full, by AdamW, kept in float32"):
        cl.train(quick(**{"method": "full", "deepspeed": "zero2", **fields}))


def test_without_deepspeed_there_is_one_line_that_says_how_to_get_it(quick, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(cl.UserError, match="pip install deepspeed"):
        cl.train(quick(method="full", deepspeed="zero2"))
