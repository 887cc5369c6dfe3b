"""The memory plan: against closed forms, real allocations, a really quantized model, and what other trainers published."""

import contextlib
import csv
import dataclasses
import gc
import json
import re
import shlex
import shutil
import sys

import bench_gpu
import pytest
import torch
from bench_24gb import flops as flops_on_paper
from conftest import FAMILIES, IMAGE_FAMILIES, NANO, ROOT, tiny_pipeline

import cogvideo_lite as cl
import plan

LARGE = {"2b": "THUDM/CogVideoX-2b", "5b": "THUDM/CogVideoX-5b", "1.5": "zai-org/CogVideoX1.5-5B"}
LARGE |= {"5b-i2v": "THUDM/CogVideoX-5b-I2V", "1.5-i2v": "THUDM/CogVideoX1.5-5B-I2V"}
MIB = 2**20


@pytest.fixture(scope="module")
def rehearsed():
    """(model, blocks, fields) -> Ledger of a training step, each made once, of so many blocks of a published model."""
    made = {}

    def ledger(model, blocks, **fields):
        key = model, blocks, *sorted(fields.items())
        if key not in made:
            config, base = plan.resolve_plan(cl.Config(model=LARGE[model], **fields))
            few = plan.rehearse(config, base, min(blocks, plan.FEW_BLOCKS), sampling=False)
            made[key] = few.of_blocks(blocks)
        return made[key]

    return ledger


def most_bytes(ledger, kind):
    """Most that was held of one kind."""
    now = most = 0
    for memory, taken, _ in ledger.events:
        if memory.kind == kind:
            now += memory.bytes if taken else -memory.bytes
            most = max(most, now)
    return most


@pytest.fixture(scope="module")
def midsize(tmp_path_factory):
    return midsize_pipeline(tmp_path_factory.mktemp("midsize"), "5b")


def midsize_pipeline(folder, family):
    """A pipeline folder whose transformer is large enough for its tensors to be what counts: 8 heads x 64, 5 blocks."""
    from diffusers import CogVideoXTransformer3DModel

    tiny_pipeline(folder, family)
    torch.manual_seed(0)
    shape = dict(
        num_attention_heads=8, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
        num_layers=5, sample_width=16, sample_height=16, sample_frames=9, max_text_seq_length=12,
    )  # fmt: skip
    if family == "5b-i2v":  # at whose own size alone it works
        shape |= dict(sample_width=32, sample_height=32, sample_frames=17)
    transformer = CogVideoXTransformer3DModel(**{**shape, **(FAMILIES | IMAGE_FAMILIES)[family]})
    transformer.save_pretrained(folder / "transformer")
    return folder


# ---------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("model, parameters", [("2b", 1_693_783_872), ("5b", 5_570_283_072)])
def test_the_published_models_are_known_without_network_and_weights(model, parameters):
    from diffusers import CogVideoXTransformer3DModel

    base = plan.describe(LARGE[model])
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(base.transformer)
    assert sum(p.numel() for p in transformer.parameters()) == parameters
    assert base == dataclasses.replace(plan.describe(LARGE[model].replace("THUDM", "zai-org")), folder=base.folder)


def test_each_published_model_is_used_at_the_size_and_rate_that_its_card_names():
    bases = {model: plan.describe(name) for model, name in LARGE.items()}
    sizes = {model: (b.frames, *b.native, b.fps) for model, b in bases.items()}
    short, long = (49, 480, 720, 8), (81, 768, 1360, 16)
    assert sizes == {"2b": short, "5b": short, "1.5": long, "5b-i2v": short, "1.5-i2v": long}


def test_t5_xxl_has_the_parameters_that_its_card_names():
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**plan.T5_XXL))
    assert sum(p.numel() for p in model.parameters()) == 4_762_310_656


def test_weights_are_kept_in_16_bits_beside_a_table_of_positions(rehearsed):
    from diffusers import CogVideoXTransformer3DModel

    with torch.device("meta"):
        blocks = CogVideoXTransformer3DModel.from_config({**plan.NARROW, "num_layers": 4})
    table = 17_776 * 1920 * 8  # tokens, width, bytes: diffusers makes it in float64
    weights = 2 * sum(p.numel() for p in blocks.parameters())
    assert most_bytes(rehearsed("2b", 4, method="lora"), "weights") == weights + table


def test_adapters_gradients_and_states_have_the_sizes_of_their_closed_forms(rehearsed):
    ledger = rehearsed("5b", 42, method="qlora")
    adapters = 42 * 8 * 3072 * 32 * 4  # layers, A and B of four matrices, width, rank, bytes
    assert most_bytes(ledger, "adapters") == most_bytes(ledger, "gradients") == adapters
    assert most_bytes(ledger, "optimizer") == pytest.approx(2 * adapters, rel=1e-3)  # AdamW's two moments, and counters


def test_adapters_of_any_rank_are_planned_without_the_memory_that_they_would_take():
    gib = [plan.plan(cl.Config(rank=rank), card=False).phases["training"]["adapters"] for rank in (10**3, 10**9)]
    assert gib[1] == pytest.approx(10**6 * gib[0], rel=1e-3) and gib[1] > 1e4


def test_nf4_has_the_size_of_its_closed_form(rehearsed):
    """4 + 8/64 + 32/(64 * 256) bits for each weight of attention and feed-forward, 16 for each other."""
    blocks = 42 * 12 * 3072**2
    weights = blocks * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + (5_570_283_072 - blocks) * 2
    assert most_bytes(rehearsed("5b", 42, method="qlora"), "weights") == pytest.approx(weights, rel=1e-3)


def test_with_checkpointing_each_blocks_input_stays_until_backward(rehearsed):
    inputs = 42 * (17_550 + 226) * 3072 * 2
    at_the_peak = rehearsed("5b", 42, method="qlora").split("training")["saved activations"]
    assert at_the_peak * plan.GIB == pytest.approx(inputs, rel=0.01)


def test_the_work_of_a_step_is_that_of_its_matrix_products(rehearsed):
    """The count on paper leaves out adapters, adaLN, and projections in and out."""
    found = rehearsed("5b", 42, method="qlora").step_flops()
    assert found == pytest.approx(sum(flops_on_paper("5b", "qlora", 49, 480, 720)), rel=0.05)


def test_without_checkpointing_activations_of_all_blocks_stay_and_less_is_computed(rehearsed):
    with_ = rehearsed("2b", 4, method="lora")
    without = rehearsed("2b", 4, method="lora", gradient_checkpointing=False)
    assert most_bytes(without, "saved activations") > 8 * most_bytes(with_, "saved activations")
    assert 0.6 * with_.step_flops() < without.step_flops() < 0.8 * with_.step_flops()


def test_offloaded_activations_are_not_on_the_card(rehearsed):
    kept, offloaded = (rehearsed("2b", 4, method="lora", **on) for on in ({}, {"offload_activations": True}))
    inputs = 4 * (17_550 + 226) * 1920 * 2
    assert most_bytes(kept, "saved activations") > inputs > 10 * most_bytes(offloaded, "saved activations")
    assert offloaded.peak_bytes("training") < kept.peak_bytes("training") - 0.7 * inputs


def test_the_optimizer_inside_backward_never_has_all_gradients(rehearsed):
    fused, ordinary = (rehearsed("2b", 5, method="full", fused_backward=on) for on in (True, False))
    assert most_bytes(ordinary, "gradients") == pytest.approx(
        most_bytes(ordinary, "weights") - 17_776 * 1920 * 8, rel=1e-3
    )
    assert most_bytes(fused, "gradients") < 0.2 * most_bytes(ordinary, "gradients")


def stream(ledger):
    """What was taken and given back, in order, of more than 2 KiB: (bytes, kind, whether taken, number of the piece). Below are
    vectors as long as the model has tensors, such as that of their norms, and what libraries take once in a process."""
    pieces = {}
    return [
        (m.bytes, m.kind, taken, pieces.setdefault(m, len(pieces))) for m, taken, _ in ledger.events if m.bytes > 2048
    ]


@pytest.mark.parametrize("model, fields", [
    ("5b", dict(method="lora")),
    ("2b", dict(method="lora", gradient_checkpointing=False, ema=0.99)),
    ("2b", dict(method="qlora", batch_size=2, micro_batch_size=1, offload_activations=True)),
    ("1.5", dict(method="qlora", lora_targets="all")),
    ("2b", dict(method="full")),
    ("2b", dict(method="full", trained_dtype="float32", fused_backward=False, l2_to_base=0.1)),
    ("2b", dict(method="full", optimizer="adamw8bit", gradient_checkpointing=False)),
    ("2b", dict(method="full", shard=True, processes=2)),
    ("2b", dict(method="lora", shard=True, processes=4, gradient_checkpointing=False)),
    ("2b", dict(method="qlora", processes=2)),
], ids=str)  # fmt: skip
def test_five_blocks_tell_what_more_do_piece_by_piece(model, fields):
    fields = dict(fields)
    several = {"processes": fields.pop("processes", 1)}
    asked = cl.Config(model=LARGE[model], frames=17, height=128, width=192, **fields)
    config, base = plan.resolve_plan(asked, **several)
    whole = plan.rehearse(config, base, 9, **several)
    told = plan.rehearse(config, base, 5, **several).of_blocks(9)
    assert told.step_flops() == whole.step_flops()
    assert stream(told) == stream(whole)
    for phase in ("training", "sampling"):
        assert told.split(phase) == pytest.approx(whole.split(phase), abs=0.005)


# ------------------------------------------------------------------------------------------------------- the allocator


def reserved(*sizes):
    """MiB reserved after pieces of these MiB are taken; a negative size gives the first of that size back."""
    allocator, held = plan.Allocator(), []
    for size in sizes:
        if size > 0:
            held.append(plan.Memory(int(size * MIB)))
            allocator.take(held[-1])
        else:
            piece = next(m for m in held if m.bytes == int(-size * MIB))
            held.remove(piece)
            allocator.give_back(piece)
    return allocator.reserved / MIB


@pytest.mark.parametrize("sizes, expected", [
    ((0.001,), 2), ((0.5, 0.5, 0.5, 0.5), 2), ((0.5, 0.5, 0.5, 0.5, 0.001), 4),  # small pieces share segments of 2 MiB
    ((7, 7), 20), ((7, 7, 7), 40), ((7, 7, 5), 20),  # below 10 MiB, of 20 MiB
    ((14.1,), 16), ((100, 0.5), 102),  # larger ones have their own; small pieces never lie in those
    ((100, -100, 40, 60), 100), ((100, -100, 60, 60), 160),  # what was given back is cut for the next
    ((7, 6, 5, -7, -6, 13), 20), ((7, 6, 5, -7, -5, 13), 34),  # free neighbours are merged, others are not
    ((100, 40, -100, -40, 40), 140),  # the best fit, not the first
], ids=str)  # fmt: skip
def test_the_allocator_reserves_as_cudas_does(sizes, expected):
    assert reserved(*sizes) == expected


def test_an_emptied_cache_keeps_segments_that_are_in_use():
    allocator, pieces = plan.Allocator(), [plan.Memory(7 * MIB), plan.Memory(6 * MIB), plan.Memory(30 * MIB)]
    for piece in pieces:
        allocator.take(piece)
    allocator.give_back(pieces[0])
    allocator.give_back(pieces[2])
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB and allocator.most == 50 * MIB


# ------------------------------------------------------------------------------------------------- measured allocations


def most_allocated(held, run):
    """Bytes of tensors at the peak of a call, by torch's profiler: what it allocates and frees, above the storages of the tensors in
    `held`. What a convolution takes and gives back within itself is left out, as in a plan: it is another on a card."""
    from torch.profiler import ProfilerActivity, profile

    before = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    now = most = until = 0
    for event in events:
        if event.name() == "aten::convolution":
            until = max(until, event.start_ns() + event.duration_ns())
        elif event.name() == "[memory]":
            if event.start_ns() > until:
                most = max(most, now)
            now += event.nbytes()
            if event.start_ns() > until:
                most = max(most, now)
    return sum(before.values()) + most


def of_model(model):
    return [*model.parameters(), *model.buffers()]


def trainer_without_data(config, folder, prompts=1):
    """A Trainer in float32, on one clip of noise, and for an image-to-video model one first frame."""
    from accelerate import Accelerator

    config, base, _ = cl.resolve(config)
    t, text = sum(base.latent_frames(config.frames)), base.transformer["text_embed_dim"]
    size = config.height // base.spatial, config.width // base.spatial
    moments = torch.randn(2 * base.vae["latent_channels"], t, *size)
    frame = torch.zeros(3, config.height, config.width, dtype=torch.uint8)
    images = {"images": moments[None, :, 0], "first_frame": frame} if base.image_to_video else {}
    cl.save_tensors(folder / "clip.safetensors", {"moments": moments, **images})
    cl.save_tensors(folder / "prompt.safetensors", {"prompt_embeds": torch.randn(base.text_length, text)})
    pair = folder / "clip.safetensors", folder / "prompt.safetensors"
    validation = list(map(str, range(prompts)))
    begun = dict.fromkeys(validation, pair[0]) if images else {}
    cache = cl.Cache([pair], [pair], pair[1], dict.fromkeys(validation, pair[1]), images=begun)
    return cl.Trainer(dataclasses.replace(config, compute_dtype="float32"), base, cache, Accelerator(cpu=True))


CASES = {
    "nano lora": (NANO, dict(method="lora", batch_size=4)),
    "nano full": (NANO, dict(method="full", batch_size=8)),
    "midsize lora": ("midsize", dict(method="lora")),
    "midsize lora, checkpointed": ("midsize", dict(method="lora", gradient_checkpointing=True)),
    "midsize qlora": ("midsize", dict(method="qlora")),
    "midsize lora, averaged": ("midsize", dict(method="lora", ema=0.99)),
    "midsize full": ("midsize", dict(method="full")),
    "midsize full, in backward, 8-bit": ("midsize", dict(method="full", optimizer="adamw8bit", fused_backward=True)),
    "midsize full, accumulating": ("midsize", dict(method="full", batch_size=2, micro_batch_size=1)),
    "5b-i2v lora": ("5b-i2v", dict(method="lora")),
    "1.5-i2v full": ("1.5-i2v", dict(method="full")),
}


@pytest.mark.parametrize("case", CASES)
def test_real_steps_allocate_what_was_predicted(case, midsize, tmp_path):
    folder, fields = CASES[case]
    if folder != NANO:
        folder = midsize if folder == "midsize" else midsize_pipeline(tmp_path / "model", folder)
        height = 128 if "1.5" in case else 256  # at most, of the positions of such a 1.5
        fields = dict(dict(frames=17, height=height, width=height, batch_size=1), **fields)
    config = cl.Config(model=str(folder), cache=str(tmp_path), **fields)
    resolved, base = plan.resolve_plan(config)
    rehearsed = plan.rehearse(resolved, base, base.transformer["num_layers"], card=False, sampling=False)
    trainer = trainer_without_data(config, tmp_path)
    trainer.transformer.train()
    trainer.step(0)
    held = [*of_model(trainer.transformer), *trainer.updates.state()[0].values()]
    assert rehearsed.peak_bytes("training") == pytest.approx(most_allocated(held, lambda: trainer.step(1)), rel=0.03)


# "tiles": as for large models, whose clips are coded and decoded in tiles of their VAE's own size, 480x720 and a quarter of it.
PHASES = {
    "nano": {},
    "tiny": dict(frames=17, height=128, width=256),
    "tiny, tiles": dict(frames=17, height=512, width=768),
    "tiny 1.5, tiles": dict(frames=33, height=256, width=384),
    "tiny 1.5-i2v, tiles": dict(frames=9, height=512, width=768),
}


@pytest.fixture
def phase(tiny, monkeypatch, tmp_path):
    """(config, base) of a case of PHASES and further fields."""

    def resolved(case, **fields):
        monkeypatch.setattr(cl.Base, "large", case.endswith("tiles"))
        family = next(family for family in ("1.5-i2v", "1.5", "5b") if family in f"{case} 5b")
        folder = NANO if case == "nano" else tiny(family)
        if "1.5" in case:  # whose positions would else end at 32 pixels
            folder = shutil.copytree(folder, tmp_path / "larger")
            settings = json.loads((folder / "transformer/config.json").read_text())
            settings |= dict(sample_height=96, sample_width=96)
            (folder / "transformer/config.json").write_text(json.dumps(settings))
        return plan.resolve_plan(cl.Config(model=str(folder), compute_dtype="float32", **PHASES[case], **fields))

    return resolved


@pytest.mark.parametrize("case", PHASES)
def test_really_coding_a_clip_and_a_prompt_allocates_what_was_predicted(case, phase):
    config, base = phase(case)
    predicted = plan.rehearse_caching(config, base, False).peak_bytes("caching")
    vae, text_encoder = (base.load(part, torch.float32) for part in ("vae", "text_encoder"))
    clip = torch.rand(1, 3, config.frames, config.height, config.width)
    if case.endswith("tiles"):
        cl.tile(vae, 1)
    with torch.no_grad():
        coding = most_allocated([*of_model(vae), clip], lambda: vae.encode(clip))
        ids = torch.zeros(1, base.text_length, dtype=torch.long)
        reading = most_allocated(of_model(text_encoder), lambda: text_encoder(ids))
    assert predicted == pytest.approx(max(coding, reading), rel=0.03)


@pytest.mark.parametrize("case, method", [*((case, "lora") for case in PHASES), ("nano", "full")])
def test_real_sampling_allocates_what_was_predicted(case, method, phase, tmp_path, monkeypatch):
    config, base = phase(case, method=method, sampling_steps=2)
    predicted = plan.rehearse(config, base, base.transformer["num_layers"], card=False).peak_bytes("sampling")
    trainer = trainer_without_data(config, tmp_path, prompts=base.sampled_at_once)
    for i, p in enumerate(trainer.parameters):  # an optimizer has its states from the first update on
        p.grad = torch.zeros_like(p)
        trainer.updates.update(i)
    vae, load = base.load("vae", torch.float32), cl.Base.load
    monkeypatch.setattr(cl.Base, "load", lambda *a: vae if a[1] == "vae" else load(*a))  # counted before
    held = [*of_model(trainer.transformer), *of_model(vae), *trainer.updates.state()[0].values()]
    assert predicted == pytest.approx(most_allocated(held, trainer.generated), rel=0.03)


def test_what_is_told_of_later_tiles_is_what_running_them_takes(phase, monkeypatch):
    config, base = phase("tiny, tiles")

    def stream():
        rehearsals = plan.rehearse_decoding.__wrapped__, plan.rehearse_caching.__wrapped__
        ledgers = [rehearsal(config, base, True) for rehearsal in rehearsals]
        number = {}  # of each piece of memory, in the order in which they are taken
        events = [event for ledger in ledgers for event in ledger.events]
        return [
            (number.setdefault(memory, len(number)), memory.bytes, memory.kind, taken) for memory, taken, _ in events
        ]

    told = stream()
    monkeypatch.setattr(plan, "once_for_a_shape", lambda *_: contextlib.nullcontext())
    assert told == stream()


def test_the_stand_in_for_nf4_is_as_large_as_what_bitsandbytes_makes(midsize):
    config, base = plan.resolve_plan(cl.Config(method="qlora", model=str(midsize)))
    parts = plan.rehearse(config, base, base.transformer["num_layers"], card=False, sampling=False).split("training")
    real = cl.load_quantized(base, "transformer", torch.float32, torch.device("cpu"))
    tensors = [*real.parameters(), *real.buffers()]
    for module in real.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    # bitsandbytes' tables are one for all layers on a CPU, and one for each on a card: a few KB.
    assert parts["weights"] * plan.GIB == pytest.approx(sum(storages.values()), rel=0.01)


def test_coding_a_clip_beyond_the_vaes_own_size_takes_little_more_than_one_of_that_size():
    def coding(height, width):
        config, base = plan.resolve_plan(cl.Config(model=LARGE["1.5"], frames=81, height=height, width=width))
        small = dict(base.text_encoder, num_layers=1, vocab_size=8)  # T5 needs more than the VAE
        base = dataclasses.replace(base, text_encoder=small)
        return sum(plan.rehearse_caching(config, base, True).split("caching").values())

    own, beyond = coding(480, 720), coding(768, 1360)
    pixels = 2 * 3 * 81 * (768 * 1360 - 480 * 720) / plan.GIB  # of the clip itself
    assert own + 0.9 * pixels < beyond < own + 1.5 * pixels


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_t5_in_few_bits_takes_less(bits):
    config, base = plan.resolve_plan(cl.Config(model=LARGE["5b"], frames=9, height=64, width=64))
    plain = plan.rehearse_caching(config, base).split("caching")["weights"]
    config.quantize_text_encoder = bits
    coarse = plan.rehearse_caching(config, base).split("caching")["weights"]
    matrices = 24 * (4 * 4096**2 + 2 * 4096 * 10_240)  # T5 reads the dtype of its last, which stays as it is
    saved = matrices * (16 - (4 + 8 / 64 + 32 / 64 / 256 if bits == "4bit" else 8)) / 8
    assert (plain - coarse) * plan.GIB == pytest.approx(saved, rel=0.01)


# ------------------------------------------------------------------------------------------------- published, and a plan


@pytest.mark.parametrize(
    "row",
    [0, 6, 12, 13],
    ids=[
        "2b lora without checkpointing",
        "5b lora of rank 256",
        "2b full with 8-bit states, four clips",
        "5b full with 8-bit states",
    ],
)
def test_recipes_of_other_trainers_come_out_near_what_they_published(row):
    from bench_plan import foreign_run

    with open(ROOT / "tests/published_memory.csv", newline="") as file:
        row = list(csv.DictReader(file))[row]
    before, peak, _ = foreign_run(row)
    assert before == pytest.approx(float(row["before_gib"]), rel=0.02)
    assert peak == pytest.approx(float(row["train_gib"]), rel=0.04)


def test_a_plan_has_every_phase_in_parts_that_add_up():
    planned = plan.plan(cl.Config(method="qlora", model=str(NANO)))
    assert list(planned.phases) == ["caching", "training", "sampling"]
    assert all(gib >= 0 for parts in planned.phases.values() for gib in parts.values())
    assert planned.peak_gib == max(sum(parts.values()) for parts in planned.phases.values())
    assert all(
        planned.phases["training"][kind] > 0 for kind in ("weights", "adapters", "optimizer", "saved activations")
    )
    alone = plan.plan(cl.Config(method="qlora", model=str(NANO)), card=False)
    assert set(planned.phases["training"]) - set(alone.phases["training"]) == {"allocator", "context"}


def planned_by(**phases):
    """A `planner` of which each phase needs what a function of the options changed says."""

    def planned_with(**changes):
        config = cl.Config(method="lora", model=LARGE["5b"])
        parts = {phase: {"working space": need(changes)} for phase, need in phases.items()}
        return plan.Plan(config, plan.resolve_plan(config, **changes)[0], parts, 1)

    return planned_with


def test_what_proves_needless_in_the_end_is_not_given_up():
    """Shorter clips lower the peak a little, smaller ones are enough by themselves."""
    planned_with = planned_by(caching=lambda changed: 30 - 2 * ("frames" in changed) - 20 * ("height" in changed))
    changes, found = plan.fitting(planned_with, 24)
    assert set(changes) == {"height", "width"} and found.peak_gib == 10
    changes, _ = plan.fitting(planned_with, 9)
    assert set(changes) == {"frames", "height", "width"}


def test_where_nothing_fits_the_least_that_was_found_is_told():
    planned_with = planned_by(training=lambda changed: 20 - 2 * ("frames" in changed) - 5 * ("height" in changed))
    changes, least = plan.fitting(planned_with, 12)
    assert changes is None and least.peak_gib == 13


def test_a_knob_that_lowers_what_is_not_the_largest_phase_yet_is_turned_too():
    planned_with = planned_by(
        caching=lambda changed: 4.0 if "quantize_text_encoder" in changed else 10.0,
        training=lambda changed: 6.0 if "offload_activations" in changed else 12.0,
    )
    changes, found = plan.fitting(planned_with, 8)
    assert set(changes) == {"quantize_text_encoder", "offload_activations"} and found.peak_gib == 6


def test_a_knob_that_did_not_help_is_tried_again_after_another():
    """Shorter clips lower the peak only when they are also smaller."""
    planned_with = planned_by(
        training=lambda changed: 20 - 4 * ("height" in changed) - 10 * ({"frames", "height"} <= set(changed))
    )
    changes, found = plan.fitting(planned_with, 8)
    assert {"frames", "height", "width"} <= set(changes) and found.peak_gib == 6


def test_what_does_not_go_with_what_is_asked_is_passed_over(capsys, monkeypatch):
    """Five clips a step cannot be cut in fours."""
    small = ["--model", LARGE["2b"], "--frames", "9", "--height", "64", "--width", "64", "--card", "RTX 4090"]
    monkeypatch.setattr(plan, "knobs", lambda *_: [])
    assert cl.main(["--plan", "--full", *small, "--batch-size", "4", "--micro-batch-size", "4"]) == 0
    printed = capsys.readouterr().out
    assert "no gradient checkpointing" in printed and "one more clip" not in printed and "this fits" in printed


def test_a_knob_leaves_out_what_goes_only_with_another_method():
    """QLoRA, one of the knobs of --full, knows no --l2-to-base."""
    asked = cl.Config(method="full", model=LARGE["2b"], l2_to_base=0.1)
    assert {"method": "qlora"} in [changes for _, changes in plan.knobs(plan.resolve_plan(asked)[0])]
    assert plan.resolve_plan(asked, method="qlora")[0].l2_to_base is None


def test_what_does_not_fit_is_answered_with_a_command_that_does(midsize, monkeypatch, capsys):
    monkeypatch.setattr(plan, "CONTEXT_GIB", 0)
    monkeypatch.setattr(plan, "spending", lambda *_: [])
    fields = dict(model=str(midsize), frames=9, height=128, width=128, batch_size=16)
    vram = 0.7 * plan.plan(cl.Config(method="full", **fields)).peak_gib
    assert cl.main(["--plan", "--full", *shlex.split(plan.as_options(fields)), "--vram", str(vram)]) == 0
    printed = capsys.readouterr().out
    assert "does not fit in" in printed
    savings = [float(line.split()[0]) for line in printed.splitlines() if line.strip()[:1] in "+-" and " GiB  " in line]
    assert len(savings) > 3 and savings == sorted(savings)  # the largest first
    command = printed.strip().splitlines()[-1].strip().removeprefix("python cogvideo_lite.py ")
    changed = vars(cl.parser().parse_args(shlex.split(command)))
    asked = {f.name: changed[f.name] for f in dataclasses.fields(cl.Config) if f.name in changed}
    assert plan.plan(cl.Config(**asked)).peak_gib <= vram  # the answer is enough


def test_a_card_without_bf16_units_is_planned_in_the_arithmetic_that_a_run_takes_there(capsys, monkeypatch):
    monkeypatch.setattr(plan, "knobs", lambda *_: [])
    monkeypatch.setattr(plan, "spending", lambda *_: [])
    small = ["--frames", "9", "--height", "64", "--width", "64"]
    for model, dtype in (("5b", "float32"), ("2b", "float16")):
        assert cl.main(["--plan", "--lora", "--model", LARGE[model], *small, "--card", "T4"]) == 0
        printed = capsys.readouterr().out
        assert f"arithmetic in {dtype}" in printed and f"TFLOP/s that are published for {dtype} on T4" in printed
    with pytest.raises(cl.UserError, match="fp16 gradients"):  # as when training
        plan.resolve_plan(cl.Config(method="full", model=LARGE["2b"], fused_backward=True, compute_dtype="float16"))


@pytest.mark.parametrize("batch, micro", [(3, 1), (5, 1), (6, 2)])
def test_every_pass_of_an_accumulated_step_is_counted(batch, micro):
    """Against a step of as many clips at once, which computes as much."""
    flops = [
        plan.plan(cl.Config(method="lora", model=str(NANO), batch_size=batch, micro_batch_size=m)).flops
        for m in (micro, batch)
    ]
    assert flops[0] == pytest.approx(flops[1], rel=1e-3)


def test_a_folder_is_planned_before_its_weights_are_there(tmp_path):
    for file in NANO.rglob("*.json"):
        (tmp_path / file.relative_to(NANO)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.relative_to(NANO)).write_text(file.read_text())
    assert plan.plan(cl.Config(model=str(tmp_path))).phases == plan.plan(cl.Config(model=str(NANO))).phases


def test_weights_that_are_not_there_whole_are_planned_as_if_there_were_none(tmp_path):
    """As git leaves them without its LFS, or a download that broke off."""
    for file in NANO.rglob("*"):
        if file.is_file():
            (tmp_path / file.relative_to(NANO)).parent.mkdir(parents=True, exist_ok=True)
            text = (
                b"version https://git-lfs.github.com/spec/v1\n" if file.suffix == ".safetensors" else file.read_bytes()
            )
            (tmp_path / file.relative_to(NANO)).write_bytes(text)
    assert plan.plan(cl.Config(model=str(tmp_path))).phases == plan.plan(cl.Config(model=str(NANO))).phases


def test_a_plan_of_an_unknown_model_of_the_hub_fetches_no_weights(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda model, allow_patterns: asked.extend(allow_patterns) or NANO
    )
    plan.describe("someone/their-model")
    assert asked == ["*.json"]
    assert plan.describe("thudm/cogvideox-5B").transformer == plan.describe(LARGE["5b"]).transformer


@pytest.mark.parametrize("note, told", [
    ("floored by T5+VAE", "bound respected"), ("out of memory on 24 GB", "floor broken"), ("does not fit", "floor broken"),
])  # fmt: skip
def test_a_bound_is_a_floor_where_its_note_says_that_so_much_was_not_enough(note, told):
    from bench_plan import bound

    assert bound(note, 20.0, 24.0) == told


def test_the_time_by_measured_rates_takes_attention_apart(monkeypatch):
    monkeypatch.setattr(plan, "matrix_rate", lambda *rest: 1e12)
    monkeypatch.setattr(plan, "attention_rate", lambda *rest: 1e11)
    config = cl.Config(compute_dtype="float32")
    seconds, told = plan.time_of_step(plan.Plan(config, config, {}, 3e12, 1e12))
    assert seconds == pytest.approx(2 + 10) and told.startswith("least")
    assert plan.plan(cl.Config(model=str(NANO))).attention_flops > 0


def test_another_method_leaves_out_what_only_full_has():
    asked = cl.Config(method="full", model=LARGE["2b"], trained_dtype="float32", fused_backward=False)
    config, _ = plan.resolve_plan(asked, trained_dtype="bfloat16", method="qlora")
    assert (config.method, config.trained_dtype, config.fused_backward) == ("qlora", None, False)
    with pytest.raises(cl.UserError, match="only for --full"):  # what the user said is not left out
        plan.resolve_plan(cl.Config(method="lora", model=LARGE["2b"], trained_dtype="float32"))


def test_the_time_on_a_card_is_its_published_rate_times_the_stated_share():
    planned = plan.Plan(cl.Config(), cl.Config(), {}, 1e15)
    seconds, told = plan.time_of_step(planned, "RTX 4090")
    assert seconds == pytest.approx(1e15 / (165e12 * plan.UTILISATION)) and "assumed" in told


BAD = {
    "no method": (["--plan", "--sample", "x"], "--plan: goes with --lora, --qlora or --full"),
    "memory without a plan": (["--lora", "--vram", "24"], "only with --plan"),
    "no memory": (["--plan", "--lora", "--vram", "-1"], "--vram -1: must be a number of GiB above 0"),
    "an unknown card": (["--plan", "--lora", "--card", "abacus"], "must be one of T4, L4"),
    "an unknown model": (["--plan", "--lora", "--model", "nowhere/at/all"], "no such folder"),
    "a folder without a text encoder": (["--plan", "--lora", "--model", "EMPTY"], "a plan needs"),
    "positions beyond the table": (
        ["--plan", "--lora", "--model", LARGE["1.5"], "--height", "4816"],
        "must be at most 2400",
    ),
    "frames that are not 8k + 1": (["--plan", "--lora", "--model", LARGE["5b"], "--frames", "48"], "must be 8k + 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case, tmp_path, capsys):
    for part in (".", "transformer", "vae"):  # of the bundled model, its configurations alone
        (tmp_path / part).mkdir(exist_ok=True)
        for file in (NANO / part).glob("*.json"):
            (tmp_path / part / file.name).write_text(file.read_text())
    arguments, words = BAD[case]
    assert cl.main([str(tmp_path) if a == "EMPTY" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("file, change, words", [
    ("transformer/config.json", {"num_layers": None}, "num_layers None"), ("transformer/config.json", {"num_layers": "x"}, "num_layers 'x'"),
    ("vae/config.json", {"temporal_compression_ratio": None}, "temporal_compression_ratio None"),
    ("text_encoder/config.json", [], "no table"), ("vae/config.json", [], "no table"), ("text_encoder/config.json", {"d_model": None}, "d_model None"),
])  # fmt: skip
def test_a_configuration_that_diffusers_did_not_write_so_is_refused_in_one_line(file, change, words, tmp_path, capsys):
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
    for name in ("model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json"):
        (tmp_path / name).write_text((NANO / name).read_text())
    (tmp_path / file).write_text(json.dumps({**json.loads((NANO / file).read_text()), **change} if change else change))
    assert cl.main(["--plan", "--lora", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert file in error and words in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("file, change", [
    ("transformer/config.json", {"patch_size": 0}), ("transformer/config.json", {"activation_fn": "nonsense"}),
    ("vae/config.json", {"block_out_channels": []}), ("text_encoder/config.json", {"d_kv": "x"}),
])  # fmt: skip
def test_a_configuration_that_cannot_be_built_or_run_is_refused_in_one_line(file, change, tmp_path, capsys):
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
    for name in ("model_index.json", "transformer/config.json", "vae/config.json", "text_encoder/config.json"):
        (tmp_path / name).write_text((NANO / name).read_text())
    (tmp_path / file).write_text(json.dumps(json.loads((NANO / file).read_text()) | change))
    assert cl.main(["--plan", "--lora", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error and "config.json" in error and len(error.splitlines()) == 1


def test_a_cards_name_may_be_written_small_and_a_step_too_short_for_its_estimate_is_marked(capsys, monkeypatch):
    monkeypatch.setattr(plan, "knobs", lambda *_: [])
    assert cl.main(["--plan", "--lora", "--model", str(NANO), "--card", "rtx 4090"]) == 0
    printed = capsys.readouterr().out
    assert "23.6 GiB, what torch finds on the RTX 4090" in printed and "so short a step takes longer" in printed
    assert cl.main(["--plan", "--lora", "--model", str(NANO), "--card", "RTX 9999"]) == 2
    assert "--card 'RTX 9999': must be one of T4" in capsys.readouterr().err


def test_what_takes_more_memory_stands_beside_what_it_does_to_the_work(capsys, monkeypatch):
    monkeypatch.setattr(plan, "knobs", lambda *_: [])
    assert cl.main(["--plan", "--lora", "--model", LARGE["2b"], "--card", "RTX 4090"]) == 0
    found = re.findall(r"([+-][\d.]+) GiB  (.*?)  +(--.*?)  .*work ([+-]\d+) %", capsys.readouterr().out)
    assert [row[1:] for row in found] == [  # a forward that is not done again: 1 of 4 parts of the work, for LoRA
        ("one more clip a step", "--batch-size 2", "+100"), ("no gradient checkpointing", "--no-gradient-checkpointing", "-26"),
    ]  # fmt: skip
    assert 0 < float(found[0][0]) < float(found[1][0])
    turned, _ = plan.resolve_plan(cl.Config(model=LARGE["2b"], offload_activations=True))
    assert plan.spending(turned)[0][1] == {"gradient_checkpointing": False, "offload_activations": False}


def test_a_fault_of_the_program_itself_is_not_blamed_on_a_folder(monkeypatch):
    monkeypatch.setattr(plan, "FEW_BLOCKS", "few")
    with pytest.raises(TypeError):
        plan.plan(cl.Config(model=str(NANO)))


KNOBS = {  # configuration -> a knob that it is offered, and its options
    "checkpointing": (dict(gradient_checkpointing=False), dict(gradient_checkpointing=True)),
    "fewer clips in memory": (dict(batch_size=4), dict(micro_batch_size=1)),
    "still fewer": (dict(batch_size=8, micro_batch_size=4), dict(micro_batch_size=1)),
    "fewer clips a step": (dict(method="full", batch_size=4, fused_backward=True), dict(batch_size=1, micro_batch_size=None)),
    "8-bit states": (dict(), dict(optimizer="adamw8bit")),
    "4-bit base": (dict(), dict(method="qlora")),
    "4-bit T5": (dict(), dict(quantize_text_encoder="4bit")),
    "activations on the host": (dict(gradient_checkpointing=True), dict(offload_activations=True)),
    "bf16 weights": (dict(method="full", trained_dtype="float32"), dict(trained_dtype="bfloat16")),
    "fewer frames": (dict(frames=49), dict(frames=25)),
    "smaller clips": (dict(height=480, width=720), dict(height=320, width=480)),
}  # fmt: skip


@pytest.mark.parametrize("case", KNOBS)
def test_the_knobs_that_could_help_are_offered_and_those_turned_already_are_not(case):
    fields, turns = KNOBS[case]
    config, _ = plan.resolve_plan(cl.Config(model=LARGE["5b"], **{"frames": 49, "height": 480, "width": 720, **fields}))
    assert turns in [changes for _, changes in plan.knobs(config)]
    turned = plan.resolve_plan(plan.changed(config, **turns))[0]
    if not {"frames", "height"} & turns.keys():
        assert turns not in [changes for _, changes in plan.knobs(turned)]


def test_beside_a_plan_that_only_just_fits_stands_one_with_room_to_spare(capsys, monkeypatch):
    planned_with = planned_by(training=lambda changed: 20 - 1 * ("frames" in changed))
    monkeypatch.setattr(plan, "planner", lambda *_: planned_with)
    for vram, *told in (
        (22.0, "fits in 22 GiB: 20.0 needed, by training\n", "this fits, with 20.0 GiB:\n"),
        (20.8, "fits in 20.8 GiB: 20.0 needed, by training; tight", "this fits, with 20.0 GiB; tight", "room to spare, with 19.0 GiB"),
        (19.5, "does not fit in 19.5 GiB: 20.0 needed, by training\n", "this fits, with 19.0 GiB; tight"),
        (18.0, "does not fit in 18 GiB: 20.0 needed, by training\n", "nothing found that fits in 18 GiB"),
    ):  # fmt: skip
        assert cl.main(["--plan", "--lora", "--card", "H100", "--vram", str(vram)]) == 0
        printed = capsys.readouterr().out
        assert all(words in printed for words in told)
        assert ("room to spare" in printed) == (len(told) == 3)


def test_clips_are_not_made_shorter_than_another_change_needs():
    """17 frames would not do by themselves, and need not become 9 once clips are smaller."""
    planned_with = planned_by(
        training=lambda changed: 30 - 0.1 * (49 - changed.get("frames", 49)) - 10 * ("height" in changed)
    )
    changes, found = plan.fitting(planned_with, 17)
    assert changes["frames"] == 17 and found.peak_gib == pytest.approx(16.8)


def test_full_fine_tuning_is_tried_on_one_clip_before_it_is_given_up():
    for fields in (dict(micro_batch_size=1), dict(fused_backward=False)):
        config, _ = plan.resolve_plan(cl.Config(method="full", model=LARGE["5b"], batch_size=4, **fields))
        offered = [changes for _, changes in plan.knobs(config)]
        one = {"batch_size": 1, "micro_batch_size": None, "fused_backward": True}
        assert offered.index(one) < offered.index({"method": "qlora"})
        assert plan.resolve_plan(plan.changed(config, **one))[0].fused_backward


def test_adapters_do_not_take_the_rate_of_full_fine_tuning():
    asked = cl.Config(method="full", lr=1e-5)
    assert plan.changed(asked, method="qlora").lr is None
    assert plan.changed(cl.Config(method="lora", lr=1e-3), method="qlora").lr == 1e-3


def test_options_are_spelled_as_the_command_line_takes_them():
    fields = dict(
        method="qlora", frames=17, compile=False, fused_backward=True, validation_prompts=["a red spider", "kumo"]
    )
    given = cl.parser().parse_args(shlex.split(plan.as_options(fields)))
    assert fields.items() <= vars(given).items()


def test_the_command_prints_what_is_shown_of_it(capsys):
    command, shown = (ROOT / "tests/plan_printed.txt").read_text().split("\n", 1)
    assert cl.main(shlex.split(command.removeprefix("$ python cogvideo_lite.py "))) == 0
    assert capsys.readouterr().out.strip() == shown.strip()


def test_without_a_card_the_time_here_stands_beside_that_on_a_usual_one(capsys, monkeypatch):
    monkeypatch.setattr(plan, "knobs", lambda *_: [])
    monkeypatch.setattr(plan, "spending", lambda *_: [])
    monkeypatch.setattr(plan, "measured_rate", lambda *_: 1e11)
    assert cl.main(["--plan", "--lora", "--model", LARGE["2b"]]) == 0
    printed = re.sub(r"(?<=\d),(?=\d{3})", "", capsys.readouterr().out)
    flops = float(re.search(r"estimated: (\S+) FLOP", printed)[1])
    here, there = (
        float(re.search(r"a step, (\S+) s at least", printed)[1]),
        float(re.search(r"RTX 4090 (\S+) s a step", printed)[1]),
    )
    assert (here, there) == (pytest.approx(flops / 1e11, rel=0.01), pytest.approx(flops / (0.35 * 165e12), rel=0.01))
    assert "24 GB card" in printed


def test_the_command_prints_the_plan_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "spending", lambda *_: [])
    monkeypatch.chdir(tmp_path)
    assert cl.main(["--plan", "--lora", "--vram", "24", "--card", "RTX 4090"]) == 0
    printed = capsys.readouterr().out
    for words in ("saved activations", "fits in 24 GiB", "time, estimated", "what would change the peak"):
        assert words in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_step_on_any_batch_follows_from_those_on_two_and_three(rehearsed, method):
    from bench_plan import at_batch

    ledgers = {batch: rehearsed("2b", 2, method=method, batch_size=batch) for batch in (2, 3, 7)}
    found = at_batch(ledgers[2], ledgers[3], 7)
    assert found.events and found.step_flops() == ledgers[7].step_flops()
    assert found.split("training") == ledgers[7].split("training")


@pytest.mark.parametrize("most", [0, 1, 6, 64, 200])
def test_the_largest_batch_is_found(most):
    from bench_plan import largest

    assert largest(lambda batch: batch / 2, most / 2) == most


@pytest.mark.parametrize("field, value", [
    ("model", "3b"), ("method", "qlora"), ("rank", ""), ("batch", "0"), ("optimizer", "came"), ("offload", "disk"),
    ("weights_dtype", "int8"), ("grad_checkpointing", ""), ("train_gib", "OOM"), ("train_gib", "nan"), ("frames", "48"),
    ("height", "481"), ("kind", "rumour"), ("before_gib", "some"),
])  # fmt: skip
def test_rows_with_values_that_are_not_known_are_left_out_by_name(field, value):
    from bench_plan import left_out

    with open(ROOT / "tests/published_memory.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert left_out(row) is None
    told = left_out({**row, field: value})
    assert told and value in told


def test_rows_may_be_written_as_people_write_them(tmp_path):
    from bench_plan import left_out, read_rows

    row = next(csv.DictReader((ROOT / "tests/published_memory.csv").open(newline="")))
    other = {
        **row,
        "method": "LoRA",
        "optimizer": "AdamW",
        "grad_checkpointing": "No",
        "offload": "",
        "weights_dtype": "BF16",
    }
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, other)
        writer.writeheader()
        writer.writerow(other)
    assert read_rows(tmp_path / "rows.csv") == [row] and left_out(row) is None


@pytest.mark.parametrize("text, words", [(None, "cannot be read"), ("model,rank\n2b,16\n", "columns method")])
def test_a_file_of_rows_that_cannot_be_used_is_refused_in_one_line(text, words, tmp_path, monkeypatch):
    import bench_plan

    if text:
        (tmp_path / "rows.csv").write_text(text)
    monkeypatch.setattr(sys, "argv", ["bench_plan.py", "--rows", str(tmp_path / "rows.csv")])
    with pytest.raises(SystemExit, match=words) as ended:
        bench_plan.main()
    assert len(str(ended.value).splitlines()) == 1


def test_rows_of_a_file_are_compared_and_summed_up_in_a_last_line_of_json(tmp_path, monkeypatch, capsys):
    """Only rows of kind `peak` count: here one that is 10 % off, and one of each other kind that is far off."""
    import bench_plan

    with open(ROOT / "tests/published_memory.csv", newline="") as file:
        rows = {row["kind"]: row for row in csv.DictReader(file)}
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows["peak"].keys())
        writer.writeheader()
        writer.writerows(rows.values())
    monkeypatch.setattr(bench_plan, "foreign_run", lambda row: (1.0, 1.1 * float(row["train_gib"]), 1e3))
    monkeypatch.setattr(sys, "argv", ["bench_plan.py", "--rows", str(tmp_path / "rows.csv")])
    bench_plan.main()
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {"median_error": pytest.approx(0.1), "worst_error": pytest.approx(0.1), "rows": 1,
                                     "median_error_of_the_other_step": pytest.approx(1e3 / float(rows["peak"]["train_gib"]) - 1),
                                     "worst_error_of_the_other_step": pytest.approx(1e3 / float(rows["peak"]["train_gib"]) - 1),
                                     "peaks_left_out": 0}  # fmt: skip
    assert len(rows) == 4 and sum("broken" in line for line in lines) == 1


def measured_on_a_card():
    return list(csv.DictReader(open(ROOT / "tests/measured_gpu.csv")))


@pytest.mark.parametrize("row", [
    "2b-lora", "5b-qlora", "2b-full,gradient_checkpointing=False,cap=0", "1.5-lora,frames=49,height=768,width=1360",
])  # fmt: skip
def test_memory_is_as_was_measured_on_a_card(row):
    _, planned = bench_gpu.prediction(row)
    for phase in ("training", "sampling"):
        (found,) = [f for f in measured_on_a_card() if (f["row"], f["phase"]) == (row, phase)]
        allocated, reserved, context = (float(found[f"{what}_gib"]) for what in ("allocated", "reserved", "context"))
        assert sum(planned.phases[phase][kind] for kind in plan.KINDS) == pytest.approx(allocated, rel=0.03)
        # As the plan is told: what is too low by more than a card that is called tight has to spare would break.
        assert 1 - plan.TIGHT < planned.needs_gib[phase] / (reserved + context) < 1.03


# --------------------------------------------------------------------------------------------------- several processes


def test_each_of_several_cards_holds_its_share_of_what_is_spread_over_them(midsize):
    def parts(processes, **fields):
        config = cl.Config(method="full", model=str(midsize), optimizer="adamw", **fields)
        return plan.plan(config, card=False, processes=processes).phases["training"]

    for fields in (dict(), dict(trained_dtype="bfloat16", fused_backward=True)):
        one, two, four = parts(1, **fields), parts(2, shard=True, **fields), parts(4, shard=True, **fields)
        for kind in ("weights", "optimizer"):
            assert two[kind] == pytest.approx(one[kind] / 2, rel=0.02)
            assert four[kind] == pytest.approx(one[kind] / 4, rel=0.04)
    more = parts(2)["gradients"] - parts(1)["gradients"]
    assert more == pytest.approx(2 * parts(1)["weights"], rel=0.02)  # DDP's buckets


def test_the_plan_of_several_cards_says_how_they_share_and_how_to_start(capsys, monkeypatch):
    for name in ("knobs", "spending"):
        monkeypatch.setattr(plan, name, lambda *_: [])
    fields = dict(method="full", model=str(NANO), shard=True)
    plan.plan_command(cl.Config(**fields), vram=24.0, processes=2)
    told = capsys.readouterr().out
    assert "2 processes, each with a card: each holds some rows" in told
    assert f"torchrun --nproc_per_node 2 cogvideo_lite.py --full --model {NANO}" in told and "--shard" in told
    with pytest.raises(cl.UserError, match="--processes 0: must be at least 1"):
        plan.plan_command(cl.Config(**fields), processes=0)
    with pytest.raises(cl.UserError, match="--plan: knows --shard, but not"):
        plan.plan_command(cl.Config(method="full", deepspeed="zero2"))
