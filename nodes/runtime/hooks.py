"""Guidance hooks: what stock guidance nodes and packs put between two predictions and their combination.

ComfyUI keeps them in a model's options: `sampler_pre_cfg_function` changes the predictions, `sampler_cfg_function`
replaces their combination, `sampler_post_cfg_function` changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.samplers
from torch import Tensor, zeros_like

_PRE, _CFG, _POST = "sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function"
_NAMES = (_PRE, _CFG, _POST, "disable_cfg1_optimization")


@dataclass(frozen=True, eq=False)
class Situation:
    """What hooks are told beside the predictions.

    Attributes:
        model: the module that evaluates `cond` and `uncond`.
        options: the model's options, hooks included.
        x: noisy latent, (B, C, *spatial).
        sigma: (B,).
        cond: the conditioning of the conditional prediction, as the model processed it.
        uncond: that of the unconditional one, or None where it is not evaluated.
    """

    model: Any
    options: dict[str, Any]
    x: Tensor
    sigma: Tensor
    cond: list[dict] | None
    uncond: list[dict] | None


def hooks_in(options: dict[str, Any]) -> dict[str, Any]:
    """The guidance hooks among a model's options, with the option that asks for the unconditional at a scale of 1."""
    return {name: options[name] for name in _NAMES if options.get(name)}


def hooks_beyond(own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    """The guidance hooks among a model's options that another's do not have; None where there are none.

    A node in front of a branch puts its hook on both models, and acts once, on the sampler's.
    """
    found = dict(hooks_in(own))
    for name, theirs in hooks_in(other).items():
        if isinstance(theirs, list):
            found[name] = [hook for hook in found.get(name, []) if not any(hook is known for known in theirs)]
        elif name == _CFG and found.get(name) is theirs:
            del found[name]
    return found if has_hooks(found) else None


def same_hooks(a: dict[str, Any] | None, b: dict[str, Any] | None) -> bool:
    """Whether two sets of hooks are the very same objects in the same order."""
    if a is None or b is None:
        return a is b
    return all(_ids(a.get(name)) == _ids(b.get(name)) for name in (_PRE, _CFG, _POST))


def _ids(hook: Any) -> list[int]:
    return [id(one) for one in (hook if isinstance(hook, list) else [hook])]


def without_hooks(options: dict[str, Any]) -> dict[str, Any]:
    """A model's options as an evaluation sees them."""
    return {name: value for name, value in options.items() if name not in _NAMES}


def has_hooks(options: dict[str, Any]) -> bool:
    """Whether anything stands between the predictions and their sum."""
    return any(options.get(name) for name in (_PRE, _CFG, _POST))


def guided(at: Situation, cond: Tensor, uncond: Tensor | None, scale: float) -> Tensor:
    """Stock guidance of two predictions through all hooks, H(D_uncond, D_cond, scale).

    Args:
        at: what the hooks are told.
        cond: conditional prediction, (B, C, *spatial).
        uncond: unconditional prediction, or None where stock guidance does not evaluate it.
        scale: the guidance weight.
    """
    out = _before(at, [cond, _or_zeros(uncond, cond)], scale)
    return _combined(at, out, scale)


def guided_sum(
    at: Situation,
    total: Callable[[], Tensor],
    effective: Callable[[], tuple[Tensor, float]],
    scale: float,
    cond: Tensor,
    uncond: Tensor | None,
) -> Tensor:
    """The sum of many guidances through the hooks of the sampler's model.

    Hooks that replace the combination get one effective pair; those that come after get the sum, and with `at.cond` the
    prediction that belongs to it, so that one which evaluates it again finds the difference that it made itself.

    Args:
        at: what the hooks are told.
        total: the sum without hooks.
        effective: the conditional prediction and the scale that stand for all terms.
        scale: the sum of the weights.
        cond: the prediction of `at.cond`.
        uncond: the prediction that deltas are measured from, or None.
    """
    uncond = _or_zeros(uncond, cond)
    if at.options.get(_PRE) or at.options.get(_CFG):
        pair, scale = effective()
        out = _before(at, [pair, uncond], scale)
        uncond = out[1]
        with _without_post(at.options):
            denoised = _combined(at, out, scale)
    else:
        denoised = total()
    for hook in at.options.get(_POST, []):
        denoised = hook(
            {
                "denoised": denoised,
                "cond": at.cond,
                "uncond": at.uncond,
                "cond_scale": scale,
                "model": at.model,
                "uncond_denoised": uncond,
                "cond_denoised": cond,
                "sigma": at.sigma,
                "model_options": at.options,
                "input": at.x,
            }
        )
    return denoised


def watched(options: dict[str, Any], look: Callable[[Tensor, Tensor], None]) -> dict[str, Any]:
    """Options under which stock guidance shows its two predictions (conditional, unconditional).

    They are shown before any hook and, where a version has none before the combination, after it; the first counts.
    """

    def before(args: dict[str, Any]) -> list[Tensor]:
        look(*(prediction.clone() for prediction in args["conds_out"][:2]))  # hooks may write into them
        out: list[Tensor] = args["conds_out"]
        return out

    def after(args: dict[str, Any]) -> Tensor:  # where there are no hooks before the combination
        look(args["cond_denoised"], args["uncond_denoised"])
        denoised: Tensor = args["denoised"]
        return denoised

    return {**options, _PRE: [before, *options.get(_PRE, [])], _POST: [after, *options.get(_POST, [])]}


def taking(options: dict[str, Any], take: Callable[[Tensor, Tensor], None]) -> dict[str, Any]:
    """Options under which stock guidance hands its two predictions over, and no hook acts."""

    def combine(args: dict[str, Any]) -> Tensor:
        take(args["cond_denoised"], args["uncond_denoised"])
        noise: Tensor = args["cond"]
        return noise

    return {**without_hooks(options), _CFG: combine}


def _before(at: Situation, out: list[Tensor], scale: float) -> list[Tensor]:
    for hook in at.options.get(_PRE, []):
        out = hook(
            {
                "conds": [at.cond, at.uncond],
                "conds_out": out,
                "cond_scale": scale,
                "timestep": at.sigma,
                "input": at.x,
                "sigma": at.sigma,
                "model": at.model,
                "model_options": at.options,
            }
        )
    return out


def _combined(at: Situation, out: list[Tensor], scale: float) -> Tensor:
    denoised: Tensor = comfy.samplers.cfg_function(
        at.model, out[0], out[1], scale, at.x, at.sigma, model_options=at.options, cond=at.cond, uncond=at.uncond
    )
    return denoised


@contextmanager
def _without_post(options: dict[str, Any]) -> Iterator[None]:
    """Take the hooks that come after the combination out for a moment; the dict stays the one that hooks write into."""
    post = options.pop(_POST, None)
    try:
        yield
    finally:
        if post is not None:
            options[_POST] = post


def _or_zeros(uncond: Tensor | None, like: Tensor) -> Tensor:
    return zeros_like(like) if uncond is None else uncond  # what stock hooks are given at a scale of 1
