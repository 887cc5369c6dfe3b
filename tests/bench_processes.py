"""What two processes hold and take while they train the bundled model together, beside one.

    pip install deepspeed
    python tests/bench_processes.py     (5 minutes on two cores, the first time 3 more: DeepSpeed compiles)
    python tests/bench_processes.py --write     into processes.csv, too

Each row is a run of the script's own Trainer, four clips a step, the same samples: by one process, by two that share the
batch (DDP), with --shard (FSDP2), and with --deepspeed (ZeRO-2; its optimizer stays with the rest, to be counted). Held:
bytes of tensors between two steps, weights and states, of the process that holds most. Peak: the most during the last
step. On a CPU both are counted by torch's profiler, on a card by its allocator. With FSDP2 over gloo, tensors are freed
in threads that the profiler does not see: there, what is held is counted by Python's collector, and the peak is not
known. Planned: the same by notebooks/plan.py. A step's time is the median of five, without the profiler.
"""

import argparse
import gc
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

FLOAT32 = dict(method="full", optimizer="adamw", trained_dtype="float32", fused_backward=False)
BFLOAT16 = dict(method="full", optimizer="adafactor", trained_dtype="bfloat16", fused_backward=True)
EIGHT_BITS = dict(BFLOAT16, optimizer="adamw8bit")
ENGINES = {"one process": (1, {}), "DDP": (2, {}), "FSDP2": (2, dict(shard=True)), "ZeRO-2": (2, dict(deepspeed=""))}
METHODS = {  # name -> (fields, engines)
    "full, float32, AdamW": (FLOAT32, list(ENGINES)),
    "full, bfloat16, 8-bit AdamW": (EIGHT_BITS, ["one process", "FSDP2"]),
    "full, bfloat16, factored": (BFLOAT16, ["one process", "FSDP2"]),
    "lora": (dict(method="lora"), ["one process", "FSDP2"]),
    "qlora": (dict(method="qlora"), ["one process", "FSDP2"]),
}
ZERO = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000, "allgather_bucket_size": 500_000}}  # small as it
STEPS = 3  # with the profiler; five more without


def alive():
    """Bytes of all tensors that Python's collector knows."""
    import torch

    local = [getattr(t, "_local_tensor", t) for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in local if not t.is_meta}.values())


class Memory:
    """Bytes of tensors made inside a block: `held` when its last step began, `peak` from then on."""

    def __init__(self, on_card):
        from torch.profiler import ProfilerActivity, profile

        self.on_card, self.profiled = on_card, profile(activities=[ProfilerActivity.CPU], profile_memory=not on_card)

    def __enter__(self):
        if not self.on_card:
            self.profiled.__enter__()

    def last_step_begins(self):
        import torch

        if self.on_card:
            self.held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        with torch.profiler.record_function("last step"):
            pass

    def __exit__(self, *raised):
        import torch

        if self.on_card:
            self.peak = torch.cuda.max_memory_allocated()
            return
        self.profiled.__exit__(*raised)
        now, self.peak, begun = 0, 0, False
        for event in sorted(self.profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "last step":
                self.held, begun = now, True
            elif event.name() == "[memory]":
                now += event.nbytes()
                self.peak = max(self.peak, now * begun)


def config_of(method, engine, folder):
    import cogvideo_lite as cl

    fields = {**METHODS[method][0], **ENGINES[engine][1]}
    if "deepspeed" in fields:
        fields["deepspeed"] = str(Path(folder) / "zero.json")
    return cl.Config(
        **fields, batch_size=4, clips=8, heldout=str(Path(folder) / "heldout"), cache=str(folder), compute_dtype="float32",
        gradient_checkpointing=True, caption_dropout=0,
    )  # fmt: skip


def train(method, engine, folder):
    """One of the processes. Returns what it holds, the peak of its last step (bytes), the loss that it had there, and
    the seconds of a step."""
    import torch
    from accelerate import Accelerator

    import cogvideo_lite as cl

    on_card = torch.cuda.is_available()
    cl.quiet_libraries()
    accelerator = Accelerator(mixed_precision="no", cpu=not on_card)
    config, base, _ = cl.resolve(config_of(method, engine, folder))
    clips, memory, before = cl.cache_clips(config), Memory(on_card), alive()
    with memory:
        engine = cl.load_instrument("zero").Trainer if config.deepspeed else cl.Trainer
        trainer = engine(config, base, clips, accelerator)
        trainer.transformer.train()
        for step in range(STEPS):
            if step == STEPS - 1:
                gc.collect()
                held = alive() - before
                memory.last_step_begins()
            loss = trainer.step(step)["loss"]
    seconds = [trainer.step(STEPS + step)["step_s"] for step in range(5)]
    if config.shard and not on_card:
        return held, 0, loss, statistics.median(seconds)
    return memory.held, memory.peak, loss, statistics.median(seconds)


def planned(method, engine, folder):
    """MiB (held, peak) of the plan, or None: it does not know DeepSpeed."""
    import plan

    config, processes = config_of(method, engine, folder), ENGINES[engine][0]
    if config.deepspeed:
        return None
    config, base = plan.resolve_plan(config, processes)
    ledger = plan.rehearse(
        config, base, base.transformer["num_layers"], card=False, sampling=False, processes=processes
    )
    start = ledger.spans("training")[0][0]
    held = sum(memory.bytes if taken else -memory.bytes for memory, taken, _ in ledger.events[:start])
    return held / 2**20, ledger.peak_bytes("training") / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into processes.csv, too")
    parser.add_argument("--worker", nargs=3, metavar=("METHOD", "ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print("FOUND " + json.dumps(train(*args.worker)), flush=True)
        return
    import cogvideo_lite as cl
    import tables

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "zero.json").write_text(json.dumps(ZERO))
        (Path(folder) / "heldout").mkdir()
        for clip in sorted((ROOT / "data_samples/spider-heldout").glob("*.mp4"))[:2]:
            shutil.copy(clip, Path(folder) / "heldout")
            (Path(folder) / "heldout" / f"{clip.stem}.txt").write_text("a spider")
        cl.cache_clips(config_of("lora", "one process", folder))
        for method, (_, engines) in METHODS.items():
            for engine in engines:
                processes = ENGINES[engine][0]
                launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
                command = [sys.executable, *launch, __file__, "--worker", method, engine, folder]
                done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
                numbers = [json.loads(found) for found in re.findall(r"FOUND (\[.*?\])", done.stdout)]
                if len(numbers) != processes:
                    raise SystemExit(f"{method}, {engine}: no result\n{done.stderr[-3000:]}")
                held, peak, loss, seconds = (max(column) for column in zip(*numbers))
                there = planned(method, engine, folder)
                rows.append({
                    "method": method, "engine": engine, "processes": processes,
                    "held_mib": f"{held / 2**20:.1f}", "held_planned_mib": f"{there[0]:.1f}" if there else "",
                    "peak_mib": f"{peak / 2**20:.1f}" if peak else "", "peak_planned_mib": f"{there[1]:.1f}" if there else "",
                    "step_s": f"{seconds:.2f}", "loss": f"{loss:.5f}",
                })  # fmt: skip
                print(rows[-1], flush=True)
    print(f"\n{tables.markdown(rows)}")
    if args.write:
        tables.write("processes", rows)


if __name__ == "__main__":
    main()
