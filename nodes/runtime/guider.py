"""The guider: ComfyUI's own sampling, with the guidance sum in place of classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
from torch import Tensor, zeros_like

from ...gcfg.combine import combine, effective_cond, pivot_index
from ...gcfg.diagnostics import Recorder
from ...gcfg.errors import GuidanceError
from ...gcfg.plan import ActiveTerm, GuidancePlan, needs_base
from ...gcfg.reuse import DeltaCache, Member
from ...gcfg.steps import Steps
from ...gcfg.terms import GuidanceTerm
from . import checks, versions
from .cond_keys import cond_keys, first_named
from .lanes import BASE, Lane, build_lanes, covers, has_range, holds_image, load_lanes, predict_all
from .live import Watch

_CFG_HOOKS = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")


class GCFGGuider(comfy.samplers.CFGGuider):
    """Guider that sums weighted deltas of several models around one unconditional model.

        denoised = D_0 + sum_i w_i (D_i - D_0)          # GCFG, Cao et al. 2023, Eq. 3

    `sample()` and everything around it stay ComfyUI's; only `inner_sample` (where the further models are prepared) and
    `predict_noise` (where they are evaluated) are ours.

    Raises:
        GuidanceError: if there is no term, or a term's model or conditioning cannot be combined with the others.
    """

    # Of one run, set while it is on.
    conds: dict[str, list[dict]]
    lanes: list[Lane]
    step_plan: GuidancePlan
    ranged: set[str]
    recorder: Recorder | None
    steps: Steps
    cache: DeltaCache | None

    def __init__(
        self,
        model_patcher: Any,
        unconditional: Any,
        terms: Sequence[GuidanceTerm],
        node: str,
        watch: Watch | None = None,
    ) -> None:
        super().__init__(model_patcher)
        if not terms:
            raise GuidanceError(
                f"{node}: no guidance term is connected, expected at least one; connect the terms output of a "
                f"Guidance Term node to term_1."
            )
        sampling = model_patcher.get_model_object("model_sampling")
        self.node = node
        self.watch = Watch() if watch is None else watch
        self.plan = GuidancePlan.schedule(terms, sampling.percent_to_sigma)
        self.cfg = sum(term.weight_at(term.start_percent) for term in terms)
        checks.check_run(node, model_patcher, unconditional, self.plan)
        conds = [unconditional if term.conditioning is None else term.conditioning for term in terms]
        self.keys = cond_keys(conds)
        self.inner_set_conds({**dict(zip(self.keys, conds, strict=True)), BASE: unconditional})

    def set_conds(self, positive: Any, negative: Any) -> None:
        """Ignored: the terms bring the conditionings. Some samplers set them on every guider they are given."""

    def set_cfg(self, cfg: float) -> None:
        """Ignored: the terms bring the weights."""

    def sample(self, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any) -> Any:
        """Stock sampling, which leaves every model as it found it even when it fails or is interrupted."""
        if sigmas.shape[-1] == 0:
            return latent_image
        checks.check_latent(self.node, self.model_patcher, latent_image)
        levels = sigmas.tolist()
        used = self._used(levels)
        try:
            self._build_lanes(used)
            self.recorder = self.watch.recorder(levels, [term.label for term in self.plan.terms])
            self.steps = Steps(levels)
            self.cache = self.new_cache()
            return super().sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
        except BaseException:
            # Stock sampling cleans ControlNets only after a good run.
            comfy.sampler_helpers.cleanup_models(getattr(self, "conds", {}), getattr(self, "loaded_models", []))
            raise
        finally:
            self.watch.end(self.__dict__.get("recorder"))
            for name in (
                "lanes",
                "conds",
                "ranged",
                "step_plan",
                "recorder",
                "steps",
                "cache",
                "inner_model",
                "loaded_models",
            ):
                self.__dict__.pop(name, None)

    def _call_shape(self, noise: Tensor) -> Sequence[int]:
        return noise.shape  # of the largest batch of latents that one call evaluates

    def _used(self, sigmas: Sequence[float]) -> list[int]:
        """The terms that can act in this run; says which never do."""
        *steps, last = sigmas
        steps = steps or [last]
        checks.warn_idle(self.plan.idle(steps))
        return list(self.plan.used([*steps, last]))

    def _build_lanes(self, used: Sequence[int]) -> None:
        keys = [self.keys[index] for index in used]
        conds = {key: self.original_conds[key] for key in [*keys, BASE]}
        base = self.model_patcher
        models = [self.plan.terms[index].term.model for index in used]
        models = [base if model is None else versions.without_dynamic_hooks(model, conds) for model in models]
        self.lanes = build_lanes(base, models, keys, versions.has_weight_hooks(conds))
        checks.warn_ignored_hooks(self.lanes, _CFG_HOOKS)

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
        """Prepare every further model, then run stock sampling; put everything back whatever happens."""
        base, *others = self.lanes
        conds = self.conds
        self.step_plan = self.plan.with_masks_at((noise.shape[-2], noise.shape[-1]), noise.device)
        shifted = self.inner_model.process_latent_in(latent_image) if holds_image(latent_image) else latent_image
        started: list[Lane] = []
        try:
            for lane in self.lanes:  # the unconditional one last, the order in which stock code spreads areas
                lane.conds = {key: conds[key] for key in sorted(lane.keys, key=lambda key: key == BASE)}
            for lane in others:
                started.append(lane)
                lane.options = versions.prepare_options(lane.patcher, lane.conds, sigmas, device)
            shape = self._call_shape(noise)
            if others or shape != noise.shape:
                load_lanes(self.lanes, shape, self.loaded_models)
            for lane in others:
                versions.start_run(lane.patcher)
                processed = comfy.samplers.process_conds(
                    lane.patcher.model, noise, first_named(lane), device, shifted, denoise_mask, seed, **kwargs
                )
                lane.conds = dict(zip(lane.keys, processed.values(), strict=True))
            versions.activate(base.patcher)
            self.conds = base.conds  # stock code processes these
            return super().inner_sample(
                noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs
            )
        finally:
            self.conds = {**conds, **self._all_conds()}
            for lane in reversed(started):
                versions.end_run(lane.patcher, lane.options)
            versions.activate(base.patcher)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: Any = None) -> Tensor:
        """The guided denoised prediction at one noise level.

        Args:
            x: noisy latent, (B, C, *spatial).
            timestep: sigma, (B,).
            model_options: the sampled model's options at this step.
            seed: unused here, part of ComfyUI's signature.
        """
        options = model_options or {}
        terms, wanted = self.wanted(self.step_plan, self.cache, timestep, options)
        predictions = predict_all(self.lanes, {key: x for key in wanted}, timestep, options)
        return self.guided(predictions, self.cache, terms, x, timestep, options)

    def new_cache(self) -> DeltaCache | None:
        """An empty cache of deltas, where any term's may be carried on."""
        return DeltaCache(self.steps) if self.plan.reuses else None

    def wanted(
        self, plan: GuidancePlan, cache: DeltaCache | None, timestep: Tensor, options: dict
    ) -> tuple[tuple[ActiveTerm, ...], list[str]]:
        """The terms that act at this noise level, and the keys of the predictions to evaluate for them."""
        if "ranged" not in vars(self):  # the first evaluation: stock code has just processed the base's conditionings
            self.conds = self.lanes[0].conds = {**self._all_conds(), **self.conds}
            self.ranged = {key for key, conds in self.conds.items() if has_range(conds)}
        terms = self._active(plan, timestep)
        with_base = (
            not terms
            or needs_base(terms)
            or options.get("disable_cfg1_optimization", False)
            or (_hooked(options) and len(terms) > 1)
        )
        if with_base and BASE in self.ranged:
            checks.check_base_covers(self.node, self.conds[BASE], float(timestep[0]))
        if cache is None:
            return terms, [self.keys[term.index] for term in terms] + ([BASE] if with_base else [])
        centre = BASE if with_base else self.keys[terms[pivot_index(terms)].index]
        sigma = float(timestep[0])
        members = [self._member(plan, term, sigma) for term in terms if self.keys[term.index] != centre]
        return terms, cache.wanted(centre, members, sigma)

    def _member(self, plan: GuidancePlan, term: ActiveTerm, sigma: float) -> Member:
        scheduled, key = plan.terms[term.index], self.keys[term.index]
        apart = key not in self.lanes[0].keys
        return Member(key, term.weight, scheduled.term.reuse, scheduled.reuses_at(sigma), apart)

    def guided(
        self,
        predictions: dict[str, Tensor],
        cache: DeltaCache | None,
        terms: Sequence[ActiveTerm],
        x: Tensor,
        sigma: Tensor,
        options: dict,
    ) -> Tensor:
        """The guidance sum of one evaluation, through the model's guidance hooks if it has any."""
        if cache is not None:
            predictions = cache.complete(predictions)
        base = predictions.get(BASE)
        outputs = [predictions[self.keys[term.index]] for term in terms]
        if _hooked(options):
            denoised = self._through_hooks(base, outputs, terms, x, sigma, options)
        else:
            denoised = combine(base, outputs, terms) if terms else predictions[BASE]
        if self.recorder is not None:
            self.recorder.record(x, sigma, base, outputs, terms, denoised)
        return denoised

    def _through_hooks(
        self,
        base: Tensor | None,
        outputs: list[Tensor],
        terms: Sequence[ActiveTerm],
        x: Tensor,
        sigma: Tensor,
        options: dict,
    ) -> Tensor:
        """The same sum as stock guidance of one effective conditional prediction, so that cfg hooks apply to it."""
        model = self.inner_model
        uncond = self.conds[BASE] if base is not None else None
        base = zeros_like(x) if base is None else base  # what stock hooks are given at a scale of 1
        cond_denoised, scale = effective_cond(base, outputs, terms)
        cond = self._cond_for_hooks(terms)
        out = [cond_denoised, base]
        for hook in options.get("sampler_pre_cfg_function", []):
            out = hook(
                {
                    "conds": [cond, uncond],
                    "conds_out": out,
                    "cond_scale": scale,
                    "timestep": sigma,
                    "input": x,
                    "sigma": sigma,
                    "model": model,
                    "model_options": options,
                }
            )
        return comfy.samplers.cfg_function(
            model, out[0], out[1], scale, x, sigma, model_options=options, cond=cond, uncond=uncond
        )

    def _cond_for_hooks(self, terms: Sequence[ActiveTerm]) -> list[dict]:
        """The conditioning that a hook may evaluate again: the heaviest term's that runs on the sampled model."""
        on_base = [term for term in terms if self.keys[term.index] in self.lanes[0].keys]
        if not on_base:
            return self.conds[BASE]
        return self.conds[self.keys[max(on_base, key=lambda term: abs(term.weight)).index]]

    def _active(self, plan: GuidancePlan, timestep: Tensor) -> tuple[ActiveTerm, ...]:
        """The terms of this step; one whose conditioning has no part in it would predict zeros, so it is left out."""
        if not self.ranged and not plan.needs_sigma:
            return plan.active(0.0)  # no host synchronisation where no weight depends on sigma
        sigma = float(timestep[0])

        def takes_part(key: str) -> bool:
            return key in self.conds and (key not in self.ranged or covers(self.conds[key], sigma))

        return tuple(term for term in plan.active(sigma) if takes_part(self.keys[term.index]))

    def _all_conds(self) -> dict[str, list[dict]]:
        return {key: conds for lane in self.lanes for key, conds in lane.conds.items()}


def _hooked(options: dict) -> bool:
    return any(name in options for name in _CFG_HOOKS)
