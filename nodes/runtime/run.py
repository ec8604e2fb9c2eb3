"""One run: everything that lives while it samples, and the evaluation of the guidance sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.samplers
from torch import Tensor

from ...gcfg.combine import combine, effective_cond, pair, pivot_index
from ...gcfg.diagnostics import Recorder
from ...gcfg.plan import ActiveTerm, GuidancePlan, needs_base, total_weight
from ...gcfg.reuse import DeltaCache, Member
from ...gcfg.steps import Steps
from . import checks, hooks, placing
from .lanes import BASE, Lane, Predictions, TermGuider, Weight, covers, predict


@dataclass(frozen=True, eq=False)
class Step:
    """What one evaluation of the sum is made of.

    Attributes:
        acting: the terms that act at this noise level.
        centre: the key of the prediction that deltas are measured from; None where it is not evaluated.
        around: the terms whose deltas are added to it.
        wanted: the keys of the predictions to evaluate.
    """

    acting: tuple[ActiveTerm, ...]
    centre: str | None
    around: tuple[ActiveTerm, ...]
    wanted: list[str]


@dataclass(eq=False)
class Run:
    """What is alive while one run samples.

    Attributes:
        node: the node's name, for errors.
        plan: the terms with their weights over the noise levels.
        keys: the key of each term's prediction.
        rules: the guidance hooks of each term's own model, by the term's place; a term without has no entry.
        lanes: the models, the sampler's own first.
        steps: the run's steps.
        outside: ComfyUI's sampling functions as they stand outside of all models' wrappers.
        ranged: keys of conditionings that are limited to a part of the sampling.
        recorder: takes readings, where anybody looks.
        cache: deltas that are carried on, where a term allows it.
    """

    node: str
    plan: GuidancePlan
    keys: Sequence[str]
    rules: dict[int, dict[str, Any]]
    lanes: list[Lane]
    steps: Steps
    outside: placing.Functions
    ranged: set[str]
    recorder: Recorder | None = None

    def __post_init__(self) -> None:
        self.cache = self.new_cache()
        self._override_told = False
        # Hooks keep things in the options that they are handed, so these are one dict all run long.
        self._options_of_rules: dict[int, dict[str, Any]] = {}
        self._watched: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._lane_of = {key: lane for lane in reversed(self.lanes) for key in lane.keys}

    def new_cache(self) -> DeltaCache | None:
        """An empty cache of deltas, where any term's may be carried on."""
        return DeltaCache(self.steps) if self.plan.reuses else None

    def evaluate(self, x: Tensor, sigma: Tensor, options: dict[str, Any], seed: Any, cfg: float) -> Tensor:
        """The guided denoised prediction at one noise level.

        Args:
            x: noisy latent, (B, C, *spatial).
            sigma: (B,), all equal.
            options: the sampled model's options at this step.
            seed: of the run.
            cfg: the guider's, which a wrapper may have set.
        """
        step = self.step(self.plan, self.cache, sigma, options, cfg)
        if self._is_stock(step):
            return self._as_stock(step, x, sigma, options, seed)
        predictions = predict(self.lanes, dict.fromkeys(step.wanted, x), step.centre or BASE, sigma, options, seed)
        return self.combined(step, predictions, self.cache, x, sigma, options)

    def step(
        self,
        plan: GuidancePlan,
        cache: DeltaCache | None,
        sigma: Tensor,
        options: dict[str, Any],
        cfg: float | None = None,
    ) -> Step:
        """Which terms act at a noise level, around which prediction, and what has to be evaluated for them."""
        acting = self._overridden(self._acting(plan, sigma), cfg)
        two = self._pair(acting)
        keys = list(dict.fromkeys(self.keys[term.index] for term in acting))
        centre: str | None
        around: tuple[ActiveTerm, ...]
        if two is not None:
            centre, around = self.keys[two[1].index], two[:1]
            extra = [BASE] if hooks.has_hooks(options) and not any(map(self._on_base, acting)) else []
        elif self._wants_base(acting, options):
            centre, around, extra = BASE, acting, []
        elif len(acting) == 1:
            centre, around, extra = None, acting, []
        else:
            middle = pivot_index(acting)
            centre, around, extra = self.keys[acting[middle].index], acting[:middle] + acting[middle + 1 :], []
        if BASE in (*keys, centre, *extra) and BASE in self.ranged:
            checks.check_base_covers(self.node, self.lanes[0].conds[BASE], float(sigma[0]))
        if cache is None:
            wanted = [*keys, *([] if centre is None else [centre])]
        else:
            level, middle_key = float(sigma[0]), centre or keys[0]
            members = [self._member(plan, t, level) for t in acting if self.keys[t.index] != middle_key]
            wanted = cache.wanted(middle_key, members, level)
        return Step(acting, centre, around, list(dict.fromkeys([*wanted, *extra])))

    def combined(
        self,
        step: Step,
        predictions: Predictions,
        cache: DeltaCache | None,
        x: Tensor,
        sigma: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        """The guidance sum of one evaluation, through the guidance hooks of the models, and its reading.

        Args:
            step: what it is made of.
            predictions: of the keys that the step wants.
            cache: adds those that were carried on.
            x: noisy latent, (B, C, *spatial).
            sigma: (B,).
            options: the sampled model's options at this step.
        """
        if cache is not None:
            predictions = {**predictions, **cache.complete(predictions)}
        step = self._with_weights_that_wrappers_set(step)
        centre = None if step.centre is None else predictions[step.centre]
        guided = [self._by_own_rule(term, step, predictions, x, sigma, options) for term in step.around]
        if hooks.has_hooks(options):
            denoised = self._through_hooks(step, predictions, guided, x, sigma, options)
        else:
            denoised = self._sum(step, centre, guided)
        self._record(step, predictions, guided, x, sigma, denoised)
        return denoised

    def _acting(self, plan: GuidancePlan, sigma: Tensor) -> tuple[ActiveTerm, ...]:
        """The terms of this step; one whose conditioning has no part in it would predict zeros, so it is left out."""
        if not self.ranged and not plan.needs_sigma:
            return plan.active(0.0)  # no host synchronisation where no weight depends on sigma
        level = float(sigma[0])

        def takes_part(key: str) -> bool:
            return key not in self.ranged or covers(self._lane_of[key].conds[key], level)

        return tuple(term for term in plan.active(level) if takes_part(self.keys[term.index]))

    def _overridden(self, acting: tuple[ActiveTerm, ...], cfg: float | None) -> tuple[ActiveTerm, ...]:
        """The terms with the weight that a wrapper of the sampler's model set as the guider's `cfg` (CFG Override)."""
        if cfg is None or isinstance(cfg, Weight) or not acting:
            return acting
        if len(acting) == 1:
            return (replace(acting[0], weight=cfg),)
        two = pair(acting)
        if two is None:
            if not self._override_told:
                checks.warn_override(len(acting))
            self._override_told = True
            return acting
        return tuple(replace(term, weight=cfg if term is two[0] else 1.0 - cfg) for term in acting)

    def _with_weights_that_wrappers_set(self, step: Step) -> Step:
        """The step with the weights that wrappers of a term's own model set while it was evaluated."""

        def own(term: ActiveTerm) -> ActiveTerm:
            guider = self._lane_of[self.keys[term.index]].guider
            override = guider.override if isinstance(guider, TermGuider) else None
            return term if override is None else replace(term, weight=override)

        return replace(step, acting=tuple(map(own, step.acting)), around=tuple(map(own, step.around)))

    def _has_rule(self, term: ActiveTerm) -> bool:
        """Whether its own model's hooks, or a sampling function put in for its model's run, act on its delta."""
        lane = self._lane_of[self.keys[term.index]]
        name = "sampling_function"
        return term.index in self.rules or (
            lane is not self.lanes[0] and lane.functions[name] is not self.outside[name]
        )

    def _pair(self, acting: Sequence[ActiveTerm]) -> tuple[ActiveTerm, ActiveTerm] | None:
        """A positive and a negative term that are stock guidance: two evaluations, whatever hooks there are."""
        two = pair(acting)
        if two is None or any(self._lane_of[self.keys[term.index]].is_wrapped for term in acting):
            return None
        if not self._has_rule(two[1]):
            return two
        positive, negative = (self.rules.get(term.index) for term in two)
        one_lane = self._lane_of[self.keys[two[0].index]] is self._lane_of[self.keys[two[1].index]]
        return two if one_lane and hooks.same_hooks(positive, negative) else None

    def _wants_base(self, acting: Sequence[ActiveTerm], options: dict[str, Any]) -> bool:
        if not acting or needs_base(acting) or options.get("disable_cfg1_optimization"):
            return True
        if len(acting) == 1:
            rule = self.rules.get(acting[0].index, {})
            own = bool(rule.get("disable_cfg1_optimization")) or self._lane_of[self.keys[acting[0].index]].is_wrapped
            return own or (hooks.has_hooks(options) and not self._on_base(acting[0]))
        return hooks.has_hooks(options) or any(
            self._has_rule(term) or self._lane_of[self.keys[term.index]].is_wrapped for term in acting
        )

    def _on_base(self, term: ActiveTerm) -> bool:
        return self.keys[term.index] in self.lanes[0].keys

    def _member(self, plan: GuidancePlan, term: ActiveTerm, sigma: float) -> Member:
        scheduled = plan.terms[term.index]
        rule, inside = scheduled.term.reuse, scheduled.reuses_at(sigma)
        return Member(self.keys[term.index], term.weight, rule, inside, not self._on_base(term))

    def _is_single(self, step: Step) -> bool:
        """Whether it is stock guidance of the sampler's own model: one conditional prediction without a rule."""
        if len(step.around) != 1:
            return False
        (term,) = step.around
        return term.mask is None and not self._has_rule(term) and self._on_base(term)

    def _is_stock(self, step: Step) -> bool:
        return (
            self._is_single(step)
            and self.cache is None
            and (step.centre is None or step.centre in self.lanes[0].keys)
            and step.centre != self.keys[step.around[0].index]
        )

    def _as_stock(self, step: Step, x: Tensor, sigma: Tensor, options: dict[str, Any], seed: Any) -> Tensor:
        """Stock guidance by ComfyUI's own function, or by what a pack has put in its place."""
        lane, (term,) = self.lanes[0], step.around
        key = self.keys[term.index]
        denoised: Tensor = comfy.samplers.sampling_function(
            lane.patcher.model,
            x,
            sigma,
            None if step.centre is None else lane.conds[step.centre],
            lane.conds[key],
            term.weight,
            model_options=options if self.recorder is None else self._watching(options),
            seed=seed,
        )
        if self._seen:
            cond, uncond = self._seen[0]
            self._seen.clear()
            shown = {key: cond} if step.centre is None else {key: cond, step.centre: uncond}
            self._record(step, shown, [(cond, term)], x, sigma, denoised)
        return denoised

    def _watching(self, options: dict[str, Any]) -> dict[str, Any]:
        if self._watched is None or self._watched[0] is not options:
            self._watched = (options, hooks.watched(options, lambda *shown: self._seen.append(shown)))
        return self._watched[1]

    def _by_own_rule(
        self,
        term: ActiveTerm,
        step: Step,
        predictions: Predictions,
        x: Tensor,
        sigma: Tensor,
        options: dict[str, Any],
    ) -> tuple[Tensor, ActiveTerm]:
        """A term's prediction and weight; under hooks of its own model H(D_0, D_i, w_i), whose weight is in it."""
        key = self.keys[term.index]
        prediction, lane = predictions[key], self._lane_of[key]
        if not self._has_rule(term):
            return prediction, term
        if term.index not in self._options_of_rules:
            own = options if lane is self.lanes[0] else lane.options
            own = {name: v for name, v in own.items() if name != "sampler_calc_cond_batch_function"}  # done already
            self._options_of_rules[term.index] = {**hooks.without_hooks(own), **self.rules.get(term.index, {})}
        uncond = step.centre if step.centre in lane.keys else BASE
        centre = None if step.centre is None else predictions[step.centre]
        at = hooks.Situation(
            lane.patcher.model,
            self._options_of_rules[term.index],
            x,
            sigma,
            lane.conds[key],
            None if centre is None else lane.conds.get(uncond),
        )
        with lane.at_work():
            # Copies, since hooks may write into what they are given, and others measure from the same centre.
            base = None if centre is None else centre.clone()
            guide = hooks.guided
            if placing.is_replaced(comfy.samplers.sampling_function):
                guide = placing.guided_by_sampling_function
            return guide(at, prediction.clone(), base, term.weight), replace(term, weight=1.0)

    def _sum(self, step: Step, centre: Tensor | None, guided: Sequence[tuple[Tensor, ActiveTerm]]) -> Tensor:
        if len(guided) == 1 and guided[0][1].mask is None and self._has_rule(step.around[0]):
            return guided[0][0]  # the rule's own result, to the last bit
        if centre is not None and not guided:
            return centre
        return combine(centre, [prediction for prediction, _ in guided], [term for _, term in guided])

    def _through_hooks(
        self,
        step: Step,
        predictions: Predictions,
        guided: Sequence[tuple[Tensor, ActiveTerm]],
        x: Tensor,
        sigma: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        """The sum through the hooks of the sampler's model."""
        lane = self.lanes[0]
        key = self._key_for_hooks(step)
        uncond = step.centre if step.centre is None or step.centre in lane.keys else BASE
        at = hooks.Situation(
            lane.patcher.model, options, x, sigma, lane.conds[key], None if uncond is None else lane.conds[uncond]
        )
        predictions = {key: prediction.clone() for key, prediction in predictions.items()}  # hooks may write into them
        centre = None if step.centre is None else predictions[step.centre]
        if self._is_single(step):
            return hooks.guided(at, predictions[key], centre, step.around[0].weight)
        weight = total_weight(step.around)

        def effective() -> tuple[Tensor, float]:
            assert centre is not None  # `step` sees to it where hooks are
            return effective_cond(centre, [p for p, _ in guided], [term for _, term in guided], weight)

        return hooks.guided_sum(
            at, lambda: self._sum(step, centre, guided), effective, weight, predictions[key], centre
        )

    def _key_for_hooks(self, step: Step) -> str:
        """What a hook may evaluate again: the heaviest term on the sampled model, else the unconditional."""
        on_base = [term for term in (step.around if self._is_single(step) else step.acting) if self._on_base(term)]
        if not on_base:
            return BASE
        return self.keys[max(on_base, key=lambda term: abs(term.weight)).index]

    def _record(
        self,
        step: Step,
        predictions: Predictions,
        guided: Sequence[tuple[Tensor, ActiveTerm]],
        x: Tensor,
        sigma: Tensor,
        denoised: Tensor,
    ) -> None:
        if self.recorder is None:
            return
        centre = None if step.centre is None else predictions[step.centre]
        shown = dict(predictions)
        for (prediction, _), term in zip(guided, step.around, strict=True):
            if self._has_rule(term) and term.weight and centre is not None:  # so that w (D - D_0) is its pull
                shown[self.keys[term.index]] = centre + (prediction - centre) / term.weight
        outputs = [shown[self.keys[term.index]] for term in step.acting]
        self.recorder.record(
            x, sigma, centre if step.centre == BASE and BASE not in self.keys else None, outputs, step.acting, denoised
        )


def ranged(conds: dict[str, list[dict]]) -> set[str]:
    """The keys of conditionings that are limited to a part of the sampling."""
    limits = ("start_percent", "end_percent", "clip_start_percent", "timestep_start", "timestep_end")
    return {key for key, entries in conds.items() if any(name in entry for entry in entries for name in limits)}
