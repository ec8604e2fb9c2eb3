"""The stages: each runs once, and a command after a failure goes on with the one that failed."""

import json

import pytest
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.reproduction.settings import read_settings
from comfyui_gcfg.reproduction.stages import STAGES, Stage, run_each


def test_what_is_done_is_not_done_again(tmp_path):
    ran, broken = [], [True]

    def run(name):
        ran.append(name)
        if name == "second" and broken.pop():
            raise RuntimeError("power cut")

    def stages():
        for name in ("first", "second", "third"):
            yield Stage(name, lambda name=name: run(name))

    with pytest.raises(RuntimeError):
        run_each(stages(), tmp_path)
    broken.append(False)
    run_each(stages(), tmp_path)
    assert ran == ["first", "second", "second", "third"]
    assert list(json.loads((tmp_path / STAGES).read_text())) == ["first", "second", "third"]


def test_a_preset_that_is_none_is_named():
    with pytest.raises(GuidanceError, match=r"'huge' is no preset and no TOML file; choose from gpu, long, small"):
        read_settings("huge")
