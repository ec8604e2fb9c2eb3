"""A made-up world of a few things: tiny npm packages with drawings that are plain shapes, and no network."""

import base64
import hashlib
import io
import json
import tarfile

import pytest
from comfyui_gcfg.reproduction.emoji import packages, vendors
from comfyui_gcfg.reproduction.emoji.packages import Package
from comfyui_gcfg.reproduction.emoji.pictures import read_drawings, write_drawings
from PIL import Image

CODES = {"1f600": "grinning-face", "1f920": "cowboy-hat-face", "1f436": "dog-face", "1f431": "cat-face"}


def icon(colour):
    """A square that fills the left half of the picture."""
    return {"body": f'<path fill="{colour}" d="M0 0h8v16H0z"/>'}


def archive(cache, name, files):
    """Write an archive as `npm pack` does, and return its package."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for path, data in files.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    package = Package(name, "1.0.0", base64.b64encode(hashlib.sha512(file.getvalue()).digest()).decode())
    folder = cache / package.archive.removesuffix(".tgz")
    folder.mkdir(parents=True)
    (folder / package.archive).write_bytes(file.getvalue())
    return package


def vectors(icons, characters, **others):
    return {
        "icons.json": json.dumps({"icons": icons, "width": 16, "height": 16, **others}).encode(),
        "chars.json": json.dumps(characters).encode(),
    }


def webp(colour):
    file = io.BytesIO()
    picture = Image.new("RGBA", (256, 256))
    picture.paste(Image.new("RGBA", (128, 128), colour), (64, 64))
    picture.save(file, "webp", lossless=True)
    return file.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the packages: Noto draws four things, Blob one of them under another name, 3D all of them."""
    cache = tmp_path / "npm"
    noto = archive(cache, "@some/noto", vectors({name: icon("#ff0000") for name in CODES.values()}, CODES))
    blob = archive(
        cache,
        "@some/blob",
        vectors({"smile": icon("#00ff00")}, {}, aliases={"grinning-face": {"parent": "smile"}}),
    )
    ink = archive(cache, "@some/ink", vectors({"puppy": icon("#000000")}, {"1f436": "puppy"}))
    solid = archive(cache, "@some/solid", {f"assets/{code}.webp": webp("#0000ff") for code in CODES})
    monkeypatch.setattr(vendors, "LOOKS", {"Noto": noto, "Blob": blob})
    for name, package in (("NOTO", noto), ("INK", ink), ("FLUENT_3D", solid)):
        monkeypatch.setattr(packages, name, package)
    return cache


@pytest.fixture
def drawings(cache, tmp_path):
    write_drawings(cache, tmp_path / "drawings")
    return read_drawings(tmp_path / "drawings")
