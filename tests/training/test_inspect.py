"""`gcfg inspect`, in process and as the installed command."""

import json
import subprocess
import sys

import pytest
import torch
from comfyui_gcfg.command.main import app
from comfyui_gcfg.gcfg.concept_file import compact, fold
from comfyui_gcfg.testkit import layouts
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def unet():
    """A UNet of real names; only the shapes that tell something are real."""
    shapes = layouts.unet(layouts.FAMILIES["sd15"])
    return {
        key: torch.ones(
            shape if ".attn2." in key or "norm" in key or "proj_in" in key else (4, *(1 for _ in shape[1:])),
            dtype=torch.float16,
        )
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
        "values": "finite",
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


NOT_SAFETENSORS = "is no safetensors file although its name says so ({} bytes, no valid header); download it again."


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.safetensors", None, "was not found, expected a .safetensors file; check the name and the folder."),
        ("model.gguf", b"GGUF", "ends in '.gguf', expected a .safetensors file."),
        ("page.safetensors", b"", NOT_SAFETENSORS),
        ("page.safetensors", b"<!DOCTYPE html><html></html>", NOT_SAFETENSORS),
        ("page.safetensors", b"\x05\0\0\0\0\0\0\0[1,2]", NOT_SAFETENSORS),
        ("page.safetensors", b"\x02" + b"\0" * 7 + b"no", NOT_SAFETENSORS),
    ],
)
def test_another_kind_of_file(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert refusal(path) == f"Error: gcfg inspect: {str(path)!r} {said.format(len(content or b''))}\n"


@pytest.mark.parametrize("name", ["$(touch x).ckpt", "old.pt", "old.pth", "old.bin", "renamed.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_not_opened_and_no_command_has_its_name_in_it(tmp_path, name, zipped):
    path = tmp_path / name
    torch.save({"state_dict": {"a": torch.ones(3)}}, path, _use_new_zipfile_serialization=zipped)
    assert refusal(path) == (
        f"Error: gcfg inspect: {str(path)!r} is a pickle, which can run any code when opened; expected .safetensors; "
        "run `gcfg convert FILE` with this file (docs/training.md tells how to install it).\n"
    )


def test_text_of_the_file_begins_no_line(tmp_path, unet):
    path = tmp_path / "a\x1b[31m\nform         good.safetensors"
    save_file(unet, path, {"a\x1b[2J": "\nform         fine\r\u2028\u202e", "b": "x" * 20_000})
    result = inspect(path)
    assert [line[:12].strip() for line in result.stdout.splitlines()] == [
        *("file", "form", "naming", "prefix", "blocks", "context_dim", "parameters", "bytes", "values", "metadata")
    ]
    found = fields(result)
    assert found["file"] == f"{tmp_path}/a\\x1b[31m\\nform         good.safetensors"
    cut = f"b={'x' * 10_000}... (20,000 characters)"
    assert found["metadata"] == f"a\\x1b[2J=\\nform         fine\\r\\u2028\\u202e, {cut}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_values_that_are_no_numbers_are_named(tmp_path, unet, dtype):
    path = tmp_path / "broken.safetensors"
    broken = {key: value.to(dtype) for key, value in unet.items()}
    assert not [key for key, value in broken.items() if not value.float().isfinite().all()]
    for key in ("out.2.bias", "input_blocks.0.0.weight"):
        value = broken[key].float()
        value[-1] = float("nan") if key == "out.2.bias" or dtype == torch.float8_e4m3fn else float("-inf")
        broken[key] = value.to(dtype)
    save_file(broken, path)
    first = next(key for key in load_file(path) if key in ("out.2.bias", "input_blocks.0.0.weight"))
    assert fields(inspect(path))["values"] == f"NaN or infinite in 2 tensors, first {first!r}: the file is of no use"


def test_a_file_without_a_unet(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, path)
    assert "(it looks like a LoRA; load the UNet and apply it with a LoRA loader)." in refusal(path)


def test_the_installed_command_runs_without_comfyui(tmp_path, unet):
    path = tmp_path / "prior.safetensors"
    save_file(unet, path)
    code = (
        "import sys, json; from comfyui_gcfg.command.main import main\n"
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
