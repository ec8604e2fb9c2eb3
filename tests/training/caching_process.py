"""Run `build_cache` in real processes that can be killed; test_cache.py starts this file.

    caching_process.py build IMAGES CACHE            once; under torchrun in every process
    caching_process.py kill IMAGES CACHE FOLDER...   killed and started again in each folder, a copy of CACHE

The VAE is a stand-in of two layers, so that the processes need not import diffusers.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from comfyui_gcfg.training.data.cache import build_cache
from comfyui_gcfg.training.data.shards import Recipe, find_shards, vae_fingerprint

SHARD_SIZE, BATCH_SIZE = 4, 3


class Vae(torch.nn.Module):
    """What build_cache asks of diffusers' AutoencoderKL."""

    config = {"scaling_factor": 0.5}
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.count = 0
        self.encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 8, 8), torch.nn.Conv2d(32, 8, 3, padding=1))

    def encode(self, x):
        self.count += len(x)
        mean, std = self.encoder(x).chunk(2, 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=std.abs()))


def build(images, folder, workers=0):
    vae = Vae().eval()
    recipe = Recipe(vae_fingerprint(vae), 64, "centre_crop", True)
    report = build_cache(
        Path(images),
        Path(folder),
        vae,
        recipe,
        shard_size=SHARD_SIZE,
        batch_size=BATCH_SIZE,
        workers=workers,
    )
    print(f"{report}\nencoded here: {vae.count}\n", end="", flush=True)


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def kill_me(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(path, data):
    real_write(path, data[: len(data) // 2])
    kill_me()


def die_at(point, number):
    """Patch this process so that it kills itself at the given pass of a point."""
    passes = iter(range(1000))

    def dying(real, last):
        return lambda *a, **k: (last if next(passes) == number else real)(*a, **k)

    if point == "half-written":
        Path.write_bytes = dying(real_write, half_written)
    elif point == "not renamed":
        Path.replace = dying(Path.replace, kill_me)
    elif point == "not removed":
        Path.unlink = dying(Path.unlink, kill_me)


real_write = Path.write_bytes


def killed_run(images, folder, workers, seconds=None, point=None, number=0):
    """Start caching in a child process, kill -9 it, return whether it had finished before."""
    child = os.fork()
    if child == 0:
        os.setpgrp()  # its decoding processes die with it
        if point:
            die_at(point, number)
        try:
            build(images, folder, workers)
        finally:
            os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        for kill, who in ((os.killpg, child), (os.kill, child)):
            try:
                kill(who, signal.SIGKILL)
            except ProcessLookupError:
                continue
    return os.waitpid(child, 0)[1] == 0


def check_whole(folder, allowed):
    """Every file under a final name is whole at any time: one of the old or one of the new ones."""
    for path in find_shards(Path(folder)):
        assert path.read_bytes() in allowed[path.name], f"{path.name} is half-written"


def kill(images, before, folders):
    reference = Path(folders[0]).with_name("unbroken")
    shutil.copytree(before, reference)
    start = time.monotonic()
    build(images, reference)
    whole = time.monotonic() - start
    expected = content(reference)
    allowed = {}
    for files in (content(before), expected):
        for name, data in files.items():
            allowed.setdefault(name, []).append(data)
    draw = random.Random(0)
    points = [(p, n) for p, last in (("half-written", 3), ("not renamed", 5), ("not removed", 3)) for n in range(last)]
    kills = finished = 0
    for number, folder in enumerate(folders):
        shutil.copytree(before, folder)
        done = False
        for _ in range(6):
            done = killed_run(images, folder, workers=number % 2, seconds=draw.uniform(0.02, 0.6 * whole))
            kills += not done
            check_whole(folder, allowed)
            if done:
                break
        finished += done
        build(images, folder)
        assert content(folder) == expected, f"{folder}: {sorted(content(folder))}, expected {sorted(expected)}"
    for point, number in points:
        folder = Path(folders[0]).with_name(f"at {point} {number}")
        shutil.copytree(before, folder)
        assert not killed_run(images, folder, 0, point=point, number=number), f"never came to {point} {number}"
        check_whole(folder, allowed)
        build(images, folder)
        assert content(folder) == expected, f"killed at {point!r} {number}: {sorted(content(folder))}"
    print(f"kills: {kills} random, {len(points)} at chosen points, {finished} finished, unbroken {whole:.2f} s")


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(*sys.argv[2:4])
    else:
        kill(sys.argv[2], sys.argv[3], sys.argv[4:])
