"""Two models on one base, plain and with a LoRA: a separated clone, and loading the base a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import comfy.model_management as management

from ..nodes.runtime import guider
from ..nodes.runtime.clones import separate
from .bench import Bench
from .cases import Case, Part, Sampling
from .figures import Figure
from .harness import interleaved, ratio
from .ksampler import relative_error
from .memory import Memory
from .models import unload_all

CLONE, AGAIN, SHARED = "separated clone", "second load", "clone that shares its module (without us)"


Cost = tuple[float, float]  # seconds until there is a second set of weights, and MB beyond the loaded base


def figures(bench: Bench) -> Iterator[Figure]:
    """Time and memory of a LoRA's clone beside its plain base, and how far a step is from that of two loads."""
    makers = {CLONE: _separated, AGAIN: _loaded_again}
    calls = {name: partial(_cost, bench, make) for name, make in makers.items()}
    found = interleaved(calls, bench.repeats, "clones")
    seconds = {name: [cost[0] for cost in costs] for name, costs in found.items()}
    errors = _errors(bench)
    for name, costs in found.items():
        yield Figure.of(name, "time", seconds[name], "s")
        if name == CLONE:
            yield Figure.of(name, "/ second load", ratio(seconds[CLONE], seconds[AGAIN]), "x")
            yield Figure.of(name, "error of a step", [errors[0]], "error", goal=0.0)
        yield Figure.of(name, "memory", [cost[1] for cost in costs], "MB")
    yield Figure.of(SHARED, "error of a step", [errors[1]], "error")


def _separated(bench: Bench) -> Any:
    return separate([bench.models.prior, bench.models.with_lora(bench.models.prior)])[1]


def _loaded_again(bench: Bench) -> Any:
    return bench.models.with_lora(bench.models.load_prior())


def _cost(bench: Bench, make: Callable[[Bench], Any], _: int) -> Cost:
    """The time does not hold ComfyUI's loading, with the LoRA's application: the same work in both ways."""
    unload_all()
    prior, memory = bench.models.prior, Memory(bench.clock.device)
    management.load_models_gpu([prior])
    before = memory.now()
    made: list[Any] = []
    seconds = bench.clock.time(lambda: made.append(make(bench)))
    management.load_models_gpu([prior, made[0]])
    return seconds, (memory.now() - before) / 1e6


def _errors(bench: Bench) -> tuple[float, float]:
    """Relative error of one step with a separated clone, and with one that shares its module, against two loads."""
    models = bench.models
    case = Case("one step", (Part("tuned", 1, 7.5),))

    def step(tuned: Any) -> Any:
        unload_all()  # also takes the LoRA off a module that was shared
        models.tuned = tuned
        return case.run(models, bench.latent, Sampling(1))

    expected, clone = step(_loaded_again(bench)), models.with_lora(models.prior)
    separated = step(clone)
    with patch.object(guider, "separate", lambda patchers, in_place=False: list(patchers)):
        shared = step(clone)
    models.forget_tuned()
    unload_all()
    return relative_error(separated, expected), relative_error(shared, expected)
