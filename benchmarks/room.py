"""Which cases fit into the machine's memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import comfy.model_management as management
import psutil

from ..testkit.layouts import FAMILIES, unet
from .bench import Bench
from .cases import Case
from .files import in_transformer

SPARE = 2.5e9  # for activations, the file that is being read, and everything else


def fitting(bench: Bench, cases: Sequence[Case], skipped: list[str]) -> list[Case]:
    """Return the cases whose models, those of the cases before them included, fit; say of the others why not.

    On a GPU ComfyUI decides by itself what to keep there, so nothing is left out.
    """
    if bench.clock.device.type != "cpu":
        return list(cases)
    sizes, available = _sizes(bench), psutil.virtual_memory().available - SPARE
    kept: list[Case] = []
    models: set[str] = set()
    for case in cases:
        needed = sum(sizes[name] for name in models | {*case.models})
        if needed <= available:
            kept.append(case)
            models |= {*case.models}
            continue
        need, free = f"{needed / 1e9:.1f} GB", f"{available / 1e9:.1f} GB"
        skipped.append(
            f"{bench.family}, {case.text}: its models and those of the rows above need {need} of memory, and {free} "
            "are free for them; close other programs, name fewer rows with --case, or store weights as --weights bf16."
        )
    return kept


def _sizes(bench: Bench) -> dict[str, float]:
    """Bytes of each model's weights as ComfyUI will store them.

    The concept UNet is whole until its unused attention is dropped; a clone has those of its own that its LoRA patches.
    """
    shapes = unet(FAMILIES[bench.family])
    parameters = sum(map(math.prod, shapes.values()))
    patched = sum(math.prod(shape) for name, shape in shapes.items() if in_transformer(name) and len(shape) > 1)
    wide = management.unet_dtype(model_params=parameters).itemsize
    return {"prior": parameters * wide, "concept": parameters * wide, "tuned": patched * wide}
