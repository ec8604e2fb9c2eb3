"""From trained weights to the files that ComfyUI loads: UNet, LoRA, embedding; metadata by modelspec's convention."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..gcfg.concept_file import CONTEXT_DIM_KEY, Form, StateDict, describe, features, fold
from ..gcfg.errors import GuidanceError
from ..gcfg.unet_keys import diffusers_to_ldm
from .files import whole_file
from .prior.architecture import Family
from .prior.model import Prediction

DType = Literal["fp16", "bf16", "fp32"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FORM_KEY = "gcfg.form"  # in a file's metadata

_ARCHITECTURES: dict[Family, str] = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_V_SD2 = "stable-diffusion-v2-768-v"
_COMPACT = "-null-text"  # a compact file needs a loader of its own, so it must not pass for the base
_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"  # whose key names LDM's are
_PREDICTIONS = {"eps": "epsilon", "v": "v", "flow": "flow"}


def model_spec(
    family: Family, title: str, resolution: int, prediction: Prediction, date: datetime | None = None
) -> dict[str, str]:
    """Return the modelspec metadata of a trained UNet (https://github.com/Stability-AI/ModelSpec, 1.0.0).

    The resolution is the side of the training images; the date that of the training's end, now where it is None.
    """
    when = (date or datetime.now(timezone.utc)).replace(microsecond=0)
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _V_SD2 if (family, prediction) == ("sd2", "v") else _ARCHITECTURES[family],
        "modelspec.implementation": _IMPLEMENTATION,
        "modelspec.title": title,
        "modelspec.date": when.isoformat(),
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": _PREDICTIONS[prediction],
    }


def export_unet(
    unet: Mapping[str, Tensor],
    destination: Path,
    form: Form,
    dtype: DType,
    context_dim: int,
    metadata: Mapping[str, str],
    zero_terminal_snr: bool = False,
) -> None:
    """Write a trained UNet as a file that is whole or not there.

    Args:
        unet: its state dict in diffusers' keys; a null-text one has `...attn2.null_text_feature`.
        destination: the `.safetensors` file.
        form: 'folded' or 'compact' of a null-text UNet, 'ordinary' of one that reads text.
        dtype: of every tensor in the file.
        context_dim: width of the text embedding the prior reads.
        metadata: `model_spec` and the recipe of the training; the form, `gcfg.context_dim` and the hash are added.
        zero_terminal_snr: whether the noise schedule ends at pure noise; only a v model's file says so.

    Raises: GuidanceError: if the form does not fit the UNet, a value does not fit the dtype, or the disk is full.
    """
    weights = _in_form(diffusers_to_ldm(unet), form, context_dim)
    weights = {key: _cast(key, tensor, dtype) for key, tensor in weights.items()}
    weights |= _markers(metadata, zero_terminal_snr, DTYPES[dtype])
    stated = {**metadata, FORM_KEY: form, CONTEXT_DIM_KEY: str(context_dim), "modelspec.hash_sha256": _hash(weights)}
    if form == "compact" and "modelspec.architecture" in stated:
        stated["modelspec.architecture"] += _COMPACT
    with whole_file(destination) as beside:
        save_file(weights, beside, {"format": "pt", **stated})


def export_part(
    tensors: Mapping[str, Tensor], destination: Path, dtype: DType, metadata: Mapping[str, str], kind: str
) -> None:
    """Write what goes with a base model as a file that is whole or not there.

    Args:
        tensors: by the keys of their file: kohya's for a LoRA, whose scales stay as they are.
        destination: the `.safetensors` file.
        dtype: of its matrices.
        metadata: as for `export_unet`.
        kind: 'lora' or 'textual-inversion', the end of modelspec's architecture.

    Raises: GuidanceError: if a value does not fit the dtype, or the disk is full.
    """
    cast = {key: _cast(key, tensor, dtype) if tensor.ndim else tensor for key, tensor in tensors.items()}
    stated = {**metadata, "modelspec.architecture": f"{metadata['modelspec.architecture']}/{kind}"}
    with whole_file(destination) as beside:
        save_file(cast, beside, {"format": "pt", **stated})


def _in_form(weights: StateDict, form: Form, context_dim: int) -> StateDict:
    found = describe(weights, source="The trained UNet").form
    if (found == "ordinary") != (form == "ordinary"):
        fitting = "'ordinary'" if found == "ordinary" else "'folded' or 'compact'"
        raise GuidanceError(f"The trained UNet is {found}, expected the form {fitting} for its file, got {form!r}.")
    return fold(weights, features(weights), context_dim) if form == "folded" else weights


def _cast(key: str, tensor: Tensor, dtype: str) -> Tensor:
    extremes = torch.stack(tensor.detach().aminmax())  # NaN if any value is
    if not extremes.isfinite().all():
        raise GuidanceError(f"{key!r} has NaN or infinite values: the training failed; export an earlier checkpoint.")
    if not extremes.to(DTYPES[dtype]).isfinite().all():
        peak = float(extremes.abs().max())
        raise GuidanceError(f"{key!r} has values up to {peak:.3g}, more than {dtype} can hold; export as bf16 or fp32.")
    return tensor.detach().to("cpu", DTYPES[dtype]).contiguous()


def _markers(metadata: Mapping[str, str], zero_terminal_snr: bool, dtype: torch.dtype) -> StateDict:
    """Return the empty tensors by which ComfyUI tells a v model of SDXL, and its schedule."""
    if metadata.get("modelspec.prediction_type") != "v":
        return {}
    names = ("v_pred", "ztsnr") if zero_terminal_snr else ("v_pred",)
    return {name: torch.zeros(0, dtype=dtype) for name in names}


def _hash(weights: StateDict) -> str:
    """Return modelspec's hash: SHA-256 of the file after its header, where tensors of one dtype stand by name."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(weights[key].reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"0x{digest.hexdigest()}"
