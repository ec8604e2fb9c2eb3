"""What is known of a UNet's tensors before anything is built of them: how many axes each has, and that it is finite."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .errors import GuidanceError
from .safetensors_header import shown

# By LDM names, for images; a video UNet's `time_stack` has its own.
_AXES: tuple[tuple[str, tuple[int, ...]], ...] = (
    (r"bias", (1,)),
    (r"(norm[123]?|(in|out)_layers\.0|out\.0)\.weight", (1,)),
    (r"(attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2))\.weight", (2,)),
    (r"(time_embed\.\d|label_emb\.0\.\d|emb_layers\.1)\.weight", (2,)),
    (r"(in_layers\.2|out_layers\.3|skip_connection|op|conv|out\.2|input_blocks\.0\.0)\.weight", (4,)),
    (r"proj_(in|out)\.weight", (2, 4)),
)
_PATTERNS = tuple((re.compile(rf"(?:.*\.)?(?:{pattern})"), axes) for pattern, axes in _AXES)
_VIDEO = ".time_stack."


def refuse_odd_tensors(tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that a UNet's tensors have the axes that their names say, and hold real numbers.

    Args:
        tensors: by bare LDM key; other keys pass. Only shapes and dtypes are looked at.
        source: start of the error.

    Raises: GuidanceError: naming the first that does not.
    """
    for key, tensor in tensors.items():
        expected = _axes(key)
        if not expected:
            continue
        shape = tuple(tensor.shape)
        if len(shape) not in expected or 0 in shape:
            counts = " or ".join(map(str, expected))
            raise GuidanceError(
                f"{source}: {shown(key)} has the shape {shown(shape)}, expected {counts} axes of at least one value; "
                "export or download the file again."
            )
        if tensor.is_complex():
            raise GuidanceError(
                f"{source}: {shown(key)} has complex numbers, expected real ones; export the file again."
            )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the keys of those tensors that hold NaN or infinite values; each is read once."""
    return [key for key in tensors if not _is_finite(tensors[key])]


def _axes(key: str) -> tuple[int, ...]:
    if _VIDEO in key:
        return ()
    return next((axes for pattern, axes in _PATTERNS if pattern.fullmatch(key)), ())


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # torch finds no extremes of 8-bit floats
        tensor = tensor.float()
    # As fast as memory, where isfinite() is forty times slower; the extremes are NaN if any value is.
    return bool(torch.stack(tensor.aminmax()).isfinite().all())
