"""`gcfg convert`: a pickled checkpoint as a .safetensors file; nothing that stands in the pickle is run."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..gcfg.errors import GuidanceError
from ..gcfg.safetensors_file import SUFFIX, is_pickle, open_regular, read_header, unreadable
from ..gcfg.safetensors_header import METADATA, shown
from ..training.files import whole_file

_EXPECTED = "a pickle such as .ckpt or .pt"
_WRAPPER = "state_dict"  # where training frameworks keep the weights
_RENAMED = "-converted"  # a pickle that ends in .safetensors has taken the name of what it would become
_CALLED = re.compile(r"GLOBAL ([\w.]+)")  # torch's words for what a pickle would call
_UNPICKLER = re.compile(r"WeightsUnpickler error: ([^\n]*)")
_FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64")
_FLOATS8 = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz")
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_NAMES = ("bool", *_INTEGERS, *_FLOATS, *_FLOATS8)
_DTYPES = frozenset(getattr(torch, name) for name in _NAMES if hasattr(torch, name))  # what read_header takes


def convert(path: Path, overwrite: bool = False) -> Path:
    """Write the tensors of a pickle beside it, and return the new file's path; it is whole or not there.

    Only tensors are read (`weights_only` of torch.load), and only those of `state_dict` where there is one.

    Args:
        path: the pickle, whatever its name ends in.
        overwrite: whether a file of the new name may be replaced.

    Raises: GuidanceError: if it is no pickle of tensors, would take more room than its size allows, or cannot be
        written.
    """
    source = f"gcfg convert: {str(path)!r}"
    try:
        with open_regular(path, source, _EXPECTED) as file:
            _refuse_others(file, path, source)
            destination = _destination(path, overwrite, source)
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            tensors = _tensors(_unpickled(file, source), source)
    except OSError as error:
        raise unreadable(source, error) from error
    _refuse_expanded(tensors, size, source)
    try:
        with whole_file(destination) as beside:
            save_file(_apart(tensors), beside, {"format": "pt"})
            read_header(beside, f"{source}: the new file")
    except (OSError, SafetensorError) as error:
        raise GuidanceError(f"{source} cannot be written as {str(destination)!r}: {_line(error)}.") from error
    return destination


def _refuse_others(file: BinaryIO, path: Path, source: str) -> None:
    start = file.read(9)
    if not is_pickle(path, start):
        raise GuidanceError(f"{source} is not pickled, expected {_EXPECTED}; there is nothing to convert.")
    if not start.startswith(b"PK"):
        return
    try:
        _refuse_packed(zipfile.ZipFile(file), file.seek(0, os.SEEK_END), source)
    except (zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, GuidanceError):
            raise
        raise GuidanceError(f"{source} is damaged: {_line(error)}; copy or download the file again.") from error


def _destination(path: Path, overwrite: bool, source: str) -> Path:
    renamed = path.suffix.lower() == SUFFIX
    destination = path.with_name(f"{path.stem}{_RENAMED if renamed else ''}{SUFFIX}")
    if not overwrite and os.path.lexists(destination):
        raise GuidanceError(f"{source} would become {str(destination)!r}, which exists; move it, or give --overwrite.")
    return destination


def _refuse_packed(archive: zipfile.ZipFile, size: int, source: str) -> None:
    """Refuse an archive that unpacks to more than itself; torch.save packs nothing."""
    entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise GuidanceError(
            f"{source} is an archive of {size:,} bytes that unpacks to {unpacked:,}, expected one as torch.save writes "
            "it; download the file again from somewhere you trust."
        )


def _unpickled(file: BinaryIO, source: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused anyway
            # An open file: by a name that ends in .safetensors torch would take it for one.
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it likes over a bad file
        if match := _CALLED.search(str(error)):
            raise GuidanceError(
                f"{source} holds {shown(match[1])}, expected tensors only, since anything else may run code; find the "
                "model as .safetensors."
            ) from error
        raise GuidanceError(
            f"{source} cannot be read as a pickle of tensors{_reason(error)}; find the model as .safetensors."
        ) from error


def _reason(error: Exception) -> str:
    """Return what is wrong, in brackets, without torch's advice to load the file in a way that runs its code."""
    text = str(error)
    if match := _UNPICKLER.search(text):
        text = match[1]
    line = _line(text) if "weights_only" not in text else ""
    return f" ({line})" if line else ""


def _tensors(content: Any, source: str) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get(_WRAPPER), Mapping):
        content = content[_WRAPPER]
    if not isinstance(content, Mapping):
        raise GuidanceError(f"{source} holds a {type(content).__name__}, expected tensors by name; nothing is written.")
    found = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not found:
        raise GuidanceError(f"{source} holds no tensors by name, expected a model's weights; nothing is written.")
    for key, tensor in found.items():
        if key == METADATA or key != key.encode(errors="replace").decode():
            raise GuidanceError(
                f"{source} has a tensor of the name {shown(key)}, which a .safetensors file cannot have."
            )
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested or tensor.dtype not in _DTYPES:
            kind = f"{tensor.layout}, {tensor.dtype}, on {tensor.device}"
            raise GuidanceError(f"{source}: {shown(key)} is a tensor of another kind ({kind}), expected plain weights.")
    return found


def _refuse_expanded(tensors: Mapping[str, Tensor], size: int, source: str) -> None:
    """Refuse tensors that repeat few values: written out they could fill the disk. Weights tied once may pass."""
    written = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if written > 2 * size:
        raise GuidanceError(
            f"{source} has {size:,} bytes, but its tensors would take {written:,}, expected about as many; "
            "find the model as .safetensors."
        )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with memory of their own, copied only where two share it or one is a part of it."""
    taken: set[int] = set()
    found = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().resolve_conj().resolve_neg()  # which torch keeps as a note beside the memory
        memory = tensor.untyped_storage()
        whole = tensor.is_contiguous() and memory.nbytes() == tensor.numel() * tensor.element_size()
        copied = not whole or memory.data_ptr() in taken
        found[key] = tensor.clone(memory_format=torch.contiguous_format) if copied else tensor
        taken.add(memory.data_ptr())
    return found


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200]
