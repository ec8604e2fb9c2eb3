"""Components of a diffusers folder: their configuration and weight files, checked before a library opens them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...gcfg.errors import GuidanceError
from ...gcfg.safetensors_file import CONVERT, PICKLE_SUFFIXES, read_header

UNET_WEIGHTS = "diffusion_pytorch_model"  # also the VAE's
TEXT_WEIGHTS = "model"


def component(folder: Path, name: str, class_name: str | tuple[str, ...], source: str) -> Path:
    """Return the folder of a component, which may be `folder` itself.

    Args:
        folder: a diffusers folder.
        name: the component: "unet", "vae".
        class_name: what its config.json must say, one of them.
        source: start of every error: "model.checkpoint 'path'".

    Raises: GuidanceError: if it is not there or of another class.
    """
    place = folder / name if (folder / name).is_dir() else folder
    if not (place / "config.json").is_file():
        raise GuidanceError(
            f"{source} is a folder without '{name}/config.json', expected a diffusers folder or a .safetensors file."
        )
    found = read_json(place / "config.json", source).get("_class_name")
    classes = (class_name,) if isinstance(class_name, str) else class_name
    if found not in classes:
        expected = " or ".join(map(repr, classes))
        raise GuidanceError(f"{source} has a {name} of the class {found!r}, expected {expected}.")
    return place


def read_json(path: Path, source: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises: GuidanceError: if it is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GuidanceError(f"{source}: {path.name} cannot be read ({error}); download the folder again.") from error
    if not isinstance(values, dict):
        raise GuidanceError(f"{source}: {path.name} holds no settings; download the folder again.")
    return values


def weight_files(folder: Path, stem: str, source: str) -> tuple[str | None, list[Path]]:
    """Return the variant ("fp16", None for none) and the weight files of a component's folder.

    The full-precision files win where there are several variants.

    Raises: GuidanceError: if there are none, only pickles, or one that is cut short.
    """
    files = sorted(path for path in folder.glob(f"{stem}*.safetensors"))
    if not files:
        pickles = sorted(path for path in folder.glob("*") if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise GuidanceError(f"{source}: {folder.name}/{pickles[0].name} is a pickle; {CONVERT}")
        raise GuidanceError(f"{source}: {folder.name} has no '{stem}.safetensors'; download the folder again.")
    for path in files:
        read_header(path, f"{source}: {folder.name}/{path.name}")
    plain = [path for path in files if path.name == f"{stem}.safetensors" or path.name.startswith(f"{stem}-")]
    if plain:
        return None, plain
    variant = files[0].name.removeprefix(f"{stem}.").split(".")[0].split("-")[0]
    return variant, [path for path in files if path.name.startswith(f"{stem}.{variant}")]


def load_component(
    library_class: Any, folder: Path, stem: str, source: str, misfit: Callable[[str], GuidanceError]
) -> tuple[Any, list[str]]:
    """Read a component in float32 by a library's own class; return it, and the names of the weights that are missing.

    Raises: GuidanceError: see `weight_files`; or `misfit` of what the library says, if it cannot read the files.
    """
    variant, _ = weight_files(folder, stem, source)
    try:
        model, info = library_class.from_pretrained(
            str(folder), variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise misfit(first_line(error)) from error
    return model.float().eval(), sorted(info["missing_keys"])


def first_line(error: Exception) -> str:
    """Return what a library says on one line, cut to 200 characters."""
    return " ".join(str(error).split())[:200]
