"""Equal weights of a run's models occupy memory once.

A model trained with parts frozen (Custom Diffusion), with a LoRA or a rotation merged into it, or loaded twice, holds
many of the prior's weights to the last bit, each in memory of its own. Here they are given one storage, copy-on-write:
PyTorch makes the copy at the first write, so whoever writes into a weight (a weight hook, a merge, another pack)
changes that one model only. What reads weights does not end the sharing.

It helps where models are computed where they are kept: on the CPU, and with --gpu-only. ComfyUI otherwise moves weights
between RAM and GPU, and a moved weight is a copy.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .versions import is_dynamic

# PyTorch's own copy-on-write; without it nothing is shared, because two models on plain storage would change together.
_lazy_clone: Any = getattr(torch, "_lazy_clone", None)
_data_address: Any = getattr(torch._C, "_data_address", None)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_Addresses = list[tuple[int, int]]
_compared: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, _Addresses]] = WeakKeyDictionary()


def share_equal(patchers: Sequence[Any]) -> int:
    """Give weights of the same name and the same bits one storage; return the bytes that this frees.

    The first of two models keeps its storage. Each pair is compared once, and again where its weights were replaced.

    Args:
        patchers: the models of one run; what ComfyUI moves, streams or keeps in packed form is left alone.
    """
    if _lazy_clone is None or _data_address is None:
        return 0
    unets = list(dict.fromkeys(patcher.model.diffusion_model for patcher in patchers if _stays_in_place(patcher)))
    freed = sum(_share(first, second) for i, second in enumerate(unets) for first in unets[:i])
    if freed:
        logging.info("GCFG: models of this run have equal weights, which now share %.1f MB.", freed / 1e6)
    return freed


def addresses(module: nn.Module) -> dict[int, int]:
    """Bytes behind a module's parameters by address, read without ending a shared storage's copy-on-write."""
    return {_address(parameter): parameter.nbytes for parameter in module.parameters()}


def _stays_in_place(patcher: Any) -> bool:
    return not is_dynamic(patcher) and torch.device(patcher.load_device) == torch.device(patcher.offload_device)


def _share(first: nn.Module, second: nn.Module) -> int:
    theirs = dict(second.named_parameters())
    pairs = [(a, theirs[name]) for name, a in first.named_parameters() if name in theirs]
    pairs = [(a, b) for a, b in pairs if a is not b and _comparable(a, b)]
    known = _compared.setdefault(first, WeakKeyDictionary())
    if known.get(second) == _where(pairs):
        return 0
    freed = sum(b.nbytes for a, b in pairs if _address(a) != _address(b) and _equal(a, b) and _alias(a, b))
    known[second] = _where(pairs)
    return freed


def _alias(a: nn.Parameter, b: nn.Parameter) -> bool:
    """Let `b` have the storage of `a` until either is written to; the Parameter object stays."""
    try:
        b.data = _lazy_clone(a.data)
    except RuntimeError:  # memory that is not PyTorch's own, as a mapped file's
        return False
    return True


def _comparable(a: nn.Parameter, b: nn.Parameter) -> bool:
    """Whether both are plain tensors of one layout, so that every kernel treats them alike."""
    return (
        all(type(p) is nn.Parameter and type(p.data) is Tensor and p.itemsize in _BITS for p in (a, b))
        and not a.is_meta
        and (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are the same (so -0 is not 0); most that differ do so in their first row."""
    a, b = a.detach().view(_BITS[a.itemsize]), b.detach().view(_BITS[b.itemsize])
    return torch.equal(a[:1], b[:1]) and torch.equal(a, b) if a.ndim else torch.equal(a, b)


def _where(pairs: Sequence[tuple[nn.Parameter, nn.Parameter]]) -> _Addresses:
    return [(_address(a), _address(b)) for a, b in pairs]


def _address(tensor: Tensor) -> int:
    """Where a tensor lies. `data_ptr()` would count as a write, which matters only where something can be shared."""
    return tensor.data_ptr() if _data_address is None else int(_data_address(tensor))
