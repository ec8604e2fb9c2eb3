"""An evaluation's TOML file, read over its preset and under --set, or one sentence on what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..gcfg.errors import GuidanceError
from ..training.config import Section
from ..training.config_file import first_problem, merged, read_toml
from .config import Config, MethodConfig, ModelConfig
from .recipe import Recipe, Term

_PRESETS = Path(__file__).parent / "presets"


def fields() -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted name, default, description) of every setting, in the schema's order."""
    sections = {name: info.annotation for name, info in Config.model_fields.items()}
    sections |= {"models.NAME": ModelConfig, "methods.NAME": MethodConfig}
    sections |= {"RECIPE": Recipe, "RECIPE.terms": Term}
    for name, section in sections.items():
        if isinstance(section, type) and issubclass(section, Section):
            for key, field in section.model_fields.items():
                yield f"{name}.{key}", field.get_default(), field.description or "A recipe."


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
