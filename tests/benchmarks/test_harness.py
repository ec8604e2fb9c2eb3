"""What every section measures with: rounds, ratios, the watch, the memory sampler, tables, processes of their own."""

import json
import os
import subprocess
import sys

import pytest
import torch
from comfyui_gcfg.benchmarks.figures import Figure, table, write_json
from comfyui_gcfg.benchmarks.harness import Clock, interleaved, ratio, watching
from comfyui_gcfg.benchmarks.memory import Memory
from comfyui_gcfg.benchmarks.process import in_new_process
from comfyui_gcfg.testkit.errors import CommandError

MB = 10**6


def test_rounds_go_to_and_fro_and_the_first_does_not_count():
    order = []

    def call(name):
        return lambda number: order.append((name, number)) or len(order)

    found = interleaved({"a": call("a"), "b": call("b")}, 3, "test")
    assert [name for name, _ in order] == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [number for _, number in order[::2]] == [0, 0, 1, 2]
    assert found == {"a": [3, 6, 7], "b": [4, 5, 8]}
    assert interleaved({"a": call("a")}, 1, "test", warm_up=False) == {"a": [9]}


def test_a_ratio_is_taken_within_each_round():
    figure = Figure.of("a", "/ b", ratio([1.0, 6.0, 9.0], [1.0, 2.0, 6.0]), "x", goal=1.4)
    assert (figure.value, figure.low, figure.high, figure.met) == (1.5, 1.0, 3.0, False)
    assert figure.cell() == "1.500 (1.000 .. 3.000), goal <= 1.4 MISSED"


def test_a_table_has_a_row_for_each_case_and_the_json_says_the_same(tmp_path):
    figures = [
        Figure.of("one", "time", [2.0, 1.0, 4.0], "s"),
        Figure.of("one", "calls", [2], "count", note=" of batch 1, 2"),
        Figure.of("two", "speed", [3.0], "images/s", goal=2.0, at_least=True),
    ]
    assert table("what", figures).splitlines() == [
        "| what | time                  | calls           | speed                     |",
        "|------|-----------------------|-----------------|---------------------------|",
        "| one  | 2.00 s (1.00 .. 4.00) | 2 of batch 1, 2 |                           |",
        "| two  |                       |                 | 3 images/s, goal >= 2 met |",
    ]
    write_json(tmp_path / "new" / "figures.json", {"size": 64}, {"what": figures})
    stored = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert stored["setting"] == {"size": 64}
    assert [(row["value"], row["met"]) for row in stored["sections"]["what"]] == [(2.0, None), (2, None), (3.0, True)]


class Seconds:
    """A clock that a model's call and everything else move by hand."""

    now_is = 0.0

    def now(self):
        return self.now_is

    time = Clock.time


def test_the_watch_tells_model_calls_from_the_rest():
    class Model:
        def apply_model(self, x, seconds):
            clock.now_is += seconds
            return x

    clock, model = Seconds(), Model()

    def step():
        clock.now_is += 1.0
        model.apply_model(torch.zeros(2, 4), 5.0)
        model.apply_model(torch.zeros(3, 4), seconds=0.5)

    with watching([model, model], clock) as watch:
        split = watch.split(step)
    assert (split.within, split.around, split.whole) == (5.5, 1.0, 6.5)
    assert watch.batches == [2, 3]
    assert "apply_model" not in vars(model), "the class's own again"


# In a process of its own, as the benchmark does it: one that ran other tests holds freed memory to take from.
LET_GO = """
import torch
from comfyui_gcfg.benchmarks.memory import Memory

memory = Memory(torch.device("cpu"))
with memory.peak() as peak:
    big = torch.ones(25_000_000)  # 100 MB, for at least one look
    memory.now()
    del big
    small = torch.ones(5_000_000)
print(peak.grown, memory.now() - peak.before, small.nbytes)
"""


def test_the_peak_sees_what_was_let_go_again(tmp_path):
    run = subprocess.run([sys.executable, "-c", LET_GO], cwd=tmp_path, capture_output=True, text=True, check=True)
    peak, after, small = map(int, run.stdout.split())
    assert peak == pytest.approx(100 * MB, abs=8 * MB)
    assert after == pytest.approx(small, abs=8 * MB)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all of the process's own memory is counted")
def test_a_mapped_file_is_not_counted(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(50 * MB))
    with Memory(torch.device("cpu")).peak() as peak:
        mapped = torch.from_file(str(tmp_path / "weights"), shared=False, size=50 * MB, dtype=torch.uint8)
        assert mapped.amax() == 0
    assert peak.grown < 8 * MB


def test_a_call_in_a_process_of_its_own():
    assert in_new_process(os.getpid) != os.getpid()
    assert in_new_process(os.getenv, {"GCFG_SAYS": "hello"}, key="GCFG_SAYS") == "hello"
    with pytest.raises(CommandError, match=r"^json:loads failed in a process of its own \(1\):"):
        in_new_process(json.loads, s="{")
