"""What reaches a node: ComfyUI checks widgets and the types of links, but not what a switch of any type passes on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral, Real
from typing import Any, NamedTuple

from torch import Tensor

from ..gcfg.diagnostics import GuidanceReport
from ..gcfg.errors import GuidanceError, short
from ..gcfg.terms import GuidanceTerm

_SEEDS = ("seed", "noise_seed")  # stock nodes take any that torch takes


class _Kind(NamedTuple):
    """A type of input: what it must be, and what a user does about one that is not."""

    fits: Callable[[Any], bool]
    expected: str
    fix: str


def _is_conditioning(value: Any) -> bool:
    """Whether it is a list of [tensor, options] pairs; the sampler refuses an empty one."""
    pairs = isinstance(value, list | tuple) and all(isinstance(entry, list | tuple) for entry in value)
    return pairs and all(isinstance(entry[1], dict) for entry in value if len(entry) == 2)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return isinstance(value, Real)


_KINDS = {
    "MODEL": _Kind(lambda v: hasattr(v, "get_model_object"), "a model", "connect a node that loads one"),
    "CLIP": _Kind(
        lambda v: hasattr(v, "tokenize"),
        "a text encoder",
        "connect a Load CLIP node where the checkpoint holds none",
    ),
    "VAE": _Kind(lambda v: hasattr(v, "decode"), "a VAE", "connect a Load VAE node where the checkpoint holds none"),
    "CONDITIONING": _Kind(_is_conditioning, "a prompt", "connect a CLIP Text Encode node"),
    "LATENT": _Kind(
        lambda v: isinstance(v, dict) and len(getattr(v.get("samples"), "shape", ())) > 2,  # batch and channels first
        "a latent image",
        "connect an Empty Latent Image or a VAE Encode node",
    ),
    "MASK": _Kind(lambda v: isinstance(v, Tensor) or hasattr(v, "is_nested"), "a mask", "connect a MASK output"),
    "GCFG_TERMS": _Kind(
        lambda v: isinstance(v, list | tuple) and all(isinstance(term, GuidanceTerm) for term in v),
        "guidance terms",
        "connect a Guidance Term node",
    ),
    "GCFG_REPORT": _Kind(
        lambda v: isinstance(v, GuidanceReport), "a report", "connect the report output of a GCFG sampler or guider"
    ),
    "STRING": _Kind(lambda v: isinstance(v, str), "text", "connect text, or type it"),
    "FLOAT": _Kind(_is_number, "a number", "connect a number, or type it"),
}


def checked(node: str, free: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a node's function refuse inputs that are not what `INPUT_TYPES` says.

    None at an optional input counts as not connected, so it gets the function's default.

    Args:
        node: the node's name, for errors.
        free: lists to choose from whose values are not looked at.

    Raises: GuidanceError (on the call): names the input.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @wraps(function)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind_partial(self, *args, **kwargs).arguments
            del given["self"]
            given.update(given.pop("sockets", {}))
            declared = self.INPUT_TYPES()
            for name, spec in declared.get("required", {}).items():
                _check(node, name, spec, given.get(name), name in free)
            for name, spec in declared.get("optional", {}).items():
                if given.get(name) is None:
                    given.pop(name, None)
                else:
                    _check(node, name, spec, given[name], name in free)
            return function(self, **given)

        return call

    return decorate


def _check(node: str, name: str, spec: tuple[Any, ...], value: Any, free: bool) -> None:
    kind = spec[0]
    if kind == "INT":
        low, high = (None, None) if name in _SEEDS else (spec[1]["min"], spec[1]["max"])
        expected = "a whole number" if low is None else f"a whole number from {low} to {high}"
        found = _Kind(lambda v: isinstance(v, Integral) and (low is None or low <= v <= high), expected, "correct it")
    elif isinstance(kind, list | tuple):
        expected = "a name from its list" if free or len(kind) > 10 else f"one of {', '.join(map(str, kind))}"
        found = _Kind(lambda v: isinstance(v, str) and (free or v in kind), expected, "choose one")
    else:
        found = _KINDS[kind]
    if not found.fits(value):
        is_what = "empty" if value is None else _shown(value)
        raise GuidanceError(f"{node}: {name} is {is_what}, expected {found.expected}; {found.fix}.")


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"'{short(value)}'"
    return (
        short(repr(value)) if isinstance(value, float) or _is_number(value) else f"of the type {type(value).__name__}"
    )
