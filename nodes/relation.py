"""Guidance Relation: what a term adds, where it looks at what other terms add."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..gcfg.relations import MAX_AMOUNT, RELATIONS
from ..gcfg.terms import GuidanceTerm, label_text
from .inputs import checked
from .sockets import TERMS


class GCFGGuidanceRelation:
    """Node that gives terms a relation to another one."""

    CATEGORY = "GCFG"
    DESCRIPTION = (
        "Changes what these guidances add, by what another one adds at the same step: without the part that lies along "
        "it, no stronger than it, or only where they stand out more."
    )
    RETURN_TYPES = (TERMS,)
    RETURN_NAMES = ("terms",)
    OUTPUT_TOOLTIPS = ("The same terms, with this relation.",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Inputs of the node, in ComfyUI's V1 form."""
        return {
            "required": {
                "terms": (TERMS, {"tooltip": "The guidances; all that come through this input get the relation."}),
                "relation": (
                    list(RELATIONS),
                    {
                        "tooltip": "perpendicular: take out what lies along the other (Perp-Neg). limit: pull at most "
                        "amount times as strongly. saliency: act only where it stands out more than the other."
                    },
                ),
                "against": (
                    "STRING",
                    {"default": "", "tooltip": "The label of the other Guidance Term. Empty: all others together."},
                ),
                "amount": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": MAX_AMOUNT,
                        "step": 0.05,
                        "round": 0.001,
                        "tooltip": "perpendicular: how much of it is taken out, 1 is all. limit: the multiple. "
                        "saliency: how much more it has to stand out.",
                    },
                ),
            }
        }

    @checked("Guidance Relation")
    def make(
        self, terms: tuple[GuidanceTerm, ...], relation: str, against: str, amount: float
    ) -> tuple[tuple[GuidanceTerm, ...]]:
        """Give all terms this relation, after those that they have."""
        made = RELATIONS[relation](label_text(against.strip()), amount)
        return (tuple(replace(term, relations=(*term.relations, made)) for term in terms),)


NODES = [("GCFGGuidanceRelation", "Guidance Relation", GCFGGuidanceRelation)]
