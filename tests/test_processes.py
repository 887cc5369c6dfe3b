"""Several processes, started by torchrun, do what one does."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import cogvideo_lite as cl

# The script, and a file for each process that says how many there were.
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
import cogvideo_lite
status = cogvideo_lite.main(sys.argv[2:])
rank, number = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
open(f"{{sys.argv[1]}}.rank-{{rank}}-of-{{number}}", "w").close()
sys.exit(status)
"""


@pytest.mark.parametrize("method, weights", [
    ("lora", "pytorch_lora_weights.safetensors"),
    ("qlora", "pytorch_lora_weights.safetensors"),
    ("full", "transformer/diffusion_pytorch_model.safetensors"),
])  # fmt: skip
def test_two_processes_train_the_same_weights_as_one(tiny, clips, tmp_path, method, weights):
    """Every draw follows from the sample's number, so the two halves of a batch add up to the same gradient."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    shared = [
        f"--{method}", "--model", str(tiny("5b")), "--data", str(clips), "--steps", "3", "--lr", "1e-3", "--rank", "4",
        "--batch-size", "4", "--sampling-steps", "2", "--cache", str(tmp_path / "cache"),
        "--validation-prompts", "a red spider",
    ]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    trained, losses = {}, {}
    for number, start in ((1, [sys.executable]), (2, torchrun)):
        out = tmp_path / str(number)
        done = subprocess.run([*start, program, out, *shared, "--out", out], capture_output=True, text=True)
        assert sorted(p.name for p in tmp_path.glob(f"{number}.rank-*")) == [
            f"{number}.rank-{k}-of-{number}" for k in range(number)
        ], done.stderr[-2000:]
        assert done.stdout.count("results in") == 1  # one of the processes speaks
        trained[number] = load_file(str(out / weights))
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [m["step"] for m in metrics] == [1, 2, 3]
        losses[number] = [m["loss"] for m in metrics]
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert trained[1].keys() == trained[2].keys()
    for key, tensor in trained[1].items():
        torch.testing.assert_close(trained[2][key], tensor, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_launches_that_cut_weights_up_are_refused_with_the_reason(quick, monkeypatch, kind):
    import accelerate

    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", accelerate.DistributedType[kind])
    with pytest.raises(cl.UserError, match="accelerate launch: .* spreads weights over processes"):
        cl.train(quick())
