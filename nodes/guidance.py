"""Guidance Term: one weighted delta of the sum.

GCFG: Cao et al. 2023, "Concept-centric Personalization with Large-scale Diffusion Priors", arXiv 2312.08195, Eq. 3.
"""

from __future__ import annotations

from typing import Any

from ..gcfg.terms import GuidanceTerm
from .sockets import TERMS


class GCFGGuidanceTerm:
    """Node that makes one guidance term."""

    CATEGORY = "GCFG"
    DESCRIPTION = (
        "One guidance: weight * (prediction of this model and conditioning - unconditional prediction). Connect it to "
        "a GCFG sampler or guider. A negative weight pushes away, like a negative prompt of free strength."
    )
    RETURN_TYPES = (TERMS,)
    RETURN_NAMES = ("terms",)
    OUTPUT_TOOLTIPS = ("This term, after those of the terms input.",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node, in ComfyUI's V1 form."""
        percent = {"min": 0.0, "max": 1.0, "step": 0.001}
        return {
            "required": {
                "weight": (
                    "FLOAT",
                    {
                        "default": 7.5,
                        "min": -100.0,
                        "max": 100.0,
                        "step": 0.05,
                        "round": 0.001,
                        "tooltip": "How strongly this guidance pulls, as cfg does in a KSampler. 0 switches the term "
                        "off; below 0 it pushes away.",
                    },
                ),
                "start_percent": (
                    "FLOAT",
                    {"default": 0.0, **percent, "tooltip": "Where in the sampling the term begins to act (0: start)."},
                ),
                "end_percent": (
                    "FLOAT",
                    {"default": 1.0, **percent, "tooltip": "Where in the sampling the term stops (1: end)."},
                ),
            },
            "optional": {
                "model": (
                    "MODEL",
                    {"tooltip": "The model that predicts this guidance. Not connected: the sampler's own model."},
                ),
                "conditioning": (
                    "CONDITIONING",
                    {"tooltip": "The prompt of this guidance. Not connected: the sampler's unconditional."},
                ),
                "mask": (
                    "MASK",
                    {
                        "tooltip": "Where this guidance acts. Its model still sees the whole image; only its "
                        "pull is cut."
                    },
                ),
                "terms": (TERMS, {"tooltip": "Further terms to pass on together with this one."}),
                "label": (
                    "STRING",
                    {"default": "", "tooltip": "A name for this guidance, shown in messages and charts."},
                ),
            },
        }

    def make(
        self,
        weight: float,
        start_percent: float,
        end_percent: float,
        model: Any = None,
        conditioning: Any = None,
        mask: Any = None,
        terms: tuple[GuidanceTerm, ...] = (),
        label: str = "",
    ) -> tuple[tuple[GuidanceTerm, ...]]:
        """Append one term to `terms`."""
        term = GuidanceTerm(weight, start_percent, end_percent, model, conditioning, mask, label.strip())
        return ((*terms, term),)


NODES = [("GCFGGuidanceTerm", "Guidance Term", GCFGGuidanceTerm)]
