"""The README's pictures of the editor, made in a real browser with the small world's models.

python -m comfyui_gcfg.demo.screenshots docs/images
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from ..testkit import model_files, pictures
from ..testkit.comfyui import PACK, find_comfyui
from ..testkit.editor import Editor
from ..testkit.server import Server

_SET = """([kind, values]) => {
  for (const node of window.app.graph._nodes.filter((n) => n.type === kind)) {
    for (const widget of (node.widgets ?? []).filter((w) => w.name in values)) {
      widget.value = values[widget.name];
      widget.callback?.(widget.value);
    }
  }
}"""
_NOTICE = 8000  # milliseconds until the editor's notice of a finished run is gone
_CHART = "window.app.graph._nodes.find((n) => n.gcfgChart).gcfgChart.element"
_BOX = f"() => {{ const box = {_CHART}.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; }}"


def take(editor: Editor, output: Path) -> None:
    """Run two workflows in the editor and save pictures of them."""
    editor.drop(PACK / "workflows" / "text-guided-concept.json")
    _fit_small_models(editor, text="seven")
    editor.evaluate(_SET, ["GCFGGuidanceTerm", {"curve": "cosine", "end_weight": 0.5}])
    editor.run()
    editor.page.wait_for_timeout(_NOTICE)
    editor.picture(output / "text-guided-concept.png", scale=0.8)
    editor.picture(output / "guidance-chart.png", ["GCFGGuidanceTerm", "GCFGKSampler"], 1.2)
    x, y, width, height = editor.evaluate(_BOX)
    editor.page.mouse.move(x + width / 2, y + height / 2)
    editor.picture(output / "guidance-chart.png", ["GCFGGuidanceTerm", "GCFGKSampler"], 1.2)

    editor.drop(PACK / "workflows" / "decoupled-prompt.json")
    _fit_small_models(editor)
    editor.evaluate(_SET, ["GCFGDecoupledPrompt", {"text": "4.5 | seven\n3 | a photo of a digit, red\nblue"}])
    editor.settle()
    editor.picture(output / "decoupled-prompt.png", ["GCFGDecoupledPrompt"], 1.2)

    editor.drop(PACK / "workflows" / "weight-sweep.json")
    _fit_small_models(editor, text="seven")
    editor.run()
    editor.page.wait_for_timeout(_NOTICE)
    editor.picture(output / "weight-sweep.png", ["GCFGWeightSweep", "SaveImage"], 1.0)


def _fit_small_models(editor: Editor, text: str = "") -> None:
    editor.evaluate(_SET, ["EmptyLatentImage", {"width": 64, "height": 64}])
    for kind in ("GCFGKSampler", "GCFGWeightSweep"):
        editor.evaluate(_SET, [kind, {"steps": 20}])
    if text:
        prompt = """(text) => {
          const nodes = window.app.graph._nodes.filter((n) => n.type === 'CLIPTextEncode' && n.widgets[0].value);
          for (const node of nodes) node.widgets[0].value = text;
        }"""
        editor.evaluate(prompt, text)
    editor.settle()


def main() -> None:
    """Start ComfyUI and a browser, and write the pictures into the folder of the command line."""
    output = Path(sys.argv[1]).resolve()
    models = Path(".cache/demo/small/models").resolve()
    model_files.make_small_models(models, print)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "comfyui"
        for path in models.glob("*/*.safetensors"):
            link = work / "models" / path.parent.name / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        pictures.write_inputs(work / "input", 64)
        with Server(work, comfyui=find_comfyui()) as server, Editor(server, Path(folder) / "profile") as editor:
            take(editor, output)


if __name__ == "__main__":
    main()
