"""The benchmark prints every row and stores valid JSON; how fast the machine is, is not tested."""

import json
import math
import subprocess
import sys

import pytest
from comfyui_gcfg.benchmarks.command import app
from comfyui_gcfg.testkit import layouts
from comfyui_gcfg.testkit.errors import CommandError

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


# Model calls of one step: evaluations of one set of weights are one call, the unconditional one with the prior's.
CALLS = {
    "stock": [2],
    "k1": [2],
    "k2": [3],
    "k4": [5],
    "k2_concept": [1, 2],
    "k2_lora": [1, 2],
    "k4_mixed": [1, 1, 3],
    "dual": [3],
    "rival_sum": [1, 2],
    "rival": [1, 1, 1],
}

RIVAL = """
import comfy.samplers


class Separately(comfy.samplers.CFGGuider):
    \"\"\"The sum of ours, with every prediction in a call of its own.\"\"\"

    def __init__(self, model, second, strength):
        super().__init__(model)
        self.second, self.strength = second, strength

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        def predict(patcher, key):
            patcher.model.current_patcher = patcher  # as loading it for a run does
            return comfy.samplers.calc_cond_batch(patcher.model, [self.conds[key]], x, timestep, model_options)[0]

        text, base = predict(self.model_patcher, "positive"), predict(self.model_patcher, "negative")
        other = predict(self.second, "positive")
        return base + self.cfg * (text - base) + self.strength * (other - base)


class Node:
    @classmethod
    def INPUT_TYPES(cls):
        texts = {"positive": ("CONDITIONING",), "negative": ("CONDITIONING",)}
        numbers = {"cfg": ("FLOAT", {}), "strength": ("FLOAT", {"default": 9.0})}
        required = {"model": ("MODEL",), "second": ("MODEL",), **texts, **numbers}
        return {"required": required, "optional": {"more": ("X",)}}

    RETURN_TYPES, FUNCTION = ("SIGMAS", "GUIDER"), "make"

    def make(self, model, second, positive, cfg, negative, strength):
        guider = Separately(model, second, strength)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return None, guider


NODE_CLASS_MAPPINGS = {"Rival": Node}
"""


def bench(*arguments, cwd):
    command = [sys.executable, "-m", "comfyui_gcfg.benchmarks", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for the small model files, made once."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
def test_a_small_run_reports_every_row(tmp_path, cache, root):
    arguments = ("--small", "--repeats", "1", "--size", "64", "--device", "cpu")
    # From the checkout: its nodes/ must not shadow ComfyUI's nodes.py.
    run = bench(*arguments, "--output", str(tmp_path / "out"), "--cache", cache, cwd=root)
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
    assert f"{len(list((root / 'web' / 'docs').iterdir()))} nodes" in rows["import_ms"]["note"]  # each has a help page
    assert "batch 1 and 2" in rows["step"]["note"]
    assert "same result to the last bit" in rows["k1_vs_stock"]["note"]


@pytest.mark.slow
def test_the_matrix_counts_calls_and_stays_with_its_peers(tmp_path, cache, root):
    pack, trace = tmp_path / "rival", tmp_path / "trace.json"
    pack.mkdir()
    (pack / "__init__.py").write_text(RIVAL)
    arguments = ["matrix", "--family", "sd15", "--size", "64", "--repeats", "1", "--device", "cpu"]
    arguments += ["--output", str(tmp_path), "--cache", cache, "--profile", str(trace)]
    run = bench(*arguments, "--rival", str(pack), "--rival-set", "strength=1.5", cwd=root)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "matrix.json").read_text())
    setting = "sd15, 64 px, batch 1: "
    rows = {row["name"].removeprefix(setting).removeprefix("sd15: "): row for row in report["figures"]}
    assert all(math.isfinite(row["value"]) for row in rows.values())
    assert report["setting"]["models"] == {"sd15": {"parameters": 25_789_444, "dtype": "torch.float32"}}
    assert report["setting"]["skipped"] == []
    # What does not depend on the machine's speed.
    assert {name.split(".")[0] for name in rows} == {*CALLS, "waits_stock", "waits_gcfg"}
    for case, batches in CALLS.items():
        assert (rows[f"{case}.calls"]["value"], rows[f"{case}.calls"]["note"]) == (
            len(batches),
            "batch " + ", ".join(map(str, batches)),
        )
        assert rows[f"{case}.step"]["value"] > 0
        assert rows[f"{case}.overhead"]["value"] > 1
        assert rows[f"{case}.overhead"]["goal"] == (None if case in ("stock", "dual", "rival") else 1.01)
        if case != "stock":
            assert rows[f"{case}.arithmetic"]["value"] == sum(batches) / 2
            assert rows[f"{case}.vs_stock"]["goal"] == (
                1.5 if case in ("k2", "k2_concept", "k2_lora", "rival_sum") else None
            )
    ran = {"stock", "k2_concept", "k2_lora", "k4_mixed"}
    assert {name.split(".")[0] for name in rows if name.endswith(".cold")} == ran
    for case in ran:
        assert rows[f"{case}.loads"]["value"] == 1
        assert rows[f"{case}.moves"]["value"] == 0
        assert rows[f"{case}.peak"]["value"] > 0
    # A clone's own weights come on top of what two separate models need.
    assert rows["k2_lora.peak"]["value"] > rows["k2_concept.peak"]["value"] + 20
    for peer in ("dual", "rival"):
        assert relative_difference(rows[f"{peer}.vs_peer"]["note"]) < 1e-5
    events = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert events.count("stock step") == events.count("GCFG step") == 2
    assert events.count("model call, batch 2") == 4
    assert events.count("model call, batch 1") == 2
    assert rows["waits_gcfg"]["value"] == rows["waits_stock"]["value"]
    assert "| GCFG K=4, one model | 1 of batch 5 |" in run.stdout


def relative_difference(note):
    """The number at the end of a note; 0 where the results are the same to the last bit."""
    return 0 if note.endswith("bit") else float(note.split()[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "sd3"], "--family sd3: expected one of sd15, sd15-full, sd21, sdxl, sdxl-full."),
        (["--size", "100"], "--size 100: expected a positive multiple of 64, as SD1.5's latents need; round it."),
        (["--weights", "fp4"], "--weights fp4: expected one of auto, bf16, fp16."),
    ],
)
def test_a_wrong_setting_of_the_matrix_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandError) as caught:
        app(["matrix", *arguments], standalone_mode=False)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_a_wrong_size_is_refused(tmp_path):
    run = bench("--size", "100", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stderr == "Error: --size 100: expected a positive multiple of 64, as SD1.5's latents need; round it.\n"


@pytest.mark.parametrize(
    ("family", "tensors", "parameters"), [("sd15-full", 686, 859_520_964), ("sdxl-full", 1680, 2_567_463_684)]
)
def test_the_full_layouts_are_the_published_ones(family, tensors, parameters):
    shapes = layouts.unet(layouts.FAMILIES[family])
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters
