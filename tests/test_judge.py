"""The verdict on a run: its samples beside the base's of the same prompts and seeds, and what the frozen base says of
them. The truth is diffusers' own pipeline and scheduler, closed forms, and clips changed on purpose."""

import dataclasses
import json
import math
from statistics import geometric_mean

import cv2
import distortion
import judge
import judges
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from conftest import ROOT
from safetensors.torch import load_file

import cogvideo_lite as cl


def loss_by_diffusers(folder, latents, prompts):
    """The base's mean loss on latents at the critic's timesteps, by diffusers' own scheduler, pipeline and transformer."""
    from diffusers import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(folder)
    length = cl.find_base(str(folder)).text_length
    losses = torch.zeros(len(latents))
    with torch.no_grad():
        for k, (clip, prompt) in enumerate(zip(latents, prompts)):
            embeds = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=length)[0]
            rotary = None
            if pipe.transformer.config.use_rotary_positional_embeddings:
                rotary = pipe._prepare_rotary_positional_embeddings(32, 32, clip.shape[0], torch.device("cpu"))
            for t in cl.CRITIC_TIMESTEPS:
                noise = torch.randn(clip.shape, generator=cl.keyed_generator("drawn", "noise", t))[None]
                at = torch.tensor([t])
                noisy = pipe.scheduler.add_noise(clip[None], noise, at)
                out = pipe.transformer(noisy, embeds, at, image_rotary_emb=rotary, return_dict=False)[0]
                losses[k] += (out - pipe.scheduler.get_velocity(clip[None], noise, at)).square().mean()
    return (losses / len(cl.CRITIC_TIMESTEPS)).tolist()


@pytest.mark.parametrize("method, family", [("lora", "2b"), ("full", "5b"), ("lora", "1.5")])
def test_the_base_says_of_samples_what_diffusers_own_parts_say(quick, method, family):
    """The losses are the base's, with the adapter off or the trained weights gone, on the latents that files keep."""
    config = quick(family, method=method, lr=0.05, steps=3, warmup=0, validation_prompts=["a", "b"])
    run = cl.train(config)
    told = json.loads((run.folder / "samples/base_losses.json").read_text())
    assert told["timesteps"] == list(cl.CRITIC_TIMESTEPS)
    prompts = list(cl.sampled_prompts(run.folder))
    for when in ("before", "after"):
        latents = load_file(run.folder / f"samples/{when}.safetensors")["latents"]
        assert told[when] == pytest.approx(loss_by_diffusers(config.model, latents, prompts), rel=1e-4)
    assert told["before"] != told["after"]


def test_latents_that_are_kept_are_those_the_stock_pipeline_draws(quick):
    from diffusers import CogVideoXPipeline

    config = quick("5b", lr=0.05, steps=3, warmup=0)
    run = cl.train(config)
    pipe = CogVideoXPipeline.from_pretrained(config.model)
    pipe.load_lora_weights(run.folder)
    (prompt,) = cl.sampled_prompts(run.folder)
    drawn = pipe(
        prompt, num_frames=run.config.frames, height=run.config.height, width=run.config.width, output_type="latent",
        num_inference_steps=run.config.sampling_steps, guidance_scale=run.config.guidance_scale,
        max_sequence_length=cl.find_base(config.model).text_length, generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    torch.testing.assert_close(
        drawn, load_file(run.folder / "samples/after.safetensors")["latents"], rtol=1e-3, atol=1e-3
    )


def test_the_base_draws_two_sets_whose_seeds_differ(quick):
    run = cl.train(quick(steps=1))
    drawn = {when: load_file(run.folder / f"samples/{when}.safetensors")["latents"] for when in cl.SAMPLED}
    assert not torch.equal(drawn["before"], drawn["again"])
    assert all((run.folder / f"samples/{when}-0.mp4").exists() for when in ("before", "again", "after"))


def test_samples_on_the_way_leave_the_training_as_it_was(quick, tmp_path):
    """--sample-every draws clips, and for an adapter adds the strangeness that the end would have."""
    plain, watched = (cl.train(quick(out=str(tmp_path / str(n)), steps=4, sample_every=n)) for n in (None, 2))
    weights = [load_file(run.folder / "pytorch_lora_weights.safetensors") for run in (plain, watched)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [m["step"] for m in watched.metrics if "strangeness" in m] == [2, 4]
    assert (watched.folder / "samples/step-2-0.mp4").exists()
    told = json.loads((watched.folder / "samples/base_losses.json").read_text())
    times = geometric_mean(told["after"]) / geometric_mean(told["before"])
    assert watched.metrics[-1]["strangeness"] == pytest.approx(times, rel=1e-5)
    full = cl.train(quick(out=str(tmp_path / "full"), method="full", steps=2, sample_every=1))
    assert (full.folder / "samples/step-1-0.mp4").exists() and not [m for m in full.metrics if "strangeness" in m]


# ---------------------------------------------------------------------------------------------------------- the numbers


def test_strangeness_is_a_ratio_of_geometric_means():
    losses = {"before": [0.01, 0.04], "after": [0.04, 0.09], "heldout": [0.03]}
    assert judge.strangeness(losses) == pytest.approx((0.06 / 0.02, 0.03 / 0.02))


def row(before, again, after):
    return {when: dict.fromkeys(judge.PARTS, x) for when, x in zip(judge.JUDGED, (before, again, after))}


def test_a_change_is_in_units_of_how_much_the_bases_own_samples_differ():
    """Two samples of one distribution differ by the root of 2 times its standard deviation, in root mean square."""
    changed = judge.changes([row(1.0, 1.2, 2.0), row(3.0, 2.8, 3.0)])
    unit = 0.2 / math.sqrt(2)
    assert all(values == pytest.approx([1.0 / unit, 0.0]) for values in changed.values())
    rng = np.random.default_rng(0)
    rows = [row(*(5 + 0.5 * rng.standard_normal(3))) for _ in range(4000)]
    assert np.std(judge.changes(rows)["shape"]) == pytest.approx(math.sqrt(2), rel=0.05)


def test_what_hardly_varies_among_the_bases_samples_does_not_blow_up_a_change():
    assert judge.changes([row(1.0, 1.0, 1.1)] * 4)["texture"] == pytest.approx([0.1 / judge.LEAST_SPREAD] * 4)


def test_the_verdict_comes_first_and_names_the_parts_that_are_worse(tmp_path):
    rows = [row(1.0, 1.1, 1.05)] * 4
    for k in range(4):
        rows[k] = {**rows[k], "after": {**rows[k]["after"], "texture": 3.0}}
    (tmp_path / "samples").mkdir()
    for times, word in ((1.0, "sound"), (9.0, "RUINED")):
        losses = {"before": [0.02], "after": [0.02 * times], "heldout": [0.05]}
        (tmp_path / "samples/base_losses.json").write_text(json.dumps(losses))
        summary = judge.compared_with_base(rows, tmp_path, {})
        first, second = judge.verdict(summary)
        assert first.startswith(f"verdict: {word}.") and summary["ruined"] == (word == "RUINED")
        assert second == "of 4 prompts, worse than the base's: grounds in 4"
    assert judge.verdict(judge.compared_with_base([row(1.0, 1.1, 1.0)] * 3, tmp_path, {}))[1] == (
        "no worse than the base's in 3 prompts"
    )


def test_a_coefficient_at_equal_values_of_itself_is_no_number():
    """It was one of rounding errors, another on each processor. Elsewhere it is the textbook's, of three coefficients."""
    x, y, z = np.random.default_rng(0).normal(size=(3, 40))
    y, z = y + x, z + 2 * x
    assert math.isnan(judges.partial_spearman(x, y, z, x))
    xy, xz, yz = (spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    closed = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    assert judges.partial_spearman(x, y, z) == pytest.approx(closed)


def test_a_score_that_does_not_notice_bent_clips_says_so_itself():
    """Real clips of the bundled world are told from bent ones; clouds that come and go are not, and the run's own lines say that."""
    clips = [clip.video.numpy() for clip in cl.read_clips("data_samples/spider")[:12]]
    assert distortion.noticed(clips[:4], distortion.reference_statistics(clips)) >= judge.NOTICED
    rng = np.random.default_rng(0)
    frames = [cv2.GaussianBlur(rng.random((32, 32, 3), dtype=np.float32), (0, 0), 4) for _ in range(40)]
    clouds = list(2 * np.stack(frames).reshape(8, 5, 32, 32, 3).transpose(0, 1, 4, 2, 3) - 0.5)
    noticed = distortion.noticed(clouds[:4], distortion.reference_statistics(clouds))
    reference = dataclasses.replace(distortion.reference_statistics(clouds), noticed=noticed)
    assert noticed < judge.NOTICED
    (line,) = judge.verdict(judge.compared_with_base([], ROOT / "nowhere", {"a": reference}))
    assert "cannot be relied on" in line and f"{noticed:.0%}" in line


def test_a_judged_run_prints_the_verdict_and_keeps_it(quick, capsys):
    config = quick(validation_prompts=["a", "b"])
    run = judge.judge(cl.train(config).folder)
    assert judge.report(run)[0].startswith("verdict: ")
    assert run.summary == cl.load_run(run.folder).summary
    assert run.summary["compared_prompts"] == 2 and 0 <= run.summary["worse_texture"] <= 2
    assert "strangeness to the base" in (run.folder / "README.md").read_text()


def test_a_run_without_second_samples_of_the_base_is_judged_as_before(quick):
    """Runs of earlier versions have neither `again` nor the base's losses."""
    folder = cl.train(quick()).folder
    for file in [*folder.glob("samples/again*"), folder / "samples/base_losses.json"]:
        file.unlink()
    run = judge.judge(folder)
    assert "distortion_after" in run.summary and "ruined" not in run.summary and "compared_prompts" not in run.summary
