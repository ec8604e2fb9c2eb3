"""What every `gcfg` command does with an error that is meant for its user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..gcfg.errors import GuidanceError


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn an error meant for the user into its one sentence and exit code 1."""
    try:
        yield
    except GuidanceError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
