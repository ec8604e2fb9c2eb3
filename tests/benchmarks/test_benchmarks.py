"""The benchmark prints every row and stores valid JSON; how fast the machine is, is not tested."""

import json
import math
import subprocess
import sys

import pytest
from comfyui_gcfg.benchmarks.command import MAIN, app
from comfyui_gcfg.testkit import layouts
from comfyui_gcfg.testkit.errors import CommandError
from typer.testing import CliRunner

# Model calls of one step: evaluations of one set of weights are one call, the unconditional one with the prior's.
CALLS = {
    "stock CFG": [2],
    "GCFG, one term": [2],
    "GCFG, two terms on one model": [3],
    "ComfyUI's Dual CFG Guider, the same": [3],
    "GCFG, four terms on one model": [5],
    "GCFG, text and concept UNet": [1, 2],
    "GCFG, text and LoRA clone": [1, 2],
}
STEP = ["model calls", "step", "/ stock CFG", "by evaluations", "/ its model calls", "- its model calls"]
CLONE, AGAIN = "separated clone", "second load"
PEAK = "prior and concept UNet, from files"
RUN = ["cold run", "warm run", "cold / warm", "peak memory, cold", "loads per model", "moves between steps"]
WHOLE = ["/ stock KSampler", "the calls' noise cancelled", "error of the result"]
COLUMNS = {
    "imports": {"import of the pack into ComfyUI": ["time"], "the same at its very first start": ["time"]},
    "peak": {PEAK: ["peak / (weights + activations)", "peak", "weights", "activations"]},
    "clones": {
        CLONE: ["time", "/ second load", "error of a step", "memory"],
        AGAIN: ["time", "memory"],
        "clone that shares its module (without us)": ["error of a step"],
    },
    "ksampler": {case: WHOLE for case in ("GCFG, one term", "GCFG, terms w and 1 - w")},
    "loads": dict.fromkeys(["stock CFG", "GCFG, text and concept UNet", "GCFG, text and LoRA clone"], RUN),
    "steps": {case: [*STEP, *(["/ separate calls"] if case.startswith("GCFG") else [])] for case in CALLS},
}


@pytest.mark.slow
def test_a_small_run_reports_every_row(tmp_path, root):
    path = tmp_path / "out" / "figures.json"
    command = [sys.executable, "-m", "comfyui_gcfg.benchmarks", "--small", "--size", "64", "--repeats", "1"]
    # From the checkout: its nodes/ must not shadow ComfyUI's nodes.py.
    run = subprocess.run(
        [*command, "--device", "cpu", "--json", str(path)], cwd=root, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(path.read_text())
    assert list(report["sections"]) == list(MAIN)
    assert report["setting"]["layout"] == "sd15"
    rows = {(section, row["row"], row["column"]): row for section, rows in report["sections"].items() for row in rows}
    assert sorted(rows) == sorted(
        (section, row, column)
        for section, table in COLUMNS.items()
        for row, columns in table.items()
        for column in columns
    )
    for name, row in rows.items():
        assert math.isfinite(row["value"]), name
        assert row["met"] == (None if row["goal"] is None else row["value"] <= row["goal"]), name
        assert f"| {row['row']} " in run.stdout, name
        assert f" {row['column']} " in run.stdout, name

    # What does not depend on the machine's speed.
    def value(*name):
        return rows[name]["value"]

    for case, batches in CALLS.items():
        assert value("steps", case, "model calls") == len(batches)
        assert rows["steps", case, "model calls"]["note"] == f" of batch {', '.join(map(str, batches))}"
        assert value("steps", case, "by evaluations") == sum(batches) / 2
        assert value("steps", case, "/ its model calls") > 1
        three = case.startswith("GCFG") and sum(batches) == 3
        assert rows["steps", case, "/ stock CFG"]["goal"] == (1.5 if three else None)
    for case in COLUMNS["ksampler"]:
        assert value("ksampler", case, "error of the result") == 0
    for case in COLUMNS["loads"]:
        assert value("loads", case, "loads per model") == 1
        assert value("loads", case, "moves between steps") == 0
    # A clone's own weights come on top of what two separate models need.
    peaks = [value("loads", f"GCFG, text and {what}", "peak memory, cold") for what in ("concept UNet", "LoRA clone")]
    assert peaks[1] > peaks[0] + 20
    assert value("clones", CLONE, "error of a step") == 0
    assert value("clones", "clone that shares its module (without us)", "error of a step") > 0.1
    assert 0 < value("clones", CLONE, "memory") < value("clones", AGAIN, "memory")
    # In fp32; the concept UNet has 2,787,840 parameters less, and its 4 constants of 320 values in the file's fp16.
    kept = (2 * 25_789_444 - 2_787_840) * 4 - 4 * 320 * 2
    assert value("peak", PEAK, "weights") == pytest.approx(kept / 1e6)
    least = value("peak", PEAK, "weights") + value("peak", PEAK, "activations")
    assert value("peak", PEAK, "peak / (weights + activations)") == pytest.approx(value("peak", PEAK, "peak") / least)
    assert 1 <= value("peak", PEAK, "peak") / least < 1.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "sd3"], "--family sd3: expected sd15 or sdxl."),
        (["--size", "100"], "--size 100: expected a positive multiple of 64, as SD1.5's latents need; round it."),
        (
            ["steps", "room"],
            "section room: expected one of training, reuse, imports, peak, clones, ksampler, loads, steps.",
        ),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, CommandError)
    assert str(result.exception) == message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "tensors", "parameters"), [("sd15-full", 686, 859_520_964), ("sdxl-full", 1680, 2_567_463_684)]
)
def test_the_full_layouts_are_the_published_ones(family, tensors, parameters):
    shapes = layouts.unet(layouts.FAMILIES[family])
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters
