"""What tests ask again and again: how far two results are apart, and what a refusal says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..gcfg.errors import GuidanceError


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference, in units of the largest expected value."""
    return float((got - expected).abs().max() / expected.abs().max())


def bent_prior(x: Tensor, sigma: Tensor | float, offset: Tensor | float) -> Tensor:
    """Return the denoised prediction of a made-up model, E[x0 | x] of a bent prior around an offset; any precision."""
    variance = 0.09 + sigma**2
    return ((torch.tanh(x / variance) + offset) * sigma**2 + x * 0.09) / variance


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """Return the sentence of the GuidanceError that a call raises. Raises: AssertionError: if it raises none."""
    try:
        call(*args, **kwargs)
    except GuidanceError as error:
        return str(error)
    raise AssertionError("nothing was refused")
