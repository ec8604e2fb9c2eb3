"""The metrics of a config, with what they compare with: each is made when it is first asked for, and kept."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor, nn

from .config import Config, LabelledPrompt
from .images import RealImages
from .metrics.alignment import TABLE3, Classifier, Clip, clip_score, load_classifier, load_clip
from .metrics.features import RealFeatures, load_extractor

_BATCH = 64  # real images that are read at once


def labelled_prompts(config: Config) -> tuple[LabelledPrompt, ...]:
    """Return the prompts of the alignment task."""
    prompts = config.alignment.prompts
    if prompts == "table3":
        return tuple(LabelledPrompt(prompt=prompt, label=label) for prompt, label in TABLE3)
    return prompts


class Measures:
    """The metrics of an evaluation, for the one process that measures.

    Args:
        config: the evaluation's.
        device: where networks run.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self._device = config, device

    @cached_property
    def extractor(self) -> nn.Module:
        """The network whose features FID and diversity compare."""
        settings = self._config.fid
        weights = self._config.path(settings.extractor_weights)
        return load_extractor(settings.extractor, weights, settings.resize).to(self._device)

    @cached_property
    def real(self) -> RealFeatures:
        """The real images' statistics."""
        images = RealImages(self._config.path(self._config.fid.images), "fid.images", self._config.sampling.size)
        return RealFeatures(images.batches(_BATCH), self.extractor, self._device)

    @cached_property
    def held_out(self) -> dict[str, float]:
        """FID and number of real images that no model learned from, at most as many as a method makes; {} without."""
        settings = self._config.fid
        if not settings.held_out:
            return {}
        images = RealImages(self._config.path(settings.held_out), "fid.held_out", self._config.sampling.size)
        images.paths = images.paths[: settings.count]
        return {"held_out_fid": self.real.fid(images.batches(_BATCH)), "held_out_count": len(images.paths)}

    @cached_property
    def classifier(self) -> Classifier:
        """What tells whether an attribute is there."""
        settings = self._config.alignment
        labels = [prompt.label for prompt in labelled_prompts(self._config)]
        if self._config.sweep.recipe:
            labels.append(self._config.sweep.label)
        weights = self._config.path(settings.classifier_weights)
        return load_classifier(settings.classifier, weights, labels, self._device)

    @cached_property
    def clip(self) -> Clip | None:
        """The CLIP whose score stands beside the alignment, if one is named."""
        folder = self._config.path(self._config.alignment.clip)
        return load_clip("alignment.clip", folder, self._device) if folder else None

    def aligned(self, images: Tensor, label: str) -> float:
        """Return the share of images that show what the label says."""
        return float(self.classifier(images, label).float().mean())

    def clip_score(self, images: Tensor, prompt: str) -> float | None:
        """Return the mean CLIP score of one prompt's images; None without a CLIP."""
        return clip_score(images, [prompt] * len(images), self.clip) if self.clip else None

    @torch.no_grad()
    def features(self, batches: Iterable[Tensor]) -> Tensor:
        """Return the extractor's features, (N, D)."""
        return torch.cat([self.extractor(images.to(self._device)).float().cpu() for images in batches])
