"""What a run's recorder is shown of each evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...gcfg.combine import Delta
from ...gcfg.diagnostics import Recorder
from . import hooks
from .lanes import Predictions
from .step import Known, Step


class Readings:
    """Takes readings of a run, which change nothing of it.

    Args:
        recorder: what measures.
        known: what the run knows of its terms.
    """

    def __init__(self, recorder: Recorder, known: Known) -> None:
        self._recorder, self._known = recorder, known
        self._watched: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._seen: list[tuple[Tensor, ...]] = []

    def watching(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options under which stock guidance shows its predictions; one dict for one, since hooks write into it."""
        if self._watched is None or self._watched[0] is not options:
            self._watched = (options, hooks.watched(options, lambda *shown: self._seen.append(shown)))
        return self._watched[1]

    def take_seen(self, step: Step, x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
        """Measure what stock guidance showed of one conditional prediction."""
        if not self._seen:
            return
        (term,), (cond, uncond) = step.around, self._seen[0]
        self._seen.clear()
        key = self._known.keys[term.index]
        shown = {key: cond} if step.base is None else {key: cond, step.base: uncond}
        acting = [Delta(shown[self._known.keys[one.index]], one) for one in step.acting]
        self.take(step, shown, acting, [Delta(cond, term)], x, sigma, denoised)

    def take(
        self,
        step: Step,
        predictions: Predictions,
        acting: Sequence[Delta],
        guided: Sequence[Delta],
        x: Tensor,
        sigma: Tensor,
        denoised: Tensor,
    ) -> None:
        """Measure one evaluation.

        Args:
            step: what it was made of.
            predictions: by key.
            acting: the terms that act, as they were evaluated.
            guided: those around the base, as they were added.
            x: noisy latent, (B, C, *spatial).
            sigma: (B,).
            denoised: what the sampler gets.
        """
        base = None if step.base is None else predictions[step.base]
        changed = {one.term.index: one for one in guided if one.term.related or one.term.index in self._known.ruled}

        def shown(one: Delta) -> Delta:
            """What rules and relations made of a term, as a prediction whose w m (D - R) is its pull."""
            measured_from = base if one.reference is None else one.reference
            made = changed.get(one.term.index)
            if made is None or measured_from is None or not one.term.weight:
                return one
            term = replace(one.term, mask=made.term.mask)  # a relation has it in what it made
            return Delta(measured_from + (made.prediction - measured_from) / one.term.weight, term, one.reference)

        unconditional = None if step.is_around_a_term else base
        self._recorder.record(x, sigma, unconditional, [shown(one) for one in acting], denoised)
