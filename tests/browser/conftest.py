"""A real ComfyUI and its editor in a real Chromium: one server, and one page for each way of drawing nodes."""

import os
import re
import shutil
from pathlib import Path

import pytest
from comfyui_gcfg.testkit.browser import NO_BROWSER, find_browser
from comfyui_gcfg.testkit.editor import Editor
from comfyui_gcfg.testkit.server import Server

DRAWS_NODES_IN_VUE = (0, 8)  # the first version whose Vue nodes are tested


def pytest_generate_tests(metafunc):
    if "vue" in metafunc.fixturenames:
        path = os.environ.get("COMFYUI_PATH")
        version = (Path(path) / "comfyui_version.py").read_text() if path else '"0.0"'
        newer = tuple(map(int, re.search(r'"(\d+)\.(\d+)', version).groups())) >= DRAWS_NODES_IN_VUE
        modes = [False, True] if newer else [False]
        metafunc.parametrize("vue", modes, ids=["vue" if mode else "litegraph" for mode in modes], scope="session")


@pytest.fixture(scope="session")
def browser():
    """A Chromium that starts; `make test` brings one where it can."""
    if find_browser() is None:
        pytest.skip(NO_BROWSER)


@pytest.fixture(scope="session")
def server(browser, work_folder, comfyui_path):
    work = work_folder("browser")
    with Server(work, comfyui=comfyui_path) as running:
        yield running
    shutil.rmtree(work, ignore_errors=True)


@pytest.fixture(scope="session")
def page(server, vue, tmp_path_factory):
    """The editor, opened once for each way of drawing nodes."""
    with Editor(server, tmp_path_factory.mktemp("profile"), vue=vue) as editor:
        yield editor


@pytest.fixture
def editor(page, request, root):
    """The editor with an empty graph; afterwards none of our scripts may have failed."""
    page.errors.clear()
    page.evaluate("() => { window.app.graph.clear(); }")
    page.settle()
    yield page
    if getattr(request.node, "failed", False):
        folder = root / ".cache" / "browser"
        folder.mkdir(parents=True, exist_ok=True)
        page.page.screenshot(path=folder / f"{re.sub(r'[^a-z_]+', '-', request.node.name)}.png")
    assert [error for error in page.errors if "gcfg" in error.lower()] == []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == "call":
        item.failed = outcome.get_result().failed
