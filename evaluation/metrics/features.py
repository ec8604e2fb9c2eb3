"""Images by a network's features: Frechet inception distance, and how much the images of one prompt differ."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pdist
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from ...gcfg.errors import GuidanceError
from . import own_network


def load_extractor(name: str, weights: Path | None, resize: str) -> nn.Module:
    """Return the network whose features are compared, (N, 3, H, W) uint8 -> (N, D), on the CPU.

    Args:
        name: 'inception', or 'package.module:factory' with factory(weights) -> nn.Module.
        weights: for 'inception', torch-fidelity's weights-inception-2015-12-05-6726825d.pth.
        resize: to Inception's 299 pixels: bilinear, antialiased ('torchmetrics') or not ('tensorflow', as in the first
            FID); 'none' with any other network, which takes images as they are.

    Raises: GuidanceError: if it cannot be made, or `resize` does not suit it; nothing is fetched.
    """
    extractor = _inception(weights) if name == "inception" else own_network("fid.extractor", name, weights)
    if not isinstance(extractor, nn.Module):
        raise GuidanceError(
            f"fid.extractor {name!r} returned a {type(extractor).__name__}, expected a torch nn.Module."
        )
    known = ("torchmetrics", "tensorflow") if isinstance(extractor, NoTrainInceptionV3) else ("none",)
    if resize not in known:
        expected = " or ".join(repr(each) for each in known)
        raise GuidanceError(f"fid.resize is {resize!r}, expected {expected} with this fid.extractor.")
    if isinstance(extractor, NoTrainInceptionV3):
        extractor.use_antialias = resize == "torchmetrics"
    return extractor.eval().requires_grad_(False)


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


class RealFeatures:
    """The statistics of the real images' features, taken once and compared with many sets.

    Args:
        real: batches of uint8 images, (N, 3, H, W).
        extractor: as `load_extractor` gives it.
        device: where it runs.

    Raises: GuidanceError: if there are fewer than two images, or their features cannot be compared.
    """

    def __init__(self, real: Iterable[Tensor], extractor: nn.Module, device: torch.device | str = "cpu") -> None:
        batches = iter(real)
        first = next(batches, None)
        if first is None:
            raise GuidanceError("fid.images holds no image, expected at least two.")
        features = _Features(extractor, device)
        features.num_features = features(first[:1]).shape[1]
        # One process measures: torchmetrics would wait for the others.
        self._metric = FrechetInceptionDistance(features, reset_real_features=False, sync_on_compute=False)
        if self._take(chain([first], batches), real=True) < 2:
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


def diversity(features: Tensor) -> float:
    """Return the mean Euclidean distance between two of the features, (N, D) with N > 1."""
    return float(pdist(features.double()).mean())


def vendi(features: Tensor) -> float:
    """Return the effective number of different images among N, from 1 to N, of features (N, D).

    exp(-sum_k l_k log l_k),  l_k the eigenvalues of K / N,  K the features' cosine similarities
                                                                    # Friedman & Dieng 2023, Eq. 2
    """
    unit = normalize(features.double(), dim=1)
    shares = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp(min=0)
    return float(torch.special.entr(shares).sum().exp())
