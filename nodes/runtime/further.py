"""A further model's run: what stock sampling does with its own model before it samples and afterwards."""

from __future__ import annotations

from typing import Any

import comfy.sampler_helpers
import comfy.samplers
from torch import Tensor, count_nonzero

from . import versions
from .lanes import BASE, PREDICT, Lane


def prepare(lane: Lane, base: comfy.samplers.CFGGuider) -> None:
    """Give the lane's model options of this run, with its wrappers and the hooks of its conditionings.

    A node in front of a branch puts one wrapper around both models' predictions, and acts once, on the sampler's.
    """
    lane.guider.model_options = versions.prepare_options(lane.patcher, lane.guider.conds)
    versions.drop_wrappers(PREDICT, lane.guider.model_options, base.model_options)


def begin(
    lane: Lane,
    noise: Tensor,
    latent_image: Tensor,
    device: Any,
    sigmas: Tensor,
    denoise_mask: Any,
    seed: int,
    **kwargs: Any,
) -> None:
    """Process the conditionings of a model that is loaded, and tell its callbacks that sampling begins."""
    guider, patcher = lane.guider, lane.patcher
    versions.options_to_device(patcher, guider.model_options, device)
    with lane.at_work():
        versions.start_run(patcher)
        if "latent_shapes" in kwargs:
            patcher.model.latent_shapes = kwargs["latent_shapes"]
        # Stock code does not shift an empty latent.
        shifted = patcher.model.process_latent_in(latent_image) if count_nonzero(latent_image) > 0 else latent_image

        def processed(conds: dict[str, list[dict]]) -> list[list[dict]]:
            found = comfy.samplers.process_conds(
                patcher.model, noise, conds, device, shifted, denoise_mask, seed, **kwargs
            )
            return list(found.values())

        own = {name: conds for name, conds in guider.conds.items() if name != BASE}
        found = dict(zip(own, processed(own), strict=True))
        if BASE in guider.conds:  # by itself, so that areas do not spread between it and the terms
            (found[BASE],) = processed({BASE: guider.conds[BASE]})
        guider.conds = found
    options = versions.copy_options(guider.model_options)
    if versions.HAS_HOOKS:
        options["transformer_options"]["sample_sigmas"] = sigmas
    lane.options = options


def end(lane: Lane) -> None:
    """Take everything back that `prepare` and `begin` did to a model."""
    guider = lane.guider
    lane.leave()
    try:
        comfy.sampler_helpers.cleanup_models(guider.conds, getattr(guider, "loaded_models", []))
    finally:
        versions.end_run(lane.patcher, guider.model_options)
