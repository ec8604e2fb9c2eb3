"""The demo's small models and pictures, against independent references. No server."""

import sys

import numpy
import pytest
import torch
from comfyui_gcfg.gcfg.concept_file import describe
from comfyui_gcfg.testkit import model_files, models, pictures, sparse
from safetensors import safe_open
from safetensors.torch import load_file


def test_one_seed_gives_one_model():
    first, again, other = (models.unet_state_dict("sd15", seed) for seed in (3, 3, 4))
    assert first.keys() == other.keys()
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
    assert not torch.equal(first["middle_block.0.in_layers.2.weight"], other["middle_block.0.in_layers.2.weight"])
    # drawn by name, so a machine, a torch version or another order of the layers changes nothing
    assert first["time_embed.0.weight"].flatten()[:2].tolist() == pytest.approx(
        models.unet_state_dict("sd21", 3)["time_embed.0.weight"].flatten()[:2].tolist()
    )


def test_the_parameter_count_that_the_docs_state():
    assert sum(w.numel() for w in models.unet_state_dict("sd15").values()) == 25_789_444


def test_the_concept_file_is_a_folded_one(model_folder):
    with safe_open(model_folder / "unet" / model_files.CONCEPT, "pt") as file:
        found = describe({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    assert (found.form, found.naming, found.context_dim) == ("folded", "LDM", 768)


def test_holes_read_as_zeros_and_take_no_disk(tmp_path):
    path = tmp_path / "sparse.safetensors"
    kept = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.float16)}
    sparse.write_with_holes(path, kept, {"zero": (1024, 8192)})
    read = load_file(path)
    assert all(torch.equal(read[name], w) for name, w in kept.items())
    assert read["zero"].shape == (1024, 8192)
    assert read["zero"].dtype == torch.float16
    assert not read["zero"].any()
    assert path.stat().st_size > 16_000_000
    if sys.platform.startswith("linux"):
        assert path.stat().st_blocks * 512 < 1_000_000


def test_the_mask_covers_the_face_and_nothing_else():
    picture = numpy.asarray(pictures.full_body(200))
    assert picture.shape == (300, 200, 4)
    mask = picture[..., 3] == 0
    ys, xs = numpy.nonzero(mask)
    assert 0.02 < mask.mean() < 0.1
    assert ys.max() < 90
    assert abs(xs.mean() - 100) < 2
    skin = numpy.abs(picture[..., :3].astype(int) - (226, 178, 150)).max(-1) < 12
    assert skin[mask].mean() > 0.3  # the face is there, under the mask
    assert skin[~mask].mean() < 0.01


def test_an_interrupted_preparation_is_not_taken_for_a_good_one(tmp_path, monkeypatch):
    """Without its list of finished files a folder is made anew; with it, nothing is written."""
    calls = []
    monkeypatch.setattr(model_files, "_places", lambda: [("loras", model_files.XL_LORA)])
    original = model_files.models.lora_state_dict
    monkeypatch.setattr(model_files.models, "lora_state_dict", lambda *a, **k: calls.append(1) or original(*a, **k))
    model_files.make_small_models(tmp_path)
    model_files.make_small_models(tmp_path)
    assert len(calls) == 1
    (tmp_path / "small-models.json").unlink()
    model_files.make_small_models(tmp_path)
    assert len(calls) == 2
    monkeypatch.setattr(model_files, "recipe", lambda: "another")
    model_files.make_small_models(tmp_path)
    assert len(calls) == 3
