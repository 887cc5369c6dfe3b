"""Full fine-tuning: what bf16 keeps of small steps, the optimizer inside backward, averages, and what is written."""

import dataclasses
import gc
import json
import math
import time
import weakref

import pytest
import torch
from accelerate import Accelerator
from conftest import FAMILIES, NANO
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

import cogvideo_lite as cl

OPTIMIZERS = ["adamw", "adamw8bit", "adafactor", "lion8bit"]


def weights(run):
    return load_file(str(run.folder / "transformer/diffusion_pytorch_model.safetensors"))


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("x", [1.003, -0.0123456, 3e-5, 117.3])
def test_stochastic_rounding_goes_to_either_neighbour_with_the_probability_that_keeps_the_mean(x):
    """Closed form: up with probability (x - lower) / (upper - lower), so the count of ups is binomial."""
    n, value = 100_000, torch.tensor(x, dtype=torch.float32)
    rounded = cl.round_stochastically(value.expand(n), torch.Generator().manual_seed(0))
    assert rounded.dtype == torch.bfloat16
    nearest = value.bfloat16()
    away = torch.nextafter(nearest, torch.tensor(math.inf if value > nearest else -math.inf, dtype=torch.bfloat16))
    low, high = sorted([float(nearest), float(away)])
    assert set(rounded.unique().tolist()) == {low, high}
    p = (float(value) - low) / (high - low)
    ups = int((rounded.float() == high).sum())
    assert abs(ups - n * p) < 4 * math.sqrt(n * p * (1 - p))


def test_stochastic_rounding_leaves_what_bf16_can_hold_and_what_is_not_finite():
    x = torch.randn(1000).bfloat16().float()
    assert torch.equal(cl.round_stochastically(x, torch.Generator().manual_seed(0)).float(), x)
    odd = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    torch.testing.assert_close(
        cl.round_stochastically(odd, torch.Generator().manual_seed(0)).float(), odd, equal_nan=True
    )


def steps_of_one_weight_matrix(trained_dtype, lr, steps=200):
    """A matrix of weights of the size at hand, pushed the same way by every gradient. Returns (mean movement, changed share)."""
    config = cl.Config(
        method="full", lr=lr, optimizer="adamw", weight_decay=0.0, trained_dtype=trained_dtype, fused_backward=False
    )
    w = torch.full((64, 64), 0.05)
    p = torch.nn.Parameter(w if trained_dtype == "float32" else w.bfloat16())
    start, updates, changed = float(p[0, 0].detach()), cl.Updates(config, [p]), []
    for step in range(steps):
        updates.step_number = step
        p.grad = torch.full_like(p, -1.0)
        updates.step()
        changed.append(updates.measured()["changed_share"])
    return float(p.detach().float().mean()) - start, sum(changed) / steps


def test_a_low_rate_moves_bf16_weights_only_if_rounding_is_stochastic():
    """At 0.05 two bf16 numbers are 2^-12 apart, and 1e-5 is rounded away. With the steps of Adam under one gradient, 200 of them
    should go 200 x 1e-5 = 2e-3 far, and a stochastic one changes 1e-5 / 2^-12 = 4.1 % of the weights."""
    exact, all_changed = steps_of_one_weight_matrix("float32", 1e-5)
    assert exact == pytest.approx(2e-3, rel=1e-3)
    assert all_changed == 1.0
    nearest, none_changed = steps_of_one_weight_matrix("bfloat16-nearest", 1e-5)
    assert nearest == 0 and none_changed == 0
    stochastic, some_changed = steps_of_one_weight_matrix("bfloat16", 1e-5)
    assert stochastic == pytest.approx(2e-3, rel=0.02)
    assert some_changed == pytest.approx(1e-5 * 2**12, rel=0.02)


def test_the_metrics_show_the_vanishing_update(quick):
    share = {}
    for dtype in ("float32", "bfloat16", "bfloat16-nearest"):
        config = quick(method="full", lr=1e-6, trained_dtype=dtype)
        share[dtype] = cl.train(dataclasses.replace(config, out=f"{config.out}-{dtype}")).metrics[-1]["changed_share"]
    assert share["float32"] > 0.5 > share["bfloat16"] > share["bfloat16-nearest"]


# ------------------------------------------------------------------------------------------- the optimizer in backward


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("trained_dtype", ["float32", "bfloat16"])
def test_the_optimizer_inside_backward_does_what_the_ordinary_one_does(quick, optimizer, trained_dtype, monkeypatch):
    """Where neither clips, the two see the same gradients, states and draws."""
    monkeypatch.setattr(cl, "MAX_UPDATE_RMS", 1e9)
    shared = dict(method="full", optimizer=optimizer, trained_dtype=trained_dtype, max_grad_norm=1e9, lr=1e-3)
    runs = []
    for fused in (True, False):
        config = quick(fused_backward=fused, **shared)
        runs.append(cl.train(dataclasses.replace(config, out=f"{config.out}-{fused}")))
    assert same_weights(*runs)
    for a, b in zip(runs[0].metrics, runs[1].metrics):
        assert a["loss"] == b["loss"] and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["update_ratio"] == b["update_ratio"] and a["changed_share"] == b["changed_share"]


def test_the_weights_of_a_run_are_freed_with_it(quick):
    """On a card the next run in the same notebook needs their memory."""
    config, base, _ = cl.resolve(quick(model=str(NANO), method="full", frames=9, height=32, width=32, fused_backward=True,
                                       compute_dtype="float32"))  # fmt: skip
    trainer = cl.Trainer(config, base, cl.cache_clips(config), Accelerator(cpu=True))
    trainer.step(0)
    weights = [weakref.ref(p) for p in trainer.parameters]
    del trainer
    gc.collect()
    assert not any(weight() is not None for weight in weights)


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_does_what_a_plain_loop_of_torch_does(quick, fused, monkeypatch):
    """The textbook loop over the same batches: one AdamW over all weights, no hooks, nothing of this project's optimizer."""
    monkeypatch.setattr(cl, "MAX_UPDATE_RMS", 1e9)
    config = quick(model=str(NANO), method="full", frames=9, height=32, width=32, lr=1e-3, fused_backward=fused,
                   max_grad_norm=1e9)  # fmt: skip
    trainers = []

    class Remember(cl.Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            trainers.append(self)

    original, cl.Trainer = cl.Trainer, Remember
    try:
        run = cl.train(config)
    finally:
        cl.Trainer = original
    t = trainers[0]
    model = cl.find_base(config.model).load("transformer", torch.float32).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    for step in range(config.steps):
        batch = cl.collate([t.samples.training(n) for n in (2 * step, 2 * step + 1)], "cpu")
        cl.velocity_loss(model, batch, t.alpha_bar, t.rotary, torch.float32).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned = weights(run)
    for name, p in model.named_parameters():
        torch.testing.assert_close(tuned[name], p.detach(), atol=1e-5, rtol=1e-4)


def test_gradients_never_live_together(quick, monkeypatch):
    alive = []
    original = cl.Updates.update

    def count(self, i):
        alive.append(sum(p.grad is not None for p in self.parameters))
        original(self, i)

    monkeypatch.setattr(cl.Updates, "update", count)
    cl.train(quick(method="full", fused_backward=True, steps=2))
    assert max(alive) == 1


def test_each_tensors_update_is_clipped_to_the_rate_in_root_mean_square(monkeypatch):
    """Against the closed form: the first Adam step is the sign of the gradient times the rate, so a limit of a half halves it."""
    for limit, moved in ((0.5, 0.5), (2.0, 1.0)):
        monkeypatch.setattr(cl, "MAX_UPDATE_RMS", limit)
        config = cl.Config(method="full", lr=1e-2, optimizer="adamw", weight_decay=0.0, trained_dtype="float32",
                           fused_backward=True)  # fmt: skip
        p = torch.nn.Parameter(torch.zeros(8, 8))
        updates = cl.Updates(config, [p])
        (p * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
        updates.step()
        assert p.detach().abs().mean() == pytest.approx(1e-2 * moved, rel=1e-4)
        assert p.grad is None


@pytest.mark.parametrize("fields, words", [
    (dict(fused_backward=True, batch_size=2, micro_batch_size=1), "gradients cannot be summed up"),
    (dict(fused_backward=True, compute_dtype="float16"), "fp16 gradients must be unscaled"),
    (dict(trained_dtype="bfloat16", method="lora"), "only for --full"),
    (dict(ema=1.5), "between 0 and 1"),
    (dict(optimizer="AdamW"), "--optimizer AdamW: must be one of adamw"),
    (dict(trained_dtype="fp32"), "--trained-dtype fp32: must be one of float32"),
    (dict(offload_activations=True, gradient_checkpointing=False), "use it with gradient checkpointing"),
])  # fmt: skip
def test_what_cannot_go_together_is_refused_with_its_reason(quick, fields, words):
    with pytest.raises(cl.UserError, match=words):
        cl.train(quick(**{"method": "full", **fields}))


def test_a_large_model_steps_inside_backward_in_any_number_of_processes_or_says_why_not(quick, monkeypatch):
    monkeypatch.setattr(cl.Base, "large", True)
    for processes, fields, fused, words in (
        (1, {}, True, "runs inside backward"),
        (2, dict(batch_size=2), True, "each gradient is averaged, and stepped, as soon as backward has it"),
        (2, dict(batch_size=2, shard=True), True, "2: each holds some rows of every tensor"),
        (1, dict(batch_size=2, micro_batch_size=1), False, "summed up over --micro-batch-size"),
        (2, dict(batch_size=4, micro_batch_size=1), False, "summed up over --micro-batch-size"),
        (2, dict(batch_size=2, micro_batch_size=1), True, "runs inside backward"),
        (2, dict(deepspeed="zero2"), False, "DeepSpeed spreads states"),
    ):
        config, _, why = cl.resolve(quick(method="full", **fields), processes=processes)
        assert config.fused_backward is fused and any(words in reason for _, reason in why), (processes, fields)


def test_a_batch_that_was_not_asked_for_has_a_clip_for_each_process(quick):
    config = quick(batch_size=None)
    assert [cl.resolve(config, processes=n)[0].batch_size for n in (1, 2, 3, 8)] == [4, 4, 6, 8]
    with pytest.raises(cl.UserError, match="--batch-size 2: must be a multiple of the 3 processes"):
        cl.resolve(quick(batch_size=2), processes=3)


# ---------------------------------------------------------------------------------------------------------- whole runs


def test_the_reason_of_a_rate_is_told_where_the_recipe_has_chosen_it():
    chosen, given = (dict(cl.resolve(cl.Config(method="full", lr=lr))[2])["recipe"] for lr in (None, 1e-3))
    assert "lr 0.0001" in chosen and "lr: the lowest held-out loss" in chosen
    assert "lr" not in given and "steps 400" in given


def test_lion_takes_a_fifth_of_the_recipes_rate_unless_told_otherwise(quick):
    for lr, expected in ((None, 2e-5), (3e-4, 3e-4)):
        config = cl.resolve(cl.Config(model=str(NANO), method="full", optimizer="lion8bit", lr=lr))[0]
        assert config.lr == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_lowers_the_heldout_loss_of_the_nano(quick, nano_cache, optimizer):
    lr = 5e-5 if optimizer == "lion8bit" else 2e-4  # each of Lion's steps is a full one
    nano = dict(model=str(NANO), cache=nano_cache, method="full", optimizer=optimizer, lr=lr)
    run = cl.train(quick(**nano, steps=30, checkpoint_every=30, warmup=5, caption_dropout=0.0))
    assert run.summary["heldout_after"] < run.summary["heldout_before"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_full_run_is_bitwise_the_unbroken_one(quick, optimizer):
    config = quick(method="full", optimizer=optimizer, trained_dtype="bfloat16", lr=1e-3, steps=6, ema=0.9)
    whole = cl.train(dataclasses.replace(config, out=config.out + "-whole"))

    def stop(metrics):
        if metrics["step"] == 5:  # past the checkpoint of step 4
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cl.train(config, callbacks=[stop])
    resumed = cl.train(dataclasses.replace(config, resume=True))
    assert same_weights(whole, resumed)
    assert [m["loss"] for m in whole.metrics] == [m["loss"] for m in resumed.metrics]


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_diffusers_with_the_saved_transformer_gives_our_samples_pixel_for_pixel(quick, family):
    run = cl.train(quick(family, method="full", lr=1e-3))
    ours = cl.sample(run.folder, ["a red spider"], seed=7)
    transformer = CogVideoXTransformer3DModel.from_pretrained(run.folder / "transformer")
    stock = CogVideoXPipeline.from_pretrained(run.config.model, transformer=transformer)
    call = dict(prompt="a red spider", num_frames=9, height=32, width=32, num_inference_steps=2, guidance_scale=3.0,
                max_sequence_length=12, output_type="pt")  # fmt: skip
    got = stock(**call, generator=torch.Generator().manual_seed(7)).frames[0]
    torch.testing.assert_close(ours[0], got.float(), atol=1e-5, rtol=0)
    untuned = CogVideoXPipeline.from_pretrained(run.config.model)
    before = untuned(**call, generator=torch.Generator().manual_seed(7)).frames[0]
    assert (got - before).abs().max() > 1e-3


def test_the_average_follows_its_recursion_and_is_what_the_run_gives(quick):
    """Against the recursion written out, with the warm-up of diffusers' EMAModel, over the weights of every step."""
    seen, trainers = [], []

    class Remember(cl.Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            trainers.append(self)

    original, cl.Trainer = cl.Trainer, Remember
    try:
        config = quick(method="full", lr=1e-3, ema=0.9)
        run = cl.train(config, callbacks=[lambda _: seen.append([p.detach().clone() for p in trainers[0].parameters])])
    finally:
        cl.Trainer = original
    base = cl.find_base(config.model).load("transformer", torch.float32)
    expected = [p.detach().double() for p in base.parameters()]
    for step, now in enumerate(seen):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * p.double() for e, p in zip(expected, now)]
    saved = weights(run)
    names = [name for name, _ in base.named_parameters()]
    for name, e, last in zip(names, expected, seen[-1]):
        torch.testing.assert_close(saved[name].double(), e, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(saved[name], last) for name, last in zip(names, seen[-1]))


def test_activations_kept_elsewhere_change_nothing_but_where_they_are(quick, monkeypatch):
    """On a CPU they have nowhere else to go, so what is packed is recorded: the blocks' inputs, and none of their weights."""
    config = quick(method="full", lr=1e-3, gradient_checkpointing=True, steps=2)
    plain = cl.train(config)
    packed, original = [], torch.autograd.graph.save_on_cpu.__init__

    def recording(self, *args, **kwargs):
        original(self, *args, **kwargs)
        pack = self.pack_hook
        self.pack_hook = lambda tensor: packed.append(tensor.shape) or pack(tensor)

    monkeypatch.setattr(torch.autograd.graph.save_on_cpu, "__init__", recording)
    moved = cl.train(dataclasses.replace(config, offload_activations=True, out=config.out + "-moved"))
    assert same_weights(plain, moved)
    video_tokens = torch.Size([2, 12, 32])
    assert packed.count(video_tokens) >= 2 * 2  # two blocks, two steps
    assert torch.Size([128, 32]) not in packed and torch.Size([32, 32]) not in packed  # feed-forward, attention


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_what_a_large_model_does_by_default_trains_samples_and_resumes(quick, monkeypatch, arithmetic):
    """bf16 weights, stochastic rounding, Adafactor inside backward, checkpointing, tiled decoding: all at once. The resumed
    run is not told the arithmetic: it goes on with what it began with, whatever the processor is measured to do."""
    monkeypatch.setattr(cl.Base, "large", True)
    config = quick(method="full", optimizer="adafactor", lr=1e-3, batch_size=1, compute_dtype=arithmetic)
    whole = cl.train(dataclasses.replace(config, out=config.out + "-whole"))
    assert whole.config.trained_dtype == "bfloat16" and whole.config.fused_backward
    assert {t.dtype for t in weights(whole).values()} == {torch.bfloat16}

    def stop(metrics):
        if metrics["step"] == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cl.train(config, callbacks=[stop])
    resumed = cl.train(dataclasses.replace(config, resume=True, compute_dtype=None))
    assert resumed.config.compute_dtype == arithmetic
    assert same_weights(whole, resumed)
    assert len(cl.sample(whole.folder, ["a red spider"])) == 1


def test_fp16_arithmetic_scales_its_losses_and_trains(quick):
    """As on a card without bf16 units."""
    run = cl.train(quick("2b", compute_dtype="float16", lr=1e-3))
    assert all(math.isfinite(m["loss"]) for m in run.metrics)
    assert json.loads((run.folder / "checkpoint-4/state.json").read_text())["scaler"]["scale"] > 0


def test_an_interrupt_between_a_step_and_its_metrics_keeps_no_checkpoint_of_half_a_step(quick, monkeypatch):
    """Else the step would be made twice."""
    config = quick(method="full", steps=4, checkpoint_every=2)

    def interrupted(path, value):
        if value["step"] == 3:
            raise KeyboardInterrupt
        original(path, value)

    original = cl.append_json
    monkeypatch.setattr(cl, "append_json", interrupted)
    with pytest.raises(cl.RunError, match="stopped at step"):
        cl.train(config)
    assert [c.name for c in cl.checkpoints(config.out)] == ["checkpoint-2"]


def test_no_pipeline_folder_is_written_over(quick, tiny):
    for method in ("lora", "full"):
        with pytest.raises(cl.UserError, match="would be written over"):
            cl.train(quick(method=method, out=str(tiny("5b"))))


def test_the_default_for_a_large_model_is_bf16_with_stochastic_rounding_inside_backward_and_says_why(
    quick, monkeypatch
):
    monkeypatch.setattr(cl.Base, "large", True)
    config, _, why = cl.resolve(quick(method="full"))
    assert config.trained_dtype == "bfloat16" and config.fused_backward and config.gradient_checkpointing
    assert any("stochastic" in reason for _, reason in why) and any("inside backward" in reason for _, reason in why)


def test_a_full_run_writes_a_transformer_and_a_card_that_says_how_to_load_it(quick):
    run = cl.train(quick(method="full"))
    card = (run.folder / "README.md").read_text()
    assert 'CogVideoXTransformer3DModel.from_pretrained("transformer", dtype=torch.float32)' in card and "load_lora_weights" not in card
    assert json.loads((run.folder / "config.json").read_text())["trained_dtype"] == "float32"
    assert not (run.folder / "pytorch_lora_weights.safetensors").exists()


# ------------------------------------------------------------------------------------------------- stored and computed


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_compute_in_the_dtype_of_their_input_and_get_gradients_in_their_own(tiny, family, stored, computed):
    """Against the same model converted whole."""
    base = cl.find_base(str(tiny(family)))
    rotary = cl.rotary_embedding(base, base.load("transformer", torch.float32), 9, 32, 32, "cpu")
    g = torch.Generator().manual_seed(0)
    t = sum(base.latent_frames(9))
    noisy, text = torch.randn(2, t, 4, 4, 4, generator=g), torch.randn(2, 12, 16, generator=g)

    def gradients(dtype, patch):
        model = base.load("transformer", stored).requires_grad_(True)
        if dtype != stored:
            model.to(dtype)  # 2B's table of positions too, which loading leaves in float64
        if patch:
            cl.compute_in_dtype_of_input(model, computed)
        out = model(noisy.to(computed), text.to(computed), torch.tensor([10, 500]), image_rotary_emb=rotary).sample
        assert out.dtype == computed
        out.float().square().mean().backward()
        assert all(p.grad.dtype == dtype for p in model.parameters())
        return out.detach(), torch.cat([p.grad.float().flatten() for p in model.parameters()])

    (got, grads), (truth, true_grads) = gradients(stored, True), gradients(computed, False)
    torch.testing.assert_close(got, truth, atol=1e-5, rtol=1e-5)
    assert (grads - true_grads).norm() < 0.02 * true_grads.norm()


@pytest.mark.parametrize("method, stored, computed", [
    ("lora", torch.float32, torch.bfloat16), ("qlora", torch.bfloat16, torch.bfloat16), ("full", torch.bfloat16, torch.float32),
])  # fmt: skip
def test_torch_compiles_one_block_for_all_where_weights_are_converted(method, stored, computed):
    """A step on a card: adapters in float32, or all weights in bf16. torch.compile gives up after eight graphs of one function."""
    base = cl.find_base(str(NANO))
    model = cl.load_transformer(cl.Config(method=method), base, stored, "cpu")
    if method == "full":
        model.requires_grad_(True)
    else:
        cl.add_lora(model, 4, 4.0, 0)
    cl.compute_in_dtype_of_input(model, computed)
    rotary = cl.rotary_embedding(base, model, 9, 32, 32, "cpu")
    graphs = CompileCounter()
    torch._dynamo.reset()
    for block in model.transformer_blocks:
        block.compile(backend=graphs)
    model.enable_gradient_checkpointing()
    noisy, text = torch.randn(1, 3, 16, 4, 4, dtype=computed), torch.randn(1, base.text_length, 64, dtype=computed)
    model(noisy, text, torch.tensor([10]), image_rotary_emb=rotary).sample.float().square().mean().backward()
    assert 1 <= graphs.frame_count <= 3 < len(model.transformer_blocks)  # the first block's input may need no gradient


def test_converted_weights_are_not_kept_for_backward(tiny):
    """Of weights in bf16 and arithmetic in float32: autograd keeps the weights as they are stored."""
    base = cl.find_base(str(tiny("5b")))
    model = base.load("transformer", torch.bfloat16).requires_grad_(True)
    cl.compute_in_dtype_of_input(model, torch.float32)
    rotary = cl.rotary_embedding(base, model, 9, 32, 32, "cpu")
    linear = {m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)}
    kept = []
    noisy, text = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 12, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, t.shape)) or t, lambda t: t):
        model(noisy, text, torch.tensor([10, 500]), image_rotary_emb=rotary).sample.square().mean().backward()
    assert {dtype for dtype, shape in kept if shape in linear} == {torch.bfloat16}


@pytest.mark.parametrize("slow, quick_one", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_probe_chooses_the_arithmetic_that_is_faster_and_says_so(monkeypatch, slow, quick_one):
    multiply = torch.Tensor.__matmul__

    def delayed(a, b):
        if a.dtype == slow:
            time.sleep(0.05)
        return multiply(a[:1], b)

    monkeypatch.setattr(cl.Base, "large", True)
    monkeypatch.setattr(torch.Tensor, "__matmul__", delayed)
    dtype, why = cl.choose_compute_dtype(torch.device("cpu"), cl.find_base(str(NANO)))
    assert dtype == quick_one and "on this processor" in why


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_t5_in_16_bits_computes_in_float32_and_keeps_its_weights_as_they_are(stored):
    """Against the same weights converted whole."""
    from transformers import AutoTokenizer, T5EncoderModel

    def coded(model):
        return model(AutoTokenizer.from_pretrained(NANO / "tokenizer")("a red spider", return_tensors="pt").input_ids)[
            0
        ]

    kept = T5EncoderModel.from_pretrained(NANO / "text_encoder", dtype=stored)
    whole = T5EncoderModel.from_pretrained(NANO / "text_encoder", dtype=stored).float()
    before = [p.clone() for p in kept.parameters()]
    cl.convert_while_running(kept, torch.float32)
    with torch.no_grad():
        got, truth = coded(kept), coded(whole)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, truth, atol=1e-6, rtol=1e-5)
    for (name, p), old in zip(kept.named_parameters(), before):
        assert torch.equal(p.float(), old.float())
        assert p.itemsize <= old.itemsize or "final_layer_norm" in name


def test_a_large_models_t5_stays_in_16_bits_where_the_arithmetic_is_float32(monkeypatch):
    found = []
    original = cl.convert_while_running
    monkeypatch.setattr(cl.Base, "large", True)
    monkeypatch.setattr(
        cl, "convert_while_running", lambda t5, dtype: found.append((t5.dtype, dtype)) or original(t5, dtype)
    )
    embeds = cl.encode_prompts(cl.find_base(str(NANO)), ["a red spider"], torch.device("cpu"), torch.float32)
    assert found == [(torch.float16, torch.float32)] and embeds[0].dtype == torch.float32


def test_a_large_model_keeps_its_16_bits_where_the_arithmetic_is_float32(tiny, monkeypatch):
    base = cl.find_base(str(NANO))
    assert cl.frozen_dtype(base, torch.float32) == torch.float32
    monkeypatch.setattr(cl.Base, "large", True)
    assert cl.frozen_dtype(base, torch.float32) == torch.float16
    assert cl.frozen_dtype(base, torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
def test_every_method_trains_in_either_arithmetic_on_any_machine_and_says_which(quick, method, computed, capsys):
    run = cl.train(quick(method=method, compute_dtype=computed, lr=1e-3, steps=3, checkpoint_every=3))
    assert run.config.compute_dtype == computed
    assert all(math.isfinite(m["loss"]) for m in run.metrics)
    told = capsys.readouterr().out
    assert f"{computed}: asked for" in told and ("in which no step is too small" in told) == (method == "full")


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_in_float32_make_no_float32_copies_of_bf16_activations(tiny, method):
    """What autograd keeps for backward, in a model whose adapters are float32 and whose arithmetic is bf16."""
    base = cl.find_base(str(tiny("5b")))
    model = cl.load_transformer(cl.Config(method=method), base, torch.bfloat16, "cpu")
    cl.add_lora(model, 4, 4.0, 0)
    cl.compute_in_dtype_of_input(model, torch.bfloat16)
    rotary = cl.rotary_embedding(base, model, 9, 32, 32, "cpu")
    kept = []

    def pack(tensor):
        kept.append((tensor.dtype, tensor.numel()))
        return tensor

    tokens, width = 12 + 3 * 4, 32
    noisy, text = torch.randn(2, 3, 4, 4, 4).bfloat16(), torch.randn(2, 12, 16).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(noisy, text, torch.tensor([10, 500]), image_rotary_emb=rotary).sample.float().square().mean().backward()
    activations = [dtype for dtype, numel in kept if numel >= 2 * tokens * width]
    assert torch.bfloat16 in activations and torch.float32 not in activations
