"""The schedule by hand, and which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from saferlhf.config.schema import OptimizerConfig, ScheduleConfig
from saferlhf.errors import UserError
from saferlhf.tasks.optimization import build_optimizer, build_schedule, learning_rate_factor


def factors(total: int, **schedule: float | str) -> list[float]:
    config = ScheduleConfig(**{"name": "cosine", "warmup_ratio": 0.0, **schedule})  # type: ignore[arg-type]
    return [learning_rate_factor(step, total, config) for step in range(total + 1)]


def test_linear_by_hand() -> None:
    # two of ten steps of warm-up: 1/3, 2/3; then eight equal steps from 1 down to 0, one step after the last
    found = factors(10, name="linear", warmup_ratio=0.2)
    assert found == pytest.approx([1 / 3, 2 / 3, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0])


def test_cosine_by_hand() -> None:
    half = math.sqrt(0.5)
    assert factors(4) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2, 0])
    # to a fifth of the peak instead of zero: 0.2 + 0.8 x
    assert factors(4, final_ratio=0.2) == pytest.approx([1, 0.2 + 0.4 * (1 + half), 0.6, 0.2 + 0.4 * (1 - half), 0.2])


def test_constant_by_hand() -> None:
    assert factors(4, name="constant", warmup_ratio=0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.5])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_the_first_step_learns_and_the_peak_is_one(name: str, warmup: float, total: int) -> None:
    found = factors(total, name=name, warmup_ratio=warmup)
    assert all(0 < factor <= 1 for factor in found[:-1])
    warmed = max(1, math.ceil(total * warmup)) if warmup else 0
    assert found[:warmed] == sorted(found[:warmed]) and found[warmed:] == sorted(found[warmed:], reverse=True)
    assert found[warmed] == pytest.approx(1)


def test_the_scheduler_follows() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = build_optimizer([weight], OptimizerConfig("adamw", lr=0.1))
    schedule = build_schedule(optimizer, 10, ScheduleConfig("linear", warmup_ratio=0.2))
    used = []
    for _ in range(10):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert used == pytest.approx([0.1 * factor for factor in factors(10, name="linear", warmup_ratio=0.2)[:10]])


def test_weight_decay_spares_one_dimensional_parameters() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(model.parameters(), OptimizerConfig("adamw", lr=0.5, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        # a zero gradient leaves the decay alone: p (1 - lr * decay)
        expected = before[name] * 0.95 if parameter.ndim >= 2 else before[name]
        assert torch.allclose(parameter, expected, atol=1e-7), name


def test_one_step_of_adamw_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    config = OptimizerConfig("adamw", lr=0.1, betas=[0.5, 0.75], eps=1e-8, weight_decay=0.0)
    optimizer = build_optimizer([weight], config)
    weight.grad = torch.tensor([[4.0, -0.5]])
    optimizer.step()
    # bias-corrected moments of the first step are g and g^2: each weight moves by lr against its gradient's sign
    assert torch.allclose(weight, torch.tensor([[0.9, -1.9]]), atol=1e-6)


def test_nothing_to_train_is_refused() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match="no parameter is trainable"):
        build_optimizer(frozen.parameters(), OptimizerConfig("adamw", lr=0.1))


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    groups = build_optimizer(model.parameters(), OptimizerConfig("adamw", lr=0.1)).param_groups
    assert [p.shape for group in groups for p in group["params"]] == [(3,)]


def test_plain_gradient_descent_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    bias = nn.Parameter(torch.tensor([3.0]))
    optimizer = build_optimizer([weight, bias], OptimizerConfig(name="sgd", lr=0.5, weight_decay=0.1))
    for _ in range(2):  # no momentum: the second step is as long as the first
        weight.grad, bias.grad = torch.tensor([[0.2, 0.4]]), torch.tensor([1.0])
        optimizer.step()
    # w <- w - 0.5 (g + 0.1 w) = 0.95 w - 0.5 g, biases without decay
    torch.testing.assert_close(weight.data, torch.tensor([[0.95 * (0.95 - 0.1) - 0.1, 0.95 * (-1.9 - 0.2) - 0.2]]))
    torch.testing.assert_close(bias.data, torch.tensor([2.0]))
