"""Files and folders that are whole or not there."""

import errno
import os
import stat

import pytest
import torch
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.training.files import UNFINISHED, discard, remove_unfinished, whole_file, whole_folder
from safetensors.torch import save_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with whole_file(path) as beside:
        beside.write_text("new")
        assert not path.exists()
    assert (names(path.parent), path.read_text()) == (["a.txt"], "new")


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_after_an_exception_the_old_file_stands(tmp_path, kind):
    (tmp_path / "a.txt").write_text("old")

    def fail():
        with whole_file(tmp_path / "a.txt") as beside:
            beside.write_text("new")
            raise kind

    with pytest.raises(kind):
        fail()
    assert (names(tmp_path), (tmp_path / "a.txt").read_text()) == (["a.txt"], "old")


def test_others_may_read_what_safetensors_wrote(tmp_path):
    """Its save_file leaves files to their owner alone."""
    before = os.umask(0o022)
    try:
        with whole_file(tmp_path / "a.safetensors") as beside:
            save_file({"x": torch.ones(2)}, beside)
        with whole_folder(tmp_path / "folder") as beside:
            save_file({"x": torch.ones(2)}, beside / "b.safetensors")
    finally:
        os.umask(before)
    for path in (tmp_path / "a.safetensors", tmp_path / "folder" / "b.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / f"{UNFINISHED}123-a.txt"
    left.mkdir()
    (left / ".tmpXYZ").write_text("half")
    with whole_file(tmp_path / "a.txt") as beside:
        beside.write_text("new")
    assert names(tmp_path) == ["a.txt"]
    left.mkdir()
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full; free some space"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full; free some space"),
        (PermissionError(errno.EACCES, "Permission denied"), "permission was denied; choose another folder"),
    ],
)
def test_trouble_with_the_disk_is_one_sentence(tmp_path, error, message):
    def fail():
        with whole_folder(tmp_path / "folder") as beside:
            (beside / "a").write_text("half")
            raise error

    with pytest.raises(GuidanceError, match=message) as caught:
        fail()
    assert str(tmp_path / "folder") in str(caught.value)
    assert names(tmp_path) == []


def test_a_folder_being_discarded_never_stands_half_under_its_name(tmp_path, monkeypatch):
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / "a").write_text("a")
    seen = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: seen.append((path.name, folder.exists())))
    discard(folder)
    assert [exists for _, exists in seen] == [False]
    assert seen[0][0].startswith(UNFINISHED)
