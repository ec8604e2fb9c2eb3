"""The learning rate of a method is that with the lowest FID, and its training becomes that of the first seed."""

import json

import pytest
from comfyui_gcfg.evaluation.config_file import load_config
from comfyui_gcfg.evaluation.results import FORMAT
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.reproduction.settings import read_settings
from comfyui_gcfg.reproduction.tuning import choose, learning_rate, tuned, write_tuning

RATES = (2e-4, 1e-3, 5e-3)


@pytest.fixture
def measured(tmp_path):
    """Folders of trainings at three rates, and their FIDs; the last rate of the LoRA was not measured."""
    for number in range(len(RATES)):
        results = tmp_path / "evaluation" / f"face-rate-{number}" / "results"
        results.mkdir(parents=True)
        for name, row in tuned("face").items():
            folder = tmp_path / "methods" / "face" / f"{name}-rate-{number}"
            folder.mkdir(parents=True)
            (folder / f"{name}.safetensors").write_text(f"{name} at {RATES[number]}")
            if name == "lora" and number == 2:
                continue
            fid = {"lora": [3.0, 2.0], "concept": [9.0, 8.0, 7.0]}.get(name, [1.0, 2.0, 3.0])[number]
            (results / f"fid-{row}.json").write_text(json.dumps({"format": FORMAT, "numbers": {"fid": fid}}))
    return tmp_path


def test_the_lowest_fid_decides(measured):
    settings = read_settings("long")
    assert settings.methods.learning_rates == RATES
    choose(measured, settings, "face")
    found = {name: learning_rate(measured, "face", name) for name in tuned("face")}
    assert found == {
        "concept": 5e-3,
        "dreambooth": 2e-4,
        "custom_diffusion": 2e-4,
        "lora": 1e-3,
        "oft": 2e-4,
        "textual_inversion": 2e-4,
    }
    assert learning_rate(measured, "face", "concept_zero") == 5e-3
    lora = measured / "methods" / "face" / "lora-0" / "lora.safetensors"
    assert lora.read_text() == "lora at 0.001"


def test_a_method_that_was_never_measured_is_named(measured):
    for path in measured.glob("evaluation/*/results/fid-oft.json"):
        path.unlink()
    with pytest.raises(GuidanceError, match="No learning rate of 'oft' was measured"):
        choose(measured, read_settings("long"), "face")


def test_a_rate_is_measured_with_few_images_of_its_own_trainings(tmp_path):
    settings = read_settings("long")
    config = load_config(write_tuning(tmp_path, settings, "animal", 2))
    assert config.fid.count == settings.evaluation.fid_search_count < settings.evaluation.fid_count
    assert config.models["oft"].unet == "methods/animal/oft-rate-2/oft.safetensors"
    assert config.models["concept_zero"].unet == "methods/animal/concept_zero-0/concept_zero.safetensors"
