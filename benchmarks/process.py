"""A call in a process of its own, whose memory and imports are its own too."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..testkit.errors import CommandError


def in_new_process(function: Callable[..., Any], environment: Mapping[str, str] | None = None, **arguments: Any) -> Any:
    """Call a module's function in a new process and return what it returns.

    Args:
        function: takes and returns what JSON can hold.
        environment: variables besides those of this process.
        arguments: of the function.

    Raises:
        CommandError: with the end of what the process said, if it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        name = f"{function.__module__}:{function.__name__}"
        command = [sys.executable, "-m", __name__, name, json.dumps(arguments), str(answer)]
        run = subprocess.run(
            command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise CommandError(f"{name} failed in a process of its own ({run.returncode}):\n{run.stderr[-3000:]}")
        return json.loads(answer.read_text(encoding="utf-8"))


def main() -> None:
    """Make the call named on the command line."""
    module, _, function = sys.argv[1].partition(":")
    found = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # ComfyUI's threads need not be waited for


if __name__ == "__main__":
    main()
