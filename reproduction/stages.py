"""The stages of a reproduction, in order; each is run once and timed, and one that was killed goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

from ..command.main import app
from ..gcfg.errors import GuidanceError
from ..training.files import whole_file
from .evaluation import ROWS, same_weights, write_evaluation, write_held_out
from .methods import methods
from .settings import Settings
from .tuning import choose, learning_rate, run_name, tuned, write_tuning
from .world import CONCEPTS, World

STAGES = "stages.json"
_CONFIG = Path(__file__).parent / "configs" / "method.toml"
_ONCE = ("diversity", "sweep")  # of the first seed alone, as all that is no row of a table


@dataclass(frozen=True)
class Stage:
    """One step of the reproduction.

    Attributes:
        name: as the report shows it.
        run: what it does.
    """

    name: str
    run: Callable[[], None]


def stages(folder: Path, settings: Settings, cache: Path) -> Iterator[Stage]:
    """Yield every stage.

    Args:
        folder: where everything goes.
        settings: how large.
        cache: of the npm packages.
    """
    world = World(folder, settings.world, cache)
    yield Stage("draw the world", world.draw)
    yield Stage("autoencoder", world.train_autoencoder)
    yield Stage("prior", world.train_prior)
    yield Stage("decoder", world.train_decoder)
    yield Stage("judges", world.train_judges)
    yield Stage("second style", world.train_style)
    yield Stage("ControlNet", world.train_controlnet)
    first, *others = settings.methods.seeds
    for concept in CONCEPTS:
        yield Stage(f"cache {concept}", _caching(folder, settings, concept))
        for number, rate in enumerate(settings.methods.learning_rates):
            for name in tuned(concept):
                training = _training(folder, settings, concept, name, first, run_name(number), rate)
                yield Stage(f"train {concept} {name} at {rate:g}", training)
            yield Stage(f"evaluate {concept} at {rate:g}", _tuning(folder, settings, concept, number))
        yield Stage(f"choose the rates {concept}", _choosing(folder, settings, concept))
        for name in methods(concept):
            for seed in others if name in tuned(concept) else [first]:
                yield Stage(f"train {concept} {name} {seed}", _training(folder, settings, concept, name, seed))
    for concept in CONCEPTS:
        for task in (*ROWS, *_ONCE):
            yield Stage(f"evaluate {concept} {task} {first}", _evaluating(folder, settings, concept, task, first))
        for seed in others:
            for task in ROWS:
                yield Stage(f"evaluate {concept} {task} {seed}", _again(folder, settings, concept, task, seed))
        for seed in settings.methods.seeds:
            yield Stage(f"held out {concept} {seed}", _measuring(folder, concept, seed))


def run_each(stages: Iterable[Stage], folder: Path) -> float:
    """Run the stages that have not run yet, and return how many seconds all of them took.

    Raises: GuidanceError: one sentence; finished stages stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / STAGES
    done: dict[str, float] = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    for stage in stages:
        if stage.name in done:
            continue
        print(f"== {stage.name}", flush=True)
        began = time.perf_counter()
        stage.run()
        done[stage.name] = round(time.perf_counter() - began, 1)
        with whole_file(store) as beside:
            beside.write_text(json.dumps(done, indent=1), encoding="utf-8")
    return sum(done.values())


def _caching(folder: Path, settings: Settings, concept: str) -> Callable[[], None]:
    return lambda: run_gcfg("cache", str(_config(folder, settings, concept)))


def _training(
    folder: Path, settings: Settings, concept: str, name: str, seed: int, run: str = "", rate: float | None = None
) -> Callable[[], None]:
    """Return a method's training, at its best rate if none is given, and with folders named by the seed."""

    def train() -> None:
        own = [
            *methods(concept)[name],
            f"output.folder={name}-{run or seed}",
            f"output.name={name}",
            f"train.seed={seed}",
            f"train.learning_rate={rate or learning_rate(folder, concept, name)}",
        ]
        run_gcfg("train", str(_config(folder, settings, concept)), *(part for each in own for part in ("--set", each)))

    return train


def _tuning(folder: Path, settings: Settings, concept: str, number: int) -> Callable[[], None]:
    rows = [part for row in tuned(concept).values() for part in ("--method", row)]
    return lambda: run_gcfg("evaluate", "fid", str(write_tuning(folder, settings, concept, number)), *rows)


def _choosing(folder: Path, settings: Settings, concept: str) -> Callable[[], None]:
    return lambda: choose(folder, settings, concept)


def _evaluating(folder: Path, settings: Settings, concept: str, task: str, seed: int) -> Callable[[], None]:
    return lambda: run_gcfg("evaluate", task, str(write_evaluation(folder, settings, concept, seed)))


def _again(folder: Path, settings: Settings, concept: str, task: str, seed: int) -> Callable[[], None]:
    """Return the evaluation of the tables' rows of a further seed, with the weights that the first one was given."""

    def evaluate() -> None:
        config = write_evaluation(folder, settings, concept, seed)
        run_gcfg("evaluate", task, str(config), *same_weights(folder, concept, settings.methods.seeds[0], task))

    return evaluate


def _measuring(folder: Path, concept: str, seed: int) -> Callable[[], None]:
    return lambda: write_held_out(folder, concept, seed)


def _config(folder: Path, settings: Settings, concept: str) -> Path:
    """Write the config that all methods of a concept share."""
    path = folder / "methods" / concept / "method.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = settings.methods.model_dump() | {"concept": concept}
    path.write_text(Template(_CONFIG.read_text(encoding="utf-8")).substitute(values), encoding="utf-8")
    return path


def run_gcfg(*arguments: str) -> None:
    """Run the command that a user would: `gcfg ...`."""
    if code := app(list(arguments), standalone_mode=False):
        raise GuidanceError(f"gcfg {' '.join(arguments)} ended with code {code}.")
