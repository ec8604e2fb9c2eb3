"""`gcfg validate`: look through a folder of images, or a cache of latents, and say what is wrong with it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from ...gcfg.errors import GuidanceError
from .images import BrokenImage, is_image_name, open_image, to_rgb, unlistable, walk_files, why_unusable
from .shards import INCOMPLETE, Shard, find_shards, read_shard, recipe_difference

SHOWN = 20  # examples of each kind in the report


@dataclass(frozen=True)
class Validation:
    """The report, line by line, and whether the data can be trained on as it is."""

    lines: tuple[str, ...]
    clean: bool


@dataclass(frozen=True)
class _Image:
    name: str
    reason: str = ""  # "" for a good one; all below is of good ones
    kind: str = ""  # "JPEG CMYK"
    size: tuple[int, int] = (0, 0)  # upright: width, height
    sha256: str = ""


def validate(path: Path, resolution: int | None = None, threads: int = 4) -> Validation:
    """Check a folder of images or a cache of latents, whole.

    Args:
        path: either folder; a cache is told by its shards.
        resolution: the side that images will be trained at, if it is known: smaller images are counted, and a cache of
            another resolution is not clean.
        threads: images decoded at once.

    Raises: GuidanceError: if there is no such folder, or neither images nor shards in it.
    """
    if not path.is_dir():
        raise GuidanceError(f"DATA {str(path)!r} was not found, expected a folder of images or a cache of latents.")
    if find_shards(path) or (path / INCOMPLETE).exists():
        return _validate_cache(path, resolution)
    try:
        return _validate_images(path, resolution, threads)
    except OSError as error:
        raise unlistable(f"DATA {str(path)!r}", error) from error


def _validate_images(folder: Path, resolution: int | None, threads: int) -> Validation:
    files = sorted((path.relative_to(folder).as_posix(), path) for path in walk_files(folder))
    paths = [(name, path) for name, path in files if is_image_name(path)]
    others = len(files) - len(paths)
    if not paths:
        raise GuidanceError(
            f"DATA {str(folder)!r} holds no image and no cached latents ({others} other files), expected .jpg, .jpeg, "
            ".png or .webp files; name another folder."
        )
    with ThreadPoolExecutor(max(1, threads)) as pool:
        images = list(pool.map(_look_at, paths))
    good = [image for image in images if not image.reason]
    broken = [f"{image.name}: {image.reason}" for image in images if image.reason]
    lines = [f"{len(paths)} images: {len(good)} good, {len(broken)} broken"]
    lines += [f"  {count} {kind}" for kind, count in sorted(Counter(image.kind for image in good).items())]
    if good:
        sides = [min(image.size) for image in good]
        lines.append(f"  short sides of {min(sides)} to {max(sides)} pixels")
    lines += _listed("broken", broken)
    if resolution is not None:
        small = [f"{i.name}: {i.size[0]} x {i.size[1]}" for i in good if min(i.size) < resolution]
        lines += _listed(f"smaller than {resolution} pixels, will be enlarged", small)
    lines += _listed("byte-identical, each will be trained on", _duplicates(good))
    if others:
        lines.append(f"{others} other files, ignored")
    return Validation(tuple(lines), not broken)


def _look_at(file: tuple[str, Path]) -> _Image:
    name, path = file
    try:
        data = path.read_bytes()
        image = open_image(data)
        kind, upright = f"{image.format} {image.mode}", to_rgb(image)
    except (BrokenImage, OSError, MemoryError) as error:
        return _Image(name, why_unusable(error))
    return _Image(name, "", kind, upright.size, hashlib.sha256(data).hexdigest())


def _duplicates(images: Iterable[_Image]) -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for image in images:
        groups[image.sha256].append(image.name)
    return [" = ".join(names) for names in groups.values() if len(names) > 1]


def _validate_cache(folder: Path, resolution: int | None) -> Validation:
    problems: list[str] = []
    shards: list[Shard] = []
    for path in find_shards(folder):
        try:
            shard = read_shard(path)
            problems += [f"{path.name}: {problem}" for problem in _damage(shard)]
            shards.append(shard)
        except (GuidanceError, OSError) as error:
            problems.append(str(error))
    if (folder / INCOMPLETE).exists():
        problems.append("unfinished: run `gcfg cache CONFIG` again, it goes on where it stopped")
    for shard in shards[1:]:
        if difference := recipe_difference(shard.recipe, shards[0].recipe, shards[0].path.name):
            problems.append(f"{shard.path.name}: made {difference}")
    times = Counter(record.path for shard in shards for record in shard.records)
    problems += [f"{path}: in the cache {count} times" for path, count in sorted(times.items()) if count > 1]
    if resolution is not None and shards and shards[0].recipe.resolution != resolution:
        problems.append(f"made with data.resolution = {shards[0].recipe.resolution}, expected {resolution}")
    entries = sum(len(shard.entries) for shard in shards)
    if not entries:
        problems.append("no good image in it, expected at least one")
    lines = [f"{entries} images in {len(shards)} shards"]
    if shards:
        recipe = shards[0].recipe
        flips = "with" if recipe.flips else "without"
        lines.append(f"  resolution {recipe.resolution}, {recipe.fit}, {flips} flips, VAE {recipe.vae[:12]}")
    lines += _listed("problems", problems)
    broken = sorted(record for shard in shards for record in shard.broken)
    lines += _listed("broken images, skipped", [f"{record.path}: {record.reason}" for record in broken])
    return Validation(tuple(lines), not problems)


def _damage(shard: Shard) -> list[str]:
    """Read every tensor of a shard; name those that hold what no VAE gives."""
    problems = []
    with safe_open(str(shard.path), framework="pt") as file:
        for name in shard.recipe.names:
            tensor = file.get_tensor(name)
            if not tensor.isfinite().all():
                problems.append(f"{name} has NaN or infinite values")
            elif name.startswith("std") and (tensor < 0).any():
                problems.append(f"{name} has negative values")
    return problems


def _listed(title: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = [f"  and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return [f"{len(items)} {title}:", *(f"  {item}" for item in items[:SHOWN]), *more]
