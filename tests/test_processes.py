"""Several processes, started as accelerate starts them, do what one does."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import cogvideo_lite as cl


@pytest.mark.parametrize("method, weights", [
    ("lora", "pytorch_lora_weights.safetensors"),
    ("full", "transformer/diffusion_pytorch_model.safetensors"),
])  # fmt: skip
def test_two_processes_train_the_same_weights_as_one(tiny, clips, tmp_path, method, weights):
    """Every draw follows from the sample's number, so the two halves of a batch add up to the same gradient."""
    shared = [
        str(ROOT / "cogvideo_lite.py"), f"--{method}", "--model", str(tiny("5b")), "--data", str(clips), "--steps", "3", "--lr", "1e-3",
        "--batch-size", "4", "--sampling-steps", "2", "--cache", str(tmp_path / "cache"), "--rank", "4",
        "--validation-prompts", "a red spider",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]  # fmt: skip
    found = {}
    for name, start in (("one", [sys.executable]), ("two", launch)):
        done = subprocess.run([*start, *shared, "--out", str(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("results in") == 1  # one of the processes speaks
        found[name] = load_file(str(tmp_path / name / weights))
        metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [m["step"] for m in metrics] == [1, 2, 3]
    assert found["one"].keys() == found["two"].keys()
    for key, tensor in found["one"].items():
        torch.testing.assert_close(found["two"][key], tensor, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_launches_that_cut_weights_up_are_refused_with_the_reason(quick, monkeypatch, kind):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", accelerate.DistributedType[kind])
    with pytest.raises(cl.UserError, match="accelerate launch: .* spreads weights over processes"):
        cl.train(quick())
