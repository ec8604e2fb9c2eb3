"""TAESD, the tiny autoencoder (github.com/madebyollin/taesd), seen by the trainer like any other.

latent = encoder(picture) / vae_scale + vae_shift          picture = decoder((latent - vae_shift) vae_scale)

ComfyUI keeps `vae_scale` in the file, so that its latents are on the scale of the full VAE's: 0.18215 where the tiny
encoder was made for what SD1.x's UNet sees. diffusers keeps no such factor and calls the scaling factor 1; the UNet
sees the same latents either way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from diffusers import AutoencoderTiny
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from torch import Tensor, nn

from ...gcfg.safetensors_file import LazyStateDict
from .architecture import Shapes
from .components import TAESD_FIRST

_KEY = re.compile(r"taesd_(encoder|decoder)\.(\d+)\.(.+)")


class TinyAutoencoder(nn.Module):
    """A TAESD whose latents are on the scale that its file states; what it encodes has no spread."""

    def __init__(
        self, tiny: AutoencoderTiny, scaling_factor: float, vae_scale: float = 1.0, vae_shift: float = 0.0
    ) -> None:
        super().__init__()
        self.encoder = _ScaledEncoder(tiny.encoder, vae_scale, vae_shift)
        self.decoder = tiny.decoder
        self.config = FrozenDict({"latent_channels": tiny.config.latent_channels, "scaling_factor": scaling_factor})

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.encoder.vae_scale.dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.encoder.vae_scale.device

    def encode(self, pictures: Tensor) -> SimpleNamespace:
        """Return the latents of pictures (B, 3, H, W) in [-1, 1] as diffusers' AutoencoderKL does, with spread 0."""
        mean = self.encoder(pictures)
        moments = torch.cat((mean, torch.zeros_like(mean)), dim=1)
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(moments, deterministic=True))

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Return pictures, (B, 3, H, W) in [-1, 1]."""
        encoder = self.encoder
        return DecoderOutput(sample=self.decoder((latents - encoder.vae_shift) * encoder.vae_scale))


class _ScaledEncoder(nn.Module):
    """The encoder with the scale of its latents, which are then a part of its state and of its fingerprint."""

    vae_scale: Tensor
    vae_shift: Tensor

    def __init__(self, encoder: nn.Module, vae_scale: float, vae_shift: float) -> None:
        super().__init__()
        self.tiny = encoder
        self.register_buffer("vae_scale", torch.tensor(vae_scale))
        self.register_buffer("vae_shift", torch.tensor(vae_shift))

    def forward(self, pictures: Tensor) -> Tensor:
        latents: Tensor = self.tiny(pictures) / self.vae_scale + self.vae_shift
        return latents


def from_file(lazy: LazyStateDict, shapes: Shapes, prefix: str, scaling_factor: float) -> TinyAutoencoder:
    """Read a TAESD in ComfyUI's keys in float32.

    Args:
        lazy: the file.
        shapes: its tensors' shapes by key.
        prefix: what stands before 'taesd_encoder.' and 'taesd_decoder.'.
        scaling_factor: from its latents to what the UNet sees.

    Raises: RuntimeError or KeyError: if weights are missing or of another shape.
    """
    weights = {ours: lazy[key].to(torch.float32, copy=True) for ours, key in _names(shapes, prefix)}
    widths = (shapes[prefix + TAESD_FIRST[0]][0],) * 4  # 64 in every published file
    with torch.device("meta"):
        tiny = AutoencoderTiny(
            latent_channels=shapes[prefix + TAESD_FIRST[1]][1],
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
        )
    tiny.load_state_dict(weights, assign=True)
    # ComfyUI's defaults where a file states none.
    scale, shift = (
        float(lazy[prefix + name]) if prefix + name in shapes else value
        for name, value in (("vae_scale", 1.0), ("vae_shift", 0.0))
    )
    return TinyAutoencoder(tiny, scaling_factor, scale, shift)


def _names(shapes: Shapes, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield diffusers' and the file's name of each weight; diffusers does not count the clamp before the decoder."""
    for key in shapes:
        if key.startswith(prefix) and (match := _KEY.fullmatch(key.removeprefix(prefix))):
            number = int(match[2]) - (match[1] == "decoder")
            yield f"{match[1]}.layers.{number}.{match[3]}", key
