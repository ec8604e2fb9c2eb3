"""One optimizer step beside a loop written by hand with diffusers' scheduler and plain torch."""

import copy

import pytest
import torch
from accelerate import Accelerator
from comfyui_gcfg.gcfg.errors import GuidanceError
from comfyui_gcfg.training.config import TrainConfig
from comfyui_gcfg.training.learner import Learner
from comfyui_gcfg.training.objective import Objective
from comfyui_gcfg.training.stream import Batch
from diffusers import DDPMScheduler
from torch import nn

SIZES = torch.zeros(4, 4, dtype=torch.int)


class Small(nn.Module):
    """A network of x and t that has weights, a frozen weight, and a nonlinearity."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x) + t.reshape(-1, 1, 1, 1) / 1000)) * self.frozen


def batches(count, size=4):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        x0, noise = torch.randn(2, size, 4, 8, 8, generator=generator).unbind()
        yield Batch(x0, noise, torch.rand(size, generator=generator), SIZES[:size])


def learner_of(unet, prediction="eps", **settings):
    config = TrainConfig(**{"learning_rate": 1e-2, "weight_decay": 0.1, **settings})
    return Learner(unet, Objective.of(prediction), lambda m, x, t, sizes: m(x, t), config, Accelerator())


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_steps_equal_a_loop_written_by_hand(prediction):
    unet = Small()
    by_hand = copy.deepcopy(unet).double()
    schedule = DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    weights = [p for p in by_hand.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, 1e-2, (0.8, 0.99), weight_decay=0.1, fused=False, foreach=False)
    average = [w.detach().clone() for w in weights]
    learner = learner_of(unet, prediction, beta1=0.8, beta2=0.99, max_grad_norm=0.5, warmup_steps=3, ema_decay=0.6)

    for step, batch in enumerate(batches(6)):
        result = learner.step(step, [batch])
        t = (batch.u * 1000).long()
        x = schedule.add_noise(batch.x0, batch.noise, t).double()
        target = batch.noise if prediction == "eps" else schedule.get_velocity(batch.x0, batch.noise, t)
        loss = nn.functional.mse_loss(by_hand(x, t.double()), target.double())
        optimizer.zero_grad()
        loss.backward()
        norm = sum(w.grad.square().sum() for w in weights).sqrt()
        for w in weights:
            w.grad *= min(1, 0.5 / float(norm))
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 3)
        optimizer.step()
        decay = min(0.6, (1 + step) / (10 + step)) if step else 0.0
        average = [decay * a + (1 - decay) * w.detach() for a, w in zip(average, weights, strict=True)]
        assert not result.skipped
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)

    for ours, theirs in zip(learner.parameters, weights, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-4)
    with learner.averaged():
        for ours, theirs in zip(learner.parameters, average, strict=True):
            torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-4)
    for ours, theirs in zip(learner.parameters, weights, strict=True):  # back again
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-4)
    assert unet.frozen.item() == 1


def test_min_snr_weighs_each_sample(monkeypatch):
    (batch,) = batches(1)
    loss = learner_of(Small(), min_snr_gamma=5.0).step(0, [batch]).loss
    unet, schedule = Small(), DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = (batch.u * 1000).long()
    ratio = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    errors = (unet(schedule.add_noise(batch.x0, batch.noise, t), t) - batch.noise).square().mean(dim=(1, 2, 3))
    assert loss == pytest.approx((errors * (5 / ratio).clamp(max=1)).mean().item(), rel=1e-5)
    assert loss != pytest.approx(errors.mean().item(), rel=1e-2)


def test_micro_batches_of_any_sizes_are_one_batch():
    (batch,) = batches(1)
    parts = [
        Batch(*(getattr(batch, n)[i] for n in ("x0", "noise", "u", "geometry"))) for i in (slice(0, 3), slice(3, 4))
    ]
    one, two = learner_of(Small()), learner_of(Small())
    first, second = one.step(0, [batch]), two.step(0, parts)
    assert first.loss == pytest.approx(second.loss, rel=1e-6)
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_is_skipped_and_leaves_everything_as_it_was(bad):
    learner = learner_of(Small())
    good, spoilt, last = batches(3)
    learner.step(0, [good])
    before, _ = learner.state()
    before = {part: {key: tensor.clone() for key, tensor in entries.items()} for part, entries in before.items()}
    spoilt.noise[0, 0, 0, 0] = bad
    result = learner.step(1, [spoilt])
    assert result.skipped
    after, scalars = learner.state()
    for part, entries in before.items():
        for key, tensor in entries.items():
            assert torch.equal(tensor, after[part][key]), (part, key)
    assert scalars["ema_steps"] == 1
    assert not learner.step(2, [last]).skipped


def test_a_saved_state_goes_on_to_the_last_bit():
    first, other = learner_of(Small()), learner_of(Small())
    start, *rest = batches(4)
    first.step(0, [start])
    tensors, scalars = first.state()
    tensors = {part: {key: tensor.clone() for key, tensor in entries.items()} for part, entries in tensors.items()}
    other.load(tensors.__getitem__, scalars)
    for step, batch in enumerate(rest, start=1):
        assert first.step(step, [batch]) == other.step(step, [batch])
    ends = [learner.state()[0] for learner in (first, other)]
    for part in ends[0]:
        assert all(torch.equal(ends[0][part][key], ends[1][part][key]) for key in ends[0][part])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_names_the_setting(error):
    def full(model, x, t, sizes):
        raise error

    learner = Learner(Small(), Objective.of("eps"), full, TrainConfig(), Accelerator())
    (batch,) = batches(1)
    with pytest.raises(GuidanceError, match=r"Out of memory with 4 images at once .* train\.micro_batch_size"):
        learner.step(0, [batch])


def test_8_bit_adamw_says_what_it_needs():
    with pytest.raises(GuidanceError, match=r"train\.optimizer 'adamw_8bit' needs a CUDA device, got cpu"):
        learner_of(Small(), optimizer="adamw_8bit")
