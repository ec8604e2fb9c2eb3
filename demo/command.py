"""The demo command: start a real ComfyUI, run the shared workflows, write images and a contact sheet."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ..testkit import model_files, pictures, prompts, small_world
from ..testkit.client import Client, Progress, Prompt
from ..testkit.comfyui import PACK, find_comfyui, uses_cpu
from ..testkit.errors import CommandError
from ..testkit.model_files import CONCEPT, PRIOR
from ..testkit.server import Server
from ..testkit.workflow import problems, refusing_nodes, to_prompt, unknown_nodes
from .digits import WORKFLOW as DIGITS
from .digits import digit_sheet
from .sheet import Entry, contact_sheet, side_by_side

WORKFLOWS = PACK / "workflows"
SMALL_STEPS = 20  # with the small models; with MODEL= the workflow's own


@dataclass(frozen=True)
class Job:
    """A workflow of the demo, ready to be queued."""

    name: str
    prompt: Prompt


def choose(only: list[str]) -> list[Path]:
    """Return the workflow files to run. Raises: CommandError: if a name is not one of them."""
    found = {path.stem: path for path in sorted(WORKFLOWS.glob("*.json"))}
    unknown = [name for name in only if name not in found]
    if unknown:
        raise CommandError(f"--only {unknown[0]}: no such workflow; choose from {', '.join(found)}.")
    return [found[name] for name in only] if only else list(found.values())


def use_own(folder: Path, model: Path, concept: Path | None) -> dict[str, str]:
    """Link the user's files into a ComfyUI `models/` folder and return the workflows' names -> their names.

    Raises: CommandError: if a file is missing.
    """
    names = {}
    for variable, kind, usual, path in (("MODEL", "checkpoints", PRIOR, model), ("CONCEPT", "unet", CONCEPT, concept)):
        if path is None:
            continue
        if not path.is_file():
            raise CommandError(f"{variable}: expected an SD1.5 file, found none at {path}; correct the path.")
        link = folder / kind / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(path.resolve())
        except OSError:  # Windows without developer mode
            link.hardlink_to(path.resolve())
        names[usual] = path.name
    return names


def renamed(prompt: Prompt, names: dict[str, str]) -> Prompt:
    """Return the prompt with the file names replaced."""
    return {
        node: {
            **entry,
            "inputs": {k: names.get(v, v) if isinstance(v, str) else v for k, v in entry["inputs"].items()},
        }
        for node, entry in prompt.items()
    }


def prepare(
    client: Client, paths: list[Path], own: dict[str, str] | None, size: int | None, steps: int | None
) -> list[Job]:
    """Convert the workflows for this server, leaving out those whose files or nodes it lacks, or is too old for."""
    jobs = []
    for path in paths:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        unknown = unknown_nodes(workflow, client.object_info)
        if unknown:
            print(f"skipped {path.stem}: this ComfyUI has no node {', '.join(unknown)}")
            continue
        refusing = refusing_nodes(workflow, client.object_info)
        if refusing:
            print(f"skipped {path.stem}: this ComfyUI is too old for {', '.join(refusing)}")
            continue
        prompt = prompts.shrunk(to_prompt(workflow, client.object_info), size, steps)
        if own is None:
            prompt = prompts.translated(prompt)
        missing = prompts.files_of(prompt) - set(model_files.NAMES if own is None else own)
        wrong = problems(workflow, client.object_info, files=own is None and not missing)
        if wrong:
            raise CommandError(f"{path.name} does not fit this ComfyUI: {wrong[0]}")
        if missing:
            print(f"skipped {path.stem}: it also needs {', '.join(sorted(missing))}")
            continue
        jobs.append(Job(path.stem, renamed(prompt, own or {})))
    return jobs


def execute(client: Client, job: Job, output: Path) -> Entry:
    """Run one workflow with a progress bar and save its images as `output/<image>.png`."""
    with tqdm(total=1, desc=job.name, unit="step", file=sys.stderr, leave=False) as bar:
        node: str | None = None

        def show(progress: Progress) -> None:
            nonlocal node
            if progress.node != node:  # the next sampler of the workflow
                node = progress.node
                bar.reset(progress.total)
            bar.update(progress.done - bar.n)

        run = client.run(job.prompt, show)
    if not run.images:
        raise CommandError(f"{job.name}: the prompt ended without an image; look at the server's log.")
    images = []
    for reference in run.images:
        stem = reference["filename"].rsplit("_", 2)[0]
        path = output / f"{stem}.png"
        path.write_bytes(client.image(reference))
        images.append((stem.removeprefix(job.name).lstrip("-"), path))
    thumbnail = output / "thumbnails" / f"{job.name}.jpg"  # as workflows/ has them
    thumbnail.parent.mkdir(exist_ok=True)
    side_by_side([path for _, path in images]).save(thumbnail, quality=88)
    print(f"{job.name}: {run.seconds:.1f} s")
    return Entry(job.name, tuple(images), run.seconds)


def draw_digits(client: Client, job: Job, output: Path) -> None:
    """Run one workflow for ten prompts in three ways, and save the sheet as `output/digits.png`."""
    with tempfile.TemporaryDirectory() as folder, tqdm(total=30, desc="digits", unit="image", leave=False) as bar:

        def run(prompt: Prompt) -> Path:
            path = Path(folder) / f"{bar.n}.png"
            path.write_bytes(client.image(client.run(prompt).images[0]))
            bar.update()
            return path

        digit_sheet(job.prompt, run).save(output / "digits.png")
    print(f"digits: {output / 'digits.png'}")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def demo(
    only: Annotated[list[str] | None, typer.Option(help="Run this workflow only; may be given several times.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the images and the contact sheet.")] = Path("output"),
    cache: Annotated[Path, typer.Option(help="Folder for the small models and the server's files.")] = Path(
        ".cache/demo"
    ),
    port: Annotated[int | None, typer.Option(help="Port of the server; a free one if not given.")] = None,
    size: Annotated[int | None, typer.Option(help="Largest width and height; 64 for the small models.")] = None,
    steps: Annotated[int | None, typer.Option(help="Most sampling steps; 20 for the small models.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    model: Annotated[
        Path | None, typer.Option(envvar="MODEL", help="Your SD1.5 checkpoint, used instead of the small models.")
    ] = None,
    concept: Annotated[
        Path | None, typer.Option(envvar="CONCEPT", help="Your SD1.5 concept UNet, to go with --model.")
    ] = None,
) -> None:
    """Start a real ComfyUI and run the shared workflows; COMFYUI_PATH names another ComfyUI than the pip-packaged one.

    Without --model the models are those of a small world, which reproduction/ trains: its prior prints digits in many
    colours, its concept is real handwriting. The small SDXL is untrained.
    """
    started = time.monotonic()
    if concept and not model:
        raise CommandError("CONCEPT needs MODEL, the SD1.5 checkpoint that it was trained from.")
    paths = choose(only or [])
    work = (cache / ("own" if model else "small")).resolve()
    if model:
        own: dict[str, str] | None = use_own(work / "models", model, concept)
    else:
        own, size, steps = None, size or small_world.SIZE, steps or SMALL_STEPS
        model_files.make_small_models(work / "models", print)
    if model:
        pictures.write_inputs(work / "input", size or 512)
    else:
        small_world.write_inputs(work / "input")
    output.mkdir(parents=True, exist_ok=True)
    comfyui = find_comfyui()
    server = Server(work, port, comfyui, uses_cpu(device))
    print(f"Starting ComfyUI ({comfyui or 'pip-packaged'}) on port {server.port} ...")
    with server:
        print(f"ready after {server.start_seconds:.1f} s")
        jobs = prepare(server.client, paths, own, size, steps)
        entries = [execute(server.client, job, output) for job in jobs]
        for job in jobs if own is None else ():
            if job.name == DIGITS:
                draw_digits(server.client, job, output)
    if not entries:
        raise CommandError("No workflow could be run with these files; give CONCEPT too, or leave MODEL out.")
    sheet = output / "contact-sheet.png"
    models = model.name if model else "the models of a small world of digits; SDXL is untrained"
    contact_sheet(entries, f"GCFG for ComfyUI with {models}").save(sheet)
    count = sum(len(entry.images) for entry in entries)
    print(f"\n{len(entries)} workflows, {count} images in {time.monotonic() - started:.0f} s:")
    for entry in entries:
        print(f"  {entry.workflow:32} {entry.seconds:6.1f} s   {', '.join(str(path) for _, path in entry.images)}")
    print(f"Contact sheet: {sheet}")
