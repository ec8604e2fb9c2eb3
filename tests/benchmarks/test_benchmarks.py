"""The benchmark prints every row and stores valid JSON; how fast the machine is, is not tested."""

import json
import math
import subprocess
import sys

import pytest
from comfyui_gcfg.demo import layouts

ROWS = {
    "import_ms",
    "import_first_ms",
    "separation_s",
    "second_load_s",
    "separation_vs_load",
    "separation_mb",
    "second_load_mb",
    "separation_error",
    "naive_error",
    "loads",
    "moves",
    "step",
    "overhead",
    "overhead_within",
    "overhead_ms",
    "diagnostics",
    "three_vs_separate",
    "three_vs_stock",
    "k1_vs_stock",
    "k1_around",
    "eq7_vs_stock",
    "eq7_around",
    "null_text_patch",
    "concept_unet",
    "concept_freed",
}


def bench(*arguments, cwd):
    command = [sys.executable, "-m", "comfyui_gcfg.benchmarks", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_a_small_run_reports_every_row(tmp_path, root):
    arguments = ("--small", "--repeats", "1", "--size", "64", "--device", "cpu")
    # From the checkout: its nodes/ must not shadow ComfyUI's nodes.py.
    run = bench(*arguments, "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), cwd=root)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
    rows = {row["name"]: row for row in report["figures"]}
    assert set(rows) == ROWS
    assert report["setting"]["parameters"] == 25_789_444
    for name, row in rows.items():
        assert row["text"] in run.stdout, name
        assert math.isfinite(row["value"]), name
        assert row["met"] == (None if row["goal"] is None else row["value"] <= row["goal"]), name
    # What does not depend on the machine's speed.
    assert rows["loads"]["value"] == 1
    assert rows["moves"]["value"] == 0
    assert rows["separation_error"]["value"] == 0
    assert rows["naive_error"]["value"] > 0.1
    assert 0 < rows["separation_mb"]["value"] < rows["second_load_mb"]["value"]
    # In fp32, but for the 4 constants of 320 values, which stay in the file's fp16.
    assert rows["concept_freed"]["value"] == pytest.approx((2_787_840 * 4 + 4 * 320 * 2) / 1e6)
    assert "9 nodes" in rows["import_ms"]["note"]
    assert "batch 1 and 2" in rows["step"]["note"]
    assert "same result to the last bit" in rows["k1_vs_stock"]["note"]


def test_a_wrong_size_is_refused(tmp_path):
    run = bench("--size", "100", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr == "Error: --size 100: expected a positive multiple of 64, as SD1.5's latents need; round it.\n"


def test_the_full_layout_is_that_of_sd15():
    shapes = layouts.unet(layouts.FAMILIES["sd15-full"])
    assert len(shapes) == 686
    assert sum(map(math.prod, shapes.values())) == 859_520_964
