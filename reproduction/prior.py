"""The small world's prior: an SD1.x UNet of 64 channels, trained from scratch on captions, and its ControlNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional

from ..training.objective import Objective

CHANNELS = 64  # SD1.x has 320: its GroupNorm needs a multiple of 32, `demo.widen` takes it to 320
_LEVELS = 2
_CAPTION_DROPOUT = 0.1
_EMA_DECAY = 0.9995
_HINT_CHANNELS = (16, 32, 96, 256)  # ControlNet's own

Noise = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]  # (network, x, t, positions of the pictures) -> eps


def new_unet() -> UNet2DConditionModel:
    """Return an untrained UNet in SD1.x's layout: two resolutions, one residual block each, cross-attention in all."""
    return UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=(CHANNELS,) * _LEVELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * _LEVELS,
        up_block_types=("CrossAttnUpBlock2D",) * _LEVELS,
        attention_head_dim=8,
        cross_attention_dim=768,
    )


def train_prior(
    latents: Tensor,
    captions: Sequence[Sequence[int]],
    embeddings: Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    tick: Callable[[float], object],
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Train the UNet on latents and captions; return its averaged weights in diffusers' keys.

    Args:
        latents: (N, 4, h, w).
        captions: for each latent, the numbers of the captions that are true of it.
        embeddings: of the captions, (M, 77, 768); number 0 is the empty one, which a tenth of the pictures get.
        steps: of AdamW; the learning rate is constant for the first half, then falls linearly.
        batch_size: latents of one step.
        learning_rate: after 100 steps of warm-up.
        tick: called with the loss after each step.
        device: to train on.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    unet = new_unet().to(device).train()
    unet.set_attn_processor(AttnProcessor())  # plain products: at 64 positions a tenth faster than torch's fused one

    def noise(network: nn.Module, x: Tensor, t: Tensor, chosen: Tensor) -> Tensor:
        dropped = rng.random(len(chosen)) < _CAPTION_DROPOUT
        numbers = [0 if drop else rng.choice(captions[i]) for drop, i in zip(dropped, chosen.tolist(), strict=True)]
        eps: Tensor = network(x, t, encoder_hidden_states=embeddings[numbers].to(x), return_dict=False)[0]
        return eps

    _train(unet, latents, noise, steps, batch_size, learning_rate, tick, device)
    return dict(unet.cpu().state_dict())


def train_controlnet(
    unet: UNet2DConditionModel,
    latents: Tensor,
    edges: Tensor,
    captions: Sequence[Sequence[int]],
    embeddings: Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    tick: Callable[[float], object],
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Train a ControlNet of the frozen prior on the pictures' edges; return its weights in diffusers' keys.

    Args:
        unet: the prior.
        latents: (N, 4, h, w).
        edges: of the same pictures, bool, (N, 8h, 8w).
        captions: as in `train_prior`; half of the pictures get the empty one, so that edges alone must do.
        embeddings: likewise.
        steps: likewise.
        batch_size: likewise.
        learning_rate: likewise.
        tick: likewise.
        device: likewise.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=_HINT_CHANNELS)
    open_hints(control)
    control = control.to(device).train()
    unet = unet.to(device).eval().requires_grad_(False)

    def noise(network: nn.Module, x: Tensor, t: Tensor, chosen: Tensor) -> Tensor:
        dropped = rng.random(len(chosen)) < 0.5
        numbers = [0 if drop else rng.choice(captions[i]) for drop, i in zip(dropped, chosen.tolist(), strict=True)]
        context = embeddings[numbers].to(x)
        hint = edges[chosen].to(x)[:, None].expand(-1, 3, -1, -1)
        down, middle = network(x, t, encoder_hidden_states=context, controlnet_cond=hint, return_dict=False)
        eps: Tensor = unet(
            x,
            t,
            encoder_hidden_states=context,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return eps

    _train(control, latents, noise, steps, batch_size, learning_rate, tick, device)
    return dict(control.cpu().state_dict())


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


def _train(
    network: nn.Module,
    latents: Tensor,
    noise: Noise,
    steps: int,
    batch_size: int,
    learning_rate: float,
    tick: Callable[[float], object],
    device: torch.device | str,
) -> None:
    """Train to predict eps, and leave the averaged weights in the network.

    loss = mean (eps(x, t, c) - noise)^2,   x = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise,   t uniform
    """
    objective = Objective.of("eps", False)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, fused=True)
    average = EMAModel(parameters, _EMA_DECAY, foreach=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 100) * min(1.0, 2 * (1 - step / steps))
        chosen = torch.randint(len(latents), (batch_size,))
        x0, eps = latents[chosen].to(device), torch.randn(batch_size, *latents.shape[1:]).to(device)
        t = objective.timesteps(torch.rand(batch_size).to(device))
        loss = functional.mse_loss(noise(network, objective.noised(x0, eps, t), t, chosen), eps)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.step(parameters)
        tick(loss.item())
    average.copy_to(parameters)
    network.eval()
