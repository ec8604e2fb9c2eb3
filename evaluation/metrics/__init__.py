"""What the paper measures (Appendix D.3), each metric a function of uint8 images, (N, 3, H, W)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from ...gcfg.errors import GuidanceError


def own_network(setting: str, name: str, weights: Path | None) -> Any:
    """Return an extractor or a classifier of the user's own: `factory(weights)` of the name 'package.module:factory'.

    Args:
        setting: the config key, for messages.
        name: of the factory.
        weights: a local file, or None where the setting is empty.

    Raises: GuidanceError: if there is no such factory, or no such file.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise GuidanceError(f"{setting} is {name!r}, expected 'package.module:factory'.")
    if weights is not None and not weights.exists():
        raise GuidanceError(f"{setting}_weights is {str(weights)!r}, which does not exist; correct the path.")
    try:
        factory = getattr(import_module(module), attribute)
    except ImportError as error:
        raise GuidanceError(
            f"{setting} is {name!r}, but importing {module!r} failed ({error}); install the package it is in, or add "
            "its folder to PYTHONPATH."
        ) from error
    except AttributeError as error:
        raise GuidanceError(f"{setting} is {name!r}, but {module!r} has no {attribute!r}; correct the name.") from error
    return factory(weights)
