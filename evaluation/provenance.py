"""What a number depends on: the content of files, the settings, and the versions of what computed it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..gcfg.errors import GuidanceError
from ..training.data.images import find_images
from ..training.files import sha256_of, whole_file

_PACKAGES = ("comfyui_gcfg", "torch", "diffusers", "transformers", "torchmetrics", "numpy", "pillow")


class Hashes:
    """SHA-256 of files and folders, remembered with their size and time: models and data sets are large.

    Args:
        store: a JSON file, written by `save`.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        try:
            self._known: dict[str, list[Any]] = json.loads(store.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def of(self, path: Path, setting: str) -> str:
        """Return the hash of a file, or of a folder: over the names and hashes of what is in it.

        Raises: GuidanceError: if it is not there; `setting` is the key that names it.
        """
        if path.is_dir():
            return self._of_files(sorted(each for each in path.rglob("*") if each.is_file()), path)
        if not path.is_file():
            raise GuidanceError(f"{setting} {str(path)!r} does not exist, expected a file or folder; correct the path.")
        return self._of_file(path)

    def of_images(self, folder: Path, setting: str, count: int | None = None) -> str:
        """Return one hash over the images of a folder, or over the first ones.

        Raises: GuidanceError: if there is no such folder.
        """
        if not folder.is_dir():
            raise GuidanceError(f"{setting} {str(folder)!r} is no folder, expected one of images; correct the path.")
        return self._of_files(find_images(folder)[:count], folder)

    def save(self) -> None:
        """Write what is known."""
        with whole_file(self._store) as beside:
            beside.write_text(json.dumps(self._known), encoding="utf-8")

    def _of_files(self, paths: Iterable[Path], folder: Path) -> str:
        """Return one hash over several files below a folder."""
        lines = (f"{path.relative_to(folder).as_posix()} {self._of_file(path)}\n" for path in paths)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _of_file(self, path: Path) -> str:
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns]
        known = self._known.get(str(path.resolve()))
        if known and known[:2] == state:
            return str(known[2])
        digest = sha256_of(path)
        self._known[str(path.resolve())] = [*state, digest]
        return digest


def fingerprint(values: Mapping[str, Any]) -> str:
    """Return a SHA-256 over values that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what computed a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "?"
    return found
