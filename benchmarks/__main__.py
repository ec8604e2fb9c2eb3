"""`python -m comfyui_gcfg.benchmarks`: measure, print a table, store JSON."""

from __future__ import annotations

import sys

from ..testkit.errors import CommandError


def main() -> None:
    """Run the command; a wrong flag is one sentence and a non-zero exit code."""
    from .command import app

    try:
        app(prog_name="python -m comfyui_gcfg.benchmarks")
    except CommandError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
