"""`gcfg cache`: every image through the VAE once.

    worker processes read, hash and decode -> the VAE encodes -> a thread writes shards, each whole or not at all

Several processes (accelerate launch, torchrun) share the shards among them. See cache_plan.py for what is done anew.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from .cache_plan import Job, Plan, list_images, plan_cache
from .decode import Decoded, decoded_batches
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

    def lines(self, cache: str) -> list[str]:
        """Return what the command prints of the folder `cache`."""
        text = (
            f"{self.encoded:,} images encoded, {self.reused:,} kept, in {self.shards:,} files: {cache} "
            f"({self.seconds:.1f} s, {self.images_per_second:.1f} images per second)"
        )
        broken = f"{self.broken:,} broken images were skipped: {Path(cache) / QUARANTINE}"
        return [text, broken] if self.broken else [text]


def build_cache(
    images: Path,
    cache: Path,
    vae: Any,
    recipe: Recipe,
    *,
    shard_size: int,
    batch_size: int,
    workers: int,
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

    Raises: GuidanceError: if there are no images, the disk is full, memory does not hold one image, or the VAE gives
        NaN. What was finished before stays, and the next run goes on from there.
    """
    started = time.monotonic()
    state = join_processes()
    plan = from_main(lambda: _prepare(images, cache, recipe, shard_size, max(1, workers)))
    planned = time.monotonic()
    jobs = plan.jobs[state.process_index :: state.num_processes]
    encoder = _Encoder(vae, recipe, batch_size)
    todo = sum(len(job.todo) for job in jobs)
    bar = tqdm(
        total=todo,
        desc="caching" if state.num_processes == 1 else f"caching (process 1 of {state.num_processes})",
        unit="image",
        disable=not (todo and state.is_main_process),
    )
    try:
        with bar:
            _run_jobs(jobs, images, cache, encoder, batch_size, workers, bar)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise GuidanceError(
            "A process that decodes images was killed, most likely because memory ran out; lower data.workers, "
            "and run the same command again."
        ) from error
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
class _Row:
    """An image in a shard; of a good one geometry and latents too: (N, C, h, w) float16, N as in `Recipe.names`."""

    record: Record
    geometry: Geometry | None = None
    latents: Tensor | None = None


def _run_jobs(
    jobs: Sequence[Job], images: Path, cache: Path, encoder: _Encoder, batch_size: int, workers: int, bar: tqdm[None]
) -> None:
    groups = decoded_batches(images, [job.todo for job in jobs], encoder.recipe, batch_size, workers)
    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as writer:  # left only when the shard in its hands is on the disk, or gone
        for job, batches in zip(jobs, groups, strict=True):
            fresh: dict[str, _Row] = {}
            for batch in batches:
                fresh.update((row.record.path, row) for row in encoder(batch))
                bar.update(len(batch))
            while len(pending) > 1:
                pending.popleft().result()
            pending.append(writer.submit(_write, job, cache, encoder.recipe, fresh))
        for future in pending:
            future.result()


def _write(job: Job, cache: Path, recipe: Recipe, fresh: Mapping[str, _Row]) -> None:
    """Put kept and fresh latents together and write the shard."""
    known = {**_kept_rows(job, recipe), **fresh}
    rows = [known[path] for path in job.paths]
    latents = [row.latents for row in rows if row.latents is not None]
    stacked = torch.stack(latents, dim=1) if latents else torch.zeros(len(recipe.names), 0, 0, 0, 0).half()
    geometry = [row.geometry for row in rows if row.geometry is not None]
    tensors = dict(zip(recipe.names, stacked, strict=True))
    write_shard(cache / job.name, recipe, [row.record for row in rows], tensors, geometry)


def _kept_rows(job: Job, recipe: Recipe) -> dict[str, _Row]:
    rows = {path: _Row(record) for path, record in job.kept.items()}
    if job.source is None:
        return rows
    with safe_open(str(job.source.path), framework="pt") as file:
        latents = torch.stack([file.get_tensor(name) for name in recipe.names], dim=1)
        sizes = file.get_tensor("geometry").tolist()
    for entry, size, values in zip(job.source.entries, sizes, latents, strict=True):
        if entry.path in job.kept:
            rows[entry.path] = _Row(job.kept[entry.path], Geometry(*size), values)
    return rows


class _Encoder:
    """The VAE with a batch size that gives way when memory runs out."""

    def __init__(self, vae: Any, recipe: Recipe, batch_size: int) -> None:
        self.recipe = recipe
        self._vae = vae
        self._batch_size = batch_size

    def __call__(self, batch: Sequence[Decoded]) -> list[_Row]:
        """Encode the good images of a batch."""
        good = [image for image in batch if image.pixels is not None]
        rows = [_Row(image.record) for image in batch if image.pixels is None]
        while good:
            part = good[: self._batch_size]
            try:
                latents = self._encode(torch.stack([image.pixels for image in part]))  # type: ignore[misc]
            except RuntimeError as error:
                if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                    raise
                latents = None
            if latents is None:  # outside the handler, whose traceback holds the memory
                self._halve(len(part))
                continue
            for image, values in zip(part, latents, strict=True):
                if not values.isfinite().all():
                    raise GuidanceError(
                        f"The VAE gives NaN or infinite latents for {image.record.path!r} in "
                        f"{str(self._vae.dtype)[6:]}; encode in float32 or bfloat16 (SDXL's own VAE overflows in "
                        "float16), or use another file for model.vae."
                    )
                rows.append(_Row(image.record, image.geometry, values))
            good = good[len(part) :]
        return rows

    def _encode(self, pixels: Tensor) -> Tensor:
        """Return the latents of (b, h, w, 3) uint8 images, (b, N, C, h / 8, w / 8) float16, on the CPU."""
        with torch.inference_mode():
            # [0, 255] -> [-1, 1], as the VAE was trained
            x = pixels.to(self._vae.device).permute(0, 3, 1, 2).to(self._vae.dtype) / 127.5 - 1
            latents: list[Tensor] = []
            for view in (x, x.flip(-1)) if self.recipe.flips else (x,):
                distribution = self._vae.encode(view).latent_dist
                latents += [distribution.mean.half().cpu(), distribution.std.half().cpu()]
            return torch.stack(latents, dim=1)

    def _halve(self, failed: int) -> None:
        clear_device_cache(garbage_collection=True)
        if failed == 1:
            raise GuidanceError(
                f"Memory does not hold the VAE's work on one image of data.resolution = {self.recipe.resolution}; "
                "lower the resolution, or encode on a device with more memory."
            )
        self._batch_size = failed // 2


def _one_line(path: str) -> str:
    return path.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
