"""How large the world of emoji is made: a preset, or a TOML file of the same keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ...training.config import Positive, Section
from ..settings import Evaluation, read_preset
from ..settings import Methods as BudgetOfEach

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


class Methods(BudgetOfEach):
    """The budget of every method on every concept."""

    seeds: tuple[int, ...]


class Settings(Section):
    """A reproduction; the numbers of images are for each concept and seed."""

    world: World
    methods: Methods
    evaluation: Evaluation


def read_settings(preset: str) -> Settings:
    """Read a preset by its name, or the TOML file of that path. Raises: GuidanceError: naming what is wrong in it."""
    return read_preset(preset, PRESETS, Settings)
