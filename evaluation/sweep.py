"""The plane of two weights (the paper's Fig. 8(a)): FID and alignment of each pair, and a picture of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..gcfg.errors import GuidanceError
from ..training.files import whole_file
from ..training.picture_grid import labelled_grid
from ..training.processes import from_main
from .config import Config, Term
from .images import concatenated, picture, read_shard
from .measures import Measures
from .results import FORMAT, write_result
from .run import RESULTS, Evaluation, grid
from .tasks import Numbers, Task

NAME = "sweep"
_MARGIN = 64  # pixels left of the rows


class Sweep(Task):
    """Every pair of two weights: fidelity and control of one prompt's images."""

    name = NAME

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.prompts = (config.sweep.prompt,)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of FID and classifier too."""
        fid = self._config.fid.model_dump(mode="json", include={"extractor", "resize"})
        return {**super().settings, "fid": fid, "classifier": self._config.alignment.classifier}

    @property
    def metric_settings(self) -> tuple[str, ...]:
        """The classifier's too."""
        return ("fid.extractor_weights", "alignment.classifier_weights")

    def counts(self, search: bool) -> list[int]:
        """Images of each pair."""
        return [self._config.sweep.per_cell]

    def prepare(self, measures: Measures) -> None:
        """Read the classifier and the real images' statistics."""
        _ = measures.classifier, measures.real

    def measure(self, folder: Path, search: bool, measures: Measures) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """FID, and the share of images that show what the prompt asks for."""
        images = concatenated(self.images(folder, 0, search))
        return {"fid": measures.fid([images]), "alignment": measures.aligned(images, self._config.sweep.label)}, []

    def choose(self, trials: Sequence[Numbers]) -> int:
        """Nothing is chosen: all pairs count."""
        raise NotImplementedError


def run_sweep(evaluation: Evaluation) -> dict[str, Any]:
    """Measure every pair of weights, or take the stored result if nothing that decides it has changed.

    Raises: GuidanceError: one sentence; the images that were made stay.
    """
    recipe = evaluation.config.sweep.recipe
    if recipe is None:
        raise GuidanceError("sweep.recipe is not set, expected a recipe, two of whose weights are lists; set it.")
    task = Sweep(evaluation.config)
    path = evaluation.folder / RESULTS / f"{NAME}.json"
    files = evaluation.files(recipe, task)
    decides = evaluation.fingerprint(recipe, task, files)
    if stored := evaluation.stored(path, decides):
        return stored
    from_main(lambda: task.prepare(evaluation.measures))
    cells, seconds = [], 0.0
    pictures: dict[tuple[float, ...], Image.Image] = {}
    searched = recipe.searched
    for weights in grid(recipe):
        measured = evaluation.measured(task, "", recipe, weights, files)
        pair = tuple(weights[place] for place in searched)
        cells.append({"weights": list(pair), **measured.numbers})
        seconds += measured.seconds
        if evaluation.is_main:
            pictures[pair] = picture(read_shard(measured.paths[0])[0])
    axes = [recipe.terms[place] for place in searched]
    result = {
        "format": FORMAT,
        "task": NAME,
        "method": NAME,
        "title": "Two weights",
        "group": NAME,
        "parameters": None,
        "recipe": recipe.model_dump(mode="json"),
        "axes": [{"label": _label(term), "weights": _weights(term)} for term in axes],
        "prompt": evaluation.config.sweep.prompt,
        "search": cells,
        "numbers": {},
        "count": task.counts(search=False)[0],
        "seed": evaluation.config.sampling.seed,
        "grid": f"{NAME}.png",
        **evaluation.provenance(files),
        "fingerprint": decides,
        "seconds": round(seconds, 1),
    }
    if evaluation.is_main:
        with whole_file(evaluation.folder / f"{NAME}.png") as beside:
            plane(pictures, axes).save(beside, format="PNG")
        write_result(path, result)
    return result


def plane(pictures: Mapping[tuple[float, ...], Image.Image], axes: Sequence[Term]) -> Image.Image:
    """Return the images of all pairs of weights as one: a row for each first weight, a column for each second."""
    down, across = (_weights(term) for term in axes)
    rows = [(f"{first:g}", [pictures[first, second] for second in across]) for first in down]
    title = f"down: {_label(axes[0])}, across: {_label(axes[1])}"
    return labelled_grid(rows, [f"{weight:g}" for weight in across], title, left=_MARGIN)


def _label(term: Term) -> str:
    return term.label or f"{term.model} {term.prompt}".strip()


def _weights(term: Term) -> list[float]:
    return list(term.weight) if isinstance(term.weight, tuple) else [term.weight]
