"""The benchmark's commands, which take a core each: all that a session needs run side by side."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

COMMANDS = {
    "bench": ["--small", "--repeats", "1", "--size", "64"],
    "matrix": ["matrix", "--family", "sd15", "--size", "64", "--repeats", "1", "--rival-set", "strength=1.5"],
    "reuse": ["reuse", "--seeds", "1", "--steps", "4", "--setting", "every2", "--setting", "every4"],
}
FILES = {"matrix": {"--profile": "trace.json", "--rival": "rival"}, "reuse": {"--plot": "front.png"}}


# A pack whose guider makes our sum, with every prediction in a call of its own.
RIVAL = """
import comfy.samplers


class Separately(comfy.samplers.CFGGuider):
    \"\"\"The sum of ours, with every prediction in a call of its own.\"\"\"

    def __init__(self, model, second, strength):
        super().__init__(model)
        self.second, self.strength = second, strength

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        def predict(patcher, key):
            patcher.model.current_patcher = patcher  # as loading it for a run does
            return comfy.samplers.calc_cond_batch(patcher.model, [self.conds[key]], x, timestep, model_options)[0]

        text, base = predict(self.model_patcher, "positive"), predict(self.model_patcher, "negative")
        other = predict(self.second, "positive")
        return base + self.cfg * (text - base) + self.strength * (other - base)


class Node:
    @classmethod
    def INPUT_TYPES(cls):
        texts = {"positive": ("CONDITIONING",), "negative": ("CONDITIONING",)}
        numbers = {"cfg": ("FLOAT", {}), "strength": ("FLOAT", {"default": 9.0})}
        required = {"model": ("MODEL",), "second": ("MODEL",), **texts, **numbers}
        return {"required": required, "optional": {"more": ("X",)}}

    RETURN_TYPES, FUNCTION = ("SIGMAS", "GUIDER"), "make"

    def make(self, model, second, positive, cfg, negative, strength):
        guider = Separately(model, second, strength)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return None, guider


NODE_CLASS_MAPPINGS = {"Rival": Node}
"""


@dataclass
class Command:
    """A command that was started, and the folder of what it writes."""

    process: subprocess.Popen
    folder: Path

    def output(self):
        """What it printed, once it has ended well."""
        out, err = self.process.communicate(timeout=500)
        assert self.process.returncode == 0, err
        return out


@pytest.fixture(scope="session")
def commands(tmp_path_factory, root):
    """Every command of `COMMANDS`, started at once from the checkout, whose nodes/ must not shadow ComfyUI's."""
    started = {}
    for name, arguments in COMMANDS.items():
        folder = tmp_path_factory.mktemp(name)
        files = [part for flag, file in FILES.get(name, {}).items() for part in (flag, str(folder / file))]
        if name == "matrix":
            (folder / "rival").mkdir()
            (folder / "rival" / "__init__.py").write_text(RIVAL)
        command = [sys.executable, "-m", "comfyui_gcfg.benchmarks", *arguments, *files, "--device", "cpu"]
        command += ["--output", str(folder), "--cache", str(folder / "cache")]
        process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started[name] = Command(process, folder)
    yield started
    for command in started.values():
        command.process.kill()
        command.process.wait()
