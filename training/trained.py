"""A run's folder seen from outside: what its checkpoints say, and the model file made from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..gcfg.errors import GuidanceError
from . import checkpoints
from .checkpoints import Checkpoint
from .config import Config
from .export import export_unet, model_spec
from .material import Material

CHECKPOINTS = "checkpoints"

DType = Literal["fp16", "bf16", "fp32"]
Weights = Literal["ema", "raw"]


def manifest(config: Config, material: Material) -> dict[str, Any]:
    """Return what a checkpoint says of its run: enough to go on with it, and to export it."""
    prior = material.prior
    return {
        "format": 1,
        "config": config.model_dump(mode="json"),
        "prior": prior.fingerprint,
        "data": material.fingerprint,
        "images": material.images,
        "family": prior.family,
        "prediction": prior.prediction,
        "zero_terminal_snr": prior.zero_terminal_snr,
        "context_dim": prior.context_dim,
    }


def export_run(
    source: Path,
    destination: Path | None = None,
    form: Literal["folded", "compact"] = "folded",
    weights: Weights = "ema",
    dtype: DType = "fp16",
) -> Path:
    """Write the model file of a run.

    Args:
        source: a run's folder, of which the newest good checkpoint is taken, or one checkpoint's folder.
        destination: the file; by default `output.name`, a compact one's with "-compact" after it, in the run's folder.
        form: of a null-text model; one that reads text has only its ordinary form.
        weights: the average, or the last step's.
        dtype: of the file.

    Returns: the file's path.
    Raises: GuidanceError: if there is no checkpoint, it has no average, or its model has no compact form.
    """
    found = find_checkpoint(source)
    about = found.manifest
    run = found.folder.parent.parent
    config = about["config"]
    null_text = config["model"]["mode"] == "null_text"
    if form == "compact" and not null_text:
        raise GuidanceError(
            f"{str(source)!r} is a run of mode 'prompt', whose UNet reads text, expected a null-text one for --form "
            "compact; leave --form out."
        )
    name = config["output"]["name"] + ("-compact" if form == "compact" else "")
    path = destination or run / f"{name}.safetensors"
    export_unet(
        _weights(found, weights),
        path,
        form if null_text else "ordinary",
        dtype,
        about["context_dim"],
        {
            **model_spec(about["family"], config["output"]["name"], config["data"]["resolution"], about["prediction"]),
            **_recipe(about, weights),
        },
        about["zero_terminal_snr"],
    )
    return path


def find_checkpoint(source: Path) -> Checkpoint:
    """Return the newest good checkpoint of a run's folder, or the checkpoint that the folder is.

    Raises: GuidanceError: if there is none.
    """
    if (source / checkpoints.MANIFEST).is_file():
        found = checkpoints.read(source)
    else:
        found = checkpoints.newest(source / CHECKPOINTS)
    if found is None:
        raise GuidanceError(
            f"{str(source)!r} holds no whole checkpoint, expected a run's output.folder or one of its checkpoints."
        )
    return found


def _weights(found: Checkpoint, weights: Weights) -> dict[str, Tensor]:
    unet = found.tensors("unet")
    if weights == "raw":
        return unet
    if not found.has("ema"):
        if found.manifest["config"]["train"]["ema_decay"]:
            raise GuidanceError(f"{str(found.folder)!r} has no averaged weights; export with --weights raw.")
        return unet
    return {**unet, **found.tensors("ema")}


def _recipe(about: Mapping[str, Any], weights: Weights) -> dict[str, str]:
    """Return how the model came to be, in words for its metadata."""
    config = about["config"]
    model = config["model"]
    recipe = {
        "mode": model["mode"],
        "null_text": Path(model["null_text"]).name if model["mode"] == "null_text" else "",
        "null_text_trained": str(model["train_null_text"]).lower() if model["mode"] == "null_text" else "",
        "prompt": model["prompt"],
        "weights": weights if about["config"]["train"]["ema_decay"] else "raw",
        "steps": str(about["step"]),
        "batch_size": str(config["train"]["batch_size"]),
        "learning_rate": str(config["train"]["learning_rate"]),
        "images": str(about["images"]),
        "prior": Path(model["checkpoint"]).name,
        "prior_sha256": about["prior"],
    }
    return {f"gcfg.{key}": value for key, value in recipe.items() if value}
