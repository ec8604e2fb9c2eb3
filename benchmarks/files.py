"""The model files of a benchmark: untrained weights in the layouts of real ones, in fp16 as they are shared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..gcfg.concept_file import compact, fold
from ..testkit import layouts
from ..testkit.models import null_text_features, unet_state_dict

StateDict = dict[str, Tensor]
RANK = 16


@dataclass(frozen=True)
class Files:
    """Where the files are: a prior's UNet and a concept UNet in compact form."""

    prior: Path
    concept: Path


def make_files(folder: Path, family: str) -> Files:
    """Write what is not there yet."""
    files = Files(folder / f"{family}-prior.safetensors", folder / f"{family}-concept.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    if not files.prior.exists():
        _save(unet_state_dict(family, 0, torch.float16), files.prior)
    if not files.concept.exists():
        unet = unet_state_dict(family, 1, torch.float16)
        width = layouts.FAMILIES[family].context_dim
        _save(compact(fold(unet, null_text_features(unet, embedding(0, width)))), files.concept)
    return files


def _save(state_dict: StateDict, path: Path) -> None:
    part = path.with_suffix(".part")  # an interrupted run leaves no file that looks whole
    save_file(state_dict, part)
    part.replace(path)


def embedding(seed: int, width: int = 768) -> Tensor:
    """Return what a prompt's embedding looks like, (1, 77, width)."""
    return torch.randn(1, 77, width, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int, width: int = 768) -> list[list[object]]:
    """Return a CONDITIONING, with the pooled vector that SDXL's takes."""
    pooled = torch.randn(1, 1280, generator=torch.Generator().manual_seed(seed))
    return [[embedding(seed, width), {"pooled_output": pooled}]]


def latent(size: int, batch: int = 1) -> dict[str, Tensor]:
    """Return an empty batch of latent images of `size` pixels."""
    return {"samples": torch.zeros(batch, 4, size // 8, size // 8)}


def lora(family: str, seed: int = 0, strength: float = 0.3) -> StateDict:
    """Return a LoRA on every layer that kohya's trainer takes by default: all matrices of the transformers.

        delta = up @ down, with `strength` times the spread of the weight it is added to

    Args:
        family: of the UNet.
        seed: of the values.
        strength: how far the weights are moved.
    """
    generator = torch.Generator().manual_seed(seed)
    out: StateDict = {}
    for name, shape in layouts.unet(layouts.FAMILIES[family]).items():
        if not in_transformer(name) or len(shape) < 2:
            continue
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        up, down = (shape[0], RANK, *shape[2:]), (RANK, *shape[1:])
        scale = strength / math.sqrt(RANK * shape[1])
        out[f"{key}.lora_up.weight"] = torch.randn(up, generator=generator) * scale
        out[f"{key}.lora_down.weight"] = torch.randn(down, generator=generator)
        out[f"{key}.alpha"] = torch.tensor(float(RANK))
    return out


def in_transformer(name: str) -> bool:
    """Whether a tensor belongs to a transformer, with the projections around its blocks."""
    return any(part in name for part in (".transformer_blocks.", ".proj_in.", ".proj_out."))
