"""Whether a model's weights are still those of an earlier moment."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class WeightState:
    """Recognises whether a model's weights are still those of an earlier moment, without keeping them alive.

    Patched weights are new parameters; partly loaded ones are told by ComfyUI's patch id; weight hooks write in place,
    which the hook group and the values of the cheap features show.
    """

    objects: tuple[weakref.ref[Any], ...]
    patches_uuid: Any
    uniform: torch.Tensor

    @classmethod
    def of(cls, model: Any, uniform: dict[str, torch.Tensor]) -> WeightState:
        """Note the state as it is now."""
        return cls(tuple(map(weakref.ref, _weight_objects(model))), _patches_uuid(model), _joined(uniform))

    def are_those_of(self, model: Any, uniform: dict[str, torch.Tensor]) -> bool:
        """Tell whether nothing has changed."""
        now = tuple(_weight_objects(model))
        return (
            len(now) == len(self.objects)
            and all(ref() is thing for ref, thing in zip(self.objects, now, strict=True))
            and self.patches_uuid == _patches_uuid(model)
            and torch.equal(self.uniform, _joined(uniform).to(self.uniform.device))
        )


def hooks_at_work(model: Any) -> Any:
    """The weight hooks that are written into a model now; None where there are none, or the version has none."""
    return getattr(getattr(model, "current_patcher", None), "current_hooks", None)


def _weight_objects(model: Any) -> Iterator[Any]:
    yield from model.diffusion_model.parameters()
    hooks = hooks_at_work(model)
    if hooks is not None:
        yield hooks


def _patches_uuid(model: Any) -> Any:
    return getattr(model, "current_weight_patches_uuid", None)


def _joined(features: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(features.values()))
