"""The page over all trainings: each number is their mean with the least and the most, each claim is counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..evaluation.config_file import load_config
from ..evaluation.report import words
from ..evaluation.report.folder import report
from ..evaluation.results import RESULTS, Results, read_results
from ..training.files import whole_file
from .evaluation import HELD_OUT
from .paper.claims import claims
from .paper.numbers import TABLE_1, TABLE_2
from .paper.page import draw_tradeoff
from .paper.page import page_text as one_training

# Column -> where its numbers are: a task of `gcfg evaluate`, or the held-out measurement, and the number's name there.
_UNCONDITIONAL = {"FID ↓": ("fid", "fid")}
_GUIDED = {
    "alignment ↑": ("alignment", "alignment"),
    "second judge ↑": ("held out", "second"),
    "held out: alignment ↑": ("held out", "alignment"),
    "held out: distance ↓": ("held out", "distance"),
    "FID of these ↓": ("alignment", "fid"),
    "edge F1 ↑": ("canny", "f1"),
    "edge difference ↓": ("canny", "mae"),
}
NUMBERS, TRUTH = "numbers.json", "truth"
METHODS = ("prior", "textual_inversion", "dreambooth", "custom_diffusion", "oft", "lora", "ours")

Gathered = dict[str, Any]


def gather(folder: Path, concepts: Sequence[str], seeds: Sequence[int]) -> Gathered:
    """Return all that the page tells, from the results of every training: what JSON can hold."""
    return {
        "seeds": list(seeds),
        "about": load_config(folder / f"evaluation-{concepts[0]}-{seeds[0]}.toml").report.about.strip(),
        "numbers": {concept: _numbers(folder, concept, seeds) for concept in concepts},
        "claims": _claims(folder, concepts, seeds),
    }


def _numbers(folder: Path, concept: str, seeds: Sequence[int]) -> list[Gathered]:
    """Return the numbers of a concept: task, method with its title, name, and a value of each seed."""
    values: dict[tuple[str, str, str], list[float]] = {}
    titles = {TRUTH: "Real pictures"}
    for seed in seeds:
        evaluation = folder / "evaluation" / f"{concept}-{seed}"
        for result in read_results(evaluation / RESULTS):
            titles[result["method"]] = result["title"]
            for name, value in result["numbers"].items():
                values.setdefault((result["task"], result["method"], name), []).append(value)
        if (evaluation / HELD_OUT).is_file():
            found = json.loads((evaluation / HELD_OUT).read_text(encoding="utf-8"))
            for method, measured in [*found["methods"].items(), (TRUTH, {"distance": found["truth"]})]:
                for name, value in measured.items():
                    values.setdefault(("held out", method, name), []).append(value)
    return [
        {"task": task, "method": method, "title": titles[method], "name": name, "values": own}
        for (task, method, name), own in values.items()
    ]


def _claims(folder: Path, concepts: Sequence[str], seeds: Sequence[int]) -> list[Gathered]:
    """Return what the paper says, and for each concept whether each training agrees, where it was measured."""
    held: dict[tuple[str, str, int], dict[str, list[bool]]] = {}
    for concept in concepts:
        for seed in seeds:
            seen: Counter[str] = Counter()
            for claim in claims(Results(read_results(folder / "evaluation" / f"{concept}-{seed}" / RESULTS))):
                key = claim.statement, claim.rule, seen[claim.statement]
                seen[claim.statement] += 1
                if claim.holds is not None:
                    held.setdefault(key, {}).setdefault(concept, []).append(claim.holds)
    return [{"statement": key[0], "rule": key[1], "holds": of} for key, of in held.items()]


def tables(numbers: Sequence[Gathered]) -> str:
    """Return both tables of a concept in Markdown, beside the paper's numbers."""
    titles = {each["method"]: each["title"] for each in numbers}
    values = {(each["task"], each["method"], each["name"]): each["values"] for each in numbers}
    parts = []
    for columns, paper in ((_UNCONDITIONAL, TABLE_1), (_GUIDED, TABLE_2)):
        rows = [
            [
                titles[method],
                *(spread(values.get((task, method, name), [])) for task, name in columns.values()),
                *(theirs.get(method, words.ABSENT) for theirs in paper.values()),
            ]
            for method in METHODS
            if method in titles
        ]
        parts.append(words.table(["method", *columns, *paper], rows))
    truth = spread(values.get(("held out", TRUTH, "distance"), []))
    parts.append(f"Real pictures of the held-out things are {truth} from each other.")
    return "\n\n".join(parts)


def statements(found: Sequence[Gathered], concepts: Sequence[str]) -> str:
    """Return what the paper says and in how many trainings it holds, in Markdown; what holds least comes first."""
    shares = [fmean(holds for each in claim["holds"].values() for holds in each) for claim in found]
    rows = [
        [claim["statement"], claim["rule"], *(_count(claim["holds"].get(concept, [])) for concept in concepts)]
        for _, claim in sorted(zip(shares, found, strict=True), key=lambda pair: pair[0])
    ]
    return words.table(["statement", "rule", *(f"{concept}s" for concept in concepts)], rows, numbers=False)


def page_text(gathered: Gathered, details: str) -> str:
    """Return the page over all concepts and trainings; `details` is the folder, as links name it, of the others."""
    concepts = list(gathered["numbers"])
    parts = [
        "# The paper in a world of emoji",
        gathered["about"],
        f"Each method was trained {len(gathered['seeds'])} times for each concept; numbers are the mean of these "
        "trainings with the least and the most. Weights were searched with the first training. ↑: more is better, "
        "↓: less. Details of the first training, with pictures: "
        + ", ".join(f"[{concept}s]({details}/{concept}.md)" for concept in concepts)
        + ".",
        "## What the paper says, and in how many trainings it holds here",
        statements(gathered["claims"], concepts),
    ]
    for concept in concepts:
        parts += [f"## {concept.capitalize()}s", tables(gathered["numbers"][concept])]
    return "\n\n".join(parts) + "\n"


def write_pages(folder: Path, concepts: Sequence[str], seeds: Sequence[int], page: Path) -> None:
    """Write the page over all trainings, and in the folder of its name its numbers and one page of each concept.

    Args:
        folder: of the reproduction, evaluated.
        concepts: their names.
        seeds: of the methods' trainings.
        page: a Markdown file.
    """
    details = page.with_suffix("")
    details.mkdir(parents=True, exist_ok=True)
    for concept in concepts:
        config = load_config(folder / f"evaluation-{concept}-{seeds[0]}.toml")
        report(config, details / f"{concept}.md", folder / "stages.json", one_training, draw_tradeoff)
    gathered = gather(folder, concepts, seeds)
    with whole_file(details / NUMBERS) as beside:
        beside.write_text(json.dumps(gathered, indent=1) + "\n", encoding="utf-8")
    with whole_file(page) as beside:
        beside.write_text(page_text(gathered, details.name), encoding="utf-8")


def spread(values: Sequence[float]) -> str:
    """Return the mean of some trainings with the least and the most, `1.50 (1.00 .. 2.00)`."""
    if not values:
        return words.ABSENT
    digits = 1 if fmean(values) >= 10 else 3
    return f"{fmean(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def _count(held: Sequence[bool]) -> str:
    return f"{sum(held)} of {len(held)}" if held else words.ABSENT
