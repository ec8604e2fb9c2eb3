"""ComfyUI's latents: one tensor, or several streams (video and audio) where the version nests them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import comfy.sample
import torch
from torch import Tensor

from .versions import takes


def fix_empty_latent(patcher: Any, latent: dict[str, Any]) -> Any:
    """An empty latent in the model's own channels (and size, where the version knows ratios)."""
    ratios = {
        name: latent.get(name)
        for name in ("downscale_ratio_spacial", "downscale_ratio_temporal")
        if takes(comfy.sample.fix_empty_latent_channels, name)
    }
    return comfy.sample.fix_empty_latent_channels(patcher, latent["samples"], **ratios)


def no_noise(latent: Any) -> Any:
    """Zeros of a latent's form."""
    return on_streams(lambda part: torch.zeros_like(part, device="cpu"), latent)


def to_intermediate(samples: Any) -> Any:
    """Samples where stock nodes leave them."""
    samples = samples.to(management.intermediate_device())
    return samples.to(management.intermediate_dtype()) if hasattr(management, "intermediate_dtype") else samples


def latent_shapes(latent: Any) -> list[tuple[int, ...]]:
    """Shapes of the tensors that a latent holds: one, or several where the version nests them."""
    return [tuple(part.shape) for part in streams(latent)]


def streams(latent: Any) -> list[Tensor]:
    """The tensors that a latent holds."""
    return list(latent.unbind()) if is_nested(latent) else [latent]


def joined(latents: list[Any]) -> Any:
    """The latents as one batch."""
    return on_streams(lambda *parts: torch.cat(parts), *latents)


def first_stream(latent: Any) -> Any:
    """What a VAE decodes of a latent: its picture or video, as ComfyUI's own node does."""
    return streams(latent)[0]


def on_streams(change: Callable[..., Tensor], *latents: Any) -> Any:
    """What `change` makes of the latents, stream by stream where the version nests them."""
    if not is_nested(latents[0]):
        return change(*latents)
    return type(latents[0])([change(*parts) for parts in zip(*map(streams, latents), strict=True)])


def is_nested(latent: Any) -> bool:
    """Whether a latent holds several tensors, its streams."""
    return bool(getattr(latent, "is_nested", False))
