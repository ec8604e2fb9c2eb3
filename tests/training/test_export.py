"""The exported file: what stock tools make of it, what it says of itself, and that it is whole or not there."""

import hashlib
import json
import struct
from datetime import datetime, timezone

import pytest
import torch
from comfyui_gcfg.command.inspect_file import inspect_file, report
from comfyui_gcfg.gcfg.concept_file import fold
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.gcfg.unet_keys import ldm_to_diffusers
from comfyui_gcfg.training import export
from comfyui_gcfg.training.concept import null_text_features, predict, to_null_text
from comfyui_gcfg.training.export import export_unet, model_spec
from comfyui_gcfg.training.prior.model import open_prior
from comfyui_gcfg.training.prior.text_encoder import Conditions
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

LAYOUTS = {
    "sd1": {"cross_attention_dim": 40, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 40, "attention_head_dim": [1, 1], "use_linear_projection": True},
    "sdxl": {
        "cross_attention_dim": 40,
        "attention_head_dim": [1, 1],
        "use_linear_projection": True,
        "transformer_layers_per_block": [2, 1],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 20,
    },
}
TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 4e-2}  # of the largest value; rounding each weight once


def build(family="sd1"):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=[32, 64],
        layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        **LAYOUTS[family],
    ).eval()


@pytest.fixture
def trained():
    """A null-text UNet whose constants matter."""

    def make(family="sd1"):
        unet = build(family)
        features = {name: torch.randn_like(value) for name, value in null_text_features(unet, "zero").items()}
        to_null_text(unet, features)
        return unet

    return make


@pytest.fixture
def write(tmp_path):
    def write(unet, form="folded", dtype="fp32", path=tmp_path / "concept.safetensors", **more):
        about = model_spec("sd1", "Cats", 512, more.pop("prediction", "eps"))
        export_unet(unet.state_dict(), path, form, dtype, 40, {**about, "gcfg.steps": "7"}, **more)
        return path

    return write


@pytest.fixture
def stock(tmp_path):
    """The UNet that diffusers makes of LDM weights, by its own converter."""

    def load(weights, family="sd1"):
        build(family).save_config(tmp_path)
        checkpoint = {f"model.diffusion_model.{key}": value.float() for key, value in weights.items()}
        return UNet2DConditionModel.from_single_file(checkpoint, config=str(tmp_path), local_files_only=True)

    return load


@pytest.fixture
def outputs():
    torch.manual_seed(1)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([20, 700]), torch.randn(1, 77, 40)

    @torch.no_grad()
    def evaluate(unet, family="sd1"):
        return predict(unet, x, t, Conditions(text, torch.ones(1, 20) if family == "sdxl" else None))

    return evaluate


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def close(found, expected, dtype):
    return (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize(
    ("family", "dtype"), [("sd1", "fp32"), ("sd1", "fp16"), ("sd1", "bf16"), ("sd2", "fp32"), ("sdxl", "fp32")]
)
def test_a_folded_file_gives_stock_diffusers_the_trained_predictions(trained, write, stock, outputs, family, dtype):
    unet = trained(family)
    weights = load_file(write(unet, "folded", dtype))
    assert {tensor.dtype for tensor in weights.values()} == {export.DTYPES[dtype]}
    expected = outputs(unet, family)
    assert close(outputs(stock(weights, family), family), expected, dtype)
    assert not close(outputs(build(family), family), expected, "bf16")  # the constants do matter


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_compact_file_folds_to_the_same(trained, write, tmp_path, dtype):
    unet = trained()
    folded = load_file(write(unet, "folded", dtype))
    path = write(unet, "compact", dtype, tmp_path / "compact.safetensors")
    small = load_file(path)
    assert not any("attn2.to_" in key or ".norm2." in key for key in small)
    constants = {
        key.removesuffix(".attn2.null_text_feature"): value
        for key, value in small.items()
        if key.endswith("null_text_feature")
    }
    assert len(constants) == 4
    again = fold(small, constants, context_dim=int(metadata(path)["gcfg.context_dim"]))
    assert again.keys() == folded.keys()
    assert all(torch.equal(again[key], folded[key]) for key in folded)


def test_a_unet_that_reads_text_is_written_as_it_is(write, outputs, stock):
    unet = build()
    path = write(unet, "ordinary")
    assert torch.equal(outputs(stock(load_file(path))), outputs(unet))
    back = ldm_to_diffusers(load_file(path), unet.state_dict())
    assert back.keys() == unet.state_dict().keys()
    assert all(torch.equal(value, back[key]) for key, value in unet.state_dict().items())
    assert open_prior(path).family == "sd1"  # it may be a prior itself


@pytest.mark.parametrize(("form", "word"), [("folded", "folded"), ("compact", "compact"), ("ordinary", "ordinary")])
def test_gcfg_inspect_recognises_it(trained, write, form, word):
    path = write(build() if form == "ordinary" else trained(), form)
    found = inspect_file(path)
    assert (found.found.form, found.found.naming, found.found.prefix) == (word, "LDM", "")
    assert found.found.context_dim == 40
    assert "modelspec.title=Cats" in report(found)[-1]


def test_what_a_file_says_of_itself(trained, tmp_path):
    path = tmp_path / "concept.safetensors"
    date = datetime(2025, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    about = {**model_spec("sdxl", "Cats", 1024, "eps", date), "gcfg.null_text": "uniform_mean"}
    export_unet(trained("sdxl").state_dict(), path, "folded", "fp16", 40, about)
    found = metadata(path)
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    assert found == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "Cats",
        "modelspec.date": "2025-01-02T03:04:05+00:00",
        "modelspec.resolution": "1024x1024",
        "modelspec.prediction_type": "epsilon",
        "modelspec.hash_sha256": "0x" + hashlib.sha256(raw[start:]).hexdigest(),
        "gcfg.form": "folded",
        "gcfg.context_dim": "40",
        "gcfg.null_text": "uniform_mean",
    }


def test_a_compact_file_does_not_pass_for_the_base(trained, write):
    assert metadata(write(trained(), "compact"))["modelspec.architecture"] == "stable-diffusion-v1-null-text"


@pytest.mark.parametrize(
    ("family", "prediction", "architecture", "said"),
    [
        ("sd1", "eps", "stable-diffusion-v1", "epsilon"),
        ("sd2", "eps", "stable-diffusion-v2-512", "epsilon"),
        ("sd2", "v", "stable-diffusion-v2-768-v", "v"),
        ("sdxl", "flow", "stable-diffusion-xl-v1-base", "flow"),
    ],
)
def test_architectures(family, prediction, architecture, said):
    found = model_spec(family, "t", 768, prediction)
    assert (found["modelspec.architecture"], found["modelspec.prediction_type"]) == (architecture, said)
    age = datetime.now(timezone.utc) - datetime.fromisoformat(found["modelspec.date"])
    assert 0 <= age.total_seconds() < 60


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_v_model_is_marked_for_comfyui(trained, write, zero_terminal_snr):
    path = write(trained(), "folded", prediction="v", zero_terminal_snr=zero_terminal_snr)
    weights = load_file(path)
    assert ("v_pred" in weights, "ztsnr" in weights) == (True, zero_terminal_snr)
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    assert metadata(path)["modelspec.hash_sha256"] == "0x" + hashlib.sha256(raw[start:]).hexdigest()


def test_an_eps_model_is_not_marked(trained, write):
    assert "v_pred" not in load_file(write(trained(), zero_terminal_snr=True))


def refusal(*arguments, **options):
    with pytest.raises(GuidanceError) as caught:
        export_unet(*arguments, **options)
    return str(caught.value)


def test_a_value_too_great_for_fp16(trained, write, tmp_path):
    unet, path = trained(), tmp_path / "a.safetensors"
    with torch.no_grad():
        unet.conv_out.bias[0] = -7e4
    assert refusal(unet.state_dict(), path, "folded", "fp16", 40, {}) == (
        "'out.2.bias' has values up to 7e+04, more than fp16 can hold; export as bf16 or fp32."
    )
    assert list(tmp_path.iterdir()) == []
    export_unet(unet.state_dict(), path, "folded", "bf16", 40, {})
    assert load_file(path)["out.2.bias"][0] == -70144  # bf16's nearest


def test_a_failed_training(trained, tmp_path):
    unet = trained()
    with torch.no_grad():
        unet.conv_in.weight[0, 0] = float("nan")
    assert refusal(unet.state_dict(), tmp_path / "a.safetensors", "folded", "fp32", 40, {}) == (
        "'input_blocks.0.0.weight' has NaN or infinite values: the training failed; export an earlier checkpoint."
    )


def test_a_form_that_does_not_fit(trained, tmp_path):
    path = tmp_path / "a.safetensors"
    assert refusal(build().state_dict(), path, "folded", "fp32", 40, {}) == (
        "The trained UNet is ordinary, expected the form 'ordinary' for its file, got 'folded'."
    )
    assert refusal(trained().state_dict(), path, "ordinary", "fp32", 40, {}) == (
        "The trained UNet is compact, expected the form 'folded' or 'compact' for its file, got 'ordinary'."
    )


@pytest.mark.parametrize("before", [None, b"the file of the last run"])
def test_it_is_whole_or_not_there(trained, write, tmp_path, monkeypatch, before):
    path = tmp_path / "concept.safetensors"
    if before:
        path.write_bytes(before)

    def full_disk(tensors, file, metadata):
        file.write_bytes(json.dumps(metadata).encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full_disk)
    with pytest.raises(GuidanceError, match=r"cannot be written: the disk is full; .* untouched\.$"):
        write(trained(), path=path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if before else [])
