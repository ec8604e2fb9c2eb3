"""What a UNet file holds, in words: the recogniser of the node Load Concept UNet, without ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..gcfg.concept_file import ConceptFile, describe
from ..gcfg.safetensors_file import Header, LazyStateDict, read_header

_FORMS = {
    "ordinary": "ordinary UNet, reads text",
    "folded": "folded null-text UNet, every loader takes it",
    "compact": "compact null-text UNet, for Load Concept UNet only",
}


@dataclass(frozen=True)
class Inspection:
    """What was found: the UNet, and the header of the file around it."""

    path: Path
    found: ConceptFile
    header: Header


def inspect_file(path: Path) -> Inspection:
    """Recognise a file without reading more of it than the recogniser looks at.

    Raises: GuidanceError: if it is no readable .safetensors file with a UNet.
    """
    source = f"gcfg inspect: {str(path)!r}"
    header = read_header(path, source)
    return Inspection(path, describe(LazyStateDict(path), header.metadata, source), header)


def report(inspection: Inspection) -> str:
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
        "metadata": ", ".join(f"{key}={value}" for key, value in sorted(header.metadata.items())) or "none",
    }
    return "\n".join(f"{name:<12} {value}" for name, value in lines.items())
