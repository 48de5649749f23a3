"""Losses against numbers worked by hand and against plain float64 formulas."""

import math

import pytest
import torch

from saferlhf.ops.losses import cost_loss, response_nll, response_nll_from_hidden, reward_loss

LN2 = math.log(2.0)


def nlsig(x: float) -> float:
    """-log sigmoid(x), in float64 with math only."""
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


# ------------------------------------------------------------------------------------------------ reward
def test_reward_loss_at_zero_is_ln2():
    loss = reward_loss(torch.zeros(3, 2), torch.tensor([0, 1, 0]), regularization=0.001)
    assert loss.shape == (3,)
    torch.testing.assert_close(loss, torch.full((3,), 0.6931472), atol=1e-6, rtol=0)


def test_reward_loss_hand_worked():
    # row 0: winner 2, loser 1: -log sigmoid(1) = 0.313262; squares 5/2 * 0.1 = 0.25; (3)^2 * 0.01 = 0.09
    # row 1: winner is response 1: -1 against 1: -log sigmoid(-2) = 2.126928; squares 1 * 0.1; sum 0
    loss = reward_loss(
        torch.tensor([[2.0, 1.0], [1.0, -1.0]]), torch.tensor([0, 1]), regularization=0.1, centering=0.01
    )
    torch.testing.assert_close(loss, torch.tensor([0.653262, 2.226928]), atol=1e-6, rtol=0)


def test_reward_loss_against_float64_formula():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 2, generator=generator) * 4
    preferred = torch.randint(0, 2, (50,), generator=generator)
    loss = reward_loss(scores, preferred, regularization=0.03, margin=0.7, centering=0.02)
    for row in range(50):
        pair = scores[row].double().tolist()
        winner, loser = pair[int(preferred[row])], pair[1 - int(preferred[row])]
        expected = nlsig(winner - loser - 0.7) + 0.03 * (winner**2 + loser**2) / 2 + 0.02 * (winner + loser) ** 2
        assert loss[row].item() == pytest.approx(expected, rel=1e-5)


def test_reward_regulariser_is_mu_times_mean_over_all_scores():
    scores = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    chosen = torch.tensor([1, 0])
    with_it = reward_loss(scores, chosen, regularization=0.5).mean()
    without = reward_loss(scores, chosen, regularization=0.0).mean()
    assert (with_it - without).item() == pytest.approx(0.5 * scores.square().mean().item(), rel=1e-5)


def test_reward_gradient_pushes_winner_up():
    scores = torch.zeros(1, 2, requires_grad=True)
    reward_loss(scores, torch.tensor([1]), regularization=0.0).sum().backward()
    assert scores.grad.tolist() == [[0.5, -0.5]]


# ------------------------------------------------------------------------------------------------ cost
def test_cost_loss_at_zero_is_three_ln2():
    loss = cost_loss(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([[0, 1], [1, 1]]), regularization=0.001)
    torch.testing.assert_close(loss, torch.full((2,), 2.0794415), atol=1e-6, rtol=0)


def test_cost_loss_hand_worked():
    # safe response 0 at cost -1, unsafe response 1 at cost 2, 0 is safer:
    # pair -log sigmoid(3) = 0.048587; safe -log sigmoid(1) = 0.313262; unsafe -log sigmoid(2) = 0.126928
    # regulariser 0.1 * (1 + 4) / 2 = 0.25
    costs, safer, unsafe = torch.tensor([[-1.0, 2.0]]), torch.tensor([0]), torch.tensor([[0, 1]])
    plain = cost_loss(costs, safer, unsafe, regularization=0.1)
    assert plain.item() == pytest.approx(0.048587 + 0.313262 + 0.126928 + 0.25, abs=2e-6)
    weighted = cost_loss(costs, safer, unsafe, pair_weight=2.0, safe_sign_weight=3.0, unsafe_sign_weight=0.5)
    assert weighted.item() == pytest.approx(2 * 0.048587 + 3 * 0.313262 + 0.5 * 0.126928, abs=5e-6)


def test_cost_loss_against_float64_formula_with_missing_labels():
    generator = torch.Generator().manual_seed(1)
    costs = torch.randn(60, 2, generator=generator) * 3
    safer = torch.randint(-1, 2, (60,), generator=generator)
    unsafe = torch.randint(-1, 2, (60, 2), generator=generator)
    loss = cost_loss(
        costs, safer, unsafe, pair_weight=1.5, safe_sign_weight=0.8, unsafe_sign_weight=1.2, regularization=0.01
    )
    for row in range(60):
        pair = costs[row].double().tolist()
        expected = 0.01 * (pair[0] ** 2 + pair[1] ** 2) / 2
        if safer[row] >= 0:
            expected += 1.5 * nlsig(pair[1 - int(safer[row])] - pair[int(safer[row])])
        for side in range(2):
            if unsafe[row, side] == 1:
                expected += 1.2 * nlsig(pair[side])
            if unsafe[row, side] == 0:
                expected += 0.8 * nlsig(-pair[side])
        assert loss[row].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_cost_convention_unsafe_goes_up():
    costs = torch.zeros(1, 2, requires_grad=True)
    cost_loss(costs, torch.tensor([0]), torch.tensor([[0, 1]])).sum().backward()
    # one gradient step down: the safe response's cost falls below 0, the unsafe one's rises above
    assert costs.grad[0, 0] > 0 > costs.grad[0, 1]


def test_unlabelled_pair_has_neither_loss_nor_gradient():
    costs = torch.tensor([[5.0, -5.0]], requires_grad=True)
    loss = cost_loss(costs, torch.tensor([-1]), torch.tensor([[-1, -1]]))
    loss.sum().backward()
    assert loss.item() == 0.0
    assert costs.grad.abs().sum() == 0


def test_sum_over_any_split_is_the_sum_over_the_whole():
    """Per-row values: accumulation over micro-batches cannot change the loss of a step."""
    generator = torch.Generator().manual_seed(2)
    costs, safer = torch.randn(7, 2, generator=generator), torch.randint(-1, 2, (7,), generator=generator)
    unsafe = torch.randint(-1, 2, (7, 2), generator=generator)
    whole = cost_loss(costs, safer, unsafe, regularization=0.1)
    parts = [
        cost_loss(c, s, u, regularization=0.1)
        for c, s, u in zip(costs.split(3), safer.split(3), unsafe.split(3), strict=True)
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_extreme_and_half_precision_scores_stay_finite():
    scores = torch.tensor([[300.0, -300.0]], dtype=torch.bfloat16)
    loss = reward_loss(scores, torch.tensor([1]), regularization=0.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(600.0)
    assert torch.isfinite(cost_loss(scores, torch.tensor([0]), torch.tensor([[0, 1]]))).all()


def test_nan_score_is_not_hidden():
    scores = torch.tensor([[float("nan"), 0.0]])
    assert reward_loss(scores, torch.tensor([0]), regularization=0.0).isnan().all()
    assert cost_loss(scores, torch.tensor([0]), torch.tensor([[0, 1]])).isnan().all()


# ------------------------------------------------------------------------------------------------ likelihood
def naive_nll(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> tuple[list[float], list[int]]:
    sums, counts = [], []
    for row in range(ids.shape[0]):
        total, count = 0.0, 0
        for position in range(1, ids.shape[1]):
            if mask[row, position]:
                before = logits[row, position - 1].double().tolist()
                largest = max(before)
                norm = largest + math.log(sum(math.exp(value - largest) for value in before))
                total += norm - before[int(ids[row, position])]
                count += 1
        sums.append(total)
        counts.append(count)
    return sums, counts


def example(rows: int = 4, length: int = 9, width: int = 6, vocabulary: int = 11, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    mask[0, 3:7] = True  # padded on the right
    mask[1, 5:] = True  # to the end
    mask[3, 8] = True  # one token; row 2 has none
    return hidden, weight, ids, mask


def test_nll_hand_worked():
    # two words; logits ln 3 and 0 give probabilities 3/4 and 1/4
    logits = torch.tensor([[[math.log(3.0), 0.0]] * 4])
    ids = torch.tensor([[1, 0, 1, 1]])
    mask = torch.tensor([[False, True, True, False]])  # prompt, response, response, padding
    nll, count = response_nll(logits, ids, mask)
    assert nll.item() == pytest.approx(math.log(4 / 3) + math.log(4.0), abs=1e-6)
    assert count.tolist() == [2]


def test_nll_against_naive_loop():
    hidden, weight, ids, mask = example()
    logits = hidden @ weight.T
    nll, count = response_nll(logits, ids, mask)
    sums, counts = naive_nll(logits, ids, mask)
    torch.testing.assert_close(nll, torch.tensor(sums, dtype=torch.float32), atol=1e-5, rtol=1e-5)
    assert count.tolist() == counts == [4, 4, 0, 1]


def test_first_response_token_counts_and_padding_never_does():
    hidden, weight, ids, mask = example()
    logits = hidden @ weight.T
    reference, _ = response_nll(logits, ids, mask)
    other_first, other_padding = ids.clone(), ids.clone()
    other_first[0, 3] = (ids[0, 3] + 1) % 11  # first response token of row 0
    other_padding[0, 7:] = (ids[0, 7:] + 1) % 11
    noisy_padding = logits.clone()
    noisy_padding[0, 6:] = 99.0  # what is predicted from the last response token on
    assert response_nll(logits, other_first, mask)[0][0] != reference[0]
    assert torch.equal(response_nll(logits, other_padding, mask)[0], reference)
    assert torch.equal(response_nll(noisy_padding, ids, mask)[0], reference)


def test_nll_is_the_same_left_and_right_padded():
    hidden, weight, ids, mask = example()
    right = response_nll(hidden @ weight.T, ids, mask)
    # two columns of padding in front
    pad = lambda tensor, value: torch.nn.functional.pad(tensor, (2, 0), value=value)  # noqa: E731
    logits = torch.cat([torch.full((4, 2, 11), 7.0), hidden @ weight.T], dim=1)
    left = response_nll(logits, pad(ids, 0), pad(mask, False))
    assert torch.equal(right[0], left[0])
    assert torch.equal(right[1], left[1])


def test_row_without_response_is_zero_not_nan():
    hidden, weight, ids, _ = example()
    nothing = torch.zeros(4, 9, dtype=torch.bool)
    hidden.requires_grad_()
    for nll, count in (
        response_nll(hidden @ weight.T, ids, nothing),
        response_nll_from_hidden(hidden, weight, ids, nothing),
    ):
        assert nll.tolist() == [0.0] * 4
        assert count.tolist() == [0] * 4
        nll.sum().backward()
    assert hidden.grad.abs().sum() == 0


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
@pytest.mark.parametrize("as_callable", [False, True])
def test_nll_from_hidden_equals_plain_in_value_and_gradient(chunk, as_callable):
    results = []
    for lean in (False, True):
        hidden, weight, ids, mask = example()
        hidden.requires_grad_()
        weight.requires_grad_()
        if lean:
            head = (lambda states, weight=weight: states @ weight.T) if as_callable else weight
            nll, count = response_nll_from_hidden(hidden, head, ids, mask, chunk=chunk)
        else:
            nll, count = response_nll(hidden @ weight.T, ids, mask)
        (nll.sum() / count.sum()).backward()
        results.append((nll.detach(), count, hidden.grad, weight.grad))
    for plain, lean in zip(*results, strict=True):
        torch.testing.assert_close(plain, lean, atol=1e-6, rtol=1e-5)


def test_nll_from_hidden_never_holds_all_logits():
    hidden, weight, ids, mask = example(rows=8, length=64, vocabulary=301)
    mask[:, 10:] = True
    hidden.requires_grad_()
    weight.requires_grad_()
    projected: list[int] = []
    kept: list[tuple[int, ...]] = []

    def head(states: torch.Tensor) -> torch.Tensor:
        projected.append(states.shape[0])
        return states @ weight.T

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nll, _ = response_nll_from_hidden(hidden, head, ids, mask, chunk=16)
    forward_calls = len(projected)
    assert max(projected) == 16
    assert not [shape for shape in kept if shape[-1:] == (301,)], "logits were kept for the backward"
    nll.sum().backward()
    assert len(projected) == 2 * forward_calls  # computed anew
    with torch.no_grad():  # and only once where no gradient is wanted
        projected.clear()
        response_nll_from_hidden(hidden, head, ids, mask, chunk=16)
    assert len(projected) == forward_calls


def test_nll_does_not_depend_on_split_or_padding():
    """Sum over tokens / all tokens is the same for one batch and for rows one by one with their padding cut."""
    hidden, weight, ids, mask = example()
    whole, count = response_nll_from_hidden(hidden, weight, ids, mask)
    total, tokens = 0.0, 0
    for row in range(4):
        end = int(mask[row].nonzero().max()) + 1 if mask[row].any() else 2
        part, some = response_nll_from_hidden(
            hidden[row : row + 1, :end], weight, ids[row : row + 1, :end], mask[row : row + 1, :end]
        )
        total, tokens = total + part.sum().item(), tokens + int(some.sum())
    assert tokens == int(count.sum())
    assert total / tokens == pytest.approx((whole.sum() / count.sum()).item(), rel=1e-6)
