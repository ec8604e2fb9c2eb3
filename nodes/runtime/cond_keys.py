"""The names of a run's conditionings, which stock code and other packs look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .lanes import FIRST, Lane


def cond_keys(conds: Sequence[Any]) -> list[str]:
    """A name for each term's conditioning.

    Stock sampling spreads GLIGEN boxes, and ControlNets of the plain "Apply ControlNet" node, from the conditioning
    named "positive" to the others of the same model, so that name goes to the first term that has any.
    """
    first = next((i for i, cond in enumerate(conds) if any(_spreads(options) for _, options in cond)), 0)
    return [FIRST if index == first else f"term_{index + 1}" for index in range(len(conds))]


def first_named(lane: Lane) -> dict[str, list[dict]]:
    """A lane's conditionings under names of which one is "positive", as stock processing wants."""
    if FIRST in lane.keys:
        return dict(lane.conds)
    first = next((key for key, conds in lane.conds.items() if any(map(_spreads, conds))), lane.keys[0])
    return {FIRST if key == first else key: conds for key, conds in lane.conds.items()}


def _spreads(options: dict[str, Any]) -> bool:
    return "gligen" in options or bool(options.get("control_apply_to_uncond", False))
