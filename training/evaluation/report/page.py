"""The page: a pure function of the stored results, and the files it refers to, written beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ....gcfg.errors import GuidanceError
from ...files import whole_file
from ..results import read_results
from . import tables
from .claims import claims, drift_pairs
from .limits import limits
from .paper import OURS
from .pictures import copy_picture, draw_sheet
from .plots import draw_plane, draw_tradeoff, tradeoff_points
from .stored import METHODS, SWEEP, Result, Results, Sweep

RESULTS, EXPERIMENT = "results", "experiment.json"

_TASKS = {
    "fid": "Unconditional images",
    "alignment": "Text-guided images",
    "canny": "Images guided by edges",
    "diversity": "Images of one prompt",
}
# Heading and explanation of the ablations that the paper has; any other group is told by its name.
_GROUPS = {
    "drift": (
        "Unconditional guidance drift (Fig. 8(b), Fig. 10)",
        "The same guidances around the frozen prior, and around the fine-tuned model's own unconditional prediction.",
    ),
    "null_text": (
        "The constants of a null-text model (Eq. 5)",
        "What stands in for cross-attention: the mean over the empty prompt's tokens, the mean of real attention, or "
        "nothing.",
    ),
    "decoupling": (
        "Condition decoupling (Fig. 5)",
        "One joint prompt, and one guidance for each of its parts. Diversity is the mean feature distance between two "
        "images of a prompt; the Vendi score counts how many really different ones there are.",
    ),
    "negative": (
        "Negative weights (Fig. 11)",
        "A second guidance whose weight runs from negative to positive.",
    ),
}


@dataclass(frozen=True)
class Experiment:
    """What the page says beside the results.

    Attributes:
        title: its heading.
        about: paragraphs below it, in Markdown.
        stages: seconds of each stage of the whole experiment; may be empty.
    """

    title: str
    about: str
    stages: Mapping[str, float]


def write_report(
    stored: Sequence[Mapping[str, Any]],
    experiment: Experiment,
    page: Path,
    folder: Path,
    conditions: Callable[[], Tensor],
) -> None:
    """Write the page, and beside it a folder of its name with the results, plots and pictures it was made from.

    Args:
        stored: the results, as their files hold them.
        experiment: what the page says beside them.
        page: a Markdown file.
        folder: of the evaluation's output, where the images are.
        conditions: gives the edge maps that images were guided by, (N, H, W) bool; called if there are such images.

    Raises: GuidanceError: if there are no results, or their images are gone.
    """
    if not stored:
        raise GuidanceError(f"{str(folder)!r} holds no results, expected some; run gcfg evaluate tables first.")
    beside = page.with_suffix("")
    published = [_published(each) for each in stored]
    files = {beside / RESULTS / f"{_name(values)}.json": values for values in published}
    for path, values in files.items():
        _write_json(path, values)
    for left in set((beside / RESULTS).glob("*.json")) - set(files):
        left.unlink()  # of methods that are no more
    _write_json(beside / EXPERIMENT, asdict(experiment))
    results = Results(published)
    for name, rows in _sheets(results).items():
        draw_sheet(rows, folder, beside / name, conditions if rows[0].task == "canny" else None)
    if _has_tradeoff(results):
        draw_tradeoff(results, beside / "tradeoff.png")
    for sweep in results.sweeps:
        draw_plane(sweep, beside / "plane.png")
        copy_picture(folder / sweep.grid, beside / "plane.jpg")
    with whole_file(page) as path:
        path.write_text(page_text(published, experiment, beside.name), encoding="utf-8", newline="\n")


def read_published(folder: Path) -> tuple[list[dict[str, Any]], Experiment]:
    """Return what stands beside a page, for `page_text`."""
    said = json.loads((folder / EXPERIMENT).read_text(encoding="utf-8"))
    return read_results(folder / RESULTS), Experiment(**said)


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


def page_text(stored: Sequence[Mapping[str, Any]], experiment: Experiment, folder: str) -> str:
    """Return the page in Markdown.

    Args:
        stored: the results, as their files hold them.
        experiment: what the page says beside them.
        folder: name of the folder beside the page.
    """
    results = Results(stored)
    sections = [
        _introduction(experiment, folder),
        _unconditional(results, folder),
        _guided(results, folder),
        _tradeoff(results, folder),
        _verdicts(results),
        *(_ablation(results, group, folder) for group in results.groups),
        *(_plane(sweep, folder) for sweep in results.sweeps),
        _weights(results),
        _limits(results),
        _provenance(results, experiment.stages, folder),
    ]
    return "\n\n".join(block for section in sections for block in section) + "\n"


def _introduction(experiment: Experiment, folder: str) -> list[str]:
    return [
        f"# {experiment.title}",
        *filter(None, [experiment.about.strip()]),
        "The tables and figures of [Cao et al. 2023](https://arxiv.org/abs/2312.08195), repeated with `gcfg train` and "
        "`gcfg evaluate`. The numbers under *paper* are the paper's own, from Stable Diffusion 1.5 on faces (FFHQ) and "
        "animal faces (AFHQv2). ↑: more is better, ↓: less; the best is **bold**, the prior aside.",
        f"`gcfg evaluate report` wrote this page from the files in [`{folder}/{RESULTS}`]({folder}/{RESULTS}), and "
        "every verdict on it follows from a stated rule. Nothing was edited by hand.",
    ]


def _unconditional(results: Results, folder: str) -> list[str]:
    found = results.of_task("fid", METHODS)
    if not found:
        return []
    settings = found[0].config["fid"]
    return [
        "## Unconditional generation (Table 1)",
        tables.table1(results),
        f"FID between {found[0].count:,} images and the real ones; features: `{settings['extractor']}`, resize: "
        f"`{settings['resize']}`.",
        *_sheet(results, "fid", METHODS, folder),
    ]


def _guided(results: Results, folder: str) -> list[str]:
    text, edges = results.of_task("alignment", METHODS), results.of_task("canny", METHODS)
    if not text and not edges:
        return []
    blocks = ["## Text-guided and spatially guided generation (Table 2)", tables.table2(results)]
    if text:
        classifier = text[0].config["alignment"]["classifier"]
        blocks.append(
            f"Alignment: share of {text[0].count:,} images in which `{classifier}` finds what the prompt asked for, "
            "with its 95 % interval (Wilson)."
        )
    if edges:
        settings = edges[0].config["canny"]
        blocks.append(
            f"Edges: OpenCV's Canny, thresholds {settings['low']} and {settings['high']}, {edges[0].count:,} images. "
            "Difference: share of pixels in which condition and result differ, the "
            "paper's discrepancy (its table marks the column ↑). F1: with a tolerance of one pixel."
        )
    sheets = [*_sheet(results, "alignment", METHODS, folder), *_sheet(results, "canny", METHODS, folder)]
    return [*blocks, *sheets]


def _tradeoff(results: Results, folder: str) -> list[str]:
    if not _has_tradeoff(results):
        return []
    return [
        "## Fidelity against control (Fig. 9)",
        f"![Alignment over fidelity, for each method here and in the paper]({folder}/tradeoff.png)",
        "Circles grow with the logarithm of the trained parameters.",
    ]


def _verdicts(results: Results) -> list[str]:
    return ["## What agrees with the paper, and what does not", tables.claims_table(claims(results))]


def _ablation(results: Results, group: str, folder: str) -> list[str]:
    heading, explanation = _GROUPS.get(group, (group.replace("_", " ").capitalize(), ""))
    reference = [OURS] if OURS in results.of_group(METHODS) else []
    if group == "drift":
        reference += [each.method for pair in drift_pairs(results) for each in pair if each.group == METHODS]
    sheets = [block for task in _TASKS for block in _sheet(results, task, group, folder)]
    return [f"## {heading}", *filter(None, [explanation]), tables.ablation(results, group, reference), *sheets]


def _plane(sweep: Sweep, folder: str) -> list[str]:
    down, across = (axis["label"] for axis in sweep.axes)
    return [
        "## Two weights (Fig. 8(a))",
        f"{sweep.count} images for each pair of weights, prompt “{sweep.prompt}”.",
        f"![FID and alignment over the weights of {down} and {across}]({folder}/plane.png)",
        f"![One image for each pair of weights, all from one seed]({folder}/plane.jpg)",
    ]


def _weights(results: Results) -> list[str]:
    rules = {each.task: each.rule for each in results if each.search}
    chosen = "; ".join(f"{task}: {rules[task]}" for task in _TASKS if task in rules)
    return [
        "## Weights",
        f"Chosen by a grid search with fewer images, then measured anew ({chosen})." if chosen else "All were given.",
        tables.weights_table(results),
    ]


def _limits(results: Results) -> list[str]:
    return ["## What this cannot tell", "\n".join(f"- {sentence}" for sentence in limits(results))]


def _provenance(results: Results, stages: Mapping[str, float], folder: str) -> list[str]:
    every = results.everything
    seeds = sorted({each.seed for each in every})
    versions = sorted({(name, version) for each in every for name, version in each.versions.items()})
    blocks = ["## How it was made"]
    if stages:
        blocks.append(tables.stages_table(stages))
    sampling = every[0].config["sampling"]
    blocks += [
        f"Seed {', '.join(map(str, seeds))}; {sampling['steps']} steps of DPM-Solver++ (2M), {sampling['size']} "
        f"pixels, {sampling['precision']}. Making and measuring the images of this page took "
        f"{sum(each.seconds for each in every) / 60:.0f} minutes of computing.",
        ", ".join(f"{name} {version}" for name, version in versions) + ".",
        tables.files_table(results),
    ]
    if len({json.dumps(each.config, sort_keys=True) for each in every}) > 1:
        blocks.append(f"These results come from more than one config; each file in `{folder}/{RESULTS}` holds its own.")
    return blocks


def _sheets(results: Results) -> dict[str, list[Result]]:
    """The sheets of images by file name: each task of each group."""
    found = {
        f"{task}-{group}.jpg": results.of_task(task, group) for group in (METHODS, *results.groups) for task in _TASKS
    }
    return {name: rows for name, rows in found.items() if rows}


def _sheet(results: Results, task: str, group: str, folder: str) -> list[str]:
    name = f"{task}-{group}.jpg"
    return (
        [f"![{_TASKS[task]}, a row for each method, all from the same seeds]({folder}/{name})"]
        if name in _sheets(results)
        else []
    )


def _has_tradeoff(results: Results) -> bool:
    return len(tradeoff_points(results)) > 1


def _published(values: Any) -> Any:
    """The same without the folders of this machine: of an absolute path only the name is left."""
    if isinstance(values, Mapping):
        return {key: _published(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_published(value) for value in values]
    if isinstance(values, str) and Path(values).is_absolute():
        return Path(values).name
    return values


def _name(values: Mapping[str, Any]) -> str:
    return str(values["task"]) if values["task"] == SWEEP else f"{values['task']}-{values['method']}"


def _write_json(path: Path, values: Any) -> None:
    with whole_file(path) as beside:
        beside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8", newline="\n")
