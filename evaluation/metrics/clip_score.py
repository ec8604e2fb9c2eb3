"""CLIP score: how near an image is to its prompt in CLIP's space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.multimodal.clip_score import CLIPScore
from transformers import CLIPModel, CLIPProcessor

from ...gcfg.errors import GuidanceError

_BATCH = 64


@dataclass(frozen=True)
class Clip:
    """A CLIP of both towers, with what prepares images and texts for it."""

    model: CLIPModel
    processor: CLIPProcessor


def load_clip(setting: str, folder: Path | None, device: torch.device | str = "cpu") -> Clip:
    """Read a CLIP from a local folder in Hugging Face's layout; nothing is fetched.

    Args:
        setting: the config key, for messages.
        folder: with config.json, model.safetensors, preprocessor_config.json and the tokenizer's files.
        device: where it runs.

    Raises: GuidanceError: if it is not there, or not such a folder.
    """
    expected = "expected a local folder of a whole CLIP, such as a copy of openai/clip-vit-large-patch14"
    if folder is None:
        raise GuidanceError(f"{setting} is empty, {expected}.")
    if not folder.is_dir():
        raise GuidanceError(f"{setting} is {str(folder)!r}, {expected}.")
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False).to(device)
        return Clip(model, CLIPProcessor.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # OSError, ValueError, TypeError and more, by what is missing
        reason = str(error).strip().partition("\n")[0]
        raise GuidanceError(f"{setting} is {str(folder)!r}, {expected}: {reason}") from error


def clip_score(images: Tensor, prompts: Sequence[str], clip: Clip) -> float:
    """Return the mean CLIP score of uint8 images, (N, 3, H, W), each with its own prompt.

    100 cos(image, text)        # Hessel et al. 2021, in torchmetrics' scale; below 0 counts as 0 in the mean
    """
    # One process measures: torchmetrics would wait for the others.
    metric = CLIPScore(lambda: (clip.model, clip.processor), sync_on_compute=False)
    device = clip.model.device
    for first in range(0, len(images), _BATCH):
        part = slice(first, first + _BATCH)
        with torch.no_grad():
            metric.update(images[part].to(device), list(prompts[part]))
    return float(metric.compute())
