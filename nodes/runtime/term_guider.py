"""A further model as its own wrappers see it: as the model of a guider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
from torch import Tensor


class Weight(float):
    """A guider's `cfg` as the terms give it; a plain number in its place is what a wrapper set."""


class TermGuider(comfy.samplers.CFGGuider):
    """A further model as its own wrappers see it: a guider whose prediction is one term's.

    Args:
        patcher: the model.
        conds: its conditionings, as a guider holds them before they are processed.

    Attributes:
        predict: evaluates it without its wrappers.
        override: the weight that a wrapper set while it was evaluated last, or None.
    """

    def __init__(self, patcher: Any, conds: dict[str, list[dict]]) -> None:
        super().__init__(patcher)
        self.conds = conds
        self.inner_model = patcher.model
        self.predict: Callable[..., Tensor] | None = None
        self.override: float | None = None

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: Any = None) -> Tensor:
        """The term's prediction D_i, without the sum."""
        assert self.predict is not None
        self.override = None if isinstance(self.cfg, Weight) else self.cfg
        return self.predict(x, timestep, model_options or {}, seed)
