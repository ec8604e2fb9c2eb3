"""`python -m comfyui_gcfg.reproduction`: the paper's tables in a small world, from nothing to the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..gcfg.errors import GuidanceError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def reproduce(
    preset: Annotated[str, typer.Argument(help="small, large, or a TOML file of the same settings.")] = "small",
    folder: Annotated[
        Path | None, typer.Option(help="Where everything goes; .cache/reproduction/PRESET if not given.")
    ] = None,
    publish: Annotated[
        Path | None, typer.Option(help="Then write the trained models in half precision to this folder.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="The report; evaluation/report.md in the folder if not given.")
    ] = None,
) -> None:
    """Train the small world and every method in it, measure them, and write the report.

    What is finished is kept: the same command goes on where it stopped.
    """
    from .settings import read_settings
    from .stages import run_stages

    try:
        where = folder or Path(".cache/reproduction") / Path(preset).stem
        run_stages(where, read_settings(preset), page)
        if publish:
            from .publish import publish as write

            write(where, publish)
    except GuidanceError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app(prog_name="python -m comfyui_gcfg.reproduction")
