"""What each guidance does: how strongly it pulls, and whether guidances fight."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .combine import Delta, base_index, difference
from .plan import ActiveTerm
from .steps import Steps


@dataclass(frozen=True)
class Reading:
    """One evaluation of the guidance sum.

    Attributes:
        step: the sampling step at whose noise levels it is, from 1.
        sigma: noise level; as all that follows None where that is not a finite number, which JSON does not have.
        weights: each term's weight; 0 where it does not act.
        pulls: norm of each term's weighted delta over the norm of the base's noise prediction.
        total: the same of the whole sum, after guidance hooks.
        cosines: cosine between the weighted deltas of each pair of terms (i < j, row by row), -1 (they fight) to 1;
            None where a term does not pull.
        centre: label of the term that is the base where the unconditional model is not evaluated, else "".
    """

    step: int
    sigma: float | None
    weights: tuple[float | None, ...]
    pulls: tuple[float | None, ...]
    total: float | None
    cosines: tuple[float | None, ...]
    centre: str = ""


@dataclass
class GuidanceReport:
    """The readings of one run.

    Attributes:
        labels: the terms' labels.
        steps: number of sampling steps.
        readings: one per evaluation, in order.
        relative: what each term is measured from, in words; "" for the base.
    """

    labels: tuple[str, ...] = ()
    steps: int = 0
    readings: list[Reading] = field(default_factory=list)
    relative: tuple[str, ...] = ()

    def show(self, other: GuidanceReport) -> None:
        """Be of the run that another report is of, also while that run adds to it."""
        self.labels, self.steps, self.relative = other.labels, other.steps, other.relative
        self.readings = other.readings

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, ready for JSON."""
        readings = [asdict(reading) for reading in self.readings]
        named = {"labels": list(self.labels), "relative": list(self.relative)}
        return {**named, "steps": self.steps, "readings": readings}

    def as_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.as_dict(), indent=1, allow_nan=False)

    def as_csv(self) -> str:
        """One line per evaluation: step, sigma, total, then weight and pull of each term, then each pair's cosine."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        columns = [f"{what} {label}" for label in self.labels for what in ("weight", "pull")]
        columns += [f"cosine {self.labels[i]} / {self.labels[j]}" for i, j in pairs(len(self.labels))]
        writer.writerow(["step", "sigma", "total", *columns, "centre"])
        for r in self.readings:
            terms = [value for both in zip(r.weights, r.pulls, strict=True) for value in both]
            writer.writerow([r.step, r.sigma, r.total, *terms, *r.cosines, r.centre])  # None is left empty
        return out.getvalue()


class Recorder:
    """Takes a reading of every evaluation of one run, without making the host wait for the device.

    Args:
        report: what the readings are added to; its labels and steps are set.
        sigmas: the noise levels of the run, falling (or rising, where noise is added back), (steps + 1,).
        labels: the terms' labels.
        tell: called after readings were added.
        relative: what each term is measured from, in words; "" for the base.
    """

    def __init__(
        self,
        report: GuidanceReport,
        sigmas: Sequence[float],
        labels: Sequence[str],
        tell: Callable[[], None] = lambda: None,
        relative: Sequence[str] = (),
    ) -> None:
        report.labels, report.steps, report.readings = tuple(labels), len(sigmas) - 1, []
        report.relative = tuple(relative) or ("",) * len(labels)
        self.report = report
        self.tell = tell
        self._steps = Steps(sigmas)
        self._pending: _Pending | None = None

    def record(
        self,
        x: Tensor,
        sigma: Tensor,
        base: Tensor | None,
        deltas: Sequence[Delta],
        denoised: Tensor,
    ) -> None:
        """Measure one evaluation; on a GPU the reading before it is what gets added now.

        Args:
            x: noisy latent, (B, C, *spatial).
            sigma: (B,), all equal.
            base: unconditional prediction, or None where it is not evaluated.
            deltas: one per active term.
            denoised: what the sampler gets.
        """
        centre, terms = "", [one.term for one in deltas]
        if base is None:
            lowest = base_index(terms)
            base, centre = deltas[lowest].prediction, terms[lowest].label
        measured = measure(x, base, deltas, denoised)
        pending = _Pending(torch.cat([sigma[:1].to(measured), measured]), tuple(terms), centre)
        if x.device.type != "cuda":
            self._add(pending)
            return
        self.finish()
        self._pending = pending

    def finish(self) -> None:
        """Add what is still on its way from the device."""
        if self._pending is not None:
            self._add(self._pending)
            self._pending = None

    def lost_at(self) -> int | None:
        """The first step whose guidance was not a finite number; None where there was none."""
        self.finish()
        return next((reading.step for reading in self.report.readings if reading.total is None), None)

    def _add(self, pending: _Pending) -> None:
        self.report.readings.append(self._reading(pending))
        self.tell()

    def _reading(self, pending: _Pending) -> Reading:
        sigma, total, *rest = pending.values()
        count, active = len(self.report.labels), [term.index for term in pending.terms]
        pulls, cosines = rest[: len(active)], dict(zip(pairs(len(active)), rest[len(active) :], strict=True))
        place = {index: row for row, index in enumerate(active)}

        def cosine(i: int, j: int) -> float | None:
            if i not in place or j not in place:
                return None
            value = _number(cosines[place[i], place[j]])
            return None if value is None else round(min(max(value, -1.0), 1.0), 6)

        weights = {term.index: term.weight for term in pending.terms}
        return Reading(
            step=self._steps.at(sigma),
            sigma=_number(sigma),
            weights=tuple(_number(weights.get(index, 0.0)) for index in range(count)),
            pulls=tuple(_number(pulls[place[index]]) if index in place else 0.0 for index in range(count)),
            total=_number(total),
            cosines=tuple(cosine(i, j) for i, j in pairs(count)),
            centre=pending.centre,
        )


class _Pending:
    """Numbers that are on their way from the device to the host."""

    def __init__(self, values: Tensor, terms: tuple[ActiveTerm, ...], centre: str) -> None:
        self.terms, self.centre = terms, centre
        self._arrived: torch.cuda.Event | None = None
        self._values = values
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def values(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(value) for value in self._values.tolist()]


def measure(x: Tensor, base: Tensor, deltas: Sequence[Delta], denoised: Tensor) -> Tensor:
    """How strongly each term and the sum pull, and the angles between terms.

        pull_i  = |w_i m_i (D_i - R_i)| / |x - D_0|         # where R_i = D_0: |w_i m_i (eps_i - eps_0)| / |eps_0|
        total   = |D - D_0| / |x - D_0|
        cos_ij  = <w_i m_i (D_i - R_i), w_j m_j (D_j - R_j)> / (their norms)

    eps = (x - D) / sigma at one `x` and `sigma`, so the ratios are those of the noise predictions in Eq. 3 of Cao et
    al. 2023 (of the velocities for a flow model). Norms are over a sample; the numbers are means over the batch, a
    cosine's over the samples in which both terms pull.

    Args:
        x: noisy latent, (B, C, *spatial).
        base: the prediction that deltas are measured from, of the same shape.
        deltas: one per term.
        denoised: the guided prediction, after hooks.

    Returns:
        float32 (1 + K + K (K - 1) / 2,): total, pulls, cosines of pairs (i < j, row by row); a cosine is NaN where
        the two terms pull in no sample together.
    """
    rows = [x - base, denoised - base]
    rows += [difference(one, base) * one.term.weight for one in deltas]
    vectors = torch.stack([row.flatten(1).float() for row in rows], dim=1)  # (B, 2 + K, N)
    gram = vectors @ vectors.mT
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()  # (B, 2 + K)
    pulls = norms[:, 1:] / norms[:, :1]
    angles = gram / (norms[:, :, None] * norms[:, None, :])
    i, j = torch.triu_indices(len(deltas), len(deltas), offset=1, device=x.device) + 2
    return torch.cat([pulls.mean(0), angles[:, i, j].nanmean(0)])


def pairs(count: int) -> list[tuple[int, int]]:
    """(i, j) of every pair i < j, row by row."""
    return [(i, j) for i in range(count) for j in range(i + 1, count)]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
