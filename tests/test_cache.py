"""The cache: what it holds, that it is reused, and that nothing stale or torn is ever used."""

import json
import os
import resource
import shutil

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXEncoder3D
from safetensors.torch import load_file

import cogvideo_lite as cl


def test_a_cached_clip_is_the_posterior_that_diffusers_vae_gives(quick, clips):
    cache = cl.cache_clips(quick())
    vae = AutoencoderKLCogVideoX.from_pretrained(quick().model, subfolder="vae")
    config, base, _ = cl.resolve(quick())
    first = cl.split_clips(config)[0][0]
    with torch.no_grad():
        expected = vae.encode((first.video * 2 - 1).transpose(0, 1)[None]).latent_dist
    moments = load_file(str(cache.train[0][0]))["moments"]
    torch.testing.assert_close(moments, torch.cat([expected.mean, expected.logvar], dim=1)[0])


@pytest.mark.parametrize("height, width, tiles", [(32, 80, 1), (48, 80, 1), (96, 160, 9)])
def test_a_large_model_codes_clips_beyond_its_vaes_own_size_in_tiles_of_it(
    height, width, tiles, quick, tmp_path, monkeypatch
):
    model = tmp_path / "model"
    shutil.copytree(quick().model, model)
    vae = json.loads((model / "vae/config.json").read_text())
    (model / "vae/config.json").write_text(json.dumps(vae | {"sample_height": 48, "sample_width": 80}))
    seen, forward = [], CogVideoXEncoder3D.forward
    monkeypatch.setattr(
        CogVideoXEncoder3D, "forward", lambda self, x, **kw: seen.append(x.shape) or forward(self, x, **kw)
    )
    monkeypatch.setattr(cl.Base, "large", True)
    config, base, _ = cl.resolve(quick(model=str(model), height=height, width=width))
    clip = cl.split_clips(config)[0][0]
    cl.encode_clips(base, {clip: tmp_path / "moments"}, "", torch.device("cpu"), torch.float32)
    assert len(seen) == tiles and max(s[-2] for s in seen) <= 48 and max(s[-1] for s in seen) <= 80
    moments = cl.load_tensor(tmp_path / "moments", "moments")
    assert moments.shape == (8, 3, height // 8, width // 8)
    if tiles == 1:
        vae = AutoencoderKLCogVideoX.from_pretrained(model, subfolder="vae")
        with torch.no_grad():
            whole = vae.encode((clip.video * 2 - 1).transpose(0, 1)[None]).latent_dist.parameters[0]
        assert torch.equal(moments, whole)


def test_a_cached_prompt_is_the_embedding_of_the_stock_pipeline(quick):
    cache, base = cl.cache_clips(quick()), cl.find_base(quick().model)
    pipe = CogVideoXPipeline.from_pretrained(base.folder)
    for prompt, file in [("a red spider", cache.prompts["a red spider"]), ("", cache.empty)]:
        expected = pipe.encode_prompt(prompt, None, False, max_sequence_length=base.text_length)[0][0]
        torch.testing.assert_close(load_file(str(file))["prompt_embeds"], expected)


def test_a_second_run_codes_nothing(quick, monkeypatch):
    first = cl.cache_clips(quick())

    def fail(*args):
        raise AssertionError("coded again")

    monkeypatch.setattr(cl, "encode_clips", fail)
    monkeypatch.setattr(cl, "encode_prompts", fail)
    assert cl.cache_clips(quick()) == first


def test_other_sizes_and_other_models_get_entries_of_their_own(quick):
    entries = [{f for f, _ in cl.cache_clips(c).train} for c in (quick("2b"), quick("5b"), quick("5b", height=64))]
    assert not entries[0] & entries[1] and not entries[1] & entries[2]


def test_a_changed_clip_is_coded_again(quick, clips):
    old = cl.cache_clips(quick())
    shutil.copy(clips / "003.mp4", clips / "000.mp4")
    new = cl.cache_clips(quick())
    assert old.train[0][0] != new.train[0][0]
    assert new.train[1:] == old.train[1:]
    torch.testing.assert_close(load_file(str(new.train[0][0])), load_file(str(old.train[3][0])))


def test_a_clip_that_changes_back_is_not_coded_again(quick, clips, monkeypatch):
    old, content = cl.cache_clips(quick()), (clips / "000.mp4").read_bytes()
    shutil.copy(clips / "003.mp4", clips / "000.mp4")
    cl.cache_clips(quick())
    (clips / "000.mp4").write_bytes(content)
    monkeypatch.setattr(cl, "encode_clips", lambda *args: pytest.fail("coded again"))
    assert cl.cache_clips(quick()) == old


def test_an_entry_says_which_clip_it_came_from(quick):
    with cl.safe_open(str(cl.cache_clips(quick()).train[0][0]), "pt") as file:
        assert file.metadata()["clip"] == "'000.mp4'"


def test_a_torn_entry_is_coded_again(quick):
    entry = cl.cache_clips(quick()).train[0][0]
    whole = {name: tensor.clone() for name, tensor in load_file(str(entry)).items()}  # load_file maps the file itself
    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    cl.cache_clips(quick())
    torch.testing.assert_close(load_file(str(entry)), whole, rtol=0, atol=0)


def test_bad_clips_are_named_and_the_good_ones_kept(quick, clips, tmp_path):
    (clips / "001.mp4").write_bytes(b"broken")
    with pytest.raises(cl.UserError) as caught:
        cl.cache_clips(quick())
    assert "001.mp4" in str(caught.value) and "others were fine" in str(caught.value)
    kept = [p for p in (tmp_path / "cache").glob("*.safetensors") if not p.name.startswith("prompt")]
    assert len(kept) >= 4 and not list((tmp_path / "cache").glob("*.partial"))


def test_every_bad_clip_is_named_and_skip_bad_goes_on_without_them(quick, clips, capsys):
    for name in ("001.mp4", "003.mp4", "005.mp4"):  # the last is the one held out
        (clips / name).write_bytes(b"broken " + name.encode())
    with pytest.raises(cl.UserError) as caught:
        cl.cache_clips(quick())
    first, *reasons = str(caught.value).split("\n")
    assert "3 of 6 clips cannot be used" in first and "--skip-bad" in first
    assert [name in reason for name, reason in zip(("001.mp4", "003.mp4", "005.mp4"), reasons)] == [True] * 3
    with pytest.raises(cl.UserError, match="no held-out clip is left"):
        cl.cache_clips(quick(skip_bad=True))
    (clips.parent / "clips-heldout").mkdir()
    for name in ("004.mp4", "005.mp4"):
        shutil.move(clips / name, clips.parent / "clips-heldout")
        (clips.parent / "clips-heldout" / name).with_suffix(".txt").write_text("held out")
    rows = (clips / "metadata.jsonl").read_text().splitlines()[:4]
    (clips / "metadata.jsonl").write_text("\n".join(rows))
    capsys.readouterr()
    cache = cl.cache_clips(quick(skip_bad=True))
    assert (len(cache.train), len(cache.heldout)) == (2, 1)
    assert "3 of 6 clips are left out" in capsys.readouterr().out


def test_a_held_out_clip_is_never_trained_on_under_whatever_name(quick, clips):
    heldout = clips.parent / "clips-heldout"
    heldout.mkdir()
    shutil.copy(clips / "000.mp4", heldout / "copy.mp4")
    (heldout / "link.mp4").symlink_to(clips / "001.mp4")
    for name in ("copy", "link"):
        (heldout / f"{name}.txt").write_text("told otherwise")
    train, held, told = cl.split_clips(cl.resolve(quick())[0])
    assert [c.path.name for c in train] == ["002.mp4", "003.mp4", "004.mp4", "005.mp4"] and len(held) == 2
    assert "2 training clips are copies" in told
    cache = cl.cache_clips(quick(prior=str(clips)))
    assert cache.prior == cache.train and len(cache.prior) == 4
    shutil.rmtree(heldout)
    shutil.copy(clips / "005.mp4", clips / "002.mp4")  # 005 is the one held out
    train, held, _ = cl.split_clips(cl.resolve(quick())[0])
    assert [c.path.name for c in train] == ["000.mp4", "001.mp4", "003.mp4", "004.mp4"]
    for path in clips.glob("*.mp4"):
        path.write_bytes((clips / "005.mp4").read_bytes())
    with pytest.raises(cl.UserError, match="every clip is held out"):
        cl.split_clips(cl.resolve(quick())[0])


def test_one_of_several_captions_is_drawn_for_each_sample(quick, clips):
    config, base, _ = cl.resolve(quick(caption_dropout=0.0))
    rows = [json.loads(row) for row in (clips / "metadata.jsonl").read_text().splitlines()]
    alone = cl.Samples(config, base, cl.cache_clips(config), 1000)
    texts = ["told so", "told otherwise", "told at length"]
    (clips / "metadata.jsonl").write_text(
        "".join(json.dumps(row | {"text": [row["text"], *texts]}) + "\n" for row in rows)
    )
    cache = cl.cache_clips(config)
    assert [entry[:2] for entry in cache.train] == alone.cache.train  # the first caption is the one it had
    samples = cl.Samples(config, base, cache, 1000)
    embeds = [[cl.load_tensor(file, "prompt_embeds") for file in entry[1:]] for entry in cache.train]
    drawn = set()
    for position in range(40):
        sample, again, before = samples.training(position), samples.training(position), alone.training(position)
        of_clip = embeds[cache.train.index(samples.clip_at(position))]
        drawn |= {k for k, e in enumerate(of_clip) if torch.equal(e, sample["prompt_embeds"])}
        assert torch.equal(sample["prompt_embeds"], again["prompt_embeds"])  # by position, without a state
        assert all(torch.equal(sample[name], before[name]) for name in ("latents", "noise", "timesteps"))
    assert drawn == {0, 1, 2, 3}
    held = samples.heldout(cache.heldout[0], 0, 500)
    assert torch.equal(held["prompt_embeds"], cl.load_tensor(cache.heldout[0][1], "prompt_embeds"))


@pytest.mark.parametrize(
    "name", ["x" * 235, "蜘" * 80, "é" * 120, "100% [a] {b} *?", "a.b.c", " spaced "],
    ids=["long", "long Chinese", "long French", "signs", "dots", "spaces"],
)  # fmt: skip
def test_names_of_clips_may_be_what_a_file_system_takes(quick, clips, name):
    shutil.move(clips / "000.mp4", clips / f"{name}.mp4")
    text = (clips / "metadata.jsonl").read_text().replace('"000.mp4"', json.dumps(f"{name}.mp4"))
    (clips / "metadata.jsonl").write_text(text)
    first = cl.cache_clips(quick())
    shutil.copy(clips / "003.mp4", clips / f"{name}.mp4")
    assert cl.cache_clips(quick()).train[0] != first.train[0]


def test_a_name_that_is_no_text_is_coded_too(quick, clips):
    name = os.fsdecode(b"caf\xe9")
    (clips / "metadata.jsonl").unlink()
    for path in clips.glob("*.mp4"):
        path.with_suffix(".txt").write_text("a spider")
    shutil.move(clips / "000.mp4", clips / f"{name}.mp4")
    shutil.move(clips / "000.txt", clips / f"{name}.txt")
    assert len(cl.cache_clips(quick()).train) == 5


def test_a_disk_without_room_is_told_before_any_work(quick, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    monkeypatch.setattr(cl, "encode_clips", lambda *args: pytest.fail("coded"))
    with pytest.raises(cl.UserError, match="GiB free, .* needed for 6 clips and 8 prompts;.*--cache"):
        cl.cache_clips(quick())


def test_a_disk_that_fills_up_is_a_failure_of_one_line_and_leaves_no_part_of_a_file(quick, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise cl.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(cl, "save_file", full)
    with pytest.raises(cl.RunError, match="No space left") as caught:
        cl.cache_clips(quick())
    assert "\n" not in str(caught.value) and not list((tmp_path / "cache").iterdir())


def test_frames_that_repeat_are_told_when_a_clip_is_coded(quick, clips, capsys):
    from test_clips import write_grey

    for name, fps in (("000.mp4", 1), ("001.mp4", 4), ("002.mp4", 8)):
        write_grey(clips / name, range(0, 10 * fps, 5), fps)
    cl.cache_clips(quick())
    told = capsys.readouterr().out
    assert "frames repeat in 2 of 6 clips, such as '000.mp4' at 7 of 8 steps; lower --fps" in told
    cl.cache_clips(quick())
    assert "repeat" not in capsys.readouterr().out


def test_one_clip_is_too_few(quick, clips):
    (clips / "metadata.jsonl").write_text('{"file_name": "000.mp4", "text": "a spider"}')
    with pytest.raises(cl.UserError, match="none left to train on"):
        cl.split_clips(cl.resolve(quick())[0])


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", '{"a": "a dog"}', '{"a": "dogs"}', '{"a": 7}', '{"a": [7]}', '{"a": []}', '{"a": [" "]}',
     '{"a": {"b": "c"}}', "null", "no", "[" * 99_999, "\xff"],
)  # fmt: skip
def test_prompts_of_another_form_are_left_out_with_a_word(quick, clips, capsys, text):
    (clips.parent / "prompts.json").write_bytes(text.encode("latin-1"))
    config, _, _ = cl.resolve(quick(validation_prompts=None))
    _, heldout, _ = cl.split_clips(config)
    assert list(cl.validation_prompts(config, heldout)) == [heldout[0].caption]
    assert "prompts.json' is left out" in capsys.readouterr().out


def test_a_file_is_hashed_in_pieces(tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert cl.content_of(tmp_path / "large") == "49bc20df15e412a64472421e13fe86ff1c5165e18b2afccf160d4dc19fe68a14"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_cached_and_uncached_training_see_the_same_sample(quick):
    """A sample made from the cache equals one made by hand from the clip, for the same keyed draws."""
    config, base, _ = cl.resolve(quick())
    cache = cl.cache_clips(config)
    samples = cl.Samples(config, base, cache, 1000)
    vae = AutoencoderKLCogVideoX.from_pretrained(base.folder, subfolder="vae")
    files = {pair: clip for pair, clip in zip(cache.train, cl.split_clips(config)[0])}
    for position in range(3):
        clip = files[samples.clip_at(position)]
        with torch.no_grad():
            posterior = vae.encode((clip.video * 2 - 1).transpose(0, 1)[None]).latent_dist
        noise = torch.randn(
            posterior.mean.shape, generator=cl.keyed_generator(config.seed, "posterior", sample=position)
        )
        latents = ((posterior.mean + posterior.std * noise) * vae.config.scaling_factor)[0].transpose(0, 1)
        torch.testing.assert_close(samples.training(position)["latents"], latents)


def test_without_a_heldout_folder_every_tenth_clip_is_held_out(quick, clips):
    many = [{"file_name": f"clip {k}.mp4", "text": f"clip {k}"} for k in range(23)]
    for k, row in enumerate(many):
        (clips / row["file_name"]).write_bytes(b"of its own: %d" % k)
    (clips / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    train, heldout, told = cl.split_clips(cl.resolve(quick())[0])
    assert [c.caption for c in heldout] == ["clip 9", "clip 19"] and len(train) == 21
    assert "every tenth clip" in told


def test_the_bundled_clips_are_trained_on_fifty_at_a_time_and_held_out_by_folder():
    config, _, _ = cl.resolve(cl.Config())
    train, heldout, _ = cl.split_clips(config)
    assert (len(train), len(heldout)) == (50, 32)
    assert {c.path.parent.name for c in heldout} == {"spider-heldout"}
    train, _, _ = cl.split_clips(cl.resolve(cl.Config(clips=200))[0])
    assert len(train) == 200
