"""Which ComfyUI is run, and on what."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import CommandError

PACK = Path(__file__).resolve().parents[1]


def find_comfyui() -> Path | None:
    """Return the ComfyUI folder to run: $COMFYUI_PATH, else the one this pack sits in, else None (pip-packaged).

    Raises: CommandError: if $COMFYUI_PATH holds no main.py.
    """
    named = os.environ.get("COMFYUI_PATH")
    if named:
        path = Path(named).expanduser().resolve()
        if not (path / "main.py").is_file():
            raise CommandError(
                f"COMFYUI_PATH: expected a ComfyUI folder with main.py, got {path}; correct or unset it."
            )
        return path
    around = PACK.parent
    return around.parent if around.name == "custom_nodes" and (around.parent / "main.py").is_file() else None


def uses_cpu(device: str) -> bool:
    """Whether to start ComfyUI with --cpu. Raises: CommandError: if `device` is neither auto, cpu nor gpu."""
    import torch  # seconds: not before --help is answered

    if device not in ("auto", "cpu", "gpu"):
        raise CommandError(f"--device {device}: expected auto, cpu or gpu.")
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if device == "gpu" and not gpu:
        raise CommandError("--device gpu: this torch finds no GPU; install a torch for it, or leave --device out.")
    return device == "cpu" or not gpu
