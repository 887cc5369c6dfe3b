"""Image-to-video: what the two published families are shown, cached, drawn and refused, against diffusers' own pipeline."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import IMAGE_FAMILIES, NANO, ROOT, SPIDER
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image, ImageOps
from safetensors.torch import load_file
from scipy import stats

import cogvideo_lite as cl
import judge
import make_samples
import plan

CALL = dict(num_frames=9, height=32, width=32, num_inference_steps=2, guidance_scale=3.0, max_sequence_length=12)
PROMPTS = ["a red spider", "a blue fish"]
both = pytest.mark.parametrize("family", IMAGE_FAMILIES)


@pytest.fixture
def samples(quick):
    """family -> Samples of a cache of the six clips."""

    def made(family):
        config, base, _ = cl.resolve(quick(family))
        return cl.Samples(config, base, cl.cache_clips(config), 1000)

    return made


@pytest.fixture
def pictures(tmp_path):
    """Two files of 32x32: no frames of any clip."""
    files = [tmp_path / f"{k}.png" for k in range(2)]
    for k, file in enumerate(files):
        grid = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(k))
        Image.fromarray((grid * 255).byte().numpy()).resize((32, 32), Image.Resampling.BICUBIC).save(file)
    return files


def noise(seed=7, count=2):
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]


# ---------------------------------------------------------------------------------------------- what the model is shown


@both
def test_a_training_sample_is_shown_what_the_pipeline_shows(samples, tiny, pictures, family, monkeypatch, tmp_path):
    """The image's latents, at their scale and in their place; zeros elsewhere; the constant of CogVideoX1.5."""
    pipe, seen = CogVideoXImageToVideoPipeline.from_pretrained(tiny(family)), {}
    encode = pipe.vae.encode

    def without_noise(x):  # the pipeline draws from the posterior by a generator of its own
        mean = encode(x).latent_dist.mean
        posterior = DiagonalGaussianDistribution(torch.cat([mean, torch.full_like(mean, -30)], dim=1))
        seen["moments"] = posterior.parameters
        return type("Output", (), {"latent_dist": posterior})

    monkeypatch.setattr(pipe.vae, "encode", without_noise)
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    pipe(Image.open(pictures[0]), PROMPTS[0], **CALL)

    file = tmp_path / "clip.safetensors"
    cl.save_tensors(file, {"images": seen["moments"][:, :, 0]})
    count = seen["hidden_states"].shape[1]  # with the padding of CogVideoX1.5
    shown = samples(family).condition(file, lambda purpose: torch.Generator().manual_seed(0), count)
    torch.testing.assert_close(shown["image"], seen["hidden_states"][0, :, 4:], atol=1e-4, rtol=0)
    assert shown["image"][0].std() > 0.01 and not shown["image"][1:].any()
    assert count == {"5b-i2v": 3, "1.5-i2v": 4}[family]
    if family == "1.5-i2v":
        assert seen["ofs"].tolist() == [2.0] and float(shown["ofs"]) == 2.0
    else:
        assert seen["ofs"] is None and "ofs" not in shown


@both
def test_the_loss_is_that_of_the_clips_velocity_alone(samples, family):
    """Computed once more, from diffusers' scheduler and transformer, on the same draws."""
    s = samples(family)
    batch = cl.collate([s.training(n) for n in range(4)], "cpu")
    scheduler, transformer = s.base.load("scheduler"), s.base.load("transformer", torch.float32)
    rotary = cl.rotary_embedding(s.base, transformer, 9, 32, 32, torch.device("cpu"))
    ours = cl.velocity_loss(transformer, batch, scheduler.alphas_cumprod.double(), rotary, torch.float32)

    noisy = scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    target = scheduler.get_velocity(batch["latents"], batch["noise"], batch["timesteps"])
    inputs = torch.cat([noisy, batch["image"]], dim=2)
    assert inputs.shape[2] == transformer.config.in_channels == 2 * transformer.config.out_channels
    more = {"ofs": torch.full((1,), 2.0)} if family == "1.5-i2v" else {}
    out = transformer(inputs, batch["prompt_embeds"], batch["timesteps"], image_rotary_emb=rotary, **more).sample
    torch.testing.assert_close(ours, (out - target).square().mean((1, 2, 3, 4)), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- its noise, in a cache


def test_strengths_of_the_images_noise_are_those_of_the_reference():
    """exp(N(-3, 0.5)) in [-1, 1]: read back from what was added, and spread evenly over the codings of one clip."""
    black, generator = torch.zeros(3, 40, 40), torch.Generator().manual_seed(0)
    found = torch.stack([cl.noisy_images(black, 8, generator).std((1, 2, 3)) for _ in range(250)])
    assert stats.kstest(found.flatten().log(), stats.norm(-3, 0.5).cdf).pvalue > 0.01
    parts = torch.tensor(stats.norm(-3, 0.5).cdf(found.log())) * 8
    assert (parts.sort(1).values.long() == torch.arange(8)).double().mean() > 0.95  # one in each eighth, but for estimates
    noise = cl.noisy_images(torch.full((3, 40, 40), 0.5), 8, generator) - 0.5
    assert abs(float(torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max())) < 0.1


def alike(a, b):
    """The least p of 64 numbers that two sets of latents are drawn alike, times 64."""
    return 64 * min(stats.ks_2samp(x, y).pvalue for x, y in zip(a.flatten(1).T, b.flatten(1).T))


def test_cached_images_have_the_distribution_of_images_that_are_noised_anew(samples, tmp_path):
    """A frame coded under 48 names gives 384 codings; as many are made as the reference trainers do, one at a time."""
    s = samples("5b-i2v")
    clip, vae = cl.split_clips(s.config)[0][0], s.base.load("vae", torch.float32)
    files = {cl.Clip(clip.path, str(k), *cl.clip_size(s.config)): tmp_path / f"{k}.safetensors" for k in range(48)}
    assert not cl.encode_clips(s.base, files, "", torch.device("cpu"), torch.float32)
    draw = lambda k: lambda purpose: torch.Generator().manual_seed(k)  # noqa: E731
    shown = [s.condition(file, draw(8 * n + k), 1)["image"][0] for n, file in enumerate(files.values()) for k in range(8)]
    cached = torch.stack(shown)

    frame, anew, means = 2 * clip.video[0] - 1, [], []
    for k in range(384):
        generator = torch.Generator().manual_seed(k)
        strength = torch.exp(torch.normal(-3.0, 0.5, (1,), generator=generator))
        noisy = frame + strength * torch.randn(frame.shape, generator=generator)
        with torch.no_grad():
            posterior = vae.encode(noisy[None, :, None]).latent_dist
        anew.append(0.7 * posterior.sample(generator)[0, :, 0])
        means.append(0.7 * posterior.mean[0, :, 0])
    assert len({tuple(x.flatten().tolist()) for x in cached}) > 300  # each draws its own latent
    assert alike(cached, torch.stack(anew)) > 1e-4
    # The posterior of such a VAE is wide, and would hide noise in pixels; its means do not.
    coded = torch.cat([0.7 * cl.load_tensor(file, "images")[:, :4] for file in files.values()])
    assert alike(coded, torch.stack(means)) > 1e-4 > alike(coded, torch.stack([means[0]] * 384))
    assert alike(coded, coded.mean(0) + 2 * (coded - coded.mean(0))) < 1e-4  # noise twice as strong is told, too


def test_the_cache_holds_the_frame_and_its_codings_and_stays_apart_from_a_text_models(quick, tiny):
    config, base, _ = cl.resolve(quick("5b-i2v"))
    file = cl.cache_clips(config).train[0][0]
    kept = load_file(str(file))
    assert kept["images"].shape == (cl.IMAGE_CODINGS, 8, 4, 4) and kept["moments"].shape == (8, 3, 4, 4)
    frame = cl.split_clips(config)[0][0].video[0]
    assert torch.equal(kept["first_frame"], (frame * 255).round().byte())
    text = cl.cache_clips(cl.resolve(quick("5b"))[0]).train[0][0]
    assert text != file and set(load_file(str(text))) == {"moments"}


def test_one_image_in_twenty_is_left_out_in_training_and_none_of_what_is_held_out(samples):
    s = samples("1.5-i2v")
    absent = sum(not s.training(n)["image"].any() for n in range(400))
    assert 5 <= absent <= 38  # 20 expected, four standard deviations
    assert all(s.heldout(s.cache.heldout[0], k, t)["image"].any() for k in range(20) for t in cl.HELDOUT_TIMESTEPS)


def test_draws_of_the_image_change_none_of_the_others(samples, quick):
    """A text model and an image model of the same seed draw the same clips, timesteps and noise."""
    config, base, _ = cl.resolve(quick("5b"))
    text, image = cl.Samples(config, base, cl.cache_clips(config), 1000), samples("5b-i2v")
    for n in range(4):
        a, b = text.training(n), image.training(n)
        assert set(b) - set(a) == {"image"} and all(torch.equal(a[k], b[k]) for k in ("latents", "noise", "timesteps"))


# -------------------------------------------------------------------------------------------------------- the whole path


@both
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_from_clips_to_weights_with_which_stock_diffusers_draws_the_same_clip(quick, tiny, pictures, family, method):
    run = cl.train(quick(family, method=method, lr=0.05 if method != "full" else 3e-3, validation_prompts=None))
    ours = torch.stack(cl.sample(run.folder, PROMPTS, seed=7, images=pictures))
    pipe = CogVideoXImageToVideoPipeline.from_pretrained(tiny(family))
    images = [Image.open(file).convert("RGB") for file in pictures]
    draw = lambda: pipe(images, PROMPTS, **CALL, output_type="pt", generator=noise()).frames.float()  # noqa: E731
    untrained = draw()
    if method == "full":
        pipe.transformer = type(pipe.transformer).from_pretrained(run.folder / "transformer")
    elif method == "qlora":  # on the same base in 4 bits
        pipe.transformer = cl.load_transformer(run.config, cl.find_base(run.config.model), torch.float32, "cpu")
        pipe.load_lora_weights(str(run.folder))
    else:
        pipe.load_lora_weights(str(run.folder))
    stock = draw()
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)
    assert (stock - untrained).abs().max() > 1e-3
    assert (stock[0] - stock[1]).abs().max() > 1e-3


@both
def test_samples_begin_with_the_first_frames_of_held_out_clips(quick, tiny, family):
    run = cl.train(quick(family, validation_prompts=None, steps=2))
    _, heldout, _ = cl.split_clips(run.config)
    prompts = list(cl.sampled_prompts(run.folder))
    assert prompts == [heldout[0].caption]  # and no set of prompts.json, which knows no frames
    picture = Image.open(run.folder / "samples/first-0.png")
    frame = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert torch.equal(frame, (heldout[0].video[0] * 255).round().byte())

    pipe = CogVideoXImageToVideoPipeline.from_pretrained(tiny(family))
    drawn = pipe(picture, prompts[0], **CALL, output_type="latent", generator=noise(0, 1)).frames
    torch.testing.assert_close(
        drawn, cl.load_tensor(run.folder / "samples/before.safetensors", "latents"), atol=1e-4, rtol=0
    )
    losses = json.loads((run.folder / "samples/base_losses.json").read_text())
    assert all(len(losses[when]) == 1 and losses[when][0] > 0 for when in ("before", "after"))


def test_prompts_of_ones_own_begin_with_their_own_clips_frame_or_with_one_after_another():
    clips = [cl.Clip(SPIDER / f"{k:03d}.mp4", text) for k, text in enumerate("abc")]
    assert cl.begun_with(["x", "c", "y", "z"], clips) == {"x": clips[0], "c": clips[2], "y": clips[2], "z": clips[0]}


@both
def test_the_critic_is_shown_the_frame_that_a_sample_began_with(samples, family):
    s = samples(family)
    latents = torch.randn(sum(s.base.latent_frames(9)), 4, 4, 4)
    prompt, (file, *_) = s.cache.prompts["a red spider"], s.cache.heldout[0]
    a, b = (s.drawn(latents, prompt, 300, f) for f in (file, s.cache.train[0][0]))
    assert torch.equal(a["noise"], b["noise"]) and not torch.equal(a["image"], b["image"])
    assert a["image"].shape == latents.shape and torch.equal(a["image"], s.drawn(latents, prompt, 300, file)["image"])


def test_learned_positions_are_kept_by_full_fine_tuning(quick, tiny):
    run = cl.train(quick("5b-i2v", method="full", lr=1e-3))
    name = "patch_embed.pos_embedding"
    before, after = (
        load_file(str(f / "transformer/diffusion_pytorch_model.safetensors")) for f in (tiny("5b-i2v"), run.folder)
    )
    assert before.keys() == after.keys() and torch.equal(before[name], after[name])
    assert not torch.equal(before["proj_out.weight"], after["proj_out.weight"])


@both
def test_a_resumed_run_is_bitwise_the_unbroken_one(quick, tmp_path, family):
    whole = cl.train(quick(family, out=str(tmp_path / "whole")))
    broken = quick(family, out=str(tmp_path / "broken"))

    def stop(metrics):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(cl.RunError, match="stopped at step 3"):
        cl.train(broken, callbacks=[stop])
    broken.resume = True
    resumed = cl.train(broken)
    a, b = (load_file(str(run.folder / "pytorch_lora_weights.safetensors")) for run in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_blend_begins_with_the_frames_of_its_run(quick):
    run = cl.train(quick("1.5-i2v", lr=0.05))
    same = cl.blend(run.folder, 1.0)
    first = lambda folder: (folder / "samples/first-0.png").read_bytes()  # noqa: E731
    assert first(same.folder) == first(run.folder)
    a, b = (cl.read_video(r.folder / "samples/after-0.mp4") for r in (run, same))
    assert (a - b).abs().mean() < 0.02 < (a - cl.read_video(run.folder / "samples/before-0.mp4")).abs().mean()


def test_a_run_does_not_go_on_with_other_first_frames(quick, clips):
    run = cl.train(quick("5b-i2v", steps=2))
    began = (run.folder / "samples/first-0.png").read_bytes()
    rows = (clips / "metadata.jsonl").read_text().splitlines()
    (clips / "metadata.jsonl").write_text("\n".join(rows[:-1]) + "\n")  # the held-out clip is the last
    with pytest.raises(cl.UserError, match="its samples before training began with another frame"):
        cl.train(quick("5b-i2v", resume=True))
    assert (run.folder / "samples/first-0.png").read_bytes() == began


@both
def test_runs_are_judged_and_compared_frame_by_frame(quick, clips, tmp_path, family):
    """With clips of other things, samples on the way, and the critic; in bf16, too."""
    fields = dict(prior=str(clips), sample_every=2, compute_dtype="bfloat16")
    one, other = (cl.train(quick(family, seed=seed, out=str(tmp_path / f"{seed}"), **fields)) for seed in (0, 1))
    assert all(m["strangeness"] > 0 for m in one.metrics if m["step"] in (2, 4))
    for run in (one, other):
        assert "strangeness" in judge.judge(run.folder).summary
    text = cl.load_instrument("compare").compare([one.folder, other.folder], tmp_path / "page.html").read_text()
    assert text.count("<h3>a red spider <img") == 1 and text.count("<video") == 3  # one base, two runs
    Image.new("RGB", (32, 32)).save(other.folder / "samples/first-0.png")
    text = cl.load_instrument("compare").compare([one.folder, other.folder], tmp_path / "page.html").read_text()
    assert text.count("<h3>a red spider <img") == 2 and text.count("<video") == 4  # other frames are other samples


def test_a_large_models_frame_is_coded_as_it_was_for_training(quick, tiny, monkeypatch, tmp_path):
    """Whole, as clips up to the VAE's own size are; not in the tiles of half its sides in which clips are decoded."""
    model = shutil.copytree(tiny("5b-i2v"), tmp_path / "model")
    settings = json.loads((model / "vae/config.json").read_text()) | dict(sample_height=40, sample_width=40)
    (model / "vae/config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(cl.Base, "large", True)
    base, coded = cl.find_base(str(model)), []
    pipe = cl.sampling_pipeline(base, base.load("transformer", torch.float32), torch.float32, torch.device("cpu"), "")
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: coded.append(encode(x)) or coded[-1])
    config, image = cl.resolve(quick(model=str(model)))[0], torch.rand(2, 3, 32, 32)
    cl.generate(pipe, base, torch.zeros(2, 12, 16), torch.zeros(12, 16), config, 0, image)  # of the second, too
    vae = base.load("vae", torch.float32)
    whole = [vae.encode(2 * one[None, :, None] - 1).latent_dist.mean for one in image]
    assert all(torch.equal(found.latent_dist.mean, expected) for found, expected in zip(coded, whole, strict=True))
    cl.tile(vae, 2)
    assert not torch.equal(vae.encode(2 * image[:1, :, None] - 1).latent_dist.mean, whole[0])


@both
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_code_of_a_runs_card_runs_as_it_stands(quick, method, family, monkeypatch):
    run = cl.train(quick(family, method=method, lr=1e-3, steps=2))
    text = (run.folder / "README.md").read_text()
    monkeypatch.chdir(run.folder)
    names = {}
    exec(re.search(r"(?s)```python\n(.*?)```", text)[1], names)
    assert len(names["clip"]) == 9 and "pipeline_tag: image-to-video" in text
    ours = cl.sample(run.folder, ["a red spider"], seed=0, images="samples/first-0.png")[0]
    assert ours.shape == (9, 3, 32, 32)


def test_from_the_command_line_on_a_picture_that_is_no_clips(quick, pictures, tmp_path):
    run = cl.train(quick("5b-i2v", steps=2))
    command = [sys.executable, str(ROOT / "cogvideo_lite.py"), "--sample", *PROMPTS, "--run", str(run.folder)]
    done = subprocess.run([*command, "--image", *map(str, pictures)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [run.folder / f"samples/a-{name}-seed{k}.mp4" for k, name in enumerate(("red-spider", "blue-fish"))]
    assert [cl.read_video(file).shape for file in files] == [(9, 3, 32, 32)] * 2
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "give one with --image FILE" in done.stderr


# ------------------------------------------------------------------------------------------------------ the bundled model

BUNDLED = ROOT / "data_samples/cogvideox-nano-i2v"


def test_the_bundled_model_costs_little_and_shares_the_bases_other_parts():
    own = [path for path in BUNDLED.rglob("*") if path.is_file() and path.resolve().is_relative_to(BUNDLED)]
    assert sum(path.stat().st_size for path in own) < 14e6
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        assert (BUNDLED / part).is_dir() and (BUNDLED / part).resolve() == (NANO / part).resolve()


def test_it_began_as_its_base_whatever_the_image():
    base = cl.find_base(str(NANO)).load("transformer", torch.float32)
    wide = make_samples.widened(base).eval()
    text, t = torch.randn(1, 16, 64), torch.tensor([500])
    noisy, image = torch.randn(1, 5, 16, 8, 8), torch.randn(1, 5, 16, 8, 8)
    rotary = cl.rotary_embedding(cl.find_base(str(NANO)), base, 17, 64, 64, "cpu")
    with torch.no_grad():
        ours = wide(torch.cat([noisy, image], dim=2), text, t, image_rotary_emb=rotary).sample
        torch.testing.assert_close(ours, base(noisy, text, t, image_rotary_emb=rotary).sample, atol=1e-5, rtol=0)


def test_the_first_frame_decides_what_a_clip_shows_even_under_a_wrong_caption(tmp_path):
    """Read from the pixels, which know no prompt."""
    rows = [("fish", "blue", "right", "water"), ("beetle", "red", "up", "snow")]
    video = make_samples.render(make_samples.random_scenes(rows, 5))[0]
    for k, clip in enumerate(video):
        Image.fromarray(clip[0].permute(1, 2, 0).numpy()).save(tmp_path / f"{k}.png")
    wrong = ["a green spider moving right over grass", "a yellow snake moving up over stone"]
    drawn = cl.sample(BUNDLED, wrong, images=[tmp_path / "0.png", tmp_path / "1.png"])
    for row, clip, real in zip(rows, drawn, video):
        creature, colour, direction, ground = make_samples.read_clip(clip).parts()
        assert (creature, colour, direction, ground) == row
        assert make_samples.psnr(clip[0], real[0].float() / 255) > 22


# ---------------------------------------------------------------------------------------------------- pictures, refusals


def test_a_picture_is_read_as_a_viewer_shows_it(tmp_path, capsys):
    """Against Pillow: turned as a phone's EXIF says, transparent parts on white, scaled to cover, the middle kept."""
    upright = Image.effect_noise((48, 96), 80).resize((96, 192)).convert("RGB")  # portrait
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: to be turned right
    upright.rotate(90, expand=True).save(tmp_path / "phone.png", exif=exif)
    found = cl.read_image(tmp_path / "phone.png", 32, 48)
    theirs = ImageOps.exif_transpose(Image.open(tmp_path / "phone.png"))
    theirs = ImageOps.fit(theirs, (48, 32), Image.Resampling.BICUBIC)
    theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1) / 255
    assert found.shape == (3, 32, 48) and (found - theirs).abs().mean() < 0.02
    assert "phone.png': 67 % of it is cropped away" in capsys.readouterr().out  # of 1:2, a third is left in 3:2
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 16, 32))
    clear.save(tmp_path / "clear.png")
    found = cl.read_image(tmp_path / "clear.png", 32, 32)
    assert found[:, 5, 5].tolist() == [0, 0, 1] and found[:, 5, 25].tolist() == [1, 1, 1]
    assert not capsys.readouterr().out
    clear.convert("P").save(tmp_path / "palette.gif")
    Image.new("L", (64, 40), 128).save(tmp_path / "grey.jpg")
    assert cl.read_image(tmp_path / "palette.gif", 32, 32).shape == cl.read_image(tmp_path / "grey.jpg", 32, 32).shape


@pytest.mark.parametrize("kind", ["absent", "text", "cut", "video", "sixteen"])
def test_what_is_no_picture_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "first.png"
    if kind == "text":
        path.write_text("no picture")
    elif kind == "cut":
        Image.effect_noise((64, 64), 80).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "video":
        path.write_bytes((SPIDER / "000.mp4").read_bytes())
    elif kind == "sixteen":
        Image.new("I;16", (32, 32), 40_000).save(path)
    with pytest.raises(cl.UserError, match=r"^image '.*first.png': (cannot be read|of more than 8 bits)[^\n]*$"):
        cl.read_image(path, 32, 32)


def test_a_model_with_learned_positions_is_trained_at_its_own_size_alone(quick):
    with pytest.raises(cl.UserError, match="--frames 17: must be 9: this model has learned its positions, for 9x32x32"):
        cl.resolve(quick("5b-i2v", frames=17))
    with pytest.raises(cl.UserError, match="--width 48: must be 32"):
        cl.resolve(quick("5b-i2v", width=48))
    assert cl.resolve(quick("1.5-i2v", frames=17))[0].frames == 17


@pytest.mark.parametrize(
    "family, images, message",
    [
        ("5b-i2v", None, "its clips begin with a picture; give one with --image FILE"),
        ("5b", ["a.png"], "--image: model .* is text-to-video; give another, or leave it out"),
        ("5b-i2v", ["a.png"] * 3, "--image: 3 for 2 prompts; one, or one each"),
    ],
)
def test_pictures_that_do_not_go_with_model_or_prompts_are_refused(tiny, family, images, message):
    with pytest.raises(cl.UserError, match=message):
        cl.sample(tiny(family), PROMPTS, images=images)


@pytest.mark.parametrize("pipeline, channels", [("CogVideoXPipeline", 8), ("CogVideoXImageToVideoPipeline", 9)])
def test_a_pipeline_of_other_channels_is_refused(tiny, tmp_path, pipeline, channels):
    """Such as CogVideoX-Fun's, which is shown a mask too."""
    folder = shutil.copytree(tiny("5b-i2v"), tmp_path / "other")
    for name, key, value in (
        ("model_index.json", "_class_name", pipeline),
        ("transformer/config.json", "in_channels", channels),
    ):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, key: value}))
    with pytest.raises(cl.UserError, match=f"a {pipeline} of {channels} channels; only text- or image-to-video CogVideoX"):
        cl.find_base(str(folder))


def test_the_published_models_are_planned_with_the_parameters_that_they_have():
    counts = {}
    for name in ("CogVideoX-5b", "CogVideoX-5b-I2V", "CogVideoX1.5-5B", "CogVideoX1.5-5B-I2V"):
        with torch.device("meta"):
            model = CogVideoXTransformer3DModel.from_config(plan.describe(f"THUDM/{name}").transformer)
        counts[name] = sum(t.numel() for t in model.state_dict().values())
    assert counts["CogVideoX-5b"] == 5_570_283_072
    assert counts["CogVideoX-5b-I2V"] == 5_625_087_552  # the Hub's own count, learned positions included
    # Beside 1.5: input channels of the picture in patches of 2x2x2, and two layers of width 512 for the constant.
    assert counts["CogVideoX1.5-5B-I2V"] == counts["CogVideoX1.5-5B"] + 16 * 8 * 3072 + 2 * (512 * 512 + 512)
    assert plan.describe("THUDM/CogVideoX-5b-I2V").native == (480, 720)
    assert plan.describe("zai-org/CogVideoX1.5-5B-I2V").native == (768, 1360)
