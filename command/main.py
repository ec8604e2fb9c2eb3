"""The `gcfg` command."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

try:
    import typer

    from ..training.config import fields
    from ..training.config_file import load_config
    from .errors import one_sentence, say
    from .evaluate import app as evaluate
except ModuleNotFoundError as error:  # the nodes do not need them, so the plain install leaves them out
    raise SystemExit(
        f"gcfg needs {error.name}, which was not found; install it with: pip install 'gcfg-guidance[train]'"
    ) from error

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(evaluate, name="evaluate")


class Form(str, Enum):
    """Forms of an exported null-text UNet."""

    folded = "folded"
    compact = "compact"


class Weights(str, Enum):
    """Which of a checkpoint's weights."""

    ema = "ema"
    raw = "raw"


class DType(str, Enum):
    """Number formats of an exported file."""

    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


# `\b` keeps the lines of the paragraph that follows it as they are.
_SETTINGS = "\b\nSettings of the config file, and of --set:\n" + "\n".join(
    f"  {name} = {default}  ({kind})\n      {text}" for name, kind, default, text in fields()
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's TOML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, for example train.steps=2000; repeatable."),
]


@app.callback()
def gcfg() -> None:
    """Concept models beside ComfyUI: trained from images alone, told apart, exported."""


# Torch and diffusers take seconds to import: not before --help is answered.


@app.command("cache", epilog=_SETTINGS)
def cache_command(config: ConfigFile, overrides: Overrides = None) -> None:
    """Encode the images once with the VAE; what is already encoded is kept."""
    with one_sentence():
        settings = load_config(config, overrides or ())
        from ..training.material import encode_images
        from ..training.processes import join_processes

        report = encode_images(settings)
        if join_processes().is_main_process:
            say(report.lines(settings.data.cache))


@app.command("train", epilog=_SETTINGS)
def train_command(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, memory, cache size, speed and time; write nothing.")
    ] = False,
) -> None:
    """Train a concept UNet from cached latents, or go on with the run where it stopped.

    On several GPUs: `accelerate launch --multi_gpu --no_python gcfg train CONFIG`, or torchrun with --no-python.
    """
    with one_sentence():
        settings = load_config(config, overrides or ())
        if dry_run:
            from ..training.dry_run import dry_run as measure

            if cost := measure(settings):
                say(cost.lines())
            return
        from ..training.run import train

        outcome = train(settings)
    if outcome.signal:
        say(f"Stopped at step {outcome.step} of {settings.train.steps}; the same command goes on from there.")
        raise typer.Exit(128 + outcome.signal)
    if outcome.exported:
        say(f"Trained {outcome.step} steps: {outcome.exported}")


@app.command("export")
def export_command(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A run's output.folder, or one of its checkpoints.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The file to write; else NAME.safetensors or NAME-compact.safetensors in the run's folder."),
    ] = None,
    form: Annotated[
        Form, typer.Option(help="folded: every SD loader takes it; compact: smaller, for Load Concept UNet only.")
    ] = Form.folded,
    weights: Annotated[
        Weights, typer.Option(help="ema: the average over the steps; raw: the last step's.")
    ] = Weights.ema,
    dtype: Annotated[DType, typer.Option(help="Number format of the file.")] = DType.fp16,
) -> None:
    """Write a run's model file for ComfyUI: a UNet (of a LoRA also the LoRA itself) or an embedding."""
    with one_sentence():
        from ..training.trained import export_run

        say(str(export_run(source, output, form.value, weights.value, dtype.value)))


@app.command("validate")
def validate_command(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder of images, or of cached latents.")],
    resolution: Annotated[int | None, typer.Option(help="Name images smaller than this many pixels.")] = None,
) -> None:
    """Look at every image, or every cached latent, and tell what is wrong with it; nothing is changed."""
    with one_sentence():
        from ..training.data.validate import validate

        report = validate(data, resolution)
    say(report.lines)
    if not report.clean:
        raise typer.Exit(1)


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="A .safetensors file: a UNet, a concept model or a whole checkpoint.")],
) -> None:
    """Tell what a UNet file is: its form, key naming, prefix, blocks, size and metadata."""
    with one_sentence():
        from .inspect_file import inspect_file, report

        say(report(inspect_file(file)))


@app.command("convert")
def convert_command(
    file: Annotated[Path, typer.Argument(help="A pickled checkpoint: .ckpt, .pt, .pth, .bin, or one renamed.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that has the new name.")] = False,
) -> None:
    """Write a pickled checkpoint's tensors as a .safetensors file beside it; no code in it is run.

    The new file has FILE's name with .safetensors for its ending; NAME-converted.safetensors where that is FILE itself.
    """
    with one_sentence():
        from .convert import convert

        say(str(convert(file, overwrite)))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console command; without arguments it takes the command line's."""
    app(arguments)
