"""What a null-text ("concept") UNet file holds, and its three forms as functions of a state dict.

    ordinary   a UNet that reads text
    folded     a UNet with attn2.to_v.weight = 0 and attn2.to_out.0.bias = F_null: attention over zeros plus the bias
               is F_null exactly, so every loader runs it as a null-text network
    compact    no attn2 weights and no norm2, only attn2.null_text_feature = F_null, (1, 1, C); the authors' form

Keys may be LDM's or diffusers', bare or below a checkpoint's prefix. A block is named as in its file, without that
prefix: "input_blocks.1.1.transformer_blocks.0".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import GuidanceError
from .safetensors_header import shown, stated_number
from .unet_keys import diffusers_to_ldm
from .unet_tensors import refuse_odd_tensors

StateDict = dict[str, Tensor]
Form = Literal["ordinary", "folded", "compact"]
Naming = Literal["LDM", "diffusers"]

FEATURE = "attn2.null_text_feature"
DEAD = ("attn2.to_q.weight", "attn2.to_k.weight", "attn2.to_v.weight", "attn2.to_out.0.weight", "attn2.to_out.0.bias")
_CONSTANT = "attn2.to_out.0.bias"  # F_null of a folded file
NORM = ("norm2.weight", "norm2.bias")
CONTEXT_DIM_KEY = "gcfg.context_dim"  # in a file's metadata

# The averaged copy of a training checkpoint (model_ema.) has mangled keys and no prefix here.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "module.", "")
_FIRST_KEYS: tuple[tuple[Naming, tuple[str, str]], ...] = (
    ("LDM", ("input_blocks.0.0.weight", "out.2.weight")),
    ("diffusers", ("conv_in.weight", "conv_out.weight")),
)
_BLOCK = re.compile(r"(.*\btransformer_blocks\.\d+)\.")


@dataclass(frozen=True)
class ConceptFile:
    """What `describe` found.

    Attributes:
        form: ordinary, folded or compact.
        naming: whose key names the UNet has.
        prefix: what stands before each UNet key, "" for a bare UNet.
        blocks: the transformer blocks, in the file's order.
        context_dim: width of the text embedding its prior reads: 768 for SD1.x, 1024 for SD2.x, 2048 for SDXL.
    """

    form: Form
    naming: Naming
    prefix: str
    blocks: tuple[str, ...]
    context_dim: int


def describe(
    state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, source: str = "The file"
) -> ConceptFile:
    """Recognise a UNet file.

    Args:
        state_dict: the whole file; may be lazy: of most tensors only the shape is looked at.
        metadata: the file's metadata, which may state `gcfg.context_dim`.
        source: start of every error, naming the input or the file.

    Raises: GuidanceError: if it is no UNet with transformer blocks, its attn2 keys are incomplete, or a tensor has
        other axes than its name says.
    """
    naming, prefix = _find_unet(state_dict, source)
    blocks = _blocks(state_dict, prefix)
    if not blocks:
        raise GuidanceError(
            f"{source} has a UNet without 'transformer_blocks.N' keys, expected one with cross-attention; "
            "use a UNet of the SD1.x, SD2.x or SDXL family."
        )
    refuse_odd_tensors(_in_ldm_keys(state_dict, naming, prefix), source)
    form = _form(state_dict, prefix, blocks, source)
    return ConceptFile(form, naming, prefix, blocks, _context_dim(state_dict, prefix, blocks, metadata or {}))


def unet_in_ldm_keys(state_dict: Mapping[str, Tensor], found: ConceptFile) -> StateDict:
    """Return only the file's UNet, in bare LDM keys, whatever its prefix and naming."""
    return _in_ldm_keys(state_dict, found.naming, found.prefix)


def features(state_dict: Mapping[str, Tensor], source: str = "The file") -> StateDict:
    """Return F_null by block name, (C,), of a folded or compact state dict.

    Raises: GuidanceError: if it is an ordinary UNet, which has none.
    """
    found = describe(state_dict, source=source)
    if found.form == "ordinary":
        raise GuidanceError(
            f"{source} is an ordinary UNet, expected a null-text one (folded or compact); "
            "train one, or use the Null-Text Patch on the loaded model."
        )
    key = FEATURE if found.form == "compact" else _CONSTANT
    return {block: state_dict[f"{found.prefix}{block}.{key}"].reshape(-1) for block in found.blocks}


def fold(
    state_dict: Mapping[str, Tensor], null_text: Mapping[str, Tensor], context_dim: int | None = None
) -> StateDict:
    """Return the folded form: to_v.weight = 0 and to_out.0.bias = F_null in every block, all else as it is.

    An ordinary or a compact state dict will do; what a compact one lacks is filled with zeros, which compute the same.

    Args:
        state_dict: any form.
        null_text: F_null by block name, (C,).
        context_dim: width of the text embedding, where a compact state dict does not tell.
    """
    found = describe(state_dict)
    full = fill_for_detection(state_dict, context_dim) if found.form == "compact" else dict(state_dict)
    for block in found.blocks:
        base = f"{found.prefix}{block}."
        full.pop(base + FEATURE, None)
        for key in (*DEAD, *NORM):
            full[base + key] = full[base + key].contiguous()
        full[base + "attn2.to_v.weight"] = torch.zeros_like(full[base + "attn2.to_v.weight"])
        bias = full[base + "attn2.to_out.0.bias"]
        full[base + "attn2.to_out.0.bias"] = null_text[block].reshape(-1).to(bias).clone()
    return full


def compact(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Return the compact form of a folded or compact state dict: attn2 and norm2 give way to the feature.

    Raises: GuidanceError: if it is an ordinary UNet.
    """
    found = describe(state_dict)
    null_text = features(state_dict)
    bases = tuple(f"{found.prefix}{block}." for block in found.blocks)
    dead = {base + key for base in bases for key in (*DEAD, *NORM)}
    small = {key: tensor for key, tensor in state_dict.items() if key not in dead}
    for base, feature in zip(bases, null_text.values(), strict=True):
        small[base + FEATURE] = feature.reshape(1, 1, -1).clone()
    return small


def fill_for_detection(state_dict: Mapping[str, Tensor], context_dim: int | None = None) -> StateDict:
    """Return a compact state dict with attn2 and norm2 keys of the right shapes, all zero, that take no memory.

    ComfyUI recognises a model by `attn2.to_k.weight`, which a compact file lacks. The tensors are views of one zero.
    """
    found = describe(state_dict)
    width = found.context_dim if context_dim is None else context_dim
    full = dict(state_dict)
    for block in found.blocks:
        base = f"{found.prefix}{block}."
        like = full[base + "norm1.weight"]
        c = like.numel()
        shapes = ((c, c), (c, width), (c, width), (c, c), (c,), (c,), (c,))
        zero = torch.zeros((), dtype=like.dtype)
        for key, shape in zip((*DEAD, *NORM), shapes, strict=True):
            full.setdefault(base + key, zero.expand(shape))
    return full


def without_dead_weights(state_dict: Mapping[str, Tensor], found: ConceptFile) -> StateDict:
    """Return a folded or compact UNet as ComfyUI can recognise it, and nothing else of attn2, norm2 and the features.

    The model is known by `attn2.to_k.weight` of each transformer's first block. It is all zero here, a view of one
    value. A layer for which no weights are given takes no memory until it is let go.
    """
    alive = dict(state_dict)
    for block in found.blocks:
        base = f"{found.prefix}{block}."
        for key in (*DEAD, *NORM, FEATURE):
            alive.pop(base + key, None)
        if block.endswith(".transformer_blocks.0"):
            like = alive[base + "norm1.weight"]
            zero = torch.zeros((), dtype=like.dtype)
            alive[base + "attn2.to_k.weight"] = zero.expand(like.numel(), found.context_dim)
    return alive


def _in_ldm_keys(state_dict: Mapping[str, Tensor], naming: Naming, prefix: str) -> StateDict:
    bare = {key[len(prefix) :]: state_dict[key] for key in state_dict if key.startswith(prefix)}
    return diffusers_to_ldm(bare) if naming == "diffusers" else bare


def _find_unet(keys: Mapping[str, object], source: str) -> tuple[Naming, str]:
    for prefix in _PREFIXES:
        for naming, first in _FIRST_KEYS:
            if all(prefix + key in keys for key in first):
                return naming, prefix
    raise GuidanceError(
        f"{source} holds no UNet: expected 'input_blocks.0.0.weight' (LDM) or 'conv_in.weight' (diffusers) and what "
        f"belongs to it, bare or below 'model.diffusion_model.', found {_list(keys)}{_guess(keys)}."
    )


def _guess(keys: Iterable[str]) -> str:
    """Name the likely other kind of file, as the end of the error."""
    marks = (
        ("lora", "a LoRA; load the UNet and apply it with a LoRA loader"),
        ("control_model.", "a ControlNet; load it with a ControlNet loader"),
        ("controlnet_cond_embedding.", "a ControlNet; load it with a ControlNet loader"),
        ("double_blocks.", "a diffusion transformer, which has no null-text form here"),
        ("joint_blocks.", "a diffusion transformer, which has no null-text form here"),
        ("text_model.", "a text encoder; load it with a CLIP loader"),
        ("decoder.conv_in.", "a VAE; load it with a VAE loader"),
    )
    names = list(keys)
    for mark, kind in marks:
        if any(mark in name for name in names):
            return f" (it looks like {kind})"
    return ""


def _blocks(keys: Iterable[str], prefix: str) -> tuple[str, ...]:
    matches = (_BLOCK.match(key, len(prefix)) for key in keys if key.startswith(prefix))
    return tuple(dict.fromkeys(match[1] for match in matches if match))


def _form(state_dict: Mapping[str, Tensor], prefix: str, blocks: tuple[str, ...], source: str) -> Form:
    bases = [f"{prefix}{block}." for block in blocks]
    with_feature = [base for base in bases if base + FEATURE in state_dict]
    # A file may keep its dead weights beside the features: the features are what its author meant.
    if with_feature:
        _require(state_dict, [base + key for base in bases for key in (FEATURE, "norm1.weight")], source)
        _check_widths(state_dict, bases, FEATURE, source)
        return "compact"
    _require(state_dict, [base + key for base in bases for key in DEAD], source)
    if any(state_dict[base + "attn2.to_v.weight"].float().any() for base in bases):
        return "ordinary"
    _require(state_dict, [base + "norm1.weight" for base in bases], source)
    _check_widths(state_dict, bases, _CONSTANT, source)
    return "folded"


def _require(state_dict: Mapping[str, Tensor], expected: list[str], source: str) -> None:
    missing = [key for key in expected if key not in state_dict]
    if missing:
        found = [key for key in state_dict if "attn2." in key]
        raise GuidanceError(
            f"{source} is neither an ordinary nor a null-text UNet: expected {_list(expected)}, of which "
            f"{len(missing)} are missing, first {shown(missing[0])}; found {_list(found)} of attn2; export the file "
            "again."
        )


def _check_widths(state_dict: Mapping[str, Tensor], bases: list[str], key: str, source: str) -> None:
    for base in bases:
        shape = tuple(state_dict[base + key].shape)
        c = state_dict[base + "norm1.weight"].numel()
        fitting = ((1, 1, c), (1, c), (c,)) if key == FEATURE else ((c,),)
        if shape not in fitting:
            raise GuidanceError(
                f"{source}: {base + key!r} has the shape {shape}, expected {fitting[0]}; export the file again."
            )


def _context_dim(
    state_dict: Mapping[str, Tensor], prefix: str, blocks: tuple[str, ...], metadata: Mapping[str, str]
) -> int:
    to_k = f"{prefix}{blocks[0]}.attn2.to_k.weight"
    if to_k in state_dict:
        return state_dict[to_k].shape[1]
    if stated := stated_number(metadata, CONTEXT_DIM_KEY):
        return stated
    pooled = ("label_emb.0.0.weight", "add_embedding.linear_1.weight", "class_embedding.linear_1.weight")
    for key in pooled:
        if prefix + key in state_dict:
            by_pooled = {2816: 2048, 2560: 1280}  # SDXL base, SDXL refiner
            if (width := state_dict[prefix + key].shape[1]) in by_pooled:
                return by_pooled[width]
    proj_in = state_dict.get(prefix + blocks[0].rsplit(".transformer_blocks.", 1)[0] + ".proj_in.weight")
    return 1024 if proj_in is not None and proj_in.ndim == 2 else 768  # SD2.x made the projections linear


def _list(keys: Iterable[str], count: int = 3) -> str:
    names = list(keys)
    first = ", ".join(map(shown, names[:count]))
    if not names:
        return "no keys"
    return first if len(names) <= count else f"{first} and {len(names) - count} more keys"
