"""The most memory that a block of code needs."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_EVERY = 0.002  # seconds between two looks


@dataclass
class Peak:
    """Bytes held before a block and at its worst moment; known once the block ends."""

    before: int
    highest: int = 0

    @property
    def grown(self) -> int:
        """What the block needed beyond what was held before it."""
        return self.highest - self.before


@dataclass(frozen=True)
class Memory:
    """Bytes that this process holds of its own making, on the device that models run on.

    On a GPU that is what torch allocated there. On the CPU it is anonymous resident memory: pages of the model files
    are mapped, and the operating system takes them back when it needs them, so they are not counted.

    Attributes:
        device: that models run on.
    """

    device: torch.device

    def now(self) -> int:
        """Bytes held, once nobody holds what is not needed."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif sys.platform == "linux":  # glibc keeps freed blocks for later, which would hide what a run needs
            ctypes.CDLL(None).malloc_trim(0)
        return self._read()

    @contextmanager
    def peak(self) -> Iterator[Peak]:
        """Watch the `with` block."""
        peak = Peak(self.now())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield peak
            peak.highest = torch.cuda.max_memory_allocated(self.device)
            return
        done = threading.Event()

        def look() -> None:
            while not done.wait(_EVERY):
                peak.highest = max(peak.highest, self._read())

        looking = threading.Thread(target=look)
        looking.start()
        try:
            yield peak
        finally:
            done.set()
            looking.join()
            peak.highest = max(peak.highest, peak.before, self._read())

    def _read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        if sys.platform == "linux":
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
        import psutil

        return int(psutil.Process().memory_full_info().uss)
