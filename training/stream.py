"""The endless stream of training samples, each a pure function of (seed, position).

Order, noise, timestep and flip of a sample depend on nothing that ran before: a resumed run, another number of
processes and another micro batch see the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from torch import Tensor

_EPOCHS = 2**63  # the upper half of Philox's second key word draws orders, the lower half samples


class CachedLatents(Protocol):
    """What the stream reads; `shards.Latents` is one."""

    shape: tuple[int, int, int]
    flips: bool
    fingerprint: str

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of an image's latent, each (C, H, W); the flag asks for its mirror."""

    def geometry(self, index: int) -> tuple[int, int, int, int]:
        """Return the image's original height and width, and the crop's top and left."""


@dataclass(frozen=True)
class Batch:
    """Samples on their way to the UNet.

    Attributes:
        x0: clean latents in the UNet's scale, (B, C, H, W).
        noise: standard normal, plus the noise offset, (B, C, H, W).
        u: uniform numbers in [0, 1) that decide the timesteps, (B,).
        geometry: original height and width, crop top and left, (B, 4) int.
    """

    x0: Tensor
    noise: Tensor
    u: Tensor
    geometry: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(self.x0.to(device), self.noise.to(device), self.u.to(device), self.geometry.to(device))


class SampleStream:
    """Samples by position: position p is the p-th image ever shown to the UNet."""

    def __init__(self, latents: CachedLatents, seed: int, scaling_factor: float, noise_offset: float = 0.0) -> None:
        self._latents = latents
        self._seed = seed
        self._scaling_factor = scaling_factor
        self._noise_offset = noise_offset
        self._maker = ThreadPoolExecutor(1, "samples")
        self._coming: tuple[list[range], Future[list[Batch]]] | None = None
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def batches(self, parts: list[range], following: list[range]) -> list[Batch]:
        """Return one batch for each part; those of `following` are made in a thread meanwhile, for the next call."""
        coming = self._coming
        ready = coming[1] if coming and coming[0] == parts else self._maker.submit(self._make, parts)
        made = ready.result()
        self._coming = (following, self._maker.submit(self._make, following))
        return made

    def batch(self, positions: Sequence[int]) -> Batch:
        """Return the samples at these positions."""
        x0, noise, u, geometry = zip(*(self._sample(position) for position in positions), strict=True)
        return Batch(torch.stack(x0), torch.stack(noise), torch.tensor(u), torch.tensor(geometry))

    def image(self, position: int) -> int:
        """Return the index of the image at a position; every epoch shows each image once, in an order of its own."""
        epoch, place = divmod(position, len(self._latents))
        if self._order[0] != epoch:
            self._order = (epoch, self._random(_EPOCHS + epoch).permutation(len(self._latents)))
        return int(self._order[1][place])

    def _make(self, parts: list[range]) -> list[Batch]:
        return [self.batch(part) for part in parts]

    def _sample(self, position: int) -> tuple[Tensor, Tensor, float, tuple[int, int, int, int]]:
        random = self._random(position)
        u = float(random.random(dtype=np.float32))
        flipped = bool(random.random() < 0.5) and self._latents.flips
        image = self.image(position)
        mean, std = self._latents[image, flipped]
        shape = self._latents.shape
        x0 = (mean + std * _normal(random, shape)) * self._scaling_factor
        noise = _normal(random, shape)
        if self._noise_offset:
            noise += self._noise_offset * _normal(random, (shape[0], 1, 1))
        return x0, noise, u, self._latents.geometry(image)

    def _random(self, word: int) -> Generator:
        return Generator(Philox(key=np.array([self._seed, word], dtype=np.uint64)))


def shares(step: int, batch_size: int, micro_batch_size: int, rank: int, processes: int) -> list[range]:
    """Return the positions of one optimizer step, from 0, that one process takes, as micro batches.

    The batch size is over all processes and a multiple of their number; a micro batch size of 0 is the whole share.
    """
    share = batch_size // processes
    start = step * batch_size + rank * share
    size = micro_batch_size or share
    return [range(at, min(at + size, start + share)) for at in range(start, start + share, size)]


def _normal(random: Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
