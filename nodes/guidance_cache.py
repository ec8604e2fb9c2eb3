"""Guidance Cache: guidances that are evaluated at some steps and carried on between them.

Adaptive guidance: Castillo et al. 2023, arXiv 2312.12487; carried on for the deltas of Cao et al. 2023, Eq. 3.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..gcfg.guidance_cache import CacheRule
from ..gcfg.terms import GuidanceTerm
from .inputs import checked
from .sockets import TERMS

MODES = ("every", "threshold")
EXTRAPOLATIONS = ("linear", "hold")


class GCFGGuidanceCache:
    """Node that lets terms be evaluated less often."""

    CATEGORY = "GCFG"
    DESCRIPTION = (
        "Evaluates these guidances at some steps only, and carries their deltas on between them: less time, nearly the "
        "same image. Place it between the Guidance Terms and the sampler."
    )
    RETURN_TYPES = (TERMS,)
    RETURN_NAMES = ("terms",)
    OUTPUT_TOOLTIPS = ("The same terms, evaluated less often.",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node, in ComfyUI's V1 form."""
        percent = {"min": 0.0, "max": 1.0, "step": 0.001}
        return {
            "required": {
                "terms": (TERMS, {"tooltip": "The guidances; all that come through this input get these settings."}),
                "mode": (
                    list(MODES),
                    {
                        "tooltip": "every: evaluate at every so many steps. threshold: evaluate where the delta is "
                        "predicted to have changed that much."
                    },
                ),
                "every": (
                    "INT",
                    {
                        "default": 2,
                        "min": 1,
                        "max": 100,
                        "tooltip": "For the mode every: 2 evaluates at every second step; 1 is the full run.",
                    },
                ),
                "threshold": (
                    "FLOAT",
                    {
                        "default": 0.4,
                        "min": 0.0,
                        "max": 10.0,
                        "step": 0.01,
                        "round": 0.001,
                        "tooltip": "For the mode threshold: the change of a delta over its size; 0 is the full run.",
                    },
                ),
                "extrapolation": (
                    list(EXTRAPOLATIONS),
                    {
                        "tooltip": "linear: along a line through the last two deltas, in the logarithm of sigma. hold: "
                        "the last one."
                    },
                ),
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, **percent, "tooltip": "Where in the sampling this begins; before, every step."},
                ),
                "end_percent": (
                    "FLOAT",
                    {"default": 1.0, **percent, "tooltip": "Where in the sampling this ends; after, every step."},
                ),
                "align": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -1.0,
                        "max": 1.0,
                        "step": 0.001,
                        "round": 0.0001,
                        "tooltip": "Adaptive guidance: leave out the unconditional prediction at the step after one "
                        "at which every delta pointed where it did before, by this cosine. 1: never.",
                    },
                ),
            }
        }

    @checked("Guidance Cache")
    def make(
        self,
        terms: tuple[GuidanceTerm, ...],
        mode: str,
        every: int,
        threshold: float,
        extrapolation: str,
        start_percent: float,
        end_percent: float,
        align: float,
    ) -> tuple[tuple[GuidanceTerm, ...]]:
        """Give all terms this rule; what its mode does not use is not looked at."""
        rule = CacheRule(
            every=every if mode == "every" else None,
            threshold=threshold if mode == "threshold" else None,
            linear=extrapolation == "linear",
            start_percent=start_percent,
            end_percent=end_percent,
            align=align,
        )
        return (tuple(replace(term, cache_rule=rule) for term in terms),)


NODES = [("GCFGGuidanceCache", "Guidance Cache", GCFGGuidanceCache)]
