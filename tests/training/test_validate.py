"""`gcfg validate`'s report of image folders and caches."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.training.data.images import Geometry
from comfyui_gcfg.training.data.shards import INCOMPLETE, Recipe, Record, shard_name, write_shard
from comfyui_gcfg.training.data.validate import SHOWN, validate
from PIL import Image

RECIPE = Recipe("ab" * 32, 64, "resize", True)


def save(path, size=(100, 80), form=None, value=0, mode="RGB", **options):
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, form, **options)
    return path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    for number in range(3):
        save(folder / "a" / f"{number}.png", value=number)
    save(folder / "b.jpg", mode="CMYK")
    save(folder / "c.webp", lossless=True)
    save(folder / "d.PNG", mode="LA")
    return folder


def test_a_clean_folder(images):
    (images / "notes.txt").touch()
    (images / "a" / "x.gif").touch()
    report = validate(images)
    assert report.clean
    assert report.lines == (
        "6 images: 6 good, 0 broken",
        "  1 JPEG CMYK",
        "  1 PNG LA",
        "  3 PNG RGB",
        "  1 WEBP RGB",
        "  short sides of 80 to 80 pixels",
        "2 other files, ignored",
    )


def test_broken_small_and_double_images_are_named(images):
    (images / "a" / "1.png").write_bytes((images / "a" / "0.png").read_bytes())
    (images / "z.jpg").write_bytes((images / "b.jpg").read_bytes()[:3000])
    (images / "gone.png").symlink_to(images / "nowhere")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    save(images / "turned.jpg", (90, 70), value=7, exif=exif)
    report = validate(images, resolution=80)
    assert not report.clean
    text = list(report.lines)
    assert text[0] == "9 images: 7 good, 2 broken"
    broken = text.index("2 broken:")
    assert text[broken + 1] == "  gone.png: cannot be read: No such file or directory"
    assert text[broken + 2].startswith("  z.jpg: cannot be decoded: image file is truncated")
    small = text.index("1 smaller than 80 pixels, will be enlarged:")
    assert text[small + 1] == "  turned.jpg: 70 x 90"
    double = text.index("1 byte-identical, each will be trained on:")
    assert text[double + 1] == "  a/0.png = a/1.png"


def test_small_and_double_images_are_no_reason_to_stop(images):
    (images / "a" / "1.png").write_bytes((images / "a" / "0.png").read_bytes())
    assert validate(images, resolution=512).clean


def test_a_long_list_is_cut(tmp_path):
    for number in range(SHOWN + 5):
        (tmp_path / f"{number:02}.png").write_text("no image")
    report = validate(tmp_path)
    assert report.lines[1] == "25 broken:"
    assert report.lines[-1] == "  and 5 more"
    assert len(report.lines) == SHOWN + 3


def test_nothing_to_validate_is_one_sentence(tmp_path):
    with pytest.raises(GuidanceError, match=r"DATA '.*none' was not found, expected a folder of images or a cache"):
        validate(tmp_path / "none")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(GuidanceError, match=r"holds no image and no cached latents \(1 other files\), expected"):
        validate(tmp_path)


def shard(folder, names, recipe=RECIPE, broken=(), change=None):
    """Write a shard of made-up latents; `change` may spoil them."""
    records = [Record(name, 10, 20, "cd" * 32) for name in names] + [Record(n, 1, 2, "ef", "why") for n in broken]
    records.sort()
    tensors = {name: torch.rand(len(names), 4, 8, 8).half() for name in recipe.names}
    if change:
        change(tensors)
    path = folder / shard_name(recipe, [record.path for record in records])
    write_shard(path, recipe, records, tensors, [Geometry(64, 64, 0, 0)] * len(names))
    return path


def test_a_clean_cache(tmp_path):
    shard(tmp_path, ["a", "b"], broken=["bad.png"])
    shard(tmp_path, ["c"])
    report = validate(tmp_path, resolution=64)
    assert report.clean  # its broken images were left out
    assert report.lines == (
        "3 images in 2 shards",
        "  resolution 64, resize, with flips, VAE abababababab",
        "1 broken images, skipped:",
        "  bad.png: why",
    )


def problems(folder, resolution=None):
    report = validate(folder, resolution)
    assert not report.clean
    start = next(n for n, line in enumerate(report.lines) if line.endswith(" problems:"))
    return [line.strip() for line in report.lines[start + 1 :]]


def spoil(name, value):
    def change(tensors):
        tensors[name][0, 1, 2, 3] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("mean", float("nan"), "mean has NaN or infinite values"),
        ("std_flipped", float("inf"), "std_flipped has NaN or infinite values"),
        ("std", -1.0, "std has negative values"),
    ],
)
def test_values_that_no_vae_gives(tmp_path, name, value, words):
    shard(tmp_path, ["a"])
    path = shard(tmp_path, ["b", "c"], change=spoil(name, value))
    assert problems(tmp_path) == [f"{path.name}: {words}"]


def test_damaged_double_mixed_and_unfinished_shards(tmp_path):
    shard(tmp_path, ["a", "b"])
    shard(tmp_path, ["b", "c"])
    assert problems(tmp_path) == ["b: in the cache 2 times"]
    for path in tmp_path.iterdir():
        path.unlink()

    paths = sorted([shard(tmp_path, ["a"]), shard(tmp_path, ["b"], replace(RECIPE, fit="centre_crop"))])
    first, second = (
        ("centre_crop", "resize") if paths[1].name == shard_name(RECIPE, ["a"]) else ("resize", "centre_crop")
    )
    assert problems(tmp_path) == [f"{paths[1].name}: made with data.fit = {second}, {paths[0].name} has {first}"]
    assert problems(tmp_path, 128)[1] == "made with data.resolution = 64, expected 128"
    paths[1].unlink()

    (tmp_path / INCOMPLETE).touch()
    assert problems(tmp_path) == ["unfinished: run `gcfg cache CONFIG` again, it goes on where it stopped"]
    (tmp_path / INCOMPLETE).unlink()

    os.truncate(paths[0], paths[0].stat().st_size - 1)
    damaged, empty = problems(tmp_path)
    assert f"{paths[0].name}' is damaged: it is cut short" in damaged
    assert empty == "no good image in it, expected at least one"
