"""A ControlNet from a file in LDM's or diffusers' keys, or from a diffusers folder, as diffusers' own class."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..gcfg.errors import GuidanceError
from ..gcfg.safetensors_file import LazyStateDict, read_header
from ..training.prior.architecture import Config, Shapes
from ..training.prior.components import UNET_WEIGHTS, component, weight_files

if TYPE_CHECKING:
    from diffusers import ControlNetModel

_PREFIXES = ("control_model.", "")
_LDM_FIRST, _DIFFUSERS_FIRST = "input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight"


def load_controlnet(path: Path, unet: Config, source: str) -> ControlNetModel:
    """Read a ControlNet in float32, in evaluation mode and without gradients.

    Args:
        path: a .safetensors file or a diffusers folder.
        unet: configuration of the prior's UNet, whose copy it is.
        source: start of every error: "prior.controlnet 'path'".

    Raises: GuidanceError: if it is none, or one of another UNet.
    """
    try:
        found = _from_folder(path, source) if os.path.isdir(path) else _from_file(path, unet, source)
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ZeroDivisionError, OSError) as error:
        if isinstance(error, GuidanceError):
            raise
        raise _does_not_fit(source) from error
    if found.config.cross_attention_dim != unet["cross_attention_dim"]:
        raise _does_not_fit(source)
    controlnet: ControlNetModel = found.float().eval().requires_grad_(False)
    return controlnet


def _from_file(path: Path, unet: Config, source: str) -> ControlNetModel:
    from diffusers import ControlNetModel, UNet2DConditionModel

    shapes = read_header(path, source).shapes
    lazy = LazyStateDict(path)
    for prefix in _PREFIXES:
        keys = [key for key in shapes if key.startswith(prefix)]
        if prefix + _DIFFUSERS_FIRST in shapes or prefix + _LDM_FIRST in shapes:
            break
    else:
        raise GuidanceError(
            f"{source} holds no ControlNet: expected {_LDM_FIRST!r} (LDM) or {_DIFFUSERS_FIRST!r} (diffusers), bare or "
            "below 'control_model.'; name a ControlNet of the prior's family."
        )
    below = {key.removeprefix(prefix): shapes[key] for key in keys}
    weights = {name: lazy[prefix + name].to(torch.float32, copy=True) for name in below}
    with torch.device("meta"):
        copied = UNet2DConditionModel.from_config(unet)
        controlnet = ControlNetModel.from_unet(copied, load_weights_from_unet=False, **_hint_config(below))
    with tempfile.TemporaryDirectory() as folder:  # a local config, or diffusers would look one up by guessing
        controlnet.save_config(folder)
        controlnet = ControlNetModel.from_single_file(weights, config=folder, local_files_only=True)
    missing = [name for name, tensor in controlnet.state_dict().items() if tensor.is_meta]
    if missing:
        raise KeyError(missing[0])
    return controlnet


def _hint_config(shapes: Shapes) -> Config:
    """Return the widths of the layers that read the condition's image, by either naming."""
    if _DIFFUSERS_FIRST in shapes:
        first, blocks = shapes[_DIFFUSERS_FIRST], "controlnet_cond_embedding.blocks.{}.weight"
        inner = [shapes[blocks.format(i)] for i in range(64) if blocks.format(i) in shapes]
    else:
        numbered = [f"input_hint_block.{i}.weight" for i in range(2, 64, 2)]
        first, inner = shapes[_LDM_FIRST], [shapes[key] for key in numbered if key in shapes][:-1]  # the last leads out
    widths = [first[0], *(shape[0] for shape in inner[1::2])]
    return {"conditioning_channels": first[1], "conditioning_embedding_out_channels": widths}


def _from_folder(path: Path, source: str) -> ControlNetModel:
    from diffusers import ControlNetModel

    folder = component(path, "controlnet", "ControlNetModel", source)
    variant, _ = weight_files(folder, UNET_WEIGHTS, source)
    options: dict[str, Any] = {"variant": variant, "use_safetensors": True, "local_files_only": True}
    controlnet, info = ControlNetModel.from_pretrained(str(folder), output_loading_info=True, **options)
    if info["missing_keys"]:
        raise KeyError(info["missing_keys"][0])
    loaded: ControlNetModel = controlnet
    return loaded


def _does_not_fit(source: str) -> GuidanceError:
    return GuidanceError(
        f"{source} does not fit the prior's UNet, of whose first half a ControlNet is a copy; name one that was made "
        "for this prior's family."
    )
