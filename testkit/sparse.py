"""Write a safetensors file whose all-zero tensors are a hole in the file, so that they take no disk."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def write_with_holes(path: Path, tensors: Mapping[str, Tensor], zeros: Mapping[str, tuple[int, ...]]) -> None:
    """Write `tensors`, then float16 zeros of the shapes in `zeros`, which the file system does not store.

    A safetensors file is an 8-byte header length, a JSON header with byte offsets, and the data; truncating it to a
    greater length appends zeros.
    """
    blob = save(dict(tensors))
    start = 8 + int.from_bytes(blob[:8], "little")
    header, data = json.loads(blob[8:start]), memoryview(blob)[start:]
    end = len(data)
    for name, shape in zeros.items():
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end := end + 2 * math.prod(shape)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(data)
        file.truncate(8 + len(text) + end)
