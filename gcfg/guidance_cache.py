"""Guidances that are not evaluated at every step: between evaluations their deltas are carried on.

    d_i(sigma) = (D_i - R_i) / sigma        # the deltas of Eq. 3, Cao et al. 2023; eps_0 - eps_i where R_i = D_0
    d_i(sigma) ~ d_i(b) + (d_i(b) - d_i(a)) log(sigma / b) / log(b / a)         # a, b: the last two evaluations

A step at which some terms are due evaluates these, what they are measured from, and the base. A step at which none is
due evaluates one prediction only, the anchor, and every other one follows from it by the deltas: D_0 ~ D_a - sigma d_a.
With a term as the anchor its own delta counts with w_a - 1 in place of w_a, so a term is a better anchor than the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import GuidanceError
from .steps import Steps


@dataclass(frozen=True)
class CacheRule:
    """When a term's delta is carried on in place of being evaluated.

    Attributes:
        every: evaluate at every so many steps, at least 1; 1 is always. None: as `threshold` says.
        threshold: evaluate when the delta is predicted to have changed by this much since it was evaluated,
            |change| / |delta|, for the sample of a batch that changes most; at least 0, and 0 is always. None: as
            `every` says.
        linear: carry deltas on along a line through the last two, in log sigma; else hold the last.
        start_percent: where in the sampling it begins, 0 (pure noise) to 1 (clean); outside the term is evaluated.
        end_percent: where it ends, at least `start_percent`.
        align: leave the base out at the step after one where the last two deltas of every term had at least this
            cosine, in every sample, -1 to 1; 1 is never. (Adaptive guidance, Castillo et al. 2023, arXiv 2312.12487,
            stops for good; here it is looked at again at the next step, because deltas may turn later.)

    Raises:
        GuidanceError: if a value is out of its range, or both `every` and `threshold` are None.
    """

    every: int | None = 2
    threshold: float | None = None
    linear: bool = True
    start_percent: float = 0.0
    end_percent: float = 1.0
    align: float = 1.0

    def __post_init__(self) -> None:
        name = "Guidance Cache"
        if self.every is None and self.threshold is None:
            raise GuidanceError(f"{name}: neither every nor threshold is given, expected one of them; give one.")
        if self.every is not None and self.every < 1:
            raise GuidanceError(f"{name}: every is {self.every}, expected at least 1 (each step); correct it.")
        if self.threshold is not None and not self.threshold >= 0.0:
            raise GuidanceError(f"{name}: threshold is {self.threshold:g}, expected 0 or more; correct it.")
        if not -1.0 <= self.align <= 1.0:
            raise GuidanceError(f"{name}: align is {self.align:g}, expected -1 to 1 (never); correct it.")
        if not 0.0 <= self.start_percent <= self.end_percent <= 1.0:
            raise GuidanceError(
                f"{name}: start_percent is {self.start_percent:g} and end_percent is {self.end_percent:g}, expected "
                f"0 <= start_percent <= end_percent <= 1; correct them."
            )

    @property
    def looks(self) -> bool:
        """Whether it decides by what the deltas are, which the host has to read back."""
        return self.threshold is not None or self.align < 1.0


DeltaName = tuple[str, str | None]


@dataclass(frozen=True)
class Member:
    """A term at one noise level, as the cache sees it.

    Attributes:
        key: names its prediction D_i.
        weight: its weight.
        rule: when its delta is carried on; None: never.
        inside: whether the noise level is inside the rule's interval.
        apart: whether it runs on another model than the base.
        reference: names R_i, the prediction that its delta is measured from; None: the base.
    """

    key: str
    weight: float
    rule: CacheRule | None
    inside: bool = True
    apart: bool = False
    reference: str | None = None

    @property
    def delta(self) -> DeltaName:
        """Names its delta, which terms of the same two predictions share."""
        return self.key, self.reference

    @property
    def keys(self) -> list[str]:
        """The predictions that are evaluated for it, beside the base."""
        return [self.key] if self.reference is None else [self.key, self.reference]


class DeltaCache:
    """The deltas of one run (of one cell of a sweep): says what to evaluate, and adds what was not.

    Args:
        steps: the run's steps.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._step = 0
        self._base = ""
        self._deltas: dict[DeltaName, _Delta] = {}
        self._base_step = -1  # at which the base was evaluated last
        self._asked = _Asked((), "", 1.0)

    def wanted(self, base: str, members: Sequence[Member], sigma: float, base_is_given: bool = False) -> list[str]:
        """The predictions to evaluate: the terms that are due with the base, or the anchor alone.

        Args:
            base: names the prediction that deltas are measured from.
            members: the terms that act, without the base.
            sigma: noise level.
            base_is_given: whether the base is there anyhow, so that nothing has to stand in for it.
        """
        step = self._steps.at(sigma)
        if step < self._step or base != self._base:  # noise was added back, or deltas mean something else now
            self._deltas = {}
        self._step, self._base = step, base
        due = [member for member in members if self._due(member, sigma)]
        keys = [key for member in due for key in member.keys]
        anchor = base
        if members and not base_is_given and base not in keys and (not due or self._base_rests(members)):
            anchor = _anchor(due or members, base)
        if anchor == base:
            self._base_step = step
        self._asked = _Asked(tuple(members), anchor, sigma)
        return list(dict.fromkeys([*keys, anchor]))

    def complete(self, predictions: dict[str, Tensor]) -> dict[DeltaName, tuple[Tensor, Tensor | None]]:
        """What every delta lies between, D_i and R_i (None for the base); the base itself is found as (its name, None).

        What was evaluated is the very same tensor. A delta that was carried on lies between the base and what it makes
        of the base.

        Args:
            predictions: denoised, of the names that `wanted` gave, (B, C, *spatial).
        """
        members, anchor, sigma = self._asked.members, self._asked.anchor, self._asked.sigma
        base = predictions[anchor]
        if anchor != self._base:
            base = base - self._deltas[anchor, None].at(sigma) * sigma
        found: dict[DeltaName, tuple[Tensor, Tensor | None]] = {(self._base, None): (base, None)}
        renewed: list[Member] = []
        for member in members:
            relative = member.reference is not None
            if any(key not in predictions for key in member.keys):
                carried_on = base + self._deltas[member.delta].at(sigma) * sigma
                found[member.delta] = (carried_on, base if relative else None)
                continue
            prediction = predictions[member.key]
            reference = None if member.reference is None else predictions[member.reference]
            found[member.delta] = (prediction, reference)
            if member.rule is not None and (relative or anchor == self._base) and sigma > 0.0:
                self._keep(member, (prediction - (base if reference is None else reference)) / sigma)
                renewed.append(member)
        self._look(renewed)
        return found

    def _due(self, member: Member, sigma: float) -> bool:
        kept, rule = self._deltas.get(member.delta), member.rule
        if rule is None or kept is None or not member.inside or sigma <= 0.0 or not kept.ready:
            return True
        if kept.step == self._step:  # a solver's further evaluations of a step do as its first
            return True
        if rule.every is not None and self._step - kept.step >= rule.every:
            return True
        return rule.threshold is not None and not kept.change_at(sigma) < rule.threshold  # true where not a number

    def _base_rests(self, members: Sequence[Member]) -> bool:
        return self._base_step == self._step - 1 and all(
            member.rule is not None
            and member.inside
            and member.rule.align < 1.0
            and member.delta in self._deltas
            and self._deltas[member.delta].cosine >= member.rule.align
            for member in members
        )

    def _keep(self, member: Member, delta: Tensor) -> None:
        assert member.rule is not None
        kept = self._deltas.setdefault(member.delta, _Delta(member.rule))
        kept.add(self._step, self._asked.sigma, delta)

    def _look(self, renewed: Sequence[Member]) -> None:
        """Read back what the rules decide by, for all terms at once: a wait for the device, where a rule looks."""
        deltas = [self._deltas[member.delta] for member in renewed if member.rule is not None and member.rule.looks]
        deltas = [delta for delta in deltas if delta.before is not None]
        if not deltas:
            return
        for delta, (change, cosine) in zip(deltas, torch.stack([d.drift() for d in deltas]).tolist(), strict=True):
            delta.change, delta.cosine = change, cosine


@dataclass(frozen=True)
class _Asked:
    """The last question: what acts, what the rest follows from, and where."""

    members: tuple[Member, ...]
    anchor: str
    sigma: float


@dataclass(frozen=True)
class _Point:
    """A delta that was evaluated."""

    step: int
    level: float  # log sigma
    delta: Tensor


class _Delta:
    """The last two evaluated deltas of a term, of different steps.

    Attributes:
        change: |last - before| / |last|, of the sample that changed most.
        cosine: between the two, of the sample where it is lowest.
    """

    def __init__(self, rule: CacheRule) -> None:
        self._rule = rule
        self.before: _Point | None = None
        self._last: _Point | None = None
        self.change, self.cosine = math.inf, -math.inf

    @property
    def step(self) -> int:
        """The step of the last one."""
        return -1 if self._last is None else self._last.step

    @property
    def ready(self) -> bool:
        """Whether there is enough to carry on."""
        return self.before is not None or not (self._rule.linear or self._rule.looks)

    def add(self, step: int, sigma: float, delta: Tensor) -> None:
        """Take a delta that was evaluated; of several in one step the last counts."""
        if self._last is not None and self._last.step != step:
            self.before = self._last
        self._last = _Point(step, math.log(sigma), delta)

    def at(self, sigma: float) -> Tensor:
        """The delta carried on to `sigma`, no further along the line than the two lie apart."""
        assert self._last is not None
        if self.before is None or not self._rule.linear:
            return self._last.delta
        return self._last.delta + (self._last.delta - self.before.delta) * min(self._distance(sigma), 1.0)

    def change_at(self, sigma: float) -> float:
        """By how much the delta has changed at `sigma`, if it goes on as it did between the two."""
        return self.change * self._distance(sigma)

    def drift(self) -> Tensor:
        """float32 (2,): `change` and `cosine`, on the device."""
        assert self._last is not None
        assert self.before is not None
        last, before = (point.delta.flatten(1).float() for point in (self._last, self.before))
        change = (last - before).norm(dim=1) / last.norm(dim=1)
        return torch.stack([change.max(), torch.cosine_similarity(last, before).min()])

    def _distance(self, sigma: float) -> float:
        assert self._last is not None
        assert self.before is not None
        span = self._last.level - self.before.level
        return (math.log(sigma) - self._last.level) / span if span else 0.0


def _anchor(members: Sequence[Member], base: str) -> str:
    """The prediction that the others follow from.

    A term of weight above 0.5 counts less with its own error than it would beside the base, |w - 1| < |w|. A term on
    another model comes first, because the deltas between models are the larger ones.
    """
    better = [member for member in members if member.weight > 0.5 and member.reference is None]
    return max(better, key=lambda member: (member.apart, member.weight)).key if better else base
