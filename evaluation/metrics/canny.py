"""Spatial guidance: the edges that were asked for against the edges of the result."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

# ControlNet's own thresholds for its Canny model.
LOW, HIGH = 100, 200


def edges(images: Tensor, low: int = LOW, high: int = HIGH) -> Tensor:
    """Return OpenCV's Canny edges of uint8 images, (N, 3, H, W) -> (N, H, W) bool.

    The colours are used as they are, each pixel by its strongest channel, as ControlNet's annotator does.
    """
    pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return torch.from_numpy(np.stack([cv2.Canny(each, low, high) > 0 for each in pixels]))


def agreement(condition: Tensor, result: Tensor) -> dict[str, float]:
    """Compare edge maps, (N, H, W) bool each; every number is a mean over the images.

    Returns:
        mae: share of pixels in which the two differ, the paper's discrepancy (lower is better);
        precision: share of the result's edge pixels with an edge of the condition at most one pixel away;
        recall: share of the condition's edge pixels with an edge of the result at most one pixel away;
        f1: their harmonic mean.
        Where one map is empty, precision, recall and f1 are 0; where both are, 1.
    """
    if condition.shape != result.shape:
        raise ValueError(f"edge maps of shapes {tuple(condition.shape)} and {tuple(result.shape)}, expected equal ones")
    precision = _found(result, condition)
    recall = _found(condition, result)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=torch.finfo(torch.float64).tiny)
    each = {"mae": (condition ^ result).double().mean((1, 2)), "precision": precision, "recall": recall, "f1": f1}
    return {name: values.mean().item() for name, values in each.items()}


def _found(sought: Tensor, among: Tensor) -> Tensor:
    """Share of the pixels of `sought` that `among`, grown by one pixel, covers: (N, H, W) twice -> (N,)."""
    grown = max_pool2d(among.double().unsqueeze(1), 3, stride=1, padding=1).squeeze(1).bool()
    hits, count = (sought & grown).sum((1, 2)).double(), sought.sum((1, 2)).double()
    both_empty = (count == 0) & ~among.flatten(1).any(1)
    return torch.where(both_empty, 1.0, hits / count.clamp(min=1))
