"""The page: a pure function of the results, section by section; each section is a list of Markdown blocks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..config import METHODS
from ..results import RESULTS, Result, Results, Sweep
from . import tables, words
from .pictures import tradeoff_points

LEGEND = "↑: more is better, ↓: less; the best is **bold**, the prior aside."

_TASKS = {
    "fid": "Unconditional images",
    "alignment": "Text-guided images",
    "canny": "Images guided by edges",
    "diversity": "Images of one prompt",
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


# (the results, what the page says beside them, name of the folder beside it) -> Markdown
PageText = Callable[[Results, Experiment, str], str]


def page_text(results: Results, experiment: Experiment, folder: str) -> str:
    """Return the page in Markdown.

    Args:
        results: of the evaluation.
        experiment: what the page says beside them.
        folder: name of the folder beside the page.
    """
    return joined(
        introduction(experiment),
        [LEGEND, f"`gcfg evaluate report` wrote this page from the files in {results_link(folder)}."],
        unconditional(results, folder),
        guided(results, folder),
        tradeoff(results, folder),
        *(ablation(results, group, folder) for group in results.groups),
        *(plane(sweep, folder) for sweep in results.sweeps),
        weights(results),
        provenance(results, experiment.stages, folder),
    )


def joined(*sections: Sequence[str]) -> str:
    """Return the page of these sections."""
    return "\n\n".join(block for section in sections for block in section) + "\n"


def results_link(folder: str) -> str:
    """Return the link to the results' files."""
    return f"[`{folder}/{RESULTS}`]({folder}/{RESULTS})"


def introduction(experiment: Experiment) -> list[str]:
    """Return the title, and what the experiment says of itself."""
    return [f"# {experiment.title}", *filter(None, [experiment.about.strip()])]


def unconditional(
    results: Results,
    folder: str,
    heading: str = "Unconditional generation",
    beside: tables.Beside = tables.NOTHING,
    below: Sequence[Sequence[str]] = (),
) -> list[str]:
    """Return FID of unconditional images, with more columns and rows if they are given."""
    found = results.of_task("fid", METHODS)
    if not found:
        return []
    settings = found[0].config["fid"]
    return [
        f"## {heading}",
        tables.unconditional(results, beside, below),
        f"FID between {found[0].count:,} images and the real ones; features: `{settings['extractor']}`, resize: "
        f"`{settings['resize']}`." + _held_out(found[0]),
        *_sheet(results, "fid", METHODS, folder),
    ]


def _held_out(result: Result) -> str:
    """In words, what no method can be expected to fall below."""
    fid = result.numbers.get("held_out_fid")
    if fid is None:
        return ""
    return f" {result.numbers['held_out_count']:,.0f} real images that no model learned from have {words.number(fid)}."


def guided(
    results: Results,
    folder: str,
    heading: str = "Text-guided and spatially guided generation",
    beside: tables.Beside = tables.NOTHING,
    difference: str = "",
) -> list[str]:
    """Return control by text and by edges, with more columns if they are given.

    Args:
        results: of the evaluation.
        folder: name of the folder beside the page.
        heading: of the section.
        beside: more columns.
        difference: what is added to the sentence on the edges' difference.
    """
    text, edges = results.of_task("alignment", METHODS), results.of_task("canny", METHODS)
    if not text and not edges:
        return []
    blocks = [f"## {heading}", tables.guided(results, beside)]
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
            f"Difference: share of pixels in which condition and result differ{difference}. F1: with a tolerance of "
            "one pixel."
        )
    sheets = [*_sheet(results, "alignment", METHODS, folder), *_sheet(results, "canny", METHODS, folder)]
    return [*blocks, *sheets]


def tradeoff(
    results: Results, folder: str, heading: str = "Fidelity against control", shown: str = "each method"
) -> list[str]:
    """Return the plot of FID and alignment."""
    if not has_tradeoff(results):
        return []
    return [
        f"## {heading}",
        f"![Alignment over fidelity, for {shown}]({folder}/tradeoff.png)",
        "Circles grow with the logarithm of the trained parameters.",
    ]


def ablation(
    results: Results,
    group: str,
    folder: str,
    heading: str = "",
    explanation: str = "",
    reference: Sequence[str] = (),
) -> list[str]:
    """Return a group of methods beside the tables' ones.

    Args:
        results: of the evaluation.
        group: as the config names it.
        folder: name of the folder beside the page.
        heading: of the section; the group's name if not given.
        explanation: a sentence, if any.
        reference: methods with which the group's are compared.
    """
    sheets = [block for task in _TASKS for block in _sheet(results, task, group, folder)]
    title = heading or group.replace("_", " ").capitalize()
    return [f"## {title}", *filter(None, [explanation]), tables.ablation(results, group, reference), *sheets]


def plane(sweep: Sweep, folder: str, heading: str = "Two weights") -> list[str]:
    """Return the plane of two weights."""
    down, across = (axis["label"] for axis in sweep.axes)
    return [
        f"## {heading}",
        f"{sweep.count} images for each pair of weights, prompt “{sweep.prompt}”.",
        f"![FID and alignment over the weights of {down} and {across}]({folder}/plane.png)",
        f"![One image for each pair of weights, all from one seed]({folder}/plane.jpg)",
    ]


def weights(results: Results) -> list[str]:
    """Return the weights of every method, and how they were chosen."""
    rules = {each.task: each.rule for each in results if each.search}
    chosen = "; ".join(f"{task}: {rules[task]}" for task in _TASKS if task in rules)
    return [
        "## Weights",
        f"Chosen by a grid search with fewer images, then measured anew ({chosen})." if chosen else "All were given.",
        tables.weights_table(results),
    ]


def provenance(results: Results, stages: Mapping[str, float], folder: str) -> list[str]:
    """Return seeds, versions, files and what it took."""
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


def sheets(results: Results) -> dict[str, list[Result]]:
    """Return the sheets of images by file name: each task of each group."""
    groups = (METHODS, *results.groups)
    found = {f"{task}-{group}.jpg": results.of_task(task, group) for group in groups for task in _TASKS}
    return {name: rows for name, rows in found.items() if rows}


def _sheet(results: Results, task: str, group: str, folder: str) -> list[str]:
    if not results.of_task(task, group):
        return []
    return [f"![{_TASKS[task]}, a row for each method, all from the same seeds]({folder}/{task}-{group}.jpg)"]


def has_tradeoff(results: Results) -> bool:
    """Tell whether there are points to plot."""
    return len(tradeoff_points(results)) > 1
