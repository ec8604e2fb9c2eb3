"""GCFG Model: the sum in any sampler.

GCFG: Cao et al. 2023, "Concept-centric Personalization with Large-scale Diffusion Priors", arXiv 2312.08195, Eq. 3.
"""

from __future__ import annotations

from typing import Any

from .inputs import checked
from .runtime.any_sampler import NODE, with_terms
from .sampling import HIDDEN, REPORT_TIP, watch_of
from .sockets import REPORT, gather_terms, optional_terms


class GCFGModel:
    """Node that puts guidance terms on a model, for whatever samples it."""

    CATEGORY = "GCFG"
    DESCRIPTION = (
        "Adds guidances to whatever samples this model: KSampler, detailers, tiled upscalers. The sampler's positive, "
        "negative and cfg stay what they are; the terms are added around its negative prediction."
    )
    RETURN_TYPES = ("MODEL", REPORT)
    RETURN_NAMES = ("MODEL", "report")
    OUTPUT_TOOLTIPS = ("Connect it to any sampler but those of GCFG.", REPORT_TIP)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node, in ComfyUI's V1 form."""
        tip = "The model that the sampler samples, as it would be without this node."
        return {"required": {"model": ("MODEL", {"tooltip": tip})}, "optional": optional_terms(), "hidden": HIDDEN}

    @checked(NODE)
    def make(self, model: Any, unique_id: str | None = None, prompt: Any = None, **sockets: Any) -> tuple[Any, Any]:
        """Put the terms on the model."""
        watch = watch_of(unique_id, prompt)
        return with_terms(model, gather_terms(sockets), watch), watch.report


NODES = [("GCFGModel", NODE, GCFGModel)]
