"""diffusers' UNet key names in LDM's, the naming of Stable Diffusion checkpoints and of ComfyUI's UNet, and back.

Both name the same tensors; only diffusers spells the blocks by kind. The block counts are read from the keys, so any
depth works, unlike with tables of the published models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")

_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
_OUTSIDE = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "class_embedding.linear_1.": "label_emb.0.0.",
    "class_embedding.linear_2.": "label_emb.0.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
}


def diffusers_to_ldm(state_dict: Mapping[str, Value]) -> dict[str, Value]:
    """Return the state dict with each diffusers UNet key renamed; keys it does not know stay as they are."""
    prefixes = _prefix_table(state_dict)
    return {_rename(key, prefixes): value for key, value in state_dict.items()}


def ldm_to_diffusers(state_dict: Mapping[str, Value], diffusers_names: Iterable[str]) -> dict[str, Value]:
    """Return the state dict with each LDM UNet key renamed; keys it does not know stay as they are.

    LDM's numbers alone do not tell where a resolution ends, so the names come from the UNet they are meant for.

    Args:
        state_dict: bare LDM keys.
        diffusers_names: the keys of a diffusers UNet of the same structure.
    """
    names = diffusers_to_ldm({name: name for name in diffusers_names})  # LDM key -> diffusers key
    return {names.get(key, key): value for key, value in state_dict.items()}


def _rename(key: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if key.startswith(old):
            rest = key[len(old) :]
            if ".resnets." in old:
                rest = next((ldm + rest[len(name) :] for name, ldm in _RESNET.items() if rest.startswith(name)), rest)
            return new + rest
    return key


def _prefix_table(keys: Iterable[str]) -> dict[str, str]:
    """Map each diffusers module prefix found in the keys to its LDM prefix."""
    found = list(keys)
    table = dict(_OUTSIDE)
    table |= _down(found) | _middle(found) | _up(found)
    return table


def _count(keys: list[str], prefix: str) -> int:
    """Count the numbered modules below a prefix: 'down_blocks.' or 'down_blocks.0.resnets.'."""
    numbers = {key[len(prefix) :].split(".", 1)[0] for key in keys if key.startswith(prefix)}
    return len(numbers)


def _down(keys: list[str]) -> dict[str, str]:
    table: dict[str, str] = {}
    position = 1  # input_blocks.0 is conv_in
    for level in range(_count(keys, "down_blocks.")):
        here = f"down_blocks.{level}."
        attentions = _count(keys, f"{here}attentions.")
        for i in range(_count(keys, f"{here}resnets.")):
            table[f"{here}resnets.{i}."] = f"input_blocks.{position}.0."
            if i < attentions:
                table[f"{here}attentions.{i}."] = f"input_blocks.{position}.1."
            position += 1
        if _count(keys, f"{here}downsamplers."):
            table[f"{here}downsamplers.0.conv."] = f"input_blocks.{position}.0.op."
            position += 1
    return table


def _middle(keys: list[str]) -> dict[str, str]:
    table: dict[str, str] = {}
    attentions = _count(keys, "mid_block.attentions.")
    for i in range(_count(keys, "mid_block.resnets.")):
        # A middle block is resnet (attention resnet)*, so the modules alternate where there is attention.
        table[f"mid_block.resnets.{i}."] = f"middle_block.{2 * i if attentions else i}."
    for i in range(attentions):
        table[f"mid_block.attentions.{i}."] = f"middle_block.{2 * i + 1}."
    return table


def _up(keys: list[str]) -> dict[str, str]:
    table: dict[str, str] = {}
    position = 0
    for level in range(_count(keys, "up_blocks.")):
        here = f"up_blocks.{level}."
        attentions = _count(keys, f"{here}attentions.")
        for i in range(_count(keys, f"{here}resnets.")):
            table[f"{here}resnets.{i}."] = f"output_blocks.{position}.0."
            if i < attentions:
                table[f"{here}attentions.{i}."] = f"output_blocks.{position}.1."
            position += 1
        if _count(keys, f"{here}upsamplers."):
            table[f"{here}upsamplers.0.conv."] = f"output_blocks.{position - 1}.{2 if attentions else 1}.conv."
    return table
