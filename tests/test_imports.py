"""The one direction of imports between rooms, in the source and in fresh interpreters."""

import ast
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "comfyui_gcfg"
# What each room may import, besides itself.
ROOMS = {
    "gcfg": set(),
    "nodes": {"gcfg"},
    "training": {"gcfg"},
    "evaluation": {"gcfg", "training"},
    "command": {"gcfg", "training", "evaluation"},
    "testkit": {"gcfg"},
    "demo": {"gcfg", "testkit"},
    "reproduction": {"gcfg", "training", "evaluation", "command", "testkit"},
    "benchmarks": {"gcfg", "nodes", "training", "testkit"},
}
# ComfyUI's own top-level modules. `folder_paths`, its list of model folders, is open to all of nodes/.
COMFYUI = {
    "comfy",
    "comfy_extras",
    "comfy_api",
    "comfy_config",
    "execution",
    "latent_preview",
    "node_helpers",
    "server",
}


def sources() -> list[Path]:
    """The files of the package, relative to the root."""
    rooms = (path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return sorted(path.relative_to(ROOT) for path in [ROOT / "__init__.py", *rooms])


def imports(source: str, path: Path) -> Iterator[tuple[str, bool]]:
    """Each imported dotted name, and whether it lies in the package (its name is then relative to the root).

    Walks into functions and `if TYPE_CHECKING` too, and takes `import_module("...")` for an import.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or "", False
        elif isinstance(node, ast.ImportFrom):
            climbed = (PACKAGE, *path.parts[:-1])
            base = climbed[1 : len(climbed) - node.level + 1]
            for alias in node.names:
                yield ".".join([*base, *([node.module] if node.module else []), alias.name]), True
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.args[0].value, False


def faults(source: str, path: Path) -> list[str]:
    """What one file imports against the rules."""
    room = path.parts[0] if len(path.parts) > 1 else None
    runtime = path.parts[:2] == ("nodes", "runtime")
    inside_comfyui = runtime or room == "benchmarks" or path.parts == ("testkit", "inprocess.py")
    found = []
    for name, own in imports(source, path):
        top = name.partition(".")[0]
        if own and room is None and top in ROOMS and top != "nodes":
            found.append(f"{path}: the root registers nodes and imports no {top}")
        elif own and room is not None and top not in ROOMS[room] | {room}:
            found.append(f"{path}: {room} must not import {top}")
        elif not own and (top == PACKAGE or top in ROOMS) and not (runtime and top == "nodes"):
            found.append(f"{path}: {name} is imported by an absolute name")
        elif not own and top in COMFYUI and not inside_comfyui:
            found.append(f"{path}: only nodes/runtime, benchmarks and testkit/inprocess.py may import {name}")
        elif not own and top == "folder_paths" and room != "nodes":
            found.append(f"{path}: only nodes may import folder_paths")
    return found


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_point_one_way(path):
    assert faults((ROOT / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gcfg/x.py", "import comfy"),
        ("gcfg/x.py", "from comfy import samplers"),
        ("gcfg/x.py", "def f():\n    import comfy.samplers"),
        ("gcfg/x.py", "import importlib\nimportlib.import_module('comfy.sd')"),
        ("gcfg/x.py", "from ..nodes import guidance"),
        ("gcfg/x.py", "from .. import training"),
        ("gcfg/x.py", "import folder_paths"),
        ("nodes/x.py", "import comfy.samplers"),
        ("nodes/x.py", "import latent_preview"),
        ("nodes/x.py", "from ..command.main import main"),
        ("nodes/x.py", "from comfyui_gcfg.gcfg import terms"),
        ("nodes/x.py", "import nodes"),
        ("nodes/runtime/x.py", "from ... import training"),
        ("nodes/runtime/x.py", "import gcfg"),
        ("training/x.py", "from ..nodes import runtime"),
        ("training/x.py", "import comfy"),
        ("training/x.py", "from ..evaluation import images"),
        ("training/x.py", "from ..command import errors"),
        ("evaluation/x.py", "from ..command import errors"),
        ("evaluation/x.py", "from ..reproduction import world"),
        ("demo/x.py", "import comfy"),
        ("demo/x.py", "from ..nodes.runtime import versions"),
        ("testkit/x.py", "import comfy.samplers"),
        ("testkit/x.py", "from ..demo import command"),
        ("benchmarks/x.py", "from ..demo import command"),
        ("benchmarks/x.py", "from ..reproduction import world"),
        ("demo/x.py", "from ..reproduction import world"),
        ("__init__.py", "from . import gcfg"),
        ("__init__.py", "from .training import cli"),
    ],
)
def test_the_walk_sees_each_kind_of_fault(path, source):
    assert len(faults(source, Path(path))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gcfg/x.py", "import torch\nfrom .errors import GuidanceError"),
        ("nodes/x.py", "import folder_paths\nfrom ..gcfg.terms import GuidanceTerm\nfrom .runtime import guider"),
        ("nodes/runtime/x.py", "import comfy.samplers, nodes\nfrom ...gcfg.errors import GuidanceError"),
        ("training/x.py", "from ..gcfg import combine\nfrom . import run"),
        ("evaluation/x.py", "from ..training import concept"),
        ("__init__.py", "from .nodes import guidance"),
    ],
)
def test_the_walk_lets_the_rest_pass(path, source):
    assert faults(source, Path(path)) == []


def test_no_module_is_a_drawer():
    assert [path for path in sources() if path.stem in {"utils", "util", "helpers", "misc"}] == []


def interpreted(program: str, cwd: Path) -> str:
    """What a fresh interpreter prints; it starts outside the repository."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def loaded_by(program: str, cwd: Path) -> set[str]:
    """The modules that a fresh interpreter holds after `program`."""
    report = "\nimport json, sys; print('\\n' + json.dumps(sorted(sys.modules)))"
    return set(json.loads(interpreted(program + report, cwd).splitlines()[-1]))


def modules_of(room: str) -> list[str]:
    """The dotted names of all modules in one room."""
    parts = (path.with_suffix("").parts for path in sources() if path.parts[0] == room)
    return [".".join([PACKAGE, *(part for part in names if part != "__init__")]) for names in parts]


def tops(loaded: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in loaded}


def test_the_installed_package_is_this_checkout(tmp_path):
    program = f"import {PACKAGE}, sys; print({PACKAGE}.__file__)"
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()).resolve() == ROOT / "__init__.py"


def test_the_root_loads_neither_torch_nor_comfyui(tmp_path):
    loaded = loaded_by(f"import {PACKAGE}", tmp_path)
    assert PACKAGE in loaded
    assert tops(loaded) & {"torch", "numpy", "folder_paths", *COMFYUI} == set()
    assert {name for name in loaded if name.startswith(f"{PACKAGE}.")} == set()


@pytest.fixture(scope="module")
def loaded_rooms(tmp_path_factory):
    """The modules that a process holds once it has imported a room; gcfg's process is forked for each other room."""
    names = {
        room: [n for n in modules_of(room) if not n.endswith("__main__")]
        for room in ("gcfg", "training", "evaluation", "demo")
    }
    program = f"""
        import importlib, json, os, sys

        def load(room):
            for name in {names!r}[room]:
                importlib.import_module(name)
            print("\\n" + json.dumps({{room: sorted(sys.modules)}}), flush=True)

        load("gcfg")  # which every other room may load too
        for room in ("training", "evaluation", "demo"):
            if not (child := os.fork()):
                load(room)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0, room
    """
    run = interpreted(program, tmp_path_factory.mktemp("rooms"))
    found = {}
    for line in run.splitlines():
        if line.startswith('{"'):
            found |= json.loads(line)
    return {room: set(loaded) for room, loaded in found.items()}


@pytest.mark.parametrize("room", ["gcfg", "training", "evaluation", "demo"])
def test_a_room_loads_only_what_it_may(room, loaded_rooms):
    loaded = loaded_rooms[room]
    rooms = {name.split(".")[1] for name in loaded if name.startswith(f"{PACKAGE}.")}
    assert room in rooms
    assert rooms <= ROOMS[room] | {room}
    assert tops(loaded) & {"folder_paths", *COMFYUI} == set()


def test_the_command_line_starts_without_torch(tmp_path):
    (command,) = entry_points(group="console_scripts", name="gcfg")
    module = command.value.partition(":")[0]
    loaded = loaded_by(f"import {module}", tmp_path)
    assert module in loaded
    assert tops(loaded) & {"torch", "numpy", "diffusers"} == set()
