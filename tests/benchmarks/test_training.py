"""The training benchmark: its rows agree with what was measured, and its loops do the work they stand for."""

from dataclasses import replace

import pytest
import torch
from comfyui_gcfg.benchmarks import training, training_files, training_loops
from comfyui_gcfg.benchmarks.bench import Bench
from comfyui_gcfg.testkit.errors import CommandError
from comfyui_gcfg.training.prior.model import open_prior
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

BATCH = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark")


def bench(folder, layout="sd15"):
    return Bench(layout, 64, None, 1, cpu=True, folder=str(folder))


def test_a_small_run_reports_every_row(folder, monkeypatch):
    """Every loop runs here, not in a process of its own: that costs Python's start four times."""
    measured = {}

    def here(function, environment, **arguments):
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        found = function(**arguments)
        measured[arguments.get("fused", "files")] = found
        return found

    monkeypatch.setattr(training, "in_new_process", here)
    monkeypatch.setattr(training, "STEPS", 1)
    rows = {(figure.row, figure.column): figure for figure in training.figures(bench(folder))}
    assert {column for _, column in rows} == {
        *("speed", "peak memory", "data and logging, of a step"),
        *("speed, gcfg train / it", "memory, gcfg train / it"),
    }
    assert {row for row, _ in rows} == {training.OURS, *training.PEERS}
    for found in (measured[None], measured[False], measured[True]):
        (seconds,) = found["seconds"]  # of two steps the first does not count
        assert seconds > 0
        assert found["peak"] > 50e6
    assert 0 < rows[training.OURS, "data and logging, of a step"].value < 100


def test_rows_agree_with_what_was_measured():
    def run(*seconds, peak, beside=0.0):
        return {"seconds": list(seconds), "beside": [beside] * len(seconds), "peak": peak}

    plain, fused = training.PEERS
    found = {
        training.OURS: [run(1.0, 2.0, 9.0, peak=80, beside=0.01), run(4.0, peak=90, beside=0.03)],
        plain: [run(3.0, peak=100), run(5.0, peak=100)],
        fused: [run(2.0, peak=160), run(4.0, peak=90)],
    }
    values = {(figure.row, figure.column): figure for figure in training.rows(found, 2)}
    assert values[training.OURS, "speed"].value == pytest.approx((2 / 2 + 2 / 4) / 2)
    assert values[training.OURS, "data and logging, of a step"].value == pytest.approx(2.0)
    faster = values[plain, "speed, gcfg train / it"]
    assert (faster.value, faster.low, faster.high) == pytest.approx(((3 / 2 + 5 / 4) / 2, 5 / 4, 3 / 2))
    assert not faster.met
    memory = values[plain, "memory, gcfg train / it"]
    assert (memory.value, memory.met) == (pytest.approx(0.85), True)
    assert values[fused, "memory, gcfg train / it"].value == pytest.approx(0.75)
    assert values[fused, "speed, gcfg train / it"].goal is None


def test_the_peer_does_all_of_its_work_in_every_step(folder, monkeypatch):
    """VAE, text encoder and UNet once each, on the whole batch; every weight of the UNet moves."""
    calls, unets = [], []
    for kind, name in ((AutoencoderKL, "encode"), (CLIPTextModel, "forward"), (UNet2DConditionModel, "forward")):
        original = getattr(kind, name)

        def counted(self, x, *args, _original=original, _kind=kind, **kwargs):
            calls.append((_kind, len(x)))
            if _kind is UNet2DConditionModel:
                unets.append(self)
            return _original(self, x, *args, **kwargs)

        monkeypatch.setattr(kind, name, counted)
    checkpoint = training_files.make_checkpoint(bench(folder))
    with training_loops.theirs(replace(bench(folder), batch=BATCH), "fp32", fused=False) as step:
        step()
    assert sorted(calls, key=str) == sorted(
        [(AutoencoderKL, BATCH), (CLIPTextModel, BATCH), (UNet2DConditionModel, BATCH)], key=str
    )
    before = open_prior(checkpoint).load_unet().state_dict()
    assert not [name for name, after in unets[0].state_dict().items() if torch.equal(after, before[name])]


def test_another_family_is_refused(folder):
    with pytest.raises(CommandError, match=r"^training: it is measured on SD1\.5 only; leave --family out\.$"):
        list(training.figures(bench(folder, "sdxl")))
