"""What `gcfg cache` has to do: the images of today compared with what the shards say they hold.

Every decision follows from the images and the shards alone, so a run that was killed goes on as if it had not been:
shards are named after what is in them, and one that is finished drops out of the plan without changing the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...gcfg.errors import GuidanceError
from ..files import sha256_of
from .images import find_images, unlistable
from .shards import Recipe, Record, Shard, find_shards, read_shard, shard_name


class FileState(NamedTuple):
    """What tells without reading it that a file is the one we knew."""

    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Job:
    """One shard to write.

    Attributes:
        name: the shard's file name.
        paths: its images, sorted.
        kept: the records that still hold; the latents of the good ones are copied from `source`.
        source: the shard that held these images before, if any.
    """

    name: str
    paths: tuple[str, ...]
    kept: Mapping[str, Record]
    source: Shard | None

    @property
    def todo(self) -> list[str]:
        """The images to read and encode."""
        return [path for path in self.paths if path not in self.kept]

    @property
    def done(self) -> bool:
        """Whether the shard is there already, as it should be."""
        source = self.source
        return source is not None and source.path.name == self.name and source.records == sorted(self.kept.values())


@dataclass(frozen=True)
class Plan:
    """Shards to write, files to remove once these are written, and how many latents are kept or copied."""

    jobs: tuple[Job, ...]
    stale: tuple[Path, ...]
    reused: int


def file_state(path: Path) -> FileState:
    """Return a file's state, a dangling link's own where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        status = os.lstat(path)
    return FileState(status.st_size, status.st_mtime_ns)


def list_images(folder: Path) -> dict[str, FileState]:
    """Return the state of every image below a folder, by relative path, sorted.

    Raises: GuidanceError: if the folder is not there, cannot be listed, or holds no image.
    """
    if not folder.is_dir():
        raise GuidanceError(
            f"data.images {str(folder)!r} was not found, expected a folder of images; correct the path."
        )
    try:
        states = {path.relative_to(folder).as_posix(): file_state(path) for path in find_images(folder)}
    except OSError as error:
        raise unlistable(f"data.images {str(folder)!r}", error) from error
    if not states:
        raise GuidanceError(
            f"data.images {str(folder)!r} holds no image, expected .jpg, .jpeg, .png or .webp files; correct the path."
        )
    return states


def content_digest(path: Path) -> str:
    """Return the sha256 of a file's content, or "" if it cannot be read."""
    try:
        return sha256_of(path)
    except OSError:
        return ""


def plan_cache(
    images: Path, states: Mapping[str, FileState], cache: Path, recipe: Recipe, shard_size: int, threads: int = 4
) -> Plan:
    """Compare the images with the shards.

    A shard whose images are all there and unchanged stays. One with changed, touched or missing images is written anew
    with those that are left, its good latents copied. Images in no shard make new shards of `shard_size`, by path.

    Args:
        images: the images folder.
        states: its images, from `list_images`.
        cache: the cache folder.
        recipe: how latents are to be made; shards of another recipe are stale.
        shard_size: images in a new shard.
        threads: files that are hashed at once, where the state alone does not tell.
    """
    shards = [shard for path in find_shards(cache) if (shard := _readable(path)) and shard.recipe == recipe]
    # After a crash a shard may stand beside the complete one that took over what is left of it: that one has it.
    shards.sort(key=lambda shard: (any(r.path not in states for r in shard.records), shard.path.name))
    holds = _unchanged(images, [record for shard in shards for record in shard.records], states, threads)
    taken: set[str] = set()
    jobs: list[Job] = []
    for shard in shards:
        left = [record for record in shard.records if record.path in states and record.path not in taken]
        if members := tuple(record.path for record in left):
            taken.update(members)
            kept = {r.path: r._replace(**states[r.path]._asdict()) for r in left if r in holds}
            jobs.append(Job(shard_name(recipe, members), members, kept, shard))
    new = [path for path in states if path not in taken]
    for start in range(0, len(new), shard_size):
        members = tuple(new[start : start + shard_size])
        jobs.append(Job(shard_name(recipe, members), members, {}, None))
    names = {job.name for job in jobs}
    return Plan(
        jobs=tuple(job for job in jobs if not job.done),
        stale=tuple(path for path in find_shards(cache) if path.name not in names),
        reused=sum(not record.reason for job in jobs for record in job.kept.values()),
    )


def _readable(path: Path) -> Shard | None:
    try:
        return read_shard(path)
    except GuidanceError:  # damaged, or of another version: made anew
        return None


def _unchanged(images: Path, records: Iterable[Record], states: Mapping[str, FileState], threads: int) -> set[Record]:
    """Return the records whose file still has the content they tell of; reads the files only where in doubt."""
    holds: set[Record] = set()
    doubtful: list[Record] = []
    for record in records:
        state = states.get(record.path)
        if state is None:
            continue
        # A file that could not be read (it has no hash) may have become readable without any change to it.
        if record.sha256 and state == (record.size, record.mtime_ns):
            holds.add(record)
        elif state.size == record.size:
            doubtful.append(record)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        digests = pool.map(lambda record: content_digest(images / record.path), doubtful)
        holds.update(record for record, digest in zip(doubtful, digests, strict=True) if digest == record.sha256)
    return holds
