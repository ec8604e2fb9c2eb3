"""`gcfg evaluate`: tables of methods, from a config that names models, methods and real images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..evaluation.config import TASKS, Config, Task
from ..evaluation.config_file import fields, load_config
from ..gcfg.errors import GuidanceError
from .errors import one_sentence, say

if TYPE_CHECKING:
    from ..evaluation.results import Result
    from ..evaluation.run import Evaluation

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure fidelity and control of models, with the paper's metrics. Every number is kept as JSON with its "
    "config, seed and file hashes; a broken-off command goes on where it was. On several GPUs: `accelerate launch "
    "--multi_gpu --no_python gcfg evaluate ...`, or torchrun with --no-python.",
)

# `\b` keeps the lines of the paragraph that follows it as they are.
_SETTINGS = "\b\nSettings of the config file, and of --set:\n" + "\n".join(
    f"  {name} = {default!r}\n      {text}" for name, default, text in fields()
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The evaluation's TOML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, for example fid.count=1000; repeatable."),
]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", metavar="NAME", help="Only this method of the config; repeatable."),
]


_TASKS: dict[Task, str] = {
    "fid": "Fidelity: FID of each method's unconditional images.",
    "alignment": "Control by text: how often the image shows the attribute in the prompt.",
    "canny": "Control by edges: how well the image keeps those of the ControlNet's condition.",
    "diversity": "How much the images of one prompt differ.",
}


def _add_task(task: Task, text: str) -> None:
    @app.command(task, epilog=_SETTINGS, help=text)
    def command(config: ConfigFile, overrides: Overrides = None, method: Methods = None) -> None:
        with _evaluation(config, overrides) as evaluation:
            _run(evaluation, (task,), method)


for _task, _text in _TASKS.items():
    _add_task(_task, _text)


@app.command("sweep", epilog=_SETTINGS)
def sweep_command(config: ConfigFile, overrides: Overrides = None) -> None:
    """FID and alignment for every pair of two terms' weights, and an image of each pair."""
    with _evaluation(config, overrides) as evaluation:
        _sweep(evaluation)


@app.command("tables", epilog=_SETTINGS)
def tables_command(config: ConfigFile, overrides: Overrides = None, method: Methods = None) -> None:
    """Everything: each task for each method, the sweep, and the report."""
    with _evaluation(config, overrides) as evaluation:
        _run(evaluation, TASKS, method)
        if evaluation.config.sweep.recipe:
            _sweep(evaluation)
        if evaluation.is_main:
            _report(evaluation.config)


@app.command("report", epilog=_SETTINGS)
def report_command(
    config: ConfigFile,
    overrides: Overrides = None,
    page: Annotated[
        Path | None,
        typer.Option(
            help="The Markdown file to write, a folder of its name beside it; else report.md in output.folder."
        ),
    ] = None,
    stages: Annotated[
        Path | None, typer.Option(help="JSON file {stage: seconds}: what the experiment took, for the page.")
    ] = None,
) -> None:
    """Write the page of tables and plots from the stored results; nothing is measured."""
    with one_sentence():
        _report(load_config(config, overrides or ()), page, stages)


@app.command("abtest", epilog=_SETTINGS)
def abtest_command(
    config: ConfigFile,
    overrides: Overrides = None,
    method: Methods = None,
    trials: Annotated[int, typer.Option(min=1, help="Choices for each task.")] = 20,
    count: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Count the choices in a file that the page saved.")
    ] = None,
) -> None:
    """Write a page on which your friends choose the best of the methods' images, or count their choices."""
    with one_sentence():
        settings = load_config(config, overrides or ())
        from ..evaluation import abtest

        folder = settings.output_folder / abtest.FOLDER
        if count:
            say(abtest.summary(abtest.win_rates(count, abtest.key_of(folder))).split("\n"))
            return
        _refuse_unknown(settings, method)
        shown = abtest.trials_of(settings, method or (), trials)
        say(str(abtest.write_page(shown, folder, settings.sampling.seed)))


@contextmanager
def _evaluation(config: Path, overrides: list[str] | None) -> Iterator[Evaluation]:
    with one_sentence():
        settings = load_config(config, overrides or ())
        try:
            from ..evaluation.run import Evaluation  # seconds of imports: not before --help is answered
        except ModuleNotFoundError as error:
            raise GuidanceError(
                f"gcfg evaluate needs {error.name}, which was not found; install it with: pip install "
                "'gcfg-guidance[evaluate]'"
            ) from error
        evaluation = Evaluation(settings)
        with evaluation.alone():
            yield evaluation


def _run(evaluation: Evaluation, tasks: Sequence[Task], methods: Sequence[str] | None) -> None:
    _refuse_unknown(evaluation.config, methods)
    for task in tasks:
        for method in methods or evaluation.config.methods:
            result = evaluation.run(task, method)
            if result and evaluation.is_main:
                say(_line(result))


def _sweep(evaluation: Evaluation) -> None:
    from ..evaluation.sweep import run_sweep

    result = run_sweep(evaluation)
    if evaluation.is_main:
        say(f"sweep: {len(result.search)} pairs of weights: {evaluation.folder / result.grid}")


def _report(config: Config, page: Path | None = None, stages: Path | None = None) -> None:
    from ..evaluation.report.folder import report

    say(str(report(config, page, stages)))


def _refuse_unknown(config: Config, methods: Sequence[str] | None) -> None:
    unknown = [name for name in methods or () if name not in config.methods]
    if unknown:
        known = ", ".join(repr(name) for name in config.methods) or "none"
        raise GuidanceError(f"--method {unknown[0]!r} is no method of the config, expected one of {known}.")


def _line(result: Result) -> str:
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in result.numbers.items())
    line = f"{result.task} of {result.title}: {numbers} ({result.count:,} images)"
    if not result.search:
        return line
    weights = ", ".join(f"{term['weight']:g}" for term in result.terms)
    return f"{line}; weights {weights}, of {len(result.search)} searched: {result.rule}"
