"""`gcfg train --dry-run`: what a run will need, measured where it can be; nothing is written."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import checkpoints
from .concept import PIXELS
from .config import Config
from .data.cache_plan import list_images
from .data.shards import find_shards
from .learner import Learner
from .material import Material, material_of, read_material, read_prior
from .prior.vae import LATENT_CHANNELS
from .run import new_accelerator, new_learner, take_step

STEPS = 5


@dataclass(frozen=True)
class Cost:
    """What was measured and counted.

    Attributes:
        parameters: of the network.
        trained: how many of them are trained.
        state_bytes: weights, gradients, optimizer state and average.
        peak_bytes: most memory in use in the measured steps: on the device, or of this process on a CPU.
        cache_bytes: latents of all images.
        images: how many there are.
        images_per_second: over all processes.
        seconds_left: to `train.steps`.
    """

    parameters: int
    trained: int
    state_bytes: int
    peak_bytes: int
    cache_bytes: int
    images: int
    images_per_second: float
    seconds_left: float

    def lines(self) -> list[str]:
        """Return what the command prints."""
        rows = {
            "parameters": f"{self.parameters:,}, of which {self.trained:,} are trained",
            "memory": f"{_size(self.state_bytes)} for weights, gradients, optimizer and average; "
            f"{_size(self.peak_bytes)} at the peak of {STEPS} steps",
            "cache": f"{_size(self.cache_bytes)} for {self.images:,} images",
            "speed": f"{self.images_per_second:.3g} images per second over {STEPS} steps",
            "time left": str(timedelta(seconds=round(self.seconds_left))),
        }
        return [f"{name:<12} {text}" for name, text in rows.items()]


def dry_run(config: Config) -> Cost | None:
    """Take real steps in memory, on the cached latents or, before there are any, on noise; only the main process tells.

    Raises: GuidanceError: as the run itself would, but for a missing cache.
    """
    accelerator = new_accelerator(config)
    cached = bool(find_shards(Path(config.data.cache)))
    material = read_material(config) if cached else _without_cache(config)
    learner = new_learner(material, accelerator, fresh=False)
    rate = images_per_second(material, learner)
    done = checkpoints.newest(Path(config.output.folder))
    left = max(0, config.train.steps - (done.step if done else 0))
    tensors, _ = learner.state()
    gradients = sum(parameter.nbytes for parameter in learner.parameters)
    views, images = 2 if config.data.flips else 1, len(material.latents)
    cost = Cost(
        parameters=sum(parameter.numel() for parameter in learner.unet.parameters()),
        trained=learner.trained_parameters,
        state_bytes=gradients + sum(tensor.nbytes for part in tensors.values() for tensor in part.values()),
        peak_bytes=peak_memory(),
        images=images,
        cache_bytes=images * views * 2 * torch.float16.itemsize * math.prod(material.latents.shape),
        images_per_second=rate,
        seconds_left=left * config.train.batch_size / rate,
    )
    return cost if accelerator.is_main_process else None


def images_per_second(material: Material, learner: Learner) -> float:
    """Return the speed of five steps over all processes; a first one, which warms up, is not timed."""
    seconds = 0.0
    for step in tqdm(range(STEPS + 1), desc="measuring", disable=not learner.accelerator.is_main_process, leave=False):
        _, timing = take_step(material, learner, step)
        seconds += timing.seconds if step else 0.0
    return STEPS * material.config.train.batch_size / seconds


def peak_memory() -> int:
    """Return the most memory this process had in use: of the GPU if there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


class _Noise:
    """Latents of the right shape where none are cached yet."""

    flips, fingerprint = False, ""

    def __init__(self, images: int, side: int) -> None:
        self.shape = (LATENT_CHANNELS, side, side)
        self._images = images

    def __len__(self) -> int:
        return self._images

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.shape), torch.ones(self.shape)

    def geometry(self, index: int) -> tuple[int, int, int, int]:
        side = PIXELS * self.shape[-1]
        return side, side, 0, 0


def _without_cache(config: Config) -> Material:
    images = list_images(Path(config.data.images))
    return material_of(config, read_prior(config), _Noise(len(images), config.data.resolution // PIXELS), 1.0)


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
