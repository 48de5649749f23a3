"""The parts together on a problem whose solution is known: one prompt, four responses of one token each.

For a fixed lambda the policy that maximises the constrained objective with KL weight beta is

    pi(a) ~ pi_ref(a) exp((R(a) - lambda C(a)) / ((1 + lambda) beta))

so training must end there for EVERY lambda (the KL term keeps its weight), and a learned lambda must end where the mean
cost of that policy is the threshold.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saferlhf.config.online_schema import CONSTRAINTS, LagrangianConfig
from saferlhf.ops.advantages import gae, spread
from saferlhf.ops.constraint import Constraint, build_constraint
from saferlhf.ops.policy_losses import clipped_surrogate
from saferlhf.ops.shaping import kl_estimate, shape_rewards

BETA = 1.0
REWARD = torch.tensor([3.0, 2.0, 0.0, 1.0], dtype=torch.float64)
COST = torch.tensor([2.0, -1.0, -1.0, 0.5], dtype=torch.float64)
REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
MASK = torch.tensor([[False, True]] * 4)  # a prompt token, then the response


def at_token(values: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(values), values], dim=1)  # (4, 2)


def solution(lam: float) -> Tensor:
    return (REFERENCE + (REWARD - lam * COST) / ((1 + lam) * BETA)).softmax(0)


def improve(logits: Tensor, constraint: Constraint, *, critic: bool) -> None:
    """One PPO step on all four responses, each weighed by how often the policy gives it: no sampling noise."""
    old = logits.detach().log_softmax(0)
    kl = kl_estimate(at_token(old), at_token(REFERENCE), MASK)
    scores = constraint.shape_scores(REWARD, {"cost": COST})
    costs = {"cost": COST} if constraint.acts_on == "advantages" else {}
    rewards, costs = shape_rewards(scores, costs, kl, MASK, kl_coefficient=BETA)

    def advantage(signal: Tensor) -> Tensor:
        # a perfect critic, or none: the baseline moves no optimum
        value = (old.exp() * signal.sum(1)).sum().expand(4) if critic else torch.zeros(4, dtype=torch.float64)
        return gae(signal, spread(value, MASK), MASK, gamma=1.0, lam=0.95)[0]

    applies = constraint.applies({"cost": COST})
    combined = constraint.combine(advantage(rewards), {k: advantage(v) for k, v in costs.items()}, applies=applies)
    new = logits.log_softmax(0)
    loss = (old.exp() * clipped_surrogate(at_token(new), at_token(old), combined, MASK, clip=0.2)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        logits -= gradient


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("lam", [0.2, 1.0, 4.0])
def test_at_a_fixed_lambda_the_optimum_has_the_kl_weight_beta(lam: float, critic: bool) -> None:
    constraint = build_constraint(LagrangianConfig(name="lagrangian", lambda_init=lam), ["cost"])
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        improve(logits, constraint, critic=critic)
    torch.testing.assert_close(logits.detach().softmax(0), solution(lam), atol=1e-3, rtol=0)


def test_reward_shaping_has_its_own_optimum() -> None:
    constraint = build_constraint(CONSTRAINTS["fixed"](name="fixed", weight=0.7), ["cost"])
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for _ in range(400):
        improve(logits, constraint, critic=True)
    wanted = (REFERENCE + (REWARD - 0.7 * COST) / BETA).softmax(0)
    torch.testing.assert_close(logits.detach().softmax(0), wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["lagrangian", "pid"])
def test_a_learned_lambda_ends_where_the_mean_cost_is_the_threshold(kind: str) -> None:
    low, high = 0.0, 10.0
    for _ in range(60):  # bisection: the mean cost of the solution falls with lambda
        middle = (low + high) / 2
        low, high = (middle, high) if (solution(middle) * COST).sum() > 0 else (low, middle)
    constraint = build_constraint(CONSTRAINTS[kind](name=kind), ["cost"])
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    costs, found = [], {}
    for _ in range(600):
        mean_cost = (logits.detach().softmax(0) * COST).sum()
        found = constraint.update({"cost": mean_cost.reshape(1)})
        costs.append(mean_cost.item())
        improve(logits, constraint, critic=True)
    assert costs[0] > 0.1, "the constraint must be violated at first"
    assert abs(costs[-1]) < 2e-3
    assert constraint.lambdas["cost"] == pytest.approx(high, rel=0.02)
    assert found["cost/saturation"] == 0.0
    torch.testing.assert_close(logits.detach().softmax(0), solution(high), atol=5e-3, rtol=0)
