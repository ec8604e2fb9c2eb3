"""`gcfg convert`: pickles as files of tensors, in process and as the installed command; nothing in them is run."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from comfyui_gcfg.command.main import app
from comfyui_gcfg.gcfg.safetensors_file import read_header
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

GCFG = Path(sys.executable).with_name("gcfg")
VALUES = {
    "a": torch.arange(3.0),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "one": torch.tensor(3),
    "none": torch.empty(0, 4),
    "half": torch.ones(2, dtype=torch.bfloat16),
}
BYTE = {"byte": torch.ones(2).to(torch.float8_e4m3fn)}  # torch reads these from archives only


class Bomb:
    """Makes a folder when it is opened carelessly."""

    def __init__(self, folder, call=os.mkdir):
        self.folder, self.call = str(folder), call

    def __reduce__(self):
        return self.call, (self.folder,)


def convert(path, *options):
    return CliRunner().invoke(app, ["convert", str(path), *options])


def refusal(path, *options):
    before = {file: file.lstat().st_size for file in path.parent.iterdir()}
    result = convert(path, *options)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    start = f"Error: gcfg convert: {str(path)!r}"
    assert result.stderr.startswith(start)
    assert result.stderr.count("\n") == 1
    assert "weights_only" not in result.stderr, "torch's advice would run the code"
    assert {file: file.lstat().st_size for file in path.parent.iterdir()} == before
    return result.stderr.removeprefix(start).rstrip()


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
        assert torch.equal(found[key].double(), value.double())


@pytest.mark.parametrize("name", ["$(touch exploded).ckpt", "old.pt", "old.pth", "old.bin", "old.pkl", "OLD.CKPT"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_every_tensor_is_kept(tmp_path, name, zipped, wrapped):
    values = VALUES | BYTE if zipped else VALUES
    content = {"state_dict": values, "epoch": 3} if wrapped else {**values, "epoch": 3, 5: torch.ones(1)}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    result = convert(tmp_path / name)
    made = (tmp_path / name).with_suffix(".safetensors")
    assert result.output == f"{made}\n"
    assert_equal(load_file(made), values)
    assert read_header(made, "x").metadata == {"format": "pt"}
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([name, made.name])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_renamed_pickle(tmp_path, zipped):
    path = tmp_path / "model.safetensors"
    torch.save(VALUES, path, _use_new_zipfile_serialization=zipped)
    before = path.read_bytes()
    assert convert(path).output == f"{tmp_path / 'model-converted.safetensors'}\n"
    assert_equal(load_file(tmp_path / "model-converted.safetensors"), VALUES)
    assert path.read_bytes() == before


def test_weights_that_share_memory(tmp_path):
    path, weight = tmp_path / "tied.pt", torch.nn.Parameter(torch.arange(100.0))
    tied = {"a": weight, "b": weight, "c": weight.detach()[50:]}
    torch.save(tied, path)
    assert convert(path).exit_code == 0
    assert_equal(load_file(tmp_path / "tied.safetensors"), {key: value.detach() for key, value in tied.items()})


def test_numbers_that_torch_keeps_turned_around(tmp_path):
    """A view may say that its memory is to be read as the conjugate, or with the other sign."""
    turned = {"a": torch.tensor([1 + 2j, 3 - 1j]).conj(), "b": torch._neg_view(torch.ones(2))}
    torch.save(turned, tmp_path / "turned.pt")
    assert convert(tmp_path / "turned.pt").exit_code == 0
    found = load_file(tmp_path / "turned.safetensors")
    assert found["a"].tolist() == [1 - 2j, 3 + 1j]
    assert found["b"].tolist() == [-1.0, -1.0]


def test_a_file_of_the_new_name_stays_unless_it_is_asked_for(tmp_path):
    path, taken = tmp_path / "a.ckpt", tmp_path / "a.safetensors"
    torch.save(VALUES, path)
    taken.write_text("mine")
    assert refusal(path) == f" would become {str(taken)!r}, which exists; move it, or give --overwrite."
    assert taken.read_text() == "mine"
    assert convert(path, "--overwrite").exit_code == 0
    assert_equal(load_file(taken), VALUES)
    taken.unlink()
    taken.symlink_to("nowhere")
    assert "which exists" in refusal(path)


def test_the_installed_command_on_a_malicious_name_and_content(tmp_path):
    bomb, named = tmp_path / "bomb.ckpt", tmp_path / "$(touch exploded).ckpt"
    torch.save({"state_dict": Bomb(tmp_path / "exploded")}, bomb)
    torch.save(VALUES, named)
    done = subprocess.run([GCFG, "convert", bomb.name], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "Error: gcfg convert: 'bomb.ckpt' holds 'posix.mkdir', expected tensors only, since anything else may run "
        "code; find the model as .safetensors.\n"
    )
    hint = subprocess.run([GCFG, "inspect", named.name], cwd=tmp_path, capture_output=True, text=True).stderr
    quoted = hint.split("`")[1]
    assert quoted == "gcfg convert FILE"
    done = subprocess.run([GCFG, *quoted.split()[1:-1], named], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert_equal(load_file(tmp_path / "$(touch exploded).safetensors"), VALUES)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("call", [os.mkdir, eval, os.system])
def test_a_bare_pickle_of_a_call(tmp_path, protocol, call):
    path = tmp_path / "bomb.pkl"
    text = tmp_path / "exploded" if call == os.mkdir else f"__import__('os').mkdir({str(tmp_path / 'exploded')!r})"
    path.write_bytes(pickle.dumps(Bomb(text, call), protocol=protocol))
    refusal(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["bomb.ckpt", "bomb.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_call_among_tensors(tmp_path, name, zipped):
    path = tmp_path / name
    content = {**VALUES, "x": Bomb(tmp_path / "exploded")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert " holds 'posix.mkdir', expected tensors only" in refusal(path)
    assert not (tmp_path / "exploded").exists()


def test_an_archive_that_unpacks_to_more_than_itself(tmp_path):
    path, stored = tmp_path / "bomb.ckpt", io.BytesIO()
    torch.save({"a": torch.zeros(10**6)}, stored)
    with zipfile.ZipFile(stored) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
    assert path.stat().st_size < 10_000
    assert " is an archive of 4,9" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [{"a": torch.zeros(1).expand(10**12)}, {str(i): value for value in [torch.zeros(1000)] for i in range(100)}],
)
def test_few_values_that_would_be_written_many_times(tmp_path, content):
    path = tmp_path / "bomb.ckpt"
    torch.save(content, path)
    written = sum(4 * value.numel() for value in content.values())
    assert f", but its tensors would take {written:,}, expected about as many; " in refusal(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, " holds a NoneType, expected tensors by name; nothing is written."),
        ([torch.ones(1)], " holds a list, expected tensors by name; nothing is written."),
        ({"a": 1}, " holds no tensors by name, expected a model's weights; nothing is written."),
        ({"\ud83d": torch.ones(1)}, " has a tensor of the name '\\ud83d', which a .safetensors file cannot have."),
        (
            {"__metadata__": torch.ones(1)},
            " has a tensor of the name '__metadata__', which a .safetensors file cannot have.",
        ),
        ({"a": torch.ones(1).to_sparse()}, ": 'a' is a tensor of another kind (torch.sparse_coo, "),
        (
            {"a": torch.ones(1, device="meta")},
            ": 'a' is a tensor of another kind (torch.strided, torch.float32, on meta)",
        ),
        (
            {"a": torch.ones(1, dtype=torch.complex128)},
            ": 'a' is a tensor of another kind (torch.strided, torch.complex128",
        ),
        (torch.nn.Linear(1, 1), " holds 'torch.nn.modules.linear.Linear', expected tensors only"),
    ],
)
def test_what_is_no_set_of_weights(tmp_path, content, said):
    path = tmp_path / "odd.ckpt"
    torch.save(content, path)
    assert refusal(path).startswith(said)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04" + bytes(100), b"\x80\x02", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."],
)
def test_what_is_no_pickle(tmp_path, content):
    path = tmp_path / "odd.ckpt"
    path.write_bytes(content)
    refusal(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_cut_short(tmp_path, zipped):
    path = tmp_path / "cut.ckpt"
    torch.save(VALUES, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:-5])
    refusal(path)


def test_what_is_no_file_or_needs_no_conversion(tmp_path):
    assert refusal(tmp_path / "none.ckpt").startswith(" was not found, expected a pickle such as .ckpt or .pt; ")
    assert refusal(tmp_path.parent / tmp_path.name).startswith(" is a folder, expected a pickle such as .ckpt or .pt; ")
    save_file({"a": torch.ones(1)}, tmp_path / "good.safetensors")
    assert refusal(tmp_path / "good.safetensors") == (
        " is not pickled, expected a pickle such as .ckpt or .pt; there is nothing to convert."
    )


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes among its files")
@pytest.mark.timeout(30)
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.ckpt")
    assert refusal(tmp_path / "pipe.ckpt").startswith(" is no regular file (a pipe, a socket or a device), expected ")


def test_a_name_too_long_to_write_beside(tmp_path):
    path = tmp_path / f"{'x' * 243}.ckpt"
    torch.save(VALUES, path)
    assert " cannot be written as " in refusal(path)
