"""The sampler outside ComfyUI: from noise to pictures by any denoised prediction, with DPM-Solver++ (2M)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor

from ..gcfg.combine import Delta, combine
from ..gcfg.plan import ActiveTerm, needs_base
from .objective import STABLE_DIFFUSION, TIMESTEPS, Objective
from .prior.vae import Autoencoder

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> denoised


@torch.no_grad()
def sample(denoised: Denoise, x: Tensor, objective: Objective, steps: int) -> Tensor:
    """Return latents in the UNet's scale, made of standard normal noise x by a guided prediction, each (B, C, H, W)."""
    scheduler = DPMSolverMultistepScheduler(
        TIMESTEPS,
        **STABLE_DIFFUSION,
        prediction_type="sample",  # it is handed the combined denoised prediction
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_flow_sigmas=objective.prediction == "flow",
        rescale_betas_zero_snr=objective.zero_terminal_snr,
        timestep_spacing="trailing" if objective.zero_terminal_snr else "linspace",
    )
    scheduler.set_timesteps(steps, device=x.device)
    for t in scheduler.timesteps:
        x = scheduler.step(denoised(x, t.expand(len(x))), t, x, return_dict=False)[0]
    return x


def starting_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Return standard normal noise, (len(seeds), *shape), each image's from its own seed."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def guided(prior: Denoise, concept: Denoise, weight: float) -> Denoise:
    """Return the prediction under concept guidance; what does not count is not evaluated.

    denoised = prior + weight (concept - prior)        # GCFG, Cao et al. 2023, Eq. 3 with one term
    """
    terms = [ActiveTerm(0, weight, None, "concept")] if weight else []

    def denoised(x: Tensor, t: Tensor) -> Tensor:
        base = prior(x, t) if needs_base(terms) else None
        return combine(base, [Delta(concept(x, t), term) for term in terms])

    return denoised


@torch.no_grad()
def decode(vae: Autoencoder, latents: Tensor) -> list[Image.Image]:
    """Return the pictures of latents in the UNet's scale, decoded one by one."""
    pictures = []
    for latent in latents / vae.config.scaling_factor:
        pixels = vae.decode(latent[None].to(vae.dtype)).sample[0].float()
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
        pictures.append(Image.fromarray(levels.permute(1, 2, 0).cpu().numpy()))
    return pictures
