"""The peer: what diffusers' example train_text_to_image.py does in a step, on the same checkpoint.

Written from its logic, with its own defaults: VAE and text encoder stay in memory and run in every step, AdamW as torch
makes it, gradients clipped, EMA on request. In its favour, its images are decoded and its captions tokenised before the
clock starts, and it writes no log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional

from ..training.objective import STABLE_DIFFUSION, TIMESTEPS
from ..training.prior.model import open_prior
from .training_files import Layout

TOKENS, VOCABULARY = 77, 49408


@dataclass(frozen=True)
class PeerSettings:
    """What both loops share, and the one thing in which the peer may be brought closer to ours.

    Attributes:
        checkpoint: the prior's file.
        layout: its sizes.
        size: side of the images, in pixels.
        batch: images of a step.
        precision: "fp32" or "bf16".
        ema: whether an average of the weights is kept.
        fused: give it torch's fused AdamW, which the script does not ask for.
    """

    checkpoint: Path
    layout: Layout
    size: int
    batch: int
    precision: str
    ema: bool
    fused: bool


def make_peer(settings: PeerSettings) -> Callable[[], float]:
    """Load the models and return a function that takes one step and returns its loss."""
    accelerator = Accelerator(mixed_precision="bf16" if settings.precision == "bf16" else "no")
    device, dtype = accelerator.device, torch.bfloat16 if settings.precision == "bf16" else torch.float32
    prior = open_prior(settings.checkpoint)
    unet = prior.load_unet().train()
    vae = prior.load_vae().to(device, dtype)
    text_encoder = settings.layout.text_encoder().to(device, dtype)
    schedule = DDPMScheduler(TIMESTEPS, **STABLE_DIFFUSION)
    ema = EMAModel(unet.parameters(), model_cls=type(unet), model_config=unet.config) if settings.ema else None
    more = {"fused": True} if settings.fused else {}
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-5, (0.9, 0.999), weight_decay=1e-2, eps=1e-8, **more)
    rates = get_scheduler("constant", optimizer)
    unet, optimizer, rates = accelerator.prepare(unet, optimizer, rates)
    if ema:
        ema.to(device)
    pixels, words = _inputs(settings, device)

    def step() -> float:
        latents = vae.encode(pixels.to(dtype)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = torch.randint(0, TIMESTEPS, (len(latents),), device=device)
        noisy = schedule.add_noise(latents, noise, t)
        context = text_encoder(words)[0]
        output = unet(noisy, t, context, return_dict=False)[0]
        loss = functional.mse_loss(output.float(), noise.float())
        told = accelerator.gather(loss.repeat(len(latents))).mean().item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if ema:
            ema.step(unet.parameters())
        return float(told)

    return step


def _inputs(settings: PeerSettings, device: Any) -> tuple[Tensor, Tensor]:
    """Return a batch of pixels in [-1, 1] and of tokens."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(settings.batch, 3, settings.size, settings.size, generator=generator) * 2 - 1
    words = torch.randint(0, VOCABULARY, (settings.batch, TOKENS), generator=generator)
    return pixels.to(device), words.to(device)
