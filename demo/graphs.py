"""Thumbnails of the workflows that the demo has no models for: their graphs, as the editor draws them.

COMFYUI_PATH=... python -m comfyui_gcfg.demo.graphs workflows
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

from ..testkit import model_files, prompts
from ..testkit.client import Prompt
from ..testkit.comfyui import PACK, find_comfyui
from ..testkit.editor import Editor
from ..testkit.errors import CommandError
from ..testkit.server import Server
from ..testkit.workflow import to_prompt, unknown_nodes

_FOLDERS = {  # of what the loaders take, by the name of their widget
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "clip_name": "text_encoders",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "text_encoder": "text_encoders",
    "vae_name": "vae",
}
_WIDTH = 1200
_QUALITY = 75


def stand_in(prompt: Prompt, models: Path) -> None:
    """Make an empty file for every model of a prompt, for the editor marks what is not there."""
    for entry in prompt.values():
        for name in _FOLDERS.keys() & entry["inputs"].keys():
            file = models / _FOLDERS[name] / entry["inputs"][name]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()


def draw(editor: Editor, workflow: Path, output: Path) -> None:
    """Save a picture of a workflow's graph."""
    editor.drop(workflow)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "graph.png"
        editor.picture(whole, scale=0.7)
        with Image.open(whole) as image:
            small = image.convert("RGB")
    small.thumbnail((_WIDTH, _WIDTH), Image.Resampling.LANCZOS)
    small.save(output, quality=_QUALITY, optimize=True)


def main() -> None:
    """Start ComfyUI and a browser, and write the thumbnails into the folder of the command line."""
    output = Path(sys.argv[1]).resolve()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "comfyui"
        with Server(work, comfyui=find_comfyui()) as server:
            for path in sorted((PACK / "workflows").glob("*.json")):
                workflow = json.loads(path.read_text(encoding="utf-8"))
                unknown = unknown_nodes(workflow, server.client.object_info)
                if unknown:
                    raise CommandError(f"{path.name}: this ComfyUI has no node {', '.join(unknown)}; use a newer one.")
                prompt = to_prompt(workflow, server.client.object_info)
                if prompts.files_of(prompt) - set(model_files.NAMES):
                    stand_in(prompt, work / "models")
                    found.append(path)
            with Editor(server, Path(folder) / "profile") as editor:
                for path in found:
                    draw(editor, path, output / f"{path.stem}.jpg")


if __name__ == "__main__":
    main()
