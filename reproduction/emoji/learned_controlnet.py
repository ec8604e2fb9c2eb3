"""The ControlNet of the world of emoji: the prior follows the edges of a picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from ...evaluation.metrics.canny import edges
from ...training.objective import Objective
from ..prior import open_hints
from .captions import draw_caption
from .learned_prior import BATCH, Latents
from .pictures import Drawings, compose
from .prompts import Prompts, read_short_text

HINT_CHANNELS = (16, 32, 96, 256)  # ControlNet's own
_CAPTION_DROPOUT = 0.5  # so that edges alone must do


def new_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """Return an untrained ControlNet of a prior."""
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS)
    open_hints(control)
    return control


def controlnet_loss(
    unet: UNet2DConditionModel,
    latents: Latents,
    drawings: Drawings,
    prompts: Prompts,
    device: torch.device | str = "cpu",
) -> Callable[[nn.Module, np.random.Generator, torch.Generator], Tensor]:
    """Return the loss of one step, (eps(x, t, c, edges) - noise)^2 of the frozen prior with the ControlNet."""
    objective = Objective.of("eps", False)
    unet = unet.to(device).eval().requires_grad_(False)
    reading = read_short_text(unet)

    def loss(control: nn.Module, rng: np.random.Generator, noise: torch.Generator) -> Tensor:
        chosen = rng.integers(0, len(latents.rows), BATCH).tolist()
        rows, places = [latents.rows[i] for i in chosen], [latents.placements[i] for i in chosen]
        captions = [
            "" if rng.random() < _CAPTION_DROPOUT else draw_caption(row.thing, row.look, place.background, rng)
            for row, place in zip(rows, places, strict=True)
        ]
        hint = edges(compose(drawings, rows, places)).float()[:, None].expand(-1, 3, -1, -1).to(device)
        x0 = latents.values[chosen].float()
        eps = torch.randn(x0.shape, generator=noise)
        t = objective.timesteps(torch.rand(BATCH, generator=noise))
        x, times = objective.noised(x0, eps, t).to(device), t.to(device)
        tokens, bias = (part.to(device) for part in prompts.short(captions))
        read_short_text(control).bias = reading.bias = bias
        down, middle = control(x, times, encoder_hidden_states=tokens, controlnet_cond=hint, return_dict=False)
        found: Tensor = unet(
            x,
            times,
            encoder_hidden_states=tokens,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return (found - eps.to(device)).square().mean()

    return loss
