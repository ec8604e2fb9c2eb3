"""A prior's UNet from a single file in LDM or diffusers keys, or from a diffusers folder, as diffusers' own class."""

from __future__ import annotations

import hashlib
import os
import re
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ...gcfg.concept_file import describe
from ...gcfg.errors import GuidanceError
from ...gcfg.safetensors_file import LazyStateDict, read_header
from ...gcfg.unet_keys import diffusers_to_ldm, ldm_to_diffusers
from .architecture import Config, cannot_be_built, refuse_mismatch, refuse_unsuitable, unet_config
from .components import UNET_WEIGHTS, component, load_component, read_json, weight_files

_UNET_KEY = re.compile(r"(input_blocks|middle_block|output_blocks|out|time_embed|label_emb)\.")
_SAMPLE = 64  # values at either end of a tensor that a fingerprint sees


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
    """Recognise a UNet file, a whole checkpoint or a diffusers folder; `source` starts every error.

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
    shapes = {ldm: header.shapes[key] for ldm, key in keys.items()}
    try:
        config = unet_config(shapes, source)
    except KeyError as error:
        raise GuidanceError(
            f"{source} is incomplete: its UNet's tensor {error} is missing; export or download the file again."
        ) from error
    unet = UNetSource(checkpoint, config, keys, source)
    expected = {key: tuple(tensor.shape) for key, tensor in diffusers_to_ldm(_empty(unet).state_dict()).items()}
    refuse_mismatch(expected, shapes, source)
    return unet


def load_unet(found: UNetSource) -> UNet2DConditionModel:
    """Read a UNet in float32 into memory of its own, one tensor at a time; it is in evaluation mode.

    Raises: GuidanceError: if a diffusers folder's weights do not fit its configuration.
    """
    if not found.keys:
        return _from_folder(found)
    unet = _empty(found)
    lazy = LazyStateDict(found.path)
    # A copy even where the dtype is right: the file's memory map is not ours to train in.
    weights = {ldm: lazy[key].to(torch.float32, copy=True) for ldm, key in found.keys.items()}
    unet.load_state_dict(ldm_to_diffusers(weights, unet.state_dict()), assign=True)
    return unet.eval()


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over every key, shape and dtype, and the first and last 64 values of each tensor.

    A fine-tune or a merge changes every tensor it touches, so the ends tell models apart; a checkpoint of gigabytes is
    read in milliseconds when the state dict is lazy.
    """
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        tensor = state_dict[key].detach()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        values = tensor.reshape(-1)
        for end in (values[:_SAMPLE], values[-_SAMPLE:]):
            digest.update(end.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _empty(found: UNetSource) -> UNet2DConditionModel:
    """Build the UNet without memory.

    Raises: GuidanceError: if diffusers refuses the configuration.
    """
    try:
        with torch.device("meta"):
            unet: UNet2DConditionModel = UNet2DConditionModel.from_config(found.config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise cannot_be_built(found.source, str(error)) from error
    return unet


def _from_folder(found: UNetSource) -> UNet2DConditionModel:
    def misfit(why: str) -> GuidanceError:
        return GuidanceError(f"{found.source}: diffusers cannot load the UNet ({why}).")

    unet, missing = load_component(UNet2DConditionModel, found.path, UNET_WEIGHTS, found.source, misfit)
    if missing:
        raise GuidanceError(
            f"{found.source} lacks weights of its UNet, first {missing[0]!r}; download the folder again."
        )
    loaded: UNet2DConditionModel = unet
    return loaded
