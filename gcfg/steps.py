"""Which step of a run a noise level belongs to."""

from __future__ import annotations

from collections.abc import Sequence


class Steps:
    """The steps of one run, told by noise levels, so that a solver may evaluate a step as often as it likes.

    Args:
        sigmas: noise levels, falling (or rising, where noise is added back), (steps + 1,).
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        self._starts = sigmas[:-1]
        self._falling = sigmas[0] >= sigmas[-1]

    def __len__(self) -> int:
        return len(self._starts)

    def at(self, sigma: float) -> int:
        """The step whose noise level `sigma` has reached, from 1."""
        reached = (
            sigma <= start * (1 + 1e-5) if self._falling else sigma >= start * (1 - 1e-5) for start in self._starts
        )
        return max(1, sum(reached))
