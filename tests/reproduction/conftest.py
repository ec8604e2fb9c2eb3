"""A made-up world of a few things, from tiny npm packages and no network; a UNet and a ControlNet of random weights."""

import base64
import hashlib
import io
import json
import tarfile

import pytest
import torch
from comfyui_gcfg.reproduction import packages, vendors
from comfyui_gcfg.reproduction.packages import Package
from comfyui_gcfg.reproduction.pictures import read_drawings, write_drawings
from comfyui_gcfg.reproduction.prior import new_unet
from diffusers import ControlNetModel
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


@pytest.fixture(scope="session")
def unet():
    torch.manual_seed(3)
    return new_unet().eval()


@pytest.fixture(scope="session")
def controlnet(unet):
    torch.manual_seed(4)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 96, 256)).eval()
    for name, parameter in control.named_parameters():  # its last layers start at zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
            assert name
    return control
