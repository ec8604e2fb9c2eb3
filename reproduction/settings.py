"""How large the world is made and how much is measured: a preset, or a TOML file of the same keys."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from ..gcfg.errors import GuidanceError
from ..training.config import Positive, Section

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = Path(__file__).parent / "presets"


class World(Section):
    """How many pictures there are, and how long the world's own networks learn from them."""

    variants: Positive = Field(description="Places of each flat drawing that the prior sees.")
    concept_variants: Positive = Field(description="Places of each 3D picture in a concept's folder.")
    autoencoder_steps: Positive
    decoder_steps: Positive = Field(description="Of the decoder alone, after the encoder is settled.")
    judge_steps: Positive
    prior_steps: Positive
    prior_learning_rate: Annotated[float, Field(gt=0)]
    precision: Literal["fp32", "bf16"] = Field(description="Of what trains UNets and the ControlNet.")
    compiled: bool = Field(description="Whether torch.compile makes the prior faster; it wants a C++ compiler.")
    style_steps: Positive = Field(description="Of the prior that goes on with the second style.")
    controlnet_steps: Positive
    controlnet_learning_rate: Annotated[float, Field(gt=0)]


class Methods(Section):
    """The budget of every method on every concept."""

    steps: Positive
    batch_size: Positive
    precision: Literal["fp32", "bf16"]
    learning_rates: tuple[float, ...] = Field(description="Tried for every method with the first seed.")
    seeds: tuple[int, ...]


class Evaluation(Section):
    """Sampler steps, and numbers of images; those of the weight search are smaller."""

    steps: Positive
    precision: Literal["fp32", "bf16"]
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
    """A reproduction; the numbers of images are for each concept and seed."""

    world: World
    methods: Methods
    evaluation: Evaluation


def read_settings(preset: str) -> Settings:
    """Read a preset by its name, or the TOML file of that path.

    Raises: GuidanceError: naming what is wrong in it.
    """
    path = PRESETS / f"{preset}.toml"
    if not path.is_file():
        path = Path(preset)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in PRESETS.glob("*.toml")))
        raise GuidanceError(f"{preset!r} is no preset and no TOML file; choose from {names}, or name a file.")
    try:
        return Settings.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise GuidanceError(f"{str(path)!r}: {' '.join(str(error).split())}") from error
