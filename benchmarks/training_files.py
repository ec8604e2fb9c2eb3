"""What the training benchmark reads: a whole checkpoint of random weights, a cache of latents, images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from ..testkit.models import save_checkpoint, unet_state_dict
from ..training.data.cache_plan import Plan, file_state, list_images, plan_cache
from ..training.data.images import Geometry
from ..training.data.shards import Recipe, Record, shard_name, vae_fingerprint, write_shard

SHARD_SIZE = 512  # the trainer's default
CACHED = 1024  # images in the cache that is trained on


@dataclass(frozen=True)
class Layout:
    """Sizes of a checkpoint's three parts.

    Attributes:
        unet: family of the demo's layouts.
        vae_widths: channels at the VAE's four resolutions.
        vae_layers: its residual blocks at each.
        text_layers: of the text encoder.
    """

    unet: str
    vae_widths: tuple[int, ...]
    vae_layers: int
    text_layers: int

    def text_encoder(self) -> CLIPTextModel:
        """Return CLIP-L with that many layers, random weights."""
        config = CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=self.text_layers,
            num_attention_heads=12,
        )
        return CLIPTextModel(config).eval().requires_grad_(False)

    def vae(self) -> AutoencoderKL:
        """Return the autoencoder, random weights."""
        return AutoencoderKL(
            block_out_channels=self.vae_widths,
            down_block_types=("DownEncoderBlock2D",) * len(self.vae_widths),
            up_block_types=("UpDecoderBlock2D",) * len(self.vae_widths),
            layers_per_block=self.vae_layers,
            latent_channels=4,
        )


# SD1.5: 859.5 M parameters in the UNet, 83.7 M in the VAE, 123.1 M in the text encoder.
FULL = Layout("sd15-full", (128, 256, 512, 512), 2, 12)
SMALL = Layout("sd15", (32, 32, 32, 32), 1, 2)


def make_checkpoint(folder: Path, layout: Layout) -> Path:
    """Write the checkpoint in fp16, as models are shared, unless it is there."""
    path = folder / f"training-{layout.unet}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        vae, clip = (_half(model.state_dict()) for model in (layout.vae(), layout.text_encoder()))
        part = path.with_suffix(".part")  # an interrupted run leaves no file that looks whole
        save_checkpoint(part, unet_state_dict(layout.unet, 0, torch.float16), vae, clip)
        part.replace(path)
    return path


def make_latents(folder: Path, vae: AutoencoderKL, size: int) -> Path:
    """Write a cache of random latents as `gcfg cache` would leave it, unless it is there."""
    cache = folder / f"latents-{size}-{vae_fingerprint(vae)[:8]}"
    if not cache.is_dir():
        part = cache.with_suffix(".part")
        recipe = Recipe(vae_fingerprint(vae), size, "resize", True)
        records = [Record(f"{index:06d}.png", 1, 1, _digest(str(index))) for index in range(CACHED)]
        for start in range(0, CACHED, SHARD_SIZE):
            _write(part, recipe, records[start : start + SHARD_SIZE], size // 8)
        part.replace(cache)
    return cache


def make_images(folder: Path, count: int, size: int) -> Path:
    """Draw soft random images."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{index:06d}.png")
    return folder


def half_done_cache(folder: Path, count: int) -> tuple[Path, Path, Recipe]:
    """Write `count` small images, and the shards of the first half of them.

    Returns: the images' folder, the cache, and its recipe.
    """
    images, cache, recipe = folder / "images", folder / "cache", Recipe("benchmark", 64, "resize", True)
    images.mkdir(parents=True)
    records = []
    for index in range(count):
        path = images / f"{index:06d}.png"
        Image.fromarray(np.full((8, 8), index % 256, np.uint8)).save(path)
        records.append(Record(path.name, *file_state(path), _digest(path.name)))
    for start in range(0, count // 2, SHARD_SIZE):
        _write(cache, recipe, records[start : min(start + SHARD_SIZE, count // 2)], 8)
    return images, cache, recipe


def plan_resumed(images: Path, cache: Path, recipe: Recipe) -> Plan:
    """Find out what is left to encode, as `gcfg cache` does before it goes on."""
    return plan_cache(images, list_images(images), cache, recipe, SHARD_SIZE)


def _write(cache: Path, recipe: Recipe, records: list[Record], side: int) -> None:
    shape = (len(records), 4, side, side)
    latents = {name: torch.rand(shape).half() for name in recipe.names}
    geometry = [Geometry(8 * side, 8 * side, 0, 0)] * len(records)
    write_shard(cache / shard_name(recipe, [record.path for record in records]), recipe, records, latents, geometry)


def _half(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value.half() for key, value in state_dict.items() if value.is_floating_point()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
