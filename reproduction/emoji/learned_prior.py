"""The prior of the world of emoji: an SD1.x UNet of 64 and 128 channels that learned the flat looks with captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...training.files import whole_file
from ...training.objective import Objective
from ..autoencoder import encode
from .captions import draw_caption
from .pictures import Drawing, Drawings, Placement, compose, draw_placement
from .prompts import Prompts, read_short_text

CHANNELS = (64, 128)  # SD1.x has 320 and 640: its GroupNorm needs multiples of 32, `testkit.widen` takes them there
BATCH = 32
CAPTION_DROPOUT = 0.1
_MIN_SNR = 5.0  # of the loss's weights (Hang et al. 2023): without them the last steps' noise takes most of it
_SEED = 11


def new_unet() -> UNet2DConditionModel:
    """Return an untrained UNet in SD1.x's layout: two resolutions, attention in the lower one only.

    4.6 million parameters; attention in the upper one too would halve the pictures per second.
    """
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        cross_attention_dim=768,
    )


@dataclass(frozen=True)
class Latents:
    """Encoded pictures.

    Attributes:
        values: (N, 4, 12, 12), half precision.
        rows: what each one shows.
        placements: how.
    """

    values: Tensor
    rows: list[Drawing]
    placements: list[Placement]


def placed(rows: Sequence[Drawing], variants: int) -> tuple[list[Drawing], list[Placement]]:
    """Return each drawing in several places, the same ones at every call."""
    pairs = [
        (row, draw_placement(row, np.random.default_rng((_SEED, row.number, variant))))
        for row in rows
        for variant in range(variants)
    ]
    return [row for row, _ in pairs], [place for _, place in pairs]


def write_latents(drawings: Drawings, rows: Sequence[Drawing], variants: int, vae: Path, path: Path) -> None:
    """Encode each drawing in several places; the file holds nothing that `placed` tells."""
    weights = load_file(vae)
    all_rows, places = placed(rows, variants)
    values = [
        encode(weights, compose(drawings, all_rows[i : i + 64], places[i : i + 64])).half()
        for i in range(0, len(all_rows), 64)
    ]
    with whole_file(path) as beside:
        save_file({"latents": torch.cat(values)}, beside)


def read_latents(rows: Sequence[Drawing], variants: int, path: Path) -> Latents:
    """Read what `write_latents` wrote of the same drawings."""
    return Latents(load_file(path)["latents"], *placed(rows, variants))


def prior_loss(
    latents: Latents, prompts: Prompts, device: torch.device | str = "cpu"
) -> Callable[[nn.Module, np.random.Generator, torch.Generator], Tensor]:
    """Return the loss of one step.

    w(t) (eps(x, t, c) - noise)^2,   x = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise,   t uniform
    """
    objective = Objective.of("eps", False)

    def loss(unet: nn.Module, rng: np.random.Generator, noise: torch.Generator) -> Tensor:
        chosen = rng.integers(0, len(latents.rows), BATCH).tolist()
        captions = [
            ""
            if rng.random() < CAPTION_DROPOUT
            else draw_caption(latents.rows[i].thing, latents.rows[i].look, latents.placements[i].background, rng)
            for i in chosen
        ]
        x0 = latents.values[chosen].float()
        eps = torch.randn(x0.shape, generator=noise)
        t = objective.timesteps(torch.rand(BATCH, generator=noise))
        x = objective.noised(x0, eps, t).contiguous(memory_format=torch.channels_last)
        found = predict(unet, x.to(device), t.to(device), prompts, captions)
        squared = (found - eps.to(device)).square().mean((1, 2, 3))
        return (squared * objective.loss_weights(t, _MIN_SNR).to(device)).mean()

    return loss


def predict(unet: nn.Module, x: Tensor, t: Tensor, prompts: Prompts, captions: Sequence[str]) -> Tensor:
    """Return a UNet's output for short prompts; see `read_short_text`."""
    tokens, bias = prompts.short(captions)
    read_short_text(unet).bias = bias.to(x)
    out: Tensor = unet(x, t, encoder_hidden_states=tokens.to(x), return_dict=False)[0]
    return out
