"""The trained models of the world of emoji (`reproduction/emoji` makes them), as files that stock loaders take.

They stand in half precision at a fifth of Stable Diffusion's width; `widen` gives them its 320 channels, and what
loaders want besides is filled up with zeros.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..gcfg.concept_file import features, fold
from . import models
from .comfyui import PACK
from .models import StateDict
from .widen import widen, widen_lora
from .word_encoder import word_encoder

TRAINED = PACK / "demo" / "trained"
FACTOR = 5
SIZE = 96  # of its pictures, in pixels
TRUTH = TRAINED / "truth.png"  # a face in the concept's look that no network has seen
PLACED = TRAINED / "placed.png"  # a drawing on a background, whose alpha channel is 0 around its thing
CONTEXT = 768

# Things that no concept was shown, as prompts.
WORDS = (
    "a smiling face with sunglasses",
    "a cowboy hat face",
    "a face with tears of joy",
    "a smiling face with heart eyes",
    "a smiling face with halo",
    "a thinking face",
    "a sleeping face",
    "a nauseated face",
    "a winking face with tongue",
    "a face with medical mask",
)
# What the workflows' prompts are in a world of emoji.
PROMPTS = {
    "sunflower in Van Gogh style": "a sunflower, Blob style",
    "sunflower": "a sunflower",
    "in Van Gogh style": "Blob style",
    "a girl with long hair, detailed eyes, looking at the viewer": "a picture of a face, a pleading face",
    "a full-body photo of a woman in a park": "a penguin, Noto style, on a green background",
    "a photo of a garden": "a picture of a plant, on a green background",
    "red flowers": "a rose",
    "a portrait photo of a young man": "a picture of a face",
    "smiling": "a smiling face",
    "sunglasses": "a face with sunglasses",
    "a portrait photo": "a picture of a face",
    "a portrait of an old man with a white beard": "a picture of a face, an angry face",
    "a portrait of a woman with red hair, wearing glasses": "a cowboy hat face",
    "a photo of face": "a picture of a face",
    "a garden with a stone wall, summer evening": "a picture of a plant, on a green background",
    "an old man with a white beard, sitting on a bench": "a picture of a face, an angry face",
    "sunglasses, hat": "a face with sunglasses",
    "a woman with red hair, reading a book": "a picture of a face, a smiling face",
    "glasses, jewellery": "a nerd face",
    "4.5 | sunflower\n3 | in Van Gogh style\n-1.5 @0-60% | blurry": (
        "4.5 | a sunflower\n3 | Blob style\n-1.5 @0-60% | on a gray background"
    ),
    "a photo of embedding:ffhq-face": "a picture of a embedding:ffhq-face",
}


def prior() -> StateDict:
    """Return the prior's UNet: 290 things in five flat looks, by prompt."""
    return _wide("prior")


def concept(group: str = "face") -> StateDict:
    """Return the null-text concept UNet of a group, folded: faces or animals in 3D, learned from pictures alone."""
    small = _read(f"concept_{group}")
    return _half(widen(fold(small, features(small), CONTEXT), FACTOR))


def custom() -> StateDict:
    """Return a fine-tuned UNet that reads text: DreamBooth on the faces."""
    return _wide("dreambooth")


def lora() -> StateDict:
    """Return a LoRA on the prior's attention, trained on the faces, in kohya's keys."""
    return {name: w.half() if w.is_floating_point() else w for name, w in widen_lora(_read("lora"), FACTOR).items()}


def embedding() -> StateDict:
    """Return a Textual Inversion of the faces: one word's embedding, `emb_params` (1, 768)."""
    return _read("textual_inversion")


def controlnet() -> StateDict:
    """Return the prior's canny ControlNet, `control_model.` first."""
    prefix = "control_model."
    bare = {name.removeprefix(prefix): tensor for name, tensor in _read("controlnet").items()}
    return {prefix + name: tensor for name, tensor in _half(widen(bare, FACTOR)).items()}


def vae() -> StateDict:
    """Return the autoencoder, a TAESD."""
    return models.full_taesd(_read("autoencoder"))


def clip() -> StateDict:
    """Return the text encoder, a CLIP-L whose weights follow a rule."""
    return models.with_all_layers(models.to_dtype(word_encoder(), torch.float16))


def write_inputs(folder: Path) -> None:
    """Write the workflows' input pictures: a face in 3D, and one whose alpha channel is 0 around its thing."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(TRUTH, folder / "portrait.png")
    shutil.copyfile(PLACED, folder / "full-body.png")


def _wide(name: str) -> StateDict:
    return _half(widen(_read(name), FACTOR))


def _read(name: str) -> StateDict:
    return load_file(TRAINED / f"{name}.safetensors")


def _half(state_dict: StateDict) -> StateDict:
    return models.to_dtype(state_dict, torch.float16)
