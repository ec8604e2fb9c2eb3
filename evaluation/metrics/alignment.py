"""Text guidance: is what the prompt asked for in the image (paper D.3), and how near to it is the image?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchmetrics.multimodal.clip_score import CLIPScore
from transformers import CLIPModel, CLIPProcessor

from ...gcfg.errors import GuidanceError
from . import own_network

Classifier = Callable[[Tensor, str], Tensor]  # (images (N, 3, H, W) uint8, label) -> (N,) bool

# Paper Table 3: each prompt with its label for CLIP, the attribute's text before those it is told from.
TABLE3 = (
    ("wearing glasses", "a face wearing glasses | a face without glasses"),
    ("wearing sunglasses", "a face wearing sunglasses | a face without sunglasses"),
    ("wearing hat", "a face wearing a hat | a face without a hat"),
    ("smiling", "a smiling face | a serious face"),  # "smilling" in the paper
    ("male", "the face of a man | the face of a woman"),
    ("female", "the face of a woman | the face of a man"),
    ("white people", "the face of a white person | the face of a black person | the face of an asian person"),
    ("black people", "the face of a black person | the face of a white person | the face of an asian person"),
    ("asian people", "the face of an asian person | the face of a white person | the face of a black person"),
    ("square face", "a square face | a round face | an oval face"),
)
_BATCH = 64


def load_classifier(
    name: str, weights: Path | None, labels: Sequence[str], device: torch.device | str = "cpu"
) -> Classifier:
    """Return what tells whether a label holds for each of some images.

    Args:
        name: 'clip' (zero-shot), or 'package.module:factory' with factory(weights) -> classifier.
        weights: for 'clip', a local folder; see `load_clip`.
        labels: all that will be asked for, so that a wrong one is told before any image is made.
        device: where it runs; the images it is handed are there too.

    Raises: GuidanceError: if it cannot be made, or a label is none that CLIP can tell.
    """
    if name == "clip":
        return zero_shot(load_clip("alignment.classifier_weights", weights, device), labels)
    classifier = own_network("alignment.classifier", name, weights)
    if not callable(classifier):
        raise GuidanceError(
            f"alignment.classifier {name!r} returned a {type(classifier).__name__}, expected a function of images and "
            "a label."
        )
    if isinstance(classifier, nn.Module):
        classifier.eval().requires_grad_(False).to(device)
    return _checked(classifier, device)


def zero_shot(clip: Clip, labels: Sequence[str]) -> Classifier:
    """Return CLIP as attribute predictor: the attribute holds where its text is nearer than every opposite.

    A label is 'ATTRIBUTE | OPPOSITE', or with several opposites.
    """
    texts = {label: _text_features(clip, label) for label in labels}

    @torch.no_grad()
    def holds(images: Tensor, label: str) -> Tensor:
        nearest = []
        for part in torch.split(images, _BATCH):
            pixels = clip.processor(images=list(part.cpu()), return_tensors="pt")["pixel_values"]
            features = clip.model.get_image_features(pixels.to(clip.model.device))
            nearest.append((features @ texts[label].T).argmax(1))  # an image's own length changes no order
        return (torch.cat(nearest) == 0).cpu()

    return holds


@torch.no_grad()
def _text_features(clip: Clip, label: str) -> Tensor:
    texts = [text.strip() for text in label.split("|")]
    if len(texts) < 2 or not all(texts):
        raise GuidanceError(
            f"alignment.prompts: label {label!r} is none that CLIP can tell, expected 'ATTRIBUTE | OPPOSITE', for "
            "example 'a smiling face | a serious face'."
        )
    tokens = clip.processor(text=texts, return_tensors="pt", padding=True).to(clip.model.device)
    features: Tensor = clip.model.get_text_features(**tokens)
    return normalize(features, dim=1)


def _checked(classifier: Classifier, device: torch.device | str) -> Classifier:
    @torch.no_grad()
    def holds(images: Tensor, label: str) -> Tensor:
        answer = classifier(images.to(device), label)
        if answer.dtype != torch.bool or answer.shape != (len(images),):
            raise GuidanceError(
                f"alignment.classifier gave {answer.dtype} of shape {tuple(answer.shape)} for {len(images)} images, "
                f"expected torch.bool of shape ({len(images)},)."
            )
        return answer.cpu()

    return holds


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
