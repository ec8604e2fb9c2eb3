"""Guidance Term: one weighted delta of the sum.

GCFG: Cao et al. 2023, "Concept-centric Personalization with Large-scale Diffusion Priors", arXiv 2312.08195, Eq. 3.
"""

from __future__ import annotations

from typing import Any

from ..gcfg.curves import CURVES, make_curve
from ..gcfg.streams import parse_stream_weights
from ..gcfg.terms import GuidanceTerm, label_text
from .inputs import checked
from .sockets import TERMS

_WEIGHT: dict[str, Any] = {"min": -100.0, "max": 100.0, "step": 0.05, "round": 0.001}


class GCFGGuidanceTerm:
    """Node that makes one guidance term."""

    CATEGORY = "GCFG"
    DESCRIPTION = (
        "One guidance: weight * (prediction of this model and conditioning - unconditional prediction). Connect it to "
        "a GCFG sampler or guider. A negative weight pushes away, like a negative prompt of free strength. With a "
        "relative input the guidance is measured from that prediction instead."
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
                        **_WEIGHT,
                        "default": 7.5,
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
                "curve": (
                    list(CURVES),
                    {
                        "default": CURVES[0],
                        "tooltip": "How the weight changes between start and end. linear, cosine: from weight to "
                        "end_weight. points: through the list below, which replaces weight.",
                    },
                ),
                "end_weight": (
                    "FLOAT",
                    {**_WEIGHT, "default": 0.0, "tooltip": "The weight at end_percent of a linear or cosine curve."},
                ),
                "points": (
                    "STRING",
                    {
                        "default": "0: 7.5, 1: 0",
                        "tooltip": "For the curve points: percent: weight pairs with straight lines between them, such "
                        "as 0: 7.5, 0.5: 3, 100%: 0.",
                    },
                ),
                "stream_weights": (
                    "STRING",
                    {
                        "default": "",
                        "advanced": True,
                        "tooltip": "For latents of several streams: factors of the weight, such as video: 1, audio: "
                        "0.5. A stream that is not named has 1.",
                    },
                ),
                "relative_model": (
                    "MODEL",
                    {
                        "tooltip": "Measure this guidance from the prediction of this model, with this term's "
                        "conditioning: AutoGuidance, with a weaker model here."
                    },
                ),
                "relative_conditioning": (
                    "CONDITIONING",
                    {
                        "tooltip": "Measure this guidance from the prediction of this term's model (or of "
                        "relative_model) with this conditioning: its own unconditional or negative prompt."
                    },
                ),
            },
        }

    @checked("Guidance Term")
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
        curve: str = CURVES[0],
        end_weight: float = 0.0,
        points: str = "",
        stream_weights: str = "",
        relative_model: Any = None,
        relative_conditioning: Any = None,
    ) -> tuple[tuple[GuidanceTerm, ...]]:
        """Append one term to `terms`."""
        label = label_text(label)
        name = f"Guidance Term '{label}'" if label else "Guidance Term"
        shape = make_curve(curve, end_weight, points, name)
        streams = parse_stream_weights(stream_weights, name)
        term = GuidanceTerm(
            weight,
            start_percent,
            end_percent,
            model,
            conditioning,
            mask,
            label,
            shape,
            stream_weights=streams,
            relative_model=relative_model,
            relative_conditioning=relative_conditioning,
        )
        return ((*terms, term),)


NODES = [("GCFGGuidanceTerm", "Guidance Term", GCFGGuidanceTerm)]
