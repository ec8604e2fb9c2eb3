"""The plane of two weights (the paper's Fig. 8(a)): FID and alignment of each pair, and a picture of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from ..gcfg.errors import GuidanceError
from ..training.files import whole_file
from ..training.picture_grid import labelled_grid
from ..training.processes import from_main
from .images import picture, read_shard
from .recipe import Term
from .results import SWEEP, Sweep
from .run import Evaluation
from .tasks import Sweep as Task

_MARGIN = 64  # pixels left of the rows


def run_sweep(evaluation: Evaluation) -> Sweep:
    """Measure every pair of weights, or take the stored result if nothing that decides it has changed.

    Raises: GuidanceError: one sentence; the images that were made stay.
    """
    recipe = evaluation.config.sweep.recipe
    if recipe is None:
        raise GuidanceError("sweep.recipe is not set, expected a recipe, two of whose weights are lists; set it.")
    task = Task(evaluation.config)
    origin = evaluation.origin(recipe, task)
    stored: Sweep | None = evaluation.stored(SWEEP, origin)
    if stored:
        return stored
    from_main(lambda: task.prepare(evaluation.measures))
    axes = [recipe.terms[place] for place in recipe.searched]
    cells, seconds = [], 0.0
    pictures: dict[tuple[float, ...], Image.Image] = {}
    for weights in recipe.grid():
        measured = evaluation.measured(task, SWEEP, recipe, weights, origin["files"])
        pair = tuple(weights[place] for place in recipe.searched)
        cells.append({"weights": list(pair), **measured.numbers})
        seconds += measured.seconds
        if evaluation.is_main:
            pictures[pair] = picture(read_shard(measured.paths[0])[0])
    result = Sweep(
        task=SWEEP,
        method=SWEEP,
        title="Two weights",
        group=SWEEP,
        parameters=None,
        recipe=recipe.model_dump(mode="json"),
        axes=[{"label": _label(term), "weights": list(term.weights)} for term in axes],
        prompt=evaluation.config.sweep.prompt,
        search=cells,
        numbers={},
        count=task.counts(search=False)[0],
        grid=f"{SWEEP}.png",
        **origin,
        seconds=round(seconds, 1),
    )
    if evaluation.is_main:
        with whole_file(evaluation.folder / result.grid) as beside:
            plane(pictures, axes).save(beside, format="PNG")
    evaluation.write(SWEEP, result)
    return result


def plane(pictures: Mapping[tuple[float, ...], Image.Image], axes: Sequence[Term]) -> Image.Image:
    """Return the images of all pairs of weights as one: a row for each first weight, a column for each second."""
    down, across = axes
    rows = [(f"{first:g}", [pictures[first, second] for second in across.weights]) for first in down.weights]
    title = f"down: {_label(down)}, across: {_label(across)}"
    return labelled_grid(rows, [f"{weight:g}" for weight in across.weights], title, left=_MARGIN)


def _label(term: Term) -> str:
    return term.label or f"{term.model} {term.prompt}".strip()
