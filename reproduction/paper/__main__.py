"""`python -m comfyui_gcfg.reproduction.paper CONFIG`: the page with the paper's numbers, of any evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...evaluation.config_file import load_config
from ...gcfg.errors import GuidanceError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def paper(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The TOML file of `gcfg evaluate`.")],
    page: Annotated[
        Path | None, typer.Option(help="The Markdown file to write; else report.md in output.folder.")
    ] = None,
    stages: Annotated[Path | None, typer.Option(help="JSON file {stage: seconds}, for the page.")] = None,
) -> None:
    """Write the page of an evaluation's stored results with the paper's numbers, verdicts and limits."""
    from ...evaluation.report.folder import report
    from .page import draw_tradeoff, page_text

    try:
        typer.echo(report(load_config(config), page, stages, page_text, draw_tradeoff))
    except GuidanceError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app(prog_name="python -m comfyui_gcfg.reproduction.paper")
