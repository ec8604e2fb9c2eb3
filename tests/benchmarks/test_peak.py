"""The peak's ruler; the figures themselves are measured by the benchmark's own run."""

import subprocess
import sys

import pytest
import torch
from comfyui_gcfg.benchmarks.peak import Memory, Report

MB = 10**6


# In a process of its own, as the benchmark does it: one that ran other tests holds freed memory to take from.
LET_GO = """
import torch
from comfyui_gcfg.benchmarks.peak import Memory

memory = Memory(torch.device("cpu"))
with memory.peak() as found:
    big = torch.ones(25_000_000)  # 100 MB, for at least one look
    memory.now()
    del big
    small = torch.ones(5_000_000)
peak, before = found
print(peak - before, memory.now() - before, small.nbytes)
"""


def test_the_peak_sees_what_was_let_go_again(tmp_path):
    run = subprocess.run([sys.executable, "-c", LET_GO], cwd=tmp_path, capture_output=True, text=True, check=True)
    peak, after, small = map(int, run.stdout.split())
    assert peak == pytest.approx(100 * MB, abs=8 * MB)
    assert after == pytest.approx(small, abs=8 * MB)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all of the process's own memory is counted")
def test_a_mapped_file_is_not_counted(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(50 * MB))
    memory = Memory(torch.device("cpu"))
    with memory.peak() as found:
        mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=50 * MB, dtype=torch.uint8)
        assert mapped.amax() == 0
    assert found[0] - found[1] < 8 * MB


def test_the_ratio_is_over_weights_and_activations():
    assert Report(105, 90, weights=80, activations=20, concept=40).ratio == 1.05
