"""What a run works on: the prior, the cached latents and the text, all read and none of it changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..gcfg.errors import GuidanceError
from .concept import Noised
from .config import Config
from .data.shards import Latents, Recipe, vae_fingerprint
from .objective import Objective
from .prior.model import Prior, open_prior
from .prior.text_encoder import Conditions
from .prior.vae import Autoencoder
from .stream import CachedLatents, SampleStream

PROBE_BATCH = 4


@dataclass(frozen=True)
class Material:
    """Everything that a run reads.

    Attributes:
        prior: the recognised checkpoint.
        objective: what the prior predicts, on its noise schedule.
        empty: conditions of the empty prompt.
        conditions: of the network in training.
        stream: the training samples.
        shape: of a latent, (C, H, W).
        images: how many there are.
        fingerprint: of the cached images.
    """

    prior: Prior
    objective: Objective
    empty: Conditions
    conditions: Conditions
    stream: SampleStream
    shape: tuple[int, int, int]
    images: int
    fingerprint: str


def read_material(config: Config) -> Material:
    """Open all that `gcfg train` reads.

    Raises: GuidanceError: one sentence, naming the setting whose file is missing or does not fit.
    """
    prior = read_prior(config)
    vae = read_vae(prior, config)
    latents = Latents.open(Path(config.data.cache), recipe(vae, config))
    return material_of(config, prior, latents, vae.config.scaling_factor, latents.fingerprint)


def material_of(
    config: Config, prior: Prior, latents: CachedLatents, scaling_factor: float, fingerprint: str
) -> Material:
    """Return the material with these latents, wherever they come from."""
    objective = Objective.of(prior.prediction, prior.zero_terminal_snr)
    empty = _conditions(prior, "", config)
    if config.model.mode == "null_text" or config.model.method == "textual_inversion":  # which reads its text itself
        conditions = Conditions.without_text(prior.context_dim, empty.pooled)
    else:
        conditions = _conditions(prior, config.model.prompt, config)
    stream = SampleStream(latents, config.train.seed, scaling_factor, config.train.noise_offset)
    return Material(prior, objective, empty, conditions, stream, latents.shape, len(latents), fingerprint)


def read_prior(config: Config) -> Prior:
    """Recognise `model.checkpoint`; `model.prediction` wins over what it says."""
    if not config.model.checkpoint:
        raise GuidanceError("model.checkpoint is not set, expected an SD1.x, SD2.x or SDXL checkpoint; set it.")
    prior = open_prior(Path(config.model.checkpoint))
    return prior if config.model.prediction == "auto" else replace(prior, prediction=config.model.prediction)


def read_vae(prior: Prior, config: Config) -> Autoencoder:
    """Read the autoencoder, the checkpoint's own or `model.vae`."""
    return prior.load_vae(_path(config.model.vae))


def recipe(vae: Autoencoder, config: Config) -> Recipe:
    """Return what decides the latents of a config's images."""
    return Recipe(vae_fingerprint(vae), config.data.resolution, config.data.fit, config.data.flips)


def probes(material: Material, samples: int, device: torch.device) -> Iterator[Noised]:
    """Yield cached latents, noised at timesteps spread evenly over the schedule, in small batches of x and t."""
    for start in range(0, samples, PROBE_BATCH):
        positions = range(start, min(start + PROBE_BATCH, samples))
        batch = material.stream.batch(positions).to(device)
        t = material.objective.timesteps((torch.tensor(positions, device=device) + 0.5) / samples)
        yield material.objective.noised(batch.x0, batch.noise, t), t


def _conditions(prior: Prior, prompt: str, config: Config) -> Conditions:
    return prior.encode_prompt(prompt, _path(config.model.text_encoder), _path(config.model.tokenizer))


def _path(setting: str) -> Path | None:
    return Path(setting) if setting else None
