"""One run: everything that lives while it samples, and the evaluation of the guidance sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.samplers
from torch import Tensor

from ...gcfg.combine import Delta, pair
from ...gcfg.diagnostics import Recorder
from ...gcfg.guidance_cache import DeltaCache, DeltaName, Member
from ...gcfg.plan import ActiveTerm, GuidancePlan, total_weight
from ...gcfg.steps import Steps
from . import checks, hooks, placing
from .calls import Around
from .lanes import BASE, Lane, Predictions, covers, predict
from .readings import Readings
from .step import Known, Step, Terms, decided
from .summing import Summing
from .term_guider import TermGuider, Weight
from .words import Words


@dataclass(eq=False)
class Run:
    """What is alive while one run samples.

    Attributes:
        words: what messages call its parts.
        plan: the terms with their weights over the noise levels.
        keys: the key of each term's prediction.
        references: the key of the prediction that a relative term is measured from, by the term's place.
        rules: the guidance hooks of each term's own model, by the term's place; a term without has no entry.
        lanes: the models, the sampler's own first.
        steps: the run's steps.
        outside: ComfyUI's sampling functions as they stand outside of all models' wrappers.
        looked_at: the places of the terms that relations look at, by label.
        ranged: keys of conditionings that are limited to a part of the sampling.
        cfg_of: the place of the term whose weight is a sampler's cfg; None where there is none.
        recorder: takes readings, where anybody looks.
        cache: deltas that are carried on, where a term allows it.
        known: what holds of the terms while it samples.
        readings: takes readings while it samples, where anybody looks.
    """

    words: Words
    plan: GuidancePlan
    keys: Sequence[str]
    references: Mapping[int, str]
    rules: dict[int, dict[str, Any]]
    lanes: list[Lane]
    steps: Steps
    outside: placing.Functions
    looked_at: Mapping[str, int]
    ranged: set[str]
    cfg_of: int | None = None
    recorder: Recorder | None = None

    def __post_init__(self) -> None:
        self.cache = DeltaCache(self.steps) if self.plan.caches else None
        self._override_warned = False
        self._lane_of = {key: lane for lane in reversed(self.lanes) for key in lane.keys}

    def begin(self) -> None:
        """Note what holds while the run samples, now that every model's wrappers have done their work."""
        for lane in self.lanes:
            lane.settle(self.lanes, self.outside)
        lanes = {place: self._lane_of[key] for place, key in enumerate(self.keys) if key in self._lane_of}
        self.known = Known(
            self.keys,
            self.references,
            frozenset(place for place, lane in lanes.items() if lane is self.lanes[0]),
            frozenset(place for place, lane in lanes.items() if place in self.rules or lane.own_sampling_function),
            frozenset(place for place, lane in lanes.items() if lane.is_wrapped),
            frozenset(place for place, rule in self.rules.items() if rule.get("disable_cfg1_optimization")),
            lambda a, b: lanes[a] is lanes[b] and hooks.same_hooks(self.rules.get(a), self.rules.get(b)),
        )
        relations = [scheduled.term.relations for scheduled in self.plan.terms]
        self._summing = Summing(self.known, self.lanes[0], self._lane_of, self.rules, relations, self.looked_at)
        self.readings = None if self.recorder is None else Readings(self.recorder, self.known)

    def evaluate(self, x: Tensor, sigma: Tensor, options: dict[str, Any], seed: Any, cfg: float | None) -> Tensor:
        """The guided denoised prediction at one noise level.

        Args:
            x: noisy latent, (B, C, *spatial).
            sigma: (B,), all equal.
            options: the sampled model's options at this step.
            seed: of the run.
            cfg: the guider's, which a wrapper may have set; None where it has none.
        """
        step = self._step(sigma, options, cfg)
        if self.cache is None and self._is_stock(step):
            return self._as_stock(step, x, sigma, options, seed)
        return self._combined(step, self._predicted(step, x, sigma, options, seed), x, sigma, options)

    def around(self, base: Tensor, x: Tensor, sigma: Tensor, options: dict[str, Any], seed: Any) -> Tensor:
        """The guidance sum around an unconditional prediction that was made elsewhere.

        Args:
            base: that prediction, (B, C, *spatial).
            x: noisy latent, of the same shape.
            sigma: (B,), all equal.
            options: the sampled model's options at this step, without its guidance hooks.
            seed: of the run.
        """
        step, given = self._step(sigma, options, base_is_given=True), {BASE: base}
        if step.is_around_a_term:  # which may have the name of the base
            given = {}
        step = replace(step, wanted=tuple(key for key in step.wanted if key not in given))
        return self._combined(step, {**self._predicted(step, x, sigma, options, seed), **given}, x, sigma, options)

    def _predicted(self, step: Step, x: Tensor, sigma: Tensor, options: dict[str, Any], seed: Any) -> Predictions:
        keys = [self.keys[term.index] for term in step.acting]
        pairs = [
            (key, self.references[term.index]) for key, term in zip(keys, step.acting, strict=True) if term.relative
        ]
        return predict(self.lanes, step.wanted, Around(step.base or BASE, pairs, keys), x, sigma, options, seed)

    def _step(
        self, sigma: Tensor, options: dict[str, Any], cfg: float | None = None, base_is_given: bool = False
    ) -> Step:
        """Which terms act at a noise level, around which prediction, and what has to be evaluated for them."""
        override = None if isinstance(cfg, Weight) else cfg
        given = {} if override is None or self.cfg_of is None else {self.cfg_of: override}
        steady = self.plan.steady
        acting = steady if steady is not None and not (self.ranged or given) else self.acting(float(sigma[0]), given)
        two = None
        if override is not None and not given:
            acting, two = self._overridden(acting, override)
        hooked = hooks.has_hooks(options)
        if hooked:
            acting = self._with_positive(acting, sigma)
        eager = base_is_given or bool(options.get("disable_cfg1_optimization"))
        step = decided(acting, self.known, hooked, eager, two)
        if BASE in self.ranged and BASE in step.wanted:
            checks.check_base_covers(self.words, self.lanes[0].conds[BASE], float(sigma[0]))
        return step if self.cache is None else self._with_carried_on(step, self.cache, float(sigma[0]), base_is_given)

    def _combined(
        self, step: Step, predictions: Predictions, x: Tensor, sigma: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """The guidance sum of one evaluation, through the guidance hooks of the models, and its reading.

        Args:
            step: what it is made of.
            predictions: of the keys that the step wants; the cache adds those that are carried on.
            x: noisy latent, (B, C, *spatial).
            sigma: (B,).
            options: the sampled model's options at this step.
        """
        carried: dict[DeltaName, tuple[Tensor, Tensor | None]] = {}
        if self.cache is not None:
            carried = self.cache.complete(predictions)
            # What is measured from the base comes last: a relative delta that was carried on is no prediction of D_i.
            known = sorted(carried.items(), key=lambda item: item[0][1] is None)
            predictions = {**{key: prediction for (key, _), (prediction, _) in known}, **predictions}
        if self.known.wrapped:
            step = self._with_weights_that_wrappers_set(step)

        def delta(term: ActiveTerm) -> Delta:
            name = self.keys[term.index], self.references[term.index] if term.relative else None
            prediction, reference = carried.get(name) or (
                predictions[name[0]],
                None if name[1] is None else predictions[name[1]],
            )
            return Delta(prediction, term, reference)

        acting = [delta(term) for term in step.acting]
        around = {term.index for term in step.around}
        own = [one for one in acting if one.term.index in around]
        guided, denoised = self._summing.of(step, predictions, own, x, sigma, options)
        if self.readings is not None:
            self.readings.take(step, predictions, acting, guided, x, sigma, denoised)
        return denoised

    def acting(self, sigma: float, given: Mapping[int, float] | None = None) -> Terms:
        """The terms of this step; one whose conditioning has no part in it would predict zeros, so it is left out.

        So is one that is measured from such a prediction.

        Args:
            sigma: the noise level.
            given: weights that something else set, by the place of the term; None for none.
        """

        def keys(term: ActiveTerm) -> list[str]:
            return [self.keys[term.index], *([self.references[term.index]] if term.relative else [])]

        active = self.plan.active(sigma, given)
        return tuple(term for term in active if all(self._takes_part(key, sigma) for key in keys(term)))

    def _takes_part(self, key: str, sigma: float) -> bool:
        return key not in self.ranged or covers(self._lane_of[key].conds[key], sigma)

    def _with_positive(self, acting: Terms, sigma: Tensor) -> Terms:
        """The terms with the sampler's positive also at a cfg of 0, where stock shows its prediction to hooks."""
        place = self.cfg_of
        if place is None or any(term.index == place for term in acting):
            return acting
        key = self.keys[place]
        if key in self.ranged and not self._takes_part(key, float(sigma[0])):
            return acting
        return ActiveTerm(place, 0.0, None, self.plan.terms[place].label), *acting

    def _with_carried_on(self, step: Step, cache: DeltaCache, sigma: float, base_is_given: bool) -> Step:
        """The step without the predictions that the cache carries on."""
        base = step.base or self.keys[step.acting[0].index]
        members = []
        for term in step.acting:
            scheduled, key = self.plan.terms[term.index], self.keys[term.index]
            if key != base or term.relative:
                apart, reference = term.index not in self.known.on_base, self.references.get(term.index)
                rule, inside = scheduled.term.cache_rule, scheduled.caches_at(sigma)
                members.append(Member(key, term.weight, rule, inside, apart, reference))
        known = {base, *(key for member in members for key in member.keys)}
        beside = [key for key in step.wanted if key not in known]  # what hooks look at
        return replace(step, wanted=tuple(dict.fromkeys([*cache.wanted(base, members, sigma, base_is_given), *beside])))

    def _overridden(self, acting: Terms, cfg: float) -> tuple[Terms, Terms | None]:
        """The terms with the weight that a wrapper of the sampler's model set as the guider's `cfg` (CFG Override).

        Returns:
            The terms, and which of them is the positive and which the negative of a pair.
        """
        if len(acting) == 1:
            return (replace(acting[0], weight=cfg),), None
        two = pair(acting)
        if two is not None:
            found = (replace(two[0], weight=cfg), replace(two[1], weight=1.0 - cfg))
            return found if two[0] is acting[0] else found[::-1], found
        if acting and not self._override_warned:
            checks.warn_override(len(acting))
            self._override_warned = True
        return acting, None

    def weight_at(self, sigma: float) -> float:
        """The weight of stock guidance at a noise level: a sampler's cfg, that of a pair's positive, or the sum."""
        if self.cfg_of is not None:
            return self.plan.terms[self.cfg_of].weight_at(sigma)
        acting = self.plan.active(sigma)
        two = pair(acting)
        return total_weight(acting) if two is None else two[0].weight

    def _with_weights_that_wrappers_set(self, step: Step) -> Step:
        """The step with the weights that wrappers of a term's own model set while it was evaluated."""

        def own(term: ActiveTerm) -> ActiveTerm:
            guider = self._lane_of[self.keys[term.index]].guider
            override = guider.override if isinstance(guider, TermGuider) else None
            return term if override is None else replace(term, weight=override)

        return replace(step, acting=tuple(map(own, step.acting)), around=tuple(map(own, step.around)))

    def _is_stock(self, step: Step) -> bool:
        return (
            self.known.is_single(step.around)
            and (step.base is None or step.base in self.lanes[0].keys)
            and step.base != self.keys[step.around[0].index]
        )

    def _as_stock(self, step: Step, x: Tensor, sigma: Tensor, options: dict[str, Any], seed: Any) -> Tensor:
        """Stock guidance by ComfyUI's own function, or by what a pack has put in its place."""
        lane, (term,) = self.lanes[0], step.around
        denoised: Tensor = comfy.samplers.sampling_function(
            lane.patcher.model,
            x,
            sigma,
            None if step.base is None else lane.conds[step.base],
            lane.conds[self.keys[term.index]],
            term.weight,
            model_options=options if self.readings is None else self.readings.watching(options),
            seed=seed,
        )
        if self.readings is not None:
            self.readings.take_seen(step, x, sigma, denoised)
        return denoised
