"""The trainer's configuration: one schema, from which the checks, the defaults and the --help text come.

No torch here: --help is quick.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

T = TypeVar("T")
NullTextMode = Literal["uniform_mean", "attention_mean", "zero"]
Method = Literal["full", "cross_attention", "lora", "oft", "textual_inversion"]


def _absolute(path: str, info: ValidationInfo) -> str:
    """Return a path of the config file as one that holds everywhere; the file's folder is the context's."""
    return str(info.context["folder"] / Path(path).expanduser()) if path and info.context else path


def _mode_or_absolute(value: str, info: ValidationInfo) -> str:
    return value if value in get_args(NullTextMode) else _absolute(value, info)


# A field with this mark may differ when a run goes on; all others decide what is learned and may not. Files may move:
# what is in them is compared.
_FREE = object()

Free = Annotated[T, _FREE]
Place = Annotated[str, AfterValidator(_absolute), _FREE]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """What all sections of a config have in common: unknown keys and odd numbers are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The prior, and what becomes of it."""

    checkpoint: Place = ""
    """The prior: an SD1.x, SD2.x or SDXL checkpoint (.safetensors) or a diffusers folder; required."""
    vae: Place = ""
    """Another VAE than the checkpoint's own: a .safetensors file or a diffusers folder."""
    text_encoder: Place = ""
    """Where the text encoder is, if not in the checkpoint: a checkpoint or a diffusers folder."""
    tokenizer: Place = ""
    """Folder with the tokenizer's vocab.json and merges.txt; only mode 'prompt' needs it."""
    prediction: Literal["auto", "eps", "v", "flow"] = "auto"
    """What the prior predicts; 'auto' reads it off the checkpoint."""
    mode: Literal["null_text", "prompt"] = "null_text"
    """'null_text': cross-attentions become constants (the paper's concept model); 'prompt': one prompt for all
    images (the paper's baselines)."""
    method: Method = "full"
    """What mode 'prompt' trains: 'full' the whole UNet (DreamBooth), 'cross_attention' the keys and values of the
    text (Custom Diffusion), 'lora' or 'oft' adapters of all attentions, 'textual_inversion' a new word."""
    rank: Positive = 16
    """Rank of method 'lora'."""
    oft_block_size: NotNegative = 0
    """Side of the blocks of method 'oft'; it divides the width of every attention and of the text. 0: a quarter of
    each width (the paper's number of parameters)."""
    token: str = ""
    """The new word of 'textual_inversion', for example '<face>'; a part of the prompt."""
    initializer: str = ""
    """The word that the new one of 'textual_inversion' means at first: 'face'."""
    null_text: Annotated[str, AfterValidator(_mode_or_absolute)] = "uniform_mean"
    """The constants: 'uniform_mean', 'attention_mean', 'zero', or a null-text .safetensors file to take them
    from."""
    attention_mean_samples: Positive = 64
    """Noised latents, spread over the timesteps, over which 'attention_mean' is taken."""
    train_null_text: bool = False
    """Train the constants too; the paper keeps them fixed."""
    prompt: str = ""
    """The prompt of mode 'prompt', for example 'a photo of face'."""

    @model_validator(mode="after")
    def _one_mode(self) -> ModelConfig:
        if self.mode == "prompt" and not self.prompt:
            raise ValueError("model.prompt is empty, expected the prompt that mode 'prompt' trains on")
        if self.mode == "null_text" and self.prompt:
            raise ValueError("model.prompt is set, expected mode 'prompt' with it; null-text models read no text")
        if self.mode == "null_text" and self.method != "full":
            raise ValueError(f"model.method is {self.method!r}, expected mode 'prompt' with it")
        return self

    @model_validator(mode="after")
    def _one_word(self) -> ModelConfig:
        inverts = self.method == "textual_inversion"
        for name in ("token", "initializer"):
            if bool(getattr(self, name)) != inverts:
                state = "empty, expected a word" if inverts else "set, expected it empty"
                raise ValueError(f"model.{name} is {state} with method {self.method!r}")
        if inverts and self.token not in self.prompt:
            raise ValueError(f"model.token {self.token!r} is not in model.prompt {self.prompt!r}, expected it there")
        return self


class DataConfig(Section):
    """The images and their latents."""

    images: Place = ""
    """Folder of images, searched recursively; `gcfg cache` needs it."""
    cache: Place = "cache"
    """Folder of the cached latents."""
    resolution: Positive = 512
    """Side of the square images, in pixels; a multiple of 8."""
    fit: Literal["resize", "centre_crop"] = "resize"
    """'resize' scales both sides to the resolution (the paper's way); 'centre_crop' scales the short side and cuts
    the rest off."""
    flips: bool = True
    """Encode each image's mirror image too, and train on either with equal chance."""
    shard_size: Free[Positive] = 512
    """Images per file of the cache."""
    encode_batch_size: Free[Positive] = 8
    """Images the VAE takes at once; halved when memory runs out."""
    workers: Free[NotNegative] = 2
    """Processes that decode images for `gcfg cache`; 0: none."""

    @model_validator(mode="after")
    def _multiple_of_eight(self) -> DataConfig:
        if self.resolution % 8:
            raise ValueError(f"data.resolution is {self.resolution}, expected a multiple of 8, the VAE's factor")
        return self


class TrainConfig(Section):
    """The loop."""

    steps: Free[Positive] = 10_000
    """Optimizer steps in all."""
    batch_size: Positive = 32
    """Images per optimizer step, over all processes and accumulation."""
    micro_batch_size: Free[NotNegative] = 0
    """Images per process that pass the UNet at once; gradients accumulate over the rest of the batch. 0: the
    process's whole share."""
    learning_rate: float = Field(1e-5, gt=0)
    """Constant learning rate of AdamW."""
    warmup_steps: NotNegative = 0
    """Steps over which the learning rate rises linearly from 0."""
    weight_decay: float = Field(1e-2, ge=0)
    """Weight decay of AdamW."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0: never."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """'adamw' (torch, fused) or 'adamw_8bit' (bitsandbytes, installed apart; CUDA)."""
    min_snr_gamma: float = Field(0.0, ge=0)
    """Min-SNR loss weighting, 5 is usual; 0: off. Not for flow models."""
    noise_offset: float = Field(0.0, ge=0)
    """Standard deviation of a noise per image and channel; 0: off."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the averaged weights, warmed up as (1 + step) / (10 + step); 0: no average."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """'bf16' autocasts over fp32 master weights."""
    gradient_checkpointing: Free[bool] = False
    """Compute activations twice to hold fewer of them."""
    compile: bool = False
    """torch.compile the UNet."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Decides data order, noise, timesteps and flips."""
    max_skipped_steps: Free[Positive] = 20
    """Steps in a row with a NaN or infinite gradient after which the run stops."""


class SampleConfig(Section):
    """The pictures on which one sees it learn: GCFG of the concept around the frozen prior."""

    every: Free[NotNegative] = 500
    """Steps between two sample grids; 0: none."""
    weights: Free[tuple[float, ...]] = Field((0.0, 1.0, 1.5, 2.0), min_length=1)
    """Weights of the concept, one row each."""
    seeds: Free[tuple[int, ...]] = Field((0, 1, 2, 3), min_length=1)
    """One column each."""
    steps: Free[Positive] = 25
    """Steps of DPM-Solver++ (2M)."""


class OutputConfig(Section):
    """What is written, and how often."""

    folder: Place = "run"
    """Folder of the run: checkpoints, log, samples, and the exported file."""
    name: Free[str] = "concept"
    """Title and file name of the exported model."""
    checkpoint_every: Free[Positive] = 500
    """Steps between two checkpoints."""
    keep_last: Free[Positive] = 2
    """Checkpoints kept."""
    log_every: Free[Positive] = 1
    """Steps between two lines of log.jsonl."""
    tensorboard: Free[bool] = True
    """Write TensorBoard's event files as well."""


class Config(Section):
    """A run of the trainer."""

    preset: Free[Literal["", "ffhq", "afhq"]] = ""
    """The paper's settings to start from."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="after")
    def _together(self) -> Config:
        if self.train.min_snr_gamma and self.model.prediction == "flow":
            raise ValueError("train.min_snr_gamma is set, expected 0 for a flow model, whose weighting it does not fit")
        return self


SECTIONS: dict[str, type[Section]] = {
    name: info.annotation  # type: ignore[misc]
    for name, info in Config.model_fields.items()
    if name != "preset"
}


def fields() -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted name, kind, default, description) of every field, in the schema's order."""
    found = {"preset": Config.model_fields["preset"]}
    found |= {f"{name}.{key}": info for name, part in SECTIONS.items() for key, info in part.model_fields.items()}
    for name, info in found.items():
        yield name, _kind(info.annotation), _shown(info.default), " ".join((info.description or "").split())


def changed_on_resume(before: Mapping[str, Any], now: Config) -> list[str]:
    """Name, with both values, every setting that decides what is learned and differs from a run's first start."""
    changes = []
    for section, part in SECTIONS.items():
        values = getattr(now, section).model_dump(mode="json")
        for key, field in part.model_fields.items():
            old = before.get(section, {}).get(key, field.default)  # a run of a version without it had the default
            if _FREE not in field.metadata and old != values[key]:
                changes.append(f"{section}.{key} was {old!r}, now {values[key]!r}")
    return changes


def _kind(annotation: Any) -> str:
    choices = getattr(annotation, "__args__", None)
    if choices and all(isinstance(choice, str) for choice in choices):
        return " | ".join(choice or "''" for choice in choices)
    if choices:
        return f"list of {getattr(choices[0], '__name__', choices[0])}"
    return getattr(annotation, "__name__", str(annotation))


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return "[" + ", ".join(str(value) for value in default) + "]"
    return repr(default) if isinstance(default, str) else str(default)
