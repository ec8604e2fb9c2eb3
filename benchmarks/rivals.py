"""Another node pack's guider on the same step, where the user has one and names its folder."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import Any

import comfy.samplers

from ..testkit.errors import CommandError
from .bench import SCALE, Bench
from .cases import OTHER, Case, Part, gcfg

OURS = "rival_sum"

# Nodes whose equation is ours under these settings, so that the results can be compared too.
_KNOWN: dict[str, tuple[dict[str, Any], tuple[Part, ...]]] = {
    # github.com/xmarre/ComfyUI-AutoGuidance; w = cfg - 1, a = w_autoguide - 1:
    # D_0 + (1 + (1 - a) w) (D_1 - D_0) + a w (D_1 - D_bad) = D_0 + cfg (D_1 - D_0) - a w (D_bad - D_0)
    "AutoGuidanceCFGGuider": (
        {
            "swap_mode": "dual_models_2x_vram",
            "ag_combine_mode": "multi_guidance_paper",
            "w_autoguide": 1 + OTHER / (SCALE - 1),
            "debug_swap": False,
            "debug_metrics": False,
        },
        (Part("prior", 1, SCALE), Part("concept", 1, -OTHER)),
    ),
}


@dataclass
class Sockets:
    """The inputs of a node, filled as their types ask, and the predictions that follow from it.

    Attributes:
        values: what to give each input; asked of the models when they are there.
        models: the models that it takes.
        prompts: how many texts it takes beside the unconditional one.
    """

    values: dict[str, Callable[[Bench], Any]] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)
    prompts: int = 0

    @property
    def parts(self) -> tuple[Part, ...]:
        """The terms of ours that make the same predictions: every text on the prior, the first on the concept UNet."""
        texts = tuple(Part("prior", seed, OTHER if seed > 1 else SCALE) for seed in range(1, max(self.prompts, 1) + 1))
        return texts + tuple(Part(name, 1) for name in self.models[1:])

    def model(self) -> Callable[[Bench], Any]:
        """The next model: the prior, then the concept UNet."""
        left = [name for name in ("prior", "concept") if name not in self.models]
        if not left:
            raise CommandError("--rival: its node takes more than two models, which is more than can be filled here.")
        self.models.append(left[0])
        return attrgetter(left[0])

    def conditioning(self, name: str) -> Callable[[Bench], Any]:
        """The unconditional prompt for a negative input, else the next text."""
        if "neg" in name or "uncond" in name:
            return methodcaller("prompt", 0)
        self.prompts += 1
        return methodcaller("prompt", self.prompts)


def cases(folder: Path, node: str | None, widgets: Sequence[str]) -> tuple[Case, Case]:
    """The same predictions made by us, and the rival.

    Args:
        folder: of the node pack.
        node: the id of its node; None if only one gives a GUIDER.
        widgets: settings as "name=value".

    Raises:
        CommandError: if the pack cannot be loaded or the node not be filled.
    """
    nodes = _load(folder)
    name = _choose(nodes, node, folder)
    settings, parts = _KNOWN.get(name, ({}, ()))
    sockets = Sockets()
    _fill(sockets, nodes[name], name, {**settings, **_typed(nodes[name], name, widgets)})
    parts = parts or sockets.parts

    def make(bench: Bench, _: tuple[Part, ...]) -> Any:
        return _guider(bench, nodes[name], {key: value(bench) for key, value in sockets.values.items()})

    rival = Case("rival", f"{folder.resolve().name}, {name}", parts, make, peer_of=OURS)
    return Case(OURS, "GCFG, the predictions of the next row", parts, gcfg), rival


def _load(folder: Path) -> dict[str, Any]:
    """Import a node pack as ComfyUI does; return its nodes."""
    name = str(folder.resolve()).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    if spec is None or spec.loader is None or not (folder / "__init__.py").is_file():
        raise CommandError(f"--rival {folder}: expected the folder of a ComfyUI node pack, found no __init__.py in it.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CommandError(
            f"--rival {folder}: this ComfyUI cannot import it ({error!r}); try a newer ComfyUI."
        ) from error
    nodes: dict[str, Any] = getattr(module, "NODE_CLASS_MAPPINGS", {})
    return nodes


def _choose(nodes: Mapping[str, Any], node: str | None, folder: Path) -> str:
    usable = {name: kind.RETURN_TYPES for name, kind in nodes.items() if {"GUIDER", "MODEL"} & {*kind.RETURN_TYPES}}
    guiders = [name for name, types in usable.items() if "GUIDER" in types]
    chosen = guiders[0] if node is None and len(guiders) == 1 else node
    if chosen is None or chosen not in usable:
        raise CommandError(
            f"--rival-node {node or 'is missing'}: expected the id of a node of {folder.resolve().name} that gives a "
            f"GUIDER or a MODEL, of which it has {', '.join(sorted(usable)) or 'none'}."
        )
    return chosen


def _inputs(kind: Any) -> Iterator[tuple[str, Any, dict[str, Any], bool]]:
    """Name, type, options, and whether it is required, of every input."""
    for group in ("required", "optional"):
        for name, (type_, *rest) in kind.INPUT_TYPES().get(group, {}).items():
            yield name, type_, rest[0] if rest else {}, group == "required"


def _typed(kind: Any, node: str, widgets: Sequence[str]) -> dict[str, Any]:
    types = {name: type_ for name, type_, _, _ in _inputs(kind)}
    read: dict[str, Callable[[str], Any]] = {
        "FLOAT": float,
        "INT": int,
        "BOOLEAN": lambda text: text.lower() in ("true", "1", "yes"),
    }
    values = {}
    for widget in widgets:
        name, equals, text = widget.partition("=")
        if not equals or name not in types:
            raise CommandError(
                f"--rival-set {widget}: expected NAME=VALUE with an input of {node}: {', '.join(types)}."
            )
        values[name] = read.get(str(types[name]), str)(text)
    return values


def _fill(sockets: Sockets, kind: Any, node: str, settings: Mapping[str, Any]) -> None:
    for name, type_, options, required in _inputs(kind):
        if name not in settings and type_ in ("MODEL", "CONDITIONING"):
            sockets.values[name] = sockets.model() if type_ == "MODEL" else sockets.conditioning(name)
        elif name in settings or name == "cfg" or "default" in options:
            sockets.values[name] = _always(settings.get(name, SCALE if name == "cfg" else options.get("default")))
        elif isinstance(type_, (list, tuple)):
            sockets.values[name] = _always(type_[0])
        elif required:
            raise CommandError(f"--rival: the input {name} of {node} is a {type_}, which cannot be filled here.")


def _always(value: Any) -> Callable[[Bench], Any]:
    return lambda _: value


def _guider(bench: Bench, kind: Any, values: Mapping[str, Any]) -> Any:
    """The node's guider, or stock guidance of the model that it patches."""
    out = dict(zip(kind.RETURN_TYPES, getattr(kind(), kind.FUNCTION)(**values), strict=False))
    if "GUIDER" in out:
        return out["GUIDER"]
    guider = comfy.samplers.CFGGuider(out["MODEL"])
    guider.set_conds(bench.prompt(1), bench.prompt(0))
    guider.set_cfg(SCALE)
    return guider
