"""The trainer's configuration: one schema, from which the checks, the defaults and the --help text come.

No torch here: --help is quick.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NullTextMode = Literal["uniform_mean", "attention_mean", "zero"]
Method = Literal["full", "cross_attention", "lora", "oft", "textual_inversion"]

# A field with this mark may differ when a run goes on; all others decide what is learned and may not. Files may move:
# what is in them is compared.
FREE: dict[str, Any] = {"free_on_resume": True}

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """What all sections of a config have in common: unknown keys and odd numbers are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class ModelConfig(Section):
    """The prior, and what becomes of it."""

    checkpoint: str = Field(
        "",
        description="The prior: an SD1.x, SD2.x or SDXL checkpoint (.safetensors) or a diffusers folder; required.",
        json_schema_extra=FREE,
    )
    vae: str = Field(
        "",
        description="Another VAE than the checkpoint's own: a .safetensors file or a diffusers folder.",
        json_schema_extra=FREE,
    )
    text_encoder: str = Field(
        "",
        description="Where the text encoder is, if not in the checkpoint: a checkpoint or a diffusers folder.",
        json_schema_extra=FREE,
    )
    tokenizer: str = Field(
        "",
        description="Folder with the tokenizer's vocab.json and merges.txt; only mode 'prompt' needs it.",
        json_schema_extra=FREE,
    )
    prediction: Literal["auto", "eps", "v", "flow"] = Field(
        "auto", description="What the prior predicts; 'auto' reads it off the checkpoint."
    )
    mode: Literal["null_text", "prompt"] = Field(
        "null_text",
        description="'null_text': cross-attentions become constants (the paper's concept model); "
        "'prompt': one prompt for all images (the paper's baselines).",
    )
    method: Method = Field(
        "full",
        description="What mode 'prompt' trains: 'full' the whole UNet (DreamBooth), 'cross_attention' the keys and "
        "values of the text (Custom Diffusion), 'lora' or 'oft' adapters of all attentions, 'textual_inversion' a new "
        "word.",
    )
    rank: Positive = Field(16, description="Rank of method 'lora'.")
    oft_block_size: NotNegative = Field(
        0,
        description="Side of the blocks of method 'oft'; it divides the width of every attention and of the text. 0: a "
        "quarter of each width (the paper's number of parameters).",
    )
    token: str = Field(
        "", description="The new word of 'textual_inversion', for example '<face>'; a part of the prompt."
    )
    initializer: str = Field("", description="The word that the new one of 'textual_inversion' means at first: 'face'.")
    null_text: str = Field(
        "uniform_mean",
        description="The constants: 'uniform_mean', 'attention_mean', 'zero', or a null-text .safetensors file to take "
        "them from.",
    )
    attention_mean_samples: Positive = Field(
        64, description="Noised latents, spread over the timesteps, over which 'attention_mean' is taken."
    )
    train_null_text: bool = Field(False, description="Train the constants too; the paper keeps them fixed.")
    prompt: str = Field("", description="The prompt of mode 'prompt', for example 'a photo of face'.")

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

    images: str = Field(
        "", description="Folder of images, searched recursively; `gcfg cache` needs it.", json_schema_extra=FREE
    )
    cache: str = Field("cache", description="Folder of the cached latents.", json_schema_extra=FREE)
    resolution: Positive = Field(512, description="Side of the square images, in pixels; a multiple of 8.")
    fit: Literal["resize", "centre_crop"] = Field(
        "resize",
        description="'resize' scales both sides to the resolution (the paper's way); 'centre_crop' scales the short "
        "side and cuts the rest off.",
    )
    flips: bool = Field(
        True, description="Encode each image's mirror image too, and train on either with equal chance."
    )
    shard_size: Positive = Field(512, description="Images per file of the cache.", json_schema_extra=FREE)
    encode_batch_size: Positive = Field(
        8, description="Images the VAE takes at once; halved when memory runs out.", json_schema_extra=FREE
    )
    workers: NotNegative = Field(
        2, description="Processes that decode images for `gcfg cache`; 0: none.", json_schema_extra=FREE
    )

    @model_validator(mode="after")
    def _multiple_of_eight(self) -> DataConfig:
        if self.resolution % 8:
            raise ValueError(f"data.resolution is {self.resolution}, expected a multiple of 8, the VAE's factor")
        return self


class TrainConfig(Section):
    """The loop."""

    steps: Positive = Field(10_000, description="Optimizer steps in all.", json_schema_extra=FREE)
    batch_size: Positive = Field(32, description="Images per optimizer step, over all processes and accumulation.")
    micro_batch_size: NotNegative = Field(
        0,
        description="Images per process that pass the UNet at once; gradients accumulate over the rest of the batch. "
        "0: the process's whole share.",
        json_schema_extra=FREE,
    )
    learning_rate: float = Field(1e-5, gt=0, description="Constant learning rate of AdamW.")
    warmup_steps: NotNegative = Field(0, description="Steps over which the learning rate rises linearly from 0.")
    weight_decay: float = Field(1e-2, ge=0, description="Weight decay of AdamW.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the second moment.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0: never.")
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="'adamw' (torch, fused) or 'adamw_8bit' (bitsandbytes, installed apart; CUDA)."
    )
    min_snr_gamma: float = Field(
        0.0, ge=0, description="Min-SNR loss weighting, 5 is usual; 0: off. Not for flow models."
    )
    noise_offset: float = Field(0.0, ge=0, description="Standard deviation of a noise per image and channel; 0: off.")
    ema_decay: float = Field(
        0.9999,
        ge=0,
        lt=1,
        description="Decay of the averaged weights, warmed up as (1 + step) / (10 + step); 0: no average.",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="'bf16' autocasts over fp32 master weights.")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations twice to hold fewer of them.", json_schema_extra=FREE
    )
    compile: bool = Field(False, description="torch.compile the UNet.")
    seed: int = Field(0, ge=0, lt=2**62, description="Decides data order, noise, timesteps and flips.")
    max_skipped_steps: Positive = Field(
        20,
        description="Steps in a row with a NaN or infinite gradient after which the run stops.",
        json_schema_extra=FREE,
    )


class SampleConfig(Section):
    """The pictures on which one sees it learn: GCFG of the concept around the frozen prior."""

    every: NotNegative = Field(500, description="Steps between two sample grids; 0: none.", json_schema_extra=FREE)
    weights: tuple[float, ...] = Field(
        (0.0, 1.0, 1.5, 2.0), min_length=1, description="Weights of the concept, one row each.", json_schema_extra=FREE
    )
    seeds: tuple[int, ...] = Field((0, 1, 2, 3), min_length=1, description="One column each.", json_schema_extra=FREE)
    steps: Positive = Field(25, description="Steps of DPM-Solver++ (2M).", json_schema_extra=FREE)


class OutputConfig(Section):
    """What is written, and how often."""

    folder: str = Field(
        "run",
        description="Folder of the run: checkpoints, log, samples, and the exported file.",
        json_schema_extra=FREE,
    )
    name: str = Field("concept", description="Title and file name of the exported model.", json_schema_extra=FREE)
    checkpoint_every: Positive = Field(500, description="Steps between two checkpoints.", json_schema_extra=FREE)
    keep_last: Positive = Field(2, description="Checkpoints kept.", json_schema_extra=FREE)
    log_every: Positive = Field(1, description="Steps between two lines of log.jsonl.", json_schema_extra=FREE)
    tensorboard: bool = Field(True, description="Write TensorBoard's event files as well.", json_schema_extra=FREE)


class Config(Section):
    """A run of the trainer."""

    preset: Literal["", "ffhq", "afhq"] = Field(
        "", description="The paper's settings to start from.", json_schema_extra=FREE
    )
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


def fields() -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted name, kind, default, description) of every field, in the schema's order."""
    for name, info in Config.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            for key, field in section.model_fields.items():
                yield f"{name}.{key}", _kind(field.annotation), _shown(field.default), field.description or ""
        else:
            yield name, _kind(info.annotation), _shown(info.default), info.description or ""


def changed_on_resume(before: Mapping[str, Any], now: Config) -> list[str]:
    """Name, with both values, every setting that decides what is learned and differs from a run's first start."""
    changes = []
    for section, info in Config.model_fields.items():
        if not (isinstance(info.annotation, type) and issubclass(info.annotation, Section)):
            continue
        values = getattr(now, section).model_dump(mode="json")
        for key, field in info.annotation.model_fields.items():
            old = before.get(section, {}).get(key, field.default)  # a run of a version without it had the default
            if field.json_schema_extra != FREE and old != values[key]:
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
