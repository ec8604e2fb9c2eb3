"""`gcfg cache`: every image through the VAE once.

    worker processes read, hash and decode -> the VAE encodes -> a thread writes shards, each whole or not at all

Several processes (accelerate launch, torchrun) share the shards among them. See cache_plan.py for what is done anew.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from ...gcfg.errors import GuidanceError
from ..files import remove_unfinished, whole_file
from ..processes import from_main, join_processes
from .cache_plan import Job, Plan, list_images, plan_cache, shares
from .decode import decoded_batches
from .images import Geometry
from .shards import INCOMPLETE, Recipe, Record, find_shards, read_shard, write_shard

QUARANTINE = "quarantine.txt"


@dataclass(frozen=True)
class CacheReport:
    """What a run of `gcfg cache` did.

    Attributes:
        encoded: good images encoded now.
        reused: good images whose latents were there already.
        broken: images that were skipped; quarantine.txt in the cache lists them.
        shards: files in the cache.
        seconds: of the whole run.
        images_per_second: encoded images per second of encoding, without planning.
    """

    encoded: int
    reused: int
    broken: int
    shards: int
    seconds: float
    images_per_second: float


def build_cache(
    images: Path,
    cache: Path,
    vae: Any,
    recipe: Recipe,
    *,
    shard_size: int = 512,
    batch_size: int = 8,
    workers: int = 2,
    progress: bool = True,
) -> CacheReport:
    """Bring a cache up to date with a folder of images; called by every process of a run.

    Args:
        images: folder of images, searched recursively.
        cache: folder of the shards; made if need be.
        vae: diffusers' AutoencoderKL in evaluation mode, on the device and in the dtype that shall encode.
        recipe: its fingerprint, taken before any cast, and how images are fitted.
        shard_size: images per new shard.
        batch_size: images the VAE takes at once; halved when memory runs out.
        workers: processes that decode images; 0: none.
        progress: whether the main process shows a bar.

    Raises: GuidanceError: if there are no images, the disk is full, memory does not hold one image, or the VAE gives
        NaN. What was finished before stays, and the next run goes on from there.
    """
    started = time.monotonic()
    state = join_processes()
    plan = from_main(lambda: _prepare(images, cache, recipe, shard_size, max(1, workers)))
    planned = time.monotonic()
    jobs = shares(plan.jobs, state.process_index, state.num_processes)
    encoder = _Encoder(vae, recipe, batch_size)
    todo = sum(len(job.todo) for job in jobs)
    bar = tqdm(
        total=todo,
        desc="caching" if state.num_processes == 1 else f"caching (process 1 of {state.num_processes})",
        unit="image",
        disable=not (todo and progress and state.is_main_process),
    )
    with _explaining_dead_workers(), bar:
        _run_jobs(jobs, images, cache, encoder, batch_size, workers, bar)
    state.wait_for_everyone()
    seconds = time.monotonic() - planned
    good, broken, shards = from_main(lambda: _finish(cache, plan))
    encoded = good - plan.reused
    return CacheReport(encoded, plan.reused, broken, shards, time.monotonic() - started, encoded / max(seconds, 1e-9))


def _prepare(images: Path, cache: Path, recipe: Recipe, shard_size: int, threads: int) -> Plan:
    states = list_images(images)
    remove_unfinished(cache)
    plan = plan_cache(images, states, cache, recipe, shard_size, threads)
    if plan.jobs or plan.stale:
        with whole_file(cache / INCOMPLETE) as marker:
            marker.write_text("`gcfg cache` is at work here, or was stopped; run it again to go on.\n")
    return plan


def _finish(cache: Path, plan: Plan) -> tuple[int, int, int]:
    """Remove what the new shards replace, report the broken images; return counts of good, broken and shards."""
    for path in plan.stale:
        path.unlink(missing_ok=True)
    shards = [read_shard(path) for path in find_shards(cache)]
    broken = sorted(record for shard in shards for record in shard.broken)
    report = cache / QUARANTINE
    if broken:
        lines = [f"{_one_line(record.path)}\t{record.reason}\n" for record in broken]
        with whole_file(report) as beside:
            beside.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    else:
        report.unlink(missing_ok=True)
    (cache / INCOMPLETE).unlink(missing_ok=True)
    return sum(len(shard.entries) for shard in shards), len(broken), len(shards)


@dataclass(frozen=True)
class _Fresh:
    """Images encoded now: their records by path, and of the good ones geometry and latents (C, h, w) by name."""

    records: dict[str, Record]
    geometry: dict[str, Geometry]
    latents: dict[str, dict[str, Tensor]]


def _run_jobs(
    jobs: list[Job], images: Path, cache: Path, encoder: _Encoder, batch_size: int, workers: int, bar: tqdm[None]
) -> None:
    groups = decoded_batches(images, [job.todo for job in jobs], encoder.recipe, batch_size, workers)
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as writer:  # left only when the shard in its hands is on the disk, or gone
        for job, batches in zip(jobs, groups, strict=True):
            fresh = _Fresh({}, {}, {})
            for batch in batches:
                good = [record for record in batch.records if not record.reason]
                fresh.records.update((record.path, record) for record in batch.records)
                fresh.geometry.update(zip((record.path for record in good), batch.geometry, strict=True))
                if good:
                    fresh.latents.update(encoder(batch.pixels, [record.path for record in good]))
                bar.update(len(batch.records))
            while len(pending) > 1:
                pending.popleft().result()
            pending.append(writer.submit(_write, job, cache, encoder.recipe, fresh))
        for future in pending:
            future.result()


def _write(job: Job, cache: Path, recipe: Recipe, fresh: _Fresh) -> None:
    """Put kept and fresh latents together and write the shard."""
    old = _kept_rows(job, recipe)
    records = [fresh.records.get(path) or job.kept[path] for path in job.paths]
    good = [record.path for record in records if not record.reason]
    latents = {**old.latents, **fresh.latents}
    geometry = {**old.geometry, **fresh.geometry}
    tensors = {
        name: torch.stack([latents[path][name] for path in good]) if good else torch.zeros(0, 0, 0, 0).half()
        for name in recipe.names
    }
    write_shard(cache / job.name, recipe, records, tensors, [geometry[path] for path in good])


def _kept_rows(job: Job, recipe: Recipe) -> _Fresh:
    kept = _Fresh({}, {}, {})
    if job.source is None:
        return kept
    with safe_open(str(job.source.path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in recipe.names}
        sizes = file.get_tensor("geometry").tolist()
        for row, entry in enumerate(job.source.entries):
            if entry.path in job.kept:
                kept.geometry[entry.path] = Geometry(*sizes[row])
                kept.latents[entry.path] = {name: tensor[row].clone() for name, tensor in tensors.items()}
    return kept


class _Encoder:
    """The VAE with a batch size that gives way when memory runs out."""

    def __init__(self, vae: Any, recipe: Recipe, batch_size: int) -> None:
        self.recipe = recipe
        self._vae = vae
        self._batch_size = batch_size

    def __call__(self, pixels: Tensor, paths: list[str]) -> dict[str, dict[str, Tensor]]:
        """Encode (b, h, w, 3) uint8 images; return each one's latents by path and name, (C, h, w) float16."""
        done: dict[str, dict[str, Tensor]] = {}
        while len(done) < len(paths):
            part = slice(len(done), len(done) + self._batch_size)
            try:
                latents = self._encode(pixels[part])
            except RuntimeError as error:
                if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                    raise
                size = min(self._batch_size, len(paths) - len(done))
                latents = None
            if latents is None:  # outside the handler, whose traceback holds the memory
                self._halve(size)
                continue
            for row, path in enumerate(paths[part]):
                done[path] = {name: tensor[row] for name, tensor in latents.items()}
                if not all(bool(tensor.isfinite().all()) for tensor in done[path].values()):
                    raise GuidanceError(
                        f"The VAE gives NaN or infinite latents for {path!r} in {str(self._vae.dtype)[6:]}; encode in "
                        "float32 or bfloat16 (SDXL's own VAE overflows in float16), or use another file for model.vae."
                    )
        return done

    def _encode(self, pixels: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode():
            # [0, 255] -> [-1, 1], as the VAE was trained
            x = pixels.to(self._vae.device).permute(0, 3, 1, 2).to(self._vae.dtype) / 127.5 - 1
            latents: list[Tensor] = []
            for view in (x, x.flip(-1)) if self.recipe.flips else (x,):
                distribution = self._vae.encode(view).latent_dist
                latents += [distribution.mean.half().cpu(), distribution.std.half().cpu()]
        return dict(zip(self.recipe.names, latents, strict=True))

    def _halve(self, failed: int) -> None:
        clear_device_cache(garbage_collection=True)
        if failed == 1:
            raise GuidanceError(
                f"Memory does not hold the VAE's work on one image of data.resolution = {self.recipe.resolution}; "
                "lower the resolution, or encode on a device with more memory."
            )
        self._batch_size = failed // 2


@contextmanager
def _explaining_dead_workers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise GuidanceError(
            "A process that decodes images was killed, most likely because memory ran out; lower data.workers, "
            "and run the same command again."
        ) from error


def _one_line(path: str) -> str:
    return path.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
