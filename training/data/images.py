"""Images as the VAE sees them: found in a folder, decoded from any mode to RGB, fitted to a square.

Colours are taken as sRGB: an embedded ICC profile is not applied, as in the trainers whose models we start from.
"""

from __future__ import annotations

import io
import os
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ...gcfg.errors import GuidanceError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")  # by content; Pillow's many other readers are not let near unknown files
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs: half a gigabyte of RGB
MAX_ASPECT = 32  # beyond it, fitting to a square leaves nothing to learn from

Fit = Literal["resize", "centre_crop"]
Pixels = npt.NDArray[np.uint8]

# Pillow warns at half the size at which it refuses; MAX_PIXELS is the one limit here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BrokenImage(ValueError):
    """Why an image cannot be used: a short reason on one line, to stand after its path."""


def why_unusable(error: BrokenImage | OSError | MemoryError) -> str:
    """Return the reason why an image cannot be used, whatever came of reading it."""
    if isinstance(error, MemoryError):
        return "too large for the memory there was"
    return f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)


def unlistable(source: str, error: OSError) -> GuidanceError:
    """Return the error of a folder that the system does not let us walk; `source` is its start."""
    return GuidanceError(
        f"{source} cannot be listed: {error.strerror or error} ({error.filename}); "
        "make all of its folders readable, or move that one away."
    )


class Geometry(NamedTuple):
    """What SDXL's size conditioning is told: the upright original, and where the square was cut out of the scaled one.

    Attributes:
        original_height, original_width: pixels of the image as it is looked at, EXIF rotation applied.
        crop_top, crop_left: corner of the square in the image scaled to the resolution; 0, 0 without a crop.
    """

    original_height: int
    original_width: int
    crop_top: int
    crop_left: int


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield every file that is not hidden, nor below a hidden folder; each real folder is entered once.

    Linked folders come after all real ones, so that a loop ends and the real path of a folder wins.
    """
    folders = deque([str(folder)])
    entered: set[tuple[int, int]] = set()
    while folders:
        here = folders.popleft()
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(here) as entries:
            visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
        for entry in visible:
            if entry.is_dir(follow_symlinks=False):
                folders.appendleft(entry.path)
            elif entry.is_dir():
                folders.append(entry.path)
            elif entry.is_file() or entry.is_symlink():  # no pipes or devices; a dangling link is reported later
                yield Path(entry.path)


def is_image_name(path: Path) -> bool:
    """Tell by the suffix, in any case, whether a file should be an image."""
    return path.suffix.lower() in SUFFIXES


def find_images(folder: Path) -> list[Path]:
    """Return the images below a folder by suffix, sorted by their relative path with forward slashes."""
    found = ((path.relative_to(folder).as_posix(), path) for path in walk_files(folder) if is_image_name(path))
    return [path for _, path in sorted(found)]


def open_image(data: bytes) -> Image.Image:
    """Decode the first frame in the file's own mode, wholly.

    Raises: BrokenImage: if it is no JPEG, PNG or WebP, is cut short or damaged, or has absurd sides.
    """
    if not data:
        raise BrokenImage("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise BrokenImage("not a JPEG, PNG or WebP image, or its header is damaged") from None
    except Image.DecompressionBombError:
        raise BrokenImage(f"more than {MAX_PIXELS} pixels") from None
    except MemoryError:
        raise
    except Exception as error:
        raise _undecodable(error) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"{width} x {height} are more than {MAX_PIXELS} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BrokenImage(f"{width} x {height} is narrower than 1 : {MAX_ASPECT}")
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError and more
        raise _undecodable(error) from error
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an upright RGB image: transparency over white, 16-bit grey scaled to 8 bits, EXIF rotation applied.

    Raises: BrokenImage: if its palette or transparency is damaged.
    """
    with suppress(Exception):  # damaged EXIF: the picture itself is good
        ImageOps.exif_transpose(image, in_place=True)
    try:
        return _rgb(image)
    except MemoryError:
        raise
    except Exception as error:
        raise _undecodable(error) from error


def read_image(data: bytes) -> Image.Image:
    """Decode a file's bytes to an upright RGB image.

    Raises: BrokenImage: with the reason, if that cannot be done.
    """
    return to_rgb(open_image(data))


def fit_image(image: Image.Image, resolution: int, fit: Fit) -> tuple[Pixels, Geometry]:
    """Fit an RGB image to a square, antialiased (Lanczos).

    Args:
        image: an upright RGB image.
        resolution: side of the square in pixels.
        fit: "resize" scales both sides to it (arXiv 2312.08195, D.1: "without crop"); "centre_crop" scales the short
            side to it and cuts the middle out.

    Returns: (resolution, resolution, 3) uint8, and its geometry.
    """
    width, height = image.size
    if fit == "resize":
        square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, reducing_gap=3.0)
        return np.asarray(square), Geometry(height, width, 0, 0)
    short = min(width, height)
    scaled_width, scaled_height = (round(side * resolution / short) for side in (width, height))
    top, left = round((scaled_height - resolution) / 2), round((scaled_width - resolution) / 2)
    # The square's place in the original's pixels: scaling only that much equals scaling all and cutting.
    across, down = width / scaled_width, height / scaled_height
    right, bottom = min((left + resolution) * across, width), min((top + resolution) * down, height)
    box = (left * across, top * down, right, bottom)
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return np.asarray(square), Geometry(height, width, top, left)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bit_grey(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bit_grey(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255; Pillow's own conversion clips at 255. Older ones give 16-bit PNGs as mode I."""
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    grey = ((values + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _undecodable(error: Exception) -> BrokenImage:
    lines = str(error).splitlines()
    return BrokenImage(f"cannot be decoded: {lines[0] if lines else type(error).__name__}")
