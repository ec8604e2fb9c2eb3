"""What every benchmark with models does first and last: start ComfyUI here, say what was measured on, store it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import runpy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..testkit.comfyui import find_comfyui, uses_cpu
from ..testkit.errors import CommandError
from ..testkit.inprocess import import_comfyui
from .figures import Figure, write_json


def _load() -> float | None:
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


@dataclass(frozen=True)
class Session:
    """A ComfyUI in this process.

    Attributes:
        tree: its folder, or None for the pip-packaged one.
        cpu: whether it runs on the CPU.
        cpu_time: whether CPU seconds are counted.
        load: of other programs, when it began.
        started: by the monotonic clock.
    """

    tree: Path | None
    cpu: bool
    cpu_time: bool
    load: float | None = field(default_factory=_load)
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, device: str, threads: int, cpu_time: bool, flags: Sequence[str] = ()) -> Session:
        """Start ComfyUI. Raises: CommandError: if the flags do not fit the device."""
        session = cls(find_comfyui(), uses_cpu(device), cpu_time)
        if cpu_time and not session.cpu:
            raise CommandError("--cpu-time: the models run on a GPU, whose time it would not count; leave it out.")
        comfy = import_comfyui(session.tree, session.cpu, flags)
        logging.getLogger().setLevel(logging.WARNING)
        comfy.utils.PROGRESS_BAR_ENABLED = False  # the stock sampler has none here in some versions; then nor have we
        torch.set_num_threads(threads)
        return session

    def store(self, path: Path, setting: dict[str, Any], figures: Sequence[Figure]) -> None:
        """Write the JSON and print what was measured on."""
        whole = {**self._machine(), **setting, "seconds": round(time.monotonic() - self.started)}
        write_json(path, whole, figures)
        print("\n" + ", ".join(f"{key} {value}" for key, value in whole.items()) + "\n")

    def _machine(self) -> dict[str, Any]:
        import comfy.model_management as management  # after its start

        return {
            "comfyui": self._version(),
            "torch": torch.__version__,
            "device": device_name(management.get_torch_device()),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "clock": "cpu" if self.cpu_time else "wall",
            "load": self.load,
        }

    def _version(self) -> str:
        if self.tree is None:
            return f"{importlib.metadata.version('comfyui')} (pip-packaged)"
        return str(runpy.run_path(str(self.tree / "comfyui_version.py"))["__version__"])


def check_size(size: int) -> None:
    """Refuse a size that the models cannot sample. Raises: CommandError: if it is one."""
    if size < 64 or size % 64:
        raise CommandError(f"--size {size}: expected a positive multiple of 64, as SD1.5's latents need; round it.")


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or of the machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{device.type} ({name})"
