"""Compiled modules (TorchCompileModel) of a model whose clones differ.

Compiling keeps the module it was given: older versions of ComfyUI put the compiled one into an object patch, newer ones
into a wrapper of `apply_model`. A clone that gets a module of its own must compile that one, with the same settings;
else it would go on evaluating the shared weights.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import comfy.utils
from torch import nn

_WRAPPED = ("apply_model", "torch.compile")  # the type and the key of ComfyUI's wrapper


def original(value: Any) -> Any:
    """The module that a compiled one was made of; None where `value` is none."""
    return value._orig_mod if isinstance(value, nn.Module) and hasattr(value, "dynamo_ctx") else None


def compile_own(patcher: Any, shared: nn.Module) -> None:
    """Let the compiled parts of a clone be those of its own module.

    They are compiled anew, with the same settings, when they are first called.

    Args:
        patcher: a clone whose `model` is a copy of `shared`.
        shared: the model that its compiled parts were made of.
    """
    for key, value in patcher.object_patches.items():
        if is_part(value, shared, key):
            patcher.object_patches[key] = _again(value, patcher.model, key)
    kind, name = _WRAPPED
    wrappers = getattr(patcher, "wrappers", {}).get(kind, {})
    if name in wrappers:
        wrappers[name] = [_wrapper_again(wrapper, patcher.model, shared) for wrapper in wrappers[name]]


def is_part(value: Any, model: nn.Module, key: str) -> bool:
    """Whether `value` is that part of the model, compiled."""
    module = original(value)
    return module is not None and module is _plain(model, key)


def compiled_parts(wrapper: Any) -> dict[str, nn.Module]:
    """What ComfyUI's wrapper puts into the model while it is evaluated, by name."""
    cells = getattr(wrapper, "__closure__", None) or ()
    held = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, dict)]
    return {key: part for parts in held for key, part in parts.items() if original(part) is not None}


def foreign(patcher: Any) -> Iterator[tuple[str, Any]]:
    """(kind, wrapper) of a patcher other than ComfyUI's own, which may hold a module that cannot be exchanged."""
    for kind, named in getattr(patcher, "wrappers", {}).items():
        for name, wrappers in named.items():
            for wrapper in wrappers:
                if (kind, name) != _WRAPPED or not compiled_parts(wrapper):
                    yield kind, wrapper
    if "model_function_wrapper" in patcher.model_options:
        yield _WRAPPED[0], patcher.model_options["model_function_wrapper"]


def warn_lost_patches(patchers: Iterable[Any]) -> None:
    """Say so where ComfyUI drops weight patches: it does not find them below a compiled object patch."""
    for patcher in patchers:
        for key, value in patcher.object_patches.items():
            lost = sum(str(name).startswith(f"{key}.") for name in patcher.patches)
            if lost and original(value) is not None:
                logging.warning(
                    "GCFG: this ComfyUI does not apply the LoRA (%d weights) of a model that TorchCompileModel "
                    "compiled; update ComfyUI, or save the model with the LoRA merged in and compile that one.",
                    lost,
                )


def _again(value: Any, model: nn.Module, key: str) -> nn.Module:
    compiled: nn.Module = value.dynamo_ctx(_plain(model, key))
    return compiled


def _plain(model: nn.Module, key: str) -> Any:
    """A part of a model, which may be loaded with the compiled one in its place; None where there is none."""
    try:
        part = comfy.utils.get_attr(model, key)
    except AttributeError:
        return None
    return original(part) or part


def _wrapper_again(wrapper: Any, model: nn.Module, shared: nn.Module) -> Callable[..., Any]:
    parts = compiled_parts(wrapper)
    if not any(is_part(part, shared, key) for key, part in parts.items()):
        result: Callable[..., Any] = wrapper
        return result
    factory: Callable[..., Any] = importlib.import_module(wrapper.__module__).apply_torch_compile_factory
    again: Callable[..., Any] = factory({key: _again(part, model, key) for key, part in parts.items()})
    return again
