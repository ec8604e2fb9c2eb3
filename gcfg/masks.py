"""Masks that say where a term's guidance acts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .errors import GuidanceError


def check_mask(mask: Tensor, label: str) -> Tensor:
    """The mask as (N, H, W), after the checks that need no model.

    Args:
        mask: (H, W), (N, H, W) or (N, 1, H, W), values in [0, 1].
        label: the term's name, for the error.

    Raises:
        GuidanceError: if the mask has another number of axes, no pixels, or only zeros.
    """
    if mask.ndim not in (2, 3, 4) or (mask.ndim == 4 and mask.shape[1] != 1):
        raise GuidanceError(
            f"Guidance Term '{label}': mask has shape {tuple(mask.shape)}, expected (height, width) or "
            f"(batch, height, width); connect a MASK output."
        )
    if mask.numel() == 0 or not bool(mask.any()):
        found = "has no pixels" if mask.numel() == 0 else "is zero everywhere"
        raise GuidanceError(
            f"Guidance Term '{label}': mask {found}, expected at least one pixel above 0; paint the region where "
            f"the term should act, or disconnect the mask."
        )
    return mask.reshape(-1, *mask.shape[-2:]).float()


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask at another size, bilinearly, as ComfyUI resizes the masks of conditionings.

    Args:
        mask: (N, H, W).
        size: (h, w).

    Returns:
        (N, h, w).
    """
    if mask.shape[-2:] == size:
        return mask
    return F.interpolate(mask[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def fit_mask(mask: Tensor, latent: Tensor) -> Tensor:
    """The mask at the latent's size, device and dtype, repeated over the batch, ready to multiply a delta.

    Args:
        mask: (N, H, W).
        latent: (B, C, *frames, h, w).

    Returns:
        (B, 1, *1, h, w).
    """
    height, width = latent.shape[-2:]
    mask = resize_mask(mask.to(device=latent.device, dtype=latent.dtype), (height, width))
    batch = latent.shape[0]
    mask = mask.repeat(-(-batch // mask.shape[0]), 1, 1)[:batch]  # (B, h, w)
    return mask.reshape(batch, *[1] * (latent.ndim - 3), height, width)
