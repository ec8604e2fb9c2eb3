"""`gcfg` on model files that are damaged, odd or malicious: what it is asked for, or one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_gcfg.command.main import app
from comfyui_gcfg.evaluation.controlnet import load_controlnet
from comfyui_gcfg.gcfg.errors import GuidanceError, printable
from comfyui_gcfg.training.concept import null_text_features
from comfyui_gcfg.training.methods.textual_inversion import read_embedding
from comfyui_gcfg.training.prior.model import open_prior
from comfyui_gcfg.training.prior.text_encoder import load_text_models
from comfyui_gcfg.training.prior.vae import load_vae
from diffusers import ControlNetModel
from safetensors.torch import save_file
from typer.testing import CliRunner

FIELDS = ["file", "form", "naming", "prefix", "blocks", "context_dim", "parameters", "bytes", "values", "metadata"]
MODELS = {"unet", "ordinary unet", "unet with metadata with colours", "unet with NaN in out.2.bias"}


def fault(code, out, err):
    """What is wrong with a run of `gcfg inspect`, or None."""
    if code == 0:
        lines = out.splitlines()
        whole = [line[:12].strip() for line in lines] == FIELDS and all(line == printable(line) for line in lines)
        return None if whole and not err else out[:1000] + err[:1000]
    line = err.removesuffix("\n")
    whole = line.startswith("Error: gcfg inspect: '") and line.endswith(".") and len(line) < 1000
    return None if whole and line == printable(line) and code == 1 and not out else out[:1000] + err[:1000]


@pytest.mark.slow
def test_inspect_tells_or_says_one_sentence(hostile_files):
    told, faults = set(), {}
    for name, path in hostile_files.items():
        result = CliRunner().invoke(app, ["inspect", str(path)])
        if result.exception and not isinstance(result.exception, SystemExit):
            faults[name] = repr(result.exception)[:1000]
        elif wrong := fault(result.exit_code, result.stdout, result.stderr):
            faults[name] = wrong
        elif result.exit_code == 0:
            told.add(name)
            assert ("NaN or infinite in 1 " in result.stdout) == ("NaN" in name or "infinity" in name)
    assert faults == {}
    assert told >= MODELS
    assert all("unet" in name for name in told)
    assert not (hostile_files["unet"].parent / "exploded").exists()


@pytest.mark.slow
def test_the_installed_command(hostile_files, tmp_path):
    names = ["unet with metadata with colours", "header that is deep list", "trailing bytes", "bare.bin"]
    paths = [hostile_files[name] for name in names]
    if os.name != "nt":
        paths += [hostile_files["pipe"], tmp_path / os.fsdecode(b"\xff\x1b[31m\n.safetensors")]
        paths[-1].write_bytes(b"<html>")
    gcfg = Path(sys.executable).with_name("gcfg")
    for path in paths:
        done = subprocess.run([gcfg, "inspect", path], capture_output=True, text=True, timeout=60)
        assert fault(done.returncode, done.stdout, done.stderr) is None


READERS = {
    "prior": open_prior,
    "vae": lambda path: load_vae(path, "sd1", "model.vae 'x'"),
    "CLIP": lambda path: load_text_models(path, "sd1", "model.text_encoder 'x'"),
    "OpenCLIP": lambda path: load_text_models(path, "sd2", "model.text_encoder 'x'"),
    "word": lambda path: read_embedding(path, "<a>", "models.a.embedding 'x'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("reader", [*READERS, "controlnet", "null_text"])
def test_what_the_trainer_reads(hostile_files, tiny_unet, reader):
    more = {
        "controlnet": lambda path: load_controlnet(path, tiny_unet.config, "prior.controlnet 'x'"),
        "null_text": lambda path: null_text_features(tiny_unet, str(path)),
    }
    faults = {}
    for name, path in hostile_files.items():
        try:
            (READERS | more)[reader](path)
        except GuidanceError as error:
            if len(str(error)) > 1000:
                faults[name] = str(error)[:1000]
        except Exception as error:
            faults[name] = f"{type(error).__name__}: {error}"[:1000]
    assert faults == {}


ODD = [(), (3,), (2, 2, 2), (5, 5), (0,)]


def refused(read, path, weights, key, shape):
    save_file({**weights, key: torch.zeros(shape)}, path)
    with pytest.raises(GuidanceError) as error:
        read(path)
    return str(error.value)


@pytest.mark.parametrize("shape", ODD)
@pytest.mark.parametrize("key", ["embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight"])
def test_a_text_encoder_whose_tensors_do_not_fit(tiny_clip, tmp_path, key, shape):
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": value for name, value in tiny_clip.state_dict().items()
    }
    message = refused(READERS["CLIP"], tmp_path / "clip.safetensors", weights, f"text_model.{key}", shape)
    assert message.startswith("model.text_encoder 'x' has a text encoder whose tensors do not fit each other (")


@pytest.mark.parametrize("shape", ODD)
@pytest.mark.parametrize(
    "key", ["controlnet_cond_embedding.conv_in.weight", "controlnet_cond_embedding.blocks.1.weight"]
)
def test_a_controlnet_whose_tensors_do_not_fit(tiny_unet, tmp_path, key, shape):
    weights = ControlNetModel.from_unet(tiny_unet).state_dict()

    def read(path):
        return load_controlnet(path, tiny_unet.config, "prior.controlnet 'x'")

    assert refused(read, tmp_path / "control.safetensors", weights, key, shape).startswith("prior.controlnet 'x' ")
