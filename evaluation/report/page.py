"""The page: a pure function of the stored results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import tables, words
from .claims import claims, drift_pairs
from .limits import limits
from .paper import OURS
from .plots import tradeoff_points
from .stored import METHODS, Result, Results, Sweep

RESULTS = "results"  # folder of their files, in that beside the page

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
        f"`{settings['resize']}`." + _held_out(found[0]),
        *_sheet(results, "fid", METHODS, folder),
    ]


def _held_out(result: Result) -> str:
    """In words, what no method can be expected to fall below."""
    fid = result.numbers.get("held_out_fid")
    if fid is None:
        return ""
    return f" {result.numbers['held_out_count']:,.0f} real images that no model learned from have {words.number(fid)}."


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
    if not has_tradeoff(results):
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


def sheets(results: Results) -> dict[str, list[Result]]:
    """Return the sheets of images by file name: each task of each group."""
    found = {
        f"{task}-{group}.jpg": results.of_task(task, group) for group in (METHODS, *results.groups) for task in _TASKS
    }
    return {name: rows for name, rows in found.items() if rows}


def _sheet(results: Results, task: str, group: str, folder: str) -> list[str]:
    name = f"{task}-{group}.jpg"
    return (
        [f"![{_TASKS[task]}, a row for each method, all from the same seeds]({folder}/{name})"]
        if name in sheets(results)
        else []
    )


def has_tradeoff(results: Results) -> bool:
    """Tell whether there are points to plot."""
    return len(tradeoff_points(results)) > 1
