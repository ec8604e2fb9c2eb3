"""Ten prompts, three ways: the prior alone, the concept alone, and both around the prior, from the same noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..testkit.client import Prompt
from ..testkit.small_world import WORDS
from .sheet import INK, MARGIN, PAPER, fitted

WORKFLOW = "text-guided-concept"
ROWS = (("the prior alone", {"concept"}), ("the concept alone", {"text"}), ("both: GCFG", set[str]()))

_CELL, _LABEL, _LINE = 96, 130, 18


def digit_sheet(prompt: Prompt, run: Callable[[Prompt], Path]) -> Image.Image:
    """Return the sheet: a column for each prompt, which has its own seed, and a row for each way.

    Args:
        prompt: of the workflow, whose weights and prompt are varied.
        run: executes a prompt and returns its image.
    """
    rows = [[run(varied(prompt, word, seed, without)) for seed, word in enumerate(WORDS)] for _, without in ROWS]
    return _laid_out(rows)


def varied(prompt: Prompt, word: str, seed: int, without: set[str]) -> Prompt:
    """Return the prompt with another text and seed, and without the guidances of these labels."""
    out: Prompt = {}
    for node, entry in prompt.items():
        inputs = dict(entry["inputs"])
        if isinstance(inputs.get("text"), str) and inputs["text"]:
            inputs["text"] = word
        if "seed" in inputs:
            inputs["seed"] = seed
        if inputs.get("label") in without:
            inputs["weight"] = 0.0
        out[node] = {**entry, "inputs": inputs}
    return out


def _laid_out(rows: Sequence[Sequence[Path]]) -> Image.Image:
    step = _CELL + MARGIN // 2
    size = (_LABEL + MARGIN + len(WORDS) * step, 2 * MARGIN + _LINE + len(rows) * step)
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for column, word in enumerate(WORDS):
        draw.text((_LABEL + column * step + _CELL // 2, MARGIN), word, INK, font, anchor="ma")
    for row, ((title, _), paths) in enumerate(zip(ROWS, rows, strict=True)):
        y = MARGIN + _LINE + row * step
        draw.text((MARGIN, y + _CELL // 2), title, INK, font, anchor="lm")
        for column, path in enumerate(paths):
            sheet.paste(fitted(path, _CELL), (_LABEL + column * step, y))
    return sheet
