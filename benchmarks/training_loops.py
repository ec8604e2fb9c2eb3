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
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from torch.nn import functional

from ..training.config import Config
from ..training.material import read_material
from ..training.monitor import Monitor
from ..training.objective import STABLE_DIFFUSION, TIMESTEPS
from ..training.prior.model import open_prior
from ..training.run import new_accelerator, new_learner, take_step
from .bench import Bench
from .training_files import make_checkpoint, make_latents, text_encoder

TOKENS, VOCABULARY = 77, 49408
Step = Callable[[], float]


@contextmanager
def ours(bench: Bench, precision: str, output: Path, steps: int) -> Iterator[Step]:
    """Load the models, and yield a function that takes one step of `gcfg train` on a cache of latents.

    Its own functions, without samples and checkpoints; log and TensorBoard are written within the step. It returns the
    seconds that reading samples and reporting took.
    """
    checkpoint = make_checkpoint(bench)
    config = Config.model_validate(
        {
            "model": {"checkpoint": str(checkpoint)},
            "data": {"cache": str(make_latents(bench, checkpoint)), "resolution": bench.size},
            "train": {"steps": steps, "batch_size": bench.batch, "precision": precision, "ema_decay": 0.0},
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
def theirs(bench: Bench, precision: str, fused: bool) -> Iterator[Step]:
    """Load the models, and yield a function that takes one step of the peer; it returns 0.

    Args:
        bench: with the layout, the size and the batch.
        precision: "fp32" or "bf16".
        fused: give it torch's fused AdamW, which the script does not ask for.
    """
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")
    device, dtype = accelerator.device, torch.bfloat16 if precision == "bf16" else torch.float32
    prior = open_prior(make_checkpoint(bench))
    unet = prior.load_unet().train()
    vae = prior.load_vae().to(device, dtype)
    encoder = text_encoder(bench.layout).to(device, dtype)
    schedule = DDPMScheduler(TIMESTEPS, **STABLE_DIFFUSION)
    more = {"fused": True} if fused else {}
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-5, (0.9, 0.999), weight_decay=1e-2, eps=1e-8, **more)
    rates = get_scheduler("constant", optimizer)
    unet, optimizer, rates = accelerator.prepare(unet, optimizer, rates)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(bench.batch or 2, 3, bench.size, bench.size, generator=generator).to(device) * 2 - 1
    words = torch.randint(0, VOCABULARY, (len(pixels), TOKENS), generator=generator).to(device)

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
