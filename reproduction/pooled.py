"""The page over all trainings: each number is their mean with the least and the most, each claim is counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from ..evaluation.config_file import load_config
from ..evaluation.report import words
from ..evaluation.report.folder import report
from ..evaluation.results import RESULTS, Results, read_result, read_results
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
METHODS = ("prior", "textual_inversion", "dreambooth", "custom_diffusion", "oft", "lora", "ours")

Numbers = dict[tuple[str, str, str], list[float]]  # by task, method and name: one of each seed


def read_numbers(folder: Path, concept: str, seeds: Sequence[int]) -> tuple[Numbers, dict[str, str]]:
    """Read what was measured of a concept.

    Returns: the numbers, and the methods' titles.
    """
    numbers: Numbers = {}
    titles: dict[str, str] = {}
    for seed in seeds:
        evaluation = folder / "evaluation" / f"{concept}-{seed}"
        for path in sorted((evaluation / RESULTS).glob("*-*.json")):
            if result := read_result(path):
                titles[result["method"]] = result["title"]
                for name, value in result["numbers"].items():
                    numbers.setdefault((result["task"], result["method"], name), []).append(value)
        if (evaluation / HELD_OUT).is_file():
            found = json.loads((evaluation / HELD_OUT).read_text(encoding="utf-8"))
            for method, values in found["methods"].items():
                for name, value in values.items():
                    numbers.setdefault(("held out", method, name), []).append(value)
            numbers.setdefault(("held out", "truth", "distance"), []).append(found["truth"])
    return numbers, titles


def tables(folder: Path, concept: str, seeds: Sequence[int]) -> str:
    """Return both tables in Markdown, beside the paper's numbers."""
    numbers, titles = read_numbers(folder, concept, seeds)
    parts = []
    for columns, paper in ((_UNCONDITIONAL, TABLE_1), (_GUIDED, TABLE_2)):
        rows = [
            [
                titles[method],
                *(spread(numbers.get((task, method, name), [])) for task, name in columns.values()),
                *(theirs.get(method, words.ABSENT) for theirs in paper.values()),
            ]
            for method in METHODS
            if method in titles
        ]
        parts.append(words.table(["method", *columns, *paper], rows))
    truth = spread(numbers.get(("held out", "truth", "distance"), []))
    parts.append(f"Real pictures of the held-out things are {truth} from each other.")
    return "\n\n".join(parts)


def statements(folder: Path, concepts: Sequence[str], seeds: Sequence[int]) -> str:
    """Return what the paper says and in how many trainings it holds, in Markdown; what holds least comes first."""
    held: dict[tuple[str, int], dict[str, list[bool]]] = {}
    rules: dict[tuple[str, int], str] = {}
    for concept in concepts:
        for seed in seeds:
            results = Results(read_results(folder / "evaluation" / f"{concept}-{seed}" / RESULTS))
            seen: Counter[str] = Counter()
            for claim in claims(results):
                key = claim.statement, seen[claim.statement]
                seen[claim.statement] += 1
                rules[key] = claim.rule
                if claim.holds is not None:
                    held.setdefault(key, {}).setdefault(concept, []).append(claim.holds)
    shares = {key: fmean(holds for each in of.values() for holds in each) for key, of in held.items()}
    rows = [
        [key[0], rules[key], *(_count(held[key].get(concept, [])) for concept in concepts)]
        for key in sorted(shares, key=lambda key: shares[key])
    ]
    return words.table(["statement", "rule", *(f"{concept}s" for concept in concepts)], rows, numbers=False)


def page_text(folder: Path, concepts: Sequence[str], seeds: Sequence[int], details: str, about: str) -> str:
    """Return the page over all concepts and trainings.

    Args:
        folder: of the reproduction.
        concepts: their names.
        seeds: of the methods' trainings.
        details: the folder, as links name it, of the pages of one training each.
        about: what comes first.
    """
    parts = [
        "# The paper in a world of emoji",
        about,
        f"Each method was trained {len(seeds)} times for each concept; numbers are the mean of these trainings with "
        "the least and the most. Weights were searched with the first training. ↑: more is better, ↓: less. Details of "
        "the first training, with pictures: "
        + ", ".join(f"[{concept}s]({details}/{concept}.md)" for concept in concepts)
        + ".",
        "## What the paper says, and in how many trainings it holds here",
        statements(folder, concepts, seeds),
    ]
    for concept in concepts:
        parts += [f"## {concept.capitalize()}s", tables(folder, concept, seeds)]
    return "\n\n".join(parts) + "\n"


def write_pages(folder: Path, concepts: Sequence[str], seeds: Sequence[int], page: Path) -> None:
    """Write the page over all trainings, and in the folder of its name one of each concept's first training.

    Args:
        folder: of the reproduction, evaluated.
        concepts: their names.
        seeds: of the methods' trainings.
        page: a Markdown file.
    """
    details = page.with_suffix("")
    details.mkdir(parents=True, exist_ok=True)
    configs = {concept: load_config(folder / f"evaluation-{concept}-{seeds[0]}.toml") for concept in concepts}
    for concept, config in configs.items():
        report(config, details / f"{concept}.md", folder / "stages.json", one_training, draw_tradeoff)
    text = page_text(folder, concepts, seeds, details.name, configs[concepts[0]].report.about.strip())
    with whole_file(page) as beside:
        beside.write_text(text, encoding="utf-8")


def spread(values: Sequence[float]) -> str:
    """Return the mean of some trainings with the least and the most, `1.50 (1.00 .. 2.00)`."""
    if not values:
        return words.ABSENT
    digits = 1 if fmean(values) >= 10 else 3
    return f"{fmean(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def _count(held: Sequence[bool]) -> str:
    return f"{sum(held)} of {len(held)}" if held else words.ABSENT
