"""Files that are whole or not there: written beside their place, synced, renamed; and their SHA-256."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from ..gcfg.errors import GuidanceError

UNFINISHED = ".unfinished-"  # start of every name that is still being written


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; it takes the place of `path` in one step at the end, or vanishes after an exception.

    Raises: GuidanceError: if the disk is full or the folder cannot be written.
    """
    with _unfinished(path) as beside:
        yield beside / path.name  # in a folder, so that a library's own temporary files go with it
        _settle(beside)
        (beside / path.name).replace(path)
        _sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a new folder to write files into; it becomes `path`, which must not exist, with all of them synced.

    Raises: GuidanceError: if the disk is full or the folder cannot be written.
    """
    with _unfinished(path) as beside:
        yield beside
        _settle(beside)
        beside.replace(path)
        _sync(path.parent)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    Raises: OSError: if it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def discard(folder: Path) -> None:
    """Remove a folder in one step: a process killed meanwhile leaves no part of it under its name."""
    beside = _beside(folder)
    folder.replace(beside)
    _remove(beside)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder."""
    for path in folder.glob(f"{UNFINISHED}*"):
        _remove(path)


@contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    beside = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{UNFINISHED}*-{escape(path.name)}"):  # by a killed process
            _remove(left)
        beside.mkdir()
        yield beside
    except Exception as error:
        if reason := _disk_trouble(error):
            raise GuidanceError(
                f"{str(path)!r} cannot be written: {reason}; what was there before is untouched."
            ) from error
        raise
    finally:
        _remove(beside)


def _settle(folder: Path) -> None:
    """Put the files on the disk, readable by whom new files are: some libraries leave them to their owner alone."""
    rights = folder.stat().st_mode & 0o666
    for file in folder.iterdir():
        file.chmod(rights)
        _sync(file)
    _sync(folder)


def _beside(path: Path) -> Path:
    return path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")


def _disk_trouble(error: Exception) -> str:
    # safetensors wraps the system's error in one of its own.
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in text.lower():
        return "the disk is full; free some space and run the same command again"
    if isinstance(error, PermissionError):
        return "permission was denied; choose another folder, or change its rights"
    return ""


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot sync a folder, nor a file that is open to read only
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
