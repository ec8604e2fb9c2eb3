"""Loads and moves of a run's models, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


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
