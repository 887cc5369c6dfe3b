"""QLoRA: what NF4 keeps of the weights, that nothing but the adapters ever changes, and where the result can be used."""

import shutil

import numpy as np
import pytest
import torch
from conftest import FAMILIES, NANO, ROOT
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file

import cogvideo_lite as cl
import judge

# The sixteen values of NF4, as the appendix of arXiv 2305.14314 prints them.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def four_bit_layers(transformer):
    import bitsandbytes as bnb

    return {n: m for n, m in transformer.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def dequantized(layer):
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


@pytest.fixture(scope="module")
def nano():
    base = cl.find_base(str(NANO))
    cpu = torch.device("cpu")
    return base.load("transformer", torch.float32), cl.load_quantized(base, "transformer", torch.float32, cpu)


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 5, 16, 8, 8, generator=g),
        "encoder_hidden_states": torch.randn(2, 16, 64, generator=g),
        "timestep": torch.tensor([100, 800]),
        "image_rotary_emb": tuple(torch.randn(80, 64, generator=g) for _ in range(2)),
    }


def weight_bytes(transformer):
    """What must not change: the packed weights, and the absolute maxima with their own quantization."""
    kept = {}
    for name, layer in four_bit_layers(transformer).items():
        state = layer.weight.quant_state
        parts = (layer.weight.data, state.absmax, state.offset, state.state2.absmax)
        kept[name] = [part.detach().clone() for part in parts]
    return kept


def same_bytes(a, b):
    assert a and b  # a model without 4-bit layers has nothing that could change
    return a.keys() == b.keys() and all(torch.equal(x, y) for k in a for x, y in zip(a[k], b[k]))


def test_only_the_matrices_of_attention_and_feed_forward_are_in_four_bits(nano):
    plain, quantized = nano
    names = {f"transformer_blocks.{i}.{part}" for i in range(len(plain.transformer_blocks))
             for part in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")}  # fmt: skip
    assert set(four_bit_layers(quantized)) == names
    rest = {n: p for n, p in plain.named_parameters() if n.removesuffix(".weight") not in names}
    for name, p in rest.items():
        assert torch.equal(quantized.get_parameter(name), p), name


def test_dequantized_weights_are_the_nearest_nf4_values_times_the_blocks_maximum(nano):
    """Against the paper's table in numpy; what is left is the 8-bit rounding of the maxima (double quantization)."""
    plain, quantized = nano
    for name, layer in four_bit_layers(quantized).items():
        weight = plain.get_submodule(name).weight.detach().numpy().reshape(-1, 64)
        maxima = np.abs(weight).max(1, keepdims=True)
        nearest = NF4[np.abs(weight[..., None] / maxima[..., None] - NF4).argmin(-1)] * maxima
        got = dequantized(layer).numpy().reshape(-1, 64)
        # Compared by their distance from the weight, since halfway between two values either is right.
        assert (np.abs(got - weight) <= np.abs(nearest - weight) + 0.01 * maxima.max()).all(), name
        assert np.linalg.norm(got - weight) == pytest.approx(np.linalg.norm(nearest - weight), rel=0.02), name


def test_four_bits_a_weight_and_an_eighth_for_the_maxima(nano):
    layer = next(iter(four_bit_layers(nano[1]).values()))
    state, n = layer.weight.quant_state, layer.in_features * layer.out_features
    stored = sum(t.numel() * t.element_size() for t in (layer.weight.data, state.absmax, state.state2.absmax))
    assert 8 * stored / n == pytest.approx(4.127, abs=0.01)  # 4 + 8/64 + 32/(64 * 256), as in the paper


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_nanos_prediction_is_near_the_plain_ones(nano, inputs, dtype):
    plain, _ = nano
    quantized = cl.load_quantized(cl.find_base(str(NANO)), "transformer", dtype, torch.device("cpu"))
    cl.compute_in_dtype_of_input(quantized, dtype)
    cast = {k: v.to(dtype) if k in ("hidden_states", "encoder_hidden_states") else v for k, v in inputs.items()}
    with torch.no_grad():
        truth = plain(**inputs).sample
        got = quantized(**cast).sample
    assert got.dtype == dtype
    assert (got.float() - truth).norm() < 0.2 * truth.norm()


def test_gradients_reach_every_adapter_through_checkpoints_in_train_and_eval_mode(inputs):
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.bnb import Linear4bit

    quantized = cl.load_quantized(cl.find_base(str(NANO)), "transformer", torch.float32, torch.device("cpu"))
    parameters = cl.add_lora(quantized, 4, 4.0, 0)
    assert {type(m) for m in quantized.modules() if isinstance(m, LoraLayer)} == {Linear4bit}
    for p in parameters:  # B starts as zero, and gives A no gradient then
        torch.nn.init.normal_(p, std=0.02)
    found = {}
    for training in (True, False):
        for checkpointing in (False, True):
            (quantized.enable_gradient_checkpointing if checkpointing else quantized.disable_gradient_checkpointing)()
            quantized.train(training).zero_grad()
            quantized(**inputs).sample.square().mean().backward()
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
            found[training, checkpointing] = [p.grad.clone() for p in parameters]
    for grads in found.values():
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in zip(grads, found[True, False]))


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
@pytest.mark.parametrize("repacks", [True, False], ids=["with AVX512-BF16", "without"])
def test_train_sample_train_save_resume_train_leaves_the_base_as_it_was(quick, monkeypatch, arithmetic, repacks):
    """Where a processor has AVX512-BF16, bitsandbytes repacks the weights at the first sample, and loses bits of the maxima."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: repacks)
    trainers = []
    original = cl.Trainer.__init__

    def remember(self, *args):
        original(self, *args)
        self.at_first = weight_bytes(self.transformer)
        trainers.append(self)

    monkeypatch.setattr(cl.Trainer, "__init__", remember)
    config = dict(method="qlora", lr=1e-3, compute_dtype=arithmetic)
    broken = quick(**config, steps=6)

    def sample_in_between(metrics):
        trainers[-1].draw_samples(run_folder, f"step-{metrics['step']}")
        if metrics["step"] == 5:
            raise KeyboardInterrupt

    run_folder = cl.Path(broken.out)
    with pytest.raises(cl.RunError, match="stopped at step 5"):
        cl.train(broken, callbacks=[sample_in_between])
    run = cl.train(cl.dataclasses.replace(broken, resume=True))
    whole = cl.train(quick(**config, steps=6, out=broken.out + "-whole"))
    assert len(trainers) == 3
    for trainer in trainers:
        assert same_bytes(weight_bytes(trainer.transformer), trainer.at_first)
        assert same_bytes(trainer.at_first, trainers[0].at_first)
    a, b = (load_file(str(r.folder / "pytorch_lora_weights.safetensors")) for r in (run, whole))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert {t.dtype for t in a.values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_trains_and_samples_on_a_quantized_base(quick, family):
    run = cl.train(quick(family, method="qlora"))
    assert len(cl.sample(run.folder, ["a red spider"])) == 1


def test_loading_keeps_no_mapped_file_resident(tmp_path):
    """What is kept of a file (norms, biases) must not hold all of it: by the kernel's account of mapped pages."""
    import subprocess
    import sys

    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, cogvideo_lite as cl
base = cl.find_base({str(NANO)!r})
cl.load_quantized(base, "transformer", torch.float32, "cpu")
print(sum("cogvideox-nano/transformer" in line for line in open("/proc/self/maps")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr


def test_each_matrix_is_quantized_before_the_next_is_read(tiny, tmp_path, monkeypatch):
    """From several shards: of the matrices that become NF4, at most the one just read is alive in 16 bits."""
    import shutil
    import weakref

    import safetensors

    shutil.copytree(tiny("5b"), tmp_path / "sharded")
    base = cl.find_base(str(tmp_path / "sharded"))
    transformer = base.load("transformer", torch.bfloat16)
    shutil.rmtree(base.folder / "transformer")
    transformer.save_pretrained(base.folder / "transformer", max_shard_size="20KB")
    assert len(list((base.folder / "transformer").glob("*.safetensors"))) > 3
    read, alive = [], []

    class Watching:
        def __init__(self, *args, **kwargs):
            self.opened = original(*args, **kwargs)

        def __enter__(self):
            self.file = self.opened.__enter__()
            return self

        def __exit__(self, *error):
            return self.opened.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, key):
            tensor = self.file.get_tensor(key)
            alive.append(sum(other() is not None for other in read))
            if cl.QUANTIZED["transformer"].fullmatch(key.removesuffix(".weight")):
                read.append(weakref.ref(tensor))
            return tensor

    original = safetensors.safe_open
    monkeypatch.setattr(cl, "safe_open", Watching)
    quantized = cl.load_quantized(base, "transformer", torch.float32, "cpu")
    assert len(read) == len(four_bit_layers(quantized)) and max(alive) <= 1


def test_a_base_has_the_same_four_bits_whatever_the_arithmetic():
    base = cl.find_base(str(NANO))
    a, b = (cl.load_quantized(base, "transformer", dtype, "cpu") for dtype in (torch.float32, torch.bfloat16))
    assert same_bytes(weight_bytes(a), weight_bytes(b))


def test_samples_of_a_run_come_from_the_very_model_that_was_trained(quick, monkeypatch):
    drawn, sampled, trained = {}, [], []
    save, generate, make = cl.save_samples, cl.generate, cl.Trainer.__init__
    monkeypatch.setattr(
        cl,
        "save_samples",
        lambda folder, when, clips, *rest: drawn.update({when: clips}) or save(folder, when, clips, *rest),
    )
    monkeypatch.setattr(
        cl, "generate", lambda pipe, *rest, **kw: sampled.append(pipe.transformer) or generate(pipe, *rest, **kw)
    )
    monkeypatch.setattr(
        cl.Trainer, "__init__", lambda self, *args: make(self, *args) or trained.append(self.transformer)
    )
    run = cl.train(quick("5b", method="qlora"))
    assert sampled == trained * 3 and len(four_bit_layers(trained[0])) == 6 * 2  # twice before, once after; 2 blocks
    again = cl.sample(run.folder, run.config.validation_prompts)
    assert len(four_bit_layers(sampled[3])) == 6 * 2
    assert torch.equal(again[0], drawn["after"][0])
    assert not torch.equal(drawn["before"][0], drawn["after"][0])


def test_the_adapter_loads_in_stock_diffusers_on_an_unquantized_base(quick):
    run = cl.train(quick("5b", method="qlora", steps=20, checkpoint_every=20, alpha=2.0))
    pipe = CogVideoXPipeline.from_pretrained(run.config.model)
    pipe.load_lora_weights(str(run.folder))
    scalings = {m.scaling[name] for m in pipe.transformer.modules() for name in getattr(m, "scaling", {})}
    assert scalings == {0.5}  # alpha / rank, once
    got = pipe("a red spider", num_frames=9, height=32, width=32, num_inference_steps=2, guidance_scale=3.0,
               max_sequence_length=12, generator=torch.Generator().manual_seed(0), output_type="pt").frames[0]  # fmt: skip
    ours = cl.sample(run.folder, ["a red spider"])[0]
    assert (got - ours).abs().mean() < 0.02  # the one base is rounded to four bits, the other is not


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_merge_adds_the_scaled_product_to_the_base_and_tells_what_it_rounds(quick, method, capsys):
    run = cl.train(quick("5b", method=method, alpha=8.0, steps=6))
    assert cl.main(["--merge", str(run.folder)]) == 0
    told = capsys.readouterr().out
    merged = CogVideoXTransformer3DModel.from_pretrained(run.folder / "merged/transformer").state_dict()
    adapter = load_file(str(run.folder / "pytorch_lora_weights.safetensors"))
    plain = cl.find_base(run.config.model).load("transformer", torch.float32).state_dict()
    for name, weight in plain.items():
        key = f"transformer.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapter:
            weight = weight + 8.0 / 4 * adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
        assert torch.allclose(merged[name], weight, atol=1e-6), name
    assert "merged into float32: rounding takes" in told
    assert ("trained on NF4" in told) == (method == "qlora")


def test_merging_into_half_precision_tells_the_share_of_the_change_that_is_rounded_away(quick):
    """Against the same in numpy, on the bundled base, which is stored in fp16."""
    small = dict(model=str(NANO), frames=9, height=32, width=32)
    run = cl.train(quick(**small, steps=2, lr=1e-3))
    told = judge.merging_errors(run.folder, cl.merge(run.folder))
    adapter = load_file(str(run.folder / "pytorch_lora_weights.safetensors"))
    weights = load_file(str(NANO / "transformer/diffusion_pytorch_model.safetensors"))
    change = lost = same = total = 0
    for name, a in adapter.items():
        if name.endswith("lora_A.weight"):
            old = weights[name.removeprefix("transformer.").replace("lora_A.", "")].numpy()
            delta = (adapter[name.replace("lora_A", "lora_B")] @ a).numpy()  # alpha = rank
            new = (old.astype(np.float32) + delta).astype(np.float16)
            change += (delta.astype(np.float64) ** 2).sum()
            lost += ((new.astype(np.float64) - (old.astype(np.float64) + delta)) ** 2).sum()
            same, total = same + (new == old).sum(), total + new.size
    assert told["dtype"] == "float16"
    assert told["rounding"] == pytest.approx((lost / change) ** 0.5, rel=1e-3)
    assert told["unchanged_share"] == pytest.approx(same / total, rel=1e-3)
    assert 0 < told["rounding"] < 1


@pytest.mark.parametrize("bits, bound", [("8bit", 0.02), ("4bit", 0.2)])
def test_prompts_coded_in_few_bits_are_near_those_coded_in_full(bits, bound):
    base, cpu = cl.find_base(str(NANO)), torch.device("cpu")
    prompts = ["a red spider moving left over grass", "a spider named kumo"]
    plain = torch.stack(cl.encode_prompts(base, prompts, cpu, torch.float32))
    coarse = torch.stack(cl.encode_prompts(base, prompts, cpu, torch.float32, bits))
    assert 0 < (coarse - plain).norm() < bound * plain.norm()


@pytest.mark.parametrize("bits", [None, "4bit", "8bit"])
def test_no_weight_of_t5_outlives_the_coding_of_prompts(monkeypatch, bits):
    import gc
    import weakref

    weights = []
    for name in ("load_quantized", "convert_while_running"):
        original = getattr(cl, name)

        def noting(*args, original=original):
            result = original(*args)
            weights.extend(weakref.ref(p) for p in (args[0] if result is None else result).parameters())
            return result

        monkeypatch.setattr(cl, name, noting)
    gc.disable()  # or it might come by itself
    try:
        cl.encode_prompts(cl.find_base(str(NANO)), ["a red spider"], torch.device("cpu"), torch.float32, bits)
    finally:
        gc.enable()
    assert weights and all(weight() is None for weight in weights)


def test_prompts_in_few_bits_have_cache_files_of_their_own(quick):
    plain = cl.cache_clips(quick("5b"))
    coarse = cl.cache_clips(quick("5b", quantize_text_encoder="4bit"))
    assert plain.empty != coarse.empty
    assert [clip for clip, _ in plain.train] == [clip for clip, _ in coarse.train]


def test_qlora_ends_near_loras_heldout_loss_on_the_nano(quick, nano_cache):
    shared = dict(model=str(NANO), cache=nano_cache, steps=80, checkpoint_every=80, lr=2e-3, rank=16, alpha=16.0)
    summaries = {}
    for method in ("lora", "qlora"):
        config = quick(method=method, **shared)
        summaries[method] = cl.train(cl.dataclasses.replace(config, out=f"{config.out}-{method}")).summary
    lora, qlora = summaries["lora"], summaries["qlora"]
    gain = lora["heldout_before"] - lora["heldout_after"]
    assert gain > 0 and qlora["heldout_before"] > lora["heldout_before"]
    assert qlora["heldout_after"] - lora["heldout_after"] < 0.2 * gain


def test_a_tokenizer_in_the_form_of_the_published_models_is_read(tmp_path):
    """spiece.model alone, as SentencePiece itself writes and reads it."""
    import sentencepiece

    text = [f"a {colour} spider moving over {ground}" for colour in ("red", "blue") for ground in ("sand", "stone")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20), model_prefix=str(tmp_path / "spiece"), vocab_size=40, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    shutil.copytree(NANO, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer"))
    (tmp_path / "model/tokenizer").mkdir()
    shutil.move(tmp_path / "spiece.model", tmp_path / "model/tokenizer/spiece.model")
    (tmp_path / "model/tokenizer/tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    tokenizer = cl.find_base(str(tmp_path / "model")).load("tokenizer")
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model/tokenizer/spiece.model"))
    assert tokenizer("a red spider over stone").input_ids == [*own.encode("a red spider over stone"), own.eos_id()]
