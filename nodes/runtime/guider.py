"""The guider: ComfyUI's own sampling, with the guidance sum in place of classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
from torch import Tensor

from ...gcfg.plan import GuidancePlan
from ...gcfg.steps import Steps
from ...gcfg.terms import GuidanceTerm, looked_at
from . import checks, failures, further, latents, placing, versions, wrapping
from .clones import separate
from .index import wants_uncond
from .keys import Group, first_named, grouped, keyed, lasting_pair, measured_from_base, ranged, sources, spreading
from .lanes import BASE, FIRST, PREDICT, Lane
from .live import Watch
from .loading import load_lanes
from .run import Run
from .term_guider import TermGuider, Weight
from .words import Words

_OF_STOCK_RUN = ("conds", "inner_model", "loaded_models")  # which stock sampling lets go of after a good run only


class GCFGGuider(comfy.samplers.CFGGuider):
    """Guider that sums weighted deltas of several models around one unconditional model.

        denoised = D_0 + sum_i w_i (D_i - R_i),   R_i = D_0 unless given        # GCFG, Cao et al. 2023, Eq. 3

    Sampling and everything around it stay ComfyUI's; ours are `inner_sample`, where the further models are prepared,
    and `predict_noise`, where they are evaluated.

    Args:
        model_patcher: the unconditional model.
        unconditional: its conditioning.
        terms: the terms.
        words: what messages call its parts, or the name of a GCFG sampler.
        watch: who looks at its runs.
        cfg_of: the place of the term whose weight is a sampler's cfg, which wrappers may set; None where the terms are
            all that is summed.
        positive: a sampler's own positive conditioning, whose boxes and ControlNet are the terms' too, as stock
            guidance spreads them; None where the first term that has any is that positive.

    Raises:
        GuidanceError: if there is no term, or a term's model or conditioning cannot be combined with the others.
    """

    run: Run  # while one is on
    quiet = False  # whether another one speaks in the log for it
    around: Sequence[Any] = ()  # wrappers of its model that stand around the run of another guider, which it is within
    original_conds: dict[str, list[dict]]

    def __init__(
        self,
        model_patcher: Any,
        unconditional: Any,
        terms: Sequence[GuidanceTerm],
        words: Words | str,
        watch: Watch | None = None,
        cfg_of: int | None = None,
        positive: Any = None,
    ) -> None:
        super().__init__(model_patcher)
        self.words = words = Words(words) if isinstance(words, str) else words
        self.node = node = words.node
        checks.check_terms(node, terms)
        sampling = model_patcher.get_model_object("model_sampling")
        self.watch = Watch() if watch is None else watch
        plan = GuidancePlan.schedule(terms, sampling.percent_to_sigma)
        checks.check_run(words, model_patcher, unconditional, plan, positive)
        terms = measured_from_base(model_patcher, unconditional, terms)
        self.plan = GuidancePlan.schedule(terms, sampling.percent_to_sigma)
        self.cfg = Weight(sum(term.weight_at(term.start_percent) for term in terms if not term.relative))
        self.sources, self.references = sources(model_patcher, unconditional, self.plan)
        self.looked_at = looked_at(terms)
        self.groups = grouped(model_patcher, self.sources)
        self.rules = self._rules()
        self.cfg_of = cfg_of
        two = None
        if cfg_of is None or not versions.has_wrappers(PREDICT, model_patcher):  # which may set one weight of the two
            two = lasting_pair([place for place in self.groups[0].places if place not in self.rules], terms)
        self.positive = positive
        if positive is not None and two is not None and two[0] != cfg_of:
            two = None  # that name is the sampler's own positive's
        of_stock = cfg_of if two is None else two[0]
        if of_stock is not None:
            self.cfg = Weight(terms[of_stock].weight)
        first = spreading(self.groups[0], unconditional, self.sources) if positive is None else cfg_of
        self.keys = keyed(self.groups, unconditional, self.sources, two, first)
        self.unconditional = unconditional
        # Stock code sees the sampled model's own conditionings, under the names that it knows.
        own: dict[str, Any] = {}
        for place in self.groups[0].places:
            own.setdefault(self.keys[place], self._conditioning(place))
        self.inner_set_conds({FIRST: unconditional if positive is None else positive, BASE: unconditional, **own})
        self.every_cond: dict[str, list[dict]] = self.original_conds

    def set_conds(self, positive: Any, negative: Any) -> None:
        """Ignored: the terms bring the conditionings. Some samplers set them on every guider they are given."""

    def set_cfg(self, cfg: float) -> None:
        """Ignored: the terms bring the weights."""

    def sample(self, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any) -> Any:
        """Stock sampling, which leaves every model as it found it even when it fails or is interrupted."""
        if sigmas.shape[-1] == 0:
            return latent_image
        checks.check_latent(self.words, self.model_patcher, latent_image)
        warned = self.quiet or checks.warn_not_finite(self.node, latent_image)
        recorder = None
        try:
            self.run = self._begun(sigmas.tolist(), self.plan.fitted(latents.latent_shapes(latent_image)))
            recorder = self.run.recorder
            samples = super().sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
            if not warned:
                checks.warn_not_finite(self.node, samples, True, recorder)
            return samples
        except BaseException as error:
            # Stock sampling cleans ControlNets only after a good run.
            comfy.sampler_helpers.cleanup_models(getattr(self, "conds", {}), getattr(self, "loaded_models", []))
            own = {self.words.base: self.unconditional, self.words.positive: self.positive}
            why = failures.explained(self.words, error, self.model_patcher, latent_image, own, self.plan)
            if why is not None:
                raise why from error
            raise
        finally:
            self.watch.end(recorder)
            for name in ("run", *_OF_STOCK_RUN):
                self.__dict__.pop(name, None)

    def inner_sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        device: Any,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Any,
        callback: Any,
        disable_pbar: bool,
        seed: int,
        **kwargs: Any,
    ) -> Tensor:
        """Prepare every further model, run stock sampling inside their wrappers, and put everything back."""
        run = self.run
        base, *others = run.lanes
        base.functions = placing.functions_in_place()
        run.plan = run.plan.fitted(kwargs.get("latent_shapes") or [noise.shape], noise.device)
        stock = super().inner_sample

        def around_run(lane: Lane) -> dict[str, Any]:
            return {
                "noise": noise,
                "latent_image": latent_image,
                "sampler": sampler,
                "sigmas": sigmas,
                "denoise_mask": denoise_mask,
                "disable_pbar": disable_pbar,
                "seed": seed,
            }

        def around_sampler(lane: Lane) -> dict[str, Any]:
            given = around_run(lane)
            del given["seed"]
            return {**given, "model_wrap": lane.guider, "extra_args": {"model_options": lane.options, "seed": seed}}

        def prepared(callback: Any) -> Tensor:
            if others:
                load_lanes(run.lanes, noise.shape)
            for lane in others:
                further.begin(lane, noise, latent_image, device, sigmas, denoise_mask, seed, **kwargs)
            return wrapping.within(wrapping.SAMPLER, base, others, around_sampler, callback, sampled, run.outside)

        def sampled(callback: Any) -> Tensor:
            versions.activate(base.patcher)
            run.begin()
            with placing.functions(base.functions):
                return stock(
                    noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs
                )

        with ExitStack() as afterwards:  # each is done, also where another fails
            afterwards.callback(versions.activate, base.patcher)
            for lane in others:
                afterwards.callback(further.end, lane)
                further.prepare(lane, self)
            with placing.functions(run.outside):
                return wrapping.within(
                    wrapping.OUTER, base, others, around_run, callback, prepared, run.outside, **kwargs
                )

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: Any = None) -> Tensor:
        """The guided denoised prediction at one noise level.

        Args:
            x: noisy latent, (B, C, *spatial).
            timestep: sigma, (B,).
            model_options: the sampled model's options at this step.
            seed: of the run.
        """
        # Under a Basic Guider, whose one prompt has no weight, no term's is the cfg that a wrapper sets.
        cfg = None if self.positive is not None and self.cfg_of is None else self.cfg
        return self.run.evaluate(x, timestep, model_options or {}, seed, cfg)

    def __call__(self, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stock's way to a prediction; wrappers on it find in `cfg` the weight of this noise level."""
        if self.plan.steady is None and versions.wrappers(PREDICT, self.model_options):
            self.cfg = Weight(self.run.weight_at(float(timestep[0])))
        prediction: Tensor = super().__call__(x, timestep, *args, **kwargs)
        return prediction

    def _conditioning(self, place: int) -> Any:
        source = self.sources[place]
        if source.weight < 0.0:  # a negative prompt, which the SDXL refiner reads otherwise
            return [[tensor, {"prompt_type": "negative", **options}] for tensor, options in source.conditioning]
        return source.conditioning

    def _rules(self) -> dict[int, dict[str, Any]]:
        """What each term's own model has for guidance, which acts on that term."""
        models = {place: scheduled.term.model for place, scheduled in enumerate(self.plan.terms)}
        options = self.model_patcher.model_options
        found = {
            place: placing.own_guidance(model.model_options, options)
            for place, model in models.items()
            if model is not None
        }
        return {place: rule for place, rule in found.items() if rule is not None}

    def _relative(self) -> list[str]:
        """What each term is measured from, in words: the label of the term that predicts it, where there is one."""
        labels = {self.keys[place]: scheduled.label for place, scheduled in reversed([*enumerate(self.plan.terms)])}

        def said(place: int, term: GuidanceTerm) -> str:
            if not term.relative:
                return ""
            given = [name for name in ("relative_model", "relative_conditioning") if getattr(term, name) is not None]
            return labels.get(self.keys[self.references[place]], " and ".join(given))

        return [said(place, scheduled.term) for place, scheduled in enumerate(self.plan.terms)]

    def _begun(self, levels: Sequence[float], plan: GuidancePlan) -> Run:
        """A run over these noise levels; terms that act at none of them, or nowhere, are not part of it."""
        *steps, last = levels
        if not self.quiet:
            checks.warn_idle(plan.idle(steps or [last]))
            checks.warn_nowhere(plan)
        used = set(plan.used([*(steps or [last]), last]))
        used.update(self.references[place] for place in list(used) if place in self.references)
        if self.cfg_of is not None:  # also at 0: wrappers may set another, and its boxes are the negative's too
            used.add(self.cfg_of)
        own = list(dict.fromkeys(self.keys[place] for place in self.groups[0].places if place in used))
        names = dict.fromkeys([FIRST, *own, BASE])
        self.original_conds = {
            key: self.every_cond[key if key in own or self.positive is not None else BASE] for key in names
        }
        lanes = [Lane(self, [*own, BASE] if BASE not in own else own), *self._further_lanes(used)]
        if not self.quiet:
            checks.warn_caches(lanes)
            checks.warn_many_evaluations(self.node, sum(len(lane.keys) for lane in lanes))
            checks.warn_settings(lanes)
        conds = {**{key: conds for lane in lanes[1:] for key, conds in lane.conds.items()}, **self.original_conds}
        steps_of_run = Steps(levels)
        recorder = self.watch.recorder(levels, [term.label for term in plan.terms], self._relative())
        outside = placing.functions_in_place()
        references = {place: self.keys[other] for place, other in self.references.items()}
        return Run(
            self.words,
            plan,
            self.keys,
            references,
            self.rules,
            lanes,
            steps_of_run,
            outside,
            self.looked_at,
            ranged(conds),
            self.cfg_of,
            recorder,
        )

    def _further_lanes(self, used: set[int]) -> list[Lane]:
        """The lanes of the other models, each with weights of its own where it would share what differs."""
        groups = [(group, [place for place in group.places if place in used]) for group in self.groups[1:]]
        groups = [(group, places) for group, places in groups if places]
        conds = [self._further_conds(group, places) for group, places in groups]
        patchers = [versions.without_dynamic_hooks(g.patcher, c) for (g, _), c in zip(groups, conds, strict=True)]
        in_place = any(map(versions.has_weight_hooks, [self.original_conds, *conds]))
        patchers = separate([self.model_patcher, *patchers], in_place)
        lanes = []
        for patcher, (_, places), entries in zip(patchers[1:], groups, conds, strict=True):
            keys = list(dict.fromkeys(self.keys[place] for place in places))
            guider = TermGuider(patcher, first_named(entries))
            source = self.sources[places[0]]
            guider.cfg = Weight(abs(source.weight) if source.is_reference else source.weight)
            lanes.append(Lane(guider, keys, source.name, dict(zip(entries, guider.conds, strict=True))))
        return lanes

    def _further_conds(self, group: Group, places: Sequence[int]) -> dict[str, list[dict]]:
        """A group's conditionings; with the unconditional where something of its model looks at it."""
        conds: dict[str, list[dict]] = {}
        for place in places:
            conds.setdefault(self.keys[place], comfy.sampler_helpers.convert_cond(self._conditioning(place)))
        looked_at = any(place in self.rules for place in places) or wants_uncond(group.patcher)
        if looked_at or versions.has_run_wrappers(group.patcher):
            conds[BASE] = comfy.sampler_helpers.convert_cond(self.unconditional)
        return conds
