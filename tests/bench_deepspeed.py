"""What DeepSpeed's ZeRO saves: what a process holds while it fully fine-tunes the bundled model.

    pip install deepspeed
    python tests/bench_deepspeed.py     (3 minutes on two cores; on a machine with cards, two of them)
    python tests/bench_deepspeed.py --write     into zero.csv, too

Two processes of one clip each: data parallel (DDP), ZeRO-1 and ZeRO-2, AdamW on float32 weights, the same samples, the same loss in the last
step. And one process of one clip, as `--full` trains real models: bf16 weights, factored states, each step taken inside backward.
Held: bytes of tensors between two steps. Peak: the most during the third step, activations of one checkpointed block among
them. On a CPU both are counted by torch's profiler, on a card by its allocator. ZeRO-3 is left out: the profiler does not see all
that it gives back.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

KINDS = {"DDP": 2, "ZeRO-1": 2, "ZeRO-2": 2, "this program": 1}  # processes
SETTINGS = {
    "DDP": "data parallel, AdamW, float32",
    "this program": "--full as for real models: bfloat16, Adafactor inside backward",
}
STEPS, BUCKET = 3, 500_000  # numbers


def train(kind, cache):
    """One of the processes. Returns what it holds, the peak of its last step (bytes), and the loss that it had there."""
    import torch
    import torch.distributed as dist
    from accelerate import Accelerator

    import cogvideo_lite as cl

    processes, on_card, rank = KINDS[kind], torch.cuda.is_available(), int(os.environ.get("RANK", 0))
    device = torch.device("cuda", rank) if on_card else torch.device("cpu")
    if on_card:
        torch.cuda.set_device(device)
    fields = dict(
        method="full", batch_size=processes, cache=cache, compute_dtype="float32", gradient_checkpointing=True
    )
    memory = Memory(on_card)
    if kind == "this program":
        fields |= dict(trained_dtype="bfloat16", optimizer="adafactor", fused_backward=True)
        config, base, _ = cl.resolve(cl.Config(**fields))
        clips = cl.cache_clips(config)
        with memory:
            trainer = cl.Trainer(config, base, clips, Accelerator(mixed_precision="no", cpu=not on_card))
            trainer.transformer.train()
            for step in range(STEPS):
                if step == STEPS - 1:
                    memory.last_step_begins()
                loss = trainer.step(step)["loss"]
        return memory.held, memory.peak, loss

    dist.init_process_group("nccl" if on_card else "gloo")
    config, base, _ = cl.resolve(cl.Config(**fields, trained_dtype="float32"))
    samples = cl.Samples(config, base, cl.cache_clips(config), 1000)
    alpha_bar = base.load("scheduler").alphas_cumprod.double()
    with memory:
        transformer = cl.load_transformer(config, base, torch.float32, device).requires_grad_(True).train()
        transformer.enable_gradient_checkpointing()
        rotary = cl.rotary_embedding(base, transformer, config.frames, config.height, config.width, device)
        optimizer = torch.optim.AdamW(transformer.parameters(), lr=config.lr, betas=(0.9, 0.95), foreach=False)
        if kind == "DDP":
            model = torch.nn.parallel.DistributedDataParallel(transformer)
        else:
            import deepspeed

            # Its buckets are meant for billions of weights: left as they are, they would be larger than this model.
            zero = dict(stage=int(kind[-1]), reduce_bucket_size=BUCKET, allgather_bucket_size=BUCKET)
            settings = dict(
                train_micro_batch_size_per_gpu=1, gradient_clipping=1.0, zero_optimization=zero, zero_allow_untested_optimizer=True
            )  # fmt: skip
            model, *_ = deepspeed.initialize(model=transformer, optimizer=optimizer, config=settings)
        for step in range(STEPS):
            if step == STEPS - 1:
                memory.last_step_begins()
            batch = cl.collate([samples.training(step * processes + rank)], device)
            loss = cl.velocity_loss(model, batch, alpha_bar, rotary, torch.float32).mean()
            if kind == "DDP":
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            else:
                model.backward(loss)
                model.step()
            loss = loss.detach()
            del batch
    dist.all_reduce(loss)
    return memory.held, memory.peak, float(loss) / processes


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into zero.csv, too")
    parser.add_argument("--worker", choices=list(KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        found = train(args.worker, args.cache)
        print("FOUND " + json.dumps(found), flush=True)
        return
    import torch

    import cogvideo_lite as cl
    import tables

    rows = []
    with tempfile.TemporaryDirectory() as cache:
        config, base, _ = cl.resolve(cl.Config(method="full", cache=cache, compute_dtype="float32"))
        cl.cache_clips(config)
        weights = 4 * base.parameters / 2**20
        print(f"the weights in float32: {weights:.1f} MiB\n")
        for kind, processes in KINDS.items():
            launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
            command = [sys.executable, *launch, __file__, "--worker", kind, "--cache", cache]
            env = dict(os.environ, OMP_NUM_THREADS="1")
            if not torch.cuda.is_available():
                env["DS_ACCELERATOR"] = "cpu"
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            found = [
                json.loads(numbers) for numbers in re.findall(r"FOUND (\[.*?\])", done.stdout)
            ]  # two may share a line
            if done.returncode or len(found) != processes:
                raise SystemExit(f"{kind}: no result\n{done.stderr[-3000:]}")
            held, peak, loss = (max(column) for column in zip(*found))
            print(f"{kind}: loss of the last step {loss:.4f}", flush=True)
            rows.append({
                "setting": SETTINGS.get(kind, kind), "processes": processes, "held_mib": f"{held / 2**20:.1f}",
                "held_over_weights": f"{held / 2**20 / weights:.2f}", "peak_mib": f"{peak / 2**20:.1f}",
            })  # fmt: skip
    print(f"\n{tables.markdown(rows)}")
    if args.write:
        tables.write("zero", rows)


if __name__ == "__main__":
    main()
