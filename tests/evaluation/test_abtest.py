"""The A/B page: what it shows and hides, its JavaScript run in V8, and the win rates read back."""

import json
import re
from pathlib import Path

import comfyui_gcfg.evaluation.abtest as abtest
import pytest
import torch
from comfyui_gcfg.evaluation.abtest import Trial, key_of, summary, win_rates, write_page
from comfyui_gcfg.gcfg.errors import GuidanceError
from PIL import Image
from py_mini_racer import MiniRacer
from scipy.stats import binom

METHODS = ("ours", "dreambooth", "oft")


def picture(trial, method):
    return torch.full((3, 16, 16), 10 * trial + METHODS.index(method), dtype=torch.uint8)


def trials(count=5, task="fid"):
    return [
        Trial(task, f"prompt {number}", {method: picture(number, method) for method in METHODS})
        for number in range(count)
    ]


def file_of_trials(folder):
    text = (folder / "trials.js").read_text()
    return json.loads(re.fullmatch(r"const TEST = (.*);\n", text, re.DOTALL).group(1))


@pytest.fixture
def page(tmp_path):
    folder = tmp_path / "page"
    write_page([*trials(), Trial("alignment", "red three", trials(1)[0].images, picture(0, "oft"))], folder)
    return folder


@pytest.fixture
def study(page):
    """Run an expression on the study of the page, in V8."""
    engine = MiniRacer()
    engine.eval((page / "trials.js").read_text())
    engine.eval((page / "study.js").read_text())
    engine.eval("let left = 7; const random = () => (left = (left * 16807) % 2147483647) / 2147483647")
    engine.eval("let study = new Study(TEST, null, random)")
    return lambda expression: json.loads(engine.eval(f"JSON.stringify({expression} ?? null)"))


def save(path, study):
    path.write_text(json.dumps(study("study.file()")))
    return path


def key(page):
    return json.loads(key_of(page).read_text())["images"]


def test_each_trial_shows_the_images_of_all_methods(page):
    owners = key(page)
    for number, trial in enumerate(file_of_trials(page)["trials"]):
        assert {owners[name]["method"] for name in trial["images"]} == set(METHODS)
        for name in trial["images"]:
            shown = Image.open(page / name)
            expected = picture(number if number < 5 else 0, owners[name]["method"])
            assert (shown.size, shown.getpixel((0, 0))[0]) == ((16, 16), expected[0, 0, 0].item())
    last = file_of_trials(page)["trials"][-1]
    assert last["prompt"] == "red three"
    assert Image.open(page / last["condition"]).getpixel((0, 0))[0] == 2


def test_nothing_in_the_folder_names_a_method(page):
    text = "".join(path.name + path.read_bytes().decode("latin-1") for path in page.iterdir())
    assert [method for method in METHODS if method in text] == []


def test_the_names_and_their_order_tell_nothing(page):
    owners = key(page)
    places = [[owners[name]["method"] for name in trial["images"]] for trial in file_of_trials(page)["trials"]]
    assert len({tuple(each) for each in places}) > 1


def test_the_page_needs_no_server(page):
    """All it refers to is in the folder, and neither modules nor requests, which browsers refuse to files."""
    html = (page / "index.html").read_text()
    for name in re.findall(r'(?:src|href)="([^"]+)"', html):
        assert (page / name).is_file()
    code = html + "".join(path.read_text() for path in page.glob("*.js"))
    assert re.search(r"https?:|fetch\(|XMLHttpRequest|type=.module|\bimport\b", code) is None


def test_a_person_goes_through_all_trials_once(study):
    seen = []
    while now := study("study.current()"):
        seen.append(now["prompt"])
        study("study.choose(1, 'noon')")
    assert sorted(seen) == sorted([*(f"prompt {number}" for number in range(5)), "red three"])
    assert seen != sorted(seen)
    assert len(study("study.file()")["choices"]) == 6


def test_what_is_chosen_is_what_stood_there(study, page):
    now = study("study.current()")
    study("study.choose(2, 'noon')")
    (choice,) = study("study.file()")["choices"]
    trial = file_of_trials(page)["trials"][choice["trial"]]
    assert (choice["chosen"], choice["shown"], choice["at"]) == (now["images"][2], now["images"], "noon")
    assert sorted(choice["shown"]) == sorted(trial["images"])


def test_another_person_sees_another_order(study):
    orders = [study("new Study(TEST, null, random).state.shown") for _ in range(4)]
    assert len({json.dumps(order) for order in orders}) > 1


def test_a_reload_goes_on_where_one_was(study):
    study("study.choose(0, 'noon')")
    before = study("[study.current(), study.file()]")
    assert study("((again) => [again.current(), again.file()])(new Study(TEST, study.state, random))") == before


def test_one_can_go_back_and_choose_again(study):
    first = study("study.current()")["images"]
    study("study.choose(0, 'noon')")
    study("study.back()")
    assert study("study.current()")["chosen"] == first[0]
    study("study.choose(1, 'later')")
    assert [choice["chosen"] for choice in study("study.file()")["choices"]] == [first[1]]
    study("study.back()")
    study("study.back()")
    assert study("study.state.position") == 0


def test_a_number_without_an_image_chooses_nothing(study):
    study("study.choose(7, 'noon')")
    assert study("study.file()")["choices"] == []
    assert study("study.state.position") == 0


def test_win_rates_are_those_of_the_choices(study, page, tmp_path):
    """One who always takes ours, and one who takes OFT for the first three and saves in between."""
    owners, files = key(page), []
    for number, wanted in enumerate(("ours", "oft")):
        study("study = new Study(TEST, null, random)")
        for step in range(6 if wanted == "ours" else 3):
            images = study("study.current()")["images"]
            study(f"study.choose({[owners[name]['method'] for name in images].index(wanted)}, 'noon')")
            if step == 1:
                files.append(save(tmp_path / f"{number}-early.json", study))
        files.append(save(tmp_path / f"{number}.json", study))
    rates = win_rates(files, key_of(page))
    counted = {(task, row.method): (row.wins, row.trials) for task, rows in rates.items() for row in rows}
    by_task = {task: rows[0].trials for task, rows in rates.items()}
    assert sum(by_task.values()) == 9
    assert counted["fid", "ours"] == (5, by_task["fid"])
    assert counted["fid", "dreambooth"] == (0, by_task["fid"])
    assert sum(wins for (_, method), (wins, _) in counted.items() if method == "oft") == 3
    for rows in rates.values():
        assert sum(row.wins for row in rows) == rows[0].trials
    table = summary(rates)
    assert {"alignment: chosen as the best (95 % interval)", "fid: chosen as the best (95 % interval)"} <= set(
        table.splitlines()
    )
    assert re.search(rf"ours +\d+\.\d% \(.*\) +5 of {by_task['fid']}", table)


def test_the_interval_is_clopper_and_pearsons():
    """Its bounds are the rates at which so many wins, or so few, would come with a chance of 2.5 %."""
    low, high = abtest.Wins("ours", 7, 20).interval
    assert binom.sf(6, 20, low) == pytest.approx(0.025, rel=1e-6)
    assert binom.cdf(7, 20, high) == pytest.approx(0.025, rel=1e-6)


def test_files_of_another_page_are_told(study, page, tmp_path):
    saved = study("study.file()")
    (tmp_path / "other.json").write_text(json.dumps(saved | {"test": "another"}))
    with pytest.raises(GuidanceError, match=r"is of the page 'another', expected '[0-9a-f]{12}'"):
        win_rates([tmp_path / "other.json"], key_of(page))
    wrong = {"trial": 0, "chosen": "00099.png", "shown": [], "at": ""}
    (tmp_path / "wrong.json").write_text(json.dumps(saved | {"choices": [wrong]}))
    with pytest.raises(GuidanceError, match=r"chooses '00099\.png' in trial 0, which has no such image"):
        win_rates([tmp_path / "wrong.json"], key_of(page))
    (tmp_path / "words.json").write_text("[1]")
    for path in (tmp_path / "words.json", tmp_path / "gone.json"):
        with pytest.raises(GuidanceError, match=r"cannot be read .* expected a file that the page saved"):
            win_rates([path], key_of(page))


def test_no_choices_are_no_rates(page):
    assert summary(win_rates([], key_of(page))) == "No choices."


def test_a_folder_that_is_there_is_left_alone(page):
    before = {path.name for path in page.iterdir()}
    with pytest.raises(GuidanceError, match="exists already, expected a new folder"):
        write_page(trials(2), page)
    assert {path.name for path in page.iterdir()} == before


def test_the_same_trials_make_the_same_page(page, tmp_path):
    (again := tmp_path / "again").mkdir()
    write_page([*trials(), Trial("alignment", "red three", trials(1)[0].images, picture(0, "oft"))], again / "page")
    for path in [*page.iterdir(), key_of(page)]:
        assert (again / path.relative_to(Path(tmp_path))).read_bytes() == path.read_bytes()
