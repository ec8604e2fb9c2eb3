"""The `gcfg` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..gcfg.errors import GuidanceError

try:
    import typer
except ModuleNotFoundError as error:  # the nodes do not need it, so the plain install leaves it out
    raise SystemExit(
        "gcfg needs typer, which was not found; install it with: pip install 'comfyui_gcfg[train]'"
    ) from error

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def gcfg() -> None:
    """Tools for concept models beside ComfyUI."""


@app.command("inspect")
def inspect_command(
    file: Annotated[Path, typer.Argument(help="A .safetensors file: a UNet, a concept model or a whole checkpoint.")],
) -> None:
    """Tell what a UNet file is: its form, key naming, prefix, blocks, size and metadata."""
    from .inspect_file import inspect_file, report  # torch takes seconds: not before --help is answered

    try:
        typer.echo(report(inspect_file(file)))
    except GuidanceError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def main() -> None:
    """Entry point of the console command."""
    app()
