"""Which predictions a noise level needs, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from .curves import percent_at
from .errors import GuidanceError
from .streams import factor_of_delta
from .terms import GuidanceTerm

# Weights are typed by people: 7.3 + (1 - 7.3) is 1 to within a few ulps, never to within 1e-9 by accident.
WEIGHT_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class ActiveTerm:
    """A term at one noise level.

    Attributes:
        index: its place among the plan's terms.
        weight: its weight at this noise level; 0 only where something else looks at its prediction.
        mask: what its delta is multiplied with, (N, 1, *spatial); None for 1 everywhere.
        label: its name, for errors and reports.
        relative: whether its delta is measured from a prediction of its own, and not from the base.
        related: whether its delta depends on those of other terms, so that it has to be measured from the base itself.
    """

    index: int
    weight: float
    mask: Tensor | None
    label: str
    relative: bool = False
    related: bool = False


@dataclass(frozen=True, eq=False)
class ScheduledTerm:
    """A term whose interval is written in sigmas.

    Attributes:
        term: the user's term.
        label: its label, or "1", "2", ... by its place.
        sigma_start: the largest sigma at which it acts.
        sigma_end: the sigma at which it acts no more; at the end of the sampling, the last at which it does.
        percent_of: the percent of the sampling at a sigma.
        cache_start: the largest sigma at which its delta may be carried on.
        cache_end: the sigma at which it may no more, with the same exception.
        factor: what its delta is multiplied with, (N, 1, *spatial); None for 1 everywhere.
        off: whether that is 0 everywhere.
    """

    term: GuidanceTerm
    label: str
    sigma_start: float
    sigma_end: float
    percent_of: Callable[[float], float]
    cache_start: float = math.inf
    cache_end: float = 0.0
    factor: Tensor | None = None
    off: bool = False

    @property
    def always(self) -> bool:
        """Whether the interval covers the whole schedule, so that no sigma needs to be looked at."""
        return self.term.start_percent == 0.0 and self.term.end_percent == 1.0

    @property
    def level(self) -> bool:
        """Whether its weight is the same at every sigma."""
        return self.always and self.term.curve.kind == "constant"

    @property
    def pulls(self) -> bool:
        """Whether it acts anywhere, at any noise level."""
        return self.term.pulls and not self.off

    def acts_at(self, sigma: float) -> bool:
        """Whether `sigma` is inside the interval, whose end counts only where it is that of the sampling.

        So of two terms of which one begins where the other ends exactly one acts, the later one on the boundary.
        """
        return self.always or _inside(sigma, self.sigma_start, self.sigma_end, self.term.end_percent)

    def goes_on_at(self, sigma: float) -> bool:
        """Whether its interval goes on at or below `sigma`."""
        return _goes_on_at(sigma, self.sigma_end, self.term.end_percent)

    def caches_at(self, sigma: float) -> bool:
        """Whether its delta may be carried on at `sigma`."""
        rule = self.term.cache_rule
        return rule is not None and _inside(sigma, self.cache_start, self.cache_end, rule.end_percent)

    def weight_at(self, sigma: float) -> float:
        """The weight at `sigma`; 0 outside the interval."""
        if self.off or not self.acts_at(sigma):
            return 0.0
        term = self.term
        if term.curve.kind == "constant":
            return term.weight
        return term.curve.at(self.percent_of(sigma), term.weight, term.start_percent, term.end_percent)


@dataclass(frozen=True, eq=False)
class GuidancePlan:
    """All terms of one run.

    Attributes:
        terms: the terms in the order of their sockets.

    Raises:
        GuidanceError: if there is no term.
    """

    terms: tuple[ScheduledTerm, ...]

    def __post_init__(self) -> None:
        if not self.terms:
            raise GuidanceError("guidance plan: no term, expected at least one.")

    @classmethod
    def schedule(cls, terms: Sequence[GuidanceTerm], percent_to_sigma: Callable[[float], float]) -> GuidancePlan:
        """Write every term's interval in the sigmas of the model that is sampled.

        Args:
            terms: the user's terms.
            percent_to_sigma: ComfyUI's convention, 0 -> the largest sigma, 1 -> 0.
        """
        # The same few sigmas come again and again: solvers evaluate a step twice, and terms share them.
        percent_of = lru_cache(maxsize=None)(partial(percent_at, percent_to_sigma=percent_to_sigma))

        def scheduled(place: int, term: GuidanceTerm) -> ScheduledTerm:
            def interval(start: float, end: float) -> tuple[float, float]:
                return as_stored(float(percent_to_sigma(start))), as_stored(float(percent_to_sigma(end)))

            acts = interval(term.start_percent, term.end_percent)
            rule = term.cache_rule
            cached = (math.inf, 0.0) if rule is None else interval(rule.start_percent, rule.end_percent)
            return ScheduledTerm(term, term.label or str(place), *acts, percent_of, *cached)

        return cls(tuple(scheduled(place, term) for place, term in enumerate(terms, start=1)))

    def fitted(self, shapes: Sequence[Sequence[int]], device: torch.device | None = None) -> GuidancePlan:
        """The plan with masks and stream weights at the size of the latent, so that no step has to bring them there.

        Args:
            shapes: of the latent's streams, (B, C, *spatial) each; one for an ordinary latent.
            device: where the latent is.

        Raises:
            GuidanceError: see `factor_of_delta`.
        """

        def fit(scheduled: ScheduledTerm) -> ScheduledTerm:
            if scheduled.term.everywhere:
                return scheduled
            masks = [mask.to(device) for mask in scheduled.term.masks]
            name = f"Guidance Term '{scheduled.label}'"
            factor = factor_of_delta(masks, scheduled.term.stream_weights, shapes, name)
            return replace(scheduled, factor=factor, off=factor is not None and not bool(factor.any()))

        return replace(self, terms=tuple(map(fit, self.terms)))

    @property
    def needs_sigma(self) -> bool:
        """Whether any weight depends on the noise level (reading it costs a device synchronisation)."""
        return not all(term.level for term in self.terms)

    @property
    def caches(self) -> bool:
        """Whether any term's delta may be carried on in place of being evaluated."""
        return any(scheduled.term.cache_rule is not None for scheduled in self.terms)

    @cached_property
    def steady(self) -> tuple[ActiveTerm, ...] | None:
        """The terms that act at every noise level; None where that depends on it (which the host has to read)."""
        return None if self.needs_sigma else self.active(0.0)

    def active(self, sigma: float, given: Mapping[int, float] | None = None) -> tuple[ActiveTerm, ...]:
        """The terms that act at `sigma`: inside their interval, and with a weight that is not 0.

        Args:
            sigma: the noise level.
            given: weights that stand in place of the terms' own there, by the place of the term.
        """
        weights = {place: scheduled.weight_at(sigma) for place, scheduled in enumerate(self.terms)} | dict(given or {})
        weighted = zip(weights.values(), self.terms, (scheduled.term for scheduled in self.terms), strict=True)
        return tuple(
            ActiveTerm(index, weight, scheduled.factor, scheduled.label, term.relative, bool(term.relations))
            for index, (weight, scheduled, term) in enumerate(weighted)
            if weight != 0.0
        )

    def used(self, sigmas: Sequence[float]) -> tuple[int, ...]:
        """Indices of the terms that can act in a run over `sigmas`, so that other models are not even loaded.

        A solver also evaluates between the steps, so an interval counts when it overlaps the range of the run.
        """
        low, high = min(sigmas), max(sigmas)
        return tuple(
            index
            for index, scheduled in enumerate(self.terms)
            if scheduled.pulls and (scheduled.always or (scheduled.goes_on_at(high) and scheduled.sigma_start >= low))
        )

    def idle(self, sigmas: Sequence[float]) -> tuple[ScheduledTerm, ...]:
        """Terms with a weight that act at none of the run's steps: most likely a slip of the user."""
        return tuple(
            scheduled
            for scheduled in self.terms
            if scheduled.pulls and not any(scheduled.weight_at(sigma) for sigma in sigmas)
        )


def _inside(sigma: float, start: float, end: float, end_percent: float) -> bool:
    """Whether a noise level is inside an interval that falls from `start` to `end`."""
    return sigma <= start and _goes_on_at(sigma, end, end_percent)


def _goes_on_at(sigma: float, end: float, end_percent: float) -> bool:
    return sigma > end or (sigma == end and end_percent == 1.0)


def as_stored(sigma: float) -> float:
    """A noise level as samplers have it, in float32, so that a step that lies on a boundary is found to lie on it."""
    return float(torch.tensor(sigma, dtype=torch.float32))


def total_weight(terms: Sequence[ActiveTerm]) -> float:
    """Sum of the weights of the terms that are measured from the base, W = sum_i w_i."""
    return math.fsum(term.weight for term in terms if not term.relative)


def needs_base(terms: Sequence[ActiveTerm]) -> bool:
    """Whether the unconditional prediction has a coefficient, 1 - sum_i w_i m_i, that is not 0 everywhere.

    The sum is over the terms that are measured from it. A delta that depends on those of other terms is no multiple of
    its own, so there it counts always.
    """
    bound = any(term.related or (term.mask is not None and not term.relative) for term in terms)
    return bound or abs(total_weight(terms) - 1.0) > WEIGHT_TOLERANCE
