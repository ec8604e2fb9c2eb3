"""Loads and moves of a run with two models, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..gcfg.terms import GuidanceTerm
from .bench import SCALE, Bench, unload_all
from .figures import Figure


@dataclass
class Counts:
    """What happened, in order of the model calls: `when` is how many of them came before."""

    loads: Counter[int] = field(default_factory=Counter)  # by model
    moved_when: list[int] = field(default_factory=list)
    evaluations: int = 0

    @property
    def between_steps(self) -> int:
        """Loads and moves after the first model call and before the last."""
        return sum(0 < when < self.evaluations for when in self.moved_when)


@contextmanager
def counting(patchers: list[Any]) -> Iterator[Counts]:
    """Count ComfyUI's loads of these models, and every module that is moved, within the `with` block."""
    counts = Counts()
    patcher_class = type(patchers[0])
    name = "load" if hasattr(patcher_class, "load") else "patch_model"  # the second where it is the whole of loading
    load, move = getattr(patcher_class, name), torch.nn.Module.to

    def counted_load(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts.loads[id(self.model)] += 1
        counts.moved_when.append(counts.evaluations)
        return load(self, *args, **kwargs)

    def counted_move(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts.moved_when.append(counts.evaluations)
        return move(self, *args, **kwargs)

    def evaluated(*_: Any) -> None:
        counts.evaluations += 1

    hooks = [patcher.model.diffusion_model.register_forward_pre_hook(evaluated) for patcher in patchers]
    setattr(patcher_class, name, counted_load)
    torch.nn.Module.to = counted_move  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        torch.nn.Module.to = move  # type: ignore[method-assign]
        setattr(patcher_class, name, load)
        for hook in hooks:
            hook.remove()


def figures(bench: Bench) -> list[Figure]:
    """Prior and concept model in one run, from unloaded."""
    models = [bench.prior, bench.concept]
    terms = [
        GuidanceTerm(SCALE, conditioning=bench.prompt(1)),
        GuidanceTerm(1.5, model=bench.concept, conditioning=bench.prompt(2)),
    ]
    unload_all()
    with counting(models) as counts:
        bench.gcfg(bench.prior, bench.prompt(0), terms, bench.steps)
    each = [counts.loads[id(patcher.model)] for patcher in models]
    if not all(each) or counts.evaluations < 2 * bench.steps:
        raise RuntimeError(
            f"counted {each} loads and {counts.evaluations} model calls: the counters do not see the run"
        )
    return [
        Figure("loads", "loads per model in a run of two models", max(each), "count", goal=1),
        Figure(
            "moves",
            "loads and module moves between its steps",
            counts.between_steps,
            "count",
            goal=0,
            note=f"between the first and the last of {counts.evaluations} model calls",
        ),
    ]
