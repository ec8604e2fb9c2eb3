"""Where the editor's browser comes from, and what becomes of its tests where there is none."""

import os
import subprocess
import sys

import pytest
from comfyui_gcfg.testkit import browser


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine without a browser: nothing on PATH, nothing downloaded."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "downloads"))
    browser.find_browser.cache_clear()
    yield tmp_path
    browser.find_browser.cache_clear()


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def found_on(path):
    """The browser that a new process finds: in this one the editor's tests may hold Playwright's loop."""
    code = "from comfyui_gcfg.testkit import browser; print(browser.find_browser())"
    environment = {**os.environ, "PATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_one_that_does_not_start_is_none(bare):
    assert found_on(str(bare)) == "None"
    program(bare / "chromium", "exit 127")
    assert found_on(str(bare)) == "None"


def test_the_second_is_taken_where_the_first_does_not_start(bare):
    found = next(filter(os.path.exists, ("/usr/bin/chromium", "/usr/bin/google-chrome")), None)
    if found is None:
        pytest.skip("needs a browser of the system")
    program(bare / "chromium", "exit 127")
    program(bare / "chromium-browser", f'exec {found} "$@"')
    assert found_on(f"{bare}:/usr/bin:/bin") == str(bare / "chromium-browser")


def test_means_are_tried_in_turn(bare, monkeypatch):
    """The download fails, the package's installation brings one; a machine without either says so."""
    tried = []

    def run(command):
        tried.append(command[-1])
        return command[-1] != "download"

    monkeypatch.setattr(browser, "_means", lambda: [("a", [["download"]]), ("b", [["update"], ["install"]])])
    monkeypatch.setattr(browser, "_runs", run)
    lines = []
    assert browser.bring_browser(lines.append) is None
    assert tried == ["download", "update", "install"]
    assert lines == ["No browser for the editor's tests: a ...", "No browser for the editor's tests: b ..."]


def test_without_one_the_tests_are_left_out_by_name(bare, root):
    command = "import sys; sys.path[:] = filter(None, sys.path); import pytest; sys.exit(pytest.main())"
    run = subprocess.run(
        [sys.executable, "-c", command, "-q", "-n", "0", "-p", "no:cacheprovider", "tests/browser", "-k", "grow"],
        cwd=root,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    (line,) = [line for line in run.stdout.splitlines() if "left out, since" in line]
    assert run.returncode == 0, run.stdout
    names = "test_sockets_grow_shrink_and_are_named"
    assert line[1:] == f" left out, since no browser was found: {names}; {browser.ADVICE}."
