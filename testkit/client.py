"""Talk to a ComfyUI server: queue prompts over HTTP, follow them over the websocket, fetch what they made."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import requests
import websocket

from .errors import CommandError, PromptFailed, PromptInterrupted

Prompt = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Progress:
    """One progress message: `done` of `total` steps of `node` (its id in the prompt)."""

    node: str | None
    done: int
    total: int


@dataclass
class Run:
    """What one executed prompt left behind.

    Attributes:
        prompt_id: the server's id.
        seconds: from queueing to the end.
        outputs: the history's outputs by node id.
        progress: every progress message, in order.
        previews: number of live preview images.
    """

    prompt_id: str
    seconds: float = 0.0
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    progress: list[Progress] = field(default_factory=list)
    previews: int = 0

    @property
    def images(self) -> list[dict[str, str]]:
        """References (filename, subfolder, type) of all images, saved ones only if there are any."""
        found = [image for node in self.outputs.values() for image in node.get("images", ())]
        return [image for image in found if image.get("type") == "output"] or found


class Client:
    """HTTP and websocket client of one server.

    Args:
        url: `http://host:port`.
        check_alive: raises when the server process is gone; called whenever the server does not answer.
    """

    def __init__(self, url: str, check_alive: Callable[[], None] = lambda: None) -> None:
        self.url = url
        self.check_alive = check_alive
        self.session = requests.Session()
        self.session.trust_env = False  # a proxy must not get in between us and the loopback

    def answers(self) -> bool:
        """Whether the server answers requests."""
        try:
            return self.session.get(f"{self.url}/system_stats", timeout=2).ok
        except requests.RequestException:
            return False

    def request(self, method: str, path: str, **kwargs: Any) -> requests.Response:
        """Send one request. Raises ServerDied or CommandError if there is no answer."""
        try:
            return self.session.request(method, f"{self.url}{path}", timeout=60, **kwargs)
        except requests.RequestException as error:
            self._gone(error)
            raise

    def _gone(self, error: Exception) -> None:
        """Raise ServerDied if the process ends within a moment of a failed connection, else CommandError."""
        for _ in range(20):
            self.check_alive()
            time.sleep(0.1)
        raise CommandError(f"The ComfyUI server at {self.url} does not answer ({type(error).__name__}).") from error

    @cached_property
    def object_info(self) -> dict[str, Any]:
        """Description of every node the server has."""
        return self.request("GET", "/object_info").json()

    def refresh(self) -> None:
        """Forget the cached object_info, after model files were added."""
        self.__dict__.pop("object_info", None)

    def queue(self, prompt: Prompt, client_id: str = "") -> str:
        """Queue a prompt in API form and return its id.

        Raises: PromptFailed: if the server refuses it; the sentence carries the reasons.
        """
        # dumped here, as `requests` itself refuses a NaN: what the server says to it is the answer we want
        data = json.dumps({"prompt": prompt, "client_id": client_id})
        answer = self.request("POST", "/prompt", data=data, headers={"Content-Type": "application/json"})
        body = answer.json()
        if not answer.ok or body.get("node_errors"):
            raise PromptFailed(f"ComfyUI refused the prompt: {_reasons(body)}", body)
        return body["prompt_id"]

    def run(self, prompt: Prompt, on_progress: Callable[[Progress], None] | None = None, timeout: float = 3600) -> Run:
        """Queue a prompt, follow it to its end and return what it made.

        Raises: PromptFailed, PromptInterrupted, ServerDied; CommandError after `timeout` seconds without an end.
        """
        client_id = uuid.uuid4().hex
        try:
            ws = websocket.create_connection(f"{self.url.replace('http', 'ws', 1)}/ws?clientId={client_id}", timeout=30)
        except (OSError, websocket.WebSocketException) as error:
            self._gone(error)
        started = time.monotonic()
        try:
            run = Run(self.queue(prompt, client_id))
            ws.settimeout(1)
            while not self._step(ws, run, on_progress):
                if time.monotonic() - started > timeout:
                    raise CommandError(f"The prompt did not end within {timeout:.0f} s.")
        finally:
            ws.close()
        run.seconds = time.monotonic() - started
        run.outputs = self.history(run.prompt_id).get("outputs", {})
        return run

    def _step(self, ws: websocket.WebSocket, run: Run, on_progress: Callable[[Progress], None] | None) -> bool:
        """Take one websocket message; return whether the prompt has ended."""
        try:
            message = ws.recv()
        except websocket.WebSocketTimeoutException:
            self.check_alive()
            return False
        except (OSError, websocket.WebSocketException) as error:
            self._gone(error)
        if isinstance(message, bytes):
            run.previews += 1
            return False
        if not message:  # the peer closed the connection
            self._gone(ConnectionError("closed"))
        event = json.loads(message)
        kind, data = event.get("type"), event.get("data") or {}
        if data.get("prompt_id", run.prompt_id) != run.prompt_id:
            return False
        if kind == "progress":
            run.progress.append(Progress(data.get("node"), int(data["value"]), int(data["max"])))
            if on_progress:
                on_progress(run.progress[-1])
        elif kind == "execution_error":
            name = f"{data.get('node_type')} (node {data.get('node_id')})"
            raise PromptFailed(f"{name}: {str(data.get('exception_message')).strip()}", data)
        elif kind == "execution_interrupted":
            raise PromptInterrupted("The prompt was cancelled.")
        # every version ends a prompt by `executing` nothing; only newer ones also say execution_success
        return kind == "executing" and data.get("node") is None and "prompt_id" in data

    def interrupt(self) -> None:
        """Cancel the running prompt."""
        self.request("POST", "/interrupt")

    def history(self, prompt_id: str) -> dict[str, Any]:
        """Return the history entry of a prompt, {} while there is none."""
        return self.request("GET", f"/history/{prompt_id}").json().get(prompt_id, {})

    def image(self, reference: dict[str, str]) -> bytes:
        """Return the bytes of an image that a prompt made."""
        answer = self.request("GET", "/view", params=reference)
        answer.raise_for_status()
        return answer.content


def _reasons(body: dict[str, Any]) -> str:
    """Join what /prompt says about an invalid prompt: the node, and each message with its details."""
    found = []
    for node, errors in (body.get("node_errors") or {}).items():
        for error in errors.get("errors", ()):
            text = ": ".join(part for part in (error.get("message"), error.get("details")) if part)
            found.append(f"{errors.get('class_type')} (node {node}): {text}")
    if not found:
        error = body.get("error")
        found.append(str(error.get("message") if isinstance(error, dict) else error))
    return "; ".join(found)
