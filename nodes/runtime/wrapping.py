"""A further model's own wrappers, run around the sampling as stock sampling runs them around its own.

Packs hang their work on wrappers: they prepare a cache, exchange a model's options, put their functions into ComfyUI,
and take all back afterwards. A run samples once, so every further model's wrappers stand around that one sampling, one
model's inside another's. What a wrapper changes of its own model holds; what it changes of the sampling itself (noise,
latent, sigmas) only the sampler's model can, and is said.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

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
    inner = _Inner(kind, lane, lambda told: within(kind, further, given, told, body, outside, **kwargs), outside)
    arguments = {**given(lane), "callback": callback}
    owner = arguments["sampler"] if kind == SAMPLER else lane.guider
    inner.given = {name: arguments[name] for name in _ARGUMENTS[kind]}
    with placing.functions(lane.functions):
        versions.wrapped(kind, lane.guider.model_options, inner, owner)(*inner.given.values(), **kwargs)
        return inner.result if inner.calls else inner(*inner.given.values())


class _Inner:
    """What a lane's wrappers stand around: the rest of the run, which happens once."""

    given: dict[str, Any]
    result: Tensor

    def __init__(self, kind: str, lane: Lane, body: Callable[[Any], Tensor], outside: placing.Functions) -> None:
        self.kind, self.lane, self.body, self.outside = kind, lane, body, outside
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        got = {**self.given, **dict(zip(self.given, args, strict=False))}
        got.update((name, value) for name, value in kwargs.items() if name in got)
        self.calls += 1
        changed = [name for name in got if name not in _OWN and not identical(got[name], self.given[name])]
        if changed or self.calls > 1:
            self._say("samples again" if self.calls > 1 else f"changes {' and '.join(changed)} of the sampling")
        if self.calls == 1:
            self.lane.functions = placing.functions_in_place()
            if "extra_args" in got:
                self.lane.options = got["extra_args"]["model_options"]
            with placing.functions(self.outside):
                self.result = self.body(got["callback"])
        return self.result

    def _say(self, what: str) -> None:
        names = ", ".join(map(called, versions.wrappers(self.kind, self.lane.guider.model_options)))
        logging.warning(
            "GCFG: a wrapper on the model of %s (%s) %s, which only the sampler's model can: that has no effect "
            "here; put its node on the model of the sampler.",
            self.lane.name,
            names,
            what,
        )
