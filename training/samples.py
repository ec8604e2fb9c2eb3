"""The pictures on which one sees a concept learn: GCFG of the concept around the frozen prior, by DPM-Solver++."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ..gcfg.combine import combine
from ..gcfg.plan import ActiveTerm, needs_base
from .concept import predict
from .config import Config
from .files import whole_file
from .learner import Learner
from .material import Material, read_vae
from .picture_grid import labelled_grid
from .prior.text_encoder import Conditions
from .prior.vae import Autoencoder
from .sampling import Denoise, sample, starting_noise


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
        latents = [
            sample(guided(prior, concept, weight), x, material.objective, config.sample.steps)
            for weight in config.sample.weights
        ]
    vae.to(device)
    captions = [f"w = {weight:g}" for weight in config.sample.weights]
    picture = labelled_grid([(caption, decode(vae, each)) for caption, each in zip(captions, latents, strict=True)])
    with whole_file(Path(config.output.folder) / "samples" / f"step-{step:08d}.png") as beside:
        picture.save(beside, format="PNG")
    return picture


def guided(prior: Denoise, concept: Denoise, weight: float) -> Denoise:
    """Return the prediction under concept guidance; what does not count is not evaluated.

        denoised = prior + weight (concept - prior)        # GCFG, Cao et al. 2023, Eq. 3 with one term

    Args:
        prior: the frozen model's denoised prediction for the empty prompt.
        concept: the concept's.
        weight: of the concept; 0 is the prior alone, 1 the concept alone.
    """
    terms = [ActiveTerm(0, weight, None, "concept")] if weight else []

    def denoised(x: Tensor, t: Tensor) -> Tensor:
        base = prior(x, t) if needs_base(terms) else None
        return combine(base, [concept(x, t) for _ in terms], terms)

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


def _denoiser(unet: nn.Module, material: Material, conditions: Conditions) -> Denoise:
    def denoised(x: Tensor, t: Tensor) -> Tensor:
        return material.objective.denoised(x, predict(unet, x, t, conditions), t)

    return denoised
