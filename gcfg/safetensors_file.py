"""Open a .safetensors file, or say in one sentence why it cannot be opened; a pickle is never touched."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import GuidanceError
from .safetensors_header import DamagedHeaderError, Header, NoHeaderError, parse_header

SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_LONGEST_HEADER = 100_000_000  # by the format: a greater length means some other kind of file

# The file's name is no part of it: whoever pastes a command into a shell would run what the name says.
CONVERT = "expected .safetensors; run `gcfg convert FILE` with this file (docs/training.md tells how to install it)."


class LazyStateDict(Mapping[str, Tensor]):
    """A file's tensors, each read when it is asked for, so that a look at a checkpoint does not load it.

    Raises: GuidanceError: if the file is no longer what `read_header` found good.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = safe_open(str(path), framework="pt")
            self._keys = dict.fromkeys(self._file.keys())  # type: ignore[no-untyped-call]  # in the file's order
        except (SafetensorError, OSError) as error:
            raise changed(repr(str(path)), error) from error

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        try:
            tensor: Tensor = self._file.get_tensor(key)  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise changed(repr(str(self._path)), error) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def read_header(path: Path, source: str) -> Header:
    """Read and check a file's header.

    Args:
        path: the file.
        source: how the user knows it, the start of every error: "Load Concept UNet: unet_name 'a.safetensors'".

    Raises: GuidanceError: if the file is missing, unreadable, a pickle, not a safetensors file, damaged, or cut short.
    """
    try:
        with open_regular(path, source) as file:
            return _header(file, path, source)
    except OSError as error:
        raise unreadable(source, error) from error


def open_regular(path: Path, source: str, expected: str = "a .safetensors file") -> BinaryIO:
    """Open a file to be read; one that is no regular file would never end, or never begin.

    Args:
        path: the file.
        source: start of every error.
        expected: what the file should be.

    Raises: GuidanceError: if there is no such file, or it cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if S_ISREG(mode):
            return path.open("rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise GuidanceError(f"{source} was not found, expected {expected}; check the name and the folder.") from error
    except (OSError, ValueError) as error:  # a name with a zero is a ValueError
        raise unreadable(source, error) from error
    kind = "a folder" if S_ISDIR(mode) else "no regular file (a pipe, a socket or a device)"
    raise GuidanceError(f"{source} is {kind}, expected {expected}; name another one.")


def is_pickle(path: Path, start: bytes) -> bool:
    """Tell a pickle by its suffix, or a renamed one by the zip or protocol bytes at its start.

    A safetensors header opens with a brace at byte 8.
    """
    by_content = start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{"
    return path.suffix.lower() in PICKLE_SUFFIXES or by_content


def changed(source: str, error: Exception) -> GuidanceError:
    """Return the error of a file that was good when its header was read."""
    return GuidanceError(
        f"{source} could not be read to its end ({_line(error)}), although it was good just now; wait until nothing "
        "writes to it any more, and try again."
    )


def unreadable(source: str, error: Exception) -> GuidanceError:
    """Return the error of a file that the system does not let us read."""
    reason = getattr(error, "strerror", None) or _line(error)
    return GuidanceError(f"{source} cannot be read: {reason}; check the file, its rights and its disk.")


def _header(file: BinaryIO, path: Path, source: str) -> Header:
    start = file.read(9)
    if is_pickle(path, start):
        raise GuidanceError(f"{source} is a pickle, which can run any code when opened; {CONVERT}")
    if path.suffix.lower() != SUFFIX:
        raise GuidanceError(f"{source} ends in {path.suffix or 'nothing'!r}, expected a .safetensors file.")
    size = file.seek(0, 2)
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if not 2 <= length <= _LONGEST_HEADER:
        raise _not_safetensors(source, size)
    if size < 8 + length:
        raise _truncated(source, size, 8 + length)
    file.seek(8)
    try:
        header = parse_header(file.read(length))
    except NoHeaderError as error:
        raise _not_safetensors(source, size) from error
    except DamagedHeaderError as error:
        raise GuidanceError(f"{source} is damaged: {error}; copy or download the file again.") from error
    expected = 8 + length + header.bytes()
    if size < expected:
        raise _truncated(source, size, expected)
    if size > expected:
        raise GuidanceError(
            f"{source} is damaged: {size - expected} bytes follow its last tensor; copy or download the file again."
        )
    return header


def _not_safetensors(source: str, size: int) -> GuidanceError:
    return GuidanceError(
        f"{source} is no safetensors file although its name says so ({size} bytes, no valid header); download it again."
    )


def _truncated(source: str, size: int, expected: int) -> GuidanceError:
    return GuidanceError(f"{source} is cut short: {size} bytes, expected {expected}; copy or download the file again.")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
