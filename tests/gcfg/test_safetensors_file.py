"""The strict reader of headers, beside the library that reads the tensors."""

import os
from contextlib import contextmanager

import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.safetensors_file import LazyStateDict, read_header
from comfyui_gcfg.gcfg.safetensors_header import stated_number
from comfyui_gcfg.gcfg.unet_tensors import not_finite
from comfyui_gcfg.testkit.checks import refusal
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# What the library lets pass and the format forbids, or what torch cannot compute with.
STRICTER = {"header that is same key twice", "metadata that is of a key twice", "unet with to_v of F4"}
STRICTER |= {"entry with shape [9223372036854775808, 0]", "unet of F4"}


def test_what_the_library_refuses_is_refused_and_no_more(hostile_files):
    differing = set()
    for name, path in hostile_files.items():
        if path.suffix != ".safetensors" or not os.path.isfile(path) or name.startswith(("link", "renamed", "name")):
            continue
        try:
            read_header(path, "x")
            ours = True
        except GuidanceError:
            ours = False
        try:
            with safe_open(path, framework="pt"):
                theirs = True
        except SafetensorError:
            theirs = False
        assert theirs >= ours, f"{name}: ours takes what the library refuses"
        if theirs != ours:
            differing.add(name)
    assert differing <= STRICTER


SAID = {
    "header that is same key twice": "its header names 'a' twice",
    "entry that is a list": "its tensor 'a' is [1], expected its dtype, shape and data_offsets",
    "entry with shape [-2]": "its tensor 'a' has the shape [-2], expected whole numbers from 0 on",
    "entry with data_offsets [8, 0]": "its tensor 'a' has the data_offsets [8, 0], expected 8 bytes for F32 of shape "
    "[2]",
    "overlapping tensors": "its tensor 'b' begins at byte 4, expected 8, where the one before it ends",
    "gap before the first tensor": "its tensor 'a' begins at byte 8, expected 0, where the one before it ends",
    "trailing bytes": "1 bytes follow its last tensor",
    "metadata that is of a number": "its metadata has 1 for 'a', expected a text",
    "metadata that is with half a character": "its header has half a character in '\\ud83d'",
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_said(hostile_files, name):
    assert refusal(read_header, hostile_files[name], "The file 'x'") == (
        f"The file 'x' is damaged: {SAID[name]}; copy or download the file again."
    )


def test_what_is_no_file(hostile_files):
    ends = ", expected a .safetensors file; name another one."
    said = {
        "missing": " was not found, expected a .safetensors file; check the name and the folder.",
        "file as a folder": " was not found, expected a .safetensors file; check the name and the folder.",
        "folder": f" is a folder{ends}",
        "pipe": f" is no regular file (a pipe, a socket or a device){ends}",
        "socket": f" is no regular file (a pipe, a socket or a device){ends}",
        "link device": f" is no regular file (a pipe, a socket or a device){ends}",
        "link loop": " cannot be read: Too many levels of symbolic links; check the file, its rights and its disk.",
        "link whose reading fails": " cannot be read: Input/output error; check the file, its rights and its disk.",
        "name of 300 letters": " cannot be read: File name too long; check the file, its rights and its disk.",
    }
    for name, text in said.items():
        if name in hostile_files:
            assert refusal(read_header, hostile_files[name], "It") == f"It{text}"


@contextmanager
def nobody():
    """As a user whom rights mean something to."""
    if os.name == "nt":
        pytest.skip("rights are other things there")
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_file_that_may_not_be_read(tmp_path, what):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    (path if what == "file" else tmp_path).chmod(0)
    try:
        with nobody(), pytest.raises(GuidanceError) as error:
            read_header(path, "It")
    finally:
        tmp_path.chmod(0o700)
    assert str(error.value) == "It cannot be read: Permission denied; check the file, its rights and its disk."


def test_a_file_that_changes_after_its_header_was_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    read_header(path, "It")
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(LazyStateDict, path).startswith(f"{str(path)!r} could not be read to its end (")


def test_a_number_in_metadata():
    texts = {"12": 12, "0": 0, "-1": None, "": None, "²": None, "٣": None, "1e3": None, "9" * 5000: None}
    assert {text: stated_number({"a": text}, "a") for text in texts} == texts
    assert stated_number({}, "a") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_not_finite(dtype, value):
    for place in (0, 500, -1):
        broken = torch.ones(999)
        broken[place] = value
        tensors = {
            "good": torch.ones(9),
            "broken": broken.to(dtype),
            "none": torch.ones(0),
            "whole": torch.ones(3).int(),
        }
        assert not_finite(tensors) == ["broken"]
