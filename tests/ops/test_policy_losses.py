"""Policy and critic losses: by hand, by a second implementation, by numerical gradients; free of padding and split."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from saferlhf.ops.losses import response_nll
from saferlhf.ops.policy_losses import (
    clipped_surrogate,
    clipped_value_loss,
    explained_variance,
    kl_loss,
    surrogate_sums,
    token_entropy,
    token_logprobs,
    value_moments,
)

NAN = float("nan")


def example(rows: int = 4, length: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New and old log-probabilities, advantages, and a mask with an empty row; noise outside the mask."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, length, generator=generator, dtype=torch.float64) * 3
    new = old + torch.randn(rows, length, generator=generator, dtype=torch.float64) * 0.4
    advantages = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    mask[0, 3:7] = True
    mask[1, 2:] = True
    mask[2, 4] = True
    return new, old, advantages, mask


# ------------------------------------------------------------------------------------------------ surrogate
def test_surrogate_hand_worked() -> None:
    # ratios 2, 2, 1/2, 1/2, 1.1 with clip 0.2
    ratio = torch.tensor([[2.0, 2.0, 0.5, 0.5, 1.1]])
    advantages = torch.tensor([[3.0, -3.0, 3.0, -3.0, 10.0]])
    # clipped gain 1.2*3; full loss 2*3; full gain 0.5*3; clipped loss 0.8*3; inside 11
    expected = -3.6 + 6.0 - 1.5 + 2.4 - 11.0
    mask = torch.ones(1, 5, dtype=torch.bool)
    loss = clipped_surrogate(ratio.log(), torch.zeros(1, 5), advantages, mask, clip=0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    # a higher upper bound: the first gain is clipped at 1.5
    loss = clipped_surrogate(ratio.log(), torch.zeros(1, 5), advantages, mask, clip=0.2, clip_high=0.5)
    assert loss.item() == pytest.approx(expected + 3.6 - 4.5, abs=1e-5)
    # dual clip at 1.5: the loss of the second token is at most 1.5 * 3
    loss = clipped_surrogate(ratio.log(), torch.zeros(1, 5), advantages, mask, clip=0.2, dual_clip=1.5)
    assert loss.item() == pytest.approx(expected - 6.0 + 4.5, abs=1e-5)


def plain_surrogate(
    new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float, dual: float | None
) -> list[float]:
    """PPO's objective by cases, token by token, with math only."""
    losses = []
    for row in range(len(new)):
        total = 0.0
        for t in range(new.shape[1]):
            if not mask[row, t]:
                continue
            rho, a = math.exp(new[row, t].item() - old[row, t].item()), advantages[row, t].item()
            if a >= 0:
                used = min(rho, 1 + high)
            else:
                used = max(rho, 1 - low)
                used = used if dual is None else min(used, dual)
            total -= used * a
        losses.append(total)
    return losses


@pytest.mark.parametrize(("clip", "high", "dual"), [(0.2, None, None), (0.1, 0.4, None), (0.2, None, 1.3)])
def test_surrogate_against_cases(clip: float, high: float | None, dual: float | None) -> None:
    new, old, advantages, mask = example()
    loss = clipped_surrogate(new, old, advantages, mask, clip=clip, clip_high=high, dual_clip=dual)
    expected = plain_surrogate(new, old, advantages, mask, clip, clip if high is None else high, dual)
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)
    assert loss[3] == 0.0


@pytest.mark.parametrize("settings", [{}, {"clip_high": 0.35}, {"dual_clip": 1.4}])
def test_gradient_of_the_surrogate_is_its_numerical_one(settings: dict[str, float]) -> None:
    """Central differences in float64, on tokens on every side of every bound (none within 1e-3 of a kink)."""
    new, old, advantages, mask = example()
    ratio = (new - old).exp()
    for kink in (0.8, 1.2, 1.35, 1.4):
        assert (ratio[mask] - kink).abs().min() > 1e-3
    sums = surrogate_sums(new, old, advantages, mask, clip=0.2)
    assert 0 < sums["clip_fraction"] < sums["outside_fraction"] < sums["tokens"], "the clip must be at work"
    new.requires_grad_()

    def of(logprobs: Tensor) -> Tensor:
        return clipped_surrogate(logprobs, old, advantages, mask, clip=0.2, **settings)

    assert torch.autograd.gradcheck(of, (new,), eps=1e-6, atol=1e-7)


def test_gradient_of_the_surrogate_through_logits() -> None:
    """From the logits of a small model on, as training has it: temperature, log-softmax, ratio, clip."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 5, (2, 6), generator=generator)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 2:5] = mask[1, 1:] = True
    old = token_logprobs(logits + 0.3 * torch.randn(logits.shape, generator=generator), ids, mask, temperature=0.7)
    advantages = torch.randn(2, 6, generator=generator, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        new = token_logprobs(x, ids, mask, temperature=0.7)
        return clipped_surrogate(new, old, advantages, mask, clip=0.2) - 0.1 * token_entropy(x, mask).sum(1)

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),), eps=1e-6, atol=1e-7)


def test_gradient_at_the_old_policy_is_the_policy_gradient() -> None:
    _, old, advantages, mask = example()
    new = old.clone().requires_grad_()
    clipped_surrogate(new, old, advantages, mask, clip=0.2).sum().backward()
    assert torch.equal(new.grad, torch.where(mask, -advantages, 0.0))


def test_gradient_stops_where_the_clip_is_active() -> None:
    new = torch.tensor([[0.5, 0.5, -0.5, -0.5]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    clipped_surrogate(new, torch.zeros(1, 4), advantages, mask, clip=0.2).sum().backward()
    assert (new.grad != 0).tolist() == [[False, True, True, False]]
    sums = surrogate_sums(new, torch.zeros(1, 4), advantages, mask, clip=0.2)
    assert sums["clip_fraction"] == 2 and sums["outside_fraction"] == 4


def test_no_gradient_into_advantages_and_old_policy() -> None:
    new, old, advantages, mask = (part.requires_grad_() if part.is_floating_point() else part for part in example())
    clipped_surrogate(new, old, advantages, mask, clip=0.2).sum().backward()
    assert new.grad is not None and old.grad is None and advantages.grad is None


# ------------------------------------------------------------------------------------------------ values
def test_value_loss_hand_worked() -> None:
    values = torch.tensor([[1.0, 8.0, -8.0, 0.0]])
    returns = torch.tensor([[3.0, 6.0, 0.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    # old values 0, clip 5: (1-3)^2 = 4; max((8-6)^2, (5-6)^2) = 4; max((-8)^2, (-5)^2) = 64; half of 72
    assert clipped_value_loss(values, torch.zeros(1, 4), returns, mask, clip=5.0).item() == 36.0
    # returns 20: 8 -> 12^2 against the clipped 5 -> 15^2, the larger counts
    far = torch.full((1, 4), 20.0)
    assert clipped_value_loss(values, torch.zeros(1, 4), far, mask, clip=5.0).item() == (361 + 225 + 784) / 2
    assert clipped_value_loss(values, torch.zeros(1, 4), far, mask, clip=None).item() == (361 + 144 + 784) / 2


def test_value_loss_against_a_plain_loop_and_numerical_gradients() -> None:
    generator = torch.Generator().manual_seed(8)
    values, old, returns = (torch.randn(4, 9, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = example()[3]
    loss = clipped_value_loss(values, old, returns, mask, clip=0.3)
    for row in range(4):
        expected = 0.0
        for t in mask[row].nonzero().flatten().tolist():
            v, o, g = values[row, t].item(), old[row, t].item(), returns[row, t].item()
            near = o + max(-0.3, min(0.3, v - o))
            expected += max((v - g) ** 2, (near - g) ** 2) / 2
        assert loss[row].item() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(
        lambda v: clipped_value_loss(v, old, returns, mask, clip=0.3), (values.requires_grad_(),), eps=1e-6, atol=1e-7
    )


# ------------------------------------------------------------------------------------------------ distribution
def test_logprobs_and_entropy_hand_worked() -> None:
    # two words at logits ln 3 and 0: probabilities 3/4, 1/4; at temperature 1/2 they are 9/10, 1/10
    logits = torch.tensor([[[math.log(3.0), 0.0]] * 4])
    ids = torch.tensor([[1, 0, 1, 1]])
    mask = torch.tensor([[False, True, True, False]])
    found = token_logprobs(logits, ids, mask)
    torch.testing.assert_close(found, torch.tensor([[0.0, math.log(0.75), math.log(0.25), 0.0]]))
    found = token_logprobs(logits, ids, mask, temperature=0.5)
    torch.testing.assert_close(found, torch.tensor([[0.0, math.log(0.9), math.log(0.1), 0.0]]))
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    torch.testing.assert_close(
        token_entropy(logits, mask, temperature=0.5), torch.tensor([[0.0, entropy, entropy, 0.0]])
    )


def test_logprobs_are_the_likelihood_loss_token_by_token() -> None:
    generator = torch.Generator().manual_seed(9)
    logits, ids = torch.randn(4, 9, 13, generator=generator), torch.randint(0, 13, (4, 9), generator=generator)
    mask = example()[3]
    nll, count = response_nll(logits, ids, mask)
    found = token_logprobs(logits, ids, mask)
    torch.testing.assert_close(found.sum(1), -nll)
    assert torch.equal((found != 0).sum(1), count)


def test_entropy_against_numpy_and_with_forbidden_tokens() -> None:
    generator = torch.Generator().manual_seed(10)
    logits = torch.randn(1, 3, 7, generator=generator, dtype=torch.float64)
    logits[0, :, 2] = -math.inf
    mask = torch.tensor([[False, True, True]])
    logits.requires_grad_()
    entropy = token_entropy(logits, mask, temperature=1.3)
    for t in (1, 2):
        weights = np.exp(np.delete(logits[0, t - 1].detach().numpy(), 2) / 1.3)
        share = weights / weights.sum()
        assert entropy[0, t].item() == pytest.approx(-(share * np.log(share)).sum())
    entropy.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_a_response_cannot_start_at_the_first_position() -> None:
    logits, ids = torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="nothing before it"):
        token_logprobs(logits, ids, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(logits, ids, torch.tensor([[False, True, True]]), temperature=0.0)


# ------------------------------------------------------------------------------------------------ padding and split
def surrogate(new: Tensor, old: Tensor, third: Tensor, mask: Tensor) -> Tensor:
    return clipped_surrogate(new, old, third, mask, clip=0.2)


def value_loss(new: Tensor, old: Tensor, third: Tensor, mask: Tensor) -> Tensor:
    return clipped_value_loss(new, old, third, mask, clip=0.3)


def divergence(new: Tensor, old: Tensor, third: Tensor, mask: Tensor) -> Tensor:
    return kl_loss(new, old, mask)


LOSSES = pytest.mark.parametrize("loss", [surrogate, value_loss, divergence])


@LOSSES
def test_loss_and_gradient_do_not_depend_on_the_split(loss: Callable[..., Tensor]) -> None:
    """Micro-batches of any size, each with its padding cut, divided by the count of the whole step."""
    new, old, third, mask = example(rows=4)
    tokens = mask.sum()
    reference = new.clone().requires_grad_()
    whole = loss(reference, old, third, mask).sum() / tokens
    whole.backward()
    for size in (1, 2, 3):
        parts, total = new.clone().requires_grad_(), 0.0
        for rows in torch.arange(4).split(size):
            end = int(mask[rows].any(0).nonzero().max()) + 1 if mask[rows].any() else 1
            cut = [part[rows, :end] for part in (parts, old, third, mask)]
            part_loss = loss(*cut).sum() / tokens
            part_loss.backward()
            total += part_loss.item()
        assert total == pytest.approx(whole.item(), rel=1e-12)
        torch.testing.assert_close(parts.grad, reference.grad, atol=1e-15, rtol=1e-12)


@LOSSES
def test_loss_and_gradient_do_not_depend_on_padding(loss: Callable[..., Tensor]) -> None:
    new, old, third, mask = example()
    plain = new.clone().requires_grad_()
    clean = loss(plain, old, third, mask)
    clean.sum().backward()
    pad = lambda x, value: torch.nn.functional.pad(x, (3, 4), value=value)  # noqa: E731
    for noise in (NAN, math.inf, -math.inf, 1e30):
        dirty = [pad(part.masked_fill(~mask, noise), noise) for part in (new, old, third)]
        dirty[0].requires_grad_()
        found = loss(*dirty, pad(mask, False))
        found.sum().backward()
        # a wider row is added up in another order
        torch.testing.assert_close(found, clean, atol=1e-14, rtol=1e-14)
        assert torch.equal(dirty[0].grad[:, 3:-4], plain.grad)


def test_batch_without_any_token() -> None:
    new, old, advantages, mask = example()
    new.requires_grad_()
    nothing = torch.zeros_like(mask)
    loss = surrogate(new, old, advantages, nothing) + value_loss(new, old, advantages, nothing)
    loss.sum().backward()
    assert loss.tolist() == [0.0] * 4
    assert new.grad.abs().sum() == 0
    assert surrogate_sums(new, old, advantages, nothing, clip=0.2)["tokens"] == 0
    assert token_logprobs(torch.zeros(4, 9, 3), torch.zeros(4, 9, dtype=torch.int64), nothing).abs().sum() == 0


def test_exploding_ratio_stays_finite_and_a_nan_is_not_hidden() -> None:
    new = torch.tensor([[500.0, -500.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = clipped_surrogate(new, torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), mask, clip=0.2)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(new.grad).all()
    assert clipped_surrogate(torch.tensor([[NAN, 0.0]]), torch.zeros(1, 2), torch.ones(1, 2), mask, clip=0.2).isnan()


def test_divergence_as_a_loss() -> None:
    with pytest.raises(ValueError, match="holds nothing"):
        kl_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), kind="k1")


# ------------------------------------------------------------------------------------------------ diagnostics
def test_diagnostics_hand_worked_and_additive() -> None:
    new, old, advantages, mask = example()
    whole = surrogate_sums(new, old, advantages, mask, clip=0.2)
    parts = [surrogate_sums(*(x[r] for x in (new, old, advantages, mask)), clip=0.2) for r in ([0], [1, 2], [3])]
    for name, value in whole.items():
        assert sum(part[name] for part in parts).item() == pytest.approx(value.item(), rel=1e-12)
    ratio = (new - old).exp()[mask]
    assert whole["tokens"] == mask.sum() == 12
    assert whole["ratio"].item() == pytest.approx(ratio.sum().item())
    assert whole["approx_kl"].item() == pytest.approx((ratio - 1 - ratio.log()).sum().item())
    assert whole["outside_fraction"] == ((ratio > 1.2) | (ratio < 0.8)).sum()


def test_explained_variance_hand_worked_and_additive() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    mask = torch.tensor([[True, True, True, False]])
    # misses 1, -1, 0: variance 2/3 of the returns' 2/3
    missed = value_moments(torch.tensor([[0.0, 3.0, 3.0, 0.0]]), returns, mask)
    assert explained_variance(missed) == pytest.approx(0.0)
    assert explained_variance(value_moments(returns, returns, mask)) == 1.0
    # right up to a constant is perfect, the wrong way round is worse than nothing
    assert explained_variance(value_moments(returns - 7, returns, mask)) == pytest.approx(1.0)
    assert explained_variance(value_moments(-returns, returns, mask)) == pytest.approx(-3.0)
    halves = [value_moments(returns[:, cut] / 2, returns[:, cut], mask[:, cut]) for cut in (slice(0, 2), slice(2, 4))]
    assert explained_variance(halves[0] + halves[1]) == pytest.approx(0.75)


def test_explained_variance_of_nothing_is_unknown() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert math.isnan(explained_variance(value_moments(torch.rand(1, 3), torch.full((1, 3), 2.5), mask)))
    assert math.isnan(explained_variance(value_moments(torch.rand(1, 3), torch.rand(1, 3), ~mask)))
