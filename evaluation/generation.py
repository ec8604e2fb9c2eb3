"""A method's images, made by all processes, each shard by one; what is already on the disk is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from ..training.concept import PIXELS
from ..training.files import remove_unfinished
from ..training.prior.vae import LATENT_CHANNELS
from ..training.sampling import sample, starting_noise
from .config import SamplingConfig
from .images import Shard, shards, write_shard
from .models import Models
from .recipe import Recipe
from .sampling import controlled, decode, denoiser

# The conditions of images by their numbers, (N, 3, H, W) in [0, 1].
Hints = Callable[[range], Tensor]


@dataclass(frozen=True)
class Order:
    """Images that are asked for.

    Attributes:
        recipe: how they are made.
        weights: one for each of its terms.
        prompts: for '{prompt}'.
        counts: images of each prompt.
        hints: their conditions, where a term has control = true.
        search: whether they serve to choose weights; those have seeds of their own, or the choice would flatter the
            final numbers.
    """

    recipe: Recipe
    weights: tuple[float, ...]
    prompts: Sequence[str]
    counts: Sequence[int]
    hints: Hints | None = None
    search: bool = False


def generate(
    order: Order, folder: Path, models: Callable[[], Models], sampling: SamplingConfig, title: str
) -> list[Path]:
    """Make what is missing of an order, together with the other processes.

    Args:
        order: what is asked for.
        folder: for these images alone.
        models: called if anything is missing.
        sampling: how.
        title: of the progress bar.

    Returns: the shards' files, all of them there.
    """
    state = PartialState()
    wanted = shards(order.counts, sampling.batch_size)
    paths = [shard.path(folder) for shard in wanted]
    missing = [shard for shard, path in zip(wanted, paths, strict=True) if not path.is_file()]
    state.wait_for_everyone()  # all have seen the same files before any writes one
    own = missing[state.process_index :: state.num_processes]
    images = sum(shard.stop - shard.start for shard in own)
    with tqdm(total=images, desc=title, unit="image", disable=not (own and state.is_main_process)) as bar:
        for shard in own:
            began = time.perf_counter()
            made = make(order, shard, models(), sampling)
            write_shard(shard.path(folder), made, shard.start, time.perf_counter() - began)
            bar.update(len(made))
    state.wait_for_everyone()
    if state.is_main_process:
        remove_unfinished(folder)  # of killed runs
    return paths


def make(order: Order, shard: Shard, models: Models, sampling: SamplingConfig) -> Tensor:
    """Return the images of one shard, (N, 3, H, W) uint8; each has its own seed."""
    numbers = range(shard.start, shard.stop)
    guidance = models.guidance(order.recipe, order.weights, order.prompts[shard.prompt])
    side = sampling.size // PIXELS
    seeds = [image_seed(sampling.seed, order.search, shard.prompt, number) for number in numbers]
    noise = starting_noise(seeds, (LATENT_CHANNELS, side, side)).to(models.device)
    controls = any(term.control and weight for term, weight in zip(order.recipe.terms, order.weights, strict=True))
    controlnet, layers = models.control if controls else (None, None)
    vae = models.vae
    with torch.inference_mode():
        control = None
        if order.hints and controlnet and layers:
            control = controlled(controlnet, layers(order.hints(numbers).to(next(layers.parameters()))))
        latents = sample(denoiser(guidance, models.objective, control), noise, models.objective, sampling.steps)
        return decode(vae, latents)


def image_seed(seed: int, search: bool, prompt: int, number: int) -> int:
    """Return the seed of one image's noise: equal for all methods and weights, different for all images of a task."""
    words = np.random.SeedSequence((seed, search, prompt, number)).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1
