"""The evaluation's configuration: one schema, from which the checks, the defaults and the --help text come.

No torch here: --help is quick.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

from ..training.config import NotNegative, Positive, Section
from .recipe import PRIOR, Recipe

Task = Literal["fid", "alignment", "canny", "diversity"]

METHODS = "methods"  # the group of the page's first tables; all others are ablations
TASKS: tuple[Task, ...] = ("fid", "alignment", "canny", "diversity")


class PriorConfig(Section):
    """The frozen model."""

    checkpoint: str = Field(
        "", description="An SD1.x, SD2.x or SDXL checkpoint (.safetensors) or a diffusers folder; required."
    )
    vae: str = Field("", description="Another VAE than the checkpoint's own: a .safetensors file or a folder.")
    text_encoder: str = Field("", description="Where the text encoder is, if not in the checkpoint.")
    tokenizer: str = Field("", description="Folder with the tokenizer's vocab.json and merges.txt, if not beside it.")
    prediction: Literal["auto", "eps", "v", "flow"] = Field(
        "auto", description="What the prior predicts; 'auto' reads it off the checkpoint."
    )
    controlnet: str = Field(
        "", description="ControlNet of the terms with control = true: a .safetensors file or a diffusers folder."
    )


class SamplingConfig(Section):
    """How images are made."""

    size: Positive = Field(512, description="Side of the square images, in pixels; a multiple of 8.")
    steps: Positive = Field(100, description="Steps of DPM-Solver++ (2M); 100 is the paper's number.")
    batch_size: Positive = Field(16, description="Images that pass a UNet at once, and stand in one file.")
    seed: NotNegative = Field(0, description="Decides, with an image's number, its starting noise.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Number format of the UNets.")

    @model_validator(mode="after")
    def _multiple_of_eight(self) -> SamplingConfig:
        if self.size % 8:
            raise ValueError(f"sampling.size is {self.size}, expected a multiple of 8, the VAE's factor")
        return self


class OutputConfig(Section):
    """What is written."""

    folder: str = Field("evaluation", description="Folder of the images, the results and the report.")


class ModelConfig(Section):
    """[models.NAME]: a model beside the prior."""

    unet: str = Field(
        "", description="A UNet file, ordinary or null-text (folded or compact), a checkpoint, or a diffusers folder."
    )
    embedding: str = Field("", description="In place of unet: a textual inversion's file; the prior's UNet reads it.")
    token: str = Field("", description="What stands for the embedding in prompts, for example '<digit>'.")
    parameters: int | None = Field(
        None, ge=0, description="Trained parameters, for the tables; without it the file's metadata says."
    )

    @property
    def file(self) -> str:
        """The one of the two that is given."""
        return self.unet or self.embedding

    @model_validator(mode="after")
    def _one_kind(self) -> ModelConfig:
        if bool(self.unet) == bool(self.embedding):
            raise ValueError("a model needs either a unet or an embedding, expected one of them")
        if bool(self.embedding) != bool(self.token):
            raise ValueError("embedding and token belong together, expected both or none")
        return self


class MethodConfig(Section):
    """[methods.NAME]: a row of the tables, with a recipe for each task it takes part in."""

    title: str = Field("", description="Name in the tables; without it the key.")
    group: str = Field(
        METHODS,
        description="'methods' for the page's first tables; any other word for a table of its own, as of an ablation.",
    )
    fid: Recipe | None = None
    alignment: Recipe | None = None
    canny: Recipe | None = None
    diversity: Recipe | None = None

    def recipe(self, task: Task) -> Recipe | None:
        """Return the recipe of a task, if it takes part."""
        found: Recipe | None = getattr(self, task)
        return found


class FidConfig(Section):
    """Fidelity: distance of unconditional images from the real ones."""

    images: str = Field("", description="Folder of the real images; they are fitted to sampling.size.")
    held_out: str = Field("", description="Folder of real images that no model learned from, for the FID to aim at.")
    count: Positive = Field(50_000, description="Images of each method.")
    search_count: Positive = Field(5_000, description="Images for each weight that is searched.")
    extractor: str = Field("inception", description="'inception', or 'package.module:factory' of a feature network.")
    extractor_weights: str = Field("", description="The extractor's weights: a local file.")
    resize: Literal["torchmetrics", "tensorflow", "none"] = Field(
        "torchmetrics",
        description="To Inception's 299 pixels: bilinear, antialiased ('torchmetrics') or not ('tensorflow'); 'none' "
        "with an extractor of another kind.",
    )


class LabelledPrompt(Section):
    """A prompt, and what the classifier is asked about its images."""

    prompt: str
    label: str


class AlignmentConfig(Section):
    """Control by text: how often the prompted attribute is there."""

    prompts: Literal["table3"] | tuple[LabelledPrompt, ...] = Field(
        "table3", description="List of {prompt, label}, or 'table3', the paper's ten of faces."
    )
    per_prompt: Positive = Field(100, description="Images of each prompt.")
    search_per_prompt: Positive = Field(20, description="Images of each prompt for each weight that is searched.")
    classifier: str = Field(
        "clip", description="'clip' (zero-shot, an attribute against its opposite), or 'package.module:factory'."
    )
    classifier_weights: str = Field("", description="The classifier's weights: a local file, or CLIP's folder.")
    clip: str = Field("", description="Folder of a CLIP, for the CLIP score beside the alignment.")


class CannyConfig(Section):
    """Control by edges: how well the result keeps those of the condition."""

    images: str = Field("", description="Folder of images from which the conditions' edges are taken.")
    count: Positive = Field(200, description="Conditions, the folder's first images.")
    per_condition: Positive = Field(5, description="Images of each condition.")
    search_count: Positive = Field(20, description="Conditions for each weight that is searched.")
    low: NotNegative = Field(100, description="Canny's lower threshold.")
    high: NotNegative = Field(200, description="Canny's upper threshold.")


class DiversityConfig(Section):
    """How much the images of one prompt differ, by the FID's extractor."""

    prompts: tuple[str, ...] = Field(("",), min_length=1, description="Each is measured alone; the mean counts.")
    per_prompt: Annotated[int, Field(gt=1)] = Field(50, description="Images of each prompt.")


class SweepConfig(Section):
    """The plane of two weights (the paper's Fig. 8(a))."""

    recipe: Recipe | None = Field(None, description="A recipe, two of whose weights are lists.")
    prompt: str = Field("", description="What '{prompt}' stands for.")
    label: str = Field("", description="What the classifier is asked.")
    per_cell: Annotated[int, Field(gt=1)] = Field(100, description="Images of each pair of weights.")

    @model_validator(mode="after")
    def _a_plane(self) -> SweepConfig:
        if self.recipe and len(self.recipe.searched) != 2:
            raise ValueError(
                f"sweep.recipe has {len(self.recipe.searched)} weights that are lists, expected exactly two"
            )
        return self


class ReportConfig(Section):
    """The page."""

    title: str = Field("Fidelity and control, measured", description="Its heading.")
    about: str = Field("", description="Paragraphs below it, in Markdown: what the prior and the concept are.")


class Config(Section):
    """An evaluation."""

    preset: Literal["", "ffhq"] = Field("", description="The paper's settings to start from.")
    prior: PriorConfig = PriorConfig()
    sampling: SamplingConfig = SamplingConfig()
    output: OutputConfig = OutputConfig()
    models: dict[str, ModelConfig] = {}
    methods: dict[str, MethodConfig] = {}
    fid: FidConfig = FidConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    canny: CannyConfig = CannyConfig()
    diversity: DiversityConfig = DiversityConfig()
    sweep: SweepConfig = SweepConfig()
    report: ReportConfig = ReportConfig()

    # Settings stay as they were written, so that results do not name the machine; `path` tells where they lead.
    _folder: Path = PrivateAttr(Path())

    def path(self, setting: str) -> Path | None:
        """Return the path that a setting means, relative to the config's folder; None where it is empty."""
        return self._folder / Path(setting).expanduser() if setting else None

    @property
    def output_folder(self) -> Path:
        """Where all is written."""
        return self._folder / Path(self.output.folder).expanduser()

    @model_validator(mode="after")
    def _names(self) -> Config:
        for name in (*self.models, *self.methods):
            if not re.fullmatch(r"[A-Za-z0-9_]+", name):
                raise ValueError(f"the name {name!r} has other characters than letters, digits and '_'; rename it")
        if PRIOR in self.models:
            raise ValueError("models.prior is the prior itself, expected another name for a model beside it")
        for place, recipe in self.recipes():
            for key, model in recipe.models.items():
                if model not in (PRIOR, *self.models):
                    known = ", ".join(repr(name) for name in (PRIOR, *self.models))
                    raise ValueError(f"{place}.{key} is {model!r}, expected one of {known}")
        for name, method in self.methods.items():
            if method.diversity and method.diversity.searched:
                raise ValueError(f"methods.{name}.diversity has a list as weight, expected a number: none is best")
        return self

    def recipes(self) -> Iterator[tuple[str, Recipe]]:
        """Yield every recipe with its key."""
        for name, method in self.methods.items():
            for task in TASKS:
                if recipe := method.recipe(task):
                    yield f"methods.{name}.{task}", recipe
        if self.sweep.recipe:
            yield "sweep.recipe", self.sweep.recipe
