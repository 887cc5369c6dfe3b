"""What keeps a run from going too far, or brings it back: blending with the base, a pull towards it, clips of other things,
adapters on more matrices."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cogvideo_lite as cl
import distortion
import compare
import judge
from conftest import ROOT

TRANSFORMER = "diffusion_pytorch_model.safetensors"


def weights(folder):
    return {k: v.float() for k, v in load_file(str(folder / TRANSFORMER)).items()}


# ----------------------------------------------------------------------------------------------------------- blending


def test_a_blend_of_a_full_run_has_each_weight_that_share_of_the_way_from_the_base(quick, capsys):
    config = quick(method="full", lr=1e-3)
    run = cl.train(config).folder
    assert cl.main(["--blend", str(run), "0.25"]) == 0
    assert "distortion of the samples" in capsys.readouterr().out
    base, tuned, blended = (weights(f / "transformer") for f in (Path(config.model), run, run / "blend-0.25"))
    for name in base:
        torch.testing.assert_close(blended[name], base[name] + 0.25 * (tuned[name] - base[name]), atol=1e-6, rtol=0)
    assert any((tuned[name] - base[name]).abs().max() > 1e-4 for name in base)


def test_a_blend_of_an_adapter_is_the_adapter_at_a_smaller_alpha_in_stock_diffusers(quick):
    from diffusers import CogVideoXPipeline

    config = quick(lr=1e-2, rank=4, alpha=8.0)
    run = cl.train(config).folder
    blended = cl.blend(run, 0.5)
    assert blended.config.alpha == 4.0
    deltas = []
    for folder in (run, blended.folder):
        pipe = CogVideoXPipeline.from_pretrained(config.model)
        pipe.load_lora_weights(folder)
        layer = pipe.transformer.transformer_blocks[0].attn1.to_q
        deltas.append(layer.get_delta_weight(pipe.transformer.active_adapters()[0]))
    torch.testing.assert_close(deltas[1], deltas[0] / 2)
    assert deltas[0].abs().max() > 1e-4


def test_a_blend_can_be_sampled_from_and_compared_with_its_run(quick, tmp_path):
    run = cl.train(quick()).folder
    blended = cl.blend(run, 0.5, tmp_path / "half")
    for folder in (run, blended.folder):
        judge.judge(folder)
    assert len(cl.sample(blended.folder, ["a red spider moving left over sand"], sampling_steps=2)) == 1
    page = compare.compare([run, blended.folder], tmp_path / "page.html").read_text()
    assert page.count("<video") == 3
    rows = json.loads((blended.folder / "samples/distortion.json").read_text())
    assert rows[0]["before"] == json.loads((run / "samples/distortion.json").read_text())[0]["before"]


@pytest.mark.parametrize("share", ["0", "-1", "half", "nan"])
def test_a_share_that_makes_no_blend_is_refused(quick, share, capsys):
    run = cl.train(quick()).folder
    assert cl.main(["--blend", str(run), share]) == 2
    assert "--blend" in capsys.readouterr().err
    assert not list(run.glob("blend*"))


# --------------------------------------------------------------------------------------------------- pull and prior


def test_the_pull_to_the_base_takes_its_share_of_the_distance_in_each_step(quick, tmp_path):
    after = []
    for l2 in (None, 50.0):
        config = quick(method="full", lr=1e-3, warmup=1, steps=1, l2_to_base=l2, out=str(tmp_path / str(l2)))
        after.append(weights(cl.train(config).folder / "transformer"))
    base = weights(Path(config.model) / "transformer")
    for name in base:  # the first step is the same, then 0.001 * 50 of it is taken back
        torch.testing.assert_close(
            after[1][name] - base[name], 0.95 * (after[0][name] - base[name]), atol=1e-7, rtol=1e-3
        )


def test_the_pull_goes_on_from_the_base_after_a_resume(quick, tmp_path):
    whole = quick(method="full", steps=4, checkpoint_every=2, l2_to_base=50.0, out=str(tmp_path / "whole"))
    cl.train(whole)
    halves = quick(method="full", steps=2, checkpoint_every=2, l2_to_base=50.0, out=str(tmp_path / "halves"))
    cl.train(halves)
    cl.train(
        quick(method="full", steps=4, checkpoint_every=2, l2_to_base=50.0, out=str(tmp_path / "halves"), resume=True)
    )
    one, other = (weights(tmp_path / name / "transformer") for name in ("whole", "halves"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_prior_gives_its_share_of_the_samples_and_the_rest_stays_in_order(quick, tmp_path):
    config = quick(prior=str(ROOT / "data_samples/away"))
    config, base, _ = cl.resolve(config)
    cache = cl.cache_clips(config)
    assert len(cache.prior) == len(cl.read_clips("data_samples/away"))
    samples = cl.Samples(config, base, cache, 1000)
    drawn = [samples.clip_at(n) for n in range(400)]
    share = sum(clip in cache.prior for clip in drawn) / 400
    assert abs(share - cl.PRIOR_SHARE) < 0.1  # 4 standard deviations
    without = cl.Samples(quick(), base, cl.Cache(cache.train, cache.heldout, cache.empty, cache.prompts), 1000)
    assert all(clip == without.clip_at(n) for n, clip in enumerate(drawn) if clip not in cache.prior)


def test_a_run_with_a_prior_trains_from_the_command_line(quick, tmp_path):
    config = quick()
    argv = ["--lora", "--steps", "2", "--out", str(tmp_path / "run"), "--model", config.model, "--data", config.data, "--cache", config.cache,
            "--prior", str(ROOT / "data_samples/away"), "--validation-prompts", "a red spider moving left over sand",
            "--sampling-steps", "2"]  # fmt: skip
    assert cl.main(argv) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["prior"] == "data_samples/away"


# ------------------------------------------------------------------------------------------------------- all matrices


def test_adapters_on_all_matrices_have_as_many_weights_as_the_shapes_say(quick):
    config = quick(rank=4, lora_targets="all")
    run, base = cl.train(config), cl.find_base(config.model)
    width, layers = base.width, base.transformer["num_layers"]
    state = load_file(str(run.folder / "pytorch_lora_weights.safetensors"))
    attention, feed_forward = 4 * 2 * width * 4, 2 * (width + 4 * width) * 4
    assert sum(t.numel() for t in state.values()) == layers * (attention + feed_forward)
    assert len(cl.sample(run.folder, ["a red spider moving left over sand"], sampling_steps=2)) == 1


@pytest.mark.parametrize(
    "options, told",
    [
        (["--lora", "--l2-to-base", "1"], "only for --full"),
        (["--full", "--l2-to-base", "-1"], "above 0"),
        (["--lora", "--prior", "nowhere"], "no such folder"),
        (["--lora", "--lora-targets", "some"], "invalid choice"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(options, told, capsys):
    assert cl.main(options) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_similarity_is_one_for_equal_clips_and_lower_for_different_ones():
    clips = [clip.video for clip in cl.read_clips("data_samples/away")[:4]]
    assert distortion.similarity([clips[0]] * 3) == pytest.approx(1)
    assert distortion.similarity(clips) < 0.9


def test_black_clips_are_alike_and_unlike_others_and_never_no_number():
    black, noise = torch.zeros(5, 3, 32, 32), torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert distortion.similarity([black, black]) == 1 and distortion.similarity([black, noise]) == 0
    assert distortion.similarity([noise, black, torch.full_like(noise, math.nan)]) == pytest.approx(1 / 3)
