"""Memory in use, as the operating system or the GPU counts it."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Callable

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


def peak(device: torch.device, call: Callable[[], object], pause: float = 0.005) -> int:
    """Bytes that a call needs at its worst moment beyond what was in use before.

    Args:
        device: that models run on.
        call: what to do.
        pause: seconds between two looks at the process's memory; a GPU keeps the count itself.
    """
    before = used(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    process, highest, done = psutil.Process(), before, threading.Event()

    def look() -> None:
        nonlocal highest
        while not done.wait(pause):
            highest = max(highest, process.memory_info().rss)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        call()
    finally:
        done.set()
        looking.join()
    return highest - before
