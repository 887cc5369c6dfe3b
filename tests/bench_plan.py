"""How good is the memory plan? Other trainers' recipes, rehearsed with the plan's own means, beside what they published.

    python tests/bench_plan.py                  predicted beside published (tests/published_memory.csv)
    python tests/bench_plan.py --rows FILE.csv  rows of the same columns
    python tests/bench_plan.py --capacity       what fits on cards of 12 to 80 GB, and what checkpointing saves (20 minutes)
    python tests/bench_plan.py --cards          each method on each card, with its command (2 minutes)
    python tests/bench_plan.py --together       --full of 5B with --shard on one to eight cards of 24 GB (3 minutes)

With --write the tables go to csv files beside this one: plan_against_published; capacity, batch_on_80gb and
gradient_checkpointing; cards; cards_together.

Published figures are GiB of `torch.cuda.max_memory_reserved`. What the recipes do was read in their sources:

- cogvideox-factory (training/cogvideox_text_to_video_lora.py and _sft.py, utils.py): T5, transformer and VAE go to the card in
  bf16, then the adapters. The cache is emptied and the peak reset while T5 and VAE are still there: `before_gib`, below which
  no peak of the run can fall. Then T5 and VAE are freed. A step runs under accelerate's bf16 autocast, adds noise in bf16,
  compares clean latents in fp32, takes norms and clips, and steps torch's AdamW, which on a GPU works on all tensors at once
  (foreach), or bitsandbytes' AdamW8bit, or torchao's CPUOffloadOptimizer with `offload_gradients`, which keeps gradients and
  states on the host.
- What the sources leave open and the figures tell: adapters were in fp32, since `before_gib` grows by 4 bytes for each weight of
  them from rank 16 to 256 (5b); so were the weights of full fine-tuning. And AdamW's states are there during backward, as in any
  step but the first (rank 256 shows it), while the peaks of full fine-tuning with 8-bit states leave no room for these during
  backward, as in a first step; why is not known. So rows with 8-bit states are compared with one step, the others with two. The
  other number stands beside it. An earlier revision took one step for all: median 0.3 %, worst 6.0 % on these rows, and more than
  10 % too little for full fine-tuning of 2B with AdamW on four clips, a row of the same source that is not among them.
- finetrainers, LoRA: taken to do the same.
- A row without `before_gib` is taken to have T5 and VAE elsewhere.

On CUDA, autocast runs layer norms in fp32 and keeps fp32 copies of their inputs; autocast of a CPU does not, so it is added here.

Rows of kind `peak` count into the errors; `bound` rows only must not be above what is published, or not below where the note says
that it was not enough ("out of memory", "more than", "at least", "does not fit"); of `card` rows the published
number is a card's size; `parallel` rows, which share their states among processes or with the host, and rows with values that are
not known here are listed as left out, with the reason.
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import functools
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import cogvideo_lite as cl  # noqa: E402
import plan  # noqa: E402
import tables  # noqa: E402

NAMES = {"2b": "THUDM/CogVideoX-2b", "5b": "THUDM/CogVideoX-5b", "1.5": "THUDM/CogVideoX1.5-5B"}
IMAGE_TO_VIDEO = {"5b-i2v": "THUDM/CogVideoX-5b-I2V", "1.5-i2v": "THUDM/CogVideoX1.5-5B-I2V"}
ALL = NAMES | IMAGE_TO_VIDEO
USUAL = {12: "RTX 3060", 16: "RTX 4080", 24: "RTX 4090", 48: "RTX A6000", 80: "H100"}  # GB -> a card of so many
CARDS = ["RTX 3060", "RTX 4080", "RTX 3090", "RTX 4090", "RTX A6000", "A100 80GB", "H100"]
CAPACITY = {gb: plan.CARDS[card][2] for gb, card in USUAL.items()}  # -> GiB that torch finds on one
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
    """(GiB reserved before training, peak GiB reserved by the end of the step that a row is compared with, by that of the other one of
    the first two) of a row's recipe."""
    import bitsandbytes as bnb
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from peft import LoraConfig
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import T5Config, T5EncoderModel

    base = plan.describe(ALL[row["model"]])
    batch, frames, height, width = (int(row[k]) for k in ("batch", "frames", "height", "width"))
    half = torch.float16 if row["weights_dtype"] == "fp16" else torch.bfloat16
    lora = row["method"] == "lora"
    with torch.device("meta"):
        text_encoder = plan.shapes_only(T5EncoderModel(T5Config(**base.text_encoder)), half)
        transformer = plan.shapes_only(CogVideoXTransformer3DModel.from_config(base.transformer), half)
        vae = plan.shapes_only(AutoencoderKLCogVideoX.from_config(base.vae), half)
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
    ledger, cache_emptied, ended = plan.Ledger(), [], []
    with FakeTensorMode(allow_non_fake_inputs=True), plan.tables_with_contents(), ledger.watch():
        if row["before_gib"]:  # else T5 and VAE were not on the card
            plan.take_memory(ledger, text_encoder)
        plan.take_memory(ledger, transformer)
        if row["before_gib"]:
            plan.take_memory(ledger, vae)
        plan.take_memory(ledger, transformer, adapters=True)
        ledger.begin("training")
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
        for _ in range(2):
            foreign_loss(transformer, base, rotary, batch, frames, height, width, half).backward()
            if not on_host:
                gradients = [p.grad for p in parameters]
                norm = torch.stack(torch._foreach_norm(gradients)).norm()
                torch._foreach_mul_(gradients, norm)
                del gradients
                optimizer.step()
                optimizer.zero_grad()
            ended.append(len(ledger.events))
    before, most, allocator = None, [], plan.Allocator()
    for k, (memory, taken, _) in enumerate(ledger.events):
        if k in cache_emptied:
            allocator.empty_cache()
            if before is None:
                before = allocator.most = allocator.reserved
        (allocator.take if taken else allocator.give_back)(memory)
        if k + 1 in ended:
            most.append(allocator.most / plan.GIB)
    return before / plan.GIB, *(most if row["optimizer"] == "adamw8bit" else reversed(most))


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
        seen = torch.cat([noisy, torch.zeros_like(noisy)], dim=2) if base.image_to_video else noisy
        ofs = torch.full((1,), 2.0)
        velocity = transformer(seen, prompts, timesteps, ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0]
    predicted = a * noisy - b * velocity.float()  # accelerate gives outputs back in fp32
    weights = 1 / (1 - alpha_bar[timesteps])
    return (weights.view(-1, 1, 1, 1, 1) * (predicted - clean) ** 2).reshape(batch, -1).mean(dim=1).mean()


COLUMNS = ("model method rank batch grad_checkpointing optimizer offload weights_dtype frames height width before_gib train_gib "
           "kind").split()  # fmt: skip
KNOWN = {
    "model": [*ALL],
    "method": ["lora", "full"],
    "grad_checkpointing": ["yes", "no"],
    "optimizer": ["adamw", "adamw8bit"],
    "offload": ["none", "cpu states and grads"],
    "weights_dtype": ["bf16", "fp16", "fp32"],
    "kind": ["peak", "bound", "card"],
}


def read_rows(file):
    """Rows of a CSV, as dicts. Raises UserError."""
    try:
        with open(file, newline="", encoding="utf-8") as opened:
            reader = csv.DictReader(opened, restval="")
            rows = [{name: (text or "").strip() for name, text in row.items() if name} for row in reader]
            for row in rows:  # as people write them
                row |= {name: row[name].lower() or "none" * (name == "offload") for name in KNOWN if name in row}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise cl.UserError(f"--rows {file}: cannot be read ({error})")
    absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if absent:
        raise cl.UserError(f"--rows {file}: columns {', '.join(absent)} are missing; see tests/published_memory.csv")
    return rows


def is_number(text, least, kind=int):
    try:
        return least <= kind(text) < float("inf")
    except ValueError:
        return False


def left_out(row):
    """Why a row is not predicted, or None."""
    if row["kind"] == "parallel":
        return "states shared among processes or with the host"
    for name, known in KNOWN.items():
        if row[name] not in known:
            return f"{name} '{row[name]}' is not known here"
    if row["before_gib"] and not is_number(row["before_gib"], 1e-6, float):
        return f"before_gib '{row['before_gib']}' is no number of GiB"
    if row["offload"] != "none" and row["optimizer"] != "adamw":
        return f"{row['optimizer']} with {row['offload']} is not known here"
    whole = ["batch", "frames", "height", "width"] + (["rank"] if row["method"] == "lora" else [])
    for name in whole:
        if not is_number(row[name], 1):
            return f"{name} '{row[name]}' is no number above 0"
    if not is_number(row["train_gib"], 1e-6, float):
        return f"train_gib '{row['train_gib']}' is no number of GiB"
    cell, frames = 16, int(row["frames"])
    if int(row["height"]) % cell or int(row["width"]) % cell or frames % 8 != 1:
        return f"{row['frames']}x{row['height']}x{row['width']}: sides must be multiples of {cell}, frames 8k + 1"
    return None


FLOOR = re.compile(r"out of memory|\boom\b|more than|at least|not enough|does not fit|floor of", re.IGNORECASE)


def bound(note, predicted, published):
    """Whether a bound holds, which is a floor where its note says that so much was not enough, else a ceiling."""
    floor = bool(FLOOR.search(note))
    holds = predicted >= 0.995 * published if floor else predicted <= 1.005 * published
    return f"{'floor' if floor else 'bound'} {'respected' if holds else 'broken'}"


def compare(file):
    """Rows of predicted beside published, as a table has them, and of those of kind `peak` (errors, errors with the other number of
    steps, number left out)."""
    from tqdm import tqdm

    table, errors, others, absent = [], [], [], 0
    for row in tqdm(read_rows(file), unit="row", smoothing=0):
        there = {
            "source": row.get("source", ""),
            **{name: row[name] for name in ("model", "method", "rank", "batch")},
            "size": "x".join(row[k] for k in ("frames", "height", "width")),
            "checkpointing": row["grad_checkpointing"],
            "optimizer": row["optimizer"] + ("" if row["offload"] == "none" else f", {row['offload']}"),
            "kind": row["kind"],
            "before_published_gib": row["before_gib"],
            "before_predicted_gib": "",
            "peak_published_gib": row["train_gib"],
            "peak_predicted_gib": "",
            "judged": "",
            "peak_predicted_with_other_steps_gib": "",
        }
        table.append(there)
        reason = left_out(row)
        if reason:
            absent += row["kind"] == "peak"
            there["judged"] = f"left out: {reason}"
            continue
        before, peak, other = foreign_run(row)
        published = float(row["train_gib"])
        error = peak / published - 1
        if row["kind"] == "peak":
            errors.append(abs(error))
            others.append(abs(other / published - 1))
            there["judged"] = f"{100 * error:+.1f} %"
        elif row["kind"] == "bound":
            there["judged"] = bound(row.get("note") or "", peak, published)
        else:
            there["judged"] = "a card's size"
        predicted = ("before_predicted_gib", before), ("peak_predicted_gib", peak)
        predicted += (("peak_predicted_with_other_steps_gib", other),)
        there.update((name, f"{gib:.3f}") for name, gib in predicted)
    return table, errors, others, absent


def at_batch(two, three, batch):
    """Ledger of a step on a batch, from those on two and on three clips: the same pieces come and go in the same order, and each
    grows by the same bytes with each clip. (On one clip a copy or two fewer are made.)"""
    if [(m.kind, *event) for m, *event in two.events] != [(m.kind, *event) for m, *event in three.events]:
        raise AssertionError("a step on two clips and one on three differ in more than sizes")
    ledger, pieces = plan.Ledger(two.card), {}
    ledger.begun = two.begun
    for key, flops in two.flops.items():
        ledger.flops[key] = flops + (batch - 2) * (three.flops[key] - flops)
    for (small, taken, block), (large, *_) in zip(two.events, three.events):
        if taken:
            size = small.bytes + (batch - 2) * (large.bytes - small.bytes)
            pieces[small] = plan.Memory(size, small.kind, small.block)
        ledger.events.append((pieces[small], taken, block))
    return ledger


def largest(need, vram):
    """Largest batch of which the need fits, 0 if none does."""
    batch, step = 0, 64
    while step:
        if need(batch + step) <= vram:
            batch += step
        else:
            step //= 2
    return batch


class Capacity:
    """What a model and method need at a size, by batch, the largest of the three phases, in GiB."""

    def __init__(self, model, size, options):
        self.size = size
        self.asked = cl.Config(model=NAMES[model], **dict(zip(("frames", "height", "width"), size)), **options)
        self.one = plan.plan(self.asked)
        self.two, self.three = (self.rehearsed(batch) for batch in (2, 3))
        self.training = functools.cache(self.training)

    def rehearsed(self, batch):
        config, base = plan.resolve_plan(self.asked, batch_size=batch)
        blocks = base.transformer["num_layers"]
        return plan.rehearse(config, base, min(blocks, plan.FEW_BLOCKS), sampling=False).of_blocks(blocks)

    def training(self, batch):
        if batch == 1:
            return self.one.needs_gib["training"]
        return sum(at_batch(self.two, self.three, batch).split("training").values())

    def __call__(self, batch):
        return max(self.training(batch), self.one.needs_gib["caching"], self.one.needs_gib["sampling"])


def cell_of(need, vram):
    """What fits, as a cell of the table, or None. A mark where the plan would call it tight."""
    batch = largest(need, vram)
    tight = "~" if batch and need(batch) > (1 - plan.TIGHT) * vram else ""
    return f"{'x'.join(map(str, need.size))}{f', batch {batch}' if batch > 1 else ''}{tight}" if batch else None


def row_of_capacity(model, options, native):
    """A cell for each card: the native size, or else the largest of the ladder that fits."""
    ladder = LADDER.get(model, LADDER["2b"])
    smaller = functools.cache(lambda size: native if size == native.size else Capacity(model, size, options))
    cells = []
    for vram in CAPACITY.values():
        cell = next((cell for size in ladder if (cell := cell_of(smaller(size), vram))), None)
        cells.append(cell or f"none: {smaller(ladder[-1])(1):.1f} for {'x'.join(map(str, ladder[-1]))}")
    return cells


def capacity(models):
    """Three tables, as rows: what fits on cards of several sizes, what batches 6 and 8 need, and what gradient checkpointing saves and
    costs."""
    from tqdm import tqdm

    fits, claimed, checkpointing = [], [], []
    with tqdm(total=len(METHODS) * len(models), unit="row", smoothing=0) as progress:
        for model in models:
            for method, options in METHODS.items():
                progress.set_description(f"{model} {method}")
                size = LADDER.get(model, LADDER["2b"])[0]
                need, about = Capacity(model, size, options), dict(model=model, method=method)
                without = Capacity(model, size, {**options, "gradient_checkpointing": False})
                cells = row_of_capacity(model, options, need)
                fits.append(about | {f"{gb}_gb": cell for gb, cell in zip(CAPACITY, cells)})
                most, flops = largest(need, CAPACITY[80]), (need.one.flops, without.one.flops)
                if model != "1.5" and method != "qlora":
                    claimed.append(about | {
                        "batch_6_gib": f"{need.training(6):.1f}", "batch_8_gib": f"{need.training(8):.1f}",
                        "batch_8_rehearsed_gib": f"{sum(need.rehearsed(8).split('training').values()):.1f}",
                        "largest_batch": most,
                        "claim": "holds" if most >= 8 else f"holds up to {most}" if most >= 6 else "does not hold",
                    })  # fmt: skip
                checkpointing.append(about | {
                    "gib_with": f"{need.training(1):.1f}", "gib_without": f"{without.training(1):.1f}",
                    "flop_with": f"{flops[0]:.3g}", "flop_without": f"{flops[1]:.3g}",
                    "more_work": f"{100 * (flops[0] / flops[1] - 1):+.0f} %",
                    "largest_batch_with": most, "largest_batch_without": largest(without, CAPACITY[80]),
                })  # fmt: skip
                progress.update()
    return {"capacity": fits, "batch_on_80gb": claimed, "gradient_checkpointing": checkpointing}


@functools.cache
def plan_of(**options):
    return plan.plan(cl.Config(**options, compute_dtype="bfloat16"))  # as a run on any of these cards chooses


def options_said(config):
    """What of a configuration a command line must say."""
    fields = dataclasses.fields(config)
    return {f.name: getattr(config, f.name) for f in fields if f.name == "method" or getattr(config, f.name) != f.default}


def command_of(config):
    return f"python cogvideo_lite.py {plan.as_options(options_said(config))}"


def rows_of_cards(model):
    """A model's rows of tests/cards.csv. A plan does not depend on the card, so each is made once. Of image-to-video,
    which needs about what its text-to-video model does, those of one card."""
    cl.quiet_libraries()
    of = [plan.USUAL_CARD] if model in IMAGE_TO_VIDEO else CARDS
    return [row_of_card(card, model, method) for card in of for method in ("lora", "qlora", "full")]


def row_of_card(card, model, method):
    """What a method needs at the model's native size, and where that does not leave TIGHT to spare, what does."""
    asked, vram = cl.Config(method=method, model=ALL[model], data="my_clips"), plan.CARDS[card][2]

    def planned_with(**changes):
        return plan_of(**options_said(plan.changed(asked, **changes)))

    planned = planned_with()
    roomy, need = (1 - plan.TIGHT) * vram, planned.peak_gib
    row = dict(card=card, torch_finds_gib=vram, model=model, method=method)
    row["verdict"] = "fits" if need <= roomy else "tight" if need <= vram else "does not fit"
    row |= predicted_on(card, planned) | {"command": command_of(asked)}
    row |= dict(instead_peak_gib="", instead_step_s="", instead_hours="", instead="")
    changes, found = plan.fitting(planned_with, roomy)
    if row["verdict"] != "fits" and changes is not None:
        row |= {f"instead_{name}": value for name, value in predicted_on(card, found).items()}
        row["instead"] = command_of(plan.changed(asked, **changes))
    return row


def predicted_on(card, planned):
    seconds, _ = plan.time_of_step(planned, card)
    hours = seconds * planned.config.steps / 3600
    return dict(peak_gib=f"{planned.peak_gib:.1f}", step_s=plan.digits(seconds, 3), hours=plan.digits(hours, 2))


def cards():
    """Rows for each card, model and method."""
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        rows = [row for of_model in pool.map(rows_of_cards, ("2b", "5b", *IMAGE_TO_VIDEO)) for row in of_model]
    return sorted(rows, key=lambda row: CARDS.index(row["card"]))  # stable: model and method in order within a card


TOGETHER = {
    "float32, AdamW": dict(trained_dtype="float32", optimizer="adamw"),
    "bfloat16, 8-bit AdamW": dict(optimizer="adamw8bit"),
    "bfloat16, factored": dict(optimizer="adafactor"),
}


def together():
    """Peak of each of some cards that share --full of 5B, a clip each, and whether it leaves TIGHT of 24 GB to spare."""
    rows, vram = [], plan.CARDS["RTX 4090"][2]
    for kept, fields in TOGETHER.items():
        for cards in range(1, 9):
            config = cl.Config(method="full", model=NAMES["5b"], compute_dtype="bfloat16", shard=True, **fields)
            peak = plan.plan(config, processes=cards).peak_gib
            verdict = "fits" if peak <= (1 - plan.TIGHT) * vram else "tight" if peak <= vram else "does not fit"
            rows.append({"kept": kept, "cards": cards, "peak_gib": f"{peak:.1f}", "verdict": verdict})
            print(*rows[-1].values(), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=ROOT / "tests/published_memory.csv", help="CSV of the columns of that file")
    parser.add_argument(
        "--capacity",
        nargs="*",
        choices=list(NAMES),
        metavar="MODEL",
        help=f"tables of what fits: {', '.join(NAMES)} [all]",
    )
    parser.add_argument("--cards", action="store_true", help="tables of what to do on which card")
    parser.add_argument("--together", action="store_true", help="full fine-tuning of 5B on several cards of 24 GB")
    parser.add_argument("--write", action="store_true", help="write the tables' csv files too")
    args = parser.parse_args()
    cl.quiet_libraries()
    if args.together:
        found = {"cards_together": together()}
    elif args.cards or args.capacity is not None:
        found = {"cards": cards()} if args.cards else capacity(args.capacity or list(NAMES))
    else:
        try:
            rows, errors, others, absent = compare(args.rows)
        except cl.UserError as error:
            sys.exit(f"bench_plan: {error}")
        found = {"plan_against_published": rows}
    for name, rows in found.items():
        if rows:
            print(f"{tables.markdown(rows)}\n")
        if rows and args.write:
            tables.write(name, rows)
    if "plan_against_published" not in found:
        return
    print(json.dumps({
        "median_error": statistics.median(errors) if errors else None,
        "worst_error": max(errors, default=None),
        "rows": len(errors),
        "median_error_of_the_other_step": statistics.median(others) if others else None,
        "worst_error_of_the_other_step": max(others, default=None),
        "peaks_left_out": absent,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
