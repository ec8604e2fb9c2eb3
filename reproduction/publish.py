"""The trained models as the small files that stand in the repository, which the demo widens for ComfyUI."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..training.files import whole_file
from .scans import TRAINING, read_scans
from .world import AUTOENCODER, CLASSIFIER, CONTROLNET, PRIOR

MODELS = {  # what becomes of each -> where its training left it, below methods/
    "concept": "concept/concept",
    "dreambooth": "dreambooth/dreambooth",
    "lora": "lora/lora-lora",
    "textual_inversion": "textual_inversion/textual_inversion",
}
_UNET = "model.diffusion_model."
_SCAN = TRAINING + 3  # of those that no network has seen


def publish(folder: Path, destination: Path) -> None:
    """Write the models of a reproduction's folder in half precision, and one scan, into `destination`."""
    prior = load_file(folder / PRIOR)
    _write({key.removeprefix(_UNET): w for key, w in prior.items() if key.startswith(_UNET)}, destination / "prior")
    _write(load_file(folder / AUTOENCODER), destination / "autoencoder")
    _write(load_file(folder / CONTROLNET), destination / "controlnet")
    _write(load_file(folder / CLASSIFIER), destination / "classifier")
    for name, place in MODELS.items():
        _write(load_file(folder / "methods" / f"{place}.safetensors"), destination / name)
    read_scans()[0][_SCAN].save(destination / "scan.png")


def _write(state_dict: dict[str, torch.Tensor], stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(stem.with_suffix(".safetensors")) as beside:
        save_file({name: w.half() if w.is_floating_point() else w for name, w in state_dict.items()}, beside)
