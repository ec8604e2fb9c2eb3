"""What one evaluation of the sum is made of: around which prediction, and which ones it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...gcfg.combine import base_index, pair
from ...gcfg.plan import ActiveTerm, needs_base
from .lanes import BASE

Terms = tuple[ActiveTerm, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """One evaluation.

    Attributes:
        acting: the terms that act at this noise level.
        base: the key of the prediction that deltas are measured from; None where it is not evaluated.
        around: the terms whose deltas are added to it.
        wanted: the keys of the predictions to evaluate.
        hooked: whether guidance hooks of the sampler's model act on the sum.
    """

    acting: Terms
    base: str | None
    around: Terms
    wanted: tuple[str, ...]
    hooked: bool

    @property
    def is_around_a_term(self) -> bool:
        """Whether the base is the prediction of one of the terms, and not the unconditional one."""
        return len(self.around) < len(self.acting)


@dataclass(frozen=True, eq=False)
class Known:
    """What a run knows of its terms, by their places.

    Attributes:
        keys: the key of each term's prediction.
        references: the key of the prediction that a relative term is measured from, by the term's place.
        on_base: terms that the sampler's model predicts, in the sampler's way.
        ruled: terms on whose delta something of their own model acts.
        wrapped: terms around whose prediction stand wrappers of their own model, which may change their weight.
        eager: terms whose rule wants the unconditional prediction at every weight.
        alike: whether two terms have the same model and the same rule.
    """

    keys: Sequence[str]
    references: Mapping[int, str]
    on_base: frozenset[int]
    ruled: frozenset[int]
    wrapped: frozenset[int]
    eager: frozenset[int]
    alike: Callable[[int, int], bool]

    def is_single(self, around: Terms) -> bool:
        """Whether these are stock guidance of the sampler's own model: one conditional prediction without a rule."""
        if len(around) != 1:
            return False
        (term,) = around
        plain = term.mask is None and not term.relative and not term.related
        return plain and term.index in self.on_base and term.index not in self.ruled


def decided(acting: Terms, known: Known, hooked: bool, eager: bool, two: Terms | None = None) -> Step:
    """The evaluation of these terms.

    Args:
        acting: the terms that act.
        known: what the run knows of them.
        hooked: as in `Step`.
        eager: whether something asks for the unconditional prediction at every weight.
        two: the positive and the negative of a pair, where that is known already.
    """
    places = [term.index for term in acting]
    around_base = {term.index for term in acting if not term.relative}
    keys = dict.fromkeys(known.keys[place] for place in places)
    keys.update(dict.fromkeys(known.references[term.index] for term in acting if term.relative))
    two = None if known.wrapped.intersection(places) else two or pair(acting)
    if two is not None and (two[1].index not in known.ruled or known.alike(two[0].index, two[1].index)):
        # Stock guidance with a negative prompt. Hooks of a model that predicts neither look at the unconditional.
        beside = (BASE,) if hooked and known.on_base.isdisjoint(places) else ()
        return Step(acting, known.keys[two[1].index], two[:1], (*keys, *beside), hooked)
    if len(acting) == 1:
        stock = places[0] in known.on_base and places[0] not in known.ruled and not acting[0].relative
        own = places[0] in known.eager or (hooked and not stock)
    else:
        own = hooked or bool(known.ruled & around_base)
    if own or eager or not acting or known.wrapped & around_base or needs_base(acting):
        return Step(acting, BASE, acting, tuple({**keys, BASE: None}), hooked)
    if len(acting) == 1:
        return Step(acting, None, acting, tuple(keys), hooked)
    lowest = base_index(acting)
    return Step(acting, known.keys[places[lowest]], acting[:lowest] + acting[lowest + 1 :], tuple(keys), hooked)
