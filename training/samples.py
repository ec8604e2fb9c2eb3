"""The pictures on which one sees a concept learn: GCFG of the concept around the frozen prior, by DPM-Solver++."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ..gcfg.combine import combine
from ..gcfg.plan import ActiveTerm, needs_base
from .concept import Conditions, predict
from .config import Config
from .files import whole_file
from .learner import Learner
from .material import Material, read_vae
from .objective import STABLE_DIFFUSION, TIMESTEPS, Objective

if TYPE_CHECKING:
    from .prior.vae import Autoencoder

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> denoised

_CAPTION = 14  # pixels


def write_samples(config: Config, material: Material, learner: Learner, step: int) -> Image.Image:
    """Draw the run's grid: one row for each weight, one column for each seed, samples/step-N.png in its folder.

    The prior and the autoencoder are read anew and let go: between two grids they take no memory.
    """
    device = learner.device
    vae, unet = read_vae(material.prior, config), material.prior.load_unet().to(device)
    prior = _denoiser(unet, material, material.empty.to(device))
    x = starting_noise(config.sample.seeds, material.shape).to(device)
    with learner.averaged():
        concept = _denoiser(learner.unet, material, material.conditions.to(device))
        latents = [sample(prior, concept, w, x, material.objective, config.sample.steps) for w in config.sample.weights]
    vae.to(device)
    captions = [f"w = {weight:g}" for weight in config.sample.weights]
    picture = grid([(caption, decode(vae, each)) for caption, each in zip(captions, latents, strict=True)])
    with whole_file(Path(config.output.folder) / "samples" / f"step-{step:08d}.png") as beside:
        picture.save(beside, format="PNG")
    return picture


@torch.no_grad()
def sample(prior: Denoise, concept: Denoise, weight: float, x: Tensor, objective: Objective, steps: int) -> Tensor:
    """Sample latents under concept guidance.

        denoised = prior + weight (concept - prior)        # GCFG, Cao et al. 2023, Eq. 3 with one term

    Args:
        prior: the frozen model's denoised prediction for the empty prompt.
        concept: the concept's.
        weight: of the concept; 0 samples the prior alone, 1 the concept alone.
        x: standard normal noise, (B, C, H, W).
        objective: the schedule of both.
        steps: of DPM-Solver++ (2M).

    Returns: latents in the UNet's scale, (B, C, H, W).
    """
    scheduler = _scheduler(objective)
    scheduler.set_timesteps(steps, device=x.device)
    terms = [ActiveTerm(0, weight, None, "concept")] if weight else []
    for t in scheduler.timesteps:
        times = t.expand(len(x))
        base = prior(x, times) if needs_base(terms) else None
        denoised = combine(base, [concept(x, times) for _ in terms], terms)
        x = scheduler.step(denoised, t, x, return_dict=False)[0]
    return x


def starting_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Return standard normal noise, (len(seeds), *shape), each image's from its own seed."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def decode(vae: Autoencoder, latents: Tensor) -> list[Image.Image]:
    """Return the pictures of latents in the UNet's scale, decoded one by one."""
    pictures = []
    for latent in latents / vae.config.scaling_factor:
        pixels = vae.decode(latent[None].to(vae.dtype)).sample[0].float()
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
        pictures.append(Image.fromarray(levels.permute(1, 2, 0).cpu().numpy()))
    return pictures


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Return one picture with a captioned row for each entry."""
    captioned = []
    for caption, pictures in rows:
        for place, picture in enumerate(pictures):
            cell = Image.new("RGB", (picture.width, picture.height + _CAPTION), "white")
            cell.paste(picture, (0, _CAPTION))
            if place == 0:
                ImageDraw.Draw(cell).text((2, 1), caption, fill="black")
            captioned.append(cell)
    whole: Image.Image = make_image_grid(captioned, len(rows), len(rows[0][1]))
    return whole


def _denoiser(unet: nn.Module, material: Material, conditions: Conditions) -> Denoise:
    def denoised(x: Tensor, t: Tensor) -> Tensor:
        return material.objective.denoised(x, predict(unet, x, t, conditions), t)

    return denoised


def _scheduler(objective: Objective) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        TIMESTEPS,
        **STABLE_DIFFUSION,
        prediction_type="sample",  # it is handed the combined denoised prediction
        algorithm_type="dpmsolver++",
        solver_order=2,
        use_flow_sigmas=objective.prediction == "flow",
        rescale_betas_zero_snr=objective.zero_terminal_snr,
        timestep_spacing="trailing" if objective.zero_terminal_snr else "linspace",
    )
