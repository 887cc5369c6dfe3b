"""`--deepspeed`: DeepSpeed's engine in the place of the script's own optimizers, for `--full`.

    pip install deepspeed
    torchrun --nproc_per_node 2 cogvideo_lite.py --full --deepspeed [CONFIG.json]

Its ZeRO spreads gradients and states over processes, or moves them to the host. What comes of a run is what comes of
any other: checkpoints in safetensors that any number of processes resumes, with DeepSpeed or without, and a diffusers
folder. Its stages 1 and 2 can do that; where the weights are to be spread, too, `--shard` does.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parent.parent))  # where the script lies

import cogvideo_lite as cl  # noqa: E402


def read_settings(config):
    """DeepSpeed's settings of a run, ours over the user's. Raises UserError."""
    settings = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}  # as CogVideo runs it
    if config.deepspeed != "zero2":
        try:
            settings = json.loads(Path(os.path.expanduser(config.deepspeed)).read_text("utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise cl.UserError(f"--deepspeed '{config.deepspeed}': cannot be read ({error})")
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    cl.refuse((stage not in (1, 2), f"--deepspeed '{config.deepspeed}': only stages 1 and 2 of zero_optimization"))
    share = config.batch_size // cl.processes()
    settings |= dict(
        train_batch_size=config.batch_size, train_micro_batch_size_per_gpu=config.micro_batch_size or share,
        gradient_accumulation_steps=share // (config.micro_batch_size or share),
        gradient_clipping=config.max_grad_norm, bf16={"enabled": config.compute_dtype == "bfloat16"},
        fp16={"enabled": False}, zero_allow_untested_optimizer=True,
    )  # fmt: skip
    return {name: value for name, value in settings.items() if name not in ("optimizer", "scheduler")}


def import_deepspeed():
    """Raises UserError where it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        import deepspeed
    except ImportError as error:
        words = f"--deepspeed: cannot be imported ({error}); pip install deepspeed==0.19.8, or take --shard"
        raise cl.UserError(words)
    return deepspeed


def refuse_what_it_does_not(config):
    """Before anything is coded or loaded. config: a resolved one. Raises UserError."""
    plain = (config.method, config.optimizer, config.trained_dtype) == ("full", "adamw", "float32")
    plain = plain and not any((config.shard, config.fused_backward, config.ema, config.l2_to_base))
    share, micro = config.batch_size // cl.processes(), config.micro_batch_size
    cl.refuse(
        (not plain, "--deepspeed: only for --full, by AdamW, kept in float32; not with --shard, --fused-backward, --ema or "
         "--l2-to-base"),
        (config.compute_dtype == "float16", "--deepspeed: in float32 or bfloat16; give a --compute-dtype"),
        (micro and share % min(micro, share), f"--micro-batch-size {micro}: must divide each process's {share} clips"),
    )  # fmt: skip
    read_settings(config)
    import_deepspeed()


class Zero:
    """DeepSpeed's engine in the place of `Updates`: AdamW on float32 copies of the weights, which its ZeRO spreads over
    the processes, or moves to the host. It clips, and does not tell the size of its steps."""

    def __init__(self, config, transformer):
        deepspeed, settings = import_deepspeed(), read_settings(config)
        self.lr, self.step_number, self.kept, self.names = config.lr, 0, [], dict(transformer.named_parameters())
        offload = settings["zero_optimization"].get("offload_optimizer") or {}
        try:
            on_host = offload.get("device", "none") != "none"
            adamw = deepspeed.ops.adam.DeepSpeedCPUAdam if on_host else torch.optim.AdamW
            optimizer = adamw(self.names.values(), config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
            self.engine, *_ = deepspeed.initialize(model=transformer, optimizer=optimizer, config=settings)
        except Exception as error:  # a compiler that is not there, a CUDA of another version: a dozen kinds
            reason = (str(error).strip().splitlines() or [""])[0]
            raise cl.UserError(f"--deepspeed: it cannot start ({type(error).__name__}: {reason})")
        self.utils = deepspeed.utils

    def backward(self, loss):
        self.engine.backward(loss, scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts

    def clipped_step(self):
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self.lr
        self.engine.step()

    def step(self):
        """Made already, by `clipped_step`."""

    def measured(self):
        return {"grad_norm": float(self.engine.get_global_grad_norm()), "update_ratio": None, "changed_share": None}

    def whole(self, name, *state):
        """A weight in float32, or a state of it, on the first process."""
        get = self.utils.safe_get_full_optimizer_state if state else self.utils.safe_get_full_fp32_param
        value = get(self.names[name], *state).cpu()
        return value if torch.distributed.get_rank() == 0 else None

    def put(self, name, value, *state):
        put = self.utils.safe_set_full_optimizer_state if state else self.utils.safe_set_full_fp32_param
        put(self.names[name], value.to(self.names[name].device, torch.float32), *state)

    def state(self):
        """As that of `Updates` for AdamW in float32, and read by it."""
        keys, step = ("exp_avg", "exp_avg_sq"), torch.tensor(float(self.engine.global_steps))
        tensors = {f"{i}.{key}": self.whole(name, key) for i, name in enumerate(self.names) for key in keys}
        return tensors | {f"{i}.step": step.clone() for i in range(len(self.names))}, {}

    def load_state(self, tensors, numbers):
        zero, step = self.engine.optimizer, tensors["0.step"]
        self.engine.global_steps = int(step)
        step = int(step) if hasattr(zero.optimizer, "ds_opt_adam") else step
        for p in (p for group in zero.optimizer.param_groups for p in group["params"]):
            zero.optimizer.state[p] = dict(step=step, exp_avg=0 * p.data, exp_avg_sq=0 * p.data)
        zero._lazy_init_hp_params_optimizer_state()  # else they are not there before the first step
        names = list(self.names)
        for name, value in tensors.items():
            i, key = name.split(".")
            if key != "step":
                self.put(names[int(i)], value, key)


class Trainer(cl.Trainer):
    """The script's, with the engine as its model and `Zero` as its updates."""

    def share_out(self):
        self.parameters = list(self.transformer.parameters())
        self.updates = Zero(self.config, self.transformer)
        self.model, self.run_backward = self.updates.engine, self.updates.backward

    def clip_gradients(self):
        """The engine does, and tells their norm when it has made its step."""
        self.updates.clipped_step()
        return self.updates.measured()["grad_norm"]

    def whole_weights(self):
        return {name: self.updates.whole(name) for name in self.updates.names} | self.tables()

    def load_checkpoint(self, folder):
        step = super().load_checkpoint(folder)
        for file in (folder / "transformer").glob("*.safetensors"):
            for name, tensor in load_file(str(file)).items():
                if name in self.updates.names:
                    self.updates.put(name, tensor)  # in float32, whatever the transformer computes in
        return step
