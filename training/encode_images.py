"""`gcfg cache`: the images and the VAE of a config, brought together."""

from __future__ import annotations

from pathlib import Path

from ..gcfg.errors import GuidanceError
from .config import Config
from .data.cache import QUARANTINE, CacheReport, build_cache
from .material import read_prior, read_vae, recipe
from .processes import alone_in, join_processes


def encode_images(config: Config) -> CacheReport:
    """Bring the cache up to date with the images; called by every process of a run.

    Raises: GuidanceError: one sentence; what was encoded before stays.
    """
    data = config.data
    if not data.images:
        raise GuidanceError("data.images is not set, expected a folder of images; set it.")
    vae = read_vae(read_prior(config), config)
    cache = Path(data.cache)
    device = join_processes().device
    with alone_in(cache, "data.cache"):
        return build_cache(
            Path(data.images),
            cache,
            vae.to(device),
            recipe(vae, config),
            shard_size=data.shard_size,
            batch_size=data.encode_batch_size,
            workers=data.workers,
        )


def summary(report: CacheReport, config: Config) -> str:
    """Return what the command prints."""
    text = (
        f"{report.encoded:,} images encoded, {report.reused:,} kept, in {report.shards:,} files: {config.data.cache} "
        f"({report.seconds:.1f} s, {report.images_per_second:.1f} images per second)"
    )
    broken = f"\n{report.broken:,} broken images were skipped: {Path(config.data.cache) / QUARANTINE}"
    return text + (broken if report.broken else "")
