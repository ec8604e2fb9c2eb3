"""Clones that differ get weights of their own.

`ModelPatcher.clone()` shares its module: two clones with different LoRAs, weight wrappers, injections or object
patches, loaded together, silently evaluate the same weights (whichever was loaded last). So in every family of clones
one keeps the shared module, and each differing one gets a private copy of the *clean* module, which ComfyUI then loads
and patches like any other model. The copy's parameters share storage with the original until they are patched or
moved, so on the CPU it costs the patched weights, and on a GPU one more model. It lives as long as its patcher.

A difference that is no weight (another `model_sampling`, a function in a method's place) needs no copy: `placing` puts
it in place around each evaluation.
"""

from __future__ import annotations

import copy
import functools
import logging
import types
import uuid
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...gcfg.errors import GuidanceError
from . import compiled
from .hooks import without_hooks
from .versions import is_dynamic, unload

# What changes the weights that an evaluation sees, besides `patches` and object patches that bring weights.
_WEIGHT_STATE = ("weight_wrapper_patches", "injections")
_OPTIONS = ("model_options", "wrappers", "callbacks")
_EVALUATION = ("apply_model", "diffusion_model")  # kinds of wrappers that stand around the module itself

_copies: WeakKeyDictionary[Any, tuple[bool, Any]] = WeakKeyDictionary()
# What stood in a patcher before its compiled parts were made its own, so that it is still known as a copy of another.
_given: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def separate(patchers: Sequence[Any], in_place: bool = False) -> list[Any]:
    """The patchers, with a private module for each that would otherwise overwrite another's weights.

    Args:
        patchers: the models of one run; the first of each family keeps the shared module.
        in_place: whether the run writes into weights in place (weight hooks), so that storage must not be shared.

    Returns:
        One patcher for each of `patchers`, in their order; the same object where nothing had to be done.

    Raises:
        GuidanceError: if a patcher cannot be separated.
    """
    compiled.warn_lost_patches(patchers)
    result: list[Any] = []
    for patcher in patchers:
        owner = next((seen for seen in result if seen.model is patcher.model), None)
        if owner is None or same_weights(owner, patcher):
            result.append(patcher)
            continue
        twin = next(
            (seen for original, seen in zip(patchers, result, strict=False) if same_weights(original, patcher)), None
        )
        result.append(_cached_copy(patcher, in_place) if twin is None else _on_module_of(twin, patcher))
    return result


def same_weights(a: Any, b: Any) -> bool:
    """Whether two patchers evaluate the same weights and modules. Compared by identity, not by what they promise."""
    return a is b or (a.model is b.model and _same_state(a, b))


def same_calls(a: Any, b: Any) -> bool:
    """Whether two patchers of the same weights call them in the same way; guidance hooks act after the calls."""
    return (
        identical(without_hooks(a.model_options), without_hooks(b.model_options))
        and all(identical(_held(a, name), _held(b, name)) for name in _OPTIONS[1:])
        and identical(object_patches_in_place(a), object_patches_in_place(b))
    )


def object_patches_in_place(patcher: Any) -> dict[str, Any]:
    """The object patches that bring no weights of their own, which can be put in place around each call."""
    return {key: value for key, value in _held(patcher, "object_patches").items() if not _brings_weights(value)}


def _brings_weights(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (
        isinstance(value, torch.nn.Module) and any(True for _ in value.parameters())
    )


def identical(a: Any, b: Any) -> bool:
    """Whether two nested containers hold the very same objects (or equal plain values)."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, (int, float, str, bool)) and bool(a == b)


def _same_state(a: Any, b: Any) -> bool:
    return (
        identical(a.patches, b.patches)
        and identical(*({k: v for k, v in _held(p, "object_patches").items() if _brings_weights(v)} for p in (a, b)))
        and all(identical(_held(a, name), _held(b, name)) for name in _WEIGHT_STATE)
        and getattr(a, "force_cast_weights", False) == getattr(b, "force_cast_weights", False)
    )


def _held(patcher: Any, name: str) -> Any:
    return _given.get(patcher, {}).get(name, getattr(patcher, name, {}))


def _cached_copy(patcher: Any, in_place: bool) -> Any:
    kept = _copies.get(patcher)
    if kept is not None and kept[0] == in_place and _same_state(kept[1], patcher):
        return _on_module_of(kept[1], patcher)
    private = _private_copy(patcher, in_place)
    _copies[patcher] = (in_place, private)
    return private


def _on_module_of(private: Any, patcher: Any) -> Any:
    """A patcher whose options are those of `patcher` today and whose module is the private one."""
    if all(identical(_held(private, name), _held(patcher, name)) for name in (*_OPTIONS, "object_patches")):
        return private
    fresh = patcher.clone()
    fresh.model = private.model
    _compile_own(fresh, patcher.model)
    for name in _MODULE_STATE:
        if hasattr(private, name):
            setattr(fresh, name, getattr(private, name))
    fresh.parent = private  # ComfyUI falls back to the parent when the clone dies; it must be of the same module
    return fresh


# What a patcher remembers about the state of its module; clones share these objects.
_MODULE_STATE = ("backup", "backup_buffers", "object_patches_backup", "hook_backup", "pinned", "_current_device")


def _private_copy(patcher: Any, in_place: bool) -> Any:
    name = type(patcher.model).__name__
    unload(patcher)  # first, or its own patches, installed, would pass for parts of the shared module
    _refuse_captured_modules(patcher, name)
    if is_dynamic(patcher):
        return _compile_own(_reloaded(patcher, name), patcher.model)
    private = patcher.clone()
    private.model = _copy_module(patcher.model, share_storage=not (in_place or patcher.weight_inplace_update))
    private.parent = None
    for attribute in _MODULE_STATE:
        if hasattr(private, attribute):
            fresh = private.offload_device if attribute == "_current_device" else type(getattr(private, attribute))()
            setattr(private, attribute, fresh)
    if hasattr(private, "cached_hook_patches"):
        private.cached_hook_patches, private.current_hooks = {}, None
    if hasattr(private, "clone_base_uuid"):
        private.clone_base_uuid = uuid.uuid4()
    logging.info("GCFG: %s is used twice with different patches, so the second got weights of its own.", name)
    return _compile_own(private, patcher.model)


def _compile_own(patcher: Any, shared: torch.nn.Module) -> Any:
    held = {name: copy.copy(getattr(patcher, name, {})) for name in ("object_patches", "wrappers")}
    held["wrappers"] = {kind: {k: list(w) for k, w in named.items()} for kind, named in held["wrappers"].items()}
    compiled.compile_own(patcher, shared)
    _given[patcher] = held
    return patcher


def _reloaded(patcher: Any, name: str) -> Any:
    try:
        return patcher.clone(force_deepcopy=True)
    except RuntimeError as error:
        raise GuidanceError(
            f"GCFG: {name} is used twice with different patches and cannot be copied ({error}); load the model for one "
            f"of the terms from a second file."
        ) from error


def _copy_module(model: torch.nn.Module, share_storage: bool) -> torch.nn.Module:
    """A deep copy whose parameters are new objects, so that patching or moving one model leaves the other alone."""
    memo: dict[int, Any] = {id(getattr(model, key, None)): getattr(model, key, None) for key in ("model_config",)}
    memo[id(getattr(model, "current_patcher", None))] = None
    for key, parameter in model.named_parameters():
        if type(parameter) is not torch.nn.Parameter or type(parameter.data) is not torch.Tensor:
            raise GuidanceError(
                f"GCFG: {type(model).__name__} is used twice with different patches, and its weight {key} is of the "
                f"special kind {type(parameter.data).__name__}, which cannot be copied safely; load the model for one "
                f"of the terms from a second file."
            )
        data = parameter.data if share_storage else parameter.data.clone()
        memo[id(parameter)] = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise GuidanceError(
            f"GCFG: {type(model).__name__} is used twice with different patches and cannot be copied ({error}); load "
            f"the model for one of the terms from a second file."
        ) from error


def _refuse_captured_modules(patcher: Any, name: str) -> None:
    """An object patch that holds on to a piece of the shared module would go on using the shared weights."""
    shared = {id(module) for module in patcher.model.modules()} | {id(p) for p in patcher.model.parameters()}
    for kind, wrapper in compiled.foreign(patcher):
        parts = list(reachable(wrapper))
        if any(id(compiled.original(part)) in shared for part in parts):
            raise GuidanceError(
                f"GCFG: {name} is used twice with different patches, and a wrapper holds the shared model as "
                f"torch.compile made it, so the two cannot be separated; compile with the node TorchCompileModel, or "
                f"load the model for one of the terms from a second file."
            )
        if kind in _EVALUATION and any(id(part) in shared for part in parts):
            raise GuidanceError(
                f"GCFG: {name} is used twice with different patches, and a wrapper of one "
                f"({called(wrapper)}) holds a part of the shared model, so it would act on the wrong weights; load "
                f"the model for one of the terms from a second file."
            )
    for key, value in patcher.object_patches.items():
        if compiled.is_part(value, patcher.model, key):
            continue  # compiled again for the copy
        if any(id(part) in shared for part in reachable(value)):
            raise GuidanceError(
                f"GCFG: {name} is used twice with different patches, and the patch on '{key}' holds a part of the "
                f"shared model, so the two cannot be separated; load the model for one of the terms from a second file."
            )


def called(function: Any) -> str:
    """What a person can recognise a wrapper by: its module and its name."""
    thing = function if hasattr(function, "__qualname__") else type(function)
    return f"{thing.__module__}.{thing.__qualname__}"


def reachable(value: Any, depth: int = 4) -> Iterator[Any]:
    """What a patch can get at: itself, modules and parameters, bound methods, closures, partials, attributes."""
    seen: set[int] = set()
    level = [value]
    for _ in range(depth + 1):
        level = [thing for thing in level if id(thing) not in seen]
        seen.update(map(id, level))
        yield from level
        level = [part for thing in level for part in _parts(thing)]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, (torch.Tensor, str, int, float, type, types.ModuleType)):
        return []
    if hasattr(value, "is_clone"):  # a patcher: what holds one asks it for settings
        return []
    inner: list[Any] = [*value.modules(), *value.parameters()] if isinstance(value, torch.nn.Module) else []
    if isinstance(value, types.MethodType):
        inner += [value.__self__, value.__func__]
    elif isinstance(value, functools.partial):
        inner += [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.FunctionType):
        inner += [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
    elif isinstance(value, dict):
        inner += value.values()
    elif isinstance(value, (list, tuple, set)):
        inner += value
    elif hasattr(value, "__dict__"):
        inner += vars(value).values()
    return inner


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a cell that is not yet assigned
        return False
