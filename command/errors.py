"""How every `gcfg` command speaks to its user: text of others, such as files' names, stays on its line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import typer

from ..gcfg.errors import GuidanceError, printable


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn an error meant for the user into its one sentence and exit code 1."""
    try:
        yield
    except GuidanceError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def say(lines: str | Iterable[object]) -> None:
    """Print lines, one given as a text."""
    typer.echo("\n".join(printable(str(line)) for line in ([lines] if isinstance(lines, str) else lines)))
