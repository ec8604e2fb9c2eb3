"""The sample stream: a pure function of seed and position, and random in every direction."""

import threading
import time

import numpy as np
import pytest
import torch
from comfyui_gcfg.training.stream import SampleStream, shares
from scipy import stats


class Counted:
    """Latents that tell which image and side they are: mean 100 i + flipped, standard deviation 0."""

    shape = (4, 8, 8)
    flips = True

    def __init__(self, count=10, std=0.0):
        self.count, self.std = count, std

    def __len__(self):
        return self.count

    def __getitem__(self, key):
        image, flipped = key
        return torch.full(self.shape, 100.0 * image + flipped), torch.full(self.shape, self.std)

    def geometry(self, index):
        return 64 + index, 48, index, 0


def images(stream, positions):
    return [int(x0[0, 0, 0]) // 100 for x0 in stream.batch(positions).x0]


def test_each_epoch_shows_every_image_once_in_an_order_of_its_own():
    stream = SampleStream(Counted(), seed=3, scaling_factor=1.0)
    epochs = [images(stream, range(start, start + 10)) for start in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_sample_does_not_depend_on_what_was_asked_before_or_with_it():
    whole = SampleStream(Counted(std=1.0), 7, 0.5, 0.1).batch(range(35))
    other = SampleStream(Counted(std=1.0), 7, 0.5, 0.1)
    for position in (34, 3, 12, 11, 0, 34):
        one = other.batch([position])
        for name in ("x0", "noise", "u", "geometry"):
            assert torch.equal(getattr(one, name)[0], getattr(whole, name)[position]), name


def test_another_seed_draws_everything_anew():
    first, second = (SampleStream(Counted(std=1.0), seed, 1.0).batch(range(10)) for seed in (0, 1))
    assert not (first.u == second.u).any()
    assert not (first.noise == second.noise).any()
    assert first.geometry.tolist() != second.geometry.tolist()


def test_the_numbers_are_as_random_as_they_should_be():
    stream = SampleStream(Counted(count=1000, std=1.0), 0, 1.0)
    batch = stream.batch(range(1000))
    side = ((batch.x0 - 100 * (batch.geometry[:, 0] - 64).reshape(-1, 1, 1, 1)).mean(dim=(1, 2, 3)) > 0.5).float()
    assert stats.kstest(batch.u.numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(batch.noise[:200].flatten().numpy(), "norm").pvalue > 0.01
    assert stats.binomtest(int(side.sum()), 1000, 0.5).pvalue > 0.01
    latent_noise = batch.x0 - 100.0 * (batch.geometry[:, 0] - 64).reshape(-1, 1, 1, 1) - side.reshape(-1, 1, 1, 1)
    assert stats.kstest(latent_noise[:200].flatten().numpy(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(latent_noise.flatten(), batch.noise.flatten())[0, 1]) < 0.01
    assert abs(np.corrcoef(batch.noise[:-1].flatten(), batch.noise[1:].flatten())[0, 1]) < 0.01


def test_without_cached_flips_no_image_is_flipped():
    latents = Counted()
    latents.flips = False
    assert {int(x0[0, 0, 0]) % 100 for x0 in SampleStream(latents, 0, 1.0).batch(range(50)).x0} == {0}
    latents.flips = True
    assert {int(x0[0, 0, 0]) % 100 for x0 in SampleStream(latents, 0, 1.0).batch(range(50)).x0} == {0, 1}


def test_the_scaling_factor_and_the_noise_offset():
    plain = SampleStream(Counted(std=1.0), 0, 1.0).batch(range(20))
    scaled = SampleStream(Counted(std=1.0), 0, 0.18215, 0.1).batch(range(20))
    torch.testing.assert_close(scaled.x0, 0.18215 * plain.x0)
    offset = scaled.noise - plain.noise
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-6, rtol=0)
    assert offset[:, :, 0, 0].std() == pytest.approx(0.1, rel=0.25)
    assert torch.equal(scaled.u, plain.u)


@pytest.mark.parametrize(("processes", "micro"), [(1, 0), (1, 5), (2, 0), (4, 2), (3, 1), (2, 4)])
def test_the_shares_of_all_processes_are_the_batch(processes, micro):
    taken = [shares(3, 12, micro, rank, processes) for rank in range(processes)]
    assert sorted(position for share in taken for part in share for position in part) == list(range(36, 48))
    assert len({len(share) for share in taken}) == 1  # gradients travel as often in each process
    assert max(len(part) for share in taken for part in share) == (micro or 12 // processes)


def test_batches_made_ahead_are_those_that_are_asked_for():
    plain, ahead = (SampleStream(Counted(std=1.0), 0, 1.0) for _ in range(2))
    steps = [shares(step, 6, 2, 0, 1) for step in (0, 1, 2, 7, 0)]  # also others than were announced
    for parts, following in zip(steps, [*steps[1:3], shares(3, 6, 2, 0, 1), *steps[:2]], strict=True):
        for batch, part in zip(ahead.batches(parts, following), parts, strict=True):
            assert torch.equal(batch.x0, plain.batch(part).x0)
            assert torch.equal(batch.noise, plain.batch(part).noise)


def test_the_next_batches_are_made_while_the_step_computes():
    asked = []

    class Noted(Counted):
        def __getitem__(self, key):
            asked.append(threading.current_thread() is threading.main_thread())
            return super().__getitem__(key)

    stream = SampleStream(Noted(), 0, 1.0)
    stream.batches([range(2)], [range(2, 4)])
    deadline = time.monotonic() + 30
    while len(asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert asked == [False] * 4
