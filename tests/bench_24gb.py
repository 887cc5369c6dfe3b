"""Do the real models train in the memory of a 24 GB card? Real training steps, at full size, on the CPU.

    python tests/bench_24gb.py                       every row, largest size that fits and ends in --minutes on this processor
    python tests/bench_24gb.py 5b-qlora 2b-full      some rows
    python tests/bench_24gb.py 5b-qlora --frames 49  at this length, however long it takes
    python tests/bench_24gb.py --frames 49 --write   every row, into step_24gb_cpu.csv

It builds CogVideoX-2b and -5b with random weights in shards on disk (needs 15 GB there), loads them as a run does (5B straight
into NF4), and takes steps with `cogvideo_lite.Trainer` on random latents and embeddings of the right shapes, after an update at
rate 0, so that the optimizer has its states from the first step on. Each row is a process of its own; one that the kernel
ends for want of memory is tried at the next smaller size. Peaks are the kernel's own account (VmHWM of /proc), reset after loading, so that loading and training
are told apart, and the larger is judged; what is resident of a process without any model (libraries: about 0.6 GiB) is in them.
When the row 5b-qlora of step_24gb_cpu.csv was taken, AdamW's two moments, 0.25 GiB, came after the step's backward.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import cogvideo_lite as cl  # noqa: E402
import plan  # noqa: E402
import tables  # noqa: E402

NAMES = {"2b": "THUDM/CogVideoX-2b", "5b": "THUDM/CogVideoX-5b", "1.5": "THUDM/CogVideoX1.5-5B"}
PARAMETERS = {"2b": 1_693_783_872, "5b": 5_570_283_072}  # counted in the published models
TARGETS_GIB = {"5b-qlora": 14, "2b-full": 14, "5b-full": 22}  # with bf16 arithmetic
SIZES = [(f, 480, 720) for f in (49, 41, 33, 25, 17, 9)] + [(9, 240, 360), (9, 128, 192)]
SHARD_BYTES = 2 * 2**30


def build(folder, name, parts=("transformer",)):
    """A pipeline folder with what training reads: configurations, and parts of it ("transformer", "vae", "text_encoder") in random
    bf16 shards, with the bundled tokenizer."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    base = plan.describe(NAMES[name])
    with init_empty_weights():
        models = {
            "transformer": CogVideoXTransformer3DModel.from_config(base.transformer),
            "vae": AutoencoderKLCogVideoX.from_config(base.vae),
            "text_encoder": T5EncoderModel(T5Config(**base.text_encoder)),
        }
    counted = sum(p.numel() for p in models["transformer"].parameters())
    assert counted == PARAMETERS.get(name, counted)
    for part, model in models.items():
        save = model.config.save_pretrained if part == "text_encoder" else model.save_config
        save(folder / part)
    CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, set_alpha_to_one=True, timestep_spacing="trailing",
        snr_shift_scale=3.0 if name == "2b" else 1.0,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    bundled = ROOT / "data_samples/cogvideox-nano"
    shutil.copytree(bundled / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    shutil.copy(bundled / "model_index.json", folder)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    for part in parts:
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"  # transformers' and diffusers' names
        save_random(models[part], folder / part / stem, f"{part} of {name}", generator)


def save_random(model, stem, told, generator):
    """Random weights of a model on the meta device as bf16 shards, STEM-00001.safetensors and so on with their index: never all in
    memory, as hub libraries that write shards would have them."""
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    shard, size, index = {}, 0, {}

    def write():
        nonlocal shard, size
        file = f"{stem.name}-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, str(stem.with_name(file)), {"format": "pt"})
        index.update(dict.fromkeys(shard, file))
        shard, size = {}, 0

    total = 0
    for key, p in tqdm(list(model.state_dict().items()), desc=f"random weights, {told}"):
        if key == "encoder.embed_tokens.weight":  # T5's one table under its second name
            continue
        flat = torch.ones(p.shape) if key.endswith("weight") and p.dim() == 1 else torch.zeros(p.shape)
        if p.dim() > 1:
            flat = 0.02 * torch.randn(p.shape, generator=generator, device=generator.device)
        shard[key] = flat.bfloat16().cpu()
        size, total = size + 2 * p.numel(), total + 2 * p.numel()
        if size > SHARD_BYTES:
            write()
    if shard:
        write()
    whole = {"metadata": {"total_size": total}, "weight_map": index}
    stem.with_name(f"{stem.name}.safetensors.index.json").write_text(json.dumps(whole))


def cache_of_noise(folder, frames, height, width):
    """Coded clips and prompts of the right shapes: the transformer's memory and time do not depend on what they show."""
    import torch

    t = (frames - 1) // 4 + 1
    cl.save_tensors(folder / "clip.safetensors", {"moments": torch.randn(32, t, height // 8, width // 8)})
    cl.save_tensors(folder / "prompt.safetensors", {"prompt_embeds": torch.randn(226, 4096).bfloat16()})
    clip = (folder / "clip.safetensors", folder / "prompt.safetensors")
    return cl.Cache([clip], [clip], clip[1], {})


def kernel_gib(name):
    """VmHWM (peak) or VmRSS of this process."""
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) / 2**20


def flops(name, method, frames, height, width):
    """Of one step on one clip, with checkpointing, in matrix products and in attention: multiplications and additions."""
    base = plan.describe(NAMES[name])
    width_, layers = base.width, base.transformer["num_layers"]
    tokens = base.text_length + base.latent_frames(frames)[0] * (height // 16) * (width // 16)
    linear, attention = 2 * 12 * width_**2 * tokens * layers, 4 * tokens**2 * width_ * layers
    # Twice forward (once more for the checkpoints), gradients of the inputs, and with --full those of the weights too.
    # Backward through attention takes five products where forward takes two.
    return linear * (4 if method == "full" else 3), attention * 4.5


def rates(dtype):
    """FLOP/s of this processor in matrix products and in attention, measured for a second each."""
    import torch

    return tuple(rate(torch.device("cpu"), dtype, seconds=1) for rate in (plan.matrix_rate, plan.attention_rate))


def row(name, method, folder, size, minutes, steps):
    """One row of the table, as a dict."""
    import torch
    from accelerate import Accelerator
    from tqdm import tqdm

    cl.quiet_libraries()
    config, base, _ = cl.resolve(cl.Config(method=method, model=str(folder), warmup=1))
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    dtype, why = cl.choose_compute_dtype(accelerator.device, base)
    speeds = rates(dtype)
    minutes_at = lambda s: sum(f / speed for f, speed in zip(flops(name, method, *s), speeds)) / 60  # noqa: E731
    predicted = {s: minutes_at(s) for s in SIZES}
    if size is None:
        size = next((s for s in SIZES if predicted[s] * steps < minutes), SIZES[-1])
    frames, height, width = size
    told = f"{minutes_at(size):.0f} minutes a step predicted at {speeds[0] / 1e12:.2f} TFLOP/s ({speeds[1] / 1e12:.2f} in attention)"
    full = f"; {predicted[SIZES[0]]:.0f} at 49x480x720" if size != SIZES[0] else ""
    print(f"{name} {method} at {frames}x{height}x{width}, {dtype} ({why}): {told}{full}", file=sys.stderr)
    config.frames, config.height, config.width, config.compute_dtype = *size, str(dtype).removeprefix("torch.")
    start = time.perf_counter()
    trainer = cl.Trainer(config, base, cache_of_noise(folder / "cache", *size), accelerator)
    trainer.updates.lr = 0.0
    for i, p in enumerate(trainer.parameters):  # as after a first step: the optimizer's states are there
        p.grad = torch.zeros_like(p)
        trainer.updates.update(i)
    trainer.updates.measured()
    loading = kernel_gib("VmHWM"), time.perf_counter() - start
    open("/proc/self/clear_refs", "w").write("5")  # sets the peak back to what is resident now
    resident, losses, seconds = kernel_gib("VmRSS"), [], []
    blocks = tqdm(total=steps * 2 * len(trainer.transformer.transformer_blocks), desc="blocks, forward twice")
    for block in trainer.transformer.transformer_blocks:
        # Before a block, since the second time stops before its end; and nothing returned, which would be its new arguments.
        block.register_forward_pre_hook(lambda *_: blocks.update() and None)
    for step in range(steps):
        metrics = trainer.step(step)
        losses.append(metrics["loss"])
        seconds.append(metrics["step_s"])
    blocks.close()
    return {
        "model": name, "method": method, "size": f"{frames}x{height}x{width}", "arithmetic": config.compute_dtype,
        "optimizer": config.optimizer, "loading_peak_gib": loading[0], "resident_gib": resident,
        "training_peak_gib": kernel_gib("VmHWM"), "loading_s": loading[1], "step_s": min(seconds), "steps": steps,
        "loss": losses[-1], "changed_share": metrics["changed_share"], "threads": torch.get_num_threads(),
    }  # fmt: skip


def judged(found):
    """What `row` found, as a row of the table: beside the plan of its tensors, and the target."""
    size = dict(zip(("frames", "height", "width"), map(int, found["size"].split("x"))))
    asked = cl.Config(method=found["method"], model=NAMES[found["model"]], compute_dtype=found["arithmetic"], **size)
    limit = TARGETS_GIB[f"{found['model']}-{found['method']}"]
    met = "met" if max(found["training_peak_gib"], found["loading_peak_gib"]) < limit else "missed"
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    shown = {name: found[name] for name in ("model", "method", "optimizer", "size", "arithmetic")}
    return shown | {
        "loading_peak_gib": f"{found['loading_peak_gib']:.1f}", "training_peak_gib": f"{found['training_peak_gib']:.1f}",
        "tensors_predicted_gib": f"{plan.plan(asked, card=False).needs_gib['training']:.1f}", "target_gib": limit,
        "verdict": met if found["arithmetic"] == "bfloat16" else "not judged, the target is for bfloat16",
        "step_s": f"{found['step_s']:.0f}", "steps": found["steps"], "seed": 0, "threads": found["threads"],
        "processor": processor[1] if processor else "",
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(TARGETS_GIB), help=f"any of {', '.join(TARGETS_GIB)}")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=720)
    parser.add_argument("--minutes", type=float, default=30, help="a row ends in about this time [30]")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "cogvideo_lite_24gb"))
    parser.add_argument("--write", action="store_true", help="into step_24gb_cpu.csv, too")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a row, in its own process
    args = parser.parse_args()
    size = (args.frames, args.height, args.width) if args.frames else None
    if args.one:
        name, method = args.rows[0].split("-")
        print(json.dumps(row(name, method, Path(args.folder) / name, size, args.minutes, args.steps)))
        return
    found = []
    for what in args.rows:
        folder = Path(args.folder) / what.split("-")[0]
        if not (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").exists():
            (folder / "transformer").mkdir(parents=True, exist_ok=True)
            build(folder, folder.name)
        command = [sys.executable, __file__, what, "--one", "--minutes", str(args.minutes), "--steps", str(args.steps)]
        command += ["--folder", args.folder]
        for tried in [size] if size else [None, *SIZES[1:]]:  # None: as large as the time allows
            at = ["--frames", str(tried[0]), "--height", str(tried[1]), "--width", str(tried[2])] if tried else []
            done = subprocess.run(
                command + at, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
            )
            if done.returncode != -9:
                break
            print(
                f"{what} at {'x'.join(map(str, tried or SIZES[0]))} or less: ended by the kernel, out of memory",
                flush=True,
            )
        if done.returncode:
            print(f"{what}: failed with status {done.returncode}")
            continue
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(found[-1]), flush=True)
    rows = [judged(one) for one in found]
    if rows:
        print(f"\nCPU resident memory, random weights:\n\n{tables.markdown(rows)}")
    if rows and args.write:
        tables.write("step_24gb_cpu", rows)


if __name__ == "__main__":
    main()
