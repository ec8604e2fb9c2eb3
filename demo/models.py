"""The trained models of the world of emoji as files for any ComfyUI: `python -m comfyui_gcfg.demo.models MODELS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from ..testkit import models, small_world

# Where a file goes below ComfyUI's models folder -> what writes it.
FILES: dict[str, Callable[[Path], None]] = {
    "checkpoints/emoji-prior.safetensors": lambda path: models.save_checkpoint(
        path, small_world.prior(), models.to_dtype(small_world.vae(), torch.float16), small_world.clip()
    ),
    "diffusion_models/emoji-faces-3d.safetensors": lambda path: save_file(small_world.concept("face"), path),
    "diffusion_models/emoji-animals-3d.safetensors": lambda path: save_file(small_world.concept("animal"), path),
    "loras/emoji-faces-3d-lora.safetensors": lambda path: save_file(small_world.lora(), path),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def write(folder: Annotated[Path, typer.Argument(metavar="MODELS", help="ComfyUI's models folder.")]) -> None:
    """Write the prior, the two concepts and a LoRA into ComfyUI's models folder; files that are there stay."""
    if not folder.is_dir():
        typer.echo(f"Error: MODELS: expected ComfyUI's models folder, found no folder at {folder}; name it.", err=True)
        raise typer.Exit(1)
    for name, write_file in FILES.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            beside = path.with_name(f".{path.name}")  # a half-written file is not offered by any loader
            write_file(beside)
            beside.replace(path)
        typer.echo(path)


if __name__ == "__main__":
    app(prog_name="python -m comfyui_gcfg.demo.models")
