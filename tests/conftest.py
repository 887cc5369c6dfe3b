"""What several tests need: the bundled files, and tiny pipelines with random weights in each family's configuration."""

import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # more threads than cores would wait for one another
    share = os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data_samples"), str(ROOT / "notebooks")]

import pytest  # noqa: E402
import torch  # noqa: E402

import cogvideo_lite as cl  # noqa: E402

NANO = ROOT / "data_samples/cogvideox-nano"
SPIDER = ROOT / "data_samples/spider"

# What sets the families apart in their published configurations; the rest is made tiny.
FAMILIES = {
    "2b": dict(use_rotary_positional_embeddings=False),
    "5b": dict(use_rotary_positional_embeddings=True),
    "1.5": dict(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False),
}
# The image-to-video models: the same, but for these.
IMAGE_FAMILIES = {
    "5b-i2v": dict(FAMILIES["5b"], in_channels=8, use_learned_positional_embeddings=True),
    "1.5-i2v": dict(FAMILIES["1.5"], in_channels=8, ofs_embed_dim=8),
}
SCHEDULER = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, prediction_type="v_prediction",
    rescale_betas_zero_snr=True, set_alpha_to_one=True, timestep_spacing="trailing",
)  # fmt: skip


def tiny_pipeline(folder, family):
    """A pipeline folder of the given family with random weights, 9 frames of 32x32, saved by diffusers itself."""
    import diffusers
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    tokenizer = T5Tokenizer.from_pretrained(NANO / "tokenizer")
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, num_heads=2, d_ff=16, num_layers=1)
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        scaling_factor=1.15258426 if family == "2b" else 0.7, invert_scale_latents=family == "1.5-i2v",
    )  # fmt: skip
    shape = dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
        num_layers=2, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=12,
    )  # fmt: skip
    transformer = CogVideoXTransformer3DModel(**{**shape, **(FAMILIES | IMAGE_FAMILIES)[family]})
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=3.0 if family == "2b" else 1.0)
    if family == "5b-i2v":  # such as training left them: not the sines that they began as
        table = transformer.patch_embed.pos_embedding
        transformer.patch_embed.pos_embedding = (table + 0.5 * torch.randn(table.shape)).float()
    pipeline = diffusers.CogVideoXImageToVideoPipeline if family in IMAGE_FAMILIES else diffusers.CogVideoXPipeline
    pipeline(tokenizer, text_encoder, vae, transformer, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """family -> folder of a tiny pipeline, made once."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tiny_pipeline(tmp_path_factory.mktemp(family.replace(".", "_")), family)
        return made[family]

    return folder


@pytest.fixture
def clips(tmp_path):
    """A folder of six of the bundled clips, with metadata.jsonl."""
    folder = tmp_path / "clips"
    folder.mkdir()
    rows = (SPIDER / "metadata.jsonl").read_text().splitlines()[:6]
    for row in rows:
        shutil.copy(SPIDER / json.loads(row)["file_name"], folder)
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def quick(tiny, clips, tmp_path):
    """family, fields -> Config of a run of seconds on a tiny pipeline."""

    def config(family="5b", **fields):
        values = dict(
            model=str(tiny(family)), data=str(clips), cache=str(tmp_path / "cache"), out=str(tmp_path / "run"), steps=4,
            lr=1e-2, warmup=1, batch_size=2, rank=4, alpha=4.0, sampling_steps=2, guidance_scale=3.0, checkpoint_every=2,
            validation_prompts=["a red spider"],
        )  # fmt: skip
        return cl.Config(**{**values, **fields})

    return config


@pytest.fixture(scope="session")
def nano_cache(tmp_path_factory):
    """One cache folder for all tests that run the bundled model, so that each clip is coded once."""
    return str(tmp_path_factory.mktemp("nano") / "cache")
