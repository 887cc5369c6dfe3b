"""How good is the memory plan? Other trainers' recipes, rehearsed with the plan's own means, beside what they published.

    python tests/bench_plan.py                  predicted beside published (tests/published_memory.csv)
    python tests/bench_plan.py --rows FILE.csv  rows of the same columns
    python tests/bench_plan.py --capacity       what fits on cards of 12 to 80 GB, predicted, and what checkpointing saves

Published figures are GiB of `torch.cuda.max_memory_reserved`. What the recipes do was read in their sources:

- cogvideox-factory (training/cogvideox_text_to_video_lora.py and _sft.py, utils.py): T5, transformer and VAE go to the card in
  bf16, then the adapters. The cache is emptied and the peak reset while T5 and VAE are still there: `before_gib`, below which
  no peak of the run can fall. Then T5 and VAE are freed. A step runs under accelerate's bf16 autocast, adds noise in bf16,
  compares clean latents in fp32, takes norms and clips, and steps torch's AdamW, which on a GPU works on all tensors at once
  (foreach), or bitsandbytes' AdamW8bit, or torchao's CPUOffloadOptimizer with `offload_gradients`, which keeps gradients and
  states on the host.
- What the sources leave open and the figures tell: adapters were in fp32, since `before_gib` grows by 4 bytes for each weight of
  them from rank 16 to 256 (5b); so were the weights of full fine-tuning. And the peaks of full fine-tuning with 8-bit states
  leave no room for these states during backward, as in a first step: so one step is rehearsed, for all rows.
- finetrainers, LoRA: taken to do the same.

On CUDA, autocast runs layer norms in fp32 and keeps fp32 copies of their inputs; autocast of a CPU does not, so it is added here.

Rows of kind `peak` count into the errors; `bound` rows only must not be above what is published; of `card` rows the published
number is a card's size; `parallel` rows share their states among processes or with the host, which is not rehearsed.
"""

import argparse
import csv
import functools
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cogvideo_lite as cl  # noqa: E402

NAMES = {"2b": "THUDM/CogVideoX-2b", "5b": "THUDM/CogVideoX-5b", "1.5": "THUDM/CogVideoX1.5-5B"}
CAPACITY = (12, 16, 24, 48, 80)  # GiB
LADDER = {  # frames x height x width, from the native size of the model down
    "2b": [(49, 480, 720), (33, 480, 720), (17, 480, 720), (17, 320, 480), (17, 256, 256)],
    "1.5": [(81, 768, 1360), (49, 768, 1360), (49, 480, 720), (33, 480, 720), (17, 480, 720), (17, 320, 480)],
}
METHODS = {
    "lora": dict(method="lora"),
    "qlora": dict(method="qlora"),
    "full": dict(method="full"),
    "full, 8-bit Adam": dict(method="full", optimizer="adamw8bit"),
}


def like_cuda_autocast(model):
    """Let layer norms compute in fp32 under autocast, as CUDA's policy says: their inputs and outputs are fp32 copies."""
    import torch
    import torch.nn.functional as F

    def forward(norm, x):
        if not torch.is_autocast_enabled("cpu"):
            return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
        return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)

    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = functools.partial(forward, module)


def foreign_run(row):
    """(GiB reserved before training, peak GiB reserved) of a row's recipe."""
    import bitsandbytes as bnb
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from peft import LoraConfig
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import T5Config, T5EncoderModel

    base = cl.describe(NAMES[row["model"]])
    batch, frames, height, width = (int(row[k]) for k in ("batch", "frames", "height", "width"))
    half = torch.float16 if row["weights_dtype"] == "fp16" else torch.bfloat16
    lora = row["method"] == "lora"
    with torch.device("meta"):
        text_encoder = cl.shapes_only(T5EncoderModel(T5Config(**base.text_encoder)), half)
        transformer = cl.shapes_only(CogVideoXTransformer3DModel.from_config(base.transformer), half)
        vae = cl.shapes_only(AutoencoderKLCogVideoX.from_config(base.vae), half)
        text_encoder.set_input_embeddings(text_encoder.shared)
        for buffer in transformer.buffers():  # 2B's table of positions
            buffer.data = buffer.data.to(half)
    if lora:
        rank = int(row["rank"])
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=cl.LORA_TARGETS["attention"]))
        for name, p in transformer.named_parameters():
            p.data = p.data.float() if "lora_" in name else p.data
    else:
        transformer.requires_grad_(True)
    like_cuda_autocast(transformer)
    ledger, cache_emptied = cl.Ledger(), []
    with FakeTensorMode(allow_non_fake_inputs=True), cl.tables_with_contents(), ledger.watch():
        if row["before_gib"]:  # else T5 and VAE were not on the card
            cl.take_memory(ledger, text_encoder)
        cl.take_memory(ledger, transformer)
        if row["before_gib"]:
            cl.take_memory(ledger, vae)
        cl.take_memory(ledger, transformer, adapters=True)
        parameters = [p for p in transformer.parameters() if p.requires_grad]
        if row["weights_dtype"] == "fp32":
            for p in transformer.parameters():
                p.data = p.data.float()
        cache_emptied.append(len(ledger.events))
        del text_encoder, vae
        cache_emptied.append(len(ledger.events))
        if row["grad_checkpointing"] == "yes":
            transformer.enable_gradient_checkpointing()
        transformer.train()
        on_host = row["offload"] == "cpu states and grads"
        if on_host:
            for p in parameters:
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        elif row["optimizer"] == "adamw":
            optimizer = torch.optim.AdamW(parameters, foreach=True)
        else:
            optimizer = bnb.optim.AdamW8bit(parameters)
        rotary = cl.rotary_embedding(base, transformer, frames, height, width, torch.device("cpu"))
        foreign_loss(transformer, base, rotary, batch, frames, height, width, half).backward()
        if not on_host:
            gradients = [p.grad for p in parameters]
            norm = torch.stack(torch._foreach_norm(gradients)).norm()
            torch._foreach_mul_(gradients, norm)
            del gradients
            optimizer.step()
    before, allocator = None, cl.Allocator()
    for k, (memory, taken) in enumerate(ledger.events):
        if k in cache_emptied:
            allocator.empty_cache()
            if before is None:
                before = allocator.most = allocator.reserved
        (allocator.take if taken else allocator.give_back)(memory)
    return before / cl.GIB, allocator.most / cl.GIB


def foreign_loss(transformer, base, rotary, batch, frames, height, width, half):
    """Latents from a posterior, noise, prediction and loss as cogvideox-factory computes them, dtypes included."""
    import torch

    t, h, w = sum(base.latent_frames(frames)), height // base.spatial, width // base.spatial
    mean, logvar = torch.empty(batch, 2 * base.vae["latent_channels"], t, h, w, dtype=half).chunk(2, dim=1)
    clean = (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn(mean.shape, dtype=half)) * 0.7
    clean = clean.permute(0, 2, 1, 3, 4).contiguous()
    noise, timesteps = torch.randn_like(clean), torch.randint(1000, (batch,))
    alpha_bar = torch.empty(1000)
    a, b = ((p**0.5).to(half)[timesteps].view(-1, 1, 1, 1, 1) for p in (alpha_bar, 1 - alpha_bar))
    noisy = a * clean + b * noise
    prompts = torch.empty(batch, base.text_length, 4096, dtype=half)
    with torch.autocast("cpu", dtype=half):
        velocity = transformer(noisy, prompts, timesteps, image_rotary_emb=rotary, return_dict=False)[0]
    predicted = a * noisy - b * velocity.float()  # accelerate gives outputs back in fp32
    weights = 1 / (1 - alpha_bar[timesteps])
    return (weights.view(-1, 1, 1, 1, 1) * (predicted - clean) ** 2).reshape(batch, -1).mean(dim=1).mean()


def compare(file):
    """Print a table of predicted beside published. Returns the errors of the rows of kind `peak`."""
    print(
        "| model | method | rank | batch | checkpointing | optimizer | before, published | predicted | peak, published | predicted | error |"
    )
    print("| --- | --- | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | --- |")
    errors = []
    with open(file, newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    for row in rows:
        optimizer = row["optimizer"] + ("" if row["offload"] == "none" else f", {row['offload']}")
        cells = [row["model"], row["method"], row["rank"], row["batch"], row["grad_checkpointing"], optimizer]
        if row["kind"] == "parallel":
            print(
                f"| {' | '.join(cells)} | {row['before_gib']} | | {row['train_gib']} | | several ranks or host: not predicted |"
            )
            continue
        if "deepspeed" in row["offload"]:
            print(f"| {' | '.join(cells)} | | | {row['train_gib']} | | a card's size; DeepSpeed: not predicted |")
            continue
        before, peak = foreign_run(row)
        published = float(row["train_gib"])
        error = peak / published - 1
        if row["kind"] == "peak":
            errors.append(abs(error))
            told = f"{100 * error:+.1f} %"
        elif row["kind"] == "bound":
            told = f"bound {'respected' if peak <= published * 1.005 else 'broken'}"
        else:
            told = "a card's size"
        print(
            f"| {' | '.join(cells)} | {row['before_gib']} | {before:.3f} | {row['train_gib']} | {peak:.3f} | {told} |",
            flush=True,
        )
    return errors


def needs_of_batches(planned, **changes):
    """(phase -> GiB for one clip, GiB that each further clip of a batch adds to training, FLOP of a step on one)."""
    one, two = (cl.resolve_plan(planned.asked, batch_size=batch, **changes) for batch in (1, 2))
    (peak, sampling, _, flops), (peak_of_two, *_) = (
        cl.from_few_blocks(*one, sampling=bool(changes.get("frames"))),
        cl.from_few_blocks(*two),
    )
    parts, needs = planned.phases["training"], planned.needs_gib
    share = 1 + parts["allocator"] / sum(parts[kind] for kind in cl.KINDS)  # the allocator's, as in `cl.estimate`
    needs["training"] = peak * share + cl.CONTEXT_GIB
    if "frames" in changes:
        needs["caching"] = sum(cl.rehearse_caching(*one).split("caching").values())
        needs["sampling"] = sampling
    return needs, (peak_of_two - peak) * share, flops


def largest(needs, per_clip, vram):
    """Largest batch that fits, 0 if none does."""
    if max(needs.values()) > vram:
        return 0
    return 1 + int((vram - needs["training"]) / per_clip)


def capacity(models):
    """Print what fits on cards of several sizes, and what gradient checkpointing saves and costs."""
    print("| model, method | " + " | ".join(f"{vram} GB" for vram in CAPACITY) + " |")
    print("| --- |" + " --- |" * len(CAPACITY))
    trade = []
    for model in models:
        for name, options in METHODS.items():
            ladder = LADDER.get(model, LADDER["2b"])
            native = dict(zip(("frames", "height", "width"), ladder[0]))
            planned = cl.plan(cl.Config(model=NAMES[model], batch_size=1, **options, **native))
            cells, found = {}, []
            for size in ladder:
                found.append(needs_of_batches(planned, **({} if not found else dict(zip(native, size)))))
                for vram in CAPACITY:
                    batch = largest(*found[-1][:2], vram)
                    if batch and vram not in cells:
                        cells[vram] = "x".join(map(str, size)) + (f", batch {batch}" if batch > 1 else "")
                if len(cells) == len(CAPACITY):
                    break
            least = f"none; {max(found[-1][0].values()):.1f} at least"
            print(f"| {model} {name} | " + " | ".join(cells.get(vram, least) for vram in CAPACITY) + " |", flush=True)
            trade.append((f"{model} {name}", found[0], needs_of_batches(planned, gradient_checkpointing=False)))
    print(
        "\nGradient checkpointing at the native size: GiB to train on one clip, work of a step, largest batch in 80 GB\n"
    )
    print("| model, method | GiB with | GiB without | FLOP with / without | batch with | batch without |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, with_, without in trade:
        print(f"| {name} | {with_[0]['training']:.1f} | {without[0]['training']:.1f} | {with_[2] / without[2]:.2f} "
              f"| {largest(*with_[:2], 80)} | {largest(*without[:2], 80)} |")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=ROOT / "tests/published_memory.csv", help="CSV of the columns of that file")
    parser.add_argument("--capacity", nargs="*", metavar="MODEL", help=f"tables of what fits: {', '.join(NAMES)} [all]")
    args = parser.parse_args()
    cl.quiet_libraries()
    if args.capacity is not None:
        capacity(args.capacity or NAMES)
        return
    errors = compare(args.rows)
    print(json.dumps({
        "median_error": statistics.median(errors) if errors else None,
        "worst_error": max(errors, default=None),
        "rows": len(errors),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
