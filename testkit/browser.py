"""A Chromium for the editor's tests: one that is there, else one that the machine can bring."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache

from playwright.sync_api import Error, sync_playwright

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NO_BROWSER = "no browser was found"
ADVICE = "install Debian's package chromium, Google Chrome, or run playwright install chromium, and they are run"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PATIENCE = 600  # seconds for each way of bringing one


@cache
def find_browser() -> str | None:
    """Return the path of a Chromium that starts: the system's, else the one that Playwright has downloaded."""
    try:
        with sync_playwright() as playwright:
            for path in [*filter(None, map(shutil.which, _NAMES)), playwright.chromium.executable_path]:
                try:
                    playwright.chromium.launch(executable_path=path, headless=True, args=list(FLAGS)).close()
                except Error:  # not there, or without a library that it needs
                    continue
                return path
    except Exception:  # Playwright's own driver does not start, which has no error of its own: a library is missing
        return None
    return None


def bring_browser(say: Callable[[str], None] = print) -> str | None:
    """Return `find_browser`; where there is none, download one first, or as root install Debian's package."""
    found = find_browser()
    for means, commands in () if found else _means():
        say(f"No browser for the editor's tests: {means} ...")
        if all(map(_runs, commands)):
            find_browser.cache_clear()
            if found := find_browser():
                break
    return found


def _means() -> list[tuple[str, list[list[str]]]]:
    found = [("downloading Playwright's Chromium", [[sys.executable, "-m", "playwright", "install", "chromium"]])]
    if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get"):
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "libatomic1"]
        found.append(("installing Debian's package chromium", [["apt-get", "update", "-qq"], install]))
    return found


def _runs(command: list[str]) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PLAYWRIGHT_DOWNLOAD_CONNECTION_TIMEOUT": "10000"}
    try:
        run = subprocess.run(command, env=environment, capture_output=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return run.returncode == 0


if __name__ == "__main__":
    if bring_browser() is None:
        print(f"There is none, and this machine cannot bring one: the editor's tests will be left out; {ADVICE}.")
