"""The page over several trainings, from made-up results whose means a reader computes in the head."""

import json

import pytest
from comfyui_gcfg.reproduction.evaluation import write_evaluation
from comfyui_gcfg.reproduction.pooled import gather, page_text, spread, statements, tables
from comfyui_gcfg.reproduction.settings import read_settings
from comfyui_gcfg.testkit.results import result


@pytest.fixture
def gathered(tmp_path):
    """Three trainings: in the second one DreamBooth's FID of 20 is lower; of animals nothing was measured."""
    write_evaluation(tmp_path, read_settings("long"), "face", 0)
    for seed, fid in enumerate((10.0, 25.0, 13.0)):
        results = tmp_path / "evaluation" / f"face-{seed}" / "results"
        results.mkdir(parents=True)
        for method, task, numbers in (
            ("ours", "fid", {"fid": fid}),
            ("dreambooth", "fid", {}),
            ("ours", "alignment", {"alignment": 0.5 + 0.1 * seed}),
        ):
            stored = result(method, task)
            stored["numbers"] |= numbers
            (results / f"{task}-{method}.json").write_text(json.dumps(stored))
        held_out = {"truth": 1.0, "methods": {"ours": {"distance": 3.0 + seed, "alignment": 0.7, "second": 0.8}}}
        (results.parent / "held_out.json").write_text(json.dumps(held_out))
    return gather(tmp_path, ["face", "animal"], [0, 1, 2])


def test_each_number_is_of_all_trainings(gathered):
    text = tables(gathered["numbers"]["face"])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[2:4] == [
        "| DreamBooth | 20.0 (20.0 .. 20.0) | 859M | 12.37 | 23.92 |",
        "| Ours | 16.0 (10.0 .. 25.0) | 859M | 6.57 | 18.82 |",
    ]
    ours = rows[-1].split(" | ")
    assert ours[1] == "0.600 (0.500 .. 0.700)"
    assert ours[4] == "4.000 (3.000 .. 5.000)"
    assert rows[-2].split(" | ")[4] == "-"  # of DreamBooth it was not measured
    assert "Real pictures of the held-out things are 1.000 (1.000 .. 1.000) from each other." in text


def test_what_the_paper_says_is_counted_over_the_trainings(gathered):
    table = statements(gathered["claims"], ["face", "animal"])
    (line,) = [line for line in table.splitlines() if "lowest FID of all personalization methods" in line]
    assert line.split(" | ")[-2:] == ["2 of 3", "- |"]
    assert "| statement | rule | faces | animals |" in table
    counts = [line.split(" | ")[-2] for line in table.splitlines()[2:]]
    assert counts == sorted(counts)  # what fails comes first


def test_the_page_is_that_of_its_json(gathered):
    text = page_text(json.loads(json.dumps(gathered)), "reproduction")
    assert "[faces](reproduction/face.md), [animals](reproduction/animal.md)" in text
    assert tables(gathered["numbers"]["face"]) in text
    assert "was trained 3 times" in text


def test_nothing_measured_is_a_dash():
    assert spread([]) == "-"
    assert spread([12.34, 10.0]) == "11.2 (10.0 .. 12.3)"
