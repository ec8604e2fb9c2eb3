"""The trials of the A/B test: images that several methods made from one seed for one prompt or condition."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..gcfg.errors import GuidanceError
from .abtest import Trial
from .config import Config
from .images import read_image_of
from .results import read_results
from .run import RESULTS
from .tasks import TASKS, Task

FOLDER = "abtest"
GROUP = "methods"  # of the paper's tables; ablations are not put to a vote
_COMPARED = ("fid", "alignment", "canny")


def comparison(config: Config, methods: Sequence[str], count: int) -> list[Trial]:
    """Return trials over the images of stored results.

    Args:
        config: the evaluation's.
        methods: names; none for all of the tables' group.
        count: trials of each task; fewer where there are fewer images.

    Raises: GuidanceError: if no task has results of two methods.
    """
    stored = read_results(config.output_folder / RESULTS)
    trials: list[Trial] = []
    for name in _COMPARED:
        results = [
            each
            for each in stored
            if each["task"] == name and (each["method"] in methods if methods else each["group"] == GROUP)
        ]
        if len(results) > 1:
            trials += _trials(TASKS[name](config), results, config, count)  # type: ignore[index]
    if not trials:
        raise GuidanceError(
            f"{str(config.output_folder)!r} holds no results of two methods for one task, expected some; run `gcfg "
            "evaluate tables` first."
        )
    return trials


def _trials(task: Task, results: Sequence[dict[str, Any]], config: Config, count: int) -> list[Trial]:
    places = [(prompt, number) for prompt, images in enumerate(task.counts(search=False)) for number in range(images)]
    chosen = sorted(random.Random(config.sampling.seed).sample(places, min(count, len(places))))
    return [
        Trial(
            task.name,
            task.prompts[prompt],
            {each["method"]: read_image_of(config.output_folder / each["images"], prompt, number) for each in results},
            _condition(task, number),
        )
        for prompt, number in chosen
    ]


def _condition(task: Task, number: int) -> Tensor | None:
    return None if task.hints is None else task.hints(range(number, number + 1))[0].byte() * 255
