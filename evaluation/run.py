"""`gcfg evaluate`: from a config to the results of its methods, by one process or by many."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..gcfg.errors import GuidanceError
from ..training.processes import alone_in, from_main, join_processes
from .config import Config, ModelConfig
from .config import Task as TaskName
from .generation import Order, generate
from .images import seconds_of
from .measures import Measures
from .models import Models, trained_parameters
from .provenance import Hashes, fingerprint, versions
from .recipe import PRIOR, Recipe
from .results import FORMAT, RESULTS, Result, Stored, read_result, result_of, write_result
from .tasks import TASKS, Task

IMAGES = "images"
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

    def alone(self) -> AbstractContextManager[None]:
        """Keep other commands out of the output folder within a `with` block."""
        return alone_in(self.folder, "output.folder")

    def run(self, name: TaskName, method: str) -> Result | None:
        """Measure a method, or take its result if nothing that decides it has changed.

        Returns: the result; None if the method has no recipe for the task.
        Raises: GuidanceError: one sentence; the images that were made stay.
        """
        settings = self.config.methods[method]
        recipe = settings.recipe(name)
        if recipe is None:
            return None
        task = TASKS[name](self.config)
        origin = self.origin(recipe, task)
        stored = self.stored(f"{name}-{method}", origin)
        # Words decide no number.
        result: Result = replace(
            stored or self._searched(task, method, recipe, origin), title=settings.title or method, group=settings.group
        )
        if result != stored:
            self.write(f"{name}-{method}", result)
        return result

    def _searched(self, task: Task, method: str, recipe: Recipe, origin: Mapping[str, Any]) -> Result:
        """Search the weights, and measure the best ones in full."""
        from_main(lambda: task.prepare(self.measures))
        name, choices = f"{task.name}-{method}", recipe.grid()
        trials: list[dict[str, Any]] = []
        seconds = 0.0
        for weights in choices if len(choices) > 1 else ():
            trial = self.measured(task, name, recipe, weights, origin["files"], search=True)
            trials.append({"weights": list(weights), **trial.numbers})
            seconds += trial.seconds
        chosen = choices[task.choose(trials)] if trials else choices[0]
        measured = self.measured(task, name, recipe, chosen, origin["files"])
        return Result(
            task=task.name,
            method=method,
            title="",
            group="",
            parameters=self._parameters(recipe),
            recipe=recipe.weighted(chosen).model_dump(mode="json"),
            rule=task.rule if trials else "",
            search=trials,
            numbers=measured.numbers,
            details=measured.details,
            count=sum(task.counts(search=False)),
            images=measured.folder,
            **origin,
            seconds=round(seconds + measured.seconds, 1),
        )

    def measured(
        self, task: Task, name: str, recipe: Recipe, weights: tuple[float, ...], files: Files, search: bool = False
    ) -> Measured:
        """Make the images of some weights with all processes, and measure them with the main one."""
        decides = {**self._image_values(recipe.weighted(weights), task, files), "search": search}
        folder = self.folder / IMAGES / f"{name}-{fingerprint(decides)[:12]}"

        def models() -> Models:
            self.models.keep(self._trained(recipe))
            return self.models

        order = Order(recipe, weights, task.prompts, task.counts(search), task.hints, search)
        title = " ".join([name, *(f"{weight:g}" for weight in weights)])
        paths = generate(order, folder, models, self.config.sampling, title)

        def measure() -> Measured:
            began = time.perf_counter()
            numbers, details = task.measure(folder, search, self.measures)
            seconds = time.perf_counter() - began + sum(map(seconds_of, paths))
            return Measured(numbers, details, folder.relative_to(self.folder).as_posix(), paths, seconds)

        return from_main(measure)

    def stored(self, name: str, origin: Mapping[str, Any]) -> Any:
        """Return the result of a name if nothing that decides it has changed, else None."""
        values = from_main(lambda: read_result(self.folder / RESULTS / f"{name}.json"))
        return result_of(values) if values and values.get("fingerprint") == origin["fingerprint"] else None

    def write(self, name: str, result: Stored) -> None:
        """Write a result's file."""
        if self.is_main:
            write_result(self.folder / RESULTS / f"{name}.json", result)

    def origin(self, recipe: Recipe, task: Task) -> dict[str, Any]:
        """Return what a result says of all that decided it, `Stored`'s attributes from seed to fingerprint.

        Raises: GuidanceError: if a file is not there.
        """
        files = self._files(recipe, task)
        hashes = {key: file["sha256"] for key, file in files.items()}
        images = self._image_values(recipe, task, files)
        return {
            "seed": self.config.sampling.seed,
            "config": self.config.model_dump(mode="json", exclude_none=True),
            "files": files,
            "versions": versions(),
            "fingerprint": fingerprint({**images, "settings": task.settings, "files": hashes, "format": FORMAT}),
        }

    def _files(self, recipe: Recipe, task: Task) -> Files:
        """Return path and hash of every file that decides a result."""
        keys = [f"prior.{key}" for key in ("checkpoint", "vae", "text_encoder", "tokenizer")]
        if any(term.control for term in recipe.terms):
            if not self.config.prior.controlnet:
                raise GuidanceError("prior.controlnet is not set, expected one, for a term has control = true; set it.")
            keys.append("prior.controlnet")
        named = {key: self._setting(key) for key in (*keys, *task.files)}
        for name, model in self._trained(recipe).items():
            named[f"models.{name}.{'unet' if model.unet else 'embedding'}"] = model.file

        def hashed() -> Files:
            there = {key: path for key, path in sorted(named.items()) if path}
            found = {key: {"path": path, "sha256": self._hash(key, path)} for key, path in there.items()}
            self._hashes.save()
            return found

        return from_main(hashed)

    def _image_values(self, recipe: Recipe, task: Task, files: Files) -> dict[str, Any]:
        """Return all that decides images, whatever their number; the recipe has its weights, or those to search."""
        shown = recipe.model_dump(mode="json")
        sections = ("prior.", "models.", "canny.") if task.hints else ("prior.", "models.")
        return {
            "generation": _GENERATION,
            "recipe": {**shown, "terms": [{**term, "label": ""} for term in shown["terms"]]},
            "sampling": self.config.sampling.model_dump(mode="json", exclude={"batch_size"}),
            "prediction": self.config.prior.prediction,
            "tokens": {name: model.token for name, model in self._trained(recipe).items()},
            "task": task.image_settings,
            "files": {key: file["sha256"] for key, file in files.items() if key.startswith(sections)},
        }

    def _trained(self, recipe: Recipe) -> dict[str, ModelConfig]:
        """Return the models that a recipe uses beside the prior."""
        return {name: self.config.models[name] for name in sorted({*recipe.models.values()} - {PRIOR})}

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
        for name, model in self._trained(recipe).items():
            path = self.config.path(model.file)
            assert path
            counts.append(trained_parameters(path, f"models.{name}") if model.parameters is None else model.parameters)
        return None if None in counts else sum(counts)  # type: ignore[arg-type]
