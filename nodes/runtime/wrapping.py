"""A further model's own wrappers, run around the sampling as stock sampling runs them around its own.

Packs hang their work on wrappers: they prepare a cache, exchange a model's options, put their functions into ComfyUI,
and take all back afterwards. A run samples once, so every further model's wrappers stand around that one sampling, one
model's inside another's. What a wrapper changes of its own model holds; what it changes of the sampling itself (noise,
latent, sigmas) only the sampler's model can, and is said.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import placing, versions
from .clones import called, identical
from .lanes import Lane

OUTER, SAMPLER = "outer_sample", "sampler_sample"  # kinds of wrappers: around a run, around the sampler in it
TERMS = "gcfg_model"  # the name of GCFG Model's own among the former
# The arguments that stock sampling gives them, and whether a further model's wrapper may exchange one.
_ARGUMENTS = {
    OUTER: ("noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback", "disable_pbar", "seed"),
    SAMPLER: (
        "model_wrap",
        "sigmas",
        "extra_args",
        "callback",
        "noise",
        "latent_image",
        "denoise_mask",
        "disable_pbar",
    ),
}
_OWN = {"callback", "disable_pbar", "model_wrap", "extra_args"}


def carries_terms(model: Any) -> bool:
    """Whether a GCFG Model node put terms on this model, or on one that it was cloned from."""
    return TERMS in getattr(model, "wrappers", {}).get(OUTER, {})


def within(
    kind: str,
    base: Lane,
    lanes: Sequence[Lane],
    given: Callable[[Lane], dict[str, Any]],
    callback: Any,
    body: Callable[[Any], Tensor],
    outside: placing.Functions,
    **kwargs: Any,
) -> Tensor:
    """Run `body` once, inside the wrappers of each of these lanes.

    Args:
        kind: of the wrappers.
        base: the sampler's model.
        lanes: the further models.
        given: the arguments that a lane's wrappers get, by name, without the callback.
        callback: told of every step; wrappers may put their own around it.
        body: the rest of the run, given the callback.
        outside: ComfyUI's sampling functions as they stand outside of all models' wrappers.
        kwargs: what newer versions give by name.
    """
    if not lanes:
        return body(callback)
    lane, *further = lanes
    around = versions.wrappers(kind, lane.guider.model_options)
    rest = partial(within, kind, base, further, given, body=body, outside=outside, **kwargs)
    inner = _Inner(kind, base, lane, rest, outside)
    arguments = {**given(lane), "callback": callback}
    owner = arguments["sampler"] if kind == SAMPLER else lane.guider
    inner.own = {name: arguments[name] for name in _ARGUMENTS[kind]}
    # Copies, since wrappers write into the noise (context windows' FreeNoise).
    inner.given = {
        name: value.clone() if around and isinstance(value, Tensor) else value for name, value in inner.own.items()
    }
    with placing.functions(lane.functions):
        versions.wrapped(kind, lane.guider.model_options, inner, owner)(*inner.given.values(), **kwargs)
        return inner.result if inner.calls else inner(*inner.given.values())


class _Inner:
    """What a lane's wrappers stand around: the rest of the run, which happens once."""

    own: dict[str, Any]  # the arguments of the sampling itself
    given: dict[str, Any]  # those that the wrappers got
    result: Tensor

    def __init__(
        self, kind: str, base: Lane, lane: Lane, body: Callable[[Any], Tensor], outside: placing.Functions
    ) -> None:
        self.kind, self.base, self.lane, self.body, self.outside = kind, base, lane, body, outside
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        got = {**self.given, **dict(zip(self.given, args, strict=False))}
        got.update((name, value) for name, value in kwargs.items() if name in got)
        self.calls += 1
        changed = [name for name in got if name not in _OWN and self._is_changed(name, got[name])]
        if changed or self.calls > 1:
            self._say("samples again" if self.calls > 1 else f"changes {' and '.join(changed)} of the sampling")
        if self.calls == 1:
            self.lane.functions = placing.functions_in_place()
            if "extra_args" in got:
                self.lane.options = got["extra_args"]["model_options"]
            with placing.functions(self.outside):
                self.result = self.body(got["callback"])
        return self.result

    def _is_changed(self, name: str, got: Any) -> bool:
        own, given = self.own[name], self.given[name]
        if own is given or not isinstance(own, Tensor):
            return not identical(got, given)
        return got is not given or not torch.allclose(given, own, rtol=0.0, atol=0.0, equal_nan=True)

    def _say(self, what: str) -> None:
        found, others = (versions.wrappers(self.kind, lane.guider.model_options) for lane in (self.lane, self.base))
        others = [*others, *self.base.guider.around]
        found = [wrapper for wrapper in found if wrapper not in others]  # those do to the sampling what these do
        if not found:
            return
        logging.warning(
            "GCFG: a wrapper on the model of %s (%s) %s, which only the sampler's model can: that has no effect "
            "here; put its node on the model of the sampler.",
            self.lane.name,
            ", ".join(map(called, found)),
            what,
        )
