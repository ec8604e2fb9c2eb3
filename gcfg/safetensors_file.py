"""Open a .safetensors file, or say in one sentence why it cannot be opened; a pickle is never touched."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from .errors import GuidanceError

SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

_CONVERT = (
    "import torch, safetensors.torch as s; d = torch.load('{old}', map_location='cpu', weights_only=True); "
    "d = d.get('state_dict', d); "
    "s.save_file({{k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}}, '{new}')"
)


@dataclass(frozen=True)
class Header:
    """What a file says about itself: its metadata, and each tensor's shape and size."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    sizes: dict[str, int]

    def parameters(self, prefix: str = "") -> int:
        """Number of values in the tensors whose key starts with the prefix."""
        return sum(prod(shape) for key, shape in self.shapes.items() if key.startswith(prefix))

    def bytes(self, prefix: str = "") -> int:
        """Bytes of the tensors whose key starts with the prefix."""
        return sum(size for key, size in self.sizes.items() if key.startswith(prefix))


class LazyStateDict(Mapping[str, Tensor]):
    """A file's tensors, each read when it is asked for, so that a look at a checkpoint does not load it."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(str(path), framework="pt")
        self._keys = dict.fromkeys(self._file.keys())  # type: ignore[no-untyped-call]  # in the file's order

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        tensor: Tensor = self._file.get_tensor(key)  # type: ignore[no-untyped-call]
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

    Raises: GuidanceError: if the file is missing, a pickle, not a safetensors file, or cut short.
    """
    if not path.is_file():
        raise GuidanceError(f"{source} was not found, expected a .safetensors file; check the name and the folder.")
    if path.suffix.lower() in PICKLE_SUFFIXES or _starts_like_pickle(path):
        raise GuidanceError(f"{source} is a pickle, which can run any code when opened; {conversion(path)}")
    if path.suffix.lower() != SUFFIX:
        raise GuidanceError(f"{source} ends in {path.suffix or 'nothing'!r}, expected a .safetensors file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        # The format allows a header of at most 100 MB: a greater length means some other kind of file.
        if not 2 <= length <= 100_000_000:
            raise _not_safetensors(source, size)
        raw = file.read(length)
    if len(raw) < length:
        raise _truncated(source, size, 8 + length)
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", None) or {}
        shapes = {key: tuple(entry["shape"]) for key, entry in entries.items()}
        spans = {key: entry["data_offsets"] for key, entry in entries.items()}
        sizes = {key: int(end) - int(begin) for key, (begin, end) in spans.items()}
        end = max((int(span[1]) for span in spans.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _not_safetensors(source, size) from error
    if size < 8 + length + end:
        raise _truncated(source, size, 8 + length + end)
    return Header(metadata, shapes, sizes)


def conversion(path: Path) -> str:
    """Say how to convert a pickle, as the end of a sentence."""
    renamed = path.suffix.lower() == SUFFIX  # torch.load goes by the name
    old = f"{path.stem}.ckpt" if renamed else path.name
    command = _CONVERT.format(old=old, new=f"{path.stem}.safetensors")
    first = f"rename it to {old!r} and " if renamed else ""
    return f'expected .safetensors; {first}convert it once, in its folder, with: python -c "{command}"'


def _starts_like_pickle(path: Path) -> bool:
    """Recognise a renamed pickle by its zip or protocol bytes; a safetensors header opens with a brace at byte 8."""
    with path.open("rb") as file:
        start = file.read(9)
    return start.startswith((b"PK\x03\x04", b"\x80")) and start[8:9] != b"{"


def _not_safetensors(source: str, size: int) -> GuidanceError:
    return GuidanceError(
        f"{source} is no safetensors file although its name says so ({size} bytes, no valid header); download it again."
    )


def _truncated(source: str, size: int, expected: int) -> GuidanceError:
    return GuidanceError(f"{source} is cut short: {size} bytes, expected {expected}; copy or download the file again.")
