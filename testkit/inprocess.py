"""A ComfyUI in this process, imported as its own launcher imports it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .comfyui import PACK

# Of ComfyUI's own modules, what it has imported by the time it loads node packs.
_TREE = ("comfy.cli_args", "folder_paths", "nodes", "latent_preview")
_PACKAGED = {  # where the pip-packaged ComfyUI keeps what packs import by its old name
    "folder_paths": "comfy.cmd.folder_paths",
    "latent_preview": "comfy.cmd.latent_preview",
    "nodes": "comfy.nodes.base_nodes",
}
_LIBRARY = ("comfy.samplers", "comfy.sample", "comfy.sd", "comfy.utils", "comfy.model_management")


def import_comfyui(tree: Path | None, cpu: bool, flags: Sequence[str] = ()) -> ModuleType:
    """Import ComfyUI and return its package `comfy`.

    Args:
        tree: the ComfyUI folder, or None for the pip-packaged one.
        cpu: whether to start it as `--cpu` does.
        flags: of its command line that take no value, without their dashes: "bf16-unet".
    """
    flags = ["cpu", *flags] if cpu else flags
    # The pack's nodes/ must not shadow ComfyUI's nodes.py, however this process was started.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != PACK]
    arguments, sys.argv = sys.argv, ["main.py", *(f"--{flag}" for flag in flags)]
    try:
        if tree is not None:
            sys.path.insert(0, str(tree))
            importlib.import_module("comfy.options").enable_args_parsing()
            for name in _TREE:
                importlib.import_module(name)
        else:
            parsed = importlib.import_module("comfy.cli_args").args
            for flag in flags:
                setattr(parsed, flag.replace("-", "_"), True)
            for name, path in _PACKAGED.items():
                sys.modules[name] = importlib.import_module(path)
    finally:
        sys.argv = arguments
    for name in _LIBRARY:
        importlib.import_module(name)
    return sys.modules["comfy"]
