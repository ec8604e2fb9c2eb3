"""Load Concept UNet on files that are damaged, odd or malicious: a model, or one sentence."""

import pytest
from comfyui_gcfg.gcfg.errors import GuidanceError, printable

MODELS = {"unet", "ordinary unet", "unet with metadata with colours", "compact unet with context_dim 1e3"}


@pytest.mark.slow
def test_each_is_a_model_or_one_sentence(hostile_files, caplog):
    from comfyui_gcfg.nodes.runtime.concept import load_concept_unet

    loaded, warned, faults = set(), set(), {}
    for name, path in hostile_files.items():
        caplog.clear()
        try:
            load_concept_unet(str(path))
            loaded.add(name)
        except GuidanceError as error:
            text = str(error)
            whole = text.startswith("Load Concept UNet: unet_name '") and text.endswith(".") and len(text) < 1000
            if not whole or text != printable(text):
                faults[name] = text[:1000]
        except Exception as error:
            faults[name] = f"{type(error).__name__}: {error}"[:1000]
        if any("NaN or infinite" in message for message in caplog.messages):
            warned.add(name)
    assert faults == {}
    assert loaded >= MODELS
    assert all("unet" in name for name in loaded)
    assert warned == {name for name in loaded if "NaN" in name or "infinity" in name}
    assert not (hostile_files["unet"].parent / "exploded").exists()
