"""Runs from clips on disk to an adapter on disk: what they write, that they learn, resume, and load in stock diffusers."""

import json
import re

import pytest
import torch
from conftest import FAMILIES
from diffusers import CogVideoXPipeline
from safetensors.torch import load_file

import cogvideo_lite as cl
import judge

ADAPTER = "pytorch_lora_weights.safetensors"


def same_adapter(a, b):
    """Whether two runs ended with the same bits. (Files are not compared: safetensors writes its metadata in any order.)"""
    first, second = (load_file(str(run.folder / ADAPTER)) for run in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_trains_from_clips_to_adapter(quick, family):
    run = cl.train(quick(family))
    summary = json.loads((run.folder / "summary.json").read_text())
    trained = {
        "steps", "loss_first", "loss_last", "heldout_before", "heldout_after", "seconds", "steps_per_s", "peak_memory_gib",
        "processes",
    }  # fmt: skip
    assert set(summary) == trained
    names = ("distortion", "speed", "sharpness", "saturation", "grid")
    judged = {f"{name}_{when}" for name in names for when in ("before", "after")}
    judged |= {"strangeness", "strangeness_of_real", "ruined", "compared_prompts", "distortion_noticed"}
    judged |= {f"{what}_{part}" for what in ("worse", "change") for part in judge.PARTS}
    assert set(judge.judge(run.folder).summary) == trained | judged
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert all({"loss", "lr", "grad_norm", "update_ratio", "changed_share", "step_s"} <= set(r) for r in rows)
    assert [r["step"] for r in rows if "heldout_loss" in r] == [2, 4]
    for name in ("config.json", "README.md", ADAPTER, "checkpoint-4", "samples/before-0.mp4", "samples/after-0.mp4",
                 "samples/contact_sheet.png", "samples/before_and_after.png"):  # fmt: skip
        assert (run.folder / name).exists(), name
    assert not list(run.folder.rglob("*.partial"))


def test_training_lowers_the_loss_on_what_it_trains_on_and_only_the_adapter_moves(quick):
    run = cl.train(quick(steps=60, checkpoint_every=60, caption_dropout=0.0))
    assert run.summary["loss_last"] < 0.9 * run.summary["loss_first"]
    base = cl.find_base(run.config.model).load("transformer", torch.float32)
    names = {name for name, _ in base.named_parameters()}
    assert not names & {k.removeprefix("transformer.") for k in load_file(str(run.folder / ADAPTER))}


def test_a_resumed_run_is_bitwise_the_unbroken_one(quick, tmp_path):
    whole = cl.train(quick(steps=6, out=str(tmp_path / "whole")))
    broken = quick(steps=6, out=str(tmp_path / "broken"))

    class Stop(Exception):
        pass

    def stop(metrics):
        if metrics["step"] == 5:  # past the checkpoint of step 4
            raise Stop

    with pytest.raises(Stop):
        cl.train(broken, callbacks=[stop])
    assert len((tmp_path / "broken/metrics.jsonl").read_text().splitlines()) == 5
    broken.resume = True
    resumed = cl.train(broken)
    assert not cl.load_config(resumed.folder / "config.json").resume  # repeating it starts anew
    assert same_adapter(whole, resumed)
    ours, theirs = ([(m["step"], m["loss"], m["grad_norm"]) for m in r.metrics] for r in (whole, resumed))
    assert ours == theirs


def test_resume_without_a_checkpoint_starts_from_the_beginning_and_says_so(quick, capsys):
    config = quick(resume=True)
    assert cl.train(config).summary["steps"] == 4
    assert "no complete checkpoint" in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_step_and_says_how_to_go_on(quick):
    def stop(metrics):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(cl.RunError, match="stopped at step 3; go on with --lora --resume --out"):
        cl.train(quick(), callbacks=[stop])
    assert [p.name for p in cl.checkpoints(quick().out)] == ["checkpoint-2", "checkpoint-3"]


def test_old_checkpoints_are_removed_past_the_limit_and_torn_ones_are_not_resumed_from(quick, tmp_path):
    run = cl.train(quick(steps=6, checkpoints_limit=2))
    assert [p.name for p in cl.checkpoints(run.folder)] == ["checkpoint-4", "checkpoint-6"]
    (run.folder / "checkpoint-9.partial").mkdir()
    (run.folder / "checkpoint-8").mkdir()
    assert [p.name for p in cl.checkpoints(run.folder)] == ["checkpoint-4", "checkpoint-6"]


def test_a_batch_in_small_pieces_gives_the_same_training(quick, tmp_path):
    whole = cl.train(quick(batch_size=4, out=str(tmp_path / "a")))
    pieces = cl.train(quick(batch_size=4, micro_batch_size=1, out=str(tmp_path / "b")))
    for a, b in zip(whole.metrics, pieces.metrics):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_gradient_checkpointing_changes_memory_not_numbers(quick, tmp_path):
    plain = cl.train(quick(gradient_checkpointing=False, out=str(tmp_path / "a")))
    recomputed = cl.train(quick(gradient_checkpointing=True, out=str(tmp_path / "b")))
    assert [m["loss"] for m in plain.metrics] == pytest.approx([m["loss"] for m in recomputed.metrics], rel=1e-5)


def test_the_model_is_untouched_before_the_first_step(quick, monkeypatch):
    """B starts at zero, so the samples before training are the base's own."""
    drawn, save = {}, cl.save_samples

    def keep(folder, when, clips, *rest):
        drawn[when] = clips
        save(folder, when, clips, *rest)

    monkeypatch.setattr(cl, "save_samples", keep)
    run = cl.train(quick(steps=2))
    base = cl.sample(run.config.model, ["a red spider"], seed=0, sampling_steps=2, guidance_scale=3.0)
    torch.testing.assert_close(drawn["before"], base)
    assert (drawn["after"][0] - base[0]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [1.0, 8.0])
def test_stock_diffusers_with_the_adapter_gives_our_samples_pixel_for_pixel(quick, family, alpha):
    run = cl.train(quick(family, rank=4, alpha=alpha, lr=0.05, steps=3, checkpoint_every=3))
    ours = cl.sample(run.folder, ["a red spider", "a blue fish"], seed=7)
    base = cl.find_base(run.config.model)
    pipe = CogVideoXPipeline.from_pretrained(run.config.model)
    call = dict(
        prompt=["a red spider", "a blue fish"], num_frames=9, height=32, width=32, num_inference_steps=2, guidance_scale=3.0,
        max_sequence_length=base.text_length, output_type="pt",
    )  # fmt: skip
    noise = lambda: [torch.Generator().manual_seed(7 + k) for k in range(2)]  # noqa: E731
    untrained = pipe(**call, generator=noise()).frames
    pipe.load_lora_weights(str(run.folder))
    assert pipe.transformer.peft_config["default_0"].lora_alpha == alpha
    stock = pipe(**call, generator=noise()).frames
    torch.testing.assert_close(torch.stack(ours), stock.float(), atol=1e-5, rtol=0)
    assert (stock - untrained).abs().max() > 1e-3  # the adapter does something, so equality means something


def test_prompts_and_data_order_follow_the_seed(quick):
    config, base, _ = cl.resolve(quick())
    cache = cl.cache_clips(config)
    order = lambda seed: [  # noqa: E731
        cache.train.index(cl.Samples(quick(seed=seed), base, cache, 1000).clip_at(n))
        for n in range(3 * len(cache.train))
    ]
    n = len(cache.train)
    assert order(0) == order(0) != order(1)
    assert all(sorted(order(0)[k : k + n]) == list(range(n)) for k in (0, n, 2 * n))  # each clip once an epoch


def test_caption_dropout_gives_the_empty_prompt_to_its_share_of_samples(quick):
    config, base, _ = cl.resolve(quick(caption_dropout=0.3))
    samples = cl.Samples(config, base, cl.cache_clips(config), 1000)
    dropped = sum(bool((samples.training(n)["prompt_embeds"] == samples.empty).all()) for n in range(300))
    assert 60 <= dropped <= 120  # 90 expected, four standard deviations either way


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_code_of_a_runs_card_runs_as_it_stands(quick, method, monkeypatch):
    prompt = """a "red" spider's web \\ at {night}\nover sand"""
    run = cl.train(quick(method=method, validation_prompts=[prompt], lr=1e-3))
    code = re.search(r"(?s)```python\n(.*?)```", (run.folder / "README.md").read_text())[1]
    monkeypatch.chdir(run.folder)
    names = {}
    exec(code, names)
    assert len(names["clip"]) == run.config.frames and names["clip"][0].size == (run.config.width, run.config.height)
    assert eval(re.search(r"pipe\((.*), num_frames", code)[1]) == prompt


def test_a_loss_that_is_not_finite_stops_the_run_with_one_line(quick):
    with pytest.raises(cl.RunError, match="the loss is (nan|inf)"):
        cl.train(quick(lr=1e30, max_grad_norm=1e30, steps=8))


def test_a_run_that_was_stopped_at_the_step_where_it_is_told_to_end_is_finished(quick):
    def stop(metrics):
        if metrics["step"] == 3:  # between two checkpoints, so without a held-out loss
            raise KeyboardInterrupt

    with pytest.raises(cl.RunError, match="stopped at step 3"):
        cl.train(quick(), callbacks=[stop])
    run = cl.train(quick(steps=3, resume=True))
    assert run.summary["steps"] == 3 and run.summary["heldout_after"] > 0


def test_a_configuration_file_repeats_the_run(quick, tmp_path):
    first = cl.train(quick())
    again = cl.load_config(first.folder / "config.json", out=str(tmp_path / "again"))
    second = cl.train(again)
    assert same_adapter(first, second)


def test_the_heldout_loss_is_watched_early_and_ever_more_seldom():
    assert sorted(cl.WATCHED_STEPS)[:6] == [50, 100, 200, 400, 800, 1600]


@pytest.mark.parametrize("lr, alarmed", [(2e-2, True), (1e-4, False)])
@pytest.mark.parametrize("stops", [False, True])
def test_a_run_that_gets_worse_than_its_base_warns_and_ends_if_asked_to(
    nano_cache, tmp_path, capsys, lr, alarmed, stops
):
    config = cl.Config(
        method="full", lr=lr, steps=52, warmup=1, batch_size=1, checkpoint_every=40, cache=nano_cache, sampling_steps=2,
        out=str(tmp_path / "run"), validation_prompts=["a red spider"], stop_on_distortion=stops,
    )  # fmt: skip
    if alarmed and stops:
        with pytest.raises(cl.RunError, match=r"^step 50: the loss on 4 held-out clips is .*lower --lr \(now 0.02\)"):
            cl.train(config)
        assert [p.name for p in cl.checkpoints(config.out)] == ["checkpoint-40"]
    else:
        assert cl.train(config).summary["steps"] == 52
        assert ("warning: step 50" in capsys.readouterr().out) == alarmed
    first, *rest = cl.read_metrics(tmp_path / "run/metrics.jsonl")
    watched = [m["watched_loss"] for m in rest if "watched_loss" in m]
    assert len(watched) == 1 and (watched[0] > first["watched_before"]) == alarmed


def test_a_resumed_run_is_still_watched_against_the_untrained_base(quick):
    begun = cl.train(quick(steps=4)).metrics[0]
    resumed = cl.train(quick(steps=50, checkpoint_every=50, resume=True)).metrics
    assert resumed[0]["watched_before"] == begun["watched_before"] and "watched_loss" in resumed[49]
