"""The English names and tooltips of the nodes as the editor's translators expect them, from the nodes themselves.

COMFYUI_PATH=... python -m comfyui_gcfg.demo.english locales/en     (0.0.1 tells no tooltips of outputs: a newer one)
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..testkit.comfyui import find_comfyui
from ..testkit.server import Server
from ..testkit.workflow import input_specs

_SPECIAL = re.compile(r"[|@{}$<]")  # to vue-i18n; as literals, {'|'}, they are shown raw in tooltips of newer editors


def names(info: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of one node, without the texts that translators would misread: the node's own stand in for them.

    Args:
        info: what the server's /object_info says of it.
    """
    outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
    inputs = ((name, name, spec[1]["tooltip"]) for name, spec in input_specs(info).items())
    return {
        **_plain(display_name=info["display_name"], description=info["description"]),
        "inputs": {key: _plain(name=name, tooltip=tooltip) for key, name, tooltip in inputs},
        "outputs": {str(place): _plain(name=name, tooltip=tooltip) for place, (name, tooltip) in enumerate(outputs)},
    }


def _plain(**texts: str) -> dict[str, str]:
    return {key: text for key, text in texts.items() if not _SPECIAL.search(text)}


def main() -> None:
    """Start ComfyUI and write nodeDefs.json into the folder of the command line."""
    folder = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as work, Server(Path(work), comfyui=find_comfyui()) as server:
        ours = {name: info for name, info in server.client.object_info.items() if name.startswith("GCFG")}
    whole = {name: names(info) for name, info in ours.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nodeDefs.json").write_text(json.dumps(whole, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
