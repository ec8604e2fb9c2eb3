"""What stands in a shared place for the time of one model's evaluations only.

Clones share a module, and all models share ComfyUI's functions. So what belongs to one clone (another `model_sampling`,
a function in a method's place) or to one model's run (a sampling function that a pack puts in) is put in place around
each of its evaluations, and what stood there before comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.samplers
import comfy.utils
import torch
from torch import Tensor, nn

from . import hooks
from .clones import identical, object_patches_in_place

# What packs replace in `comfy.samplers` while one of their models is sampled.
_REPLACED = ("sampling_function", "calc_cond_batch")

Functions = dict[str, Callable[..., Any]]


def functions_in_place() -> Functions:
    """ComfyUI's sampling functions as they stand now."""
    return {name: getattr(comfy.samplers, name) for name in _REPLACED}


@contextmanager
def functions(put: Functions) -> Iterator[None]:
    """Have these sampling functions stand in `comfy.samplers` within the block."""
    before = functions_in_place()
    try:
        vars(comfy.samplers).update(put)
        yield
    finally:
        vars(comfy.samplers).update(before)


def is_replaced(function: Callable[..., Any]) -> bool:
    """Whether a pack's function stands in the place of ComfyUI's."""
    code = getattr(function, "__code__", None)  # a function's name may be copied from what it stands around
    return code is None or code.co_filename != comfy.samplers.__file__


def own_guidance(own: dict[str, Any], base: dict[str, Any]) -> dict[str, Any] | None:
    """The guidance hooks among a model's options that the sampler's model does not have; None where nothing is own.

    A pack that has put its function in ComfyUI's place for good reads settings of its own among the options.
    """
    found = hooks.hooks_beyond(own, base)
    if found is None and is_replaced(comfy.samplers.sampling_function):
        return {} if own_settings(own, base) else None
    return found


def own_settings(own: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """The names of settings among a model's options that the sampler's model has not, or has otherwise."""
    known = {"transformer_options", "model_function_wrapper", "sampler_calc_cond_batch_function"}
    plain = {name: value for name, value in hooks.without_hooks(own).items() if name not in known}
    return [name for name, value in plain.items() if name not in base or not identical(value, base[name])]


def guided_by_sampling_function(at: hooks.Situation, cond: Tensor, uncond: Tensor | None, scale: float) -> Tensor:
    """Guidance of two predictions that are made already, by the sampling function that stands in ComfyUI's place.

    Args:
        at: what hooks are told.
        cond: conditional prediction, (B, C, *spatial).
        uncond: unconditional prediction, or None where it is not evaluated.
        scale: the guidance weight.
    """
    made = [[cond, torch.zeros_like(cond) if uncond is None else uncond]]
    evaluate = comfy.samplers.calc_cond_batch

    def calc_cond_batch(model: Any, conds: Any, *args: Any, **kwargs: Any) -> Any:
        # The first question is for the two; a hook's own evaluations follow.
        return made.pop() if made and len(conds) == 2 else evaluate(model, conds, *args, **kwargs)

    with functions({"calc_cond_batch": calc_cond_batch}):
        denoised: Tensor = comfy.samplers.sampling_function(
            at.model, at.x, at.sigma, at.uncond, at.cond, scale, model_options=at.options, seed=None
        )
    return denoised


def object_patches_beside(owner: Any, patcher: Any) -> dict[str, Any]:
    """What a clone's evaluations see on the module that was loaded for another one, where that differs.

    Args:
        owner: the patcher that is loaded.
        patcher: a clone of the same weights.
    """
    theirs, own = object_patches_in_place(owner), object_patches_in_place(patcher)
    keys = [key for key in {**theirs, **own} if theirs.get(key) is not own.get(key)]
    return {key: own[key] if key in own else owner.object_patches_backup[key] for key in keys}


@contextmanager
def placed(put: Functions, model: nn.Module, beside: dict[str, Any]) -> Iterator[None]:
    """Have these sampling functions stand in `comfy.samplers`, and these attributes on a model, within the block."""
    before: list[tuple[str, Any]] = []
    with functions(put):
        try:
            for key, value in beside.items():
                before.append((key, comfy.utils.set_attr(model, key, value)))
            yield
        finally:
            for key, value in reversed(before):
                comfy.utils.set_attr(model, key, value)
