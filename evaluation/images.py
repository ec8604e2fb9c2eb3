"""Generated images on the disk, in zip files that are whole or not there; and the real ones of a folder."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..gcfg.errors import GuidanceError
from ..training.data.images import BrokenImage, find_images, fit_image, read_image
from ..training.files import whole_file


@dataclass(frozen=True)
class Shard:
    """Images that are made, and written, together.

    Attributes:
        prompt: place of their prompt among the task's.
        start, stop: their numbers among that prompt's images.
    """

    prompt: int
    start: int
    stop: int

    def path(self, folder: Path) -> Path:
        """Return the shard's file."""
        return folder / f"{self.prompt:03d}-{self.start:06d}-{self.stop:06d}.zip"


def shards(counts: Sequence[int], batch_size: int) -> list[Shard]:
    """Return the shards of so many images for each prompt; no shard holds images of two prompts.

    They depend on nothing else, so that every process, and every later run, makes the same batches.
    """
    return [
        Shard(prompt, start, min(start + batch_size, count))
        for prompt, count in enumerate(counts)
        for start in range(0, count, batch_size)
    ]


def write_shard(path: Path, images: Tensor, start: int, seconds: float) -> None:
    """Write images (N, 3, H, W) uint8 as PNGs, numbered from `start`, with the seconds that they took."""
    with whole_file(path) as beside, zipfile.ZipFile(beside, "w") as archive:  # stored: a PNG is compressed
        for number, image in enumerate(images, start):
            png = io.BytesIO()
            picture(image).save(png, format="PNG", compress_level=1)
            archive.writestr(f"{number:06d}.png", png.getvalue())
        archive.comment = f"{seconds:.3f} seconds".encode()


def read_shard(path: Path) -> Tensor:
    """Return the images of a shard, (N, 3, H, W) uint8.

    Raises: GuidanceError: if the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            images = [Image.open(io.BytesIO(archive.read(name))) for name in archive.namelist()]
            return torch.stack([_tensor(np.asarray(image)) for image in images])
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError) as error:
        raise GuidanceError(f"{str(path)!r} is damaged ({error}); delete it, and its images are made again.") from error


def seconds_of(path: Path) -> float:
    """Return the seconds that making a shard took."""
    with zipfile.ZipFile(path) as archive:
        return float(archive.comment.decode().split()[0])


def batches(folder: Path, prompt: int, count: int, batch_size: int) -> Iterator[Tensor]:
    """Yield a prompt's images, (N, 3, H, W) uint8 each, shard by shard."""
    for shard in shards([0] * prompt + [count], batch_size):
        yield read_shard(shard.path(folder))


def read_image_of(folder: Path, prompt: int, number: int) -> Tensor:
    """Return one image, (3, H, W) uint8.

    Raises: GuidanceError: if it is not there.
    """
    for path in sorted(folder.glob(f"{prompt:03d}-*.zip")):
        start, stop = (int(part) for part in path.stem.split("-")[1:])
        if start <= number < stop:
            return read_shard(path)[number - start]
    raise GuidanceError(
        f"{str(folder)!r} has no image {number} of prompt {prompt}, expected those of the stored result; delete the "
        "result's JSON and run the same evaluation again."
    )


def picture(image: Tensor) -> Image.Image:
    """Return an image (3, H, W) uint8 as Pillow's."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


class RealImages:
    """The images of a folder, fitted to a square, all or the first ones.

    Args:
        folder: searched recursively.
        setting: the config key, for errors.
        size: side of the square.
        count: how many; None for all.

    Raises: GuidanceError: if the folder is not there or holds too few images.
    """

    def __init__(self, folder: Path | None, setting: str, size: int, count: int | None = None) -> None:
        if folder is None:
            raise GuidanceError(f"{setting} is not set, expected a folder of images; set it.")
        self.paths = find_images(folder) if folder.is_dir() else []
        if not self.paths or len(self.paths) < (count or 0):
            raise GuidanceError(
                f"{setting} {str(folder)!r} holds {len(self.paths)} images, expected {count or 'at least one'}; name "
                "another folder."
            )
        self.paths, self._size = self.paths[:count], size

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield them in the order of their paths, (N, 3, size, size) uint8."""
        for start in range(0, len(self.paths), batch_size):
            yield torch.stack([self._read(path) for path in self.paths[start : start + batch_size]])

    def _read(self, path: Path) -> Tensor:
        try:
            return _tensor(fit_image(read_image(path.read_bytes()), self._size, "resize")[0])
        except BrokenImage as error:
            raise GuidanceError(f"{str(path)!r} cannot be used: {error}; remove it.") from error


def _tensor(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def concatenated(parts: Iterable[Tensor]) -> Tensor:
    """Return batches of images as one."""
    return torch.cat(list(parts))
