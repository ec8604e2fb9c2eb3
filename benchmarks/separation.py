"""Two models on one base, plain and with a LoRA: separated clones, a second load, and the naive shared module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import comfy.model_management as management
from torch import Tensor
from tqdm import tqdm

from ..gcfg.terms import GuidanceTerm
from ..nodes.runtime import guider
from ..nodes.runtime.clones import separate
from .bench import SCALE, Bench, unload_all
from .figures import Figure
from .files import RANK
from .ksampler import relative_error
from .memory import used
from .timing import Spread, ratio


@dataclass(frozen=True)
class Cost:
    """What a second set of weights costs.

    Attributes:
        seconds: until there is one, before ComfyUI loads it and applies its LoRA (the same work in both ways).
        memory: bytes in use beyond the loaded base, once it is loaded and patched.
        unshared: bytes of its parameters that it does not share with the base.
    """

    seconds: float
    memory: int
    unshared: int


def _separated(bench: Bench) -> Any:
    return separate([bench.prior, bench.with_lora(bench.prior)])[1]


def _loaded_again(bench: Bench) -> Any:
    return bench.with_lora(bench.load_prior())


def _cost(bench: Bench, make: Callable[[Bench], Any]) -> Cost:
    unload_all()
    management.load_models_gpu([bench.prior])
    base, before = bench.prior.model, used(bench.clock.device)
    made: list[Any] = []
    seconds = bench.clock.time(lambda: made.append(make(bench)))
    management.load_models_gpu([bench.prior, made[0]])
    memory = used(bench.clock.device) - before
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    unshared = sum(p.nbytes for p in made[0].model.parameters() if p.data_ptr() not in shared)
    return Cost(seconds, memory, unshared)


def costs(bench: Bench) -> tuple[list[Cost], list[Cost]]:
    """The cost of separating and of loading again, in turn; the first round is not counted."""
    rounds = [
        (_cost(bench, _separated), _cost(bench, _loaded_again))
        for _ in tqdm(range(bench.repeats + 1), desc="clones", unit="round", leave=False)
    ]
    return [a for a, _ in rounds[1:]], [b for _, b in rounds[1:]]


def not_separated() -> Any:
    """Let clones share their module within a `with` block, as a run without our separation would."""
    return patch.object(guider, "separate", lambda patchers, in_place=False: list(patchers))


def errors(bench: Bench) -> tuple[float, float]:
    """Relative error of one step's result, separated and naive, against two separate loads."""

    def run(model: Any) -> Tensor:
        return bench.gcfg(
            bench.prior, bench.prompt(0), [GuidanceTerm(SCALE, model=model, conditioning=bench.prompt(1))], 1
        )

    unload_all()
    expected = run(_loaded_again(bench))
    unload_all()
    clone = bench.with_lora(bench.prior)
    separated = run(clone)
    unload_all()
    with not_separated():
        naive = run(clone)
    unload_all()  # takes the LoRA off the shared module
    return relative_error(separated, expected), relative_error(naive, expected)


def figures(bench: Bench) -> list[Figure]:
    """Time, memory and correctness of a rank-16 LoRA beside its plain base."""
    separated, again = costs(bench)
    error, naive = errors(bench)
    seconds = [cost.seconds for cost in separated], [cost.seconds for cost in again]
    unshared = [cost[0].unshared / 1e6 for cost in (separated, again)]
    what = f"a rank-{RANK} LoRA on all layers of the transformers beside the plain base"
    return [
        Figure.spread("separation_s", "separating a clone, first run", Spread.of(seconds[0]), "s", note=what),
        Figure.spread("second_load_s", "loading the model a second time", Spread.of(seconds[1]), "s"),
        Figure.spread("separation_vs_load", "separating / loading again, time", ratio(*seconds), "x"),
        Figure.spread(
            "separation_mb",
            "memory of a separated clone",
            _megabytes(separated),
            "MB",
            note=f"{unshared[0]:,.0f} MB of its parameters are not shared: those that the LoRA patches",
        ),
        Figure.spread(
            "second_load_mb",
            "memory of a second load",
            _megabytes(again),
            "MB",
            note=f"{unshared[1]:,.0f} MB of parameters, and the originals of those that the LoRA patches",
        ),
        Figure("separation_error", "error of separated clones against two loads", error, "", goal=0.0),
        Figure("naive_error", "error of clones that share a module (without us)", naive, ""),
    ]


def _megabytes(costs: list[Cost]) -> Spread:
    return Spread.of([cost.memory / 1e6 for cost in costs])
