"""A short name for a set of weights, from a few bytes of each tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

_SAMPLE = 64  # values at either end of a tensor


def fingerprint(state_dict: Mapping[str, Tensor], prefix: str = "") -> str:
    """Return a SHA-256 over every key, shape and dtype, and the first and last 64 values of each tensor.

    A fine-tune or a merge changes every tensor it touches, so the ends tell models apart; a checkpoint of gigabytes is
    read in milliseconds when the state dict is lazy.

    Args:
        state_dict: the tensors.
        prefix: only keys that start with it count, without it.
    """
    digest = hashlib.sha256()
    for key in sorted(key for key in state_dict if key.startswith(prefix)):
        tensor = state_dict[key].detach()
        digest.update(f"{key[len(prefix) :]} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        values = tensor.reshape(-1)
        for end in chain((values[:_SAMPLE],), (values[-_SAMPLE:],)):
            digest.update(end.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
