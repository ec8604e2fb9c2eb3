"""The ControlNet of the world: the prior follows the edges of a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from ..evaluation.metrics.canny import edges
from ..gcfg.unet_keys import diffusers_to_ldm
from ..training.objective import Objective
from .captions import draw_caption
from .pictures import Drawings, compose
from .prior import BATCH, Latents
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


def open_hints(control: ControlNetModel) -> None:
    """Start the layers that read edges at full strength, and let only the last of them learn.

    Layers made for a long training start near zero: within some hundred steps nothing of the edges would pass them.
    """
    hints = control.controlnet_cond_embedding
    hints.requires_grad_(False)
    for layer in (hints.conv_in, *hints.blocks, hints.conv_out):
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    hints.conv_out.requires_grad_(True)


def controlnet_to_ldm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a diffusers ControlNet in the keys of published ControlNet files, `control_model.` first."""
    own = {name: tensor for name, tensor in state_dict.items() if name.startswith("control")}
    ldm = diffusers_to_ldm({name: tensor for name, tensor in state_dict.items() if name not in own})
    hints = sum(name.startswith("controlnet_cond_embedding.blocks.") and name.endswith("weight") for name in own)
    for name, tensor in own.items():
        part, _, kind = name.rpartition(".")
        match part.split("."):
            case ["controlnet_cond_embedding", "conv_in"]:
                place = "input_hint_block.0"
            case ["controlnet_cond_embedding", "blocks", number]:
                place = f"input_hint_block.{2 * int(number) + 2}"
            case ["controlnet_cond_embedding", "conv_out"]:
                place = f"input_hint_block.{2 * hints + 2}"
            case ["controlnet_down_blocks", number]:
                place = f"zero_convs.{number}.0"
            case _:
                place = "middle_block_out.0"
        ldm[f"{place}.{kind}"] = tensor
    return {f"control_model.{name}": tensor for name, tensor in ldm.items()}
