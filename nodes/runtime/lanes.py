"""The models of one run: which terms are evaluated together, and with what.

A lane is a set of predictions that use the same weights and options, so that one call can batch them. The first lane is
that of the unconditional model; stock sampling prepares it, the others are prepared here, each with its own options,
hooks and conditionings.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import torch
from torch import Tensor

from . import versions
from .clones import same_options, same_weights, separate
from .sharing import share_equal

BASE = "negative"  # the names that previews and other packs read from a guider
FIRST = "positive"


@dataclass(eq=False)
class Lane:
    """Predictions of one model with one set of options.

    Attributes:
        patcher: the model.
        keys: the names of its conditionings, in the order of the terms; `BASE` is the unconditional one.
        conds: its processed conditionings by key, filled while a run is on.
        options: its model options for this run.
    """

    patcher: Any
    keys: list[str] = field(default_factory=list)
    conds: dict[str, list[dict]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def takes(self, patcher: Any) -> bool:
        """Whether a prediction of that model may share this lane's calls."""
        return patcher is self.patcher or (same_weights(patcher, self.patcher) and same_options(patcher, self.patcher))


def build_lanes(base: Any, models: Sequence[Any], keys: Sequence[str], in_place: bool) -> list[Lane]:
    """Sort the terms into lanes.

    Args:
        base: the unconditional model.
        models: each term's model.
        keys: each term's conditioning key.
        in_place: whether weight hooks write into weights while sampling.
    """
    patchers = separate([base, *models], in_place)
    share_equal(patchers)
    lanes = [Lane(patchers[0], [BASE])]
    for patcher, key in zip(patchers[1:], keys, strict=True):
        lane = next((lane for lane in lanes if lane.takes(patcher)), None)
        if lane is None:
            lane = Lane(patcher)
            lanes.append(lane)
        lane.keys.append(key)
    return lanes


def load_lanes(lanes: Sequence[Lane], noise_shape: Sequence[int], further: Sequence[Any]) -> None:
    """Load every model of the run with one request, so that none evicts another.

    The lanes are evaluated one after the other, so the activations of the hungriest one are what must fit beside all
    weights.

    Args:
        lanes: all lanes.
        noise_shape: shape of the latent batch.
        further: what stock sampling loaded (ControlNets ...), kept in the same request.
    """
    estimates = [versions.memory_to_sample(lane.patcher, noise_shape, lane.conds) for lane in lanes]
    owners: list[Any] = []
    patch_models: list[Any] = []
    for lane in lanes:
        if all(owner.model is not lane.patcher.model for owner in owners):
            owners.append(lane.patcher)
        else:  # clones of equal weights are loaded once; what hangs on the others still has to be moved
            patch_models += versions.move_patches(lane.patcher)
    versions.load_models([*owners, *patch_models, *further], *(max(column) for column in zip(*estimates, strict=True)))
    _say_what_does_not_fit(owners)


def _say_what_does_not_fit(patchers: Sequence[Any]) -> None:
    """One line where ComfyUI could not load all weights, since that makes every step slower."""
    needed = sum(patcher.model_size() for patcher in patchers)
    left = sum(map(versions.left_in_ram, patchers))
    if left:
        logging.warning(
            "GCFG: this run's models (%d) take %s, of which %s fit in free memory: ComfyUI keeps %s in RAM and "
            "copies it to the device at every step, which gives the same image slowly; for speed load terms with "
            "an fp8 weight_dtype (where Load Concept UNet offers it), use fewer models, or make a smaller image.",
            len(patchers),
            *(_size(size) for size in (needed, needed - left, left)),
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def predict_all(lanes: Sequence[Lane], wanted: dict[str, Tensor], sigma: Tensor, options: dict) -> dict[str, Tensor]:
    """Denoised predictions at one noise level, each conditioning's at its own latents.

    Args:
        lanes: all lanes, the unconditional model's first.
        wanted: noisy latents (B, C, *spatial) by key; keys of one tensor are evaluated together.
        sigma: (1,) or more, all equal.
        options: the sampled model's options at this step.

    Returns:
        A prediction per key, of its latents' shape.
    """
    predictions: dict[str, Tensor] = {}
    for lane in reversed(lanes):  # the base last: hooks that evaluate the model again find it active
        versions.activate(lane.patcher)
        keys = [key for key in lane.keys if key in wanted]
        for x in {id(wanted[key]): wanted[key] for key in keys}.values():
            together = [key for key in keys if wanted[key] is x]
            sigmas = sigma if len(sigma) == len(x) else sigma[:1].expand(len(x))
            lane_options = options if lane is lanes[0] else lane.options
            predictions.update(_predict(lane, together, x, sigmas, lane_options))
    return predictions


def _predict(lane: Lane, keys: Sequence[str], x: Tensor, sigma: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """Denoised predictions of some of a lane's conditionings, in as few calls as its options allow."""
    terms = [key for key in keys if key != BASE]
    base = lane.conds[BASE] if BASE in keys else None
    calls = [terms] if _batchable(lane, terms, options) else [[term] for term in terms]
    predictions: dict[str, Tensor] = {}
    for number, call in enumerate(calls or [[]]):
        # Stock order: conditional first, unconditional second; further terms follow.
        conds = [lane.conds[call[0]] if call else None, base if number == 0 else None]
        conds += [lane.conds[key] for key in call[1:]]
        out = _calc(lane.patcher.model, conds, x, sigma, options)
        if number == 0 and base is not None:
            predictions[BASE] = out[1]
        predictions.update(zip(call, [out[0], *out[2:]], strict=False))
    return predictions


def _batchable(lane: Lane, terms: Sequence[str], options: dict[str, Any]) -> bool:
    """ControlNets and replaced batch functions see the index of a conditioning and know only cond and uncond."""
    if "sampler_calc_cond_batch_function" in options:
        return False
    return len(terms) < 2 or not any("control" in entry for term in terms for entry in lane.conds[term])


def _calc(model: Any, conds: list[Any], x: Tensor, sigma: Tensor, options: dict[str, Any]) -> list[Any]:
    if "sampler_calc_cond_batch_function" in options:
        args = {"conds": conds, "input": x, "sigma": sigma, "model": model, "model_options": options}
        return list(options["sampler_calc_cond_batch_function"](args))
    if len(conds) == 2:
        return list(comfy.samplers.calc_cond_batch(model, conds, x, sigma, options))
    # Without the unconditional its place stays out: stock code would make tensors for it.
    places = [place for place, cond in enumerate(conds) if cond is not None]
    wanted = [conds[place] for place in places]
    out = comfy.samplers.calc_cond_batch(model, wanted, x, sigma, _with_stock_indices(options, places))
    found = dict(zip(places, out, strict=True))
    return [found.get(place) for place in range(len(conds))]


def _with_stock_indices(options: dict[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """Options under which patches see only the indices they know: 0 for every term, 1 for the unconditional."""
    previous = options.get("model_function_wrapper")

    def call(apply_model: Any, args: dict[str, Any]) -> Tensor:
        indices = [1 if places[index] == 1 else 0 for index in args["cond_or_uncond"]]
        args["cond_or_uncond"] = indices
        args["c"]["transformer_options"]["cond_or_uncond"] = indices[:]
        if previous is not None:
            return previous(apply_model, args)
        return apply_model(args["input"], args["timestep"], **args["c"])

    return {**options, "model_function_wrapper": call}


def covers(conds: Sequence[dict], sigma: float) -> bool:
    """Whether any of these processed conditionings acts at `sigma`; outside its range a prediction is all zeros."""
    return any(
        not (
            ("timestep_start" in cond and sigma > float(cond["timestep_start"]))
            or ("timestep_end" in cond and sigma < float(cond["timestep_end"]))
        )
        for cond in conds
    )


def has_range(conds: Sequence[dict]) -> bool:
    """Whether any conditioning is limited to a part of the sampling."""
    return any("timestep_start" in cond or "timestep_end" in cond for cond in conds)


def holds_image(latent: Tensor | None) -> bool:
    """Whether a latent is more than zeros (stock sampling does not shift an empty one)."""
    return latent is not None and bool(torch.count_nonzero(latent) > 0)
