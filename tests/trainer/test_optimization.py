"""Optimizers and schedules, against their formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from fastcl.trainer import TrainConfig
from fastcl.trainer.lars import LARS
from fastcl.trainer.optimization import build_optimizer, learning_rate, slow_momentum


def network() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        frozen = torch.nn.Linear(2, 2).requires_grad_(False)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 5), frozen)


def test_lars_is_algorithm_1_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float = 1.0) -> list[torch.Tensor]:
        return [
            scale * torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((3, 5), (7,), (2, 2))
        ]

    weights = [torch.nn.Parameter(w) for w in draw()]
    with torch.no_grad():
        weights[2].zero_()  # no length: a ratio of 0 would never let it go
    trust, momentum, decay = 0.02, 0.9, 0.3
    lars = LARS(
        [{"params": [weights[0], weights[2]]}, {"params": [weights[1]], "weight_decay": 0.0, "adapt": False}],
        lr=0.1, momentum=momentum, weight_decay=decay, trust=trust,
    )  # fmt: skip
    expected = [w.detach().tolist() for w in weights]
    flat = [torch.tensor(w, dtype=torch.float64).flatten().tolist() for w in expected]
    velocity = [[0.0] * len(w) for w in flat]
    for step in range(4):
        rate = 0.1 / (step + 1)
        for group in lars.param_groups:
            group["lr"] = rate
        gradients = draw(10.0**step)
        if step == 3:
            gradients[0].zero_()
        for parameter, gradient in zip(weights, gradients, strict=True):
            parameter.grad = gradient.clone()
        lars.step()
        for i, gradient in enumerate(gradients):
            w, g = flat[i], gradient.flatten().tolist()
            beta = 0.0 if i == 1 else decay
            length, slope = (math.sqrt(math.fsum(x * x for x in vector)) for vector in (w, g))
            ratio = trust * length / (slope + beta * length) if i != 1 and length and slope else 1.0
            velocity[i] = [
                momentum * v + rate * ratio * (gx + beta * wx) for v, gx, wx in zip(velocity[i], g, w, strict=True)
            ]
            flat[i] = [wx - v for wx, v in zip(w, velocity[i], strict=True)]
            torch.testing.assert_close(
                weights[i].detach().flatten(), torch.tensor(flat[i], dtype=torch.float64), rtol=1e-12, atol=1e-14
            )
    assert not torch.equal(weights[2], torch.zeros_like(weights[2]))


def test_lars_leaves_parameters_without_a_gradient_and_evaluates_its_closure() -> None:
    moved, still = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    lars = LARS([moved, still], lr=1.0)

    def closure() -> torch.Tensor:
        loss = moved.square().sum()
        loss.backward()
        return loss

    assert lars.step(closure).item() == 4
    assert torch.equal(still, torch.ones(2, 2)) and not torch.equal(moved, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("lars", LARS)], ids=str
)
@pytest.mark.parametrize("exclude", [False, True])
def test_groups_of_parameters(name: str, kind: type[torch.optim.Optimizer], exclude: bool) -> None:
    model = network()
    optimizer = build_optimizer(
        TrainConfig(optimizer=name, weight_decay=0.25, learning_rate=0.5, exclude_norm_bias=exclude), model
    )
    assert type(optimizer) is kind
    decayed = {
        id(p): (group["weight_decay"], group.get("adapt")) for group in optimizer.param_groups for p in group["params"]
    }
    assert set(decayed) == {id(p) for p in model.parameters() if p.requires_grad}
    weights = {id(model[0].weight), id(model[2].weight)}
    for key, (decay, adapt) in decayed.items():
        plain = key in weights or (not exclude and name != "lars")
        assert decay == (0.25 if plain else 0.0)
        assert adapt == ((key in weights) if name == "lars" else None)
    assert all(group["lr"] == 0.5 for group in optimizer.param_groups)
    if name == "sgd":
        assert all(group["momentum"] == 0.9 and not group["nesterov"] for group in optimizer.param_groups)


def test_the_default_schedule_warms_up_for_a_twentieth_and_is_a_cosine() -> None:
    config = TrainConfig(steps=100, learning_rate=2.0)
    assert [learning_rate(config, step) for step in range(1, 6)] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert learning_rate(config, 53) == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi * 48 / 96)))  # half way
    assert 0 < learning_rate(config, 100) < 1e-3


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("linear", 4), ("sqrt", 32)])
def test_the_learning_rate_grows_with_the_batch(scaling: str, factor: float) -> None:
    config = TrainConfig(batch_size=1024, lr_scaling=scaling, learning_rate=0.5, warmup_steps=10)
    assert learning_rate(config, 10) == 0.5 * factor


def test_warm_up_takes_as_many_steps_as_asked() -> None:
    none = TrainConfig(steps=10, learning_rate=1.0, warmup_steps=0)
    assert learning_rate(none, 1) == pytest.approx(0.5 * (1 + math.cos(math.pi / 11)))
    rates = [learning_rate(TrainConfig(steps=10, learning_rate=1.0, warmup_steps=10), step) for step in range(1, 11)]
    assert rates == pytest.approx([0.1 * step for step in range(1, 11)])


def test_steps_are_those_of_moco() -> None:
    config = TrainConfig(steps=200, learning_rate=0.03, lr_schedule="steps", warmup_steps=0)
    rates = [learning_rate(config, step) for step in range(1, 201)]
    assert rates == pytest.approx([0.03] * 120 + [0.003] * 40 + [0.0003] * 40)


def test_the_momentum_of_slow_networks() -> None:
    assert slow_momentum(TrainConfig(momentum=0.9), 17) == 0.9
    config = TrainConfig(steps=100, momentum=0.9, momentum_schedule="cosine")
    assert slow_momentum(config, 1) == pytest.approx(0.9)
    assert slow_momentum(config, 51) == pytest.approx(0.95)
    values = [slow_momentum(config, step) for step in range(1, 101)]
    assert values == sorted(values) and 0.9999 < values[-1] < 1
