"""Region Terms: guidances of regions that overlap, and one for the rest of the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..gcfg.errors import GuidanceError
from ..gcfg.masks import outside, same_size, shared, stacked
from ..gcfg.terms import GuidanceTerm
from .inputs import checked
from .sockets import TERMS

OVERLAPS: dict[str, Callable[[Sequence[Tensor]], list[Tensor]]] = {
    "share": shared,
    "first on top": stacked,
    "add": list,
}


class GCFGRegionTerms:
    """Node that fits the masks of several terms together."""

    CATEGORY = "GCFG"
    DESCRIPTION = (
        "Fits the masks of several Guidance Terms together, each with its own prompt, negative, LoRA, weight and "
        "interval: what happens where they overlap, and which guidances act where there is none."
    )
    RETURN_TYPES = (TERMS,)
    RETURN_NAMES = ("terms",)
    OUTPUT_TOOLTIPS = ("The regions, then the background.",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node, in ComfyUI's V1 form."""
        return {
            "required": {
                "regions": (TERMS, {"tooltip": "A chain of Guidance Terms, each with a mask."}),
                "overlap": (
                    list(OVERLAPS),
                    {
                        "tooltip": "Where masks overlap. share: each in its proportion, together at most 1. first on "
                        "top: earlier regions cover later ones. add: as they are."
                    },
                ),
            },
            "optional": {
                "background": (TERMS, {"tooltip": "Guidances that act where no region is, and fade in with its edge."})
            },
        }

    @checked("Region Terms")
    def make(
        self, regions: tuple[GuidanceTerm, ...], overlap: str, background: tuple[GuidanceTerm, ...] = ()
    ) -> tuple[tuple[GuidanceTerm, ...]]:
        """Give the terms masks that fit together."""
        if not regions:
            raise GuidanceError(
                "Region Terms: regions holds no term, expected at least one with a mask; connect a Guidance Term."
            )
        for place, term in enumerate(regions, start=1):
            if len(term.masks) != 1:
                raise GuidanceError(
                    f"Region Terms: regions has the term '{term.label or place}' with {len(term.masks) or 'no'} "
                    f"mask{'s' if term.masks else ''}, expected one for each; connect a mask to its Guidance Term, or "
                    f"connect the term to background."
                )
        masks = OVERLAPS[overlap]([term.masks[0] for term in regions])
        rest = outside([term.masks[0] for term in regions])
        fitted = [replace(term, mask=mask) for term, mask in zip(regions, masks, strict=True)]
        return ((*fitted, *(replace(term, mask=_within(term, rest)) for term in background)),)


def _within(term: GuidanceTerm, rest: Tensor) -> tuple[Tensor, ...]:
    """The background's mask, inside the term's own if it has one."""
    if not term.masks:
        return (rest,)
    own, free = same_size([term.masks[0], rest])
    return (own * free, *term.masks[1:])


NODES = [("GCFGRegionTerms", "Region Terms", GCFGRegionTerms)]
