"""A ComfyUI in this process, on the CPU, and small models of it."""

import importlib
import sys

import pytest
import torch

torch.set_num_threads(max(1, min(2, torch.get_num_threads())))


@pytest.fixture(scope="session", autouse=True)
def comfy(comfyui_path):
    """Import ComfyUI as its own launcher would, on the CPU."""
    arguments, sys.argv = sys.argv, ["main.py", "--cpu"]
    try:
        if comfyui_path is not None:
            sys.path.insert(0, str(comfyui_path))
            importlib.import_module("comfy.options").enable_args_parsing()
            for name in ("comfy.cli_args", "folder_paths", "nodes", "latent_preview"):
                importlib.import_module(name)
        else:
            importlib.import_module("comfy.cli_args").args.cpu = True
            packaged = {
                "folder_paths": "comfy.cmd.folder_paths",
                "latent_preview": "comfy.cmd.latent_preview",
                "nodes": "comfy.nodes.base_nodes",
            }
            for name, path in packaged.items():
                sys.modules[name] = importlib.import_module(path)
    finally:
        sys.argv = arguments
    for name in ("comfy.samplers", "comfy.sample", "comfy.sd", "comfy.utils", "comfy.model_management"):
        importlib.import_module(name)
    return sys.modules["comfy"]
