"""An exact copy of a narrow UNet, ControlNet or LoRA at Stable Diffusion's own width, which every stock loader takes.

Each channel is repeated `factor` times side by side (Net2WiderNet, Chen et al. 2016, https://arxiv.org/abs/1511.05641).
Group and layer norms see the same mean and variance, a layer that reads repeated channels averages over them, and
queries shrink by sqrt(factor), as heads grow by `factor` and attention divides by the root of their width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

_LATENT_IN, _LATENT_OUT = "input_blocks.0.0.weight", "out.2."
_HINT = "input_hint_block."


def widen(state_dict: Mapping[str, Tensor], factor: int) -> dict[str, Tensor]:
    """Return the weights of the wider network; its output is the narrow one's, up to rounding.

    Args:
        state_dict: bare LDM keys of an SD1.x UNet or ControlNet of C channels, in any null-text form.
        factor: 5 makes the 320 channels of SD1.x from 64.

    Returns: bare LDM keys, factor * C channels, float32.
    """
    hints = [int(name.split(".")[1]) for name in state_dict if name.startswith(_HINT)]
    last_hint = f"{_HINT}{max(hints)}." if hints else ""
    return {name: _widened(name, tensor.float(), factor, last_hint) for name, tensor in state_dict.items()}


def widen_lora(state_dict: Mapping[str, Tensor], factor: int) -> dict[str, Tensor]:
    """Return the LoRA for the wider network; merged into it, it does what the narrow one does to the narrow network.

    Args:
        state_dict: kohya keys, on attention projections only; W' = W + alpha / rank * up down.
        factor: as for `widen`.

    Returns: the same keys; the rank and alpha stay.
    """
    return {name: _widened_half(name, tensor, factor) for name, tensor in state_dict.items()}


def _widened_half(name: str, tensor: Tensor, factor: int) -> Tensor:
    projection, _, part = name.partition(".")
    if part == "lora_down.weight":
        reads_text = projection.endswith(("attn2_to_k", "attn2_to_v"))
        return tensor.float() if reads_text else tensor.float().repeat_interleave(factor, dim=1) / factor
    if part == "lora_up.weight":
        queries = projection.endswith("_to_q")
        return _more_outputs(tensor.float() / (math.sqrt(factor) if queries else 1), factor)
    return tensor


def _widened(name: str, tensor: Tensor, factor: int, last_hint: str) -> Tensor:
    if name.startswith(_HINT):
        return _more_outputs(tensor, factor) if name.startswith(last_hint) else tensor
    if name == "time_embed.0.weight":
        return _more_outputs(_among_more_frequencies(tensor, factor), factor)
    if tensor.ndim == 1 or "null_text_feature" in name:
        return tensor if name.startswith(_LATENT_OUT) else tensor.repeat_interleave(factor, dim=-1)
    reads_channels = name != _LATENT_IN and not name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    if reads_channels:
        tensor = tensor.repeat_interleave(factor, dim=1) / factor
    if name.endswith(".to_q.weight"):
        tensor = tensor / math.sqrt(factor)
    return tensor if name.startswith(_LATENT_OUT) else _more_outputs(tensor, factor)


def _more_outputs(tensor: Tensor, factor: int) -> Tensor:
    return tensor.repeat_interleave(factor, dim=0)


def _among_more_frequencies(weight: Tensor, factor: int) -> Tensor:
    """Read the narrow embedding's frequencies, 10000^(-i/half), where the wide one has them: at factor * i."""
    spread = torch.zeros(len(weight), factor * weight.shape[1], dtype=weight.dtype)
    spread[:, ::factor] = weight  # cosines, then sines: each half is spread alike
    return spread
