"""Which predictions a noise level needs, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from .curves import percent_at
from .errors import GuidanceError
from .masks import resize_mask
from .terms import GuidanceTerm

# Weights are typed by people: 7.3 + (1 - 7.3) is 1 to within a few ulps, never to within 1e-9 by accident.
WEIGHT_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class ActiveTerm:
    """A term at one noise level.

    Attributes:
        index: its place among the plan's terms.
        weight: its weight at this noise level, not 0.
        mask: (N, H, W) or None.
        label: its name, for errors and reports.
    """

    index: int
    weight: float
    mask: Tensor | None
    label: str


@dataclass(frozen=True, eq=False)
class ScheduledTerm:
    """A term whose interval is written in sigmas.

    Attributes:
        term: the user's term.
        label: its label, or "1", "2", ... by its place.
        sigma_start: the largest sigma at which it acts.
        sigma_end: the smallest.
        percent_of: the percent of the sampling at a sigma.
        reuse_start: the largest sigma at which its delta may be carried on.
        reuse_end: the smallest.
    """

    term: GuidanceTerm
    label: str
    sigma_start: float
    sigma_end: float
    percent_of: Callable[[float], float]
    reuse_start: float = math.inf
    reuse_end: float = 0.0

    @property
    def always(self) -> bool:
        """Whether the interval covers the whole schedule, so that no sigma needs to be looked at."""
        return self.term.start_percent == 0.0 and self.term.end_percent == 1.0

    @property
    def level(self) -> bool:
        """Whether its weight is the same at every sigma."""
        return self.always and self.term.curve.kind == "constant"

    def acts_at(self, sigma: float) -> bool:
        """Whether `sigma` is inside the interval; both ends count, as in ComfyUI's timestep ranges."""
        return self.always or self.sigma_end <= sigma <= self.sigma_start

    def reuses_at(self, sigma: float) -> bool:
        """Whether its delta may be carried on at `sigma`."""
        return self.term.reuse is not None and self.reuse_end <= sigma <= self.reuse_start

    def weight_at(self, sigma: float) -> float:
        """The weight at `sigma`; 0 outside the interval."""
        if not self.acts_at(sigma):
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
            percents = [term.start_percent, term.end_percent]
            if term.reuse is not None:
                percents += [term.reuse.start_percent, term.reuse.end_percent]
            start, end, *reuse = (as_stored(float(percent_to_sigma(percent))) for percent in percents)
            return ScheduledTerm(term, term.label or str(place), start, end, percent_of, *reuse)

        return cls(tuple(scheduled(place, term) for place, term in enumerate(terms, start=1)))

    def with_masks_at(self, size: tuple[int, int], device: torch.device) -> GuidancePlan:
        """The plan with masks of the latent's size (h, w) and device, so that no step has to bring them there."""

        def fitted(term: GuidanceTerm) -> GuidanceTerm:
            return term if term.mask is None else replace(term, mask=resize_mask(term.mask.to(device), size))

        return self._with_terms([fitted(scheduled.term) for scheduled in self.terms])

    def with_weights(self, weights: Sequence[float]) -> GuidancePlan:
        """The plan with other weights, one per term."""
        return self._with_terms(
            [replace(scheduled.term, weight=weight) for scheduled, weight in zip(self.terms, weights, strict=True)]
        )

    def _with_terms(self, terms: Sequence[GuidanceTerm]) -> GuidancePlan:
        return replace(self, terms=tuple(map(lambda old, new: replace(old, term=new), self.terms, terms)))

    @property
    def needs_sigma(self) -> bool:
        """Whether any weight depends on the noise level (reading it costs a device synchronisation)."""
        return not all(term.level for term in self.terms)

    @property
    def reuses(self) -> bool:
        """Whether any term's delta may be carried on in place of being evaluated."""
        return any(scheduled.term.reuse is not None for scheduled in self.terms)

    @cached_property
    def steady(self) -> tuple[ActiveTerm, ...] | None:
        """The terms that act at every noise level; None where that depends on it (which the host has to read)."""
        return None if self.needs_sigma else self.active(0.0)

    def active(self, sigma: float) -> tuple[ActiveTerm, ...]:
        """The terms that act at `sigma`: inside their interval, and with a weight that is not 0."""
        weights = [scheduled.weight_at(sigma) for scheduled in self.terms]
        return tuple(
            ActiveTerm(index, weight, scheduled.term.mask, scheduled.label)
            for index, (weight, scheduled) in enumerate(zip(weights, self.terms, strict=True))
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
            if scheduled.term.pulls
            and (scheduled.always or (scheduled.sigma_end <= high and scheduled.sigma_start >= low))
        )

    def idle(self, sigmas: Sequence[float]) -> tuple[ScheduledTerm, ...]:
        """Terms with a weight that act at none of the run's steps: most likely a slip of the user."""
        return tuple(
            scheduled
            for scheduled in self.terms
            if scheduled.term.pulls and not any(scheduled.weight_at(sigma) for sigma in sigmas)
        )


def as_stored(sigma: float) -> float:
    """A noise level as samplers have it, in float32, so that a step that lies on a boundary is found to lie on it."""
    return float(torch.tensor(sigma, dtype=torch.float32))


def total_weight(terms: Sequence[ActiveTerm]) -> float:
    """Sum of the weights, W = sum_i w_i."""
    return math.fsum(term.weight for term in terms)


def needs_base(terms: Sequence[ActiveTerm]) -> bool:
    """Whether the unconditional prediction has a coefficient, 1 - sum_i w_i m_i, that is not 0 everywhere."""
    return abs(total_weight(terms) - 1.0) > WEIGHT_TOLERANCE or any(term.mask is not None for term in terms)
