"""`gcfg evaluate`: from a config to the results of its methods, by one process or by many."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from ..processes import alone_in, join_processes
from .config import PRIOR, Config, Recipe
from .config import Task as TaskName
from .generation import Order, generate
from .images import seconds_of
from .measures import Measures
from .models import Models, trained_parameters
from .results import FORMAT, Hashes, fingerprint, read_result, versions, write_result
from .tasks import TASKS, Task

RESULTS, IMAGES = "results", "images"
_GENERATION = 1  # raised when the same settings give other images


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
        decides = {
            **self.image_values(recipe, task, files),
            "settings": task.settings,
            "files": files,
            "format": FORMAT,
        }
        stored = self.told(lambda: _current(path, decides))
        return stored or self._measured(task, method, recipe, files, path, fingerprint(decides))

    def _measured(
        self, task: Task, method: str, recipe: Recipe, files: Mapping[str, Any], path: Path, print_: str
    ) -> dict[str, Any]:
        if self.is_main:
            task.prepare(self.measures)
        name = f"{task.name}-{method}"
        choices = grid(recipe)
        trials: list[dict[str, Any]] = []
        seconds = 0.0
        if len(choices) > 1:
            for weights in choices:
                numbers, _, _, took = self._numbers(task, name, recipe, weights, files, search=True)
                trials.append({"weights": list(weights), **numbers})
                seconds += took
        chosen = choices[task.choose(trials)] if trials else choices[0]
        numbers, details, images, took = self._numbers(task, name, recipe, chosen, files, search=False)
        result = {
            "format": FORMAT,
            "task": task.name,
            "method": method,
            **self._words(method),
            "parameters": self._parameters(recipe),
            "recipe": with_weights(recipe, chosen),
            "rule": task.rule if trials else "",
            "search": trials,
            "numbers": numbers,
            "details": details,
            "count": sum(task.counts(search=False)),
            "seed": self.config.sampling.seed,
            "images": images,
            **self.provenance(files),
            "fingerprint": print_,
            "seconds": round(seconds + took, 1),
        }
        if self.is_main:
            write_result(path, result)
        return result

    def _numbers(
        self,
        task: Task,
        name: str,
        recipe: Recipe,
        weights: tuple[float, ...],
        files: Mapping[str, Any],
        search: bool,
    ) -> tuple[dict[str, float], list[dict[str, Any]], str, float]:
        """Return numbers, details, the images' folder below the output, and the seconds that all took."""
        order = Order(recipe, weights, task.prompts, task.counts(search), task.hints)
        key = fingerprint(self.image_values(recipe, task, files, weights))[:12]
        folder = self.folder / IMAGES / f"{name}-{key}"
        paths = self.generate(order, folder, name)

        def measure() -> tuple[dict[str, float], list[dict[str, Any]], str, float]:
            began = time.perf_counter()
            numbers, details = task.measure(folder, search, self.measures)
            seconds = time.perf_counter() - began + sum(map(seconds_of, paths))
            return numbers, details, folder.relative_to(self.folder).as_posix(), seconds

        return self.told(measure)

    def generate(self, order: Order, folder: Path, name: str) -> list[Path]:
        """Make the images of an order, with all processes."""
        names = models_of(order.recipe)

        def models() -> Models:
            self.models.keep(names)
            return self.models

        title = " ".join([name, *(f"{weight:g}" for weight in order.weights)])
        return generate(order, folder, models, self.config.sampling, title)

    def files(self, recipe: Recipe, task: Task | None = None) -> dict[str, dict[str, str]]:
        """Return path and hash of every file that decides a result, by the setting that names it."""
        named = {f"prior.{key}": getattr(self.config.prior, key) for key in ("checkpoint", "vae", "text_encoder")}
        named["prior.tokenizer"] = self.config.prior.tokenizer
        if any(term.control for term in recipe.terms):
            named["prior.controlnet"] = self.config.prior.controlnet
        for name in models_of(recipe) - {PRIOR}:
            model = self.config.models[name]
            key = "unet" if model.unet else "embedding"
            named[f"models.{name}.{key}"] = getattr(model, key)
        keys = (*task.real_settings, *task.metric_settings) if task else ("fid.images", "fid.extractor_weights")
        for key in keys:
            section, _, setting = key.partition(".")
            named[key] = getattr(getattr(self.config, section), setting)

        def hashed() -> dict[str, dict[str, str]]:
            found = {
                key: {"path": path, "sha256": self._hash(key, path)} for key, path in sorted(named.items()) if path
            }
            self._hashes.save()
            return found

        return self.told(hashed)

    def _hash(self, key: str, setting: str) -> str:
        path = self.config.path(setting)
        assert path
        if key.endswith(".images"):
            return self._hashes.of_images(path, key, self.config.canny.count if key == "canny.images" else None)
        return self._hashes.of(path, key)

    def image_values(
        self, recipe: Recipe, task: Task, files: Mapping[str, Mapping[str, str]], weights: Sequence[float] | None = None
    ) -> dict[str, Any]:
        """Return all that decides images, how many apart; without weights all of a search's."""
        shown = recipe.model_dump(mode="json") if weights is None else with_weights(recipe, weights)
        sections = ("prior.", "models.", "canny.") if task.hints else ("prior.", "models.")
        return {
            "generation": _GENERATION,
            "recipe": {**shown, "terms": [{**term, "label": ""} for term in shown["terms"]]},
            "sampling": self.config.sampling.model_dump(mode="json", exclude={"batch_size"}),
            "prediction": self.config.prior.prediction,
            "tokens": {name: self.config.models[name].token for name in sorted(models_of(recipe) - {PRIOR})},
            "task": task.image_settings,
            "files": {key: file["sha256"] for key, file in files.items() if key.startswith(sections)},
        }

    def provenance(self, files: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a result says of its origin."""
        config = self.config.model_dump(mode="json", exclude_none=True)
        return {"config": config, "files": dict(files), "versions": versions()}

    def _words(self, method: str) -> dict[str, str]:
        settings = self.config.methods[method]
        return {"title": settings.title or method, "group": settings.group}

    def _parameters(self, recipe: Recipe) -> int | None:
        """Return the trained parameters of all models beside the prior, None if one does not say."""
        total = 0
        for name in models_of(recipe) - {PRIOR}:
            model = self.config.models[name]
            path = self.config.path(model.unet or model.embedding)
            assert path
            stated = model.parameters
            found = trained_parameters(path, f"models.{name}") if stated is None else stated
            if found is None:
                return None
            total += found
        return total

    def told(self, value: Any) -> Any:
        """Return what a function returns in the main process, in all of them."""
        held = [value() if self.is_main else None]
        broadcast_object_list(held)
        return held[0]


def grid(recipe: Recipe) -> list[tuple[float, ...]]:
    """Return all combinations of a recipe's weights."""
    lists = [term.weight if isinstance(term.weight, tuple) else (term.weight,) for term in recipe.terms]
    return list(product(*lists))


def models_of(recipe: Recipe) -> set[str]:
    """Return the names of the models that a recipe uses."""
    return {recipe.base, *(term.model for term in recipe.terms)}


def with_weights(recipe: Recipe, weights: Sequence[float]) -> dict[str, Any]:
    """Return a recipe with one weight for each term."""
    terms = tuple(term.model_copy(update={"weight": w}) for term, w in zip(recipe.terms, weights, strict=True))
    return recipe.model_copy(update={"terms": terms}).model_dump(mode="json")


def _current(path: Path, print_: str) -> dict[str, Any] | None:
    stored = read_result(path)
    return stored if stored and stored.get("fingerprint") == print_ else None
