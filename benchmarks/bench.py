"""What the sections share: how large everything is, the models, and what to time with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..testkit.comfyui import find_comfyui
from ..testkit.inprocess import import_comfyui
from .harness import Clock

if TYPE_CHECKING:  # importing them takes a running ComfyUI
    from .models import Untrained

FOLDER = Path(".cache/benchmarks")  # of the model files


@dataclass(frozen=True)
class Bench:
    """One benchmark; JSON can hold it, for a process of its own.

    Attributes:
        layout: of the untrained models.
        size: of the image, in pixels.
        batch: images in a latent batch; None where nobody said.
        repeats: rounds of everything that is timed.
        cpu: whether models run on the CPU.
        cpu_time: see `Clock`.
        threads: of torch on the CPU.
        folder: of the model files.
        output: folder of what is drawn.
    """

    layout: str
    size: int
    batch: int | None
    repeats: int
    cpu: bool
    cpu_time: bool = False
    threads: int = 1
    folder: str = str(FOLDER)
    output: str = "output"

    @property
    def values(self) -> dict[str, Any]:
        """Its attributes."""
        return asdict(self)

    @property
    def flags(self) -> list[str]:
        """Of ComfyUI's command line, without their dashes: two of SDXL in fp32 are 20 GB."""
        return ["bf16-unet"] if self.cpu and self.layout == "sdxl-full" else []

    def start(self) -> None:
        """Load ComfyUI into this process, as the benchmark wants it."""
        # The stock sampler has no progress bar here in some versions; then nor have we.
        import_comfyui(find_comfyui(), self.cpu, self.flags).utils.PROGRESS_BAR_ENABLED = False
        torch.set_num_threads(self.threads)

    @cached_property
    def models(self) -> Untrained:
        """The untrained models."""
        from .models import Untrained

        return Untrained(Path(self.folder), self.layout)

    @cached_property
    def clock(self) -> Clock:
        """Of the device that ComfyUI runs its models on."""
        from comfy import model_management

        return Clock(model_management.get_torch_device(), self.cpu_time)

    @property
    def latent(self) -> dict[str, Tensor]:
        """An empty latent of that size."""
        return empty_latent(self.size, self.batch or 1)


def empty_latent(size: int, batch: int) -> dict[str, Tensor]:
    """Return an empty batch of latent images of `size` pixels, (batch, 4, size / 8, size / 8)."""
    return {"samples": torch.zeros(batch, 4, size // 8, size // 8)}
