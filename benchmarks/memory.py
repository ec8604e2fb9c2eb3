"""Memory in use, as the operating system or the GPU counts it."""

from __future__ import annotations

import ctypes
import gc
import sys

import psutil
import torch


def used(device: torch.device) -> int:
    """Bytes in use: of the GPU by tensors, or of this process (RSS) when models run on the CPU."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if sys.platform == "linux":  # glibc keeps freed blocks for later, which would hide what a run needs
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)
