"""`python -m comfyui_gcfg.reproduction.emoji`: the world of emoji and every method in it, from npm to trained files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...gcfg.errors import GuidanceError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def reproduce(
    preset: Annotated[str, typer.Argument(help="small, long, gpu, or a TOML file of the same settings.")] = "small",
    folder: Annotated[
        Path | None, typer.Option(help="Where everything goes; .cache/emoji/PRESET if not given.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Where the npm packages are, or go.")] = Path(".cache/npm"),
    publish: Annotated[
        Path | None, typer.Option(help="Then write the trained models in half precision to this folder.")
    ] = None,
) -> None:
    """Train the world of emoji and every method in it.

    It may be killed at any time: the same command goes on where it was.
    """
    from ..stages import run_each
    from .publish import publish as write
    from .settings import read_settings
    from .stages import stages

    try:
        where = folder or Path(".cache/emoji") / Path(preset).stem
        settings = read_settings(preset)
        print(f"{run_each(stages(where, settings, cache), where) / 60:.1f} minutes in all")
        if publish:
            print(f"{write(where, settings, publish) / 1e6:.1f} MB in {publish}")
    except GuidanceError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app(prog_name="python -m comfyui_gcfg.reproduction.emoji")
