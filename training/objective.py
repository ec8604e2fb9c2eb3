"""What the UNet learns to predict: eps, v or flow, from a noised latent.

x = alpha x0 + sigma n
eps:  target = n                       x0 = (x - sigma out) / alpha       # Ho et al. 2020
v:    target = alpha n - sigma x0      x0 = alpha x - sigma out           # Salimans & Ho 2022
flow: target = n - x0                  x0 = x - sigma out                 # Liu et al. 2022; alpha = 1 - sigma
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from .prior.model import Prediction

TIMESTEPS = 1000  # of Stable Diffusion's schedule, also the scale of a flow UNet's time input
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Objective:
    """The prior's parametrisation and noise schedule.

    Attributes:
        prediction: what the UNet's output means.
        alphas_cumprod: alpha^2 by timestep, (1000,); not used by flow.
        zero_terminal_snr: whether the last timestep is pure noise.
    """

    prediction: Prediction
    alphas_cumprod: Tensor
    zero_terminal_snr: bool = False

    @classmethod
    def of(cls, prediction: Prediction, zero_terminal_snr: bool = False) -> Objective:
        """Return the objective on Stable Diffusion's schedule, rescaled to end in pure noise where the base was."""
        schedule = DDPMScheduler(TIMESTEPS, **STABLE_DIFFUSION, rescale_betas_zero_snr=zero_terminal_snr)
        return cls(prediction, schedule.alphas_cumprod, zero_terminal_snr)

    def timesteps(self, u: Tensor) -> Tensor:
        """Return the UNet's time input for uniform numbers `u` in [0, 1), (B,): an integer, or 1000 u for flow."""
        return u * TIMESTEPS if self.prediction == "flow" else (u * TIMESTEPS).long()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at the time inputs `t` (B,), each (B, 1, 1, 1)."""
        if self.prediction == "flow":
            sigma = t.float() / TIMESTEPS
            alpha = 1 - sigma
        else:
            squared = self.alphas_cumprod.to(t.device)[t.long()]
            alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
        return alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)

    def noised(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x = alpha x0 + sigma noise, (B, C, H, W)."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the UNet's output at x should be, (B, C, H, W)."""
        if self.prediction == "eps":
            return noise
        if self.prediction == "flow":
            return noise - x0
        alpha, sigma = self.alpha_sigma(t)
        return alpha * noise - sigma * x0

    def denoised(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """Return the estimate of x0 that a UNet's output at x stands for, (B, C, H, W)."""
        alpha, sigma = self.alpha_sigma(t)
        if self.prediction == "eps":
            return (x - sigma * output) / alpha
        return (alpha if self.prediction == "v" else 1) * x - sigma * output

    def loss_weights(self, t: Tensor, min_snr_gamma: float) -> Tensor:
        """Return the weight of each sample's loss, (B,); 1 where `min_snr_gamma` is 0.

        eps: min(snr, gamma) / snr      v: min(snr, gamma) / (snr + 1)        # Hang et al. 2023, Eq. 16 and A.2

        A base that ends in pure noise has snr = 0 there: the limits are 1 (eps) and 0 (v).
        """
        if not min_snr_gamma:
            return torch.ones(t.shape[0], device=t.device)
        alpha, sigma = (value.flatten() for value in self.alpha_sigma(t))
        snr = (alpha / sigma) ** 2
        if self.prediction == "v":
            return snr.clamp(max=min_snr_gamma) / (snr + 1)
        return (min_snr_gamma / snr).clamp(max=1)
