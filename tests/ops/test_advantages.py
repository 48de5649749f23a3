"""Advantages against numbers worked by hand and against their definitions written as plain sums."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from saferlhf.ops.advantages import EPSILON, gae, group_advantages, moments, spread, value_after, whiten

NAN = float("nan")


def example(rows: int = 5, length: int = 11, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a response mask with rows of every kind; noise outside the mask."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    mask[0, 2:7] = True
    mask[1, 4:] = True  # to the end
    mask[2, 3] = True  # one token
    mask[3, 1:10] = True  # row 4 has none
    return rewards, values, mask


def by_definition(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, bootstrap: list[float]
) -> Tensor:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, token by token."""
    result = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        tokens = mask[row].nonzero().flatten().tolist()
        v = [values[row, t].item() for t in tokens] + [bootstrap[row]]
        deltas = [rewards[row, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(tokens)]
        for i, t in enumerate(tokens):
            result[row, t] = math.fsum((gamma * lam) ** step * delta for step, delta in enumerate(deltas[i:]))
    return result


# ------------------------------------------------------------------------------------------------ gae
def test_gae_hand_worked() -> None:
    # two prompt tokens, three response tokens, one of padding; gamma 0.5, lam 0.5
    rewards = torch.tensor([[9.0, 9.0, 1.0, 0.0, 4.0, 9.0]])
    values = torch.tensor([[9.0, 9.0, 2.0, 4.0, 2.0, 9.0]])
    mask = torch.tensor([[False, False, True, True, True, False]])
    # deltas: 1 + 2 - 2 = 1;  0 + 1 - 4 = -3;  4 + 0 - 2 = 2
    # backwards: 2;  -3 + 2/4 = -2.5;  1 - 2.5/4 = 0.375
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.0, 0.0, 0.375, -2.5, 2.0, 0.0]]
    assert returns.tolist() == [[0.0, 0.0, 2.375, 1.5, 4.0, 0.0]]
    # a cut-off response worth 8 afterwards: last delta 4 + 4 - 2 = 6, then -3 + 1.5 = -1.5, then 1 - 0.375 = 0.625
    advantages, _ = gae(rewards, values, mask, gamma=0.5, lam=0.5, bootstrap=torch.tensor([8.0]))
    assert advantages.tolist() == [[0.0, 0.0, 0.625, -1.5, 6.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
@pytest.mark.parametrize("cut", [False, True])
def test_gae_against_its_definition(gamma: float, lam: float, cut: bool) -> None:
    rewards, values, mask = example()
    after = [0.5, -2.0, 3.0, 0.0, 7.0] if cut else [0.0] * 5
    bootstrap = torch.tensor(after, dtype=torch.float64) if cut else None
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    expected = by_definition(rewards, values, mask, gamma, lam, after)
    torch.testing.assert_close(advantages, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(returns, (expected + values) * mask, atol=1e-12, rtol=1e-12)


def test_monte_carlo_returns_are_the_reward_to_go() -> None:
    rewards, values, mask = example()
    _, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_go, atol=1e-12, rtol=1e-12)


def test_gae_is_the_same_alone_in_a_batch_and_with_other_padding() -> None:
    rewards, values, mask = (part.float() if part.is_floating_point() else part for part in example())
    whole, _ = gae(rewards, values, mask, gamma=0.99, lam=0.95)
    for row in range(4):
        first, last = mask[row].nonzero().flatten()[[0, -1]].tolist()
        cut = slice(first, last + 1)
        alone, _ = gae(
            rewards[row : row + 1, cut], values[row : row + 1, cut], mask[row : row + 1, cut], gamma=0.99, lam=0.95
        )
        assert torch.equal(alone[0], whole[row, cut])
        assert whole[row].count_nonzero() == mask[row].sum()


def test_what_stands_outside_the_mask_has_no_influence() -> None:
    rewards, values, mask = example()
    clean = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    dirty = gae(rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, float("inf")), mask, gamma=1.0, lam=0.95)
    for left, right in zip(clean, dirty, strict=True):
        assert torch.equal(left, right)
        assert torch.isfinite(left).all()


def test_gae_carries_no_gradient_and_half_precision_is_widened() -> None:
    rewards, values, mask = example()
    values = values.bfloat16().requires_grad_()
    advantages, returns = gae(rewards.bfloat16(), values, mask, gamma=1.0, lam=0.95)
    assert advantages.dtype == returns.dtype == torch.float32
    assert not advantages.requires_grad and not returns.requires_grad


def test_gae_refuses_other_shapes() -> None:
    rewards, values, mask = example()
    with pytest.raises(ValueError, match="shapes differ"):
        gae(rewards, values[:, 1:], mask, gamma=1.0, lam=0.95)


def test_value_after_the_last_token() -> None:
    values = torch.arange(12.0).reshape(3, 4)
    mask = torch.tensor([[False, True, True, False], [False, True, False, False], [False, False, False, False]])
    assert value_after(values, mask).tolist() == [3.0, 6.0, 0.0]
    assert value_after(values, mask, torch.tensor([True, False, True])).tolist() == [3.0, 0.0, 0.0]
    mask[1] = torch.tensor([False, True, True, True])
    assert value_after(values, mask, torch.tensor([True, False, False])).tolist() == [3.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="one column of padding"):
        value_after(values, mask)


# ------------------------------------------------------------------------------------------------ groups
def test_rloo_hand_worked() -> None:
    # prompt 7: 1, 3, 8 -> 1 - 5.5, 3 - 4.5, 8 - 2; prompt 2: 4, 6 -> -2, 2; prompt 5 stands alone
    scores = torch.tensor([1.0, 4.0, 3.0, 9.0, 8.0, 6.0])
    groups = torch.tensor([7, 2, 7, 5, 7, 2])
    torch.testing.assert_close(group_advantages(scores, groups), torch.tensor([-4.5, -2.0, -1.5, 0.0, 6.0, 2.0]))


def test_grpo_hand_worked() -> None:
    # 1, 3, 8: mean 4, variance (9 + 1 + 16) / 3
    scores = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64)
    deviation = math.sqrt(26 / 3) + EPSILON
    expected = torch.tensor([-3 / deviation, -1 / deviation, 4 / deviation], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(scores, torch.zeros(3, dtype=torch.int64), "grpo"), expected)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_groups_against_plain_loops(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(40, generator=generator, dtype=torch.float64) * 5 + 100
    groups = torch.randint(0, 9, (40,), generator=generator) * 1_000_003
    found = group_advantages(scores, groups, kind).tolist()
    for row in range(40):
        others = [scores[i].item() for i in range(40) if groups[i] == groups[row] and i != row]
        if not others:
            assert found[row] == 0.0
        elif kind == "rloo":
            assert found[row] == pytest.approx(scores[row].item() - statistics.fmean(others), abs=1e-10)
        else:
            everyone = [*others, scores[row].item()]
            expected = (scores[row].item() - statistics.fmean(everyone)) / (statistics.pstdev(everyone) + EPSILON)
            assert found[row] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_equal_scores_have_no_advantage(kind: str) -> None:
    advantages = group_advantages(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.int64), kind)
    assert advantages.abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_groups_do_not_depend_on_the_order_or_on_other_prompts(kind: str) -> None:
    generator = torch.Generator().manual_seed(4)
    scores, groups = torch.randn(24, generator=generator), torch.arange(24) // 4
    whole = group_advantages(scores, groups, kind)
    order = torch.randperm(24, generator=generator)
    torch.testing.assert_close(group_advantages(scores[order], groups[order], kind), whole[order])
    split = [group_advantages(s, g, kind) for s, g in zip(scores.split(8), groups.split(8), strict=True)]
    torch.testing.assert_close(torch.cat(split), whole)


def test_a_missing_score_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        group_advantages(torch.tensor([1.0, NAN]), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="unknown kind"):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.int64), "mean")


def test_spread_over_the_tokens() -> None:
    mask = torch.tensor([[False, True, True], [False, True, False]])
    assert spread(torch.tensor([2.0, -1.0]), mask).tolist() == [[0.0, 2.0, 2.0], [0.0, -1.0, 0.0]]


# ------------------------------------------------------------------------------------------------ whitening
def test_whiten_hand_worked() -> None:
    x = torch.tensor([[NAN, 1.0, 3.0], [5.0, NAN, NAN]])
    mask = ~x.isnan()
    # mean 3, variance (4 + 0 + 4) / 3
    deviation = math.sqrt(8 / 3)
    torch.testing.assert_close(
        whiten(x, mask), torch.tensor([[0.0, -2 / deviation, 0.0], [2 / deviation, 0.0, 0.0]]), atol=1e-6, rtol=1e-6
    )
    scaled = whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(scaled[mask], torch.tensor([1.0, 3.0, 5.0]) / deviation, atol=1e-6, rtol=1e-6)


def test_whitening_parts_by_the_moments_of_the_whole() -> None:
    _, x, mask = example()
    whole = whiten(x, mask)
    torch.testing.assert_close(whole[mask].std(correction=0), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(whole[mask].mean(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    total = moments(x[:2], mask[:2]) + moments(x[2:], mask[2:])
    parts = [whiten(x[rows], mask[rows], total=total) for rows in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_nothing_to_whiten() -> None:
    x = torch.tensor([[4.0, 5.0]])
    assert whiten(x, torch.tensor([[True, False]])).tolist() == [[4.0, 0.0]]
    assert whiten(x, torch.zeros(1, 2, dtype=torch.bool)).tolist() == [[0.0, 0.0]]
    same = whiten(torch.full((1, 4), 3.0), torch.ones(1, 4, dtype=torch.bool))
    assert same.abs().max() == 0.0
