"""The header of a .safetensors file, read as strictly as the format is written down.

8 bytes, the header's length, little-endian
JSON: {key: {"dtype": "F16", "shape": [320, 4, 3, 3], "data_offsets": [begin, end]}, "__metadata__": {text: text}}
the tensors, one behind the other: no gap, no overlap, nothing after the last
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

# Those that torch computes with: F4 and F6 share bytes between values, and no UNet has them.
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64, "C64": 64}
BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
BITS |= {"F16": 16, "BF16": 16, "F32": 32, "F64": 64}
METADATA = "__metadata__"
_GREATEST = 2**63 - 1  # of torch's sizes
_SHOWN = 100  # characters of what a file says, in an error


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


class NoHeaderError(ValueError):
    """The bytes are no JSON object: the file is of some other kind."""


class DamagedHeaderError(ValueError):
    """The header breaks a rule of the format; the message says which."""


def parse_header(raw: bytes) -> Header:
    """Read a header's JSON; that the file holds as many bytes as it says is for the caller to check.

    Raises: NoHeaderError, DamagedHeaderError.
    """
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except DamagedHeaderError:
        raise
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError too
        raise NoHeaderError(str(error)) from error
    if not isinstance(entries, dict):
        raise NoHeaderError("no object")
    metadata = _metadata(entries.pop(METADATA, None))
    shapes, spans = {}, {}
    for key, entry in entries.items():
        _refuse_half_characters(key)
        shapes[key], spans[key] = _entry(key, entry)
    _refuse_gaps(spans)
    return Header(metadata, shapes, {key: end - begin for key, (begin, end) in spans.items()})


def shown(value: object) -> str:
    """Return what a file says in quotes, short enough for a sentence."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def stated_number(metadata: Mapping[str, str], key: str) -> int | None:
    """Return a whole number that metadata states, or None."""
    text = metadata.get(key, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DamagedHeaderError(f"its header names {shown(twice)} twice")
    return found


def _no_constant(name: str) -> None:
    raise NoHeaderError(f"{name} is no JSON")


def _metadata(found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise DamagedHeaderError(f"its metadata is {shown(found)}, expected texts by name")
    for key, value in found.items():
        if not isinstance(value, str):
            raise DamagedHeaderError(f"its metadata has {shown(value)} for {shown(key)}, expected a text")
        _refuse_half_characters(key, value)
    return found


def _refuse_half_characters(*texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DamagedHeaderError(f"its header has half a character in {shown(text)}") from error


def _entry(key: str, entry: Any) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return a tensor's shape and the places of its first byte and of the byte after its last."""
    what = f"its tensor {shown(key)}"
    if not isinstance(entry, dict):
        raise DamagedHeaderError(f"{what} is {shown(entry)}, expected its dtype, shape and data_offsets")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise DamagedHeaderError(f"{what} has the dtype {shown(dtype)}, expected one of {', '.join(BITS)}")
    if not _sizes(shape):
        raise DamagedHeaderError(f"{what} has the shape {shown(shape)}, expected whole numbers from 0 on")
    if not _sizes(offsets) or len(offsets) != 2:
        raise DamagedHeaderError(f"{what} has the data_offsets {shown(offsets)}, expected where it begins and ends")
    size, (begin, end) = prod(shape) * BITS[dtype] // 8, offsets
    if end - begin != size:
        raise DamagedHeaderError(
            f"{what} has the data_offsets {shown(offsets)}, expected {size} bytes for {dtype} of shape {shown(shape)}"
        )
    return tuple(shape), (begin, end)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _GREATEST for value in values)


def _refuse_gaps(spans: Mapping[str, tuple[int, int]]) -> None:
    place = 0
    for key, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != place:
            raise DamagedHeaderError(
                f"its tensor {shown(key)} begins at byte {begin}, expected {place}, where the one before it ends"
            )
        place = end
