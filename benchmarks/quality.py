"""How near a result is to the full run's, and which settings are worth their time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def psnr(image: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio of an image with values in 0 .. 1, dB: 10 log10(1 / mean squared error).

    Of the image as it is saved, in 8 bits; 99 for equal ones.
    """
    a, b = ((picture.double().clamp(0, 1) * 255).round() / 255 for picture in (image, reference))
    error = float((a - b).square().mean())
    return 99.0 if error == 0.0 else -10 * math.log10(error)


def rmse(latent: Tensor, reference: Tensor) -> float:
    """Root mean square difference of a latent, over the standard deviation of the reference."""
    a, b = latent.double(), reference.double()
    return float((a - b).square().mean().sqrt() / b.std())


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both time and quality, by time."""
    return sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points))
