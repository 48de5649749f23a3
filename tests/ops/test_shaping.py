"""KL shaping: by hand, by a second implementation, and its weight in the combined advantage for every lambda."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from saferlhf.errors import UserError
from saferlhf.ops.advantages import gae, group_advantages
from saferlhf.ops.constraint import Lagrangian, Limits, Rectified
from saferlhf.ops.shaping import (
    KlCoefficient,
    clip_scores,
    kl_estimate,
    place_at_end,
    shape_rewards,
    truncated_scores,
)

NAN = float("nan")
LN2 = math.log(2.0)
MASK = torch.tensor(
    [
        [False, False, True, True, True, False],
        [False, True, True, True, True, True],
        [False] * 6,
        [False, True] + [False] * 4,
    ]
)


def random_logprobs(seed: int) -> Tensor:
    return -torch.rand(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


# ------------------------------------------------------------------------------------------------ divergence
def test_estimators_hand_worked() -> None:
    # the reference finds the token half as likely, then twice as likely: x = -ln 2, then ln 2
    logprobs, reference = torch.tensor([[0.0, -2.0, -2.0]]), torch.tensor([[0.0, -2.0 - LN2, -2.0 + LN2]])
    mask = torch.tensor([[False, True, True]])
    expected = {"k1": [LN2, -LN2], "k2": [LN2**2 / 2] * 2, "k3": [0.5 - 1 + LN2, 2 - 1 - LN2]}
    for kind, values in expected.items():
        found = kl_estimate(logprobs, reference, mask, kind)
        torch.testing.assert_close(found, torch.tensor([[0.0, *values]]), atol=1e-6, rtol=1e-6)


def test_equal_policies_have_exactly_no_divergence() -> None:
    logprobs = random_logprobs(0).float()
    for kind in ("k1", "k2", "k3"):
        assert kl_estimate(logprobs, logprobs.clone(), MASK, kind).abs().max() == 0.0


def test_k1_and_k3_are_unbiased_and_k2_has_the_gradient() -> None:
    """Over all tokens of a small vocabulary the expectation can be written out."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    exact = (logp.exp() * (logp - reference)).sum()
    everything = torch.ones(1, 5, dtype=torch.bool)
    for kind in ("k1", "k3"):
        mean = (logp.exp() * kl_estimate(logp[None], reference[None], everything, kind)[0]).sum()
        torch.testing.assert_close(mean, exact)
    # sampled from the policy, the gradient of a loss term is the mean of its gradients at fixed samples
    loss = (logp.exp().detach() * kl_estimate(logp[None], reference[None], everything, "k2")[0]).sum()
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(found, wanted)


def test_divergence_outside_the_mask_and_at_impossible_tokens() -> None:
    logprobs, reference = random_logprobs(0).requires_grad_(), random_logprobs(1)
    clean = kl_estimate(logprobs, reference, MASK, "k3")
    dirty_input = reference.masked_fill(~MASK, NAN)
    dirty = kl_estimate(logprobs, dirty_input, MASK, "k3")
    assert torch.equal(clean, dirty)
    dirty.sum().backward()
    assert torch.isfinite(logprobs.grad).all()
    assert (logprobs.grad[~MASK] == 0).all()
    far = kl_estimate(torch.tensor([[-2000.0]]), torch.tensor([[0.0]]), torch.tensor([[True]]), "k3")
    assert torch.isfinite(far).all()


def test_unknown_estimator() -> None:
    with pytest.raises(ValueError, match="k1, k2, k3"):
        kl_estimate(random_logprobs(0), random_logprobs(1), MASK, "k4")


# ------------------------------------------------------------------------------------------------ scores
def test_score_stands_at_the_last_response_token() -> None:
    placed = place_at_end(torch.tensor([5.0, -1.0, 7.0, 2.0]), MASK)
    expected = torch.zeros(4, 6)
    expected[0, 4], expected[1, 5], expected[3, 1] = 5.0, -1.0, 2.0  # row 2 has no response
    assert torch.equal(placed, expected)
    # a missing score stays missing, at its own row only
    assert place_at_end(torch.tensor([NAN, 1.0, NAN, 1.0]), MASK).isnan().sum() == 1


def test_scores_are_clipped_by_themselves() -> None:
    clipped, cut = clip_scores(torch.tensor([-60.0, 3.0, 50.0, 51.0]), 50.0)
    assert clipped.tolist() == [-50.0, 3.0, 50.0, 50.0]
    assert cut.tolist() == [True, False, False, True]
    same, cut = clip_scores(torch.tensor([1e9]), None)
    assert same.tolist() == [1e9] and not cut.any()


def test_truncated_responses() -> None:
    scores, truncated = torch.tensor([3.0, 3.0]), torch.tensor([True, False])
    assert truncated_scores(scores, truncated, "penalty", 2.0).tolist() == [1.0, 3.0]
    assert truncated_scores(scores, truncated, "bootstrap").tolist() == [0.0, 3.0]
    assert truncated_scores(scores, truncated, "none").tolist() == [3.0, 3.0]
    with pytest.raises(ValueError, match="unknown treatment"):
        truncated_scores(scores, truncated, "ignore")


# ------------------------------------------------------------------------------------------------ shaping
def test_shaping_hand_worked() -> None:
    kl = torch.tensor([[9.0, 1.0, -2.0, 9.0]])
    mask = torch.tensor([[False, True, True, False]])
    rewards, costs = shape_rewards(torch.tensor([3.0]), {"cost": torch.tensor([4.0])}, kl, mask, kl_coefficient=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[0.0, -0.1, 3.2, 0.0]]))
    torch.testing.assert_close(costs["cost"], torch.tensor([[0.0, 0.1, 3.8, 0.0]]))


def test_shaping_against_a_plain_loop() -> None:
    logprobs, reference, beta = random_logprobs(2), random_logprobs(3), 0.07
    scores = {name: torch.randn(4, generator=torch.Generator().manual_seed(i)).double() for i, name in enumerate("rab")}
    rewards, costs = shape_rewards(
        scores["r"],
        {name: scores[name] for name in "ab"},
        kl_estimate(logprobs, reference, MASK),
        MASK,
        kl_coefficient=beta,
    )
    for sign, name, found in ((-1, "r", rewards), (1, "a", costs["a"]), (1, "b", costs["b"])):
        for row, column in itertools.product(range(4), range(6)):
            expected = 0.0
            if MASK[row, column]:
                expected = sign * beta * (logprobs[row, column] - reference[row, column]).item()
                if not MASK[row, column + 1 :].any():
                    expected += scores[name][row].item()
            assert found[row, column].item() == pytest.approx(expected, abs=1e-12)


def lagrangian(**lambdas: float) -> Lagrangian:
    names = list(lambdas)
    return Lagrangian(
        names,
        dict.fromkeys(names, 0.0),
        {name: Limits(value, 1e-9, 1e9) for name, value in lambdas.items()},
        lr=dict.fromkeys(names, 0.1),
    )


@pytest.mark.parametrize(
    "lambdas", [{"a": 1e-6}, {"a": 0.3}, {"a": 1.0}, {"a": 50.0}, {"a": 2.0, "b": 0.7}, {"a": 9.0, "b": 9.0, "c": 0.01}]
)
def test_kl_weight_of_the_combined_advantage_is_the_same_for_every_lambda(lambdas: dict[str, float]) -> None:
    """Scores of zero leave the KL term alone: it must come out with weight -1, however many costs press how hard."""
    beta, kl = 0.05, kl_estimate(random_logprobs(4), random_logprobs(5), MASK)
    nothing = torch.zeros(4, dtype=torch.float64)
    rewards, costs = shape_rewards(nothing, dict.fromkeys(lambdas, nothing), kl, MASK, kl_coefficient=beta)
    no_critic = torch.zeros_like(kl)

    def advantage(signal: Tensor) -> Tensor:
        return gae(signal, no_critic, MASK, gamma=1.0, lam=0.95)[0]

    combined = lagrangian(**lambdas).combine(advantage(rewards), {name: advantage(c) for name, c in costs.items()})
    torch.testing.assert_close(combined, advantage(-beta * kl), atol=1e-9, rtol=1e-9)
    # of whole responses against each other, without critics
    scores = lagrangian(**lambdas).combine(rewards.sum(1), {name: c.sum(1) for name, c in costs.items()})
    groups = torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(
        group_advantages(scores, groups), group_advantages((-beta * kl).sum(1), groups), atol=1e-9, rtol=1e-9
    )


def test_kl_weight_of_a_rectified_constraint() -> None:
    beta, kl = 0.05, kl_estimate(random_logprobs(4), random_logprobs(5), MASK)
    nothing = torch.zeros(4, dtype=torch.float64)
    rewards, costs = shape_rewards(nothing, {"a": nothing}, kl, MASK, kl_coefficient=beta)
    constraint = Rectified(["a"], {"a": 0.0}, {"a": Limits(3.0, 0.1, 5.0)}, lr={"a": 0.1}, slack={"a": 0.0})
    applies = constraint.applies({"a": torch.tensor([1.0, -1.0, 1.0, -1.0])})
    torch.testing.assert_close(constraint.combine(rewards, costs, applies=applies), -beta * kl)


def test_for_rloo_combining_before_or_after_comparing_is_the_same() -> None:
    generator = torch.Generator().manual_seed(6)
    rewards, cost = (torch.randn(12, generator=generator, dtype=torch.float64) for _ in range(2))
    groups, constraint = torch.arange(12) // 4, lagrangian(a=1.7)
    before = group_advantages(constraint.combine(rewards, {"a": cost}), groups)
    after = constraint.combine(group_advantages(rewards, groups), {"a": group_advantages(cost, groups)})
    torch.testing.assert_close(before, after)


# ------------------------------------------------------------------------------------------------ coefficient
def test_adaptive_coefficient_hand_worked() -> None:
    beta = KlCoefficient(0.1, target=6.0, horizon=1000)
    # 6.6 is 10% too much: 0.1 * (1 + 0.1 * 100 / 1000)
    assert beta.update(6.6, 100) == pytest.approx(0.101)
    # ten times too much counts as 20%; nothing at all as -20%
    assert beta.update(60.0, 100) == pytest.approx(0.101 * 1.02)
    assert beta.update(0.0, 100) == pytest.approx(0.101 * 1.02 * 0.98)
    assert beta.update(6.0, 100) == beta.value


def test_coefficient_is_fixed_without_a_target_and_never_turns_negative() -> None:
    assert KlCoefficient(0.02).update(100.0, 64) == 0.02
    short = KlCoefficient(0.1, target=6.0, horizon=10)
    assert 0 < short.update(0.0, 1000) < 0.1


def test_coefficient_resumes() -> None:
    first, second = KlCoefficient(0.1, target=6.0), KlCoefficient(0.1, target=6.0)
    first.update(9.0, 64)
    second.load_state_dict(first.state_dict())
    assert second.update(3.0, 64) == first.update(3.0, 64)
    with pytest.raises(UserError, match="missing"):
        second.load_state_dict({})
