"""Which predictions a run has, and their names.

A prediction is that of a model with a conditioning, so two terms of the same model and conditioning have one.
Predictions of one model make a group, whose conditionings stock code processes together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...gcfg.combine import pair
from ...gcfg.plan import ActiveTerm
from ...gcfg.terms import GuidanceTerm
from . import versions
from .clones import identical
from .lanes import BASE, FIRST, PREDICT, takes


@dataclass(eq=False)
class Group:
    """Terms whose predictions may share calls.

    Attributes:
        patcher: their model.
        terms: their places among all terms.
    """

    patcher: Any
    terms: list[int] = field(default_factory=list)


def grouped(base: Any, terms: Sequence[GuidanceTerm]) -> list[Group]:
    """The terms by model: those of the sampler's own first, though there may be none."""
    groups = [Group(base)]
    for place, term in enumerate(terms):
        patcher = base if term.model is None else term.model
        group = next((group for group in groups if _joins(terms, place, patcher, group, group is groups[0])), None)
        if group is None:
            group = Group(patcher)
            groups.append(group)
        group.terms.append(place)
    return groups


def _joins(terms: Sequence[GuidanceTerm], place: int, patcher: Any, group: Group, is_base: bool) -> bool:
    """Whether a term's prediction may be evaluated with a group's."""
    if not takes(patcher, group.patcher):
        return False
    # Wrappers around a whole prediction keep the state of one.
    held = bool(getattr(patcher, "wrappers", {}).get(PREDICT)) or bool(
        versions.wrappers(PREDICT, patcher.model_options)
    )
    alone = not is_base and held
    return not alone or any(_same_prediction(terms[place], terms[other]) for other in group.terms)


def _same_prediction(a: GuidanceTerm, b: GuidanceTerm) -> bool:
    return a.cache_rule == b.cache_rule and identical(a.conditioning, b.conditioning)


def keyed(
    groups: Sequence[Group], unconditional: Any, terms: Sequence[GuidanceTerm], two: tuple[int, int] | None
) -> list[str]:
    """A name for each term's prediction; equal predictions have one name.

    Stock sampling spreads GLIGEN boxes, and ControlNets of the plain "Apply ControlNet" node, from the conditioning
    named "positive" to the others of the same model, so among those of the sampler's model that name goes to the first
    term that has any.

    Args:
        groups: the terms by model.
        unconditional: the sampler's conditioning.
        terms: all terms.
        two: the places of a lasting pair.
    """
    keys = [f"term_{place + 1}" for place in range(len(terms))]
    own = groups[0].terms
    if two is not None:
        keys[two[0]], keys[two[1]] = FIRST, BASE
        return keys
    spreading = (place for place in own if any(_spreads(options) for _, options in terms[place].conditioning or []))
    first = next(spreading, own[0] if own else None)
    if first is not None:
        keys[first] = FIRST
    for group in groups:
        for number, place in enumerate(group.terms):
            conditioning = terms[place].conditioning
            if group is groups[0] and (conditioning is None or identical(conditioning, unconditional)):
                keys[place] = BASE
                continue
            # The name "positive" is found first, wherever its term stands.
            known = sorted(group.terms[:number] + ([first] if first in group.terms else []), key=lambda p: p != first)
            same = (p for p in known if p != place and keys[p] != BASE and _same_prediction(terms[p], terms[place]))
            keys[place] = keys[next(same, place)]
    return keys


def lasting_pair(base_terms: Sequence[int], terms: Sequence[GuidanceTerm]) -> tuple[int, int] | None:
    """The places of a positive and a negative term that are stock guidance in every step, on the sampler's own model.

    Then their conditionings take the names of stock guidance, and the unconditional has no part in the run.

    Args:
        base_terms: the places of the terms of the sampler's model.
        terms: all terms.
    """
    acting = [place for place, term in enumerate(terms) if term.pulls]
    if len(acting) != 2 or not set(acting) <= set(base_terms) or not all(_lasts(terms[place]) for place in acting):
        return None
    two = pair([ActiveTerm(place, terms[place].weight, None, "") for place in acting])
    return None if two is None else (two[0].index, two[1].index)


def _lasts(term: GuidanceTerm) -> bool:
    """Whether a term acts in every step and everywhere with one weight."""
    limits = ("start_percent", "end_percent", "clip_start_percent")
    whole = (term.start_percent, term.end_percent) == (0.0, 1.0) and term.curve.kind == "constant"
    return (
        whole
        and term.everywhere
        and not any(name in options for _, options in term.conditioning or [] for name in limits)
    )


def first_named(conds: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """A further model's conditionings under names of which one is "positive", as stock code and wrappers want."""
    first = next((key for key, entries in conds.items() if key != BASE and any(map(_spreads, entries))), None)
    first = next(iter(conds)) if first is None else first
    return {FIRST if key == first else key: entries for key, entries in conds.items()}


def ranged(conds: dict[str, list[dict]]) -> set[str]:
    """The keys of conditionings that are limited to a part of the sampling."""
    limits = ("start_percent", "end_percent", "clip_start_percent", "timestep_start", "timestep_end")
    return {key for key, entries in conds.items() if any(name in entry for entry in entries for name in limits)}


def _spreads(options: dict[str, Any]) -> bool:
    return "gligen" in options or bool(options.get("control_apply_to_uncond", False))
