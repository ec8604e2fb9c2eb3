"""Evaluations that are broken off, and those of several processes, beside one that ran through."""

import json
import re
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from comfyui_gcfg.command.main import app
from comfyui_gcfg.evaluation import generation
from comfyui_gcfg.evaluation.config import SamplingConfig
from comfyui_gcfg.evaluation.images import Shard, read_shard, seconds_of, shards, write_shard
from comfyui_gcfg.evaluation.recipe import Recipe
from comfyui_gcfg.testkit.processes import torchrun
from filelock import FileLock
from typer.testing import CliRunner

METHODS = {
    "ours": {
        "fid": {"terms": [{"model": "concept", "weight": [1.0, 1.5]}, {"prompt": "a", "weight": 2.0}]},
        "alignment": {"terms": [{"model": "concept", "weight": 1.5}, {"prompt": "{prompt}", "weight": 4.0}]},
    }
}
LONG = {"methods": METHODS, "fid": {"count": 11, "search_count": 4}, "sampling": {"batch_size": 2}}


def written(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (folder / "evaluation" / "images").rglob("[0-9]*.zip")
    }


def outcome(folder):
    """All images, and all of the results but their clock."""
    results = {}
    for path in (folder / "evaluation" / "results").glob("*.json"):
        results[path.name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("seconds", "config")}
        for trial in results[path.name]["search"]:
            trial.pop("seconds", None)
    images = {path.relative_to(folder): read_shard(path).numpy().tobytes() for path in written(folder)}
    return images, results


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, write_evaluation):
    """What all others must equal."""
    folder = tmp_path_factory.mktemp("unbroken")
    told = CliRunner().invoke(app, ["evaluate", "tables", str(write_evaluation(folder, **LONG))])
    assert told.exit_code == 0, (told.output, told.exception)
    return outcome(folder)


def test_an_evaluation_killed_again_and_again_equals_the_unbroken_one(evaluation_file, tmp_path, unbroken, start):
    path = evaluation_file(**LONG)
    images, _ = unbroken
    for target in (1, 5, len(images) - 2):
        process = start("evaluate", "tables", path)
        while process.is_alive() and len(list(tmp_path.glob("evaluation/images/*/[0-9]*.zip"))) < target:
            time.sleep(0.002)
        assert process.is_alive(), "it ended before it was killed"
        process.kill()
        process.join()
        kept = written(tmp_path)
        assert target <= len(kept) < len(images)
        assert {p.relative_to(tmp_path): read_shard(p).numpy().tobytes() for p in kept}.items() <= images.items()
    process = start("evaluate", "tables", path)
    process.join()
    assert process.exitcode == 0
    assert outcome(tmp_path) == unbroken
    assert kept.items() <= written(tmp_path).items()  # not made again
    assert not list(tmp_path.rglob(".unfinished-*"))


def test_two_processes_give_the_images_and_numbers_of_one(evaluation_file, tmp_path, unbroken):
    path = evaluation_file(**LONG)
    two = torchrun("evaluate", "tables", path)
    out, err = two.communicate(timeout=300)
    assert two.returncode == 0, err
    assert outcome(tmp_path) == unbroken
    assert out.count("fid of ours: ") == 1  # the main process speaks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fid", "sentence"),
    [
        ({"images": "nowhere"}, "fid.images '.*nowhere' is no folder"),  # found when the files are hashed
        ({"extractor": "evaluation_standins:nothing"}, "fid.extractor .*nothing"),  # when the metrics are made
        ({}, "output.folder '.*' is in use by another gcfg command"),
    ],
)
def test_an_error_of_the_main_process_is_one_sentence_in_all(evaluation_file, tmp_path, fid, sentence):
    path = evaluation_file(methods=METHODS, fid={"count": 2, "search_count": 2, **fid})
    (tmp_path / "evaluation").mkdir()
    with nullcontext() if fid else FileLock(tmp_path / "evaluation" / ".lock"):
        two = torchrun("evaluate", "fid", path)
        _, err = two.communicate(timeout=300)
    assert two.returncode == 1
    assert re.search(rf"^Error: {sentence}", err, re.MULTILINE), err
    assert not re.search(r"(?i)\[rank\d\]|gloo|connection closed", err)  # the launcher's own traceback is beside them


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_process_makes_its_share_and_nothing_twice(tmp_path, monkeypatch, processes):
    order = generation.Order(Recipe(), (), ("", "a"), (5, 3))
    sampling = SamplingConfig(batch_size=2)
    first = shards(order.counts, 2)[0]
    write_shard(first.path(tmp_path), torch.zeros(2, 3, 4, 4, dtype=torch.uint8), first.start, 1.0)
    made = []

    def make(order, shard, models, sampling):
        made.append(shard)
        return torch.zeros(shard.stop - shard.start, 3, 4, 4, dtype=torch.uint8)

    monkeypatch.setattr(generation, "make", make)
    shares = []
    for index in reversed(range(processes)):  # nothing is written before all have looked: here, one after the other
        state = SimpleNamespace(
            process_index=index, num_processes=processes, is_main_process=False, wait_for_everyone=lambda: None
        )
        monkeypatch.setattr(generation, "PartialState", lambda state=state: state)
        missing = set(tmp_path.glob("*.zip"))
        made.clear()
        generation.generate(order, tmp_path, lambda: None, sampling, "")
        shares.append(list(made))
        for path in set(tmp_path.glob("*.zip")) - missing:
            path.unlink()
    everything = [shard for share in shares for shard in share]
    assert sorted(everything, key=str) == sorted(shards(order.counts, 2)[1:], key=str)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_shards_hold_one_prompt_and_every_image_once():
    found = shards((5, 0, 4), 2)
    assert found == [Shard(0, 0, 2), Shard(0, 2, 4), Shard(0, 4, 5), Shard(2, 0, 2), Shard(2, 2, 4)]


def test_a_shard_keeps_its_images_and_its_seconds(tmp_path):
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    path = Shard(1, 10, 13).path(tmp_path)
    write_shard(path, images, 10, 2.5)
    assert path.name == "001-000010-000013.zip"
    assert torch.equal(read_shard(path), images)
    assert seconds_of(path) == 2.5


def test_a_damaged_shard_is_named(evaluation_file, tmp_path):
    path = evaluation_file(**LONG)
    folder = tmp_path / "evaluation" / "images"
    assert CliRunner().invoke(app, ["evaluate", "alignment", str(path)]).exit_code == 0
    damaged = next(folder.rglob("*.zip"))
    damaged.write_bytes(damaged.read_bytes()[:-30])
    (tmp_path / "evaluation" / "results" / "alignment-ours.json").unlink()
    told = CliRunner().invoke(app, ["evaluate", "alignment", str(path)])
    assert told.exit_code == 1
    assert f"{damaged.name}' is damaged" in told.output
    damaged.unlink()
    assert CliRunner().invoke(app, ["evaluate", "alignment", str(path)]).exit_code == 0
