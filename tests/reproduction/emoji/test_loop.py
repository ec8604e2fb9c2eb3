"""A training that is killed and goes on ends in the very weights of one that was not."""

import pytest
import torch
from comfyui_gcfg.reproduction.emoji.loop import Plan, Watch, train
from torch import nn

PLAN = Plan(steps=40, learning_rate=0.05, warm_up=5, cooldown=0.5, decay=0.9, seed=3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)).to(
        memory_format=torch.channels_last
    )


def loss(net, rng, noise):
    x = torch.randn(4, 3, 8, 8, generator=noise) + float(rng.normal())
    return (net(x) - x.flip(1)).square().mean()


def weights(net):
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


class Killed(Exception):
    pass


@pytest.fixture
def uninterrupted(tmp_path):
    net = network()
    train(net, loss, PLAN, tmp_path / "whole.pt")
    return weights(net)


def test_it_learns_and_leaves_the_averaged_weights(uninterrupted, tmp_path):
    kept = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert kept["step"] == 40
    average = torch.cat([part.flatten() for part in kept["average"]])
    assert torch.equal(uninterrupted, average)
    assert not torch.equal(uninterrupted, torch.cat([part.flatten() for part in kept["network"].values()]))


def test_killed_between_two_writes(uninterrupted, tmp_path):
    """What was done since the last write is done again, and comes out the same."""
    calls = []

    def killed(net, rng, noise):
        calls.append(1)
        if len(calls) == 24:
            raise Killed
        return loss(net, rng, noise)

    with pytest.raises(Killed):
        train(network(), killed, PLAN, tmp_path / "state.pt", seconds=0)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 23
    net = network()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()  # nothing of a new network counts
    train(net, loss, PLAN, tmp_path / "state.pt")
    assert torch.equal(weights(net), uninterrupted)


def test_what_watches_sees_the_averaged_weights_and_the_mean_loss(uninterrupted, tmp_path):
    seen, net = [], network()
    watch = Watch(10, lambda step, state, mean: seen.append((step, {k: w.clone() for k, w in state.items()}, mean)))
    train(net, loss, PLAN, tmp_path / "state.pt", watch)
    assert [step for step, _, _ in seen] == [10, 20, 30, 40]
    assert seen[0][2] > seen[-1][2] > 0
    assert torch.equal(torch.cat([w.flatten() for w in seen[-1][1].values()]), uninterrupted)
    assert torch.equal(weights(net), uninterrupted)  # watching changes nothing


def test_the_rate_rises_stays_and_falls():
    plan = Plan(steps=1000, learning_rate=1.0, warm_up=10, cooldown=0.2)
    assert [plan.rate(step) for step in (0, 4, 9, 500, 800, 900)] == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5])
    assert 0 < plan.rate(999) <= 0.005
