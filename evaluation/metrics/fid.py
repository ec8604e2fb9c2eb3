"""Frechet inception distance: how far a set of images is from the real ones."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from ...gcfg.errors import GuidanceError
from .plugin import build

# Both are bilinear, to 299 pixels: torchmetrics' with antialiasing (its default), TensorFlow's (the first FID) without.
RESIZES = ("torchmetrics", "tensorflow")


def load_extractor(name: str, weights: Path | None) -> nn.Module:
    """Return the network whose features are compared, (N, 3, H, W) uint8 -> (N, D), on the CPU.

    Args:
        name: 'inception', or 'package.module:factory' with factory(weights) -> nn.Module.
        weights: for 'inception', torch-fidelity's weights-inception-2015-12-05-6726825d.pth.

    Raises: GuidanceError: if it cannot be made; nothing is fetched.
    """
    if name == "inception":
        return _inception(weights)
    extractor = build("fid.extractor", name, weights)
    if not isinstance(extractor, nn.Module):
        raise GuidanceError(
            f"fid.extractor {name!r} returned a {type(extractor).__name__}, expected a torch nn.Module."
        )
    return extractor.eval().requires_grad_(False)


def fid(
    real: Iterable[Tensor],
    fake: Iterable[Tensor],
    extractor: nn.Module,
    resize: str,
    device: torch.device | str = "cpu",
) -> float:
    """Return the FID between two sets of images; see `RealImages` for many sets against one.

    Args:
        real: batches of uint8 images, (N, 3, H, W).
        fake: batches of uint8 images, (N, 3, H, W).
        extractor: as `load_extractor` gives it.
        resize: 'torchmetrics' or 'tensorflow' with the Inception network; 'none' with any other, which takes images as
            they are.
        device: where the extractor runs.
    """
    return RealImages(real, extractor, resize, device).fid(fake)


def choose_resize(extractor: nn.Module, resize: str) -> None:
    """Set how the Inception network resizes.

    Raises: GuidanceError: if the resize does not suit the extractor.
    """
    """Set how an extractor brings images to its size.

    Raises: GuidanceError: if `resize` does not suit it.
    """
    known = RESIZES if isinstance(extractor, NoTrainInceptionV3) else ("none",)
    if resize not in known:
        expected = " or ".join(repr(each) for each in known)
        raise GuidanceError(f"fid.resize is {resize!r}, expected {expected} with this fid.extractor.")
    if isinstance(extractor, NoTrainInceptionV3):
        extractor.use_antialias = resize == "torchmetrics"


class RealImages:
    """The statistics of the real images, taken once and compared with many sets.

    Args: see `fid`.

    Raises: GuidanceError: if `resize` does not suit the extractor, or its features cannot be compared.
    """

    def __init__(
        self, real: Iterable[Tensor], extractor: nn.Module, resize: str, device: torch.device | str = "cpu"
    ) -> None:
        choose_resize(extractor, resize)
        batches = iter(real)
        first = next(batches, None)
        if first is None:
            raise GuidanceError("fid.images holds no image, expected at least two.")
        features = _Features(extractor, device)
        features.num_features = features(first[:1]).shape[1]
        # One process measures: torchmetrics would wait for the others.
        self._metric = FrechetInceptionDistance(features, reset_real_features=False, sync_on_compute=False)
        self.count = self._take(chain([first], batches), real=True)
        if self.count < 2:
            raise GuidanceError("fid.images holds one image, expected at least two.")

    def fid(self, fake: Iterable[Tensor]) -> float:
        """Return the FID of batches of uint8 images, (N, 3, H, W)."""
        self._metric.reset()
        if (count := self._take(fake, real=False)) < 2:
            raise GuidanceError(f"The FID of {count} image(s) is not defined, expected at least two; raise fid.count.")
        return float(self._metric.compute())

    def _take(self, batches: Iterable[Tensor], real: bool) -> int:
        count = 0
        for images in batches:
            self._metric.update(images, real=real)
            count += len(images)
        return count


class _Features(nn.Module):
    """An extractor's features in float64 on the CPU, where torchmetrics sums them."""

    num_features: int

    def __init__(self, extractor: nn.Module, device: torch.device | str) -> None:
        super().__init__()
        self.extractor = extractor.to(device)
        self.device = device

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.extractor(images.to(self.device))
        if features.ndim != 2 or len(features) != len(images):
            raise GuidanceError(
                f"fid.extractor gave features of shape {tuple(features.shape)} for {len(images)} images, expected "
                f"({len(images)}, D)."
            )
        if not features.isfinite().all():
            raise GuidanceError("fid.extractor gave features that are not finite; check fid.extractor_weights.")
        return features.cpu().double()


def _inception(weights: Path | None) -> nn.Module:
    wanted = "expected torch-fidelity's weights-inception-2015-12-05-6726825d.pth as a local file"
    if weights is None:
        raise GuidanceError(f"fid.extractor_weights is empty, {wanted}; nothing is fetched.")
    try:
        torch.load(weights, weights_only=True, map_location="cpu")  # the constructor would run any code in the file
        return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
    except Exception as error:  # torch raises what it likes over a bad file
        reason = str(error).strip().partition("\n")[0]
        raise GuidanceError(f"fid.extractor_weights is {str(weights)!r}, {wanted}: {reason}") from error
