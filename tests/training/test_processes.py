"""Several processes of one run, started as users start them."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
from accelerate import Accelerator
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.testkit.processes import torchrun
from comfyui_gcfg.training.config_file import load_config
from comfyui_gcfg.training.run import train


def log_of(folder):
    lines = (json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def test_two_processes_give_the_losses_of_one_and_stop_together(
    config_file, tmp_path, tmp_path_factory, checkpoint, digits, cache, write_config
):
    """To 1e-4 relative: float32 sums in another order, through 40 steps of Adam; one process ends the run."""
    settings = {
        "train": {"steps": 40, "batch_size": 6, "micro_batch_size": 2, "learning_rate": 1e-4},
        "output": {"checkpoint_every": 1000},
    }
    alone = tmp_path_factory.mktemp("alone")
    train(load_config(write_config(alone, checkpoint, digits, cache, **settings)))

    config = config_file(**settings)
    two = torchrun("train", config)
    log = tmp_path / "run" / "log.jsonl"
    while two.poll() is None and not log.exists():
        time.sleep(0.005)
    workers = subprocess.run(["pgrep", "-P", str(two.pid)], capture_output=True, text=True).stdout.split()
    while two.poll() is None and log.read_text().count("\n") < 3:
        time.sleep(0.005)
    os.kill(int(workers[-1]), signal.SIGTERM)  # one of them is told, both stop
    out, err = two.communicate(timeout=120)
    assert re.search(r"Stopped at step (\d+) of 40", out), err
    done = len(log_of(tmp_path))
    assert 3 <= done < 40
    assert (tmp_path / "run" / "checkpoints" / f"step-{done:08d}" / "manifest.json").is_file()
    train(load_config(config))
    ours, theirs = ([loss for _, loss, _ in log_of(folder)] for folder in (tmp_path, alone))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_batch_that_cannot_be_shared_is_refused(config_file, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(GuidanceError, match=r"train\.batch_size is 4, expected a multiple of the 3 processes"):
        train(load_config(config_file()))
