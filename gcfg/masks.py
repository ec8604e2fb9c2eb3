"""Masks that say where a term's guidance acts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import GuidanceError

_IMAGE, _VIDEO = 2, 3  # spatial axes of a latent


def check_mask(mask: Any, name: str) -> tuple[Tensor, ...]:
    """A mask per stream of the latent, each (N, H, W), after the checks that need no model.

    Args:
        mask: (H, W), (N, H, W) or (N, 1, H, W), values in [0, 1]; or several of them, nested
            as ComfyUI nests latents, or in a tuple.
        name: the term, for the error.

    Raises:
        GuidanceError: if a mask has another number of axes, or no pixels.
    """
    parts = mask.unbind() if getattr(mask, "is_nested", False) else mask
    masks = tuple(parts) if isinstance(parts, tuple | list) else (parts,)
    for part in masks:
        if part.ndim not in (2, 3, 4) or (part.ndim == 4 and part.shape[1] != 1):
            raise GuidanceError(
                f"{name}: mask has shape {tuple(part.shape)}, expected (height, width) or (batch, height, width); "
                f"connect a MASK output."
            )
        if part.numel() == 0:
            raise GuidanceError(
                f"{name}: mask has no pixels, expected at least one; paint the region where the term should act, or "
                f"disconnect the mask."
            )
    return tuple(part.reshape(-1, *part.shape[-2:]).float() for part in masks)


def fit_mask(mask: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """The mask at a latent's size, as ComfyUI resizes noise masks: on video one mask per frame, else per sample.

    Args:
        mask: (N, H, W).
        shape: of the latent, (B, C, h, w) or (B, C, frames, h, w).
        name: the term, for errors.

    Returns:
        (N, 1, h, w) or (1, 1, frames, h, w).

    Raises:
        GuidanceError: if the latent is neither.
    """
    size = tuple(shape[2:])
    if len(size) == _VIDEO:
        frames = mask[None, None]
        return frames if frames.shape[2:] == size else F.interpolate(frames, size=size, mode="trilinear")
    if len(size) != _IMAGE:
        raise GuidanceError(
            f"{name}: mask has a height and a width, expected none, because the latent of this model has shape "
            f"{tuple(shape)} and no such axes; disconnect the mask."
        )
    return mask[:, None] if mask.shape[1:] == size else F.interpolate(mask[:, None], size=size, mode="bilinear")


def repeated(mask: Tensor, batch: int) -> Tensor:
    """The mask (N, ...) repeated over a batch: (B, ...), or (1, ...) where one serves all."""
    if len(mask) in (1, batch):
        return mask
    return mask.repeat(-(-batch // len(mask)), *[1] * (mask.ndim - 1))[:batch]


def shared(masks: Sequence[Tensor]) -> list[Tensor]:
    """Masks that together are nowhere above 1: m_i / max(1, sum_j m_j).

    Args:
        masks: (N, H, W) each; where sizes differ they come out at the largest height and width.
    """
    fitted = same_size(masks)
    total = sum(fitted[1:], fitted[0]).clamp_min(1.0)
    return [mask / total for mask in fitted]


def stacked(masks: Sequence[Tensor]) -> list[Tensor]:
    """Masks that cover each other, the first on top: m_i prod_{j < i} (1 - m_j). See `shared`."""
    free = torch.ones(())
    out = []
    for mask in same_size(masks):
        out.append(mask * free)
        free = free * (1.0 - mask)
    return out


def outside(masks: Sequence[Tensor]) -> Tensor:
    """Where no mask is: 1 - min(1, sum_i m_i), (N, H, W). See `shared`."""
    fitted = same_size(masks)
    return 1.0 - sum(fitted[1:], fitted[0]).clamp_max(1.0)


def same_size(masks: Sequence[Tensor]) -> list[Tensor]:
    """The masks (N, H, W) at one height, width and number: the largest of each."""
    size = tuple(max(mask.shape[axis] for mask in masks) for axis in (1, 2))
    count = max(map(len, masks))
    sized = [
        mask if mask.shape[1:] == size else F.interpolate(mask[:, None], size=size, mode="bilinear")[:, 0]
        for mask in masks
    ]
    return [repeated(mask, count).expand(count, *size) for mask in sized]
