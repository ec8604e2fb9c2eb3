"""An evaluation's TOML file, read over its preset and under --set, or one sentence on what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from ...gcfg.errors import GuidanceError
from ..config_file import first_problem, merged, read_toml
from .config import Config, fields

_PRESETS = Path(__file__).parent / "presets"
_NAMES = [name for name, *_ in fields()] + list(Config.model_fields)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, over its preset and under the `--set` options; what comes last wins.

    Relative paths are relative to the file's folder, see `Config.path`.

    Raises: GuidanceError: one sentence, naming the key, what was expected and the nearest known key.
    """
    values = read_toml(path, overrides, _NAMES)
    preset = values.get("preset")
    if preset and (known := _PRESETS / f"{preset}.toml").is_file():
        values = merged(read_toml(known, (), _NAMES), values)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise GuidanceError(first_problem(error, str(path), _NAMES, "evaluate")) from error
    config._folder = path.resolve().parent
    return config
