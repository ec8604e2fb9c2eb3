"""What tests ask again and again: how far two results are apart, and what a refusal says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..gcfg.errors import GuidanceError


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference, in units of the largest expected value."""
    return float((got - expected).abs().max() / expected.abs().max())


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """Return the sentence of the GuidanceError that a call raises. Raises: AssertionError: if it raises none."""
    try:
        call(*args, **kwargs)
    except GuidanceError as error:
        return str(error)
    raise AssertionError("nothing was refused")
