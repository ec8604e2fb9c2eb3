"""What a failed run means: a model names the layer that failed, a user wants to know which input to change.

No configuration says what a model of any architecture takes, and some take more than they are made for, so nothing is
refused before it failed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...gcfg.errors import GuidanceError, short
from ...gcfg.plan import GuidancePlan
from .latents import latent_shapes
from .words import Words

_FAILURES = (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
_POOLED = "pooled_output"  # the vector beside the text in a CONDITIONING

# How layers, and one model, say that what they were given is of another width than theirs.
_WIDTHS_IN_ERRORS = (
    re.compile(r"cannot be multiplied \(\d+x(?P<got>\d+) and (?P<expected>\d+)x\d+\)"),
    re.compile(r"normalized_shape=\[(?P<expected>\d+)\].*\D(?P<got>\d+)\]"),
    re.compile(r"tensor a \((?P<got>\d+)\) must match the size of tensor b \((?P<expected>\d+)\)"),
    re.compile(r"Expected size (?P<got>\d+) but got size (?P<expected>\d+)"),
    re.compile(r"batch2 tensor to be: \[\d+, (?P<got>\d+)\] but got: \[\d+, (?P<expected>\d+)\]"),
    re.compile(r"expects conditioning with \S*?(?P<expected>\d+) features .* but got (?P<got>\d+)"),
)


def explained(
    words: Words, error: BaseException, base: Any, latent_image: Any, own: Mapping[str, Any], plan: GuidancePlan
) -> GuidanceError | None:
    """What to say of a model that failed on the form of what it was given; None where it failed on something else.

    Args:
        words: what the message calls the run's parts.
        error: the failure.
        base: the sampler's model.
        latent_image: what was sampled.
        own: the conditionings of the sampler itself, by what the message calls them.
        plan: all terms.
    """
    if not isinstance(error, _FAILURES) or isinstance(error, GuidanceError | torch.cuda.OutOfMemoryError):
        return None
    conditionings = [(f"{words.node}: {name}", conditioning) for name, conditioning in own.items()]
    for name in ("conditioning", "relative_conditioning"):
        conditionings += [(f"Guidance Term '{s.label}': {name}", getattr(s.term, name)) for s in plan.terms]
    found = [(name, tensor, options) for name, entries in conditionings for tensor, options in entries or ()]
    said = next(filter(None, (pattern.search(str(error)) for pattern in _WIDTHS_IN_ERRORS)), None)
    widths = None if said is None else (int(said["got"]), int(said["expected"]))
    return (
        (None if widths is None else _text_of_other_width(found, *widths) or _pooled_of_other_width(found, *widths))
        or _no_pooled(error, found)
        or _other_latent(words, error, base, latent_image)
    )


def width_error(name: str, got: int, expected: int) -> GuidanceError:
    """The error of a conditioning of another model's width."""
    return GuidanceError(
        f"{name} is {got} wide, expected {expected} for this model; encode the prompt with the CLIP that belongs to "
        f"the model."
    )


def _text_of_other_width(found: list[tuple[str, Any, Any]], got: int, expected: int) -> GuidanceError | None:
    name = next((name for name, text, _ in found if isinstance(text, Tensor) and text.shape[-1] == got), None)
    return None if name is None else width_error(name, got, expected)


def _pooled_of_other_width(found: list[tuple[str, Any, Any]], got: int, expected: int) -> GuidanceError | None:
    """A layer may read the pooled output together with other numbers: then both widths are larger by as many."""
    pooled = [(name, options.get(_POOLED)) for name, _, options in found]
    widths = [(name, vector.shape[-1]) for name, vector in pooled if isinstance(vector, Tensor)]
    known = {width for _, width in widths}
    for name, width in widths:
        if width == got or width + expected - got in known:
            return width_error(f"{name}: its pooled output", width, width + expected - got)
    return None


def _no_pooled(error: BaseException, found: list[tuple[str, Any, Any]]) -> GuidanceError | None:
    name = next((name for name, _, options in found if options.get(_POOLED) is None), None)
    if name is None or not isinstance(error, KeyError) or error.args != (_POOLED,):
        return None
    return GuidanceError(
        f"{name} has no pooled output, expected one, which this model reads beside the text; encode the prompt with "
        f"the CLIP that belongs to the model."
    )


def _other_latent(words: Words, error: BaseException, base: Any, latent_image: Any) -> GuidanceError | None:
    """A video for a model of images, sound for one of video, and the like."""
    latent_format = base.get_model_object("latent_format")
    axes, channels = getattr(latent_format, "latent_dimensions", 2), latent_format.latent_channels
    shapes = latent_shapes(latent_image)
    if len(shapes[0]) - 2 == axes and any(shape[1] == channels for shape in shapes):
        return None
    spatial = ("length",) if axes == 1 else ("frames", "height", "width")[3 - axes :]
    return GuidanceError(
        f"{words.node}: latent_image has shape {' and '.join(map(str, shapes))}, expected "
        f"({', '.join(('batch', 'channels', *spatial))}) with {channels} channels, as {words.model} works "
        f"with, which failed on it ({short(str(error), 80)}); make it with the node or the VAE that belongs to the "
        f"model."
    )
