"""Which models carry something that reads `cond_or_uncond`, the index of each conditioning in a call.

Such patches (IPAdapter, normalized attention guidance, couples, caches) know stock calls only: the unconditional, index
1, and one conditional, index 0. So the models that carry one are evaluated in calls of two.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from .clones import reachable

_INDEX = "cond_or_uncond"


def wants_uncond(patcher: Any) -> bool:
    """Whether a patch of a model needs the unconditional beside each prediction, also where its weight is 0."""
    return bool(patcher.model_options.get("disable_cfg1_optimization")) and reads_index(patcher)


def reads_index(patcher: Any) -> bool:
    """Whether any function that can be reached from a model's patches and wrappers names the index."""
    options = patcher.model_options
    values = [
        options.get("transformer_options", {}),
        options.get("model_function_wrapper"),
        getattr(patcher, "wrappers", {}),
        patcher.object_patches,
    ]
    seen: set[int] = set()
    found = (thing for value in values for thing in reachable(value, depth=8))
    return any(_names_index(function, seen) for thing in found for function in _functions_of(thing))


def _functions_of(thing: Any) -> Iterator[FunctionType]:
    if isinstance(thing, FunctionType):
        yield thing
    elif not isinstance(thing, type):
        for name in ("__call__", "forward"):  # an object that is called as a patch
            method = getattr(type(thing), name, None)
            if isinstance(method, FunctionType):
                yield method


def _names_index(function: FunctionType, seen: set[int]) -> bool:
    """Whether a function, or one of its own module's that it calls, has the index's name among its constants."""
    if id(function) in seen or (function.__module__ or "").partition(".")[0] in ("torch", "comfy"):
        return False
    seen.add(id(function))
    codes = list(_codes(function.__code__))
    if any(_INDEX in code.co_consts for code in codes):
        return True
    named = (function.__globals__.get(name) for code in codes for name in code.co_names)
    near = (f for f in named if isinstance(f, FunctionType) and f.__module__ == function.__module__)
    return any(_names_index(other, seen) for other in near)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
