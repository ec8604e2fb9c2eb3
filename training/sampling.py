"""The sampler outside ComfyUI: latents of any denoised prediction, by DPM-Solver++ (2M)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from .objective import STABLE_DIFFUSION, TIMESTEPS, Objective

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> denoised


@torch.no_grad()
def sample(denoised: Denoise, x: Tensor, objective: Objective, steps: int) -> Tensor:
    """Sample latents.

    Args:
        denoised: the guided prediction.
        x: standard normal noise, (B, C, H, W).
        objective: the schedule.
        steps: of DPM-Solver++ (2M).

    Returns: latents in the UNet's scale, (B, C, H, W).
    """
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
