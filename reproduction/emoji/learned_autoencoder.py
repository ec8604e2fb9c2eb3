"""The autoencoder of the world of emoji: a TAESD that learned every look, but nothing held out in 3D."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..autoencoder import signed
from .pictures import Drawing, Drawings, compose, draw_placement, shown_solid
from .vendors import THREE_D

BATCH = 16
DECODER_CHANNELS = 64  # as TAESD; the encoder has half of them
CROP = 64  # pixels of a side: a part of a picture teaches as much as the whole, at less than half of the cost
LATENT_NOISE = 0.1  # that the decoder forgives
_SOLID_SHARE = 0.35  # of the pictures: shading is what the flat looks do not teach


def autoencoder_loss(drawings: Drawings) -> Callable[[nn.Module, np.random.Generator, torch.Generator], Tensor]:
    """Return the loss of one step.

        |r - x| + (r - x)^2 + |dr - dx| + 0.02 (mean(z)^2 + (var(z) - 1)^2),   r = decode(z + noise)

    d: differences of neighbouring pixels, which keep edges sharp.
    """
    others, solid = drawings.choose(lambda row: row.look != THREE_D), drawings.choose(shown_solid)

    def loss(vae: nn.Module, rng: np.random.Generator, noise: torch.Generator) -> Tensor:
        encode, decode = vae.get_submodule("encoder"), vae.get_submodule("decoder")
        x = signed(draw_crops(drawings, others, solid, rng)).contiguous(memory_format=torch.channels_last)
        x = x.to(next(vae.parameters()).device)
        z: Tensor = encode(x).float()
        r: Tensor = decode(z + LATENT_NOISE * torch.randn(z.shape, generator=noise).to(z)).float()
        spread = z.mean((0, 2, 3)).square().mean() + (z.var((0, 2, 3)) - 1).square().mean()
        return functional.l1_loss(r, x) + functional.mse_loss(r, x) + edge_loss(r, x) + 0.02 * spread

    return loss


def decoder_loss(drawings: Drawings) -> Callable[[nn.Module, np.random.Generator, torch.Generator], Tensor]:
    """Return the loss of one step of the decoder alone: as `autoencoder_loss`, around an encoder that stays."""
    others, solid = drawings.choose(lambda row: row.look != THREE_D), drawings.choose(shown_solid)

    def loss(vae: nn.Module, rng: np.random.Generator, noise: torch.Generator) -> Tensor:
        x = signed(draw_crops(drawings, others, solid, rng)).contiguous(memory_format=torch.channels_last)
        x = x.to(next(vae.parameters()).device)
        with torch.no_grad():
            z = vae.get_submodule("encoder")(x).float()
        r = vae.get_submodule("decoder")(z + LATENT_NOISE * torch.randn(z.shape, generator=noise).to(z)).float()
        return functional.l1_loss(r, x) + functional.mse_loss(r, x) + edge_loss(r, x)

    return loss


def edge_loss(r: Tensor, x: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels' differences."""
    return sum((functional.l1_loss(r.diff(dim=side), x.diff(dim=side)) for side in (2, 3)), torch.zeros(()).to(x))


def draw_crops(
    drawings: Drawings, others: list[Drawing], solid: list[Drawing], rng: np.random.Generator, count: int = BATCH
) -> Tensor:
    """Draw parts of pictures, uint8, (count, 3, 64, 64)."""
    rows = []
    for _ in range(count):
        kind = solid if rng.random() < _SOLID_SHARE else others
        rows.append(kind[int(rng.integers(len(kind)))])
    pictures = compose(drawings, rows, [draw_placement(row, rng) for row in rows])
    corners = rng.integers(0, pictures.shape[-1] - CROP + 1, (count, 2))
    return torch.stack(
        [picture[:, y : y + CROP, x : x + CROP] for picture, (y, x) in zip(pictures, corners.tolist(), strict=True)]
    )
