"""Results as `gcfg evaluate` stores them, of made-up numbers over real scans, for the tests of the pages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

Values = dict[str, Any]

SCANS = torch.from_numpy(load_digits().images * 15.9).byte()
PROMPTS = ("one", "two", "three")


def term(model: str, weight: Any, prompt: str = "", control: bool = False, label: str = "") -> Values:
    """Return a term of a recipe."""
    return {"model": model, "prompt": prompt, "weight": weight, "control": control, "label": label}


def recipe(*terms: Values, base: str = "prior") -> Values:
    """Return a recipe."""
    return {"base": base, "unconditional": "", "terms": list(terms)}


CONCEPT, TEXT = term("concept", [1.0, 1.5, 2.0]), term("prior", [3.0, 5.0], "{prompt}", label="text")
BOOTH, BOOTH_TEXT = term("dreambooth", 1.5), term("dreambooth", 1.5, "a digit, {prompt}")
TOKEN, TOKEN_TEXT = term("inverted", 1.5, "<digit>"), term("inverted", 1.5, "<digit>, {prompt}")

# method: (title, group, trained parameters, {task: (recipe, chosen weights, numbers)})
METHODS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "prior": (
        "Prior alone",
        "methods",
        0,
        {
            "fid": (recipe(term("prior", 3.0, "a digit")), [3.0], {"fid": 90.5}),
            "alignment": (recipe(TEXT), [3.0], {"alignment": 0.95, "fid": 95.0}),
            "canny": (recipe(TEXT), [3.0], {"mae": 0.05, "precision": 0.7, "recall": 0.6, "f1": 0.646}),
        },
    ),
    "textual_inversion": (
        "Textual Inversion",
        "methods",
        768,
        {
            "fid": (recipe(TOKEN), [1.5], {"fid": 70.25}),
            "alignment": (recipe(TOKEN_TEXT), [1.5], {"alignment": 0.93, "fid": 72.0}),
        },
    ),
    "dreambooth": (
        "DreamBooth",
        "methods",
        4_600_000,
        {
            "fid": (recipe(BOOTH, base="dreambooth"), [1.5], {"fid": 20.0}),
            "alignment": (recipe(BOOTH_TEXT, base="dreambooth"), [1.5], {"alignment": 0.30, "fid": 21.0}),
            "canny": (
                recipe(BOOTH, base="dreambooth"),
                [1.5],
                {"mae": 0.06, "precision": 0.6, "recall": 0.5, "f1": 0.545},
            ),
        },
    ),
    "oft": (
        "OFT",
        "methods",
        44_000,
        {
            "fid": (recipe(term("oft", 1.5)), [1.5], {"fid": 40.0}),
            "alignment": (recipe(term("oft", 1.5, "{prompt}")), [1.5], {"alignment": 0.88, "fid": 41.0}),
        },
    ),
    "ours": (
        "Ours",
        "methods",
        4_300_000,
        {
            "fid": (recipe(CONCEPT), [2.0], {"fid": 12.345}),
            "alignment": (recipe(CONCEPT, TEXT), [1.5, 5.0], {"alignment": 0.90, "fid": 14.0}),
            "canny": (recipe(CONCEPT, TEXT), [1.5, 5.0], {"mae": 0.055, "precision": 0.7, "recall": 0.7, "f1": 0.7}),
        },
    ),
    "drifted": (
        "Ours around the concept model",
        "drift",
        4_300_000,
        {"alignment": (recipe(CONCEPT, TEXT, base="concept"), [1.0, 5.0], {"alignment": 0.7, "fid": 30.0})},
    ),
    "rectified": (
        "DreamBooth around the prior",
        "drift",
        4_600_000,
        {"fid": (recipe(BOOTH), [1.5], {"fid": 25.0})},
    ),
    "joint": (
        "joint prompt",
        "decoupling",
        0,
        {"diversity": (recipe(term("prior", 5.0, "one in red")), [5.0], {"diversity": 4.0, "vendi": 3.0})},
    ),
    "apart": (
        "two prompts",
        "decoupling",
        0,
        {
            "diversity": (
                recipe(term("prior", 5.0, "one"), term("prior", 5.0, "in red")),
                [5.0, 5.0],
                {"diversity": 5.5, "vendi": 4.5},
            )
        },
    ),
}
RULES = {"fid": "lowest FID", "alignment": "the rule of alignment", "canny": "highest F1 of the edges"}
COUNTS = {"fid": 20, "alignment": 30, "canny": 20, "diversity": 12}
CONFIG = {
    "sampling": {"size": 64, "steps": 25, "batch_size": 8, "seed": 7, "precision": "fp32"},
    "fid": {"images": "scans", "count": 20, "extractor": "own.package:features", "resize": "none"},
    "alignment": {"classifier": "own.package:reader", "per_prompt": 10},
    "canny": {"low": 100, "high": 200, "per_condition": 4, "count": 5},
    "methods": {
        name: {"title": title, "group": group, **{task: made[0] for task, made in tasks.items()}}
        for name, (title, group, _, tasks) in METHODS.items()
    },
}
VERSIONS = {"python": "3.11.4", "torch": "2.15.0"}


def chosen(made: Values, weights: Sequence[float]) -> Values:
    """Return a recipe with one weight for each term."""
    terms = [{**each, "weight": weight} for each, weight in zip(made["terms"], weights, strict=True)]
    return {**made, "terms": terms}


def result(method: str, task: str) -> Values:
    """Return one result."""
    title, group, parameters, tasks = METHODS[method]
    made, weights, numbers = tasks[task]
    searched = any(isinstance(each["weight"], list) for each in made["terms"])
    details = [{"prompt": prompt, "label": prompt, "alignment": 0.5} for prompt in PROMPTS]
    return {
        "format": 1,
        "task": task,
        "method": method,
        "title": title,
        "group": group,
        "parameters": parameters,
        "recipe": chosen(made, weights),
        "rule": RULES[task] if searched else "",
        "search": [{"weights": weights, **numbers}] * 3 if searched else [],
        "numbers": dict(numbers),
        "details": {"alignment": details, "diversity": details[:1]}.get(task, []),
        "count": COUNTS[task],
        "seed": 7,
        "images": f"images/{task}-{method}-0123456789ab",
        "config": CONFIG,
        "files": {"fid.images": {"path": "/home/someone/data/scans", "sha256": "ab" * 32}},
        "versions": VERSIONS,
        "fingerprint": "cd" * 32,
        "seconds": 60.0,
    }


def sweep() -> Values:
    """Return the plane of two weights."""
    made = recipe(term("concept", [0.0, 1.0, 2.0]), term("prior", [0.0, 5.0], "{prompt}", label="text"))
    cells = [
        {"weights": [concept, text], "fid": 60.0 - 20 * concept + text, "alignment": 0.1 + 0.15 * text - 0.02 * concept}
        for concept in (0.0, 1.0, 2.0)
        for text in (0.0, 5.0)
    ]
    return {
        **{
            key: value for key, value in result("ours", "alignment").items() if key not in ("images", "rule", "details")
        },
        "task": "sweep",
        "method": "sweep",
        "group": "sweep",
        "recipe": made,
        "axes": [{"label": "concept", "weights": [0.0, 1.0, 2.0]}, {"label": "text", "weights": [0.0, 5.0]}],
        "prompt": "three",
        "search": cells,
        "numbers": {},
        "count": 25,
        "grid": "sweep.png",
    }


def every_result() -> list[Values]:
    """Return the results of all methods, and the plane."""
    return [*(result(method, task) for method, made in METHODS.items() for task in made[3]), sweep()]


def scan_of(task: str, method: str, prompt: int, number: int) -> Tensor:
    """Return the scan that stands for a generated image, (3, 64, 64) uint8: another for each."""
    place = list(METHODS).index(method) * 150 + ("fid", "alignment", "canny", "diversity").index(task) * 37
    image = SCANS[place + 31 * prompt + number]
    return image.repeat_interleave(8, 0).repeat_interleave(8, 1).expand(3, 64, 64)


def conditions() -> Tensor:
    """Return five edge maps, (5, 64, 64) bool; the k-th is a bar in the k-th eighth."""
    return (torch.arange(64) // 8 == torch.arange(5)[:, None])[:, None].expand(5, 64, 64)


def write_output(
    results: Sequence[Mapping[str, Any]], folder: Path, write_shard: Callable[[Path, Tensor, int, float], object]
) -> Path:
    """Write the images of results in shards of eight, and the sweep's picture, into an evaluation's output folder."""
    for each in results:
        if each["task"] != "sweep":
            prompts = max(1, len(each["details"]))
            for prompt in range(prompts):
                for start in range(0, each["count"] // prompts, 8):
                    stop = min(start + 8, each["count"] // prompts)
                    images = [scan_of(each["task"], each["method"], prompt, number) for number in range(start, stop)]
                    path = folder / each["images"] / f"{prompt:03d}-{start:06d}-{stop:06d}.zip"
                    write_shard(path, torch.stack(images), start, 1.0)
    Image.new("RGB", (40, 30), "navy").save(folder / "sweep.png")
    return folder


def section(page: str, heading: str) -> str:
    """What stands below a heading of a Markdown page."""
    found = re.search(rf"^## {re.escape(heading)}.*?\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found.group(1)


def rows(text: str) -> list[list[str]]:
    """The cells of the tables in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
