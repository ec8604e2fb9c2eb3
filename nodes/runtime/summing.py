"""The sum of one evaluation, through the guidance hooks of the models and the relations between terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.samplers
from torch import Tensor

from ...gcfg.combine import Delta, combine, difference, effective_cond
from ...gcfg.plan import total_weight
from ...gcfg.relations import Relation, related
from . import hooks, placing
from .lanes import BASE, Lane, Predictions
from .step import Known, Step


class Summing:
    """Sums what was evaluated.

    Args:
        known: what the run knows of its terms.
        base: the lane of the sampler's model.
        lane_of: the lane of each prediction, by its key.
        rules: the guidance hooks of each term's own model, by the term's place.
        relations: of each term.
        looked_at: the places of the terms that relations look at, by label.
    """

    def __init__(
        self,
        known: Known,
        base: Lane,
        lane_of: Mapping[str, Lane],
        rules: Mapping[int, dict[str, Any]],
        relations: Sequence[Sequence[Relation]],
        looked_at: Mapping[str, int],
    ) -> None:
        self._known, self._base, self._lane_of = known, base, lane_of
        self._rules, self._relations, self._looked_at = rules, relations, looked_at
        # Hooks keep things in the options that they are handed, so these are one dict all run long.
        self._options_of_rules: dict[int, dict[str, Any]] = {}

    def of(
        self,
        step: Step,
        predictions: Predictions,
        deltas: Sequence[Delta],
        x: Tensor,
        sigma: Tensor,
        options: dict[str, Any],
    ) -> tuple[list[Delta], Tensor]:
        """The deltas as they are added, and the guided prediction.

        Args:
            step: what the evaluation is made of.
            predictions: by key.
            deltas: of the terms around the base, as they were evaluated.
            x: noisy latent, (B, C, *spatial).
            sigma: (B,).
            options: the sampled model's options at this step.
        """
        guided = [
            self._by_own_rule(one, step, predictions, x, sigma, options) if one.term.index in self._known.ruled else one
            for one in deltas
        ]
        if any(one.term.related for one in guided):
            guided = self._related(step, predictions, guided, float(sigma[0]))
        if step.hooked:
            return guided, self._through_hooks(step, predictions, guided, x, sigma, options)
        return guided, self._sum(step, predictions, guided)

    def _by_own_rule(
        self,
        one: Delta,
        step: Step,
        predictions: Predictions,
        x: Tensor,
        sigma: Tensor,
        options: dict[str, Any],
    ) -> Delta:
        """What hooks of a term's own model make of its prediction, H(R_i, D_i, w_i); its weight is in it."""
        prediction, term, reference = one
        key = self._known.keys[term.index]
        lane = self._lane_of[key]
        own = hooks.without_hooks(options if lane is self._base else lane.options)
        own.pop("sampler_calc_cond_batch_function", None)  # the predictions are made already
        kept = self._options_of_rules.setdefault(term.index, {})
        kept.update({**own, **self._rules.get(term.index, {})})
        if reference is None:
            uncond = step.base if step.base in lane.keys else BASE
            base = None if step.base is None else predictions[step.base]
        else:
            uncond, base = self._known.references[term.index], reference
        at = hooks.Situation(
            lane.patcher.model,
            kept,
            x,
            sigma,
            lane.conds[key],
            None if base is None else lane.conds.get(uncond),
        )
        with lane.at_work():
            # Copies, since hooks may write into what they are given, and others measure from the same base.
            guide = hooks.guided
            if placing.is_replaced(comfy.samplers.sampling_function):
                guide = placing.guided_by_sampling_function
            result = guide(at, prediction.clone(), None if base is None else base.clone(), term.weight)
            return Delta(result, replace(term, weight=1.0), reference)

    def _related(self, step: Step, predictions: Predictions, guided: Sequence[Delta], sigma: float) -> list[Delta]:
        """The deltas after the relations of their terms to others."""
        assert step.base is not None  # `needs_base` sees to it
        base = predictions[step.base]
        pulls = [one for one in guided if one.term.weight != 0.0]  # nothing looks at one that does not act
        weighted = {one.term.index: difference(one, base).mul_(one.term.weight) for one in pulls}

        def other(place: int, relation: Relation) -> Tensor | None:
            if relation.against:
                return weighted.get(self._looked_at[relation.against])
            rest = [delta for index, delta in weighted.items() if index != place]
            return sum(rest[1:], rest[0]) if rest else None

        def changed(one: Delta) -> Delta:
            place = one.term.index
            relations = self._relations[place]
            found = related(relations, weighted[place], [other(place, relation) for relation in relations], sigma)
            measured_from = base if one.reference is None else one.reference
            return Delta(measured_from + found, replace(one.term, weight=1.0, mask=None), one.reference)

        return [changed(one) if one.term.related and one.term.index in weighted else one for one in guided]

    def _sum(self, step: Step, predictions: Predictions, guided: Sequence[Delta]) -> Tensor:
        if len(guided) == 1 and guided[0].term.index in self._known.ruled:
            result, term, reference = guided[0]
            if term.mask is None and reference is None:
                return result  # the rule's own, to the last bit
        base = None if step.base is None else predictions[step.base]
        if base is not None and not guided:
            return base
        return combine(base, guided)

    def _through_hooks(
        self,
        step: Step,
        predictions: Predictions,
        guided: Sequence[Delta],
        x: Tensor,
        sigma: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        """The sum through the hooks of the sampler's model."""
        lane = self._base
        key = self._key_for_hooks(step)
        uncond = step.base if step.base is None or step.base in lane.keys else BASE
        at = hooks.Situation(
            lane.patcher.model, options, x, sigma, lane.conds[key], None if uncond is None else lane.conds[uncond]
        )
        predictions = {key: prediction.clone() for key, prediction in predictions.items()}  # hooks may write into them
        base = None if step.base is None else predictions[step.base]
        if self._known.is_single(step.around):
            return hooks.guided(at, predictions[key], base, step.around[0].weight)
        weight = total_weight(step.around)

        def effective() -> tuple[Tensor, float]:
            assert base is not None  # `step` sees to it where hooks are
            return effective_cond(base, guided, weight)

        return hooks.guided_sum(
            at, lambda: self._sum(step, predictions, guided), effective, weight, predictions[key], base
        )

    def _key_for_hooks(self, step: Step) -> str:
        """What a hook may evaluate again: the heaviest term on the sampled model, else the unconditional."""
        on_base = [term for term in step.acting if term.index in self._known.on_base]
        on_base = [term for term in on_base if not term.relative] or on_base
        on_base = [term for term in on_base if self._known.keys[term.index] != step.base] or on_base
        if not on_base:
            return BASE
        return self._known.keys[max(on_base, key=lambda term: abs(term.weight)).index]
