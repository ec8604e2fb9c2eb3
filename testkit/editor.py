"""Drive ComfyUI's graph editor in a real headless Chromium, as a user would."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from playwright.sync_api import BrowserContext, Page, Playwright, sync_playwright

from .browser import FLAGS, find_browser
from .errors import CommandError
from .server import Server

_READY = """() => window.app?.graph && window.app.canvas && window.LiteGraph?.registered_node_types?.GCFGKSampler
  && (!window.app.extensionManager || window.app.extensionManager.workflow?.activeWorkflow)"""
_BOUNDS = """(kinds) => {
  const graph = window.app.graph, nodes = graph._nodes.filter((n) => !kinds.length || kinds.includes(n.type));
  const boxes = nodes.map((n) => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
  for (const group of kinds.length ? [] : graph._groups) {
    const [x, y, width, height] = group._bounding ?? group.bounding;
    boxes.push([x, y, x + width, y + height]);
  }
  return [0, 1, 2, 3].map((i) => (i < 2 ? Math.min : Math.max)(...boxes.map((box) => box[i])));
}"""
_MOVE = """([scale, x, y]) => {
  const view = window.app.canvas.ds;
  view.scale = scale;
  [view.offset[0], view.offset[1]] = [x, y];
  window.app.canvas.deselectAll?.();
  window.app.graph.setDirtyCanvas(true, true);
}"""
_FREE = """() => {
  const { canvas, graph } = window.app;
  for (let y = innerHeight * 0.85; y > 0; y -= 40) {
    for (let x = innerWidth * 0.3; x < innerWidth * 0.8; x += 40) {
      const [left, top] = canvas.ds.offset.map((offset, i) => [x, y][i] / canvas.ds.scale - offset);
      if (document.elementFromPoint(x, y) === canvas.canvas && !graph.getNodeOnPos(left, top)) return { x, y };
    }
  }
  return { x: innerWidth / 2, y: innerHeight / 2 };
}"""
_IDS = "() => window.app.graph._nodes.map((node) => `${node.id} ${node.type}`).sort()"


class Editor:
    """One browser page with the editor of a running server. Use it as a context manager.

    Attributes:
        page: Playwright's page.
        errors: uncaught errors of the page, and failed requests, since `errors.clear()`.
        load_seconds: how long the editor took to be ready.

    Args:
        server: the ComfyUI, running.
        profile: an empty folder for the browser's profile.
        vue: whether nodes are drawn by Vue (newer editors) and not on the canvas.
        size: of the window in pixels.
    """

    def __init__(self, server: Server, profile: Path, vue: bool = False, size: tuple[int, int] = (1600, 1000)) -> None:
        self.server, self.profile, self.vue, self.size = server, profile, vue, size
        self.errors: list[str] = []
        self.load_seconds = 0.0
        self.page: Page
        self._playwright: Playwright | None = None
        self._browser: BrowserContext | None = None

    def __enter__(self) -> Editor:
        settings = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
        if self.vue:  # an editor that does not know it reports an error
            settings["Comfy.VueNodes.Enabled"] = True
        file = self.server.work / "user" / "default" / "comfy.settings.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        browser = find_browser()
        self._playwright = sync_playwright().start()
        try:
            width, height = self.size
            self._browser = self._playwright.chromium.launch_persistent_context(
                self.profile,
                executable_path=browser,  # None: Playwright's own, or its advice how to install it
                headless=True,
                args=list(FLAGS),
                viewport={"width": width, "height": height},
                permissions=["clipboard-read", "clipboard-write"],
            )
            self.page = self._browser.pages[0]
            self._listen()
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        if self._browser is not None:
            self._browser.close()
        if self._playwright is not None:
            self._playwright.stop()

    def open(self) -> None:
        """Load the page and wait until the editor has loaded its default graph."""
        begin = time.monotonic()
        self.page.goto(self.server.client.url, timeout=120_000)
        self.page.wait_for_function(_READY, timeout=120_000)
        self.load_seconds = time.monotonic() - begin
        self.page.wait_for_timeout(1500)  # the default graph, dialogs and panels come after it says that it is ready
        self.page.keyboard.press("Escape")

    def evaluate(self, script: str, argument: Any = None) -> Any:
        """The value of a JavaScript function in the page."""
        return self.page.evaluate(script, argument)

    def wait_for(self, script: str, argument: Any = None, seconds: float = 20) -> None:
        """Wait until a JavaScript function gives something true."""
        self.page.wait_for_function(script, arg=argument, timeout=seconds * 1000)

    def drop(self, file: Path) -> None:
        """Drop a workflow file onto the canvas and wait until its nodes are there."""
        workflow = json.loads(file.read_text(encoding="utf-8"))
        expected = sorted(f"{node['id']} {node['type']}" for node in workflow["nodes"])
        tools = self.page.context.new_cdp_session(self.page)
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        self.page.set_viewport_size({"width": self.size[0], "height": self.size[1]})
        where = self.evaluate(_FREE)  # a node would take the file for itself
        for kind in ("dragEnter", "dragOver", "drop"):
            tools.send("Input.dispatchDragEvent", {"type": kind, **where, "data": data})
        self.wait_for(f"(expected) => JSON.stringify(({_IDS})()) === JSON.stringify(expected)", expected)
        self.settle()

    def settle(self) -> None:
        """Give the editor's deferred work and animations time to end."""
        self.page.wait_for_timeout(400)

    def prompt(self) -> dict[str, Any]:
        """The graph in API form, as the editor would queue it."""
        found = self.evaluate("async () => JSON.parse(JSON.stringify((await window.app.graphToPrompt()).output))")
        return dict(found)

    def run(self, during: Callable[[], None] = lambda: None, seconds: float = 180) -> dict[str, Any]:
        """Queue the graph with the editor's own button and wait for its end; returns its history entry.

        Args:
            during: called again and again while it runs.
            seconds: how long to wait.

        Raises:
            CommandError: if the server refuses the prompt, or does not finish in time.
        """
        button = self.page.locator("#queue-button")  # newer editors keep this one, hidden
        if not button.is_visible():
            button = self.page.get_by_role("button", name="Run", exact=True).first
        with self.page.expect_response(
            lambda r: r.url.endswith("/prompt") and r.request.method == "POST", timeout=30_000
        ) as queued:
            button.click()
        answer = queued.value.json()
        if answer.get("node_errors") or "prompt_id" not in answer:
            raise CommandError(f"ComfyUI refused the prompt: {answer}")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            during()
            entry = self.server.client.history(answer["prompt_id"])
            if entry:
                self.settle()
                return entry
            self.page.wait_for_timeout(50)
        raise CommandError(f"The prompt did not end within {seconds:.0f} s.")

    def picture(self, file: Path, kinds: Sequence[str] = (), scale: float = 1.0) -> None:
        """Save a picture of the graph, or of the nodes of some types, `scale` times as large as they are."""
        region = self.evaluate(_BOUNDS, list(kinds))
        left, top, margin = 80, 110, 12  # the editor's own panels; around the picture
        width, height = ((region[2] - region[0]) * scale + 2 * margin, (region[3] - region[1]) * scale + 2 * margin)
        self.page.set_viewport_size({"width": round(width) + 2 * left, "height": round(height) + 2 * top})
        offset = [(left + margin) / scale - region[0], (top + margin) / scale - region[1]]
        self.evaluate(_MOVE, [scale, *offset])
        self.page.wait_for_timeout(1500)  # the canvas, then what lies over it
        self.page.screenshot(
            path=file, clip={"x": left, "y": top, "width": round(width), "height": round(height)}, animations="disabled"
        )

    def _listen(self) -> None:
        self.page.on("pageerror", lambda error: self.errors.append(f"{error} {error.stack}"))
        self.page.on("dialog", lambda d: d.accept() if d.type == "beforeunload" else d.dismiss())
        self.page.on(
            "response",
            lambda response: (
                self.errors.append(f"{response.status} {response.url}")
                if response.status >= 400 and "gcfg" in response.url.lower()
                else None
            ),
        )
