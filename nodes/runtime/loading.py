"""Loading the models of one run with one request, so that none evicts another."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from . import versions
from .lanes import Lane


def load_lanes(lanes: Sequence[Lane], noise_shape: Sequence[int]) -> None:
    """Load every model of the run.

    The lanes are evaluated one after the other, so the activations of the hungriest one are what must fit beside all
    weights.

    Args:
        lanes: all lanes; what stock sampling loaded with the first (ControlNets ...) stays in the request.
        noise_shape: shape of the latent batch.
    """
    others = lanes[1:]
    for lane in others:
        guider = lane.guider
        guider.loaded_models = versions.additional_models(lane.patcher, lane.conds, guider.model_options)
    shapes = [noise_shape, *(_shape_to_sample(lane, noise_shape) for lane in others)]
    estimates = [
        versions.memory_to_sample(lane.patcher, shape, lane.conds) for lane, shape in zip(lanes, shapes, strict=True)
    ]
    owners: list[Any] = []
    further = [model for lane in lanes for model in lane.guider.loaded_models]
    for lane in lanes:
        owner = next((owner for owner in owners if owner.model is lane.patcher.model), None)
        if owner is None:
            owners.append(lane.patcher)
        else:  # clones of equal weights are loaded once; what hangs on the others still has to be moved
            further += versions.move_patches(lane.patcher)
    versions.load_models([*owners, *dict.fromkeys(further)], *(max(column) for column in zip(*estimates, strict=True)))
    for lane in lanes:
        lane.placed_beside(next(owner for owner in owners if owner.model is lane.patcher.model))
    _say_what_does_not_fit(owners)


def _shape_to_sample(lane: Lane, noise_shape: Sequence[int]) -> Sequence[int]:
    """The shape that the lane's model is sampled at, which its wrappers may cut (windows of a video)."""
    shapes: list[Sequence[int]] = []

    def load(model: Any, noise_shape: Sequence[int], conds: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, list]:
        shapes.append(noise_shape)
        return model.model, conds, lane.guider.loaded_models

    prepare = versions.wrapped("prepare_sampling", lane.guider.model_options, load)
    prepare(lane.patcher, noise_shape, lane.conds, model_options=lane.guider.model_options)
    return shapes[-1] if shapes else noise_shape


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
