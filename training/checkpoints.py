"""The state of a run on disk: each checkpoint is a folder of safetensors files that is whole or not there.

run/checkpoints/step-00001000/
    unet.safetensors  ema.safetensors  optimizer.safetensors
    manifest.json     what the run is, where it stands, and size and sha256 of each file
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..gcfg.errors import printable
from .files import discard, remove_unfinished, sha256_of, whole_folder

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_STEP = "step-"
_FOLDER = "checkpoints"  # in a run's


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Number of steps that were done."""
        step: int = self.manifest["step"]
        return step

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Read one file: 'unet', 'ema' or 'optimizer'."""
        return load_file(self.folder / f"{part}.safetensors")

    def has(self, part: str) -> bool:
        """Tell whether the checkpoint has that file."""
        return f"{part}.safetensors" in self.manifest["files"]


def save(run: Path, manifest: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Write a checkpoint in one step: after a crash at any moment it is there whole, or not at all.

    The manifest's 'step' names it; `parts` are tensors by file name without suffix.

    Raises: GuidanceError: if the disk is full or the folder cannot be written.
    """
    path = run / _FOLDER / f"{_STEP}{manifest['step']:08d}"
    if path.exists():
        if read(path):
            return path
        discard(path)  # damaged: it was passed over when the run went on, and is now made again
    with whole_folder(path) as beside:
        for name, tensors in parts.items():
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, _file(beside, name))
        files = {file.name: _seal(file) for file in sorted(beside.iterdir())}
        (beside / MANIFEST).write_text(json.dumps({**manifest, "files": files}, indent=1), encoding="utf-8")
    return path


def newest(run: Path) -> Checkpoint | None:
    """Return a run's newest good checkpoint, or None; a damaged one is named in the log and passed over."""
    for path in reversed(_all(run)):
        if checkpoint := read(path):
            return checkpoint
        log.warning(
            "Checkpoint %s is damaged, expected the files its manifest names; the one before it is used.",
            printable(str(path)),
        )
    return None


def read(path: Path) -> Checkpoint | None:
    """Return the checkpoint in a folder, or None if a file of it is missing or not what its manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        whole = all(_seal(path / name) == seal for name, seal in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Checkpoint(path, manifest) if whole else None


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest checkpoints of a run, and what a killed process left half-written."""
    remove_unfinished(run / _FOLDER)
    for path in _all(run)[:-keep]:
        discard(path)


def _all(run: Path) -> list[Path]:
    return sorted((run / _FOLDER).glob(f"{_STEP}*"))


def _file(folder: Path, part: str) -> Path:
    return folder / f"{part}.safetensors"


def _seal(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
