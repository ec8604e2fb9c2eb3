"""`gcfg evaluate` as it is used: numbers beside those of other libraries, results that are kept, searches."""

import hashlib
import itertools
import json
import re
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from comfyui_gcfg.command.main import app
from comfyui_gcfg.evaluation import generation
from comfyui_gcfg.evaluation.report.words import number
from comfyui_gcfg.evaluation.results import read_results
from comfyui_gcfg.evaluation.tasks import Alignment, Canny, Fid
from comfyui_gcfg.training.data.images import find_images
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from typer.testing import CliRunner

OURS = {
    "title": "Ours",
    "fid": {"terms": [{"model": "concept", "weight": [1.0, 1.5]}]},
    "alignment": {"terms": [{"model": "concept", "weight": 1.5}, {"prompt": "{prompt}", "weight": [0.0, 4.0]}]},
    "canny": {"terms": [{"model": "concept", "weight": 1.0, "control": True}]},
    "diversity": {"terms": [{"model": "concept", "weight": 1.0}, {"prompt": "{prompt}", "weight": 2.0}]},
}
PRIOR = {"fid": {}, "alignment": {"terms": [{"prompt": "{prompt}", "weight": 3.0}]}}
EVERYTHING = ("fid", "alignment", "canny", "diversity", "sweep")
SWEEP = {
    "recipe": {
        "terms": [{"model": "concept", "weight": [1.0, 2.0]}, {"prompt": "{prompt}", "weight": [0.0, 1.0, 2.0]}]
    },
    "prompt": "a b",
    "label": "red",
    "per_cell": 4,
}


def gcfg(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def result(folder, name):
    return json.loads((folder / "evaluation" / "results" / f"{name}.json").read_text())


def images_of(folder, found):
    """All images of a result by prompt, read by Pillow and zipfile alone: {prompt: (N, H, W, 3)}."""
    prompts = {}
    for path in sorted((folder / "evaluation" / found["images"]).glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                picture = np.asarray(Image.open(BytesIO(archive.read(name))))
                prompts.setdefault(path.name[:3], {})[name] = picture
    return [np.stack([images[name] for name in sorted(images)]) for _, images in sorted(prompts.items())]


class Moments(torch.nn.Module):
    """The stand-in extractor, written again with reshapes; its features are of float64."""

    num_features = 12

    def forward(self, images):
        n, _, height, width = images.shape
        return images.double().reshape(n, 3, 2, height // 2, 2, width // 2).mean((3, 5)).flatten(1)


def fid(fake, digits):
    real = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in find_images(digits)])
    metric = FrechetInceptionDistance(Moments())
    for images, is_real in ((real, True), (fake, False)):
        metric.update(torch.from_numpy(images).permute(0, 3, 1, 2), real=is_real)
    return float(metric.compute())


def edges(images):
    return np.stack([cv2.Canny(image, 100, 200) > 0 for image in images])


@pytest.fixture(scope="module")
def all_of_it(tmp_path_factory, write_evaluation):
    """The folder of an evaluation with every task, made by one command."""
    folder = tmp_path_factory.mktemp("all")
    told = gcfg("tables", write_evaluation(folder, methods={"ours": OURS, "prior": PRIOR}, sweep=SWEEP))
    assert told.exit_code == 0, (told.output, told.exception)
    (folder / "told.txt").write_text(told.output)
    return folder


def test_every_number_is_that_of_the_images(all_of_it, digits):
    found = {
        name: result(all_of_it, name)
        for name in ("fid-ours", "fid-prior", "alignment-ours", "canny-ours", "diversity-ours")
    }
    images = {name: images_of(all_of_it, each) for name, each in found.items()}
    assert {name: [len(prompt) for prompt in each] for name, each in images.items()} == {
        "fid-ours": [10], "fid-prior": [10], "alignment-ours": [5, 5], "canny-ours": [6], "diversity-ours": [5, 5],
    }  # fmt: skip
    for name in ("fid-ours", "fid-prior"):
        assert found[name]["numbers"] == {"fid": pytest.approx(fid(images[name][0], digits), rel=1e-3)}
        assert found[name]["count"] == 10
    assert found["fid-ours"]["numbers"] != found["fid-prior"]["numbers"]

    shown = images["alignment-ours"]
    shares = [(prompt.mean((1, 2)).argmax(1) == channel).mean() for prompt, channel in zip(shown, (0, 1), strict=True)]
    assert found["alignment-ours"]["numbers"] == {
        "alignment": pytest.approx(np.mean(shares)),
        "fid": pytest.approx(fid(np.concatenate(shown), digits), rel=1e-3),
    }
    assert [each["alignment"] for each in found["alignment-ours"]["details"]] == pytest.approx(shares)

    (controlled,) = images["canny-ours"]
    asked = edges(np.stack([np.asarray(Image.open(path).convert("RGB")) for path in find_images(digits)[:3]]))
    mae = (edges(controlled) != np.repeat(asked, 2, axis=0)).mean()
    assert found["canny-ours"]["numbers"]["mae"] == pytest.approx(mae)
    assert set(found["canny-ours"]["numbers"]) == {"mae", "precision", "recall", "f1"}

    distances = []
    for prompt in images["diversity-ours"]:
        features = Moments()(torch.from_numpy(prompt).permute(0, 3, 1, 2)).numpy()
        distances.append(np.mean([np.linalg.norm(a - b) for i, a in enumerate(features) for b in features[:i]]))
    assert found["diversity-ours"]["numbers"]["diversity"] == pytest.approx(np.mean(distances), rel=1e-5)


def test_real_images_that_were_held_out_are_measured_beside(evaluation_file, tmp_path, digits):
    """As many as a method makes, in the order of their names; they count among what decides a result."""
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    for path in find_images(digits)[:8]:
        Image.eval(Image.open(path).convert("RGB"), lambda value: value // 2).save(held_out / path.name)
    own = {"count": 6, "held_out": str(held_out)}
    told = gcfg("fid", evaluation_file(methods={"prior": PRIOR}, fid=own))
    assert told.exit_code == 0, (told.output, told.exception)
    numbers = result(tmp_path, "fid-prior")["numbers"]
    chosen = np.stack([np.asarray(Image.open(path)) for path in find_images(held_out)[:6]])
    assert numbers["held_out_count"] == 6
    assert numbers["held_out_fid"] == pytest.approx(fid(chosen, digits), rel=1e-3)
    assert result(tmp_path, "fid-prior")["files"]["fid.held_out"]["path"] == str(held_out)


def test_a_result_says_all_that_decided_it(all_of_it):
    found = result(all_of_it, "alignment-ours")
    stated = {"format": 1, "task": "alignment", "method": "ours", "title": "Ours", "group": "methods"}
    stated |= {"parameters": 1000, "count": 10, "seed": 0}
    assert {key: found[key] for key in stated} == stated
    assert [term["weight"] for term in found["recipe"]["terms"]] in ([1.5, 0.0], [1.5, 4.0])
    assert [trial["weights"] for trial in found["search"]] == [[1.5, 0.0], [1.5, 4.0]]
    assert all({"alignment", "fid"} <= set(trial) for trial in found["search"])
    assert "within 0.02 of the best" in found["rule"]
    assert found["config"]["fid"]["count"] == 10
    assert set(found["files"]) == {"prior.checkpoint", "prior.tokenizer", "models.concept.unet", "fid.images"}
    file = found["files"]["models.concept.unet"]
    assert file["path"] == "concept.safetensors"  # as it was written: no result names the machine
    assert file["sha256"] == hashlib.sha256((all_of_it / "concept.safetensors").read_bytes()).hexdigest()
    assert found["seconds"] > 0
    assert {"torch", "diffusers", "torchmetrics", "python"} <= set(found["versions"])
    assert str(all_of_it) not in json.dumps({key: found[key] for key in found if key != "config"} | {"files": {}})


def test_what_is_measured_is_not_measured_again(all_of_it, monkeypatch):
    results = all_of_it / "evaluation" / "results"
    before = {path.name: path.read_bytes() for path in results.iterdir()}

    def never(*args):
        raise AssertionError("images were made")

    monkeypatch.setattr(generation, "make", never)
    for task in EVERYTHING:
        assert gcfg(task, all_of_it / "evaluation.toml").exit_code == 0
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (["fid.count=12"], True),
        (["sampling.seed=1"], True),
        (["sampling.steps=3"], True),
        (["methods.ours.title=Another"], False),
        (["methods.ours.group=Another"], False),
        (["alignment.per_prompt=7"], False),
        (["models.concept.unet=compact.safetensors"], True),
    ],
)
def test_a_result_is_made_again_if_what_decides_it_changes(evaluation_file, tmp_path, change, again):
    path = evaluation_file(methods={"ours": {"fid": {"terms": [{"model": "concept"}]}}})
    assert gcfg("fid", path).exit_code == 0
    before = result(tmp_path, "fid-ours")
    assert gcfg("fid", path, *(word for each in change for word in ("--set", each))).exit_code == 0
    after = result(tmp_path, "fid-ours")
    assert (after["fingerprint"] != before["fingerprint"]) == again
    assert (after["seconds"], after["numbers"]) == (before["seconds"], before["numbers"]) or again
    assert after["title"] == ("Another" if "title" in change[0] else "ours")


def test_another_file_under_the_same_name_is_noticed(evaluation_file, tmp_path, world):
    path = evaluation_file(methods={"tuned": {"fid": {"terms": [{"model": "tuned"}]}}})
    assert gcfg("fid", path).exit_code == 0
    before = result(tmp_path, "fid-tuned")
    (tmp_path / "tuned.safetensors").unlink()
    (tmp_path / "tuned.safetensors").write_bytes((world / "concept.safetensors").read_bytes())
    assert gcfg("fid", path).exit_code == 0
    after = result(tmp_path, "fid-tuned")
    assert after["numbers"] != before["numbers"]
    assert after["images"] != before["images"]


def test_the_search_takes_the_best_by_its_rule(all_of_it):
    found = result(all_of_it, "fid-ours")
    best = min(found["search"], key=lambda trial: trial["fid"])
    assert [term["weight"] for term in found["recipe"]["terms"]] == best["weights"]


def test_no_image_of_the_search_counts_in_the_end(all_of_it):
    """Or the weights would be chosen by the very images that are then measured."""
    found = result(all_of_it, "fid-ours")
    searched = [path.name for path in (all_of_it / "evaluation" / "images").glob("fid-ours-*")]
    searched.remove(Path(found["images"]).name)
    assert len(searched) == 2
    shown = {image.tobytes() for name in searched for image in images_of(all_of_it, {"images": f"images/{name}"})[0]}
    assert len(shown) == 2 * 6
    assert not shown & {image.tobytes() for image in images_of(all_of_it, found)[0]}


def test_the_rules_of_the_search(evaluation_config):
    config = evaluation_config()
    trials = [
        {"alignment": 0.90, "fid": 9.0},
        {"alignment": 0.885, "fid": 5.0},  # near enough to the best, and of lower FID
        {"alignment": 0.50, "fid": 1.0},
    ]
    assert Alignment(config).choose(trials) == 1
    assert Alignment(config).choose(trials[:1] + trials[2:]) == 0
    assert Fid(config).choose(trials) == 2
    assert Canny(config).choose([{"f1": 0.2, "mae": 0.1}, {"f1": 0.4, "mae": 0.2}]) == 1


def test_all_methods_start_from_the_same_noise(tmp_path, evaluation_file):
    """Two names for one recipe give the same images, two seeds others, and no two images of a task are alike."""
    recipe = {"fid": {"terms": [{"model": "tuned", "weight": 1.0}]}}
    assert gcfg("fid", evaluation_file(methods={"one": recipe, "two": recipe})).exit_code == 0
    one, two = (images_of(tmp_path, result(tmp_path, f"fid-{name}"))[0] for name in ("one", "two"))
    assert (one == two).all()
    assert len({image.tobytes() for image in one}) == 10
    places = itertools.product((0, 1), (False, True), (0, 1), range(50))
    seeds = {generation.image_seed(*place) for place in places}
    assert len(seeds) == 400
    assert max(seeds) < 2**63


def test_the_conditions_edges_steer(tmp_path, evaluation_file):
    """The images of one seed with other conditions differ, and two of one condition have other seeds."""
    path = evaluation_file(methods={"c": {"canny": {"terms": [{"control": True, "weight": 1.5}]}}})
    assert gcfg("canny", path).exit_code == 0
    (edged,) = images_of(tmp_path, result(tmp_path, "canny-c"))
    assert gcfg("canny", path, "--set", "canny.low=250", "--set", "canny.high=255").exit_code == 0
    (bare,) = images_of(tmp_path, result(tmp_path, "canny-c"))
    assert (edged != bare).any(axis=(1, 2, 3)).any()
    assert (edged[0] != edged[1]).any()


def test_the_sweep_measures_every_pair_and_shows_an_image_of_each(all_of_it, digits):
    found = result(all_of_it, "sweep")
    assert [cell["weights"] for cell in found["search"]] == [[a, b] for a in (1.0, 2.0) for b in (0.0, 1.0, 2.0)]
    assert [axis["weights"] for axis in found["axes"]] == [[1.0, 2.0], [0.0, 1.0, 2.0]]
    folders = sorted((all_of_it / "evaluation" / "images").glob("sweep-*"))
    assert len(folders) == 6
    measured = {round(fid(images_of(all_of_it, {"images": f"images/{each.name}"})[0], digits), 1) for each in folders}
    assert {round(cell["fid"], 1) for cell in found["search"]} == measured
    whole = np.asarray(Image.open(all_of_it / "evaluation" / found["grid"]))
    assert whole.shape == (28 + 2 * 32, 64 + 3 * 32, 3)
    cells = {whole[28 + 32 * y : 60 + 32 * y, 64 + 32 * x : 96 + 32 * x].tobytes() for y in range(2) for x in range(3)}
    first = {images_of(all_of_it, {"images": f"images/{each.name}"})[0][0].tobytes() for each in folders}
    assert cells == first


def test_tables_runs_everything_and_writes_the_page(all_of_it, tmp_path):
    path, told = all_of_it / "evaluation.toml", (all_of_it / "told.txt").read_text()
    results = read_results(all_of_it / "evaluation" / "results")
    assert {(each["task"], each["method"]) for each in results} == {
        ("fid", "ours"), ("alignment", "ours"), ("canny", "ours"), ("diversity", "ours"),
        ("fid", "prior"), ("alignment", "prior"), ("sweep", "sweep"),
    }  # fmt: skip
    assert "fid of Ours: fid " in told
    assert "of 2 searched: lowest FID" in told
    page = (all_of_it / "evaluation" / "report.md").read_text(encoding="utf-8")
    for each in results:
        if each["task"] == "fid":
            assert re.search(rf"\| {each['title']} \|.*[ *]{number(each['numbers']['fid'])}[ *]", page)
    (tmp_path / "stages.json").write_text('{"the prior": 90}')
    told = gcfg("report", path, "--page", tmp_path / "docs" / "page.md", "--stages", tmp_path / "stages.json")
    assert told.exit_code == 0, (told.output, told.exception)
    again = (tmp_path / "docs" / "page.md").read_text(encoding="utf-8")
    assert "| the prior | 1.5 |" in again
    assert again.replace("page/", "report/").splitlines()[:20] == page.splitlines()[:20]
    (tmp_path / "stages.json").write_text("[90]")
    told = gcfg("report", path, "--stages", tmp_path / "stages.json")
    assert told.exit_code == 1
    assert "expected JSON such as" in told.output


def test_the_ab_test_shows_the_methods_images_side_by_side(all_of_it, tmp_path):
    path = all_of_it / "evaluation.toml"
    told = gcfg("abtest", path, "--trials", "3")
    assert told.exit_code == 0, (told.output, told.exception)
    folder = all_of_it / "evaluation" / "abtest"
    assert told.output.strip() == str(folder / "index.html")
    key = json.loads((all_of_it / "evaluation" / "abtest-key.json").read_text())
    shown = {name: (each["task"], each["method"]) for name, each in key["images"].items()}
    assert sorted(shown.values()) == sorted(
        (t, m) for t in ("fid", "alignment") for m in ("ours", "prior") for _ in range(3)
    )
    made = {
        pair: {
            image.tobytes() for prompt in images_of(all_of_it, result(all_of_it, "-".join(pair))) for image in prompt
        }
        for pair in set(shown.values())
    }
    assert all(np.asarray(Image.open(folder / name)).tobytes() in made[pair] for name, pair in shown.items())

    mine = [name for name, (_, method) in shown.items() if method == "ours"]
    choices = [{"trial": key["images"][name]["trial"], "chosen": name} for name in mine]
    saved = {"format": 1, "test": key["test"], "session": "me", "choices": choices}
    (tmp_path / "choices.json").write_text(json.dumps(saved))
    told = gcfg("abtest", path, "--count", tmp_path / "choices.json")
    assert re.search(r"ours +100\.0%.* 3 of 3", told.output)
    assert gcfg("abtest", path).exit_code == 1  # the page is there


def test_an_ab_test_needs_two_methods(evaluation_file):
    path = evaluation_file(methods={"ours": OURS})
    told = gcfg("abtest", path)
    assert told.exit_code == 1
    assert "holds no results of two methods for one task" in told.output


def test_a_missing_library_is_named_with_its_extra(evaluation_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "comfyui_gcfg.evaluation.run", None)
    told = gcfg("fid", evaluation_file())
    assert told.exit_code == 1
    assert "install it with: pip install 'gcfg-guidance[evaluate]'" in told.output


def test_one_method_alone(evaluation_file, tmp_path):
    path = evaluation_file(methods={"ours": OURS, "prior": PRIOR})
    assert gcfg("fid", path, "--method", "prior").exit_code == 0
    assert [each.name for each in (tmp_path / "evaluation" / "results").iterdir()] == ["fid-prior.json"]
    told = gcfg("fid", path, "--method", "our")
    assert told.exit_code == 1
    assert "--method 'our' is no method of the config, expected one of 'ours', 'prior'." in told.output


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("fid", ["fid.images="], "fid.images is not set, expected a folder of images"),
        ("fid", ["fid.images=nowhere"], "is no folder, expected one of images"),
        ("fid", ["models.concept.unet=no.safetensors"], "models.concept.unet '"),
        ("fid", ["fid.extractor=inception"], "fid.extractor_weights is empty"),
        ("canny", ["canny.count=1000"], "holds 48 images, expected 1000"),
        ("canny", ["prior.controlnet="], "prior.controlnet is not set"),
        ("alignment", ["alignment.classifier=nothing:here"], "alignment.classifier is 'nothing:here'"),
        ("sweep", [], "sweep.recipe is not set"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(evaluation_file, task, settings, message):
    path = evaluation_file(methods={"ours": OURS})
    told = gcfg(task, path, *(word for each in settings for word in ("--set", each)))
    assert told.exit_code == 1
    assert message in told.output
    assert told.output.strip().count("\n") == 0


def test_the_batch_size_changes_only_rounding(evaluation_file, tmp_path):
    images = []
    for size in (4, 3):
        path = evaluation_file(methods={"ours": OURS}, sampling={"batch_size": size}, output={"folder": f"by-{size}"})
        assert gcfg("fid", path).exit_code == 0
        found = json.loads((tmp_path / f"by-{size}" / "results" / "fid-ours.json").read_text())
        (tmp_path / "evaluation").unlink(missing_ok=True)
        (tmp_path / "evaluation").symlink_to(tmp_path / f"by-{size}")
        images.append(images_of(tmp_path, found)[0].astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1
