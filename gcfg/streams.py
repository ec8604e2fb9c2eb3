"""Latents of several streams, such as video and audio, and how strongly a term acts on each.

ComfyUI's samplers see the streams of a nested latent packed into one tensor, (B, 1, L).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .curves import MAX_WEIGHT
from .errors import GuidanceError, short
from .masks import fit_mask, repeated

_KINDS = {3: "audio", 4: "image", 5: "video"}  # of a latent of one stream, by its axes


def stream_names(shapes: Sequence[Sequence[int]]) -> tuple[tuple[str, ...], ...]:
    """What users may call each stream of a latent: its kind where that is known, and its number.

    Args:
        shapes: of the streams, (B, C, *spatial) each.
    """
    kinds = [_KINDS.get(len(shapes[0]), "")]
    if len(shapes) > 1:
        kinds = ["video", "audio"] if kinds == ["video"] else []
    kinds += [""] * (len(shapes) - len(kinds))
    return tuple((kind, str(place)) if kind else (str(place),) for place, kind in enumerate(kinds, start=1))


def parse_stream_weights(text: str, name: str) -> dict[str, float]:
    """Read `stream: weight` pairs, separated by commas or lines, such as `video: 1, audio: 0.5`.

    Args:
        text: the pairs; empty for none.
        name: the node, for errors.

    Raises:
        GuidanceError: if a pair cannot be read, or names a stream again; names the pair.
    """
    found: dict[str, float] = {}
    for pair in filter(None, (pair.strip() for pair in text.replace("\n", ",").split(","))):
        stream, _, number = (part.strip().lower() for part in pair.partition(":"))
        try:
            weight = float(number)
        except ValueError:
            weight = float("nan")
        if not stream or not abs(weight) <= MAX_WEIGHT:
            raise GuidanceError(
                f"{name}: stream_weights has '{short(pair)}', expected stream: weight with a weight from "
                f"{-MAX_WEIGHT:g} to {MAX_WEIGHT:g}, such as video: 1, audio: 0.5; correct it."
            )
        if stream in found:
            raise GuidanceError(f"{name}: stream_weights names '{short(stream)}' twice, expected once; delete one.")
        found[stream] = weight
    return found


def factor_of_delta(
    masks: Sequence[Tensor],
    stream_weights: Mapping[str, float],
    shapes: Sequence[Sequence[int]],
    name: str,
) -> Tensor | None:
    """What a term's delta is multiplied with, or None for 1 everywhere.

    Of a latent of several streams, which samplers see packed as (B, 1, L), each mask belongs to the stream of its
    place, as ComfyUI's noise masks do; streams without one are not masked.

    Args:
        masks: (N, H, W) each.
        stream_weights: by the name of a stream.
        shapes: of the latent's streams, (B, C, *spatial) each.
        name: the term, for errors.

    Returns:
        (N, 1, *spatial), or (N, 1, L) for several streams.

    Raises:
        GuidanceError: if a stream is unknown or named twice, there are more masks than streams, or a masked stream is
            no picture.
    """
    streams = stream_names(shapes)
    for stream in stream_weights:
        if not any(stream in names for names in streams):
            known = " or ".join(names[0] for names in streams)
            raise GuidanceError(
                f"{name}: stream_weights names '{short(stream)}', expected {known}, as the latent holds; correct it."
            )
    for names in streams:
        given = [stream for stream in names if stream in stream_weights]
        if len(given) > 1:
            raise GuidanceError(
                f"{name}: stream_weights names one stream twice, as {' and as '.join(given)}, expected once; delete "
                f"one."
            )
    if len(masks) > len(shapes):
        raise GuidanceError(
            f"{name}: mask has {len(masks)} parts, expected at most {len(shapes)} as the latent has; connect one mask."
        )
    weights = [next((stream_weights[name] for name in names if name in stream_weights), 1.0) for names in streams]
    if not masks and all(weight == 1.0 for weight in weights):
        return None
    fitted = [fit_mask(mask, shape, name) for mask, shape in zip(masks, shapes, strict=False)]
    fitted += [torch.ones(1, 1, *[1] * (len(shape) - 2)) for shape in shapes[len(masks) :]]
    factors = [mask * weight for mask, weight in zip(fitted, weights, strict=True)]
    if len(shapes) == 1:
        return factors[0]
    batch = max(len(factor) for factor in factors)
    packed = [
        repeated(factor, batch).expand(batch, *shape[1:]).reshape(batch, 1, -1)
        for factor, shape in zip(factors, shapes, strict=True)
    ]
    return torch.cat(packed, dim=-1)
