"""Images read, hashed and decoded in worker processes while the VAE is busy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .cache_plan import FileState, content_digest, file_state
from .images import BrokenImage, Geometry, fit_image, read_image, why_unusable
from .shards import Recipe, Record

MAX_BYTES = 1 << 29  # a larger file is no image for training; it is not read into memory


@dataclass(frozen=True)
class Decoded:
    """An image ready for the VAE, or the record of a broken one, which has neither pixels nor geometry.

    Attributes:
        record: the file as it was read.
        pixels: (resolution, resolution, 3) uint8.
        geometry: where the square was cut out.
    """

    record: Record
    pixels: Tensor | None = None
    geometry: Geometry | None = None


def decode(folder: Path, name: str, recipe: Recipe) -> Decoded:
    """Read an image once, for its hash and its pixels; a broken one is told, never raised."""
    path = folder / name
    state, digest = FileState(0, 0), ""
    try:
        state = file_state(path)
        if state.size > MAX_BYTES:
            return Decoded(Record(name, *state, content_digest(path), f"the file is larger than {MAX_BYTES >> 20} MB"))
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        pixels, geometry = fit_image(read_image(data), recipe.resolution, recipe.fit)
    except (BrokenImage, OSError, MemoryError) as error:
        if isinstance(error, MemoryError):
            digest = ""  # so that it is tried again next time
        return Decoded(Record(name, *state, digest, why_unusable(error)))
    return Decoded(Record(name, *state, digest), torch.tensor(pixels), geometry)


class _Images(Dataset[Decoded]):
    """Images by name, which the loader takes for their index."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self._folder, self._recipe = folder, recipe

    def __getitem__(self, name: str) -> Decoded:
        return decode(self._folder, name, self._recipe)


def decoded_batches(
    folder: Path, groups: Sequence[list[str]], recipe: Recipe, batch_size: int, workers: int
) -> Iterator[Iterator[list[Decoded]]]:
    """Yield, for every group of images, its batches in order; no batch spans two groups.

    So what shares a batch, and with it the last bit of the latents, depends on the group alone. The workers run ahead
    into the next groups. Every group's batches must be used up before the next group is asked for.
    """
    batches = [[group[i : i + batch_size] for i in range(0, len(group), batch_size)] for group in groups]
    every = [batch for own in batches for batch in own]
    loader = DataLoader(
        _Images(folder, recipe), batch_sampler=every, collate_fn=list, num_workers=min(workers, len(every))
    )
    stream = iter(loader)
    for own in batches:
        yield islice(stream, len(own))
