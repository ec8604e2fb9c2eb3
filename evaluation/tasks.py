"""What is measured of a method: which images, what numbers, and by which of them weights are chosen.

fid          lowest FID
alignment    lowest FID of the task's own images, among the weights whose alignment is within 0.02 of the best
canny        highest F1 of the edges
diversity    no choice: its weights are given
sweep        no choice: every pair of two weights counts
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .generation import Hints
from .images import RealImages, batches
from .measures import Measures, labelled_prompts
from .metrics import canny
from .metrics.features import diversity, vendi

ALIGNMENT_TOLERANCE = 0.02
# What is in them counts, not where they are.
_PATHS = {"images", "held_out", "extractor_weights", "classifier_weights", "clip"}

Numbers = Mapping[str, float]
Measured = tuple[dict[str, float], list[dict[str, Any]]]  # the numbers of all images, and those of each prompt


class Task(ABC):
    """What all tasks have.

    Attributes:
        name: of the task, and of its section in the config.
        rule: how weights are chosen, in words.
        needs: what it asks `Measures` for.
        files: the settings whose files decide its numbers, beside those of a recipe.
        hints: the conditions of images, where the task has them.

    Args:
        config: the evaluation's.
        prompts: for '{prompt}', each with images of its own.
        count: images of each prompt.
        search_count: the same while weights are searched.
    """

    name: str
    rule = ""
    needs: tuple[str, ...] = ("real",)
    files: tuple[str, ...] = ("fid.images", "fid.extractor_weights")
    hints: Hints | None = None

    def __init__(self, config: Config, prompts: Sequence[str], count: int, search_count: int = 0) -> None:
        self._config, self.prompts = config, tuple(prompts)
        self._count, self._search_count = count, search_count

    def counts(self, search: bool) -> list[int]:
        """Return the images of each prompt."""
        return [self._search_count if search else self._count] * len(self.prompts)

    def prepare(self, measures: Measures) -> None:
        """Read what the metrics need, so that a wrong setting is told before images are made."""
        for name in self.needs:
            getattr(measures, name)

    @abstractmethod
    def measure(self, folder: Path, search: bool, measures: Measures) -> Measured:
        """Return the numbers of images, and those of each prompt."""

    def choose(self, trials: Sequence[Numbers]) -> int:
        """Return the place of the best weights by their numbers."""
        raise NotImplementedError(f"{self.name} has no rule by which weights are chosen")

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
    def _features(self) -> dict[str, Any]:
        """The settings of the network whose features are compared."""
        return {"fid": self._config.fid.model_dump(mode="json", include={"extractor", "resize"})}

    def images(self, folder: Path, prompt: int, search: bool) -> Iterator[Tensor]:
        """Yield the generated images of one prompt."""
        return batches(folder, prompt, self.counts(search)[prompt], self._config.sampling.batch_size)


class Fid(Task):
    """Concept fidelity of unconditional images."""

    name = "fid"
    rule = "lowest FID"
    needs = ("real", "held_out")
    files = (*Task.files, "fid.held_out")

    def __init__(self, config: Config) -> None:
        super().__init__(config, ("",), config.fid.count, config.fid.search_count)

    def measure(self, folder: Path, search: bool, measures: Measures) -> Measured:
        """FID against the real images, and that of real ones that no model learned from."""
        numbers = {"fid": measures.real.fid(self.images(folder, 0, search))}
        return numbers | ({} if search else measures.held_out), []

    def choose(self, trials: Sequence[Numbers]) -> int:
        """Lowest FID."""
        return min(range(len(trials)), key=lambda i: trials[i]["fid"])


class Alignment(Task):
    """Control by text."""

    name = "alignment"
    rule = f"lowest FID among the weights whose alignment is within {ALIGNMENT_TOLERANCE:g} of the best"
    needs = ("classifier", "clip", "real")
    files = (*Task.files, "alignment.classifier_weights", "alignment.clip")

    def __init__(self, config: Config) -> None:
        self._asked, own = labelled_prompts(config), config.alignment
        super().__init__(config, [each.prompt for each in self._asked], own.per_prompt, own.search_per_prompt)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the FID count too."""
        return super().settings | self._features

    def measure(self, folder: Path, search: bool, measures: Measures) -> Measured:
        """Mean over the prompts of the share of images with the attribute, and the FID of all images together."""
        each = []
        for place, asked in enumerate(self._asked):
            images = torch.cat(list(self.images(folder, place, search)))
            found: dict[str, Any] = {**asked.model_dump(), "alignment": measures.aligned(images, asked.label)}
            if not search and (score := measures.clip_score(images, asked.prompt)) is not None:
                found["clip_score"] = score
            each.append(found)
        numbers: dict[str, float] = {
            key: fmean(found[key] for found in each) for key in ("alignment", "clip_score") if key in each[0]
        }
        together = (part for place in range(len(self.prompts)) for part in self.images(folder, place, search))
        return {**numbers, "fid": measures.real.fid(together)}, each

    def choose(self, trials: Sequence[Numbers]) -> int:
        """Lowest FID among those that are aligned as well as any."""
        best = max(trial["alignment"] for trial in trials)
        aligned = [i for i, trial in enumerate(trials) if trial["alignment"] >= best - ALIGNMENT_TOLERANCE - 1e-9]
        return min(aligned, key=lambda i: trials[i]["fid"])


class Canny(Task):
    """Control by edges; all images are of one prompt, those of a condition follow each other."""

    name = "canny"
    rule = "highest F1 of the edges"
    needs = ()
    files = ("canny.images",)

    def __init__(self, config: Config) -> None:
        own = config.canny
        conditions = min(own.search_count, own.count)
        super().__init__(config, ("",), own.count * own.per_condition, conditions * own.per_condition)
        images = RealImages(config.path(own.images), "canny.images", config.sampling.size, own.count)
        self.edges = torch.cat([canny.edges(part, own.low, own.high) for part in images.batches(16)])  # [count, H, W]
        self.hints = lambda numbers: self._conditions(numbers)[:, None].expand(-1, 3, -1, -1)  # white on black, as RGB

    @property
    def image_settings(self) -> dict[str, Any]:
        """The conditions."""
        return self._config.canny.model_dump(mode="json", include={"low", "high", "per_condition"})

    def measure(self, folder: Path, search: bool, measures: Measures) -> Measured:
        """Agreement of the edges, mean over the images."""
        own = self._config.canny
        total: dict[str, float] = {}
        count = 0
        for images in self.images(folder, 0, search):
            asked = self._conditions(range(count, count + len(images)))
            found = canny.agreement(asked, canny.edges(images, own.low, own.high))
            total = {key: total.get(key, 0) + value * len(images) for key, value in found.items()}
            count += len(images)
        return {key: value / count for key, value in total.items()}, []

    def choose(self, trials: Sequence[Numbers]) -> int:
        """Highest F1."""
        return max(range(len(trials)), key=lambda i: trials[i]["f1"])

    def _conditions(self, numbers: range) -> Tensor:
        return self.edges[torch.tensor(numbers) // self._config.canny.per_condition]


class Diversity(Task):
    """How much the images of one prompt differ."""

    name = "diversity"
    needs = ("extractor",)
    files = ("fid.extractor_weights",)

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.diversity.prompts, config.diversity.per_prompt)

    @property
    def settings(self) -> dict[str, Any]:
        """The extractor's too."""
        return super().settings | self._features

    def measure(self, folder: Path, search: bool, measures: Measures) -> Measured:
        """Mean distance of two images of a prompt, and how many different ones there are; mean over the prompts."""
        each: list[dict[str, Any]] = []
        for place, prompt in enumerate(self.prompts):
            features = measures.features(self.images(folder, place, search))
            each.append({"prompt": prompt, "diversity": diversity(features), "vendi": vendi(features)})
        return {key: fmean(found[key] for found in each) for key in ("diversity", "vendi")}, each


class Sweep(Task):
    """Fidelity and control of one prompt's images, for every pair of two weights."""

    name = "sweep"
    needs = ("classifier", "real")
    files = (*Task.files, "alignment.classifier_weights")

    def __init__(self, config: Config) -> None:
        super().__init__(config, (config.sweep.prompt,), config.sweep.per_cell)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of FID and classifier too."""
        return super().settings | self._features | {"classifier": self._config.alignment.classifier}

    def measure(self, folder: Path, search: bool, measures: Measures) -> Measured:
        """FID, and the share of images that show what the prompt asks for."""
        images = torch.cat(list(self.images(folder, 0, search)))
        return {"fid": measures.real.fid([images]), "alignment": measures.aligned(images, self._config.sweep.label)}, []


TASKS: dict[str, type[Fid | Alignment | Canny | Diversity]] = {
    "fid": Fid,
    "alignment": Alignment,
    "canny": Canny,
    "diversity": Diversity,
}
