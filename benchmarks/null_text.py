"""One call of a null-text model against one of the plain UNet, and the memory it frees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..gcfg.terms import GuidanceTerm
from ..nodes.runtime.guider import GCFGGuider
from ..nodes.runtime.lanes import BASE, Lane, predict
from ..nodes.runtime.null_text import patch_null_text
from .bench import Bench, Step
from .figures import Figure
from .timing import Times, interleave, ratio


def figures(bench: Bench) -> list[Figure]:
    """The prior, the prior with the Null-Text Patch, and a concept UNet from its compact file."""
    patched = patch_null_text(bench.prior, bench.prompt(0), "uniform_mean")
    terms = [
        GuidanceTerm(2.0, model=patched, conditioning=bench.prompt(1)),
        GuidanceTerm(1.5, model=bench.concept, conditioning=bench.prompt(2)),
    ]
    times: Times = {}

    def body(guider: GCFGGuider, step: Step, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> None:
        def call(lane: Lane, options: dict[str, Any]) -> Callable[[], Any]:
            return lambda: predict([lane], dict.fromkeys(lane.keys, x), BASE, sigma, options, None)

        plain, null, concept = guider.run.lanes
        calls = {
            "plain": call(plain, options),
            "patch": call(null, null.options),
            "concept": call(concept, concept.options),
        }
        times.update(interleave(calls, bench.repeats, bench.clock, "null text"))

    bench.inside_run(terms, body)
    whole, rest = (sum(p.nbytes for p in patcher.model.parameters()) for patcher in (bench.prior, bench.concept))
    counts = [sum(p.numel() for p in patcher.model.parameters()) for patcher in (bench.prior, bench.concept)]
    return [
        Figure.spread(
            "null_text_patch", "Null-Text Patch / plain UNet, one call", ratio(times["patch"], times["plain"]), "x"
        ),
        Figure.spread(
            "concept_unet", "concept UNet / plain UNet, one call", ratio(times["concept"], times["plain"]), "x"
        ),
        Figure(
            "concept_freed",
            "memory a concept UNet frees",
            (whole - rest) / 1e6,
            "MB",
            note=f"{counts[0] - counts[1]:,} of {counts[0]:,} parameters",
        ),
    ]
