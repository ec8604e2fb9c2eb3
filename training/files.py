"""Files that are whole or not there: written beside their place, synced, renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..gcfg.errors import GuidanceError

UNFINISHED = ".unfinished-"  # start of every name that is still being written


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; it takes the place of `path` in one step at the end, or vanishes after an exception.

    Raises: GuidanceError: if the disk is full or the folder cannot be written.
    """
    with _unfinished(path) as beside:
        yield beside
        _sync(beside)
        beside.replace(path)
        _sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a new folder to write into; it becomes `path`, which must not exist, with all its files synced.

    Raises: GuidanceError: if the disk is full or the folder cannot be written.
    """
    with _unfinished(path) as beside:
        beside.mkdir()
        yield beside
        for file in beside.iterdir():
            _sync(file)
        _sync(beside)
        beside.replace(path)
        _sync(path.parent)


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
        _remove(beside)
        yield beside
    except Exception as error:
        _remove(beside)
        if reason := _disk_trouble(error):
            raise GuidanceError(
                f"{str(path)!r} cannot be written: {reason}; what was there before is untouched."
            ) from error
        raise
    except BaseException:
        _remove(beside)
        raise


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
    if os.name == "nt" and path.is_dir():  # Windows cannot sync a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
