"""`gcfg inspect`, in process and as the installed command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_gcfg.demo import layouts
from comfyui_gcfg.gcfg.concept_file import compact, fold
from comfyui_gcfg.training.cli import app
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def unet():
    """A UNet of real names; only the shapes that tell something are real."""
    shapes = layouts.unet(layouts.FAMILIES["sd15"])
    return {
        key: torch.ones(shape if ".attn2." in key or "norm" in key or "proj_in" in key else (4,), dtype=torch.float16)
        for key, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def constants(unet):
    return {key.removesuffix(".norm2.bias"): unet[key] for key in unet if key.endswith(".norm2.bias")}


def inspect(path):
    return CliRunner().invoke(app, ["inspect", str(path)])


def fields(result):
    assert result.exit_code == 0, result.output
    return {line[:12].strip(): line[13:] for line in result.stdout.splitlines()}


def test_an_ordinary_checkpoint(tmp_path, unet, constants):
    path = tmp_path / "prior.safetensors"
    prefixed = {f"model.diffusion_model.{key}": value for key, value in unet.items()}
    save_file(prefixed | {"first_stage_model.decoder.conv_in.weight": torch.zeros(10)}, path)
    size = sum(2 * value.numel() for value in unet.values())
    assert fields(inspect(path)) == {
        "file": str(path),
        "form": "ordinary UNet, reads text",
        "naming": "LDM keys",
        "prefix": "model.diffusion_model.",
        "blocks": f"{len(constants)} transformer blocks, first input_blocks.1.1.transformer_blocks.0",
        "context_dim": "768",
        "parameters": f"{size // 2:,} in the UNet",
        "bytes": f"{size:,} in the UNet, 40 bytes of other tensors beside it",
        "metadata": "none",
    }


def test_a_compact_file_with_metadata(tmp_path, unet, constants):
    path = tmp_path / "concept.safetensors"
    save_file(compact(fold(unet, constants)), path, {"gcfg.context_dim": "1024", "concept": "cats"})
    found = fields(inspect(path))
    assert found["form"] == "compact null-text UNet, for Load Concept UNet only"
    assert found["context_dim"] == "1024"
    assert found["prefix"] == "none"
    assert found["metadata"] == "concept=cats, gcfg.context_dim=1024"
    removed = len(constants) * (2 * 320 * 320 + 2 * 320 * 768 + 2 * 320)  # attn2 and norm2, less the constant
    assert found["parameters"] == f"{sum(v.numel() for v in unet.values()) - removed:,} in the UNet"


def test_a_folded_file(tmp_path, unet, constants):
    path = tmp_path / "concept.safetensors"
    save_file(fold(unet, constants), path)
    assert fields(inspect(path))["form"] == "folded null-text UNet, every loader takes it"


def refusal(path):
    result = inspect(path)
    assert result.exit_code == 1
    assert result.stdout == ""
    return result.stderr


def test_a_missing_file(tmp_path):
    path = tmp_path / "none.safetensors"
    assert refusal(path) == (
        f"Error: gcfg inspect: {str(path)!r} was not found, expected a .safetensors file; "
        "check the name and the folder.\n"
    )


def test_a_truncated_file(tmp_path, unet):
    path = tmp_path / "cut.safetensors"
    save_file(unet, path)
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(path) == (
        f"Error: gcfg inspect: {str(path)!r} is cut short: {whole - 100} bytes, expected {whole}; "
        "copy or download the file again.\n"
    )
    path.write_bytes(path.read_bytes()[:50])  # within the header
    assert "is cut short: 50 bytes, expected " in refusal(path)


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><html></html>", b"\x05\0\0\0\0\0\0\0[1,2]", b"\x02" + b"\0" * 7 + b"no"]
)
def test_another_kind_of_file(tmp_path, content):
    path = tmp_path / "page.safetensors"
    path.write_bytes(content)
    assert refusal(path) == (
        f"Error: gcfg inspect: {str(path)!r} is no safetensors file although its name says so ({len(content)} bytes, "
        "no valid header); download it again.\n"
    )


def test_another_suffix(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    assert refusal(path) == f"Error: gcfg inspect: {str(path)!r} ends in '.gguf', expected a .safetensors file.\n"


def advice(path, **options):
    """Save a pickle there, and return what `gcfg inspect` tells to run, up to the code."""
    torch.save({"state_dict": {"a": torch.ones(3), "b": torch.ones(2, 2).T}, "epoch": 3}, path, **options)
    message = refusal(path)
    start = (
        f"Error: gcfg inspect: {str(path)!r} is a pickle, which can run any code when opened; expected .safetensors; "
    )
    first = ""
    if path.name == "renamed.safetensors":
        first = "rename it to 'renamed.ckpt' and "
        path.rename(path.with_suffix(".ckpt"))
    start += f"{first}convert it once, in its folder, with: "
    assert message.startswith(f'{start}python -c "')
    assert message.endswith('"\n')
    return message.removeprefix(start).rstrip()


def assert_converted(path):
    converted = load_file(path.with_suffix(".safetensors"))
    assert torch.equal(converted["a"], torch.ones(3))
    assert converted.keys() == {"a", "b"}


@pytest.mark.parametrize("name", ["old.ckpt", "old.pt", "old.pth", "old.bin", "renamed.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_not_opened_and_the_way_to_convert_it_works(tmp_path, monkeypatch, name, zipped):
    command = advice(tmp_path / name, _use_new_zipfile_serialization=zipped)
    monkeypatch.chdir(tmp_path)
    exec(command.removeprefix('python -c "').removesuffix('"'), {})  # here: a Python of its own takes two seconds
    assert_converted(tmp_path / name)


def test_the_way_to_convert_a_pickle_works_in_a_shell(tmp_path):
    command = advice(tmp_path / "old.ckpt")
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": os.pathsep.join([str(folder), os.environ["PATH"]])}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_converted(tmp_path / "old.ckpt")


def test_a_file_without_a_unet(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, path)
    assert "(it looks like a LoRA; load the UNet and apply it with a LoRA loader)." in refusal(path)


def test_the_installed_command_runs_without_comfyui(tmp_path, unet):
    path = tmp_path / "prior.safetensors"
    save_file(unet, path)
    code = (
        "import sys, json; from comfyui_gcfg.training.cli import main\n"
        f"sys.argv = ['gcfg', 'inspect', {str(path)!r}]\n"
        "try:\n    main()\nfinally:\n"
        "    print(json.dumps([name for name in sys.modules if name.split('.')[0] in ('comfy', 'folder_paths')"
        " or name.startswith('comfyui_gcfg.nodes')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *lines, modules = done.stdout.splitlines()
    assert lines[1] == "form         ordinary UNet, reads text"
    assert json.loads(modules) == []
