"""The trained models of the world of emoji (`reproduction/` makes them), as files that stock loaders take.

They stand in `trained/` at a fifth of Stable Diffusion's width and in half precision; `widen` gives them its 320
channels, and what loaders want besides is filled up with zeros.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from PIL import Image
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
RANK = 8  # of the LoRA that is extracted
TRUTHS = "truths.png"  # the things of `WORDS` in the concept's look, which no network that learned it has seen: a row
PLACED = "placed.png"  # a drawing on a background, whose alpha channel is 0 around its thing
_CONTEXT = 768

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
    """Return the prior's UNet: flat drawings in five looks, by prompt."""
    return wide("prior")


def concept(group: str = "face") -> StateDict:
    """Return the null-text concept UNet of a group, folded: faces or animals in 3D, learned from pictures alone."""
    small = read(f"concept_{group}")
    return half(widen(fold(small, features(small), _CONTEXT), FACTOR))


def custom() -> StateDict:
    """Return a fine-tuned UNet that reads text: DreamBooth on the faces."""
    return wide("dreambooth")


def lora() -> StateDict:
    """Return a LoRA on the prior's attention, trained on the faces, in kohya's keys."""
    return {name: w.half() if w.is_floating_point() else w for name, w in widen_lora(read("lora"), FACTOR).items()}


def extracted_lora() -> StateDict:
    """Return a second LoRA, in kohya's keys: the part of low rank of what DreamBooth changed in the prior's blocks."""
    before, after = read("prior"), read("dreambooth")
    found = {}
    for name in [name for name, weight in before.items() if "transformer_blocks" in name and weight.ndim == 2]:
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        out, strength, into = torch.linalg.svd(after[name].float() - before[name].float(), full_matrices=False)
        found[f"{key}.lora_up.weight"] = out[:, :RANK] * strength[:RANK]
        found[f"{key}.lora_down.weight"] = into[:RANK]
    return half(widen_lora(found, FACTOR))


def embedding() -> StateDict:
    """Return a Textual Inversion of the faces: one word's embedding, `emb_params` (1, 768)."""
    return read("textual_inversion")


def controlnet() -> StateDict:
    """Return the prior's canny ControlNet, `control_model.` first."""
    prefix = "control_model."
    bare = {name.removeprefix(prefix): tensor for name, tensor in read("controlnet").items()}
    return {prefix + name: tensor for name, tensor in half(widen(bare, FACTOR)).items()}


def vae() -> StateDict:
    """Return the autoencoder, a TAESD."""
    return models.full_taesd(read("autoencoder"))


def clip() -> StateDict:
    """Return the text encoder, a CLIP-L whose weights follow a rule."""
    return models.with_all_layers(models.to_dtype(word_encoder(), torch.float16))


def truths() -> list[Image.Image]:
    """Return the real pictures of the things of `WORDS`."""
    with Image.open(TRAINED / TRUTHS) as row:
        return [row.crop((x, 0, x + row.height, row.height)) for x in range(0, row.width, row.height)]


def write_inputs(folder: Path) -> None:
    """Write the workflows' input pictures: a face in 3D, and one whose alpha channel is 0 around its thing."""
    folder.mkdir(parents=True, exist_ok=True)
    truths()[1].save(folder / "portrait.png")
    shutil.copyfile(TRAINED / PLACED, folder / "full-body.png")


def wide(name: str) -> StateDict:
    """Return a trained UNet at Stable Diffusion's width, in half precision."""
    return half(widen(read(name), FACTOR))


def read(name: str) -> StateDict:
    """Return a trained file as it stands in the repository."""
    return load_file(TRAINED / f"{name}.safetensors")


def half(state_dict: StateDict) -> StateDict:
    """Return it in half precision."""
    return models.to_dtype(state_dict, torch.float16)
