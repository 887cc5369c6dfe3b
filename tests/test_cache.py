"""The cache: what it holds, that it is reused, and that nothing stale or torn is ever used."""

import json
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


def test_a_changed_clip_is_coded_again_and_its_old_entry_removed(quick, clips, capsys):
    old = cl.cache_clips(quick())
    shutil.copy(clips / "003.mp4", clips / "000.mp4")
    (old.empty.parent / "000-torn.safetensors").write_bytes(b"torn")
    new = cl.cache_clips(quick())
    assert "1 clips have changed" in capsys.readouterr().out
    assert not old.train[0][0].exists() and new.train[0][0].exists()
    torch.testing.assert_close(load_file(str(new.train[0][0])), load_file(str(new.train[3][0])))


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
    rows = (clips / "metadata.jsonl").read_text().splitlines()
    many = [json.loads(rows[k % 6]) | {"text": f"clip {k}"} for k in range(23)]
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
