"""The benchmark of Guidance Cache: its measures against a library's, and a short run on the trained models."""

import pytest
import torch
from comfyui_gcfg.testkit.inprocess import import_comfyui
from torchmetrics.functional.image import peak_signal_noise_ratio


@pytest.fixture(scope="module")
def reuse(comfyui_path):
    import_comfyui(comfyui_path, cpu=True)
    from comfyui_gcfg.benchmarks import reuse

    return reuse


def pictures(seed):
    return torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(seed))


def test_psnr_is_that_of_the_saved_pictures(reuse):
    a, b = pictures(1), (pictures(1) + 0.1 * pictures(2)).clamp(0, 1)
    saved = [(image * 255).round() for image in (a, b)]
    assert reuse.psnr(a, b) == pytest.approx(float(peak_signal_noise_ratio(*saved, data_range=255.0)), abs=1e-4)
    assert reuse.psnr(a * 3 - 1, (a * 3 - 1).clamp(0, 1)) == 99.0, "values beyond 0 .. 1 are not seen"
    assert reuse.psnr(saved[0] / 255, saved[0] / 255 + 1e-4) == 99.0, "neither is what 8 bits round away"


def test_rmse_counts_in_spreads_of_the_reference(reuse):
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert reuse.rmse(latent, latent) == 0.0
    assert reuse.rmse(5 * latent + 2 * latent.std(), 5 * latent) == pytest.approx(0.4, rel=1e-5)


def test_the_front_holds_what_nothing_beats(reuse):
    points = [(1.0, 30.0), (0.9, 35.0), (0.8, 32.0), (0.95, 35.0), (0.7, 20.0), (1.2, 40.0)]
    assert reuse.front(points) == [(0.7, 20.0), (0.8, 32.0), (0.9, 35.0), (1.2, 40.0)]


def test_a_short_run(reuse, tmp_path):
    from comfyui_gcfg.benchmarks.bench import Bench
    from comfyui_gcfg.benchmarks.cases import CACHED, FULL

    every_2, every_4 = (case for case in CACHED if case.text in ("every 2 (the node's defaults)", "every 4"))
    bench = Bench("sd15", 64, None, 1, cpu=True, folder=str(tmp_path), output=str(tmp_path))
    with torch.inference_mode():
        made = list(reuse.figures(bench, (FULL, every_2, every_4), 4))
    rows = {(figure.row, figure.column): figure for figure in made}
    columns = (reuse.TIME, "time / full run", reuse.PSNR, "latent RMSE")
    assert set(rows) == {(FULL.text, reuse.TIME), *((case.text, c) for case in (every_2, every_4) for c in columns)}
    # Of four steps the first, the second and the fourth are full; by every 4 the first two.
    assert 5 < rows[every_4.text, reuse.PSNR].value < rows[every_2.text, reuse.PSNR].value < 99
    assert 0 < rows[every_2.text, "latent RMSE"].value < rows[every_4.text, "latent RMSE"].value
    assert all(figure.goal is None for figure in made), "only the preset has goals"
    assert (tmp_path / "reuse-front.png").read_bytes().startswith(b"\x89PNG")
