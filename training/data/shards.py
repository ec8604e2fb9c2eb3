"""The cache of latents: safetensors shards that say themselves what they hold, and the trainer's view of them.

A shard holds, for its n good images in path order, what `vae.encode(image).latent_dist` gave, unscaled:

    mean, std                    (n, C, h, w) float16
    mean_flipped, std_flipped    the same of the mirrored image, in a cache with flips
    geometry                     (n, 4) int32: original height and width, crop top and left

and under `gcfg.cache` in its metadata the recipe and a record of every image, the broken ones too. There is no other
index: what the cache holds is what its shards say. A file `incomplete` beside them tells that `gcfg cache` is at work,
or was stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ...gcfg.errors import GuidanceError
from ...gcfg.safetensors_file import read_header
from ..files import whole_file
from .images import Fit, Geometry

VERSION = 1
KEY = "gcfg.cache"  # the only metadata key: safetensors writes several in random order
PATTERN = "shard-*.safetensors"
INCOMPLETE = "incomplete"
NAMES = ("mean", "std")
FLIPPED_NAMES = ("mean_flipped", "std_flipped")


@dataclass(frozen=True)
class Recipe:
    """What decides an image's latents: another recipe makes another cache."""

    vae: str
    resolution: int
    fit: Fit
    flips: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of a shard's latent tensors."""
        return NAMES + FLIPPED_NAMES if self.flips else NAMES


class Record(NamedTuple):
    """One image as it was when it was read.

    Attributes:
        path: below the images folder, with forward slashes.
        size, mtime_ns: of the file.
        sha256: of its content; "" if it could not be read.
        reason: why it is broken; "" if it is not.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str
    reason: str = ""


@dataclass(frozen=True)
class Shard:
    """What a shard says about itself: its good images in the order of its rows, and its broken ones."""

    path: Path
    recipe: Recipe
    entries: tuple[Record, ...]
    broken: tuple[Record, ...]
    shape: tuple[int, ...]  # of one latent: (C, h, w)

    @property
    def records(self) -> list[Record]:
        """All of its images, sorted by path."""
        return sorted(self.entries + self.broken)


def vae_fingerprint(vae: Any) -> str:
    """Return a sha256 of all that decides the latents of diffusers' AutoencoderKL.

    That is the encoder's names, shapes and values, and the scaling. The values are rounded to float16 on the CPU, so
    that a VAE gives one fingerprint as float32 and as float16 file, on any device; bfloat16 holds too few bits for
    that. The decoder does not count: exchanging it changes no latent.

    Raises: ValueError: for a VAE cast to bfloat16; take the fingerprint before the cast.
    """
    digest = hashlib.sha256()
    settings = ("scaling_factor", "shift_factor", "norm_num_groups", "act_fn")
    digest.update(json.dumps({name: vae.config.get(name) for name in settings}).encode())
    for name, value in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            if value.dtype == torch.bfloat16:
                raise ValueError("the fingerprint of a VAE in bfloat16, expected float32 or float16 weights")
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().to("cpu").to(torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


def shard_name(recipe: Recipe, paths: Sequence[str]) -> str:
    """Name a shard after its recipe and its images' paths, so that a repeated run writes to the same names."""
    digest = hashlib.sha256(json.dumps([VERSION, asdict(recipe), list(paths)]).encode())
    return PATTERN.replace("*", digest.hexdigest()[:16])


def write_shard(
    path: Path,
    recipe: Recipe,
    records: Sequence[Record],
    tensors: Mapping[str, Tensor],
    geometry: Sequence[Geometry],
) -> None:
    """Write a shard whole, or not at all.

    Args:
        path: its final name.
        recipe: how the latents were made.
        records: the good and the broken images.
        tensors: `recipe.names` to (n, C, h, w) float16, rows in the order of the good records.
        geometry: of the good images.

    Raises: GuidanceError: if the disk is full or the folder cannot be written.
    """
    about = {
        "version": VERSION,
        "recipe": asdict(recipe),
        "entries": [record[:4] for record in records if not record.reason],
        "broken": [record for record in records if record.reason],
    }
    rows = torch.tensor([*geometry], dtype=torch.int32).reshape(-1, 4)
    with whole_file(path) as beside:
        beside.write_bytes(save({**tensors, "geometry": rows}, {KEY: json.dumps(about)}))


def read_shard(path: Path) -> Shard:
    """Read what a shard holds, without its tensors.

    Raises: GuidanceError: if the shard is cut short or otherwise damaged, or of another version.
    """
    try:
        header = read_header(path, "")
    except GuidanceError as error:
        raise _damaged(path, "it is cut short, or no safetensors file") from error
    try:
        about = json.loads(header.metadata[KEY])
        version = about["version"]
        if version == VERSION:
            recipe = Recipe(**about["recipe"])
            entries = tuple(Record(*record) for record in about["entries"])
            broken = tuple(Record(*record) for record in about["broken"])
            shapes = {header.shapes[name] for name in recipe.names}
            geometry = header.shapes["geometry"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its metadata is incomplete ({error!r})") from error
    if version != VERSION:
        raise _damaged(path, f"its format is version {version}, expected {VERSION}")
    shape = shapes.pop()
    if shapes or len(shape) != 4 or shape[0] != len(entries) or geometry != (len(entries), 4):
        raise _damaged(path, f"its tensors do not fit its {len(entries)} entries")
    if recipe.fit not in get_args(Fit) or [*entries] != sorted(entries):
        raise _damaged(path, "its metadata is out of order")
    return Shard(path, recipe, entries, broken, shape[1:])


def find_shards(folder: Path) -> list[Path]:
    """Return the paths of a cache's shards, sorted by name."""
    return sorted(folder.glob(PATTERN))


class Latents:
    """A finished cache as one sequence, sorted by path; latents are read from the mapped files when asked for.

    Attributes:
        recipe: how the cache was made.
        shape: of one latent, (C, h, w).
        flips: whether the mirror images are there too.
        paths: of the images, below the images folder.
        fingerprint: sha256 over the recipe and every image's path and content, in order.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.recipe = shards[0].recipe
        channels, height, width = next(shard.shape for shard in shards if shard.entries)
        self.shape = channels, height, width
        self.flips = self.recipe.flips
        entries = sorted(
            (entry.path, entry.sha256, number, row)
            for number, shard in enumerate(shards)
            for row, entry in enumerate(shard.entries)
        )
        self.paths = [path for path, *_ in entries]
        self._places = [(number, row) for *_, number, row in entries]
        self._files = [shard.path for shard in shards]
        self._handles: dict[int, Any] = {}  # a mapped file costs no file descriptor, so all may stay open
        content = [asdict(self.recipe), [entry[:2] for entry in entries]]
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @classmethod
    def open(cls, folder: Path, recipe: Recipe) -> Latents:
        """Open a cache for training.

        Raises: GuidanceError: if there is none, or it is unfinished, empty, damaged, or made by another recipe.
        """
        source = f"data.cache {str(folder)!r}"
        paths = find_shards(folder)
        if not paths:
            raise GuidanceError(f"{source} holds no cached latents; run `gcfg cache CONFIG` first.")
        if (folder / INCOMPLETE).exists():
            raise GuidanceError(f"{source} is unfinished; run `gcfg cache CONFIG` again, it goes on where it stopped.")
        shards = [read_shard(path) for path in paths]
        for shard in shards:
            if difference := recipe_difference(shard.recipe, recipe):
                raise GuidanceError(
                    f"{source} was made {difference}; run `gcfg cache CONFIG` again, or change the config back."
                )
        count = sum(len(shard.entries) for shard in shards)
        if count == 0:
            raise GuidanceError(
                f"{source} holds no good image, expected at least one; see its quarantine.txt for what is wrong."
            )
        if len({shard.shape for shard in shards if shard.entries}) > 1:
            raise GuidanceError(
                f"{source} has shards of several shapes; delete the folder and run `gcfg cache CONFIG`."
            )
        latents = cls(shards)
        if len(set(latents.paths)) != count:
            raise GuidanceError(f"{source} holds an image twice; delete the folder and run `gcfg cache CONFIG` again.")
        return latents

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of image i, flipped or not, each (C, h, w) float32."""
        i, flipped = key
        mean, std = FLIPPED_NAMES if flipped else NAMES
        return self._row(i, mean).float(), self._row(i, std).float()

    def geometry(self, i: int) -> Geometry:
        """Return what SDXL's size conditioning is told of image i."""
        return Geometry(*self._row(i, "geometry").tolist())

    def _row(self, i: int, name: str) -> Tensor:
        number, row = self._places[i]
        handle = self._handles.get(number)
        if handle is None:
            handle = self._handles[number] = safe_open(str(self._files[number]), framework="pt")
        tensor: Tensor = handle.get_slice(name)[row]
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}  # mapped files do not travel to other processes


def recipe_difference(made: Recipe, wanted: Recipe, owner: str = "the config") -> str:
    """Say how a cache's recipe differs from the one its owner wants, or return ""."""
    if made.vae != wanted.vae:
        return f"with another VAE ({made.vae[:12]}; {owner} has {wanted.vae[:12]})"
    for name in ("resolution", "fit", "flips"):
        old, new = (str(getattr(recipe, name)).lower() for recipe in (made, wanted))
        if old != new:
            return f"with data.{name} = {old}, {owner} has {new}"
    return ""


def _damaged(path: Path, why: str) -> GuidanceError:
    return GuidanceError(
        f"The cache's file {str(path)!r} is damaged: {why}; delete it and run `gcfg cache CONFIG` again."
    )
