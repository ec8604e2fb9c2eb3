"""Images read, hashed and decoded in worker processes while the VAE is busy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .cache_plan import content_digest, file_state
from .images import BrokenImage, Geometry, Pixels, fit_image, read_image
from .shards import Recipe, Record

MAX_BYTES = 1 << 29  # a larger file is no image for training; it is not read into memory


@dataclass(frozen=True)
class Decoded:
    """An image ready for the VAE, or the record of a broken one, which has neither pixels nor geometry."""

    record: Record
    pixels: Pixels | None = None
    geometry: Geometry | None = None


@dataclass(frozen=True)
class Batch:
    """What a worker hands over: one record per image, pixels and geometry of the good ones.

    Attributes:
        records: in path order.
        pixels: (b, resolution, resolution, 3) uint8, b of the records being good.
        geometry: b of them.
    """

    records: list[Record]
    pixels: Tensor
    geometry: list[Geometry]


def decode(folder: Path, name: str, recipe: Recipe) -> Decoded:
    """Read an image once, for its hash and its pixels; a broken one is told, never raised."""
    path = folder / name
    state = digest = None
    try:
        state = file_state(path)
        if state.size > MAX_BYTES:
            return Decoded(Record(name, *state, content_digest(path), f"the file is larger than {MAX_BYTES >> 20} MB"))
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        pixels, geometry = fit_image(read_image(data), recipe.resolution, recipe.fit)
    except BrokenImage as error:
        reason = str(error)
    except MemoryError:
        reason, digest = "too large for the memory there was", ""  # without a digest it is tried again next time
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    else:
        return Decoded(Record(name, *state, digest), pixels, geometry)
    size, mtime_ns = state or (0, 0)
    return Decoded(Record(name, size, mtime_ns, digest or "", reason))


class _Images(Dataset[Decoded]):
    def __init__(self, folder: Path, names: Sequence[str], recipe: Recipe) -> None:
        self._folder, self._names, self._recipe = folder, names, recipe

    def __getitem__(self, i: int) -> Decoded:
        return decode(self._folder, self._names[i], self._recipe)


def decoded_batches(
    folder: Path, groups: Sequence[Sequence[str]], recipe: Recipe, batch_size: int, workers: int
) -> Iterator[Iterator[Batch]]:
    """Yield, for every group of images, its batches in order; no batch spans two groups.

    So what shares a batch, and with it the last bit of the latents, depends on the group alone. The workers run ahead
    into the next groups. Every group's batches must be used up before the next group is asked for.
    """
    names = [name for group in groups for name in group]
    batches: list[list[int]] = []
    counts: list[int] = []
    start = 0
    for group in groups:
        end = start + len(group)
        own = [list(range(i, min(i + batch_size, end))) for i in range(start, end, batch_size)]
        batches += own
        counts.append(len(own))
        start = end
    loader = DataLoader(
        _Images(folder, names, recipe),
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=min(workers, len(batches)),
    )
    stream = iter(loader)
    for count in counts:
        yield islice(stream, count)


def _collate(images: list[Decoded]) -> Batch:
    good = [image.pixels for image in images if image.pixels is not None]
    return Batch(
        [image.record for image in images],
        torch.from_numpy(np.stack(good)) if good else torch.empty(0),
        [image.geometry for image in images if image.geometry is not None],
    )
