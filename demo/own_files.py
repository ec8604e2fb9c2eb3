"""The user's own files in place of the small models."""

from __future__ import annotations

from pathlib import Path

from ..testkit.client import Prompt
from ..testkit.errors import CommandError
from ..testkit.model_files import CONCEPT, PRIOR


def use_own(folder: Path, model: Path, concept: Path | None) -> dict[str, str]:
    """Link the user's files into a ComfyUI `models/` folder and return the workflows' names -> their names.

    Raises: CommandError: if a file is missing.
    """
    names = {}
    for variable, kind, usual, path in (("MODEL", "checkpoints", PRIOR, model), ("CONCEPT", "unet", CONCEPT, concept)):
        if path is None:
            continue
        if not path.is_file():
            raise CommandError(f"{variable}: expected an SD1.5 file, found none at {path}; correct the path.")
        link = folder / kind / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(path.resolve())
        except OSError:  # Windows without developer mode
            link.hardlink_to(path.resolve())
        names[usual] = path.name
    return names


def renamed(prompt: Prompt, names: dict[str, str]) -> Prompt:
    """Return the prompt with the file names replaced."""
    return {
        node: {
            **entry,
            "inputs": {k: names.get(v, v) if isinstance(v, str) else v for k, v in entry["inputs"].items()},
        }
        for node, entry in prompt.items()
    }
