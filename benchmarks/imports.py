"""How long the pack's import takes in a ComfyUI that has loaded all of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from ..testkit.comfyui import PACK
from ..testkit.errors import CommandError
from ..testkit.inprocess import import_comfyui
from .figures import Figure
from .timing import Spread

_NAME = "gcfg_as_a_custom_node"


def child(tree: str | None, cpu: bool, byte_code: str) -> None:
    """Import ComfyUI, then the pack as ComfyUI imports it; print the milliseconds and the number of nodes as JSON.

    Args:
        tree: the ComfyUI folder, or None for the pip-packaged one.
        cpu: whether to start ComfyUI as `--cpu` does.
        byte_code: folder for the pack's byte code, instead of the checkout's `__pycache__`.
    """
    import_comfyui(Path(tree) if tree else None, cpu)
    sys.pycache_prefix, sys.dont_write_bytecode = byte_code, False
    start = time.perf_counter()
    spec = importlib.util.spec_from_file_location(_NAME, PACK / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = pack
    spec.loader.exec_module(pack)
    milliseconds = (time.perf_counter() - start) * 1000
    print("\n" + json.dumps({"ms": milliseconds, "nodes": len(pack.NODE_CLASS_MAPPINGS)}))


def figures(tree: Path | None, cpu: bool, repeats: int) -> list[Figure]:
    """Import in several fresh processes; the first, in which Python compiles the pack, is a figure of its own."""
    found = []
    with tempfile.TemporaryDirectory() as away:  # neither the checkout nor ComfyUI is the current folder
        program = f"from {__name__} import child; child({str(tree) if tree else None!r}, {cpu}, {away!r})"
        for _ in tqdm(range(repeats + 1), desc="import", unit="process", leave=False):
            command = [sys.executable, "-c", program]
            run = subprocess.run(command, cwd=away, env=os.environ, capture_output=True, text=True, check=False)
            if run.returncode:
                raise CommandError(f"The import of the pack failed in a process of its own:\n{run.stderr}")
            found.append(json.loads(run.stdout.splitlines()[-1]))
    spread = Spread.of([entry["ms"] for entry in found[1:]])
    note = f"{found[0]['nodes']} nodes; ComfyUI and torch are imported before"
    return [
        Figure.spread("import_ms", "import of the pack into ComfyUI", spread, "ms", 50.0, note),
        Figure("import_first_ms", "the same at its very first start", found[0]["ms"], "ms", note="Python compiles it"),
    ]
