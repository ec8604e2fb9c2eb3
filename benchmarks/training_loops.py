"""The two loops of the training benchmark: the trainer's own functions, and the peer.

The peer is what diffusers' example train_text_to_image.py does in a step, on the same checkpoint, written from its
logic with its own defaults: VAE and text encoder stay in memory and run in every step, AdamW as torch makes it,
gradients clipped. In its favour, its images are decoded and its captions tokenised before the clock starts, and it
writes no log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.nn import functional

from ..training.config import Config
from ..training.material import read_material
from ..training.monitor import Monitor
from ..training.objective import STABLE_DIFFUSION, TIMESTEPS
from ..training.prior.model import open_prior
from ..training.run import new_accelerator, new_learner, take_step
from .training_files import text_encoder

TOKENS, VOCABULARY = 77, 49408
Step = Callable[[], float]


@dataclass(frozen=True)
class Setting:
    """What both loops share.

    Attributes:
        checkpoint: the prior's file.
        size: side of the images, in pixels.
        batch: images of a step.
        precision: "fp32" or "bf16".
    """

    checkpoint: Path
    size: int
    batch: int
    precision: str


@contextmanager
def ours(setting: Setting, latents: Path, output: Path, steps: int) -> Iterator[Step]:
    """Load the models, and yield a function that takes one step of `gcfg train` on a cache of latents.

    Its own functions, without samples and checkpoints; log and TensorBoard are written within the step. It returns the
    seconds that reading samples and reporting took.
    """
    config = Config.model_validate(
        {
            "model": {"checkpoint": str(setting.checkpoint)},
            "data": {"cache": str(latents), "resolution": setting.size},
            "train": {
                "steps": steps,
                "batch_size": setting.batch,
                "precision": setting.precision,
                "ema_decay": 0.0,
            },
            "output": {"folder": str(output)},
        }
    )
    accelerator = new_accelerator(config)
    material = read_material(config)
    learner = new_learner(material, accelerator, fresh=False)
    monitor, taken = Monitor(config, 0), 0

    def step() -> float:
        nonlocal taken
        result, timing = take_step(material, learner, taken)
        taken += 1
        start = time.perf_counter()
        monitor.step(taken, result, 0, timing)
        return timing.data_seconds + time.perf_counter() - start

    yield step
    monitor.close()


@contextmanager
def theirs(setting: Setting, layout: str, fused: bool) -> Iterator[Step]:
    """Load the models, and yield a function that takes one step of the peer; it returns 0.

    Args:
        setting: what both loops share.
        layout: of the checkpoint.
        fused: give it torch's fused AdamW, which the script does not ask for.
    """
    accelerator = Accelerator(mixed_precision="bf16" if setting.precision == "bf16" else "no")
    device, dtype = accelerator.device, torch.bfloat16 if setting.precision == "bf16" else torch.float32
    prior = open_prior(setting.checkpoint)
    unet = prior.load_unet().train()
    vae = prior.load_vae().to(device, dtype)
    encoder = text_encoder(layout).to(device, dtype)
    schedule = DDPMScheduler(TIMESTEPS, **STABLE_DIFFUSION)
    more = {"fused": True} if fused else {}
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-5, (0.9, 0.999), weight_decay=1e-2, eps=1e-8, **more)
    rates = get_scheduler("constant", optimizer)
    unet, optimizer, rates = accelerator.prepare(unet, optimizer, rates)
    pixels, words = _inputs(setting, device)

    def step() -> float:
        latents = vae.encode(pixels.to(dtype)).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = torch.randint(0, TIMESTEPS, (len(latents),), device=device)
        noisy = schedule.add_noise(latents, noise, t)
        output = unet(noisy, t, encoder(words)[0], return_dict=False)[0]
        loss = functional.mse_loss(output.float(), noise.float())
        accelerator.gather(loss.repeat(len(latents))).mean().item()  # for its progress bar
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        return 0.0

    yield step


def _inputs(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a batch of pixels in [-1, 1] and of tokens."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(setting.batch, 3, setting.size, setting.size, generator=generator) * 2 - 1
    words = torch.randint(0, VOCABULARY, (setting.batch, TOKENS), generator=generator)
    return pixels.to(device), words.to(device)
