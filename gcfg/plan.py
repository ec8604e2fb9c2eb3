"""Which predictions a noise level needs, and with which weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .errors import GuidanceError
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
    """

    term: GuidanceTerm
    label: str
    sigma_start: float
    sigma_end: float

    @property
    def always(self) -> bool:
        """Whether the interval covers the whole schedule, so that no sigma needs to be looked at."""
        return self.term.start_percent == 0.0 and self.term.end_percent == 1.0

    def acts_at(self, sigma: float) -> bool:
        """Whether `sigma` is inside the interval; both ends count, as in ComfyUI's timestep ranges."""
        return self.always or self.sigma_end <= sigma <= self.sigma_start


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
        return cls(
            tuple(
                ScheduledTerm(
                    term,
                    term.label or str(place),
                    float(percent_to_sigma(term.start_percent)),
                    float(percent_to_sigma(term.end_percent)),
                )
                for place, term in enumerate(terms, start=1)
            )
        )

    @property
    def needs_sigma(self) -> bool:
        """Whether any weight depends on the noise level (reading it costs a device synchronisation)."""
        return not all(term.always for term in self.terms)

    def active(self, sigma: float) -> tuple[ActiveTerm, ...]:
        """The terms that act at `sigma`: inside their interval, and with a weight that is not 0."""
        return tuple(
            ActiveTerm(index, scheduled.term.weight, scheduled.term.mask, scheduled.label)
            for index, scheduled in enumerate(self.terms)
            if scheduled.term.weight != 0.0 and scheduled.acts_at(sigma)
        )

    def used(self, sigmas: Sequence[float]) -> tuple[int, ...]:
        """Indices of the terms that can act in a run over `sigmas`, so that other models are not even loaded.

        A solver also evaluates between the steps, so an interval counts when it overlaps the range of the run.
        """
        low, high = min(sigmas), max(sigmas)
        return tuple(
            index
            for index, scheduled in enumerate(self.terms)
            if scheduled.term.weight != 0.0
            and (scheduled.always or (scheduled.sigma_end <= high and scheduled.sigma_start >= low))
        )

    def idle(self, sigmas: Sequence[float]) -> tuple[ScheduledTerm, ...]:
        """Terms with a weight that act at none of the run's steps: most likely a slip of the user."""
        return tuple(
            scheduled
            for scheduled in self.terms
            if scheduled.term.weight != 0.0 and not any(scheduled.acts_at(sigma) for sigma in sigmas)
        )


def total_weight(terms: Sequence[ActiveTerm]) -> float:
    """Sum of the weights, W = sum_i w_i."""
    return math.fsum(term.weight for term in terms)


def needs_base(terms: Sequence[ActiveTerm]) -> bool:
    """Whether the unconditional prediction has a coefficient, 1 - sum_i w_i m_i, that is not 0 everywhere."""
    return abs(total_weight(terms) - 1.0) > WEIGHT_TOLERANCE or any(term.mask is not None for term in terms)
