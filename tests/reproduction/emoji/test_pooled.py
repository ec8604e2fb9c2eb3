"""The tables over several seeds, from made-up results whose means a reader computes in the head."""

import json

import pytest
from comfyui_gcfg.evaluation.results import FORMAT
from comfyui_gcfg.reproduction.emoji.pooled import read_numbers, spread, tables


@pytest.fixture
def folder(tmp_path):
    for seed, fid in enumerate((20.0, 30.0, 40.0)):
        results = tmp_path / "evaluation" / f"face-{seed}" / "results"
        results.mkdir(parents=True)
        for method, title in (("ours", "Ours"), ("lora", "LoRA")):
            for task, numbers in (("fid", {"fid": fid}), ("alignment", {"alignment": 0.5 + 0.1 * seed, "fid": 9.0})):
                result = {"format": FORMAT, "task": task, "method": method, "title": title, "numbers": numbers}
                (results / f"{task}-{method}.json").write_text(json.dumps(result))
        held_out = {"truth": 1.0, "methods": {"ours": {"distance": 3.0 + seed, "alignment": 0.7, "second": 0.8}}}
        (results.parent / "held_out.json").write_text(json.dumps(held_out))
    return tmp_path


def test_each_number_is_of_all_seeds(folder):
    numbers, titles = read_numbers(folder, "face", [0, 1, 2])
    assert numbers["fid", "ours", "fid"] == [20.0, 30.0, 40.0]
    assert numbers["held out", "ours", "distance"] == [3.0, 4.0, 5.0]
    assert titles == {"ours": "Ours", "lora": "LoRA"}
    text = tables(folder, "face", [0, 1, 2])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[2:4] == ["| LoRA | 30.0 (20.0 .. 40.0) |", "| Ours | 30.0 (20.0 .. 40.0) |"]
    ours = rows[-1].split(" | ")
    assert ours[1] == "0.600 (0.500 .. 0.700)"
    assert ours[4] == "4.000 (3.000 .. 5.000)"
    assert rows[-2].split(" | ")[4] == "-"  # of LoRA it was not measured
    assert "3 trainings of each method" in text
    assert "Real pictures' own distance: 1.000 (1.000 .. 1.000)" in text


def test_nothing_measured_is_a_dash():
    assert spread([]) == "-"
    assert spread([12.34, 10.0]) == "11.2 (10.0 .. 12.3)"
