"""Load a UNet file in any of its null-text forms through ComfyUI's own loaders, and free the unused attention."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import comfy.model_detection
import comfy.sd
import comfy.utils
import torch
from safetensors import SafetensorError

from ...gcfg.concept_file import (
    DEAD,
    FEATURE,
    NORM,
    ConceptFile,
    describe,
    features,
    unet_in_ldm_keys,
    without_dead_weights,
)
from ...gcfg.errors import GuidanceError
from ...gcfg.null_text import replace_cross_attention
from ...gcfg.safetensors_file import changed, read_header
from ...gcfg.safetensors_header import shown
from ...gcfg.unet_tensors import not_finite

# The stock UNETLoader's options and what they mean to the loading function of the same versions.
_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}
_HAS_OPTIONS = hasattr(comfy.sd, "load_diffusion_model_state_dict")
_load_state_dict = comfy.sd.load_diffusion_model_state_dict if _HAS_OPTIONS else comfy.sd.load_unet_state_dict

WEIGHT_DTYPES = tuple(_OPTIONS) if _HAS_OPTIONS else ("default",)


def load_concept_unet(
    path: str, weight_dtype: str = "default", name: str | None = None, disable_dynamic: bool = False
) -> Any:
    """Return the patcher of a UNet file: ordinary, folded or compact, LDM or diffusers keys, bare or in a checkpoint.

    Args:
        path: the .safetensors file.
        weight_dtype: one of WEIGHT_DTYPES, with the stock UNETLoader's meaning.
        name: the file as the user knows it.
        disable_dynamic: asked by ComfyUI when it wants a copy outside the dynamic VRAM patcher.

    Raises:
        GuidanceError: if the file cannot be used.
    """
    source = f"Load Concept UNet: unet_name {name or Path(path).name!r}"
    header = read_header(Path(path), source)
    state_dict = _read(path, source)
    found = describe(state_dict, header.metadata, source)
    unet = unet_in_ldm_keys(state_dict, found)
    held = len(unet)
    null_text = {} if found.form == "ordinary" else features(unet, source)
    if null_text:
        unet = without_dead_weights(unet, describe(unet, header.metadata, source))
    _check_recognised(unet, found, source, held)
    _warn_of_not_finite({**unet, **{f"{block}.{FEATURE}": constant for block, constant in null_text.items()}}, source)
    options = {
        "model_options": dict(_OPTIONS[weight_dtype]),
        "metadata": header.metadata or None,
        "disable_dynamic": disable_dynamic,
    }
    patcher = _load(unet, options, source, tuple(null_text), held)
    freed = _free_attention(patcher, null_text) if null_text else (0, 0)
    if hasattr(patcher, "cached_patcher_init"):
        patcher.cached_patcher_init = (load_concept_unet, (path, weight_dtype, name))
    logging.info(f"{source}: {_summary(found, *freed)}")
    return patcher


def _read(path: str, source: str) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = comfy.utils.load_torch_file(path, safe_load=True)
    except (SafetensorError, OSError, ValueError) as error:  # ComfyUI tells some errors of a header as a ValueError
        raise changed(source, error) from error
    return tensors


def _warn_of_not_finite(tensors: dict[str, torch.Tensor], source: str) -> None:
    if broken := not_finite(tensors):
        logging.warning(
            f"{source} has NaN or infinite values in {len(broken)} of {len(tensors)} tensors, first "
            f"{shown(broken[0])}: its images will be black; export or download the file again."
        )


def _check_recognised(unet: dict[str, torch.Tensor], found: ConceptFile, source: str, held: int) -> None:
    try:
        config = comfy.model_detection.model_config_from_unet(unet, "")
    except KeyError as error:
        raise GuidanceError(
            f"{source} is incomplete: the UNet's tensor {error} is missing, found {held}; export or download the "
            "file again."
        ) from error
    except (IndexError, ValueError, TypeError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise GuidanceError(
            f"{source} has tensors by which this ComfyUI cannot tell its model ({type(error).__name__}: {error}), "
            "expected one of the SD1.x, SD2.x or SDXL family; export or download the file again."
        ) from error
    if config is None:
        raise GuidanceError(
            f"{source} is a UNet of {held} tensors for text of width {found.context_dim} that this ComfyUI does "
            "not recognise, expected one of the SD1.x, SD2.x or SDXL family."
        )


def _load(
    unet: dict[str, torch.Tensor], options: dict[str, Any], source: str, null_text: tuple[str, ...], held: int
) -> Any:
    """Load through the stock loader, which only logs what a file lacks: that must not pass in silence.

    Args:
        unet: what is loaded; the loader empties it.
        options: of the loader.
        source: start of every error.
        null_text: blocks whose cross-attention is left out, and is not missed.
        held: number of the file's tensors.
    """
    keys = frozenset(unet) | {f"{block}.{key}" for block in null_text for key in (*DEAD, *NORM)}
    accepted = inspect.signature(_load_state_dict).parameters
    try:
        with _silence("unet missing") if null_text else nullcontext():
            patcher = _load_state_dict(unet, **{key: value for key, value in options.items() if key in accepted})
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        mismatch = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
        raise GuidanceError(f"{source} does not fit its own layout ({mismatch}); export the file again.") from error
    missing = [key for key in patcher.model.diffusion_model.state_dict() if key not in keys]
    if missing:
        raise GuidanceError(
            f"{source} is incomplete: {len(missing)} of the UNet's tensors are missing, first {missing[0]!r}, found "
            f"{held}; export or download the file again."
        )
    return patcher


@contextmanager
def _silence(start: str) -> Iterator[None]:
    """Keep the root logger from repeating, within the block, what begins like this."""
    root = logging.getLogger()

    def says_more(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(start)

    root.addFilter(says_more)
    try:
        yield
    finally:
        root.removeFilter(says_more)


def _free_attention(patcher: Any, null_text: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Replace the dead layers of a model just loaded, which nobody shares yet; return parameters and bytes freed."""
    unet = patcher.model.diffusion_model
    parameters, size = _parameters(unet), patcher.model_size()
    constants = {block: feature.to(patcher.offload_device, copy=True) for block, feature in null_text.items()}
    replace_cross_attention(unet, constants)
    patcher.size = 0  # ComfyUI's memory accounting measures again where it is 0
    return parameters - _parameters(unet), size - patcher.model_size()


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _summary(found: ConceptFile, parameters: int, size: int) -> str:
    where = f"below {found.prefix!r}" if found.prefix else "bare"
    text = f"{found.form} UNet, {found.naming} keys {where}, {len(found.blocks)} transformer blocks"
    if found.form == "ordinary":
        return f"{text}; loaded as it is"
    return f"{text}; null-text, freed {parameters:,} parameters of unused attention ({size / 2**20:.1f} MiB)"
