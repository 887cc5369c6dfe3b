"""The diffusion mathematics, against diffusers' scheduler, closed forms, and the loss of the reference trainers."""

import numpy as np
import pytest
import torch
from conftest import SCHEDULER
from diffusers import CogVideoXDDIMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

import cogvideo_lite as cl

SHIFTS = [1.0, 3.0]  # 5B and 2B


def scheduler(shift):
    return CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=shift)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shift", SHIFTS)
def test_noise_and_velocity_are_the_schedulers_in_float64(shift):
    s, t = scheduler(shift), torch.tensor([0, 1, 37, 500, 998, 999])
    x, noise = draw(6, 3, 4, 2, 2).double(), draw(6, 3, 4, 2, 2, seed=1).double()
    noisy, velocity = cl.noisy_and_velocity(x, noise, s.alphas_cumprod.double()[t])
    torch.testing.assert_close(noisy, s.add_noise(x, noise, t))
    torch.testing.assert_close(velocity, s.get_velocity(x, noise, t))


@pytest.mark.parametrize("shift", SHIFTS)
def test_float32_noise_is_right_to_a_millionth_where_the_schedulers_bf16_noise_is_not(shift):
    s, t = scheduler(shift), torch.arange(1000)
    x, noise = torch.zeros(1000, 1, 1, 1, 1), torch.ones(1000, 1, 1, 1, 1)
    exact = (1 - s.alphas_cumprod.double()).sqrt()
    ours = cl.noisy_and_velocity(x, noise, s.alphas_cumprod.double()[t])[0].flatten().double()
    theirs = s.add_noise(x.bfloat16(), noise.bfloat16(), t).flatten().double()
    assert ((ours - exact).abs() / exact).max() < 1e-6
    assert ((theirs - exact).abs() / exact).max() > 0.2


@pytest.mark.parametrize("family", ["2b", "5b", "1.5"])
def test_velocity_loss_equals_the_weighted_clean_latent_loss_of_the_reference_trainers(tiny, family):
    base = cl.find_base(str(tiny(family)))
    transformer, s = base.load("transformer", torch.float32), base.load("scheduler")
    t, frames = torch.tensor([20, 400, 900]), sum(base.latent_frames(base.frames))
    batch = {
        "latents": draw(3, frames, 4, 4, 4), "noise": draw(3, frames, 4, 4, 4, seed=1),
        "prompt_embeds": draw(3, 12, 16, seed=2), "timesteps": t,
    }  # fmt: skip
    rotary = cl.rotary_embedding(base, transformer, base.frames, *base.native, torch.device("cpu"))
    with torch.no_grad():
        ours = cl.velocity_loss(transformer, batch, s.alphas_cumprod.double(), rotary, torch.float32)
        noisy = s.add_noise(batch["latents"].double(), batch["noise"].double(), t).float()
        out = transformer(noisy, batch["prompt_embeds"], t, image_rotary_emb=rotary, return_dict=False)[0]
        clean = s.get_velocity(out.double(), noisy.double(), t)
        weight = 1 / (1 - s.alphas_cumprod.double()[t])
        reference = weight * ((clean - batch["latents"].double()) ** 2).mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(ours.double(), reference, rtol=1e-4, atol=0)


def rotary_by_hand(positions, dim):
    """cos and sin of one axis as the RoPE paper has them, each frequency twice: (len(positions), dim)."""
    angles = np.outer(positions, 10000.0 ** (-np.arange(0, dim, 2) / dim))
    return np.repeat(np.cos(angles), 2, axis=1), np.repeat(np.sin(angles), 2, axis=1)


def grid_by_hand(axes, head_dim):
    dims = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)
    parts = [rotary_by_hand(np.asarray(p), d) for p, d in zip(axes, dims)]
    t, h, w = (len(p) for p in axes)
    full = []
    for trig in (0, 1):
        a = np.broadcast_to(parts[0][trig][:, None, None], (t, h, w, dims[0]))
        b = np.broadcast_to(parts[1][trig][None, :, None], (t, h, w, dims[1]))
        c = np.broadcast_to(parts[2][trig][None, None, :], (t, h, w, dims[2]))
        full.append(np.concatenate([a, b, c], axis=-1).reshape(t * h * w, head_dim))
    return full


@pytest.mark.parametrize("height, width", [(32, 32), (32, 64), (64, 32)])
def test_rotary_grid_of_5b_spans_the_resized_and_cropped_native_grid(tiny, height, width):
    base = cl.find_base(str(tiny("5b")))
    cos, sin = cl.rotary_embedding(base, base.load("transformer", torch.float32), 9, height, width, torch.device("cpu"))
    h, w, native = height // 16, width // 16, 2
    # The grid's longer side fills the native length; the other is scaled with it, then centred (and may be cropped).
    scale = native / max(h, w)
    rh, rw = int(round(h * scale)), int(round(w * scale))
    top, left = int(round((native - rh) / 2)), int(round((native - rw) / 2))
    axes = [np.arange(3.0), np.linspace(top, top + rh * (h - 1) / h, h), np.linspace(left, left + rw * (w - 1) / w, w)]
    expected = grid_by_hand(axes, 16)
    np.testing.assert_allclose(cos.numpy(), expected[0], atol=1e-5)
    np.testing.assert_allclose(sin.numpy(), expected[1], atol=1e-5)


@pytest.mark.parametrize("height, width, frames", [(32, 32, 9), (16, 32, 9), (32, 32, 17)])
def test_rotary_grid_of_cogvideox_1_5_counts_cells_and_half_as_many_latent_frames(tiny, height, width, frames):
    base = cl.find_base(str(tiny("1.5")))
    cos, sin = cl.rotary_embedding(
        base, base.load("transformer", torch.float32), frames, height, width, torch.device("cpu")
    )
    latent = (frames - 1) // 4 + 1
    expected = grid_by_hand([np.arange((latent + 1) // 2), np.arange(height // 16), np.arange(width // 16)], 16)
    np.testing.assert_allclose(cos.numpy(), expected[0], atol=1e-5)
    np.testing.assert_allclose(sin.numpy(), expected[1], atol=1e-5)


def test_2b_gets_no_rotary_embedding(tiny):
    base = cl.find_base(str(tiny("2b")))
    assert cl.rotary_embedding(base, base.load("transformer", torch.float32), 9, 32, 32, torch.device("cpu")) is None


def test_latents_are_diffusers_posterior_samples_scaled():
    moments = draw(8, 3, 2, 2)
    ours = cl.draw_latents(moments, 0.7, torch.Generator().manual_seed(5))
    theirs = DiagonalGaussianDistribution(moments[None]).sample(torch.Generator().manual_seed(5))[0]
    torch.testing.assert_close(ours, 0.7 * theirs.transpose(0, 1))


def test_1_5_pads_in_front_where_its_pipeline_drops(tiny):
    base = cl.find_base(str(tiny("1.5")))
    moments = draw(8, 3, 2, 2)
    padded = cl.draw_latents(moments, 1.0, torch.Generator().manual_seed(5), base.patch_t)
    plain = cl.draw_latents(moments, 1.0, torch.Generator().manual_seed(5))
    assert base.latent_frames(9) == (3, 1) and len(padded) == 4
    torch.testing.assert_close(padded[1:], plain)


def test_keyed_draws_depend_on_every_part_of_the_key_and_on_nothing_else():
    number = lambda *key: float(torch.rand((), generator=cl.keyed_generator(*key)))  # noqa: E731
    first = number(0, "noise", 0, 1)
    torch.manual_seed(123)
    assert number(0, "noise", 0, 1) == first
    assert (
        len({number(*key) for key in [(0, "noise", 0, 1), (1, "noise", 0, 1), (0, "order", 0, 1), (0, "noise", 1, 0)]})
        == 4
    )


def test_keyed_timesteps_are_uniform_over_the_thousand():
    t = torch.stack(
        [torch.randint(1000, (), generator=cl.keyed_generator(0, "timestep", sample=n)) for n in range(4000)]
    )
    counts = torch.histc(t.float(), bins=10, min=0, max=1000)
    assert ((counts - 400).pow(2) / 400).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001
