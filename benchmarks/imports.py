"""How long the pack's import takes in a ComfyUI that has loaded all of its own."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator

from ..testkit.comfyui import PACK, find_comfyui
from ..testkit.inprocess import import_comfyui
from .bench import Bench
from .figures import Figure
from .harness import interleaved
from .process import in_new_process

_NAME = "gcfg_as_a_custom_node"


def figures(bench: Bench) -> Iterator[Figure]:
    """Import in fresh processes; in the first Python compiles the pack."""
    with tempfile.TemporaryDirectory() as away:

        def milliseconds(number: int) -> float:
            found: float = in_new_process(import_pack, cpu=bench.cpu, byte_code=away)
            return found

        first = milliseconds(0)
        times = interleaved({"import": milliseconds}, bench.repeats, "imports", warm_up=False)["import"]
    yield Figure.of("import of the pack into ComfyUI", "time", times, "ms", goal=50.0)
    yield Figure.of("the same at its very first start", "time", [first], "ms")


def import_pack(cpu: bool, byte_code: str) -> float:
    """Import ComfyUI, then the pack as ComfyUI imports it, and return the milliseconds that the pack took.

    Args:
        cpu: whether to start ComfyUI as `--cpu` does.
        byte_code: folder for the pack's byte code, instead of the checkout's `__pycache__`.
    """
    import_comfyui(find_comfyui(), cpu)
    sys.pycache_prefix, sys.dont_write_bytecode = byte_code, False
    start = time.perf_counter()
    spec = importlib.util.spec_from_file_location(_NAME, PACK / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = pack
    spec.loader.exec_module(pack)
    milliseconds = (time.perf_counter() - start) * 1000
    if not pack.NODE_CLASS_MAPPINGS:
        raise RuntimeError("the pack registered no nodes, so its import was not measured")
    return milliseconds
