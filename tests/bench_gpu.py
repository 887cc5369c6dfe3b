"""The real models on a real card, its memory capped at that of a 24 GB one: peak memory and time, beside the plan.

    python tests/bench_gpu.py                                every row, into tests/measured_gpu.csv
    python tests/bench_gpu.py 5b-qlora 2b-lora,batch_size=4  some rows anew; after the commas stand options of a run
    python tests/bench_gpu.py 5b-lora,batch_size=8,cap=0     without the cap
    python tests/bench_gpu.py --table                        what is in that file beside the plan's predictions, made anew
                                                             (no GPU needed); with --write also into plan_against_h200.csv
                                                             and h200_step_times.csv

Random weights and noise of the right shapes, as in bench_24gb.py, whose builder it uses: neither memory nor time depend
on what the weights are. "5b-caching" codes a clip with the VAE and prompts with T5; the other rows take training steps
with `cogvideo_lite.Trainer`, then sample one clip in two denoising steps. Memory is what torch's allocator has at its
most in a phase, in tensors (`allocated`) and altogether (`reserved`); the cap counts CUDA's context as the plan does, so
that cap - `plan.CONTEXT_GIB` is left to the allocator. Rows run one after another in one process; if it dies, the next
goes on behind the row that it died of. What the card still holds of the rows before (`held_before_gib`, which should be
nothing) is taken off the tensors in the table, and what was reserved beside it is not judged.

`day`: 1 or 2 for the first two days of measuring; "2, again" repeats a row of the first, which had been measured less
cleanly; later ones have their date. The first day's sampling taught the plan something: it rehearsed one tile of the
decoder before, and was 10.8 to 14.6 % too low. Nothing of the plan was changed after the second day. Of the 85 s that
`python cogvideo_lite.py --lora` took on that card, 20 were its 400 steps; the rest was coding, sampling and judging.
"""

import argparse
import ast
import concurrent.futures
import csv
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tables
from bench_24gb import NAMES, build, cache_of_noise, cl, plan

RESULTS = Path(__file__).with_name("measured_gpu.csv")
ROWS = [
    "2b-lora", "2b-qlora", "2b-full", "5b-lora", "5b-qlora", "5b-full", "5b-caching", "5b-caching,quantize_text_encoder=4bit",
    "5b-caching,quantize_text_encoder=8bit", "5b-qlora,offload_activations=True", "5b-qlora,optimizer=adamw8bit",
    "2b-full,optimizer=adamw8bit", "2b-lora,batch_size=4", "2b-lora,compile=True", "5b-qlora,compile=True",
    "2b-lora,gradient_checkpointing=False,cap=0", "2b-full,gradient_checkpointing=False,cap=0",
    "5b-lora,gradient_checkpointing=False,cap=0", "2b-lora,batch_size=5", "5b-qlora,batch_size=2",
    "2b-full,frames=17,height=256,width=384", "5b-lora,frames=25,height=320,width=480",
    "1.5-lora,frames=49,height=768,width=1360", "5b-lora,batch_size=8,cap=80", "5b-full,batch_size=8,cap=80",
]  # fmt: skip
SIZE = (49, 480, 720)
COLUMNS = (
    "card torch day row phase cap_gib held_before_gib allocated_gib reserved_gib context_gib seconds first_s tflops"
).split()


def parsed(row):
    """(model, method or "caching", options of Config, GiB of the cap or None) of a row's name."""
    first, *options = row.split(",")
    model, method = first.split("-")
    values = {}
    for option in options:
        key, _, value = option.partition("=")
        try:
            values[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[key] = value
    return model, method, values, values.pop("cap", None)


def config_of(row, model):
    _, method, options, _ = parsed(row)
    size = dict(zip(("frames", "height", "width"), SIZE))
    method = "lora" if method == "caching" else method
    return cl.Config(
        **{"method": method, "model": model, "warmup": 1, "batch_size": 1, "sampling_steps": 2, **size, **options}
    )


class Phase:
    """What the allocator had at its most, from here on."""

    def __init__(self):
        import torch

        cl.free_memory()
        torch.cuda.reset_peak_memory_stats()

    def peak(self):
        import torch

        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return {
            "allocated_gib": torch.cuda.max_memory_allocated() / plan.GIB,
            "reserved_gib": torch.cuda.max_memory_reserved() / plan.GIB,
            "context_gib": (total - free - torch.cuda.memory_reserved()) / plan.GIB,  # and what else is on the card
        }


def caching(row, folder):
    """Code a clip and prompts; yields what was measured."""
    import torch

    data = folder / "clip"
    data.mkdir(exist_ok=True)
    for name in ("a", "b"):
        if not (data / f"{name}.mp4").exists():
            frames, height, width = SIZE
            cl.write_video(data / f"{name}.mp4", torch.rand(frames, 3, height // 8, width // 8), 8)
            (data / f"{name}.txt").write_text(f"noise {name}")
    with tempfile.TemporaryDirectory() as cache:
        config = config_of(row, str(folder))
        config.data, config.cache, config.validation_prompts = str(data), cache, ["a spider"]
        phase, start = Phase(), time.perf_counter()
        cl.cache_clips(config)
        yield {"phase": "caching", **phase.peak(), "seconds": time.perf_counter() - start}


def training(row, folder, steps):
    """Training steps, then a sample; yields what was measured in each phase."""
    from accelerate import Accelerator

    phase = Phase()
    config, base, _ = cl.resolve(config_of(row, str(folder)))
    accelerator = Accelerator(mixed_precision="no")
    dtype, _ = cl.choose_compute_dtype(accelerator.device, base)
    config.compute_dtype = str(dtype).removeprefix("torch.")
    start = time.perf_counter()
    cache = cache_of_noise(folder / "cache", config.frames, config.height, config.width)
    cache.prompts = {"a spider": cache.empty}
    trainer = cl.Trainer(config, base, cache, accelerator)
    yield {"phase": "loading", **phase.peak(), "seconds": time.perf_counter() - start}
    phase = Phase()
    metrics = [trainer.step(step) for step in range(steps)]
    seconds = statistics.median(m["step_s"] for m in metrics[1:] or metrics)  # the first sets kernels up
    yield {"phase": "training", **phase.peak(), "seconds": seconds, "first_s": metrics[0]["step_s"]}
    phase, start = Phase(), time.perf_counter()
    trainer.generated()
    yield {"phase": "sampling", **phase.peak(), "seconds": time.perf_counter() - start}


def measure(rows, folder, cap_gib, steps):
    """Run rows and print what was measured, a line of JSON each."""
    import torch

    cl.quiet_libraries()
    card = torch.cuda.get_device_properties(0)
    device = torch.device("cuda")
    shared = {"card": card.name, "torch": torch.__version__, "day": time.strftime("%F")}
    for row in rows:
        model, method, _, cap = parsed(row)
        cap = cap_gib if cap is None else cap
        allowed = cap - plan.CONTEXT_GIB if cap else card.total_memory / plan.GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed * plan.GIB / card.total_memory))
        print(json.dumps({"row": row, "phase": "begun"}), flush=True)
        about = {**shared, "row": row, "cap_gib": cap, "held_before_gib": torch.cuda.memory_allocated() / plan.GIB}
        try:
            if method == "rates":
                rates = plan.matrix_rate(device, torch.bfloat16, 1), plan.attention_rate(device, torch.bfloat16, 1)
                found = [
                    {"phase": phase, "tflops": rate / 1e12} for phase, rate in zip(("matrices", "attention"), rates)
                ]
            else:
                found = caching(row, folder / model) if method == "caching" else training(row, folder / model, steps)
            for phase in found:
                print(json.dumps({**about, **phase}), flush=True)
        except torch.OutOfMemoryError as error:
            print(json.dumps({**about, "phase": "out of memory", "why": str(error).splitlines()[0]}), flush=True)
        found = None
        cl.free_memory()
        torch._C._cuda_clearCublasWorkspaces()
        print(f"{row}: {torch.cuda.memory_allocated() / plan.GIB:.3f} GiB left behind", file=sys.stderr, flush=True)


def prediction(row):
    """(row, plan of it) for the table."""
    planned = plan.plan(dataclasses.replace(config_of(row, NAMES[parsed(row)[0]]), compute_dtype="bfloat16"))
    return row, planned


def percent(measured, predicted):
    return f"{100 * (predicted / measured - 1):+.1f} %"


def beside_plan(path):
    """Two tables, as rows: memory of each phase, and time of a step, measured and predicted."""
    found = list(csv.DictReader(path.open()))
    rates = {f["phase"]: float(f["tflops"]) * 1e12 for f in found if f["tflops"]}
    rows = {f["row"]: None for f in found if not f["tflops"]}
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        plans = dict(pool.map(prediction, rows))
    memory, times = [], []
    for f in found:
        if f["row"] not in plans or f["phase"] not in plans[f["row"]].phases:
            continue
        planned, held, about = plans[f["row"]], float(f["held_before_gib"]), {"row": f["row"], "day": f["day"]}
        parts = planned.phases[f["phase"]]
        tensors = sum(parts[kind] for kind in plan.KINDS)
        memory.append(about | {"cap_gib": f"{float(f['cap_gib']):g}", "phase": f["phase"]})
        for kind, measured, predicted in (
            ("tensors", float(f["allocated_gib"]) - held, tensors),
            ("reserved", float(f["reserved_gib"]), tensors + parts["allocator"]),
        ):
            judged = kind == "tensors" or held < 0.01
            memory[-1] |= {
                f"{kind}_gib": f"{measured:.2f}" if judged else "",
                f"{kind}_predicted_gib": f"{predicted:.2f}",
                f"{kind}_error": percent(measured, predicted) if judged else "",
            }
        if f["phase"] == "training":
            seconds, attention = float(f["seconds"]), planned.attention_flops
            published = next(tflops[0] for card, tflops in plan.CARDS.items() if card in f["card"])
            least = (planned.flops - attention) / rates["matrices"] + attention / rates["attention"]
            times.append(about | {
                "flops_predicted": f"{planned.flops:.3g}", "step_s": f"{seconds:.2f}",
                "tflops": f"{planned.flops / seconds / 1e12:.0f}",
                "share_of_published_rate": f"{planned.flops / seconds / 1e12 / published:.2f}",
                "least_from_measured_rates_s": f"{least:.2f}", "first_step_s": f"{float(f['first_s']):.1f}",
            })  # fmt: skip
    return {"plan_against_h200": memory, "h200_step_times": times}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=["any-rates", *ROWS])
    parser.add_argument("--cap-gib", type=float, default=24)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "cogvideo_lite_24gb"))
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"[{RESULTS.name} beside this file]")
    parser.add_argument(
        "--table", action="store_true", help="measure nothing; print what is in RESULTS beside the plan's predictions"
    )
    parser.add_argument("--write", action="store_true", help="with --table: into csv files, too")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # the process that measures
    args = parser.parse_args()
    folder, remaining = Path(args.folder), list(args.rows)
    if args.table:
        for name, rows in beside_plan(args.results).items():
            print(f"{tables.markdown(rows)}\n")
            if args.write:
                tables.write(name, rows)
        return
    if args.one:
        return measure(remaining, folder, args.cap_gib, args.steps)
    for name in {parsed(row)[0] for row in remaining} & set(NAMES):
        parts = ["transformer", "vae"] + ["text_encoder"] * any(row.startswith(f"{name}-caching") for row in remaining)
        if not (folder / name / "built").exists():
            (folder / name).mkdir(parents=True, exist_ok=True)
            build(folder / name, name, parts)
            (folder / name / "built").touch()
    before = list(csv.DictReader(args.results.open())) if args.results.exists() else []
    found, begun = [], None
    while remaining:
        command = [sys.executable, __file__, *remaining, "--one", "--folder", args.folder,
                   "--cap-gib", str(args.cap_gib), "--steps", str(args.steps)]  # fmt: skip
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as measuring:
            for line in measuring.stdout:
                one = json.loads(line)
                if one["phase"] == "begun":
                    begun = one["row"]
                    continue
                print(line, end="", flush=True)
                found.append(one)
                anew = {f["row"] for f in found}
                with args.results.open("w") as file:  # rows that are not measured now stay
                    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
                    writer.writeheader()
                    writer.writerows([f for f in before if f["row"] not in anew] + found)
        if not measuring.returncode:
            break
        died = begun if begun in remaining else remaining[0]  # or before it began any
        print(f"{died}: ended with status {measuring.returncode}", file=sys.stderr, flush=True)
        remaining = remaining[remaining.index(died) + 1 :]


if __name__ == "__main__":
    main()
