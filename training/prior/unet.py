"""A prior's UNet from a single file in LDM or diffusers keys, or from a diffusers folder, as diffusers' own class."""

from __future__ import annotations

import os
import re
from collections import ChainMap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...gcfg.concept_file import describe
from ...gcfg.errors import GuidanceError
from ...gcfg.safetensors_file import LazyStateDict, read_header
from ...gcfg.unet_keys import diffusers_to_ldm, ldm_to_diffusers
from .architecture import Config, refuse_mismatch, refuse_unsuitable, unet_config
from .components import UNET_WEIGHTS, component, read_json, weight_files
from .fingerprint import fingerprint

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_UNET_KEY = re.compile(r"(input_blocks|middle_block|output_blocks|out|time_embed|label_emb)\.")


@dataclass(frozen=True)
class UNetSource:
    """Where a UNet is, and its structure; no weight is read yet.

    Attributes:
        path: the file, or the component's folder.
        config: of UNet2DConditionModel.
        keys: the file's key by bare LDM key; empty for a folder.
        source: how the user knows it, the start of every error.
    """

    path: Path
    config: Config
    keys: dict[str, str]
    source: str

    @cached_property
    def fingerprint(self) -> str:
        """Name of the weights, see `fingerprint`."""
        if self.keys:
            lazy = LazyStateDict(self.path)
            return fingerprint({ldm: lazy[key] for ldm, key in self.keys.items()})
        _, files = weight_files(self.path, UNET_WEIGHTS, self.source)
        return fingerprint(ChainMap(*(LazyStateDict(file) for file in files)))  # type: ignore[arg-type]


def find_unet(checkpoint: Path, source: str) -> UNetSource:
    """Recognise a UNet file, a whole checkpoint or a diffusers folder.

    Args:
        checkpoint: the file or folder.
        source: start of every error: "model.checkpoint 'path'".

    Raises: GuidanceError: if it is not a UNet that can be a prior; one sentence.
    """
    if os.path.isdir(checkpoint):
        folder = component(checkpoint, "unet", "UNet2DConditionModel", source)
        config = read_json(folder / "config.json", source)
        refuse_unsuitable(config, source)
        weight_files(folder, UNET_WEIGHTS, source)
        return UNetSource(folder, config, {}, source)
    header = read_header(checkpoint, source)
    found = describe(LazyStateDict(checkpoint), header.metadata, source)
    if found.form != "ordinary":
        raise GuidanceError(
            f"{source} is a null-text UNet ({found.form}), expected a prior, which reads text; to start from its "
            "constants name it as model.null_text, and the model it was made from as model.checkpoint."
        )
    bare = {key.removeprefix(found.prefix): key for key in header.shapes if key.startswith(found.prefix)}
    keys = diffusers_to_ldm(bare) if found.naming == "diffusers" else bare
    keys = {ldm: key for ldm, key in keys.items() if _UNET_KEY.match(ldm)}
    try:
        config = unet_config({ldm: header.shapes[key] for ldm, key in keys.items()}, source)
    except KeyError as error:
        raise GuidanceError(
            f"{source} is incomplete: its UNet's tensor {error} is missing; export or download the file again."
        ) from error
    unet = UNetSource(checkpoint, config, keys, source)
    expected = {key: tuple(tensor.shape) for key, tensor in diffusers_to_ldm(_empty(unet).state_dict()).items()}
    refuse_mismatch(expected, {ldm: header.shapes[key] for ldm, key in keys.items()}, source)
    return unet


def load_unet(found: UNetSource, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Read a UNet into memory of its own, one tensor at a time; it is in evaluation mode.

    Raises: GuidanceError: if a diffusers folder's weights do not fit its configuration.
    """
    if not found.keys:
        return _from_folder(found, dtype)
    unet = _empty(found)
    lazy = LazyStateDict(found.path)
    # A copy even where the dtype is right: the file's memory map is not ours to train in.
    weights = {ldm: lazy[key].to(dtype, copy=True) for ldm, key in found.keys.items()}
    unet.load_state_dict(ldm_to_diffusers(weights, unet.state_dict()), assign=True)
    return unet.eval()


def _empty(found: UNetSource) -> UNet2DConditionModel:
    """Build the UNet without memory.

    Raises: GuidanceError: if diffusers refuses the configuration.
    """
    from diffusers import UNet2DConditionModel

    try:
        with torch.device("meta"):
            unet: UNet2DConditionModel = UNet2DConditionModel.from_config(found.config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise GuidanceError(
            f"{found.source} has a structure that diffusers' UNet2DConditionModel cannot take ({error}); "
            "use a model of the SD1.x, SD2.x or SDXL layout."
        ) from error
    return unet


def _from_folder(found: UNetSource, dtype: torch.dtype) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    variant, _ = weight_files(found.path, UNET_WEIGHTS, found.source)
    try:
        unet, info = UNet2DConditionModel.from_pretrained(
            str(found.path),
            variant=variant,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise GuidanceError(f"{found.source}: diffusers cannot load the UNet ({_line(error)}).") from error
    if info["missing_keys"]:
        raise GuidanceError(
            f"{found.source} lacks weights of its UNet, first {info['missing_keys'][0]!r}; download the folder again."
        )
    loaded: UNet2DConditionModel = unet.eval()
    return loaded


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
