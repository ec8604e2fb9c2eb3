"""The stages of the world of emoji, in order; each is run once, and one that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from string import Template

from ..stages import Stage, run_gcfg
from .evaluation import write_evaluation, write_held_out
from .methods import ABLATIONS, methods
from .pooled import write_tables
from .settings import Settings
from .world import CONCEPTS, World

_CONFIG = Path(__file__).parent / "configs" / "method.toml"
_TASKS = ("fid", "alignment", "canny", "diversity", "sweep")


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
    for concept in CONCEPTS:
        yield Stage(f"cache {concept}", _caching(folder, settings, concept))
        for name in methods(concept):
            for seed in settings.methods.seeds:
                if seed == settings.methods.seeds[0] or name not in ABLATIONS:
                    yield Stage(f"train {concept} {name} {seed}", _training(folder, settings, concept, name, seed))
    for concept in CONCEPTS:
        for seed in settings.methods.seeds:
            for task in _TASKS:
                yield Stage(f"evaluate {concept} {task} {seed}", _evaluating(folder, settings, concept, task, seed))
            yield Stage(f"held out {concept} {seed}", _measuring(folder, concept, seed))
        yield Stage(f"tables {concept}", _writing(folder, settings, concept))


def _caching(folder: Path, settings: Settings, concept: str) -> Callable[[], None]:
    return lambda: run_gcfg("cache", str(_config(folder, settings, concept)))


def _training(folder: Path, settings: Settings, concept: str, name: str, seed: int) -> Callable[[], None]:
    own = [*methods(concept)[name], f"output.folder={name}-{seed}", f"output.name={name}", f"train.seed={seed}"]
    changes = [part for setting in own for part in ("--set", setting)]
    return lambda: run_gcfg("train", str(_config(folder, settings, concept)), *changes)


def _evaluating(folder: Path, settings: Settings, concept: str, task: str, seed: int) -> Callable[[], None]:
    return lambda: run_gcfg("evaluate", task, str(write_evaluation(folder, settings, concept, seed)))


def _measuring(folder: Path, concept: str, seed: int) -> Callable[[], None]:
    return lambda: write_held_out(folder, concept, seed)


def _writing(folder: Path, settings: Settings, concept: str) -> Callable[[], None]:
    return lambda: write_tables(folder, concept, settings.methods.seeds)


def _config(folder: Path, settings: Settings, concept: str) -> Path:
    """Write the config that all methods of a concept share."""
    path = folder / "methods" / concept / "method.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = settings.methods.model_dump() | {"concept": concept}
    path.write_text(Template(_CONFIG.read_text(encoding="utf-8")).substitute(values), encoding="utf-8")
    return path
