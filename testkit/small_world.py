"""The trained models of the small world (`reproduction/` makes them), as files that stock loaders take.

They stand in `trained/` at a fifth of Stable Diffusion's width and in half precision; `widen` gives them its 320
channels, and what loaders want besides is filled up with zeros.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from . import models
from .comfyui import PACK
from .models import StateDict
from .widen import widen, widen_lora

TRAINED = PACK / "demo" / "trained"
FACTOR = 5
SIZE = 64  # of its pictures, in pixels
RANK = 8  # of the LoRA that is extracted
SCAN = TRAINED / "scan.png"  # one of the scans that no network has seen

CLIP_SEED, CLIP_LAYERS = 1, 2  # of the text encoder, which is not trained

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# What the workflows' prompts are in a world of digits.
PROMPTS = {
    "sunflower in Van Gogh style": "a red seven",
    "sunflower": "seven",
    "in Van Gogh style": "a photo of a digit, red",
    "a girl with long hair, detailed eyes, looking at the viewer": "a photo of a digit",
    "a full-body photo of a woman in a park": "a white three on a black background",
    "a photo of a garden": "a photo of a digit",
    "red flowers": "a photo of a digit, red",
    "a portrait photo of a young man": "a photo of a digit",
    "smiling": "white",
    "sunglasses": "a photo of a digit, red",
    "a portrait photo": "a photo of a digit",
    "a portrait of an old man with a white beard": "a photo of a digit, five",
    "a portrait of a woman with red hair, wearing glasses": "seven",
    "a photo of face": "a photo of a digit",
    "a garden with a stone wall, summer evening": "a three on a white background",
    "an old man with a white beard, sitting on a bench": "a photo of a digit, red",
    "sunglasses, hat": "a photo of a digit, blue",
    "a woman with red hair, reading a book": "a photo of a digit, green",
    "glasses, jewellery": "a photo of a digit, red",
    "4.5 | sunflower\n3 | in Van Gogh style\n-1.5 @0-60% | blurry": (
        "4.5 | seven\n3 | a photo of a digit, red\n-1.5 @0-60% | a photo of a digit, blue"
    ),
    "a photo of embedding:ffhq-face": "a photo of a embedding:ffhq-face",
}


def prior() -> StateDict:
    """Return the prior's UNet: printed digits and shapes in six colours, by prompt."""
    return wide("prior")


def concept() -> StateDict:
    """Return the null-text concept UNet, folded: handwriting, learned from scans alone."""
    return wide("concept")


def custom() -> StateDict:
    """Return a fine-tuned UNet that reads text: DreamBooth on the scans."""
    return wide("dreambooth")


def lora() -> StateDict:
    """Return a LoRA on the prior's attention, trained on the scans, in kohya's keys."""
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
    """Return a Textual Inversion of the scans: one word's embedding, `emb_params` (1, 768)."""
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
    """Return the text encoder, a CLIP-L of random weights."""
    return models.with_all_layers(models.clip_l_state_dict(CLIP_SEED, torch.float16, CLIP_LAYERS))


def write_inputs(folder: Path) -> None:
    """Write the workflows' input pictures: a scan, and a printed digit whose alpha channel is 0 around it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(SCAN, folder / "portrait.png")
    picture, mask = Image.new("RGB", (SIZE, SIZE)), Image.new("L", (SIZE, SIZE), 255)
    middle = (SIZE / 2, SIZE / 2)
    ImageDraw.Draw(picture).text(middle, "3", "white", ImageFont.load_default(0.9 * SIZE), anchor="mm")
    ImageDraw.Draw(mask).ellipse((0.1 * SIZE, 0.05 * SIZE, 0.9 * SIZE, 0.95 * SIZE), fill=0)
    picture.putalpha(mask)
    picture.save(folder / "full-body.png")


def wide(name: str) -> StateDict:
    """Return a trained UNet at Stable Diffusion's width, in half precision."""
    return half(widen(read(name), FACTOR))


def read(name: str) -> StateDict:
    """Return a trained file as it stands in the repository."""
    return load_file(TRAINED / f"{name}.safetensors")


def half(state_dict: StateDict) -> StateDict:
    """Return it in half precision."""
    return models.to_dtype(state_dict, torch.float16)
