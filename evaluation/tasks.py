"""The four things that are measured of a method: which images, what numbers, and by which of them weights are chosen.

fid          lowest FID
alignment    lowest FID of the task's own images, among the weights whose alignment is within 0.02 of the best
canny        highest F1 of the edges
diversity    no choice: its weights are given
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from . import config as schema
from .config import Config
from .generation import Hints
from .images import RealImages, batches, concatenated
from .measures import Measures, labelled_prompts
from .metrics import canny
from .metrics.diversity import diversity, vendi

ALIGNMENT_TOLERANCE = 0.02
_PATHS = {
    "images",
    "held_out",
    "extractor_weights",
    "classifier_weights",
    "clip",
}  # what is in them counts, not where they are

Numbers = Mapping[str, float]


class Task(ABC):
    """What all tasks have.

    Attributes:
        name: of the task.
        rule: how weights are chosen, in words.
        prompts: for '{prompt}', each with images of its own.
        hints: the conditions of images, where the task has them.
    """

    name: str
    rule = ""
    prompts: Sequence[str] = ("",)
    hints: Hints | None = None

    def __init__(self, config: Config) -> None:
        self._config = config

    @abstractmethod
    def counts(self, search: bool) -> list[int]:
        """Return the images of each prompt."""

    @abstractmethod
    def prepare(self, measures: Measures) -> None:
        """Read what the metrics need, so that a wrong setting is told before images are made."""

    @abstractmethod
    def measure(self, folder: Path, search: bool, measures: Measures) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return the numbers of images, and those of each prompt."""

    @abstractmethod
    def choose(self, trials: Sequence[Numbers]) -> int:
        """Return the place of the best weights by their numbers."""

    @property
    def image_settings(self) -> dict[str, Any]:
        """What decides the images beside recipe, models and sampling."""
        return {"prompts": list(self.prompts)}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that decide the numbers."""
        section: dict[str, Any] = getattr(self._config, self.name).model_dump(mode="json", exclude=_PATHS)
        return section

    @property
    def real_settings(self) -> tuple[str, ...]:
        """Keys of the folders of images that the task reads."""
        return ("fid.images",)

    @property
    def metric_settings(self) -> tuple[str, ...]:
        """Keys of the files that the metrics read."""
        return ("fid.extractor_weights",)

    def images(self, folder: Path, prompt: int, search: bool) -> Iterator[Tensor]:
        """Yield the generated images of one prompt."""
        return batches(folder, prompt, self.counts(search)[prompt], self._config.sampling.batch_size)


class Fid(Task):
    """Concept fidelity of unconditional images."""

    name = "fid"
    rule = "lowest FID"

    def counts(self, search: bool) -> list[int]:
        """All images are of one prompt."""
        return [self._config.fid.search_count if search else self._config.fid.count]

    def prepare(self, measures: Measures) -> None:
        """Take the real images' statistics."""
        _ = measures.real
        if self._config.fid.held_out:
            _ = measures.held_out

    @property
    def real_settings(self) -> tuple[str, ...]:
        """The images that were held out too."""
        return ("fid.images", "fid.held_out")

    def measure(self, folder: Path, search: bool, measures: Measures) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """FID against the real images, and that of real ones that no model learned from."""
        numbers = {"fid": measures.fid(self.images(folder, 0, search))}
        return numbers | (measures.held_out if self._config.fid.held_out and not search else {}), []

    def choose(self, trials: Sequence[Numbers]) -> int:
        """Lowest FID."""
        return min(range(len(trials)), key=lambda i: trials[i]["fid"])


class Alignment(Task):
    """Control by text."""

    name = "alignment"
    rule = f"lowest FID among the weights whose alignment is within {ALIGNMENT_TOLERANCE:g} of the best"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._asked = labelled_prompts(config)
        self.prompts = tuple(each.prompt for each in self._asked)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the FID count too."""
        fid = self._config.fid.model_dump(mode="json", exclude={*_PATHS, "count", "search_count"})
        return {**super().settings, "fid": fid}

    @property
    def metric_settings(self) -> tuple[str, ...]:
        """The classifier's and CLIP's too."""
        return ("fid.extractor_weights", "alignment.classifier_weights", "alignment.clip")

    def counts(self, search: bool) -> list[int]:
        """As many of each prompt."""
        settings = self._config.alignment
        return [settings.search_per_prompt if search else settings.per_prompt] * len(self.prompts)

    def prepare(self, measures: Measures) -> None:
        """Read the classifier, the CLIP, and the real images' statistics."""
        _ = measures.classifier, measures.clip, measures.real

    def measure(self, folder: Path, search: bool, measures: Measures) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Mean over the prompts of the share of images with the attribute, and the FID of all images together."""
        each = []
        for place, asked in enumerate(self._asked):
            images = concatenated(self.images(folder, place, search))
            found: dict[str, Any] = {**asked.model_dump(), "alignment": measures.aligned(images, asked.label)}
            if not search and (score := measures.clip_score(images, asked.prompt)) is not None:
                found["clip_score"] = score
            each.append(found)
        numbers: dict[str, float] = {
            key: fmean(found[key] for found in each) for key in ("alignment", "clip_score") if key in each[0]
        }
        together = (part for place in range(len(self.prompts)) for part in self.images(folder, place, search))
        return {**numbers, "fid": measures.fid(together)}, each

    def choose(self, trials: Sequence[Numbers]) -> int:
        """Lowest FID among those that are aligned as well as any."""
        best = max(trial["alignment"] for trial in trials)
        aligned = [i for i, trial in enumerate(trials) if trial["alignment"] >= best - ALIGNMENT_TOLERANCE - 1e-9]
        return min(aligned, key=lambda i: trials[i]["fid"])


class Canny(Task):
    """Control by edges."""

    name = "canny"
    rule = "highest F1 of the edges"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        settings = config.canny
        images = RealImages(config.path(settings.images), "canny.images", config.sampling.size, settings.count)
        parts = [canny.edges(part, settings.low, settings.high) for part in images.batches(16)]
        self.edges = torch.cat(parts)  # [count, H, W]
        self.hints = self._hints

    @property
    def image_settings(self) -> dict[str, Any]:
        """The conditions too."""
        settings = self._config.canny
        return {"low": settings.low, "high": settings.high, "per_condition": settings.per_condition}

    @property
    def real_settings(self) -> tuple[str, ...]:
        """Only the conditions."""
        return ("canny.images",)

    @property
    def metric_settings(self) -> tuple[str, ...]:
        """None."""
        return ()

    def counts(self, search: bool) -> list[int]:
        """All images are of one prompt; those of a condition follow each other."""
        settings = self._config.canny
        return [(min(settings.search_count, settings.count) if search else settings.count) * settings.per_condition]

    def prepare(self, measures: Measures) -> None:
        """The edges are there."""

    def measure(self, folder: Path, search: bool, measures: Measures) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Agreement of the edges, mean over the images."""
        settings = self._config.canny
        total: dict[str, float] = {}
        start = 0
        for images in self.images(folder, 0, search):
            found = canny.agreement(
                self._conditions(range(start, start + len(images))),
                canny.edges(images, settings.low, settings.high),
            )
            total = {key: total.get(key, 0) + value * len(images) for key, value in found.items()}
            start += len(images)
        return {key: value / start for key, value in total.items()}, []

    def choose(self, trials: Sequence[Numbers]) -> int:
        """Highest F1."""
        return max(range(len(trials)), key=lambda i: trials[i]["f1"])

    def _conditions(self, numbers: range) -> Tensor:
        return self.edges[torch.tensor(numbers) // self._config.canny.per_condition]

    def _hints(self, numbers: range) -> Tensor:
        return self._conditions(numbers)[:, None].expand(-1, 3, -1, -1)  # white edges on black, as RGB


class Diversity(Task):
    """How much the images of one prompt differ."""

    name = "diversity"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.prompts = config.diversity.prompts

    @property
    def settings(self) -> dict[str, Any]:
        """The extractor's too."""
        return {**super().settings, "fid": self._config.fid.model_dump(mode="json", include={"extractor", "resize"})}

    @property
    def real_settings(self) -> tuple[str, ...]:
        """None."""
        return ()

    def counts(self, search: bool) -> list[int]:
        """As many of each prompt."""
        return [self._config.diversity.per_prompt] * len(self.prompts)

    def prepare(self, measures: Measures) -> None:
        """Read the extractor."""
        _ = measures.extractor

    def measure(self, folder: Path, search: bool, measures: Measures) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Mean distance of two images of a prompt, and how many different ones there are; mean over the prompts."""
        each: list[dict[str, Any]] = []
        for place, prompt in enumerate(self.prompts):
            features = measures.features(self.images(folder, place, search))
            each.append({"prompt": prompt, "diversity": diversity(features), "vendi": vendi(features)})
        return {key: fmean(found[key] for found in each) for key in ("diversity", "vendi")}, each

    def choose(self, trials: Sequence[Numbers]) -> int:
        """There is one."""
        return 0


TASKS: dict[schema.Task, type[Task]] = {"fid": Fid, "alignment": Alignment, "canny": Canny, "diversity": Diversity}
