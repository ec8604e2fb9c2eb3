"""The paper's page: its columns, verdicts and limits beside the stored numbers, and docs/ as it is made."""

import json
import re
import shutil
from pathlib import Path

import pytest
from comfyui_gcfg.evaluation.report.folder import read_published, write_report
from comfyui_gcfg.evaluation.report.page import Experiment
from comfyui_gcfg.evaluation.report.pictures import tradeoff_points
from comfyui_gcfg.evaluation.results import Results
from comfyui_gcfg.reproduction.paper.__main__ import app
from comfyui_gcfg.reproduction.paper.page import draw_tradeoff, page_text
from comfyui_gcfg.testkit.results import conditions, every_result, rows, section
from PIL import Image
from typer.testing import CliRunner

DOCS = Path(__file__).resolve().parents[3] / "docs"
EXPERIMENT = Experiment("A small world", "Digits in *real* handwriting.\n", {"prior": 600.0, "methods": 300.0})


@pytest.fixture(scope="module")
def written(output, tmp_path_factory):
    path = tmp_path_factory.mktemp("docs") / "reproduction.md"
    write_report(every_result(), EXPERIMENT, path, output, conditions, page_text, draw_tradeoff)
    return path


@pytest.fixture
def page(written, tmp_path):
    """The test's own copy."""
    return shutil.copytree(written.parent, tmp_path / "docs") / written.name


def test_every_page_of_the_docs_is_that_of_its_json():
    """Make it anew with `make reproduce ARGS="--page docs/NAME.md"` after changing either."""
    folders = [path.parent for path in sorted(DOCS.glob("*/experiment.json"))]
    pages = [
        path for path in DOCS.glob("*.md") if "`comfyui_gcfg.reproduction` wrote this page" in path.read_text("utf-8")
    ]
    assert [folder.with_suffix(".md") for folder in folders] == sorted(pages)
    for folder, path in zip(folders, sorted(pages), strict=True):
        assert path.read_bytes().decode() == page_text(*read_published(folder), folder.name)
        assert linked(path) - {each.relative_to(DOCS).as_posix() for each in folder.rglob("*")} == set()


def linked(page):
    return set(re.findall(r"\]\(((?!https)[^)]+)\)", page.read_text(encoding="utf-8")))


def test_all_that_the_page_refers_to_is_beside_it(page):
    assert {link for link in linked(page) if not (page.parent / link).exists()} == set()


def test_the_page_differs_where_a_number_in_the_json_differs(page):
    beside = page.with_suffix("")
    assert page_text(*read_published(beside), beside.name) == page.read_bytes().decode()
    for path in sorted((beside / "results").glob("*.json")):
        values, before = json.loads(path.read_text()), path.read_text()
        for name, number in values["numbers"].items():
            if name in ("precision", "recall"):
                continue  # stored beside F1, not shown
            path.write_text(json.dumps({**values, "numbers": {**values["numbers"], name: number * 0.9}}))
            changed = page_text(*read_published(beside), beside.name)
            assert changed != page.read_text(encoding="utf-8"), (path.name, name)
        path.write_text(before)


def test_table_1_has_the_stored_numbers_beside_the_papers(page):
    head, _, *body = rows(section(page.read_text(encoding="utf-8"), "Unconditional generation"))
    assert [row[0] for row in body][:5] == ["Prior alone", "Textual Inversion", "DreamBooth", "OFT", "Ours"]
    table = {row[0]: dict(zip(head, row, strict=True)) for row in body}
    assert list(table["Ours"].values()) == ["Ours", "4.3M", "**12.35**", "859M", "6.57", "18.82"]
    assert list(table["OFT"].values()) == ["OFT", "44K", "40.00", "23M", "27.50", "38.74"]
    assert list(table["Textual Inversion"].values())[1:] == ["768", "70.25", "<1K", "70.62", "44.75"]
    assert table["Prior alone"]["*paper:* FID, face"] == "-"
    assert body[-1] == ["StyleGAN3-T (a dedicated generator)", "-", "-", "-", "3.16", "4.04"]


def test_table_2_has_the_stored_numbers_beside_the_papers(page):
    head, _, *body = rows(section(page.read_text(encoding="utf-8"), "Text-guided and spatially guided generation"))
    assert "CLIP score ↑" not in head  # it was not measured
    table = {row[0]: row[1:] for row in body}
    assert table["Ours"] == ["0.90 (0.74 .. 0.97)", "**14.00**", "**0.700**", "**0.055**", "0.89", "0.20"]
    assert table["Textual Inversion"] == ["**0.93 (0.79 .. 0.98)**", "72.00", "-", "-", "0.97", "0.22"]
    assert table["Prior alone"] == ["0.95 (0.79 .. 0.98)", "95.00", "0.646", "0.050", "-", "-"]  # best, but no method


def test_the_ablations_stand_beside_ours(page):
    text = page.read_text(encoding="utf-8")
    drift = rows(section(text, "Unconditional guidance drift"))
    own = ["Ours around the concept model", "DreamBooth around the prior"]
    assert [row[0] for row in drift[2:]] == ["Ours", "DreamBooth", *own]
    assert drift[0][1:] == ["FID ↓", "alignment ↑", "FID, text-guided ↓"]
    assert drift[4] == ["Ours around the concept model", "-", "0.70 (0.52 .. 0.83)", "30.00"]
    apart = rows(section(text, "Condition decoupling"))
    assert apart[2:] == [["joint prompt", "4.00", "3.00"], ["two prompts", "5.50", "4.50"]]


def test_what_a_small_run_cannot_tell_is_not_said_of_a_large_one(stored):
    small = section(page_text(Results(stored), EXPERIMENT, "x"), "What this cannot tell")
    assert "64 pixels wide, the paper's 512" in small
    assert "FID is over 20 images, the paper's over 50,000" in small
    assert "`own.package:features`, not Inception's" in small
    assert "trains 4.6M parameters, the paper's 859M" in small
    for each in stored:
        each["config"] = {**each["config"], "sampling": {**each["config"]["sampling"], "size": 512}}
        each["config"]["fid"] = {**each["config"]["fid"], "extractor": "inception"}
        each["count"], each["parameters"] = 50_000, 859_000_000
    large = section(page_text(Results(stored), EXPERIMENT, "x"), "What this cannot tell")
    assert re.search("pixels wide|50,000|Inception|859M", large) is None
    assert "No people were asked" in large


def test_the_page_begins_with_what_the_experiment_says(page):
    assert page.read_text(encoding="utf-8").startswith("# A small world\n\nDigits in *real* handwriting.\n\nThe tables")


def test_the_plot_has_the_papers_methods_beside_the_stored_ones(page, stored, output, tmp_path):
    points = tradeoff_points(Results(stored), marked="ours")
    assert ("Ours", 12.345, 0.90, 4_300_000, True) in points
    assert [point[-1] for point in points].count(True) == 1
    plot = page.with_suffix("") / "tradeoff.png"
    write_report(stored, EXPERIMENT, tmp_path / "general.md", output, conditions)
    assert Image.open(plot).width == 2 * Image.open(tmp_path / "general" / "tradeoff.png").width
    before = plot.read_bytes()
    draw_tradeoff(Results(stored), plot)
    assert plot.read_bytes() == before


def test_a_page_needs_neither_ablations_nor_a_sweep(stored, output, tmp_path):
    few = [each for each in stored if each["task"] == "fid" and each["group"] == "methods"]
    write_report(few, EXPERIMENT, tmp_path / "few.md", output, conditions, page_text, draw_tradeoff)
    text = (tmp_path / "few.md").read_text(encoding="utf-8")
    assert "## Unconditional generation" in text
    assert re.search("Table 2\\)\n|Fig. 9|Fig. 8|Condition decoupling \\(", text) is None


def test_the_command_writes_the_page_of_any_evaluation(output, stored, tmp_path):
    """Of stored results beside a config; their images are those of the folder."""
    folder = shutil.copytree(output, tmp_path / "evaluation")
    (folder / "results").mkdir()
    for each in stored:
        if each["task"] != "canny":  # whose edges would be read from the config's images
            (folder / "results" / f"{each['task']}-{each['method']}.json").write_text(json.dumps(each))
    (tmp_path / "evaluation.toml").write_text('report.title = "Mine"\n')
    (tmp_path / "stages.json").write_text('{"prior": 60}')
    arguments = [str(tmp_path / "evaluation.toml"), "--stages", str(tmp_path / "stages.json")]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    page = folder / "report.md"
    assert told.output == f"{page}\n"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Mine\n\nThe tables and figures of [Cao et al. 2023]")
    assert text == page_text(*read_published(folder / "report"), "report")
    assert CliRunner().invoke(app, [str(tmp_path / "none.toml")]).output.startswith("Error: ")
