"""The benchmark of Guidance Cache: its measures against a library's, and a short run on the trained models."""

import json
import math
import subprocess
import sys

import pytest
import torch
from comfyui_gcfg.benchmarks.quality import front, psnr, rmse
from torchmetrics.functional.image import peak_signal_noise_ratio


def pictures(seed):
    return torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(seed))


def test_psnr_is_that_of_the_saved_pictures():
    a, b = pictures(1), (pictures(1) + 0.1 * pictures(2)).clamp(0, 1)
    saved = [(image * 255).round() for image in (a, b)]
    assert psnr(a, b) == pytest.approx(float(peak_signal_noise_ratio(*saved, data_range=255.0)), abs=1e-4)
    assert psnr(a * 3 - 1, (a * 3 - 1).clamp(0, 1)) == 99.0, "values beyond 0 .. 1 are not seen"
    assert psnr(saved[0] / 255, saved[0] / 255 + 1e-4) == 99.0, "neither is what 8 bits round away"


def test_rmse_counts_in_spreads_of_the_reference():
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert rmse(latent, latent) == 0.0
    assert rmse(5 * latent + 2 * latent.std(), 5 * latent) == pytest.approx(0.4, rel=1e-5)


def test_the_front_holds_what_nothing_beats():
    points = [(1.0, 30.0), (0.9, 35.0), (0.8, 32.0), (0.95, 35.0), (0.7, 20.0), (1.2, 40.0)]
    assert front(points) == [(0.7, 20.0), (0.8, 32.0), (0.9, 35.0), (1.2, 40.0)]


@pytest.mark.slow
def test_a_short_run(tmp_path):
    command = [sys.executable, "-m", "comfyui_gcfg.benchmarks", "reuse", "--seeds", "1", "--steps", "4"]
    command += ["--setting", "every2", "--setting", "every4", "--plot", str(tmp_path / "front.png")]
    command += ["--output", str(tmp_path), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "reuse.json").read_text())["figures"]}
    measures = [f"{name}_{what}" for name in ("every2", "every4") for what in ("time", "saved", "psnr", "rmse")]
    assert set(rows) == {"full_time", *measures}
    assert all(math.isfinite(row["value"]) for row in rows.values())
    # Of four steps the first, the second and the fourth are full; by every 4 the first two.
    assert 5 < rows["every4_psnr"]["value"] < rows["every2_psnr"]["value"] < 99
    assert 0 < rows["every2_rmse"]["value"] < rows["every4_rmse"]["value"]
    assert rows["every2_psnr"]["goal"] is None, "only the preset has a goal"
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_setting_is_refused(tmp_path):
    command = [sys.executable, "-m", "comfyui_gcfg.benchmarks", "reuse", "--setting", "never", "--device", "cpu"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert run.returncode == 1
    error = run.stderr.splitlines()[-1]
    assert error.startswith("Error: --setting never: expected one of full, text2_concept3, every2, ")
