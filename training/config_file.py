"""A run's TOML file, read over its preset and under --set, or one sentence on what is wrong with it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..gcfg.errors import GuidanceError
from .config import SECTIONS, Config, fields

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PRESETS = Path(__file__).parent / "presets"


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, over its preset and under the `--set` options.

    What comes last wins: the schema's defaults, the preset, the file, the options.
    Relative paths in the file are relative to the file's folder, and come back absolute.

    Raises: GuidanceError: one sentence, naming the key, what was expected and the nearest known key.
    """
    values = read_toml(path, overrides, _NAMES)
    preset = values.get("preset")
    if preset and (known := _PRESETS / f"{preset}.toml").is_file():
        values = merged(read_toml(known, (), _NAMES), values)
    try:
        # A section that is left out is read too, so that its relative paths mean the same.
        values = {name: {} for name in SECTIONS} | values
        return Config.model_validate(values, context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise GuidanceError(first_problem(error, str(path), _NAMES, "train")) from error


def read_toml(path: Path, overrides: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Read a TOML file's values, with those of the `--set` options in their places; `names` are all settings.

    Raises: GuidanceError: if it cannot be read, or an option is no 'key=value'.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GuidanceError(f"{str(path)!r} cannot be read ({error}), expected a TOML config file.") from error
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise GuidanceError(f"{str(path)!r} is not valid TOML: {error}; correct that line.") from error
    for option in overrides:
        _override(values, option, names)
    return values


def _override(values: dict[str, Any], option: str, names: Sequence[str]) -> None:
    key, equals, text = option.partition("=")
    if not equals:
        raise GuidanceError(f"--set {option!r} has no '=', expected key=value, for example train.steps=2000.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word or path needs no quotes
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise GuidanceError(f"--set {option!r}: {section!r} is no section{_nearest(key.strip(), names)}.")
    values[last] = value


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of both, section by section; `above` wins."""
    both = dict(below)
    for key, value in above.items():
        under = both.get(key)
        both[key] = merged(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return both


def first_problem(error: ValidationError, source: str, names: Sequence[str], command: str) -> str:
    """Say the first thing that is wrong, in the words of the config file.

    Args:
        error: what pydantic found.
        source: the file.
        names: every setting and section, among which a mistyped one is looked for.
        command: whose --help lists them.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    rest = len(error.errors()) - 1
    more = f" ({rest} more {'problem' if rest == 1 else 'problems'} after it)" if rest else ""
    if first["type"] == "extra_forbidden":
        known = f"`gcfg {command} --help` lists them all"
        return f"{source!r}: {key!r} is no known setting{_nearest(key, names)}{more}; {known}."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{source!r}: {message}{more}."
    return f"{source!r}: {key!r} is {first['input']!r}: {message[0].lower()}{message[1:]}{more}."


_NAMES = [name for name, *_ in fields()] + list(Config.model_fields)


def _nearest(key: str, names: Sequence[str]) -> str:
    # A right word in the wrong section, or without one, is as common as a typo.
    by_last = {name.rsplit(".", 1)[-1]: name for name in names}
    close = difflib.get_close_matches(key, names, 1, 0.75)
    close = close or [by_last[n] for n in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_last, 1, 0.6)]
    return f" (did you mean {close[0]!r}?)" if close else ""
