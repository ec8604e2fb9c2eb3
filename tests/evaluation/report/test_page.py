"""The page and its folder, from made-up results: nothing on it that is not in the JSON, and the JSON as it was."""

import json
import re
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from comfyui_gcfg.evaluation.report.folder import read_published, write_report
from comfyui_gcfg.evaluation.report.page import Experiment, page_text
from comfyui_gcfg.evaluation.report.pictures import plane_values, tradeoff_points
from comfyui_gcfg.evaluation.results import Results
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.testkit.results import conditions, every_result, rows, scan_of, section
from PIL import Image

EXPERIMENT = Experiment("A small world", "Digits in *real* handwriting.\n", {"prior": 600.0, "methods": 300.0})


@pytest.fixture(scope="module")
def written(output, tmp_path_factory):
    path = tmp_path_factory.mktemp("docs") / "measured.md"
    write_report(every_result(), EXPERIMENT, path, output, conditions)
    return path


@pytest.fixture
def page(written, tmp_path):
    """The test's own copy."""
    return shutil.copytree(written.parent, tmp_path / "docs") / written.name


def linked(page):
    return set(re.findall(r"\]\(((?!https)[^)]+)\)", page.read_text(encoding="utf-8")))


def test_the_page_is_remade_from_the_folder_beside_it(page):
    beside = page.with_suffix("")
    assert page_text(*read_published(beside), beside.name) == page.read_bytes().decode()


def test_the_page_differs_where_a_number_in_the_json_differs(page):
    beside = page.with_suffix("")
    for path in sorted((beside / "results").glob("*.json")):
        values, before = json.loads(path.read_text()), path.read_text()
        for name, number in values["numbers"].items():
            if name == "precision" or name == "recall":
                continue  # stored beside F1, not shown
            path.write_text(json.dumps({**values, "numbers": {**values["numbers"], name: number * 0.9}}))
            assert page_text(*read_published(beside), beside.name) != page.read_text(encoding="utf-8"), (
                path.name,
                name,
            )
        path.write_text(before)


def test_the_order_of_the_files_does_not_matter(stored):
    assert page_text(Results(stored[::-1]), EXPERIMENT, "x") == page_text(Results(stored), EXPERIMENT, "x")


def test_all_that_the_page_refers_to_is_beside_it(page):
    assert {link for link in linked(page) if not (page.parent / link).exists()} == set()
    expected = {
        "fid-methods.jpg",
        "alignment-methods.jpg",
        "canny-methods.jpg",
        "tradeoff.png",
        "plane.png",
        "plane.jpg",
    }
    assert {f"measured/{name}" for name in expected} <= linked(page)


def test_the_published_json_holds_all_but_this_machines_folders(page, stored):
    published, experiment = read_published(page.with_suffix(""))
    assert experiment == EXPERIMENT
    assert len(published.everything) == len(stored)
    for each in map(asdict, published.everything):
        assert each["files"]["fid.images"]["path"] == "scans"
        original = next(other for other in stored if (other["task"], other["method"]) == (each["task"], each["method"]))
        assert {**each, "files": 0} == {**original, "files": 0}
    assert "/home/" not in page.read_text(encoding="utf-8")


def test_the_table_of_unconditional_images_has_the_stored_numbers(page):
    head, _, *body = rows(section(page.read_text(encoding="utf-8"), "Unconditional generation"))
    assert head == ["method", "trained parameters", "FID ↓"]
    assert body == [
        ["Prior alone", "0", "90.50"],
        ["Textual Inversion", "768", "70.25"],
        ["DreamBooth", "4.6M", "20.00"],
        ["OFT", "44K", "40.00"],
        ["Ours", "4.3M", "**12.35**"],
    ]


def test_the_table_of_guided_images_has_the_stored_numbers(page):
    head, _, *body = rows(section(page.read_text(encoding="utf-8"), "Text-guided and spatially guided generation"))
    assert head == ["method", "alignment ↑", "FID of these ↓", "edge F1 ↑", "edge difference ↓"]  # no CLIP score
    table = {row[0]: row[1:] for row in body}
    assert table["Ours"] == ["0.90 (0.74 .. 0.97)", "**14.00**", "**0.700**", "**0.055**"]
    assert table["Textual Inversion"] == ["**0.93 (0.79 .. 0.98)**", "72.00", "-", "-"]
    assert table["Prior alone"] == ["0.95 (0.79 .. 0.98)", "95.00", "0.646", "0.050"]  # best, but no method


def test_each_group_of_methods_has_a_table_of_its_own(page):
    drift = rows(section(page.read_text(encoding="utf-8"), "Drift"))
    assert [row[0] for row in drift[2:]] == ["Ours around the concept model", "DreamBooth around the prior"]
    assert drift[0][1:] == ["FID ↓", "alignment ↑", "FID, text-guided ↓"]
    assert drift[2] == ["Ours around the concept model", "-", "0.70 (0.52 .. 0.83)", "30.00"]
    apart = rows(section(page.read_text(encoding="utf-8"), "Decoupling"))
    assert apart[2:] == [["joint prompt", "4.00", "3.00"], ["two prompts", "5.50", "4.50"]]


def test_the_page_does_not_know_the_paper(page):
    assert re.search(r"paper|Fig\. |Table \d|Cao", page.read_text(encoding="utf-8")) is None


def test_the_weights_are_those_used_and_the_grids_edges_are_told(page):
    weights = rows(section(page.read_text(encoding="utf-8"), "Weights"))
    assert ["Ours", "fid", "concept 2", "3", "at the grid's edge: concept"] in weights
    assert ["Ours", "alignment", "concept 1.5, text 5", "3", "at the grid's edge: text"] in weights
    assert ["DreamBooth", "fid", "dreambooth 1.5 around dreambooth", "given", ""] in weights
    assert "fid: lowest FID; alignment: the rule of alignment; canny: highest F1 of the edges" in page.read_text(
        "utf-8"
    )


def test_stages_seeds_and_hashes_are_told(page):
    text = section(page.read_text(encoding="utf-8"), "How it was made")
    assert rows(text)[:5] == [
        ["stage", "minutes"],
        ["---", "---:"],
        ["prior", "10.0"],
        ["methods", "5.0"],
        ["**all**", "**15.0**"],
    ]
    assert "Seed 7; 25 steps" in text
    assert "python 3.11.4, torch 2.15.0." in text
    assert ["`fid.images`", "`scans`", "`abababababababab`"] in rows(text)
    assert "more than one config" not in text


def test_results_of_two_configs_are_told(stored):
    stored[0]["config"] = {**stored[0]["config"], "sampling": {**stored[0]["config"]["sampling"], "steps": 26}}
    assert "These results come from more than one config" in page_text(Results(stored), EXPERIMENT, "x")


def test_a_sheet_shows_the_methods_images_from_the_same_seeds(page):
    """Columns of the text-guided sheet are the prompts; each cell is the scan that stands for its image."""
    sheet = Image.open(page.with_suffix("") / "alignment-methods.jpg")
    methods = ["prior", "textual_inversion", "dreambooth", "oft", "ours"]
    assert sheet.size == (10 * 75 + 3, 16 + 5 * 91)
    pixels = np.asarray(sheet.convert("L"), dtype=float)
    places = sorted((place % 3, place // 3) for place in range(10))
    for row, method in enumerate(methods):
        for column, (prompt, number) in enumerate(places):
            top, left = 32 + row * 91, 3 + column * 75
            cell = pixels[top : top + 72, left : left + 72].reshape(8, 9, 8, 9).mean((1, 3))
            expected = scan_of("alignment", method, prompt, number)[0, ::8, ::8].numpy()
            assert np.corrcoef(cell.ravel(), expected.ravel())[0, 1] > 0.99


def test_edges_are_shown_above_an_image_of_each_condition(page):
    pixels = np.asarray(Image.open(page.with_suffix("") / "canny-methods.jpg").convert("L"), dtype=float)
    for column, edges in enumerate(conditions()):
        left = 3 + column * 75
        shown = pixels[16:88, left : left + 72].reshape(8, 9, 8, 9).mean((1, 3))
        assert np.corrcoef(shown.ravel(), edges[::8, ::8].float().numpy().ravel())[0, 1] > 0.99
        image = pixels[107:179, left : left + 72].reshape(8, 9, 8, 9).mean((1, 3))
        expected = scan_of("canny", "prior", 0, 4 * column)[0, ::8, ::8].numpy()
        assert np.corrcoef(image.ravel(), expected.ravel())[0, 1] > 0.99


def test_the_page_begins_with_what_the_experiment_says(page):
    assert page.read_text(encoding="utf-8").startswith("# A small world\n\nDigits in *real* handwriting.\n\n↑: more")


def test_pictures_stay_where_the_images_are_gone(page, stored, tmp_path):
    before = (page.with_suffix("") / "fid-methods.jpg").read_bytes()
    write_report(stored, EXPERIMENT, page, tmp_path / "gone", conditions)
    assert (page.with_suffix("") / "fid-methods.jpg").read_bytes() == before
    with pytest.raises(GuidanceError, match="has no image 0 of prompt 0"):
        write_report(stored, EXPERIMENT, tmp_path / "other.md", tmp_path / "gone", conditions)


def test_plots_are_the_same_each_time(page, stored, output):
    before = {path.name: path.read_bytes() for path in page.with_suffix("").glob("*.png")}
    assert set(before) == {"tradeoff.png", "plane.png"}
    write_report(stored, EXPERIMENT, page, output, conditions)
    assert {name: (page.with_suffix("") / name).read_bytes() for name in before} == before


def test_the_plots_show_the_stored_numbers(stored):
    results = Results(stored)
    assert ("Ours", 12.345, 0.90, 4_300_000, False) in tradeoff_points(results)
    assert len(tradeoff_points(results)) == 5
    (sweep,) = results.sweeps
    assert plane_values(sweep, "fid").tolist() == [[60, 65], [40, 45], [20, 25]]


def test_a_page_needs_neither_ablations_nor_a_sweep(stored, output, tmp_path):
    few = [each for each in stored if each["task"] == "fid" and each["group"] == "methods"]
    write_report(few, EXPERIMENT, tmp_path / "few.md", output, conditions)
    text = (tmp_path / "few.md").read_text(encoding="utf-8")
    assert "## Unconditional generation" in text
    assert re.search("Text-guided|Fidelity against|Two weights|Decoupling", text) is None


def test_the_results_of_a_method_that_is_gone_go_too(page, stored, output):
    fewer = [each for each in stored if each["method"] != "oft"]
    write_report(fewer, EXPERIMENT, page, output, conditions)
    assert len(read_published(page.with_suffix(""))[0].everything) == len(fewer)
    assert "| OFT |" not in page.read_text(encoding="utf-8")


def test_no_results_are_told(tmp_path):
    with pytest.raises(GuidanceError, match="holds no results, expected some; run gcfg evaluate tables first"):
        write_report([], EXPERIMENT, tmp_path / "page.md", tmp_path, conditions)
