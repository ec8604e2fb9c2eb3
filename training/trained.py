"""A run's folder seen from outside: what its checkpoints say, and the model files made from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ..gcfg.errors import GuidanceError
from . import checkpoints
from .checkpoints import Checkpoint
from .config import ModelConfig
from .export import DType, export_part, export_unet, model_spec
from .material import Material
from .methods.adapters import lora_file
from .methods.network import ordinary_unet
from .methods.textual_inversion import EMBEDDING_KEY, TOKEN
from .prior.model import open_prior

Weights = Literal["ema", "raw"]


def manifest(material: Material) -> dict[str, Any]:
    """Return what a checkpoint says of its run: enough to go on with it, and to export it."""
    prior = material.prior
    return {
        "format": 1,
        "config": material.config.model_dump(mode="json"),
        "prior": prior.fingerprint,
        "data": material.latents.fingerprint,
        "images": len(material.latents),
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
    """Write the model file of a run: a UNet, or the embedding of a Textual Inversion; beside a LoRA's UNet the LoRA.

    Args:
        source: a run's folder, of which the newest good checkpoint is taken, or one checkpoint's folder.
        destination: the file; by default `output.name`, a compact one's with "-compact" after it, in the run's folder.
            A LoRA has "-lora" after it.
        form: of a null-text model; one that reads text has only its ordinary form.
        weights: the average, or the last step's.
        dtype: of the file.

    Returns: the file's path.
    Raises: GuidanceError: if there is no checkpoint, it has no average, its model has no compact form, or the prior
        that it was merged with is gone.
    """
    found = find_checkpoint(source)
    about = found.manifest
    run = found.folder.parent.parent
    config = about["config"]
    model = ModelConfig.model_validate(config["model"])
    null_text = model.mode == "null_text"
    if form == "compact" and not null_text:
        raise GuidanceError(
            f"{str(source)!r} is a run of mode 'prompt', whose UNet reads text, expected a null-text one for --form "
            "compact; leave --form out."
        )
    name = config["output"]["name"] + ("-compact" if form == "compact" else "")
    path = destination or run / f"{name}.safetensors"
    trained = _weights(found, weights)
    metadata = {
        **model_spec(about["family"], config["output"]["name"], config["data"]["resolution"], about["prediction"]),
        **_recipe(about, model, weights),
    }
    if model.method == "textual_inversion":
        export_part({EMBEDDING_KEY: trained[TOKEN]}, path, dtype, metadata, "textual-inversion")
        return path
    export_unet(
        _unet(about, model, trained),
        path,
        form if null_text else "ordinary",
        dtype,
        about["context_dim"],
        metadata,
        about["zero_terminal_snr"],
    )
    if model.method == "lora":
        beside = path.with_name(f"{path.stem}-lora{path.suffix}")
        export_part(lora_file(trained), beside, dtype, metadata, "lora")
    return path


def find_checkpoint(source: Path) -> Checkpoint:
    """Return the newest good checkpoint of a run's folder, or the checkpoint that the folder is.

    Raises: GuidanceError: if there is none.
    """
    read = checkpoints.read if (source / checkpoints.MANIFEST).is_file() else checkpoints.newest
    found = read(source)
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


def _unet(about: Mapping[str, Any], model: ModelConfig, trained: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the whole UNet of which a checkpoint holds what was trained."""
    if model.method == "full":
        return trained
    prior = open_prior(Path(model.checkpoint))
    if prior.fingerprint != about["prior"]:
        raise GuidanceError(
            f"model.checkpoint {model.checkpoint!r} holds another UNet than at the start of the run, expected the one "
            f"that method {model.method!r} has changed; put it back."
        )
    return ordinary_unet(prior, model, trained)


def _recipe(about: Mapping[str, Any], model: ModelConfig, weights: Weights) -> dict[str, str]:
    """Return how the model came to be, in words for its metadata."""
    config = about["config"]
    null_text = model.mode == "null_text"
    recipe = {
        "mode": model.mode,
        "method": "" if null_text else model.method,
        "trained_parameters": str(about.get("trained_parameters", "")),  # early checkpoints do not say it
        "null_text": Path(model.null_text).name if null_text else "",
        "null_text_trained": str(model.train_null_text).lower() if null_text else "",
        "prompt": model.prompt,
        "token": model.token,
        "initializer": model.initializer,
        "rank": str(model.rank) if model.method == "lora" else "",
        "oft_block_size": str(model.oft_block_size) if model.method == "oft" else "",
        "weights": weights if about["config"]["train"]["ema_decay"] else "raw",
        "steps": str(about["step"]),
        "batch_size": str(config["train"]["batch_size"]),
        "learning_rate": str(config["train"]["learning_rate"]),
        "images": str(about["images"]),
        "prior": Path(model.checkpoint).name,
        "prior_sha256": about["prior"],
    }
    return {f"gcfg.{key}": value for key, value in recipe.items() if value}
