"""What is asked of a shared workflow before small models run it: its files, its words, its size."""

from __future__ import annotations

from pathlib import Path

from . import small_world
from .client import Prompt
from .model_files import NAMES


def files_of(prompt: Prompt) -> set[str]:
    """Return the model files that a prompt names."""
    named = {v for entry in prompt.values() for v in entry["inputs"].values() if isinstance(v, str)}
    words = {name for name in NAMES if any(f"embedding:{Path(name).stem}" in text for text in named)}
    return {name for name in named if name.endswith(".safetensors")} | words


def translated(prompt: Prompt) -> Prompt:
    """Return the prompt with its texts in the words of the small world."""
    words = small_world.PROMPTS
    return {
        node: {**entry, "inputs": {k: words.get(v, v) if k == "text" else v for k, v in entry["inputs"].items()}}
        if isinstance(entry["inputs"].get("text"), str)
        else entry
        for node, entry in prompt.items()
    }


def shrunk(prompt: Prompt, size: int | None, steps: int | None) -> Prompt:
    """Return the prompt with no latent wider or higher than `size`, and no sampling longer than `steps`.

    This, and the prompts where the models are the small world's, is all that the demo changes in a shared workflow.
    """
    limits = {"width": size, "height": size} if size else {}
    out: Prompt = {}
    for node, entry in prompt.items():
        caps = limits if entry["class_type"] == "EmptyLatentImage" else {"steps": steps} if steps else {}
        inputs = {k: min(v, caps[k]) if k in caps and isinstance(v, int) else v for k, v in entry["inputs"].items()}
        out[node] = {**entry, "inputs": inputs}
    return out
