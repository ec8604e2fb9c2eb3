"""What the training benchmark reads: a whole checkpoint of random weights, and a cache of latents."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ..testkit.models import save_checkpoint, unet_state_dict
from ..training.data.images import Geometry
from ..training.data.shards import Recipe, Record, shard_name, vae_fingerprint, write_shard
from ..training.prior.model import open_prior
from .bench import Bench

CACHED = 512  # images in the cache, one shard


def make_checkpoint(bench: Bench) -> Path:
    """Write the checkpoint in fp16, as models are shared, unless it is there.

    SD1.5 has 859.5 M parameters in the UNet, 83.7 M in the VAE and 123.1 M in the text encoder.
    """
    layout = bench.layout
    path = Path(bench.folder) / f"training-{layout}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        vae, clip = _half(_vae(layout)), _half(text_encoder(layout))
        part = path.with_suffix(".part")  # an interrupted run leaves no file that looks whole
        save_checkpoint(part, unet_state_dict(layout, 0, torch.float16), vae, clip)
        part.replace(path)
    return path


def make_latents(bench: Bench, checkpoint: Path) -> Path:
    """Write a cache of random latents as `gcfg cache` would leave it, unless it is there."""
    size = bench.size
    cache = checkpoint.with_name(f"{checkpoint.stem}-latents-{size}")
    if not cache.is_dir():
        part, side = cache.with_suffix(".part"), size // 8
        recipe = Recipe(vae_fingerprint(open_prior(checkpoint).load_vae()), size, "resize", True)
        names = [f"{index:06d}.png" for index in range(CACHED)]
        records = [Record(name, 1, 1, hashlib.sha256(name.encode()).hexdigest()) for name in names]
        latents = {name: torch.rand(CACHED, 4, side, side).half() for name in recipe.names}
        geometry = [Geometry(size, size, 0, 0)] * CACHED
        write_shard(part / shard_name(recipe, names), recipe, records, latents, geometry)
        part.replace(cache)
    return cache


def text_encoder(layout: str) -> CLIPTextModel:
    """Return CLIP-L, random weights; of the small layout two of its layers."""
    layers = 12 if layout == "sd15-full" else 2
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=12)
    return CLIPTextModel(config).eval().requires_grad_(False)


def _vae(layout: str) -> AutoencoderKL:
    widths, layers = ((128, 256, 512, 512), 2) if layout == "sd15-full" else ((32, 32, 32, 32), 1)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=layers,
        latent_channels=4,
    )


def _half(model: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.half() for key, value in model.state_dict().items() if value.is_floating_point()}
