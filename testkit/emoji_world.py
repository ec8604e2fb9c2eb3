"""What the world of emoji (`reproduction/emoji`) has otherwise than the small world, whose other files it shares."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ..gcfg.concept_file import features, fold
from . import models
from .models import StateDict
from .small_world import FACTOR, TRAINED, half, read
from .widen import widen
from .word_encoder import word_encoder

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


def concept(group: str = "face") -> StateDict:
    """Return the null-text concept UNet of a group, folded: faces or animals in 3D, learned from pictures alone."""
    small = read(f"concept_{group}")
    return half(widen(fold(small, features(small), CONTEXT), FACTOR))


def clip() -> StateDict:
    """Return the text encoder, a CLIP-L whose weights follow a rule."""
    return models.with_all_layers(models.to_dtype(word_encoder(), torch.float16))


def write_inputs(folder: Path) -> None:
    """Write the workflows' input pictures: a face in 3D, and one whose alpha channel is 0 around its thing."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(TRUTH, folder / "portrait.png")
    shutil.copyfile(PLACED, folder / "full-body.png")
