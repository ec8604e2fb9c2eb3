"""A profiler's trace of a stock and a guided run, and how often each made the host wait for a value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.samplers
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function

from .bench import Bench
from .cases import BY_NAME, Case
from .figures import Figure
from .watch import calls_through

STEPS = 2
# Reading a tensor's value on the host: `.item()`, `if tensor:`, `float(tensor)` all end in the first of these.
_WAITS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
)
_WAITS_PREFIX = "Memcpy DtoH"


def figures(bench: Bench, path: Path, guided: Case = BY_NAME["k2_concept"]) -> list[Figure]:
    """Profile a stock run and a guided one, warm, and store the trace.

    Args:
        bench: the models.
        path: of the trace, for chrome://tracing or Perfetto.
        guided: what to run beside stock guidance.
    """
    cases = {"stock": BY_NAME["stock"], "GCFG": guided}
    on_gpu = bench.clock.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for case in cases.values():
        bench.sample(case.guider(bench), comfy.samplers.sampler_object("euler"), 1)
    with profile(activities=activities) as profiler:
        for label, case in cases.items():
            with record_function(f"{label} run"):
                _run(bench, case, label)
        bench.clock.now()  # a GPU has finished
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    slowest = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=slowest, row_limit=12, max_name_column_width=40))
    waits = {label: _waits(profiler.events(), f"{label} sampling") for label in cases}
    return [_figure(label, counts, waits["stock"]) for label, counts in waits.items()]


def _figure(label: str, counts: Counter[str], stock: Counter[str]) -> Figure:
    return Figure(
        f"waits_{label.lower()}",
        f"values that the host waits for in a step, {label}",
        counts.total() / STEPS,
        "",
        goal=None if label == "stock" else stock.total() / STEPS,
        note=", ".join(f"{name} {number / STEPS:g}" for name, number in counts.items()),
    )


def _run(bench: Bench, case: Case, label: str) -> None:
    """Sample with every step and model call under a name of its own."""
    guider, euler = case.guider(bench), comfy.samplers.sampler_object("euler").sampler_function
    guider.predict_noise = _named(guider.predict_noise, lambda *_: f"{label} step")
    sampler = comfy.samplers.KSAMPLER(_named(euler, lambda *_: f"{label} sampling"))

    def named_call(apply_model: Callable[..., Any]) -> Callable[..., Any]:
        return _named(apply_model, lambda x, *_: f"model call, batch {len(x)}")

    with calls_through(named_call, [getattr(bench, name).model for name in case.models]):
        bench.sample(guider, sampler, STEPS)


def _named(call: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(name(*args)):
            return call(*args, **kwargs)

    return named


def _waits(events: Any, label: str) -> Counter[str]:
    """Count what makes the host wait within a labelled range."""
    within = next(e.time_range for e in events if e.name == label and e.device_type == DeviceType.CPU)
    names = (
        _WAITS_PREFIX if event.name.startswith(_WAITS_PREFIX) else event.name
        for event in events
        if within.start <= event.time_range.start <= within.end
    )
    return Counter(name for name in names if name in (*_WAITS, _WAITS_PREFIX))
