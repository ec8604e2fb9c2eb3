"""Which predictions a run has, and their names.

A prediction is that of a model with a conditioning, so two terms of the same model and conditioning have one.
Predictions of one model make a group, whose conditionings stock code processes together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...gcfg.combine import pair
from ...gcfg.guidance_cache import CacheRule
from ...gcfg.plan import ActiveTerm, GuidancePlan
from ...gcfg.terms import GuidanceTerm
from . import versions
from .clones import identical
from .lanes import BASE, FIRST, PREDICT, takes


@dataclass(frozen=True, eq=False)
class Source:
    """What one prediction is made of.

    Attributes:
        patcher: its model.
        conditioning: its conditioning.
        name: of its term, for messages.
        weight: of its term; of a reference, what a term is measured from, the other sign.
        rule: when the term's delta is carried on; a reference has none.
        is_reference: whether it is R_i of a term, in place of its D_i.
        relative: whether its term has such a reference.
    """

    patcher: Any
    conditioning: Any
    name: str
    weight: float
    rule: CacheRule | None = None
    is_reference: bool = False
    relative: bool = False


@dataclass(eq=False)
class Group:
    """Predictions that may share calls.

    Attributes:
        patcher: their model.
        places: their places among all sources.
    """

    patcher: Any
    places: list[int] = field(default_factory=list)


def sources(base: Any, unconditional: Any, plan: GuidancePlan) -> tuple[list[Source], dict[int, int]]:
    """What every term is predicted from, in their order, then what the relative terms are measured from.

    Args:
        base: the sampler's model.
        unconditional: the sampler's conditioning.
        plan: all terms.

    Returns:
        The sources, and the place of the reference of each relative term by the term's place.
    """
    found: list[Source] = []
    references: list[Source] = []
    places: dict[int, int] = {}
    for place, scheduled in enumerate(plan.terms):
        term, name = scheduled.term, f"Guidance Term '{scheduled.label}'"
        model, conditioning = predicted_from(base, unconditional, term)
        found.append(Source(model, conditioning, name, term.weight, term.cache_rule, relative=term.relative))
        if term.relative:
            places[place] = len(plan.terms) + len(references)
            references.append(Source(*measured_from(base, unconditional, term), name, -term.weight, is_reference=True))
    return [*found, *references], places


def predicted_from(base: Any, unconditional: Any, term: GuidanceTerm) -> tuple[Any, Any]:
    """The model and the conditioning of D_i."""
    return base if term.model is None else term.model, unconditional if term.conditioning is None else term.conditioning


def measured_from(base: Any, unconditional: Any, term: GuidanceTerm) -> tuple[Any, Any]:
    """The model and the conditioning of R_i: what is given for it, and the term's own for the rest."""
    model, conditioning = predicted_from(base, unconditional, term)
    return (
        model if term.relative_model is None else term.relative_model,
        conditioning if term.relative_conditioning is None else term.relative_conditioning,
    )


def measured_from_base(base: Any, unconditional: Any, terms: Sequence[GuidanceTerm]) -> list[GuidanceTerm]:
    """The terms; one whose reference is the unconditional prediction itself is an ordinary term."""

    def plain(term: GuidanceTerm) -> GuidanceTerm:
        model, conditioning = measured_from(base, unconditional, term)
        if not term.relative or not takes(model, base) or not identical(conditioning, unconditional):
            return term
        return replace(term, relative_model=None, relative_conditioning=None)

    return [plain(term) for term in terms]


def grouped(base: Any, found: Sequence[Source]) -> list[Group]:
    """The predictions by model: those of the sampler's own first, though there may be none."""
    groups = [Group(base)]
    for place, source in enumerate(found):
        group = next((group for group in groups if _joins(found, source, group, group is groups[0])), None)
        if group is None:
            group = Group(source.patcher)
            groups.append(group)
        group.places.append(place)
    return groups


def _joins(found: Sequence[Source], source: Source, group: Group, is_base: bool) -> bool:
    """Whether a prediction may be evaluated with a group's."""
    if not takes(source.patcher, group.patcher):
        return False
    # Wrappers around a whole prediction keep the state of one.
    alone = not is_base and versions.has_wrappers(PREDICT, source.patcher)
    return not alone or all(_same_prediction(source, found[other]) for other in group.places)


def _same_prediction(a: Source, b: Source) -> bool:
    """Whether one evaluation serves both; of two terms the deltas, which the cache carries on, are not the same."""
    apart = a.is_reference or b.is_reference or a.relative != b.relative
    return (apart or a.rule == b.rule) and identical(a.conditioning, b.conditioning)


def keyed(
    groups: Sequence[Group],
    unconditional: Any,
    found: Sequence[Source],
    two: tuple[int, int] | None,
    first: int | None,
) -> list[str]:
    """A name for each prediction; equal predictions have one name.

    Stock sampling spreads GLIGEN boxes, and ControlNets of the plain "Apply ControlNet" node, from the conditioning
    named "positive" to the others of the same model.

    Args:
        groups: the predictions by model.
        unconditional: the sampler's conditioning.
        found: what each prediction is made of.
        two: the places of a lasting pair.
        first: the place of the term that is named "positive"; None where it is the unconditional.
    """
    keys = [f"term_{place + 1}" for place in range(len(found))]
    own = groups[0].places
    apart = [place for place in own if not identical(found[place].conditioning, unconditional)]
    if two is not None:
        keys[two[0]], keys[two[1]] = FIRST, BASE
        return keys
    if first is not None:
        keys[first] = FIRST
    for group in groups:
        for number, place in enumerate(group.places):
            if group is groups[0] and place not in apart:
                keys[place] = BASE
                continue
            # The name "positive" is found first, wherever its term stands.
            known = sorted(group.places[:number] + ([first] if first in group.places else []), key=lambda p: p != first)
            known = [p for p in known if p != place and keys[p] != BASE]
            unlike = {keys[p] for p in known if not _same_prediction(found[p], found[place])}
            keys[place] = next((keys[p] for p in known if keys[p] not in unlike), keys[place])
    return keys


def spreading(group: Group, unconditional: Any, found: Sequence[Source]) -> int | None:
    """The place of the first term of the sampler's model that has what spreads to the others; else of its first."""
    apart = (place for place in group.places if not identical(found[place].conditioning, unconditional))
    spread = (place for place in apart if any(_spreads(options) for _, options in found[place].conditioning))
    return next(spread, group.places[0] if group.places else None)


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
    two = pair(
        [
            ActiveTerm(place, term.weight, None, "", term.relative, bool(term.relations))
            for place, term in enumerate(terms)
            if place in acting
        ]
    )
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
