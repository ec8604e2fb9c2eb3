"""The page with the folder beside it, which holds all that it was made from: written, and read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ...gcfg.errors import GuidanceError
from ...training.files import whole_file
from ..config import Config
from ..results import RESULTS, SWEEP, Results, read_results
from ..tasks import Canny
from .page import Experiment, PageText, has_tradeoff, page_text, sheets
from .pictures import copy_picture, draw_plane, draw_sheet, draw_tradeoff

_EXPERIMENT = "experiment.json"

DrawTradeoff = Callable[[Results, Path], None]


def report(
    config: Config,
    page: Path | None = None,
    stages: Path | None = None,
    text: PageText = page_text,
    tradeoff: DrawTradeoff = draw_tradeoff,
) -> Path:
    """Write the page of an evaluation from its stored results, and return where it is.

    Args:
        config: the evaluation's.
        page: a Markdown file; report.md in the output folder if not given.
        stages: a file for `read_stages`.
        text: makes the page.
        tradeoff: draws its plot of fidelity against control.

    Raises: GuidanceError: if there are no results, or their images are gone.
    """
    folder = config.output_folder
    page = page or folder / "report.md"
    experiment = Experiment(config.report.title, config.report.about, read_stages(stages) if stages else {})
    stored = read_results(folder / RESULTS)
    write_report(stored, experiment, page, folder, lambda: Canny(config).edges, text, tradeoff)
    return page


def write_report(
    stored: Sequence[Mapping[str, Any]],
    experiment: Experiment,
    page: Path,
    folder: Path,
    conditions: Callable[[], Tensor],
    text: PageText = page_text,
    tradeoff: DrawTradeoff = draw_tradeoff,
) -> None:
    """Write the page, and beside it a folder of its name with the results, plots and pictures it was made from.

    Args:
        stored: the results, as their files hold them.
        experiment: what the page says beside them.
        page: a Markdown file.
        folder: of the evaluation's output, where the images are.
        conditions: gives the edge maps that images were guided by, (N, H, W) bool; called if there are such images.
        text: makes the page.
        tradeoff: draws its plot of fidelity against control.

    Raises: GuidanceError: if there are no results, or their images are gone.
    """
    if not stored:
        raise GuidanceError(f"{str(folder)!r} holds no results, expected some; run gcfg evaluate tables first.")
    beside = page.with_suffix("")
    published = [_published(each) for each in stored]
    names = [SWEEP if each["task"] == SWEEP else f"{each['task']}-{each['method']}" for each in published]
    files = {beside / RESULTS / f"{name}.json": values for name, values in zip(names, published, strict=True)}
    for path, values in files.items():
        _write_json(path, values)
    for left in set((beside / RESULTS).glob("*.json")) - set(files):
        left.unlink()  # of methods that are no more
    _write_json(beside / _EXPERIMENT, asdict(experiment))
    results = Results(published)
    for name, rows in sheets(results).items():
        draw_sheet(rows, folder, beside / name, conditions)
    if has_tradeoff(results):
        tradeoff(results, beside / "tradeoff.png")
    for sweep in results.sweeps:
        draw_plane(sweep, beside / "plane.png")
        copy_picture(folder / sweep.grid, beside / "plane.jpg")
    with whole_file(page) as path:
        path.write_text(text(results, experiment, beside.name), encoding="utf-8", newline="\n")


def read_published(folder: Path) -> tuple[Results, Experiment]:
    """Return what stands beside a page, for `page_text`."""
    said = json.loads((folder / _EXPERIMENT).read_text(encoding="utf-8"))
    return Results(read_results(folder / RESULTS)), Experiment(**said)


def read_stages(path: Path) -> dict[str, float]:
    """Read a JSON file {stage: seconds}.

    Raises: GuidanceError: if it is none.
    """
    expected = 'expected JSON such as {"prior": 612.5}, a stage and its seconds'
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))
        return {str(stage): float(seconds) for stage, seconds in stages.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise GuidanceError(f"--stages {str(path)!r} cannot be read ({error}), {expected}.") from error


def _published(values: Any) -> Any:
    """The same without the folders of this machine: of an absolute path only the name is left."""
    if isinstance(values, Mapping):
        return {key: _published(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_published(value) for value in values]
    if isinstance(values, str) and Path(values).is_absolute():
        return Path(values).name
    return values


def _write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8", newline="\n")
