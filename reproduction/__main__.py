"""`python -m comfyui_gcfg.reproduction`: the world and every method of the paper in it, from npm to the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..gcfg.errors import GuidanceError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def reproduce(
    preset: Annotated[str, typer.Argument(help="small, long, gpu, or a TOML file of the same settings.")] = "small",
    folder: Annotated[
        Path | None, typer.Option(help="Where everything goes; .cache/reproduction/PRESET if not given.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Where the npm packages are, or go.")] = Path(".cache/npm"),
    publish: Annotated[Path | None, typer.Option(help="Then write the trained models to this folder.")] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="The page; evaluation/reproduction.md in the folder if not given."),
    ] = None,
) -> None:
    """Train the world and every method in it, and measure them.

    It may be killed at any time: the same command goes on where it was.
    """
    from .pooled import write_pages
    from .publish import publish as write
    from .settings import read_settings
    from .stages import run_each, stages
    from .world import CONCEPTS

    try:
        where = folder or Path(".cache/reproduction") / Path(preset).stem
        settings = read_settings(preset)
        minutes = run_each(stages(where, settings, cache), where) / 60
        page = page or where / "evaluation" / "reproduction.md"
        write_pages(where, CONCEPTS, settings.methods.seeds, page)
        print(f"{minutes:.1f} minutes in all; see {page}")
        if publish:
            print(f"{write(where, settings, publish) / 1e6:.1f} MB in {publish}")
    except GuidanceError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app(prog_name="python -m comfyui_gcfg.reproduction")
