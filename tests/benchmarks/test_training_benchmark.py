"""The training benchmark: its rows agree with what was measured, and its loops do the work they stand for."""

import json
import os
from pathlib import Path

import pytest
import torch
from comfyui_gcfg.benchmarks import training as command
from comfyui_gcfg.benchmarks import training_loops
from comfyui_gcfg.benchmarks.command import app
from comfyui_gcfg.benchmarks.flops import peak_tflops, step_flops
from comfyui_gcfg.benchmarks.training_files import SMALL, make_checkpoint, make_latents
from comfyui_gcfg.benchmarks.training_peer import PeerSettings, make_peer
from comfyui_gcfg.testkit.errors import CommandError
from comfyui_gcfg.training.prior.model import open_prior
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel
from typer.testing import CliRunner

BATCH, STEPS = 2, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def job(folder):
    checkpoint = make_checkpoint(folder, SMALL)
    latents = make_latents(folder, open_prior(checkpoint).load_vae(), 64)
    return training_loops.Job("ours", True, str(checkpoint), str(latents), 64, BATCH, STEPS, "fp32", False, 1, False)


def test_a_small_run_reports_rows_that_agree(job, folder, tmp_path, monkeypatch, capsys):
    """Every loop runs here, not in a process of its own: that costs Python's start five times."""
    reports = {}

    def run(job, environment):
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        reports[job.loop] = training_loops.LOOPS[job.loop](job, tmp_path / job.loop)
        return reports[job.loop]

    monkeypatch.setattr(training_loops, "run", run)
    monkeypatch.setattr(command, "RESUMED", 1000)
    command.training(
        small=True, repeats=1, steps=STEPS, size=64, batch=BATCH, ema=True, images=2, threads=1, device="cpu",
        peak=1.0, cpu_time=False, output=tmp_path / "out", cache=folder,
    )  # fmt: skip
    stored = json.loads((tmp_path / "out" / "training-benchmarks.json").read_text())
    printed = capsys.readouterr().out
    rows = {row["name"]: row for row in stored["figures"]}
    values = {name: row["value"] for name, row in rows.items()}
    assert all(row["text"] in printed for row in rows.values())
    assert set(values) == {
        *(f"{kind}_{loop}" for kind in ("speed", "memory") for loop in ("ours", "theirs", "theirs_fused")),
        *("speedup", "speedup_fused", "memory", "beside", "rate", "utilisation", "caching", "caching_memory"),
        "resuming",
    }
    seconds = {loop: sum(report.seconds) / STEPS for loop, report in reports.items() if loop != "caching"}
    for loop, each in seconds.items():
        assert values[f"speed_{loop}"] == pytest.approx(BATCH / each)
        assert len(reports[loop].losses) == STEPS
        assert all(0 < loss < 10 for loss in reports[loop].losses)
    assert values["speedup"] == pytest.approx(values["speed_ours"] / values["speed_theirs"])
    assert values["memory"] == pytest.approx(values["memory_ours"] / values["memory_theirs"])
    assert rows["speedup"]["met"] == (values["speedup"] >= 1.4)
    assert rows["memory"]["met"] == (values["memory"] <= 0.9)
    assert 0 < values["beside"] < 100
    assert values["utilisation"] == pytest.approx(values["rate"] / 1000 * 100)  # of 1 TFLOP/s
    assert "500 images kept, 500 left" in rows["resuming"]["note"]
    assert stored["setting"]["ema"] is True


def test_a_loop_in_a_process_of_its_own(job):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    report = training_loops.run(training_loops.caching_job(job, 2), environment)
    assert report.seconds[0] > 0
    assert report.peak_bytes > 50e6
    with pytest.raises(RuntimeError, match="the caching loop failed"):
        training_loops.run(training_loops.caching_job(job, 2), {"PYTHONHOME": "/nowhere"})


def test_the_peer_does_all_of_its_work_in_every_step(job, monkeypatch):
    """VAE, text encoder and UNet once each, on the whole batch; every weight of the UNet moves."""
    calls = []
    for kind, name in ((AutoencoderKL, "encode"), (CLIPTextModel, "forward"), (UNet2DConditionModel, "forward")):
        original = getattr(kind, name)

        def counted(self, x, *args, _original=original, _kind=kind, **kwargs):
            calls.append((_kind, len(x)))
            if _kind is UNet2DConditionModel:
                unets.append(self)
            return _original(self, x, *args, **kwargs)

        monkeypatch.setattr(kind, name, counted)
    unets = []
    step = make_peer(PeerSettings(Path(job.checkpoint), SMALL, 64, BATCH, "fp32", True, False))
    step()
    assert sorted(calls, key=str) == sorted(
        [(AutoencoderKL, BATCH), (CLIPTextModel, BATCH), (UNet2DConditionModel, BATCH)], key=str
    )
    before = open_prior(Path(job.checkpoint)).load_unet().state_dict()
    assert not [name for name, after in unets[0].state_dict().items() if torch.equal(after, before[name])]


def test_flops_are_those_of_the_layers(job):
    """Counted by hand: 2 for each multiplication of a convolution, matrix or attention; three passes of each."""
    unet = open_prior(Path(job.checkpoint)).load_unet()
    total = 0

    def count(module, inputs, output):
        nonlocal total
        total += 2 * output.numel() * module.weight[0].numel()

    for name, module in unet.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and ".attn2." not in name:
            module.register_forward_hook(count)
    with torch.no_grad():
        unet(torch.zeros(1, 4, 8, 8), 0, torch.zeros(1, 1, 768))
    blocks = sum(name.endswith(".attn1") for name, _ in unet.named_modules())
    attention = blocks * 2 * 2 * 64**2 * 320  # q k and the weighted sum of v, over 64 pixels
    assert step_flops(Path(job.checkpoint), 64) == pytest.approx(3 * (total + attention), rel=0.02)
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("Some Other GPU") is None


def test_a_wrong_size_is_refused():
    result = CliRunner().invoke(app, ["training", "--size", "100", "--device", "cpu"])
    assert isinstance(result.exception, CommandError)
    assert str(result.exception) == "--size 100: expected a positive multiple of 64, as SD1.5's latents need; round it."
