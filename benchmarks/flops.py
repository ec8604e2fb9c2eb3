"""Model FLOPs of a training step, counted by torch on a model without memory, and what a device could do."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from ..training.concept import Conditions, null_text_features, predict, to_null_text
from ..training.prior.model import open_prior

# Dense bf16 with fp32 accumulation, in TFLOP/s, by the makers' data sheets; the first name found counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def step_flops(checkpoint: Path, size: int) -> float:
    """Return the FLOPs of one image's forward and backward pass through the null-text UNet.

    Args:
        checkpoint: the prior.
        size: side of the image, in pixels.
    """
    prior = open_prior(checkpoint)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(prior.unet.config).train()
        to_null_text(unet, null_text_features(unet, "zero"))
        x, t = torch.zeros(1, 4, size // 8, size // 8), torch.zeros(1)
        with FlopCounterMode(display=False) as counter:
            predict(unet, x, t, Conditions.without_text(prior.context_dim)).square().mean().backward()
    return float(counter.get_total_flops())


def peak_tflops(device: str) -> float | None:
    """Return what the device could do, or None if its data sheet is not known here."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None)
