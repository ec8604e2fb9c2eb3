"""The trained models as the small files that stand in the repository, in half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...gcfg.concept_file import compact
from ...gcfg.errors import GuidanceError
from ...training.files import whole_file
from .pictures import SIDE, Drawings, Placement, compose, read_drawings
from .settings import Settings
from .vendors import THREE_D
from .world import AUTOENCODER, CONCEPTS, CONTROLNET, JUDGE, PRIOR

TRUTH, PLACED = (THREE_D, "cowboy-hat-face", "white"), ("Noto", "penguin", "green")  # the demo's input pictures
MOST = 40 << 20  # bytes that all of them may take
_UNET = "model.diffusion_model."
# What becomes of each -> where its training left it, below methods/CONCEPT/NAME-SEED/.
_METHODS = {
    "dreambooth": ("face", "dreambooth", "dreambooth"),
    "lora": ("face", "lora", "lora-lora"),
    "textual_inversion": ("face", "textual_inversion", "textual_inversion"),
}


def publish(folder: Path, settings: Settings, destination: Path) -> int:
    """Write the models of a reproduction's folder; return the bytes that they take.

    Raises: GuidanceError: if these are more than the repository may hold.
    """
    seed = settings.methods.seeds[0]
    prior = load_file(folder / PRIOR)
    models = {
        "prior": {name.removeprefix(_UNET): w for name, w in prior.items() if name.startswith(_UNET)},
        "autoencoder": load_file(folder / AUTOENCODER),
        "controlnet": load_file(folder / CONTROLNET),
        "judge": load_file(folder / JUDGE),
    }
    for concept in CONCEPTS:
        path = folder / "methods" / concept / f"concept-{seed}" / "concept.safetensors"
        models[f"concept_{concept}"] = compact(load_file(path))
    for name, (concept, method, file) in _METHODS.items():
        models[name] = load_file(folder / "methods" / concept / f"{method}-{seed}" / f"{file}.safetensors")
    destination.mkdir(parents=True, exist_ok=True)
    _write_pictures(read_drawings(folder / "drawings"), destination)
    size = sum(_write(model, destination / f"{name}.safetensors") for name, model in models.items())
    if size > MOST:
        raise GuidanceError(f"The models take {size:,} bytes, expected at most {MOST:,}; make the networks narrower.")
    return size


def _write_pictures(drawings: Drawings, destination: Path) -> None:
    """Write what the demo's workflows start from: a held-out face in 3D, and a thing with a mask around it."""
    truth, placed = (_picture(drawings, *what) for what in (TRUTH, PLACED))
    truth.save(destination / "truth.png")
    mask = Image.new("L", (SIDE, SIDE), 255)
    ImageDraw.Draw(mask).ellipse((0.05 * SIDE, 0.05 * SIDE, 0.95 * SIDE, 0.95 * SIDE), fill=0)
    placed.putalpha(mask)
    placed.save(destination / "placed.png")


def _picture(drawings: Drawings, look: str, name: str, background: str) -> Image.Image:
    row = next(row for row in drawings.rows if (row.look, row.thing.name) == (look, name))
    pixels = compose(drawings, [row], [Placement(background)])[0].permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels.numpy()))


def _write(state_dict: dict[str, Tensor], path: Path) -> int:
    half = {name: (w.half() if w.is_floating_point() else w).contiguous() for name, w in state_dict.items()}
    with whole_file(path) as beside:
        save_file(half, beside)
    return path.stat().st_size
