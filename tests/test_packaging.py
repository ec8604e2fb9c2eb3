"""The wheel: built from a copy of the repository, listed, and imported where nothing else is installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from pathspec import GitIgnoreSpec

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "comfyui_gcfg"
ROOMS = ("gcfg", "nodes", "training", "evaluation", "command")
DATA = (
    *("locales", "subgraphs", "web", "workflows", "training/presets"),
    *("evaluation/presets", "evaluation/abtest_page"),
)
# Nothing below these is a source: copying a virtual environment would take minutes.
SKIPPED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "output")


def shipped() -> set[str]:
    """The files that users need, relative to the root, as they stand in the checkout."""
    code = {path for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    data = {path for folder in DATA for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {path.relative_to(ROOT).as_posix() for path in {ROOT / "__init__.py"} | code | data}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built in a copy: setuptools leaves a build folder behind."""
    place = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(ROOT, place / "source", ignore=SKIPPED)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(place),
        str(copy),
    ]
    run = subprocess.run(build, cwd=place, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return HeaderParser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == {f"{PACKAGE}/{path}" for path in shipped()}


def test_the_files_in_the_wheel_are_those_of_the_checkout(wheel):
    with zipfile.ZipFile(wheel) as archive:
        different = [path for path in shipped() if archive.read(f"{PACKAGE}/{path}") != (ROOT / path).read_bytes()]
    assert different == []


def test_the_wheel_carries_the_licence(wheel, metadata):
    assert metadata["License-Expression"] == "GPL-3.0-or-later"
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()
    assert "GNU GENERAL PUBLIC LICENSE\n                       Version 3" in (ROOT / "LICENSE").read_text()


def test_the_version_is_that_of_the_changelog(metadata):
    heading = re.search(r"^## .*$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    newest = re.fullmatch(r"## \[(\d+\.\d+\.\d+)\] - (Unreleased|\d{4}-\d\d-\d\d)", heading.group())
    assert newest, f"the topmost heading is {heading.group()!r}, expected '## [X.Y.Z] - Unreleased' or a date"
    assert metadata["Version"] == newest.group(1)


def test_the_installed_wheel_imports_without_comfyui_and_torch(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:  # all that pip does with one of pure Python, but for the script
        archive.extractall(tmp_path)
    # Without `site` there is no site-packages: the standard library and the wheel are all this interpreter can import.
    program = f"""
import importlib.metadata, importlib.util, json, sys
import {PACKAGE} as pack
print(json.dumps({{
    "file": pack.__file__,
    "nodes": pack.NODE_CLASS_MAPPINGS,
    "missing": [name for name in ("torch", "comfy", "numpy") if importlib.util.find_spec(name) is None],
    "loaded": [name for name in sys.modules if name.startswith("{PACKAGE}.")],
    "command": [entry.value for entry in importlib.metadata.entry_points(group="console_scripts", name="gcfg")],
}}))"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-S", "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {
        "file": str(tmp_path / PACKAGE / "__init__.py"),
        "nodes": {},
        "missing": ["torch", "comfy", "numpy"],
        "loaded": [],
        "command": ["comfyui_gcfg.command.main:main"],
    }


def test_the_registry_fields_are_valid(project):
    """The rules of https://docs.comfy.org/registry/specifications, and the parser's spelling of the names."""
    comfy, metadata = project["tool"]["comfy"], project["project"]
    assert set(comfy) <= {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui", "includes"}
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", comfy["PublisherId"])
    assert comfy["DisplayName"].strip()
    assert comfy.get("Icon", "") == "" or re.match(r"https://.+\.(svg|png|jpg|gif)$", comfy["Icon"])
    assert len(metadata["name"]) < 100
    assert re.fullmatch(r"[a-z](?:[-_.]?[a-z0-9]+)*", metadata["name"])
    assert "comfyui" not in metadata["name"]
    accelerators = {"NVIDIA CUDA", "AMD ROCm", "Intel Arc", "Apple Metal"}
    assert {f"Environment :: GPU :: {name}" for name in accelerators} <= set(metadata["classifiers"])
    assert "Operating System :: OS Independent" in metadata["classifiers"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata["version"])
    supported = SpecifierSet(comfy["requires-comfyui"])
    assert all(version in supported for version in ("0.0.1", "0.3.29", "0.3.64", "0.8.0", "0.29.0", "0.33.0"))


def test_the_registry_archive_is_small_and_whole(tmp_path):
    """What `comfy node pack` would send: git's files without those of .comfyignore, at most 2 MB."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    ignore = GitIgnoreSpec.from_lines((ROOT / ".comfyignore").read_text().splitlines())
    sent = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file() and not ignore.match_file(name)]
    assert shipped() <= set(sent)
    tops = {name.partition("/")[0] for name in sent}
    assert tops & {"tests", "testkit", "demo", "benchmarks", "reproduction", "requirements"} == set()
    assert {"LICENSE", "README.md", "pyproject.toml", "requirements.txt", "docs"} <= tops
    with zipfile.ZipFile(tmp_path / "node.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sent:
            archive.write(ROOT / name, name)
    assert (tmp_path / "node.zip").stat().st_size <= 2_000_000


def test_the_tools_and_the_trainer_are_extras(project):
    extras = project["project"]["optional-dependencies"]
    assert {"train", "evaluate", "dev"} <= set(extras)
    core = {re.split(r"[^\w-]", name)[0] for name in project["project"]["dependencies"]}
    assert core == {"torch", "safetensors", "einops", "numpy", "pillow", "tqdm", "matplotlib"}
