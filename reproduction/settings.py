"""How large a reproduction is: a preset, or a TOML file of the same keys."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError

from ..gcfg.errors import GuidanceError
from ..training.config import Positive, Section

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"

Schema = TypeVar("Schema", bound=Section)


class World(Section):
    """What is drawn, and how long the world's own networks train."""

    pictures: Positive
    autoencoder_steps: Positive
    classifier_steps: Positive
    prior_steps: Positive
    prior_batch: Positive
    prior_learning_rate: Annotated[float, Field(gt=0)]
    controlnet_steps: Positive
    controlnet_learning_rate: Annotated[float, Field(gt=0)]


class Methods(Section):
    """The budget of every method."""

    steps: Positive
    batch_size: Positive
    precision: Literal["fp32", "bf16"]


class Evaluation(Section):
    """Sampler steps, and numbers of images; those of the weight search are smaller."""

    steps: Positive
    fid_count: Positive
    fid_search_count: Positive
    per_prompt: Positive
    search_per_prompt: Positive
    conditions: Positive
    per_condition: Positive
    search_conditions: Positive
    per_cell: Positive
    diversity_per_prompt: Positive
    sweep_concept: tuple[float, ...]
    sweep_control: tuple[float, ...]


class Settings(Section):
    """A reproduction."""

    world: World
    methods: Methods
    evaluation: Evaluation


def read_settings(preset: str) -> Settings:
    """Read a preset by its name, or the TOML file of that path. Raises: GuidanceError: naming what is wrong in it."""
    return read_preset(preset, PRESETS, Settings)


def read_preset(preset: str, presets: Path, schema: type[Schema]) -> Schema:
    """Read a preset of a folder by its name, or the TOML file of that path.

    Raises: GuidanceError: naming what is wrong in it.
    """
    path = presets / f"{preset}.toml"
    if not path.is_file():
        path = Path(preset)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in presets.glob("*.toml")))
        raise GuidanceError(f"{preset!r} is no preset and no TOML file; choose from {names}, or name a file.")
    try:
        return schema.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise GuidanceError(f"{str(path)!r}: {' '.join(str(error).split())}") from error
