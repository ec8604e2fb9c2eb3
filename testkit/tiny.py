"""A small world of real parts for the trainer: the models of an SD1.x checkpoint, 32 channels wide, and digit scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..gcfg.unet_keys import diffusers_to_ldm

RESOLUTION = 32


def tiny_unet() -> UNet2DConditionModel:
    """Return an SD1.x UNet of two resolutions and 32 channels, with everything an SD1.5 has."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
    ).eval()


def tiny_vae() -> AutoencoderKL:
    """Return an autoencoder that makes pictures eight times as wide as their latents."""
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
    )
    return vae.eval().requires_grad_(False)


def tiny_clip() -> CLIPTextModel:
    """Return a text encoder of two layers."""
    torch.manual_seed(2)
    config = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1)
    return CLIPTextModel(config).eval()


def save_checkpoint(path: Path, unet: nn.Module, vae: nn.Module, clip: nn.Module) -> Path:
    """Write them as one file: LDM's UNet keys, diffusers' VAE keys, Hugging Face's CLIP keys."""
    parts = {
        "model.diffusion_model.": diffusers_to_ldm(unet.state_dict()),
        "first_stage_model.": vae.state_dict(),
        "cond_stage_model.transformer.": clip.state_dict(),
    }
    save_file({f"{prefix}{k}": v.contiguous() for prefix, part in parts.items() for k, v in part.items()}, path)
    return path


def write_digits(folder: Path, count: int = 48) -> Path:
    """Write some of scikit-learn's handwritten digit scans into a folder."""
    for index, scan in enumerate(load_digits().images[:count]):
        pixels = (scan * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).resize((RESOLUTION, RESOLUTION), Image.Resampling.NEAREST).save(folder / f"{index}.png")
    return folder
