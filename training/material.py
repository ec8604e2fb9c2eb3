"""What a run works on: the prior, the cached latents and the text, all read and none of it changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..gcfg.errors import GuidanceError
from .concept import Noised
from .config import Config
from .data.cache import CacheReport, build_cache
from .data.shards import Latents, Recipe, vae_fingerprint
from .objective import Objective
from .prior.model import Prior, open_prior
from .prior.text_encoder import Conditions
from .prior.vae import Autoencoder
from .processes import alone_in, join_processes
from .stream import CachedLatents, SampleStream

PROBE_BATCH = 4


@dataclass(frozen=True)
class Material:
    """Everything that a run reads.

    Attributes:
        config: the run's.
        prior: the recognised checkpoint.
        objective: what the prior predicts, on its noise schedule.
        empty: conditions of the empty prompt.
        conditions: of the network in training.
        latents: of the images.
        stream: the training samples made of them.
    """

    config: Config
    prior: Prior
    objective: Objective
    empty: Conditions
    conditions: Conditions
    latents: CachedLatents
    stream: SampleStream


def encode_images(config: Config) -> CacheReport:
    """Bring the cache up to date with the images; called by every process of a run.

    Raises: GuidanceError: one sentence; what was encoded before stays.
    """
    data = config.data
    if not data.images:
        raise GuidanceError("data.images is not set, expected a folder of images; set it.")
    vae = read_vae(read_prior(config), config)
    device = join_processes().device
    with alone_in(Path(data.cache), "data.cache"):
        return build_cache(
            Path(data.images),
            Path(data.cache),
            vae.to(device),
            _recipe(vae, config),
            shard_size=data.shard_size,
            batch_size=data.encode_batch_size,
            workers=data.workers,
        )


def read_material(config: Config) -> Material:
    """Open all that `gcfg train` reads.

    Raises: GuidanceError: one sentence, naming the setting whose file is missing or does not fit.
    """
    prior = read_prior(config)
    vae = read_vae(prior, config)
    latents = Latents.open(Path(config.data.cache), _recipe(vae, config))
    return material_of(config, prior, latents, vae.config.scaling_factor)


def material_of(config: Config, prior: Prior, latents: CachedLatents, scaling_factor: float) -> Material:
    """Return the material with these latents, wherever they come from."""
    model = config.model
    paths = _path(model.text_encoder), _path(model.tokenizer)
    objective = Objective.of(prior.prediction, prior.zero_terminal_snr)
    empty = prior.encode_prompt("", *paths)
    if model.mode == "null_text" or model.method == "textual_inversion":  # which reads its text itself
        conditions = Conditions.without_text(prior.context_dim, empty.pooled)
    else:
        conditions = prior.encode_prompt(model.prompt, *paths)
    stream = SampleStream(latents, config.train.seed, scaling_factor, config.train.noise_offset)
    return Material(config, prior, objective, empty, conditions, latents, stream)


def read_prior(config: Config) -> Prior:
    """Recognise `model.checkpoint`; `model.prediction` wins over what it says."""
    if not config.model.checkpoint:
        raise GuidanceError("model.checkpoint is not set, expected an SD1.x, SD2.x or SDXL checkpoint; set it.")
    prior = open_prior(Path(config.model.checkpoint))
    return prior if config.model.prediction == "auto" else replace(prior, prediction=config.model.prediction)


def read_vae(prior: Prior, config: Config) -> Autoencoder:
    """Read the autoencoder, the checkpoint's own or `model.vae`."""
    return prior.load_vae(_path(config.model.vae))


def probes(material: Material, samples: int, device: torch.device) -> Iterator[Noised]:
    """Yield cached latents, noised at timesteps spread evenly over the schedule, in small batches of x and t."""
    for start in range(0, samples, PROBE_BATCH):
        positions = range(start, min(start + PROBE_BATCH, samples))
        batch = material.stream.batch(positions).to(device)
        t = material.objective.timesteps((torch.tensor(positions, device=device) + 0.5) / samples)
        yield material.objective.noised(batch.x0, batch.noise, t), t


def _recipe(vae: Autoencoder, config: Config) -> Recipe:
    return Recipe(vae_fingerprint(vae), config.data.resolution, config.data.fit, config.data.flips)


def _path(setting: str) -> Path | None:
    return Path(setting) if setting else None
