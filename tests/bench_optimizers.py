"""Which optimizer for bf16 weights at a low rate? Memory, error and held-out loss of the candidates, on the nano.

    python tests/bench_optimizers.py [--seeds 3] [--steps 150] [--write]     needs torchao too: pip install torchao

Every candidate fully fine-tunes the bundled model on the first 50 bundled clips at the recipe's rate (Lion's: a fifth of it), from
the same weights with the same draws. Columns: bytes of weight and state a parameter (counted in the states), and what that is for
CogVideoX-5b; distance: how far the change of the weights lies from that of AdamW on float32 weights, relative, same seed. For
AdamW's own variants that is an error (two seeds of AdamW itself stand below, as a measure); another algorithm goes another
way. torch's own Adafactor reads a little lower with steps a fifth larger; but it multiplies the rate by the size of each tensor's weights,
so that a rate would mean something else than with the others, and transformers' does not. Held-out loss after. The last line is JSON with every run; --write puts the table into optimizers.csv.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import cogvideo_lite as cl  # noqa: E402
import tables  # noqa: E402


class AbsoluteAdafactor(torch.optim.Adafactor):
    """torch's own multiplies the rate by the weights' size, so the rate is divided by it first."""

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        lr, weights = group["lr"], group["params"][0]
        group["lr"] = lr / max(float(weights.square().mean().sqrt()), 1e-3)
        super().step()
        group["lr"] = lr


def torch_adafactor(config, parameter):
    return AbsoluteAdafactor([parameter], lr=config.lr, weight_decay=config.weight_decay)


def torchao_8bit(config, parameter):
    from torchao.optim import AdamW8bit

    return AdamW8bit(
        [parameter], lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, bf16_stochastic_round=True
    )


# name -> (--optimizer, --trained-dtype, another maker of optimizers, whether it is given the bf16 weights themselves)
CANDIDATES = {
    "AdamW, float32 weights": ("adamw", "float32", None, False),
    "AdamW, stochastic rounding": ("adamw", "bfloat16", None, False),
    "AdamW, rounding to nearest": ("adamw", "bfloat16-nearest", None, False),
    "bitsandbytes AdamW8bit, stochastic rounding": ("adamw8bit", "bfloat16", None, False),
    "torchao AdamW8bit(bf16_stochastic_round=True)": ("adamw", "bfloat16", torchao_8bit, True),
    "transformers Adafactor, stochastic rounding": ("adafactor", "bfloat16", None, False),
    "torch Adafactor, stochastic rounding": ("adafactor", "bfloat16", torch_adafactor, False),
    "bitsandbytes Lion8bit, stochastic rounding": ("lion8bit", "bfloat16", None, False),
}


@contextlib.contextmanager
def made_by(maker, rounds_itself):
    """cogvideo_lite with another optimizer in its place."""
    original, update = cl.new_optimizer, cl.Updates.update
    if maker:
        cl.new_optimizer = maker
    if rounds_itself:

        def whole(self, i):  # no float32 copy in between: the library reads and rounds the bf16 weights
            with torch.no_grad():
                p, optimizer = self.parameters[i], self.optimizers[i]
                if optimizer.param_groups[0]["params"][0] is not p:
                    self.shown[i], self.optimizers[i] = p, maker(self.config, p)
                    optimizer = self.optimizers[i]
                old, gradients = p.detach().clone(), p.grad.float().square().sum()
                optimizer.param_groups[0]["lr"].fill_(self.lr)  # torchao keeps it in a tensor
                optimizer.step()
                p.grad = None
                change = (p.float() - old.float()).square().sum()
                self.sums += torch.stack([change, old.float().square().sum(), gradients, (p != old).sum()])

        cl.Updates.update = whole
    try:
        yield
    finally:
        cl.new_optimizer, cl.Updates.update = original, update


def state_bytes(updates):
    """Of the tensors in all states, whatever a library wraps them in."""

    def size(value):
        if not torch.is_tensor(value):
            return 0
        inner = [
            getattr(value, name) for name in ("codes", "scale", "qmap") if torch.is_tensor(getattr(value, name, None))
        ]
        return sum(t.numel() * t.element_size() for t in inner) if inner else value.numel() * value.element_size()

    return sum(size(v) for o in updates.optimizers for s in o.state.values() for v in s.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), metavar="NAME", default=list(CANDIDATES),
                        help=f"{'; '.join(CANDIDATES)} [all]; the first is the measure and always runs")  # fmt: skip
    parser.add_argument("--write", action="store_true", help="into optimizers.csv, too")
    parser.add_argument("--out", default=tempfile.mkdtemp())
    args = parser.parse_args()
    chosen = {name: how for k, (name, how) in enumerate(CANDIDATES.items()) if not k or name in args.candidates}
    seen = {}

    class Trainer(cl.Trainer):
        def __init__(self, *rest):
            super().__init__(*rest)
            seen["updates"] = self.updates

        def draw_samples(self, *rest):  # nobody looks at them here
            pass

        def save_checkpoint(self, *rest):  # torchao's states are no plain tensors
            pass

    cl.Trainer = Trainer
    start = load_file(str(cl.HERE / "data_samples/cogvideox-nano/transformer/diffusion_pytorch_model.safetensors"))
    runs, changes = [], {}
    for seed in range(args.seeds):
        for name, (optimizer, dtype, maker, rounds_itself) in chosen.items():
            config = cl.Config(method="full", optimizer=optimizer, trained_dtype=dtype, steps=args.steps, seed=seed,
                               checkpoint_every=10**6, out=f"{args.out}/{len(runs)}")  # fmt: skip
            with made_by(maker, rounds_itself):
                run = cl.train(config)
            end = load_file(str(run.folder / "transformer/diffusion_pytorch_model.safetensors"))
            changes[name, seed] = torch.cat([(end[k].float() - start[k].float()).flatten() for k in start])
            reference = changes["AdamW, float32 weights", seed]
            weights = sum(p.numel() for p in seen["updates"].parameters)
            runs.append({
                "candidate": name, "seed": seed,
                "bytes_per_weight": state_bytes(seen["updates"]) / weights + (4 if dtype == "float32" else 2),
                "distance": float((changes[name, seed] - reference).norm() / reference.norm()),
                "changed_share": statistics.mean(m["changed_share"] for m in run.metrics),
                "heldout_before": run.summary["heldout_before"], "heldout_after": run.summary["heldout_after"],
                "step_s": statistics.median(m["step_s"] for m in run.metrics),
            })  # fmt: skip
            print(json.dumps(runs[-1]), flush=True)
    rows = []
    for name in chosen:
        of_candidate = [r for r in runs if r["candidate"] == name]
        mean = {k: statistics.mean(r[k] for r in of_candidate) for k in runs[0] if k not in ("candidate", "seed")}
        losses = [r["heldout_after"] for r in of_candidate]
        rows.append({
            "candidate": name, "bytes_per_weight": f"{mean['bytes_per_weight']:.2f}",
            "gib_for_5b": f"{mean['bytes_per_weight'] * 5_570_283_072 / 2**30:.1f}", "distance": f"{mean['distance']:.3f}",
            "changed_share": f"{100 * mean['changed_share']:.1f} %", "heldout_loss": f"{mean['heldout_after']:.4f}",
            "heldout_loss_sd": f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "",
            "seeds": args.seeds, "steps": args.steps,
        })  # fmt: skip
    print(f"\n{tables.markdown(rows)}")
    if args.write:
        tables.write("optimizers", rows)
    if args.seeds > 1:
        a, b = changes["AdamW, float32 weights", 0], changes["AdamW, float32 weights", 1]
        print(f"two seeds of AdamW on float32 weights: distance {float((b - a).norm() / a.norm()):.3f}; "
              f"held-out loss before {runs[0]['heldout_before']:.4f}; n = {args.seeds} seeds, {args.steps} steps")  # fmt: skip
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
