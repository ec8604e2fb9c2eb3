"""Text guidance: is the attribute that the prompt asked for in the image? (paper D.3)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ...gcfg.errors import GuidanceError
from .clip_score import Clip, load_clip
from .plugin import build

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
        return ZeroShot(load_clip("alignment.classifier_weights", weights, device), labels)
    classifier = build("alignment.classifier", name, weights)
    if not callable(classifier):
        raise GuidanceError(
            f"alignment.classifier {name!r} returned a {type(classifier).__name__}, expected a function of images and "
            "a label."
        )
    if isinstance(classifier, nn.Module):
        classifier.eval().requires_grad_(False).to(device)
    return _checked(classifier, device)


class ZeroShot:
    """CLIP as attribute predictor: the attribute holds where its text is nearer than every opposite.

    A label is 'ATTRIBUTE | OPPOSITE', or with several opposites.
    """

    def __init__(self, clip: Clip, labels: Sequence[str]) -> None:
        self._clip = clip
        self._texts = {label: self._text_features(label) for label in labels}

    @torch.no_grad()
    def __call__(self, images: Tensor, label: str) -> Tensor:
        """Tell for each image whether the label holds."""
        texts = self._texts[label]
        return torch.cat([self._holds(part, texts) for part in torch.split(images, _BATCH)])

    def _holds(self, images: Tensor, texts: Tensor) -> Tensor:
        pixels = self._clip.processor(images=list(images.cpu()), return_tensors="pt")["pixel_values"]
        features = self._clip.model.get_image_features(pixels.to(self._clip.model.device))
        nearest: Tensor = (features @ texts.T).argmax(1)  # an image's own length changes no order
        return (nearest == 0).cpu()

    @torch.no_grad()
    def _text_features(self, label: str) -> Tensor:
        texts = [text.strip() for text in label.split("|")]
        if len(texts) < 2 or not all(texts):
            raise GuidanceError(
                f"alignment.prompts: label {label!r} is none that CLIP can tell, expected 'ATTRIBUTE | OPPOSITE', for "
                "example 'a smiling face | a serious face'."
            )
        tokens = self._clip.processor(text=texts, return_tensors="pt", padding=True).to(self._clip.model.device)
        features: Tensor = self._clip.model.get_text_features(**tokens)
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
