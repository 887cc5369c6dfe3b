"""The real models on a real card, its memory capped at that of a 24 GB one: peak memory, beside the plan's, and samples a second.

    python tests/bench_gpu.py                        every row at 49x480x720
    python tests/bench_gpu.py 5b-qlora --steps 5 --cap-gib 0      some rows; 0 is no cap

Random weights and noise of the right shapes, as in bench_24gb.py, whose builder it uses: neither memory nor time depend on
what the weights are. Each row is a process of its own, so that a row that runs out of memory says so and the next one starts
clean. Peaks are torch.cuda.max_memory_reserved during training; CUDA's own context, about half a GiB, is outside the cap.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_24gb import build, cache_of_noise, cl

ROWS = ["2b-lora", "2b-qlora", "2b-full", "5b-lora", "5b-qlora", "5b-full"]
SIZE = (49, 480, 720)


def row(name, method, folder, cap_gib, steps, batch_size):
    import torch
    from accelerate import Accelerator

    total = torch.cuda.get_device_properties(0).total_memory
    if cap_gib:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / total))
    cl.quiet_libraries()
    config, base, _ = cl.resolve(cl.Config(method=method, model=str(folder), warmup=1, batch_size=batch_size))
    accelerator = Accelerator(mixed_precision="no")
    dtype, why = cl.choose_compute_dtype(accelerator.device, base)
    print(f"{name} {method}: {dtype}, {why}", file=sys.stderr)
    config.frames, config.height, config.width, config.compute_dtype = *SIZE, str(dtype).removeprefix("torch.")
    found = {"model": name, "method": method, "size": "x".join(map(str, SIZE)), "batch": batch_size, "cap_gib": cap_gib,
             "card": torch.cuda.get_device_name(), "optimizer": config.optimizer, "arithmetic": config.compute_dtype}  # fmt: skip
    planned = cl.Config(
        method=method, model=f"THUDM/CogVideoX-{name}", batch_size=batch_size, compute_dtype=config.compute_dtype
    )
    found["predicted_gib"] = cl.plan(planned).needs_gib["training"] - cl.CONTEXT_GIB
    try:
        trainer = cl.Trainer(config, base, cache_of_noise(folder / "cache", *SIZE), accelerator)
        found["loaded_gib"] = torch.cuda.max_memory_reserved() / 2**30
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        metrics = [trainer.step(step) for step in range(steps)]
    except torch.OutOfMemoryError:
        return {**found, "peak_gib": None, "allocated_gib": None, "samples_per_s": None}
    seconds = sorted(m["step_s"] for m in metrics[1:] or metrics)  # the first step sets kernels up
    return {
        **found, "peak_gib": torch.cuda.max_memory_reserved() / 2**30, "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "samples_per_s": batch_size / seconds[len(seconds) // 2], "loss": metrics[-1]["loss"],
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=ROWS, help=f"any of {', '.join(ROWS)}")
    parser.add_argument("--cap-gib", type=float, default=24)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "cogvideo_lite_24gb"))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a row, in its own process
    args = parser.parse_args()
    if args.one:
        name, method = args.rows[0].split("-")
        print(json.dumps(row(name, method, Path(args.folder) / name, args.cap_gib, args.steps, args.batch_size)))
        return
    found = []
    for what in args.rows:
        folder = Path(args.folder) / what.split("-")[0]
        if not (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").exists():
            (folder / "transformer").mkdir(parents=True, exist_ok=True)
            build(folder, folder.name)
        command = [sys.executable, __file__, what, "--one"]
        for name in ("cap_gib", "steps", "batch_size", "folder"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if done.returncode:
            print(f"{what}: failed with status {done.returncode}", flush=True)
            continue
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(found[-1]), flush=True)
    cap = f"capped at {args.cap_gib:g} GiB" if args.cap_gib else "no cap"
    print(f"\n{found[0]['card'] if found else 'no row'}, {cap}, {'x'.join(map(str, SIZE))}, random weights:\n")
    print(
        "| model, method | arithmetic | batch | peak GiB | samples/s | peak predicted |\n| --- | --- | ---: | ---: | ---: | ---: |"
    )
    for r in found:
        figures = "out of memory | " if r["peak_gib"] is None else f"{r['peak_gib']:.1f} | {r['samples_per_s']:.3f}"
        print(
            f"| {r['model']} {r['method']} ({r['optimizer']}) | {r['arithmetic']} | {r['batch']} | {figures} | {r['predicted_gib']:.1f} |"
        )


if __name__ == "__main__":
    main()
