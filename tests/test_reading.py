"""Reading the truth back from pixels, and the bundled model through it: what `make_samples.py check` rests on."""

import make_samples as world
import pytest
import torch
import torch.nn.functional as F
from conftest import NANO
from diffusers import CogVideoXPipeline

ROWS = world.rows_in_turn(world.combinations()[1], 10, 77)


@pytest.fixture(scope="module")
def drawn():
    """Ten held-out clips: video in [0, 1], mask, poses."""
    video, mask, poses = world.render(world.random_scenes(ROWS, 77))
    return video.float() / 255, mask, poses


def test_every_part_of_a_drawn_clip_is_read_back_under_noise(drawn):
    noise = 0.03 * torch.randn(drawn[0].shape, generator=torch.Generator().manual_seed(0))
    readings = world.truth_report((drawn[0] + noise).clamp(0, 1), progress=False)
    assert [r.parts() for r in readings] == [tuple(row) for row in ROWS]
    for reading, mask in zip(readings, drawn[1]):
        assert (reading.mask & mask).sum() / (reading.mask | mask).sum() > 0.85


def test_fitted_poses_are_the_true_ones(drawn):
    for video, poses in zip(drawn[0][:4], drawn[2]):
        reading = world.read_clip(video)
        assert reading.pose_iou.median() > 0.93
        assert (reading.pose[:, :2] - poses[:, :2]).abs().median() < 0.5  # px


def test_a_warped_creature_fits_no_pose_as_well_the_more_so_the_stronger_the_warp(drawn):
    video = drawn[0][0]
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    fits = []
    for strength in (0.0, 2.0, 4.0):  # px
        dx, dy = (strength / 32 * torch.sin(9 * a + 2) for a in (y, x))
        grid = torch.stack([x + dx, y + dy], dim=-1).expand(len(video), 64, 64, 2)
        warped = F.grid_sample(video, grid, padding_mode="border", align_corners=True)
        fits.append(float(world.read_clip(warped).pose_iou.median()))
    assert fits[0] - 0.08 > fits[1] > fits[2]


def test_a_frozen_clip_is_still_and_a_reversed_one_askew(drawn):
    assert world.read_clip(drawn[0][0][8:9].expand(17, -1, -1, -1)).direction == "still"
    assert world.read_clip(drawn[0][0].flip(0)).direction == "askew"


def test_a_clip_without_a_creature_shows_none(drawn):
    ground = drawn[0][0][:, :, :4].mean(dim=(0, 2, 3))[None, :, None, None].expand(17, 3, 64, 64)
    assert world.read_clip(ground).creature == "none"


@pytest.fixture(scope="module")
def pipe():
    pipe = CogVideoXPipeline.from_pretrained(NANO, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_bundled_vae_keeps_what_it_is_shown(pipe, drawn):
    coded = world.round_trip(pipe.vae, drawn[0][:4])
    assert world.psnr(drawn[0][:4], coded) > 28
    assert world.psnr(drawn[0][:4], coded, drawn[1][:4]) > 20
    latents = (
        pipe.vae.encode(drawn[0][:4].mul(2).sub(1).transpose(1, 2)).latent_dist.mode() * pipe.vae.config.scaling_factor
    )
    assert 0.8 < latents.std() < 1.25  # as the scheduler expects


def test_the_bundled_model_shows_what_its_prompt_says(pipe):
    """Colour and ground of six held-out captions; `make_samples.py check` measures all four parts on 64."""
    rows = ROWS[:6]
    video = pipe(
        [world.caption(*row) for row in rows], num_inference_steps=15, guidance_scale=3.0, output_type="pt",
        max_sequence_length=world.TEXT_LENGTH, generator=[torch.Generator().manual_seed(k) for k in range(6)],
    ).frames  # fmt: skip
    readings = world.truth_report(video.float(), progress=False)
    assert sum(r.colour == row[1] for r, row in zip(readings, rows)) >= 5
    assert sum(r.ground == row[3] for r, row in zip(readings, rows)) >= 5
