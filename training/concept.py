"""The concept network: the prior with its cross-attentions replaced by constants, and what a call of either needs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..gcfg.concept_file import describe, features
from ..gcfg.errors import GuidanceError
from ..gcfg.null_text import (
    ConstantCrossAttention,
    attention_means,
    cross_attention_blocks,
    null_text_blocks,
    replace_cross_attention,
    uniform_means,
)
from ..gcfg.safetensors_file import LazyStateDict, read_header
from ..gcfg.unet_keys import diffusers_to_ldm
from .config import NullTextMode
from .objective import TIMESTEPS
from .prior.text_encoder import Conditions

PIXELS = 8  # of an image per value of its latent, along each side
MODES = get_args(NullTextMode)

BINS = 10  # of timesteps, in which the drift is told

Noised = tuple[Tensor, Tensor]  # x (B, C, H, W) and its timesteps (B,)


class DriftRow(NamedTuple):
    """One bin of timesteps, by its first and its last, how many noised latents fell into it, and their distance."""

    first: int
    last: int
    samples: int
    distance: float


def predict(unet: nn.Module, x: Tensor, t: Tensor, conditions: Conditions, geometry: Tensor | None = None) -> Tensor:
    """Evaluate a UNet: its output as it is, be it eps, v or flow.

    Args:
        unet: a UNet2DConditionModel, or a wrapper that is called like one.
        x: noised latents, (B, C, H, W).
        t: timesteps, (B,).
        conditions: of one prompt, for the whole batch.
        geometry: each image's original height and width, crop top and left, (B, 4), which SDXL reads; None for images
            that were made at their size.

    Returns: (B, C, H, W).
    """
    more: dict[str, Any] = {}
    if conditions.pooled is not None:
        pooled = conditions.pooled.to(x).expand(len(x), -1)
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": _sizes(x, geometry)}
    context = conditions.context.to(x).expand(len(x), -1, -1)
    output: Tensor = unet(x, t, encoder_hidden_states=context, return_dict=False, **more)[0]
    return output


@torch.no_grad()
def null_text_features(
    unet: nn.Module, how: str, empty: Conditions | None = None, noised: Iterable[Noised] = ()
) -> dict[str, Tensor]:
    """Return F_null by block name, (C,), in float32.

    Args:
        unet: the prior's UNet, which is not changed.
        how: 'uniform_mean', 'attention_mean', 'zero', or the path of a null-text file.
        empty: conditions of the empty prompt; the two means need it.
        noised: batches of one size over which 'attention_mean' is taken.

    Raises: GuidanceError: if the file is missing, no null-text file, or of another architecture.
    """
    blocks = cross_attention_blocks(unet)
    if how == "zero":
        return {name: torch.zeros(_width(block), device=_place(block).device) for name, block in blocks.items()}
    if how not in MODES:
        return _of_file(Path(how), unet, blocks)
    if empty is None:
        raise ValueError(f"{how!r} needs the conditions of the empty prompt")
    if how == "uniform_mean":
        found = uniform_means(empty.context.to(_place(unet)), unet, blocks)
    else:
        found = attention_means(unet, blocks, (partial(predict, unet, x, t, empty) for x, t in noised))
    return {name: feature.float() for name, feature in found.items()}


def to_null_text(unet: nn.Module, constants: dict[str, Tensor], trainable: bool = False) -> None:
    """Turn a UNet into the null-text network for good, of the constants F_null by block name, (C,).

    Its attn2 and norm2 are let go; the paper keeps the constants fixed.
    """
    dtype = _place(unet).dtype
    replace_cross_attention(unet, {name: constant.to(dtype) for name, constant in constants.items()})
    for module in unet.modules():
        if isinstance(module, ConstantCrossAttention):
            module.null_text_feature.requires_grad_(trainable)


@torch.no_grad()
def drift(
    unet: nn.Module, constants: Mapping[str, Tensor], empty: Conditions, noised: Iterable[Noised]
) -> list[DriftRow]:
    """Compare the null-text network with the prior's empty-prompt prediction, per timestep bin.

        distance = sqrt( sum ||out_null - out_SD(x, t, "")||^2 / sum ||out_SD(x, t, "")||^2 )

    The outputs are compared as they are, whether they mean eps, v or flow: at small t a v output holds little of the
    noise, so the figures of models with different predictions are not comparable.

    Returns: the bins that a sample fell into, by timestep.
    """
    width = TIMESTEPS // BINS
    sums = torch.zeros(BINS, 3, dtype=torch.float64)  # samples, squared difference, squared reference
    for x, t in noised:
        reference = predict(unet, x, t, empty).double()
        with null_text_blocks(unet, constants):
            difference = predict(unet, x, t, empty).double() - reference
        squares = (value.square().sum(dim=(1, 2, 3)).cpu() for value in (difference, reference))
        bins = (t.cpu() // width).long().clamp(max=BINS - 1)
        sums.index_add_(0, bins, torch.stack((torch.ones(len(x), dtype=torch.float64), *squares), dim=1))
    return [
        DriftRow(i * width, (i + 1) * width - 1, int(samples), (difference / reference) ** 0.5)
        for i, (samples, difference, reference) in enumerate(sums.tolist())
        if samples
    ]


def drift_table(rows: Iterable[DriftRow]) -> str:
    """Return the rows as lines for a person to read."""
    head = "timesteps  distance from the prior's empty-prompt prediction (0: the same)"
    return "\n".join([head, *(f"{row.first:>4}-{row.last:<4}  {row.distance:.4f}" for row in rows)])


def _sizes(x: Tensor, geometry: Tensor | None) -> Tensor:
    """Return SDXL's original height and width, crop top and left, target height and width, (B, 6)."""
    target = torch.tensor([PIXELS * side for side in x.shape[-2:]], device=x.device).expand(len(x), 2)
    if geometry is None:
        geometry = torch.cat((target, torch.zeros_like(target)), dim=1)
    return torch.cat((geometry.to(target), target), dim=1)


def _of_file(path: Path, unet: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, Tensor]:
    modes = ", ".join(repr(mode) for mode in MODES)
    if not os.path.isfile(path):
        raise GuidanceError(f"model.null_text: {path.name!r} is neither {modes} nor a file, at {str(path)!r}.")
    source = f"model.null_text {str(path)!r}"
    header = read_header(path, source)
    state_dict = LazyStateDict(path)
    found = features(state_dict, source)
    if describe(state_dict, header.metadata, source).naming == "LDM":
        last = ".norm1.weight"  # in LDM's names only transformer blocks have one
        names = diffusers_to_ldm({key: key.removesuffix(last) for key in unet.state_dict()})
        by_ldm = {key.removesuffix(last): name for key, name in names.items() if key.endswith(last)}
        found = {by_ldm.get(block, block): feature for block, feature in found.items()}
    widths = {name: _width(block) for name, block in blocks.items()}
    in_file = {name: feature.numel() for name, feature in found.items()}
    if widths != in_file:
        raise GuidanceError(
            f"{source} belongs to another architecture: {len(in_file)} blocks with {sum(in_file.values())} constants, "
            f"expected the prior's {len(widths)} blocks with {sum(widths.values())}; name one of this prior's family."
        )
    return {name: found[name].float().to(_place(unet).device) for name in blocks}


def _width(block: nn.Module) -> int:
    width: int = block.get_submodule("norm2").weight.numel()  # type: ignore[operator]
    return width


def _place(module: nn.Module) -> Tensor:
    return next(module.parameters())
