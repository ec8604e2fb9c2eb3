"""What a UNet file holds, in words: the recogniser of the node Load Concept UNet, without ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..gcfg.concept_file import ConceptFile, describe
from ..gcfg.safetensors_file import LazyStateDict, read_header
from ..gcfg.safetensors_header import Header, shown
from ..gcfg.unet_tensors import not_finite

_LONGEST = 10_000  # characters of one value of the metadata
_FORMS = {
    "ordinary": "ordinary UNet, reads text",
    "folded": "folded null-text UNet, every loader takes it",
    "compact": "compact null-text UNet, for Load Concept UNet only",
}


@dataclass(frozen=True)
class Inspection:
    """What was found: the UNet, the header of the file around it, and which of its tensors are not finite."""

    path: Path
    found: ConceptFile
    header: Header
    broken: tuple[str, ...]


def inspect_file(path: Path) -> Inspection:
    """Recognise a file; its UNet is read once, tensor by tensor.

    Raises: GuidanceError: if it is no readable .safetensors file with a UNet.
    """
    source = f"gcfg inspect: {str(path)!r}"
    header = read_header(path, source)
    lazy = LazyStateDict(path)
    found = describe(lazy, header.metadata, source)
    broken = not_finite({key: lazy[key] for key in lazy if key.startswith(found.prefix)})
    return Inspection(path, found, header, tuple(broken))


def report(inspection: Inspection) -> list[str]:
    """Return the lines `gcfg inspect` prints."""
    found, header = inspection.found, inspection.header
    unet, everything = header.bytes(found.prefix), header.bytes()
    beside = f", {everything - unet:,} bytes of other tensors beside it" if everything > unet else ""
    lines = {
        "file": str(inspection.path),
        "form": _FORMS[found.form],
        "naming": f"{found.naming} keys",
        "prefix": found.prefix or "none",
        "blocks": f"{len(found.blocks)} transformer blocks, first {found.blocks[0]}",
        "context_dim": str(found.context_dim),
        "parameters": f"{header.parameters(found.prefix):,} in the UNet",
        "bytes": f"{unet:,} in the UNet{beside}",
        "values": _values(inspection.broken),
        "metadata": ", ".join(f"{_cut(key)}={_cut(value)}" for key, value in sorted(header.metadata.items())) or "none",
    }
    return [f"{name:<12} {value}" for name, value in lines.items()]


def _values(broken: tuple[str, ...]) -> str:
    if not broken:
        return "finite"
    return f"NaN or infinite in {len(broken)} tensors, first {shown(broken[0])}: the file is of no use"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"
