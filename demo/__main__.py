"""`python -m comfyui_gcfg.demo`: every end but a good one is one sentence and a non-zero exit code."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from ..testkit.errors import CommandError, Stopped


def _stop(*_: object) -> NoReturn:
    raise Stopped


def main() -> None:
    """Run the demo command."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        from .command import app  # seconds of imports, in which Ctrl-C must work too

        app(prog_name="python -m comfyui_gcfg.demo")
    except CommandError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped:
        print("Stopped; the server has been shut down.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
