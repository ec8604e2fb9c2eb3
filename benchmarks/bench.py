"""What the sections share: the models, how large everything is, and what to time with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import comfy.model_management as management
import torch
from torch import Tensor

from .harness import Clock
from .models import Untrained


@dataclass(frozen=True)
class Bench:
    """One benchmark.

    Attributes:
        folder: of the model files.
        output: folder of what is drawn.
        layout: of the untrained models.
        size: of the image, in pixels.
        batch: images in a latent batch; None where nobody said.
        repeats: rounds of everything that is timed.
        cpu: whether models run on the CPU.
        cpu_time: see `Clock`.
        threads: of torch on the CPU.
        flags: of ComfyUI's command line, without their dashes.
    """

    folder: Path
    output: Path
    layout: str
    size: int
    batch: int | None
    repeats: int
    cpu: bool
    cpu_time: bool = False
    threads: int = 1
    flags: Sequence[str] = ()

    @cached_property
    def models(self) -> Untrained:
        """The untrained models."""
        models = Untrained(self.folder, self.layout)
        models.make_files()
        return models

    @cached_property
    def clock(self) -> Clock:
        """Of the device that ComfyUI runs its models on."""
        return Clock(management.get_torch_device(), self.cpu_time)

    @property
    def latent(self) -> dict[str, Tensor]:
        """An empty latent of that size."""
        return empty_latent(self.size, self.batch or 1)


def empty_latent(size: int, batch: int) -> dict[str, Tensor]:
    """Return an empty batch of latent images of `size` pixels, (batch, 4, size / 8, size / 8)."""
    return {"samples": torch.zeros(batch, 4, size // 8, size // 8)}
