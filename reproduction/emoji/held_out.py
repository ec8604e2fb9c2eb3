"""How near a method comes to pictures that it never saw: the held-out things in the concept's look, which do exist.

The paper could not measure this; here the truth is known. And what a second judge says of the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...evaluation.images import read_shard
from ...evaluation.results import RESULTS, read_result
from .things import things

Features = Callable[[Tensor], Tensor]
Shows = Callable[[Tensor, str], Tensor]


def distance(images: Tensor, truth: Tensor, features: Features) -> float:
    """Return how far images are from a true picture, whatever place and background it is given.

        mean_i min_t |f(i) - f(t)|

    Args:
        images: uint8, (N, 3, H, W).
        truth: the true picture in many placements, uint8, (M, 3, H, W).
        features: of pictures, (N, 3, H, W) -> (N, D).
    """
    with torch.no_grad():
        return float(torch.cdist(features(images), features(truth)).amin(1).mean())


def measure_held_out(evaluation: Path, truth: Path, features: Features, second: Shows) -> dict[str, dict[str, float]]:
    """Measure the images of every text-guided method that were asked for held-out things.

    Args:
        evaluation: the output folder of `gcfg evaluate`.
        truth: the concept's held-out pictures, each named after its thing.
        features: of pictures.
        second: the second judge.

    Returns: by method: `distance` and `alignment` as the second judge sees it, means over the held-out things, and
        `second`, the latter over all prompts.
    """
    found = {}
    for path in sorted((evaluation / RESULTS).glob("alignment-*.json")):
        result = read_result(path)
        if result:
            distances, held, every = [], [], []
            for label, images in _images(evaluation, result):
                seen = float(second(images, label).float().mean())
                every.append(seen)
                if label in _HELD_OUT:
                    distances.append(distance(images, _truth(truth, label), features))
                    held.append(seen)
            found[result["method"]] = {
                "distance": _mean(distances),
                "alignment": _mean(held),
                "second": _mean(every),
            }
    return found


def truth_distance(truth: Path, features: Features) -> float:
    """Return the distance of real pictures among themselves: half of each thing's placements to the other half."""
    names = [name for name in sorted(_HELD_OUT) if any(truth.glob(f"{name}-[0-9]*.png"))]
    pictures = [_truth(truth, name) for name in names]
    return _mean([distance(own[::2], own[1::2], features) for own in pictures])


_HELD_OUT = {thing.name for thing in things() if thing.held_out}


def _images(evaluation: Path, result: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for number, detail in enumerate(result["details"]):
        paths = sorted((evaluation / result["images"]).glob(f"{number:03d}-*.zip"))
        yield detail["label"], torch.cat([read_shard(path) for path in paths])


def _truth(folder: Path, name: str) -> Tensor:
    pictures = [np.asarray(Image.open(path)) for path in sorted(folder.glob(f"{name}-[0-9]*.png"))]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
