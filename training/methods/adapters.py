"""LoRA and OFT on every projection of the UNet's attentions, by peft.

LoRA: W' = W + B A                      # Hu et al. 2021; rank r, B (out, r) starts at 0
OFT:  W' = W R,  R = (I + Q)^-1 (I - Q) by blocks, Q skew-symmetric      # Qiu et al. 2023; Q starts at 0
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import LoraConfig, OFTConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...gcfg.errors import GuidanceError

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
OFT_BLOCKS = 4  # with which SD1.5 has 23.3 M values in the blocks, the paper's 23 M

_ADAPTER = "default"  # peft's name of the first one, a part of its weights' names


def add_lora(unet: nn.Module, rank: int, seed: int) -> None:
    """Put a LoRA of scale 1 on every attention projection; its weights are then the only ones that are trained.

    The seed decides A, the half that does not start at 0.
    """
    _inject(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PROJECTIONS)), unet, seed)


def add_oft(unet: nn.Module, block_size: int) -> None:
    """Put an orthogonal rotation on every attention projection's input; they are then all that is trained.

    It turns blocks of side `block_size`; 0 for four blocks of whatever side that makes.

    Raises: GuidanceError: if a projection's input cannot be cut into such blocks.
    """
    divisor = block_size or OFT_BLOCKS
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(PROJECTIONS) and module.in_features % divisor:
            raise GuidanceError(
                f"model.oft_block_size is {block_size}, expected a divisor of every attention projection's input, of "
                f"which {name!r} has {module.in_features}; choose another."
            )
    number = 0 if block_size else OFT_BLOCKS  # peft wants the one or the other
    # The exact Cayley transform: the Neumann series is quicker, and no rotation.
    config = OFTConfig(r=number, oft_block_size=block_size, use_cayley_neumann=False, target_modules=list(PROJECTIONS))
    _inject(config, unet, seed=0)  # starts at 0


def merge_adapters(unet: nn.Module) -> None:
    """Turn the adapters into the weights that compute the same, in an ordinary UNet.

    Raises: GuidanceError: if a merged weight is NaN or infinite.
    """
    for name, module in list(unet.named_modules()):
        if isinstance(module, BaseTunerLayer):
            try:
                module.merge(safe_merge=True)
            except ValueError as error:
                raise GuidanceError(
                    f"{name!r} has NaN or infinite values: the training failed; export an earlier checkpoint."
                ) from error
            parent, _, last = name.rpartition(".")
            setattr(unet.get_submodule(parent), last, module.get_base_layer())
    unet.requires_grad_(True)


def lora_file(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a LoRA's weights, by peft's names, in kohya's keys, which the LoRA loaders of ComfyUI and others read."""
    unet = {f"unet.{name.replace(f'.{_ADAPTER}.', '.')}": tensor for name, tensor in weights.items()}
    file: dict[str, Tensor] = convert_state_dict_to_kohya(unet)
    return file


def _inject(config: Any, unet: nn.Module, seed: int) -> None:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, unet, adapter_name=_ADAPTER)
