"""The stages of a reproduction, in order, each run once and timed; a broken-off command goes on with the next one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

from ..command.main import app
from ..evaluation.config_file import load_config
from ..evaluation.report.folder import report
from ..gcfg.errors import GuidanceError
from ..training.files import whole_file
from .methods import METHODS
from .paper.page import draw_tradeoff, page_text
from .settings import Settings
from .world import World

STAGES = "stages.json"
_CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Stage:
    """One step of the reproduction.

    Attributes:
        name: as the report shows it.
        run: what it does.
        always: whether it runs although it did before, because later stages need what it holds in memory.
    """

    name: str
    run: Callable[[], None]
    always: bool = False


def stages(folder: Path, settings: Settings, page: Path | None) -> Iterator[Stage]:
    """Yield every stage.

    Args:
        folder: where everything goes.
        settings: how large.
        page: the report's file, or None for `evaluation/report.md` in the folder.
    """
    world = World(folder, settings.world)
    yield Stage("draw the world", world.draw, always=True)
    yield Stage("autoencoder", world.train_autoencoder)
    yield Stage("classifier", world.train_classifier)
    yield Stage("prior", world.train_prior)
    yield Stage("ControlNet", world.train_controlnet)
    yield Stage("cache", lambda: run_gcfg("cache", *_method(folder, settings, "concept")))
    for name in METHODS:
        yield Stage(f"train {name}", _training(folder, settings, name))
    for task in ("fid", "alignment", "canny", "diversity", "sweep"):
        yield Stage(f"evaluate {task}", _evaluating(folder, settings, task))
    yield Stage("report", lambda: _report(folder, settings, page), always=True)


def run_stages(folder: Path, settings: Settings, page: Path | None = None) -> None:
    """Run what has not run yet.

    Raises: GuidanceError: one sentence; finished stages stay.
    """
    minutes = run_each(stages(folder, settings, page), folder) / 60
    print(f"{minutes:.1f} minutes in all; see {page or folder / 'evaluation' / 'report.md'}")


def run_each(stages: Iterable[Stage], folder: Path) -> float:
    """Run the stages that have not run yet, and return how many seconds all of them took.

    Raises: GuidanceError: one sentence; finished stages stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / STAGES
    done: dict[str, float] = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    for stage in stages:
        if stage.name in done and not stage.always:
            continue
        print(f"== {stage.name}", flush=True)
        began = time.perf_counter()
        stage.run()
        if stage.name not in done and stage.name != "report":
            done[stage.name] = round(time.perf_counter() - began, 1)
            with whole_file(store) as beside:
                beside.write_text(json.dumps(done, indent=1), encoding="utf-8")
    return sum(done.values())


def _training(folder: Path, settings: Settings, name: str) -> Callable[[], None]:
    return lambda: run_gcfg("train", *_method(folder, settings, name))


def _evaluating(folder: Path, settings: Settings, task: str) -> Callable[[], None]:
    return lambda: run_gcfg("evaluate", task, str(_evaluation(folder, settings)))


def _report(folder: Path, settings: Settings, page: Path | None) -> None:
    report(load_config(_evaluation(folder, settings)), page, folder / STAGES, page_text, draw_tradeoff)


def _method(folder: Path, settings: Settings, name: str) -> list[str]:
    """Write the config that all methods share, and return it with a method's own settings."""
    config = _fill("method.toml", folder / "methods" / "method.toml", settings.methods.model_dump())
    own = [*METHODS[name], f"output.folder={name}", f"output.name={name}"]
    return [str(config), *(part for setting in own for part in ("--set", setting))]


def _evaluation(folder: Path, settings: Settings) -> Path:
    values = settings.evaluation.model_dump()
    values["sampler_steps"] = values.pop("steps")
    lists = {key: list(value) for key, value in values.items() if isinstance(value, tuple)}
    return _fill("evaluation.toml", folder / "evaluation.toml", values | lists)


def _fill(name: str, path: Path, values: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    template = Template((_CONFIGS / name).read_text(encoding="utf-8"))
    path.write_text(template.substitute(values), encoding="utf-8")
    return path


def run_gcfg(*arguments: str) -> None:
    """Run the command that a user would: `gcfg ...`."""
    if code := app(list(arguments), standalone_mode=False):
        raise GuidanceError(f"gcfg {' '.join(arguments)} ended with code {code}.")
