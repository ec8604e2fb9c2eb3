"""diffusers' model configurations, read off the shapes of LDM-keyed files: nothing is looked up by a model's name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal

from ...gcfg.errors import GuidanceError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Config = dict[str, Any]
Family = Literal["sd1", "sd2", "sdxl"]

FAMILY_NAMES: dict[Family, str] = {"sd1": "SD1.x", "sd2": "SD2.x", "sdxl": "SDXL"}
SIZE_EMBEDDING = 256  # width of the embedding of each of SDXL's six sizes
SIZES = 6
_HEADS = 8  # of each attention in SD1.x
_HEAD_WIDTH = 64  # in SD2.x, SDXL and every CLIP
_REFINER = (1280, 2560)  # context and vector width of SDXL's refiner
_UNCLIP = ((1024, 1536), (1024, 2048))  # of SD2.1's unCLIP models

_TRANSFORMER = re.compile(r"((?:input_blocks|output_blocks)\.\d+|middle_block)\.\d+\.transformer_blocks\.(\d+)\.")


def unet_config(shapes: Shapes, source: str = "The UNet") -> Config:
    """Return the UNet2DConditionModel configuration of a UNet in bare LDM keys.

    Heads: diffusers calls their number `attention_head_dim`. SD1.x, whose projections are convolutions, has 8
    everywhere; later families have heads of 64 channels.

    Raises: GuidanceError: if it is no prior for this trainer (an inpainting, unCLIP or refiner UNet), or no UNet that
        diffusers' class can be.
    """
    depths = _depths(shapes)
    down, up = _levels(shapes, "input_blocks", 1, depths), _levels(shapes, "output_blocks", 0, depths)
    first = next((key for key in shapes if key.endswith(".attn2.to_k.weight")), "")
    if not first or not down or not up:
        raise GuidanceError(f"{source} has no cross-attention, expected a UNet of the SD1.x, SD2.x or SDXL family.")
    context = shapes[first][1]
    linear = len(shapes[first.split(".transformer_blocks.")[0] + ".proj_in.weight"]) == 2
    widths = [level[0][0] for level in down]
    middle = depths.get("middle_block", 0)
    config: Config = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": _one_or_list([len(level) for level in down]),
        "down_block_types": ["CrossAttnDownBlock2D" if level[0][1] else "DownBlock2D" for level in down],
        "mid_block_type": _middle_type(shapes, middle),
        "up_block_types": ["CrossAttnUpBlock2D" if level[0][1] else "UpBlock2D" for level in up],
        **_transformer_layers(
            [[d for _, d in level] for level in down], [[d for _, d in level] for level in up], middle
        ),
        "attention_head_dim": [max(1, width // _HEAD_WIDTH) for width in widths] if linear else _HEADS,
        "use_linear_projection": linear,
        "cross_attention_dim": context,
    }
    if (pooled := shapes.get("label_emb.0.0.weight")) is not None:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_EMBEDDING,
            "projection_class_embeddings_input_dim": pooled[1],
        }
    refuse_unsuitable(config, source)
    return config


def refuse_unsuitable(config: Config, source: str) -> None:
    """Refuse a configuration that diffusers can build but that is no base model which reads a latent and a text.

    Raises: GuidanceError: for inpainting, unCLIP, refiner and other classes of UNet.
    """
    channels = config.get("in_channels", 4)
    if channels != 4:
        kind = "an inpainting UNet" if channels == 9 else "an image-editing or another UNet"
        raise GuidanceError(
            f"{source} is {kind} of {channels} input channels, expected 4; use the base model it was made from."
        )
    context = config.get("cross_attention_dim")
    if not isinstance(context, int):
        raise GuidanceError(f"{source} has cross_attention_dim {context!r}, expected one number; use a base model.")
    pooled = config.get("projection_class_embeddings_input_dim")
    text_time = config.get("addition_embed_type") == "text_time"
    if (context, pooled) == _REFINER:
        raise GuidanceError(f"{source} is SDXL's refiner, which cannot start from noise; use the SDXL base model.")
    labels = config.get("class_embed_type") or (context, pooled) in _UNCLIP
    if labels or (pooled is not None and not (text_time and config.get("use_linear_projection"))):
        raise GuidanceError(f"{source} reads class labels or images (unCLIP), expected a text-to-image base model.")
    if pooled is not None and pooled <= SIZES * SIZE_EMBEDDING:
        raise GuidanceError(
            f"{source} reads a vector of {pooled} values beside the text, expected SDXL's pooled text and six sizes, "
            f"more than {SIZES * SIZE_EMBEDDING}; use a base model."
        )


def family_of(config: Config) -> Family:
    """Return the family of a UNet configuration."""
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if config.get("use_linear_projection") else "sd1"


def pooled_width(config: Config) -> int:
    """Return the width of the pooled text vector that the UNet reads, 0 for none."""
    width: int = config.get("projection_class_embeddings_input_dim") or 0
    return width - SIZES * SIZE_EMBEDDING if width else 0


def refuse_mismatch(expected: Shapes, found: Shapes, source: str) -> None:
    """Check that the model that diffusers builds from a configuration is the one in the file.

    Raises: GuidanceError: naming the first difference; `source` is its start.
    """
    differing = [key for key in dict.fromkeys((*expected, *found)) if expected.get(key) != found.get(key)]
    if differing:
        key = differing[0]
        raise cannot_be_built(
            source,
            f"{key}: expected {expected.get(key, 'nothing')}, got {found.get(key, 'nothing')}, and "
            f"{len(differing) - 1} more",
        )


def cannot_be_built(source: str, why: str) -> GuidanceError:
    """Return the error of a UNet that is none of diffusers'."""
    return GuidanceError(
        f"{source} has a structure that diffusers' UNet2DConditionModel cannot take ({why}); "
        "use a model of the SD1.x, SD2.x or SDXL layout."
    )


def _depths(shapes: Shapes) -> dict[str, int]:
    """Number of transformer blocks by 'input_blocks.N', 'output_blocks.N' and 'middle_block'."""
    numbers: defaultdict[str, set[str]] = defaultdict(set)
    for key in shapes:
        if match := _TRANSFORMER.match(key):
            numbers[match[1]].add(match[2])
    return {key: len(found) for key, found in numbers.items()}


def _levels(shapes: Shapes, side: str, start: int, depths: Mapping[str, int]) -> list[list[tuple[int, int]]]:
    """Return, for each resolution, (channels, transformer depth) of each of its residual blocks."""
    levels: list[list[tuple[int, int]]] = [[]]
    n = start
    while any(f"{side}.{n}.0.{key}" in shapes for key in ("in_layers.2.weight", "op.weight")):
        here = f"{side}.{n}"
        if f"{here}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append((shapes[f"{here}.0.out_layers.3.weight"][0], depths.get(here, 0)))
        if any(f"{here}.{i}.conv.weight" in shapes for i in (1, 2)):
            levels.append([])
        n += 1
    return levels if all(levels) else []


def _transformer_layers(down: list[list[int]], up: list[list[int]], middle: int) -> Config:
    """Return the depths as diffusers takes them; the middle's is the last of the way down, free where that has none."""
    layers = [_depth(level) for level in down]
    if not any(down[-1]):
        layers[-1] = max(middle, 1)
    mirrored = [[level[0]] * (len(level) + 1) for level in reversed(down)]
    if up == mirrored and all(len(set(level)) == 1 for level in down):
        return {"transformer_layers_per_block": _one_or_list(layers)}
    return {
        "transformer_layers_per_block": layers,
        "reverse_transformer_layers_per_block": [_depth(level) for level in up],
    }


def _depth(level: list[int]) -> int | list[int]:
    # diffusers ignores the number where a level has no attention, but wants one.
    return max(level[0], 1) if len(set(level)) == 1 else level


def _one_or_list(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values


def _middle_type(shapes: Shapes, depth: int) -> str | None:
    if depth:
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if any(key.startswith("middle_block.") for key in shapes) else None
