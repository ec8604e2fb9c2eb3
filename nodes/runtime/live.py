"""Who looks at a run: the editor that queued it, or a Guidance Report node; readings are taken only for them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ...gcfg.diagnostics import GuidanceReport, Recorder

STEP_EVENT = "gcfg.step"

_INTERVAL = 0.1  # seconds between two messages; a chart needs no more


class Watch:
    """The report of one sampler or guider node, and the editor that shows it live.

    Args:
        node_id: the node in the prompt, or None where it is not known.
        wanted: whether a Guidance Report is connected.

    Attributes:
        others: of nodes whose terms are in the same run; they are shown it as long as they had no run of their own.
    """

    others: tuple[Watch, ...] = ()

    def __init__(self, node_id: str | None = None, wanted: bool = False) -> None:
        self.node_id = node_id
        self.wanted = wanted
        self.report = GuidanceReport()
        self._sent, self._time = 0, 0.0
        self._had_run = False
        self._looking: list[Watch] = []  # who is shown the run that is on

    def recorder(self, sigmas: Sequence[float], labels: Sequence[str], relative: Sequence[str]) -> Recorder | None:
        """A recorder for a run that begins, or None if nobody looks."""
        shown = [self, *(watch for watch in self.others if not watch._had_run)]
        self._looking = looking = [watch for watch in shown if watch._looks()]
        self._had_run = True
        if not looking:
            return None
        recorder = Recorder(self.report, sigmas, labels, self._tell, relative)
        for watch in looking:
            watch.report.show(self.report)
            watch._sent, watch._time = 0, 0.0
        return recorder

    def end(self, recorder: Recorder | None) -> None:
        """Take the last readings of a run, and send what was not sent yet."""
        if recorder is not None:
            recorder.finish()
            for watch in self._looking:
                watch._time = 0.0
            self._tell()

    def _looks(self) -> bool:
        return self.wanted or (self.node_id is not None and _editor() is not None)

    def _tell(self) -> None:
        for watch in self._looking:
            watch._send()

    def _send(self) -> None:
        editor, now = _editor(), time.monotonic()
        news = self.report.readings[self._sent :]
        if editor is None or self.node_id is None or not news or now - self._time < _INTERVAL:
            return
        message = {
            "node": self.node_id,
            "labels": list(self.report.labels),
            "relative": list(self.report.relative),
            "steps": self.report.steps,
            "first": self._sent,
            "readings": [asdict(reading) for reading in news],
        }
        editor.send_sync(STEP_EVENT, message, editor.client_id)
        self._sent, self._time = len(self.report.readings), now


def reads_output(prompt: dict[str, Any] | None, node_id: str | None, output: int) -> bool:
    """Whether any node of a prompt in API form is connected to this output."""
    entries = (prompt or {}).values()
    return any([node_id, output] == value for entry in entries for value in entry.get("inputs", {}).values())


def prompt_server() -> Any:
    """The running server, or None in a process that has none."""
    module = sys.modules.get("server") or sys.modules.get("comfy.cmd.server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def _editor() -> Any:
    """The server, if an editor queued the prompt that runs."""
    server = prompt_server()
    return server if server is not None and getattr(server, "client_id", None) is not None else None
