"""`gcfg evaluate`: from a config to the results of its methods, by one process or by many."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from ..gcfg.errors import GuidanceError
from ..training.processes import alone_in, from_main, join_processes
from .config import PRIOR, Config, Recipe
from .config import Task as TaskName
from .generation import Order, generate
from .images import seconds_of
from .measures import Measures
from .models import Models, trained_parameters
from .results import FORMAT, Hashes, fingerprint, read_result, versions, write_result
from .tasks import TASKS, Task

RESULTS, IMAGES = "results", "images"
_GENERATION = 2  # raised when the same settings give other images
Files = Mapping[str, Mapping[str, str]]  # path and sha256 by the setting that names the file


@dataclass(frozen=True)
class Measured:
    """What some weights give.

    Attributes:
        numbers: of all images.
        details: of each prompt.
        folder: of the images, below the output's.
        paths: the images' files.
        seconds: that all took, of all processes together.
    """

    numbers: dict[str, float]
    details: list[dict[str, Any]]
    folder: str
    paths: list[Path]
    seconds: float


class Evaluation:
    """What one command keeps between methods: networks, metrics and file hashes.

    Args:
        config: the evaluation's.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = config.output_folder
        self._state = join_processes()
        self._hashes = Hashes(self.folder / ".hashes.json")
        self.measures = Measures(config, self._state.device)  # of the main process

    @cached_property
    def models(self) -> Models:
        """The networks, read by the processes that make images."""
        return Models(self.config, self._state.device)

    @property
    def is_main(self) -> bool:
        """Whether this process measures, writes and speaks."""
        return bool(self._state.is_main_process)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other commands out of the output folder."""
        with alone_in(self.folder, "output.folder"):
            yield

    def run(self, name: TaskName, method: str) -> dict[str, Any] | None:
        """Measure a method, or take its result if nothing that decides it has changed.

        Returns: the result; None if the method has no recipe for the task.
        Raises: GuidanceError: one sentence; the images that were made stay.
        """
        recipe = self.config.methods[method].recipe(name)
        if recipe is None:
            return None
        task = TASKS[name](self.config)
        path = self.folder / RESULTS / f"{name}-{method}.json"
        files = self.files(recipe, task)
        decides = self.fingerprint(recipe, task, files)
        stored = self.stored(path, decides)
        settings = self.config.methods[method]
        result = {
            **(stored or self._searched(task, method, recipe, files)),
            "title": settings.title or method,  # words decide no number
            "group": settings.group,
            "fingerprint": decides,
        }
        if result != stored and self.is_main:
            write_result(path, result)
        return result

    def _searched(self, task: Task, method: str, recipe: Recipe, files: Files) -> dict[str, Any]:
        """Search the weights, and measure the best ones in full."""
        from_main(lambda: task.prepare(self.measures))
        choices = grid(recipe)
        trials: list[dict[str, Any]] = []
        seconds = 0.0
        for weights in choices if len(choices) > 1 else ():
            trial = self.measured(task, method, recipe, weights, files, search=True)
            trials.append({"weights": list(weights), **trial.numbers})
            seconds += trial.seconds
        chosen = choices[task.choose(trials)] if trials else choices[0]
        measured = self.measured(task, method, recipe, chosen, files)
        return {
            "format": FORMAT,
            "task": task.name,
            "method": method,
            "title": "",
            "group": "",
            "parameters": self._parameters(recipe),
            "recipe": with_weights(recipe, chosen),
            "rule": task.rule if trials else "",
            "search": trials,
            "numbers": measured.numbers,
            "details": measured.details,
            "count": sum(task.counts(search=False)),
            "seed": self.config.sampling.seed,
            "images": measured.folder,
            **self.provenance(files),
            "seconds": round(seconds + measured.seconds, 1),
        }

    def measured(
        self, task: Task, method: str, recipe: Recipe, weights: tuple[float, ...], files: Files, search: bool = False
    ) -> Measured:
        """Make the images of some weights with all processes, and measure them with the main one."""
        name = f"{task.name}-{method}" if method else task.name
        decides = {**self._image_values(recipe, task, files, weights), "search": search}
        folder = self.folder / IMAGES / f"{name}-{fingerprint(decides)[:12]}"
        paths = generate(
            Order(recipe, weights, task.prompts, task.counts(search), task.hints, search),
            folder,
            lambda: self._models_of(recipe),
            self.config.sampling,
            " ".join([name, *(f"{weight:g}" for weight in weights)]),
        )

        def measure() -> Measured:
            began = time.perf_counter()
            numbers, details = task.measure(folder, search, self.measures)
            seconds = time.perf_counter() - began + sum(map(seconds_of, paths))
            return Measured(numbers, details, folder.relative_to(self.folder).as_posix(), paths, seconds)

        return from_main(measure)

    def stored(self, path: Path, decides: str) -> dict[str, Any] | None:
        """Return the result in a file if nothing that decides it has changed."""

        def current() -> dict[str, Any] | None:
            result = read_result(path)
            return result if result and result.get("fingerprint") == decides else None

        return from_main(current)

    def fingerprint(self, recipe: Recipe, task: Task, files: Files) -> str:
        """Return a hash over all that decides a result."""
        hashes = {key: file["sha256"] for key, file in files.items()}
        made = self._image_values(recipe, task, files)
        return fingerprint({**made, "settings": task.settings, "files": hashes, "format": FORMAT})

    def files(self, recipe: Recipe, task: Task) -> Files:
        """Return path and hash of every file that decides a result.

        Raises: GuidanceError: if one is not there.
        """
        keys = [f"prior.{key}" for key in ("checkpoint", "vae", "text_encoder", "tokenizer")]
        if any(term.control for term in recipe.terms):
            if not self.config.prior.controlnet:
                raise GuidanceError("prior.controlnet is not set, expected one, for a term has control = true; set it.")
            keys.append("prior.controlnet")
        named = {key: self._setting(key) for key in (*keys, *task.real_settings, *task.metric_settings)}
        for name in models_of(recipe):
            model = self.config.models[name]
            named[f"models.{name}.{'unet' if model.unet else 'embedding'}"] = model.unet or model.embedding

        def hashed() -> Files:
            there = {key: path for key, path in sorted(named.items()) if path}
            found = {key: {"path": path, "sha256": self._hash(key, path)} for key, path in there.items()}
            self._hashes.save()
            return found

        return from_main(hashed)

    def provenance(self, files: Files) -> dict[str, Any]:
        """Return what a result says of its origin."""
        config = self.config.model_dump(mode="json", exclude_none=True)
        return {"config": config, "files": files, "versions": versions()}

    def _image_values(
        self, recipe: Recipe, task: Task, files: Files, weights: Sequence[float] | None = None
    ) -> dict[str, Any]:
        """Return all that decides images, whatever their number; without weights, those of a whole search."""
        shown = recipe.model_dump(mode="json") if weights is None else with_weights(recipe, weights)
        sections = ("prior.", "models.", "canny.") if task.hints else ("prior.", "models.")
        return {
            "generation": _GENERATION,
            "recipe": {**shown, "terms": [{**term, "label": ""} for term in shown["terms"]]},
            "sampling": self.config.sampling.model_dump(mode="json", exclude={"batch_size"}),
            "prediction": self.config.prior.prediction,
            "tokens": {name: self.config.models[name].token for name in sorted(models_of(recipe))},
            "task": task.image_settings,
            "files": {key: file["sha256"] for key, file in files.items() if key.startswith(sections)},
        }

    def _models_of(self, recipe: Recipe) -> Models:
        self.models.keep(models_of(recipe))
        return self.models

    def _setting(self, key: str) -> str:
        section, _, name = key.partition(".")
        setting: str = getattr(getattr(self.config, section), name)
        return setting

    def _hash(self, key: str, setting: str) -> str:
        path = self.config.path(setting)
        assert path
        if key.endswith(".images"):
            return self._hashes.of_images(path, key, self.config.canny.count if key == "canny.images" else None)
        return self._hashes.of(path, key)

    def _parameters(self, recipe: Recipe) -> int | None:
        """Return the trained parameters of all models beside the prior; None if one does not say."""
        counts = []
        for name in models_of(recipe):
            model = self.config.models[name]
            path = self.config.path(model.unet or model.embedding)
            assert path
            counts.append(trained_parameters(path, f"models.{name}") if model.parameters is None else model.parameters)
        return None if None in counts else sum(counts)  # type: ignore[arg-type]


def grid(recipe: Recipe) -> list[tuple[float, ...]]:
    """Return all combinations of a recipe's weights."""
    lists = [term.weight if isinstance(term.weight, tuple) else (term.weight,) for term in recipe.terms]
    return list(product(*lists))


def models_of(recipe: Recipe) -> set[str]:
    """Return the names of the models that a recipe uses beside the prior."""
    return {recipe.base, *(term.model for term in recipe.terms)} - {PRIOR}


def with_weights(recipe: Recipe, weights: Sequence[float]) -> dict[str, Any]:
    """Return a recipe with one weight for each term."""
    terms = tuple(term.model_copy(update={"weight": w}) for term, w in zip(recipe.terms, weights, strict=True))
    return recipe.model_copy(update={"terms": terms}).model_dump(mode="json")
