"""The moderator's losses against numbers worked by hand, float64 formulas, torch and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from saferlhf.ops.moderation import ModerationLabels
from saferlhf.ops.moderation_losses import (
    LARGEST_WEIGHT,
    LossWeights,
    category_term,
    category_weights,
    moderation_loss,
    moderation_terms,
    severity_log_probabilities,
    severity_logits,
    severity_term,
    severity_weights,
    unsafe_term,
)

LN2 = math.log(2.0)


def drawn(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


# ------------------------------------------------------------------------------------------------ severity
def test_severity_at_zero_by_hand() -> None:
    # g = 0, -ln 2, -2 ln 2; sigmoid: 1/2, 1/3, 1/5
    torch.testing.assert_close(severity_logits(torch.zeros(1, 3)), torch.tensor([[0.0, -LN2, -2 * LN2]]))
    found = severity_log_probabilities(torch.zeros(1, 3, dtype=torch.float64)).exp()
    expected = torch.tensor([[1 - 1 / 2, 1 / 2 - 1 / 3, 1 / 3 - 1 / 5, 1 / 5]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    nll = severity_term(torch.zeros(4, 3), torch.arange(4))
    torch.testing.assert_close(nll, torch.tensor([2.0, 6.0, 7.5, 5.0]).log())


def test_severity_probabilities_are_differences_of_sigmoids() -> None:
    raw = drawn(200, 3)
    tail = severity_logits(raw).sigmoid()  # s >= 1, 2, 3
    assert (tail[:, 1:] <= tail[:, :-1]).all()
    plain = torch.cat([1 - tail[:, :1], tail[:, :-1] - tail[:, 1:], tail[:, -1:]], dim=1)
    found = severity_log_probabilities(raw).exp()
    torch.testing.assert_close(found, plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(200, dtype=torch.float64))


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_severity_is_finite_with_finite_gradient_at_any_size(size: float) -> None:
    signs = torch.cartesian_prod(*[torch.tensor([-size, 0.0, size])] * 3)  # (27, 3) float32
    for level in range(4):
        raw = signs.clone().requires_grad_()
        loss = severity_term(raw, torch.full((27,), level))
        loss.sum().backward()
        assert loss.isfinite().all() and raw.grad.isfinite().all()
        assert (loss >= 0).all()
    # a right and sure answer costs nothing, a wrong and sure one its logit
    sure = torch.tensor([[size, -size, -size]])
    assert float(severity_term(sure, torch.tensor([0]))) == pytest.approx(size, rel=0.35)


@pytest.mark.parametrize("level", range(4))
def test_severity_gradient_by_differences(level: int) -> None:
    raw = drawn(5, 3, seed=level).requires_grad_()
    labels = torch.full((5,), level)
    assert torch.autograd.gradcheck(lambda r: severity_term(r, labels, [1.0, 2.0, 3.0, 0.5]), (raw,))


def test_severity_pushes_towards_the_level() -> None:
    raw = torch.zeros(4, 3, requires_grad=True)
    severity_term(raw, torch.arange(4)).sum().backward()
    # step against the gradient: more of r_1 for every level above 0; wider steps for low levels, narrower for high
    assert (-raw.grad[:, 0]).sign().tolist() == [-1, 1, 1, 1]
    assert -raw.grad[1, 1] > 0 > -raw.grad[3, 1] and -raw.grad[2, 2] > 0 > -raw.grad[3, 2]


def test_the_likelihood_finds_the_levels_shares() -> None:
    """With no features the fitted link gives the empirical shares."""
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 25 + [3] * 5)
    raw = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([raw], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = severity_term(raw.expand(100, 3), labels).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = severity_log_probabilities(raw).exp().detach().squeeze()
    torch.testing.assert_close(found, torch.tensor([0.5, 0.2, 0.25, 0.05], dtype=torch.float64), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ binary heads
def test_unsafe_is_binary_cross_entropy() -> None:
    logits, labels = drawn(50).squeeze(), torch.arange(50) % 2
    expected = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none")
    torch.testing.assert_close(unsafe_term(logits, labels), expected)
    weighted = F.binary_cross_entropy_with_logits(
        logits, labels.double(), reduction="none", pos_weight=torch.tensor(3.0, dtype=torch.float64)
    )
    torch.testing.assert_close(unsafe_term(logits, labels, 3.0), weighted)


def test_categories_are_summed() -> None:
    logits, labels = drawn(20, 4), (drawn(20, 4, seed=1) > 0).long()
    weights = [1.0, 2.0, 5.0, 0.5]
    each = F.binary_cross_entropy_with_logits(
        logits, labels.double(), reduction="none", pos_weight=torch.tensor(weights, dtype=torch.float64)
    )
    torch.testing.assert_close(category_term(logits, labels, weights), each.sum(dim=1))
    assert float(category_term(torch.zeros(1, 19), torch.zeros(1, 19).long())) == pytest.approx(19 * LN2)


def scores_and_labels(rows: int = 12, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    scores = {"unsafe": drawn(rows, 1, seed=seed), "category": drawn(rows, 3, seed=seed + 1)}
    scores["severity"] = drawn(rows, 3, seed=seed + 2)
    severity = torch.arange(rows) % 4
    category = (drawn(rows, 3, seed=seed + 3) > 0).long() * (severity > 0).long().unsqueeze(1)
    return scores, {"unsafe": (severity > 0).long(), "severity": severity, "category": category}


def test_a_missing_label_switches_off_its_term_only() -> None:
    scores, labels = scores_and_labels()
    whole = moderation_terms(scores, **labels)
    for head in ("unsafe", "severity", "category"):
        gone = {name: values.clone() for name, values in labels.items()}
        gone[head][5] = -1
        found = moderation_terms(scores, **gone)
        assert float(found[head][5]) == 0
        for other, values in found.items():
            rest = [i for i in range(12) if i != 5 or other != head]
            torch.testing.assert_close(values[rest], whole[other][rest])


def test_a_missing_label_gives_no_gradient_even_at_infinite_scores() -> None:
    raw = torch.full((1, 3), 1e30, requires_grad=True)
    logits = torch.full((1, 2), -1e30, requires_grad=True)
    scores = {"unsafe": logits[:, :1], "category": logits, "severity": raw}
    none = {"unsafe": torch.tensor([-1]), "severity": torch.tensor([-1]), "category": torch.tensor([[-1, -1]])}
    loss = moderation_loss(scores, **none)
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert raw.grad.abs().sum() == 0 and logits.grad.abs().sum() == 0


def test_the_loss_is_the_weighted_sum_of_its_terms_row_by_row() -> None:
    scores, labels = scores_and_labels()
    weights = LossWeights(unsafe=0.5, category=2.0, severity=3.0, unsafe_class=1.5, severity_level=(1.0, 2.0, 1.0, 4.0))
    terms = moderation_terms(scores, **labels, weights=weights)
    whole = moderation_loss(scores, **labels, weights=weights)
    torch.testing.assert_close(whole, 0.5 * terms["unsafe"] + 2 * terms["category"] + 3 * terms["severity"])
    # rows do not know of each other: any cut adds up to the same sum
    parts = [
        moderation_loss({n: v[i : i + 5] for n, v in scores.items()}, **{n: v[i : i + 5] for n, v in labels.items()})
        for i in range(0, 12, 5)
    ]
    torch.testing.assert_close(torch.cat(parts), moderation_loss(scores, **labels))


def test_heads_that_are_not_there_have_no_term() -> None:
    scores, labels = scores_and_labels()
    del scores["severity"]
    assert set(moderation_terms(scores, **labels)) == {"unsafe", "category"}


def test_half_precision_is_widened() -> None:
    scores, labels = scores_and_labels()
    half = {name: values.bfloat16() for name, values in scores.items()}
    found = moderation_loss(half, **labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, moderation_loss({n: v.float() for n, v in half.items()}, **labels))


def test_swapping_safe_and_unsafe_swaps_the_unsafe_loss() -> None:
    logits, labels = drawn(30).squeeze(), torch.arange(30) % 2
    torch.testing.assert_close(unsafe_term(logits, labels), unsafe_term(-logits, 1 - labels))


# ------------------------------------------------------------------------------------------------ weights
def counted() -> ModerationLabels:
    severity = np.array([0] * 60 + [1] * 10 + [2] * 25 + [3] * 5 + [-1] * 7)
    category = np.zeros((107, 4), dtype=np.int64)
    category[60:70, 0] = category[70:72, 1] = category[:, 2] = 1
    category[100:] = -1
    return ModerationLabels((severity > 0).astype(np.int64), severity, category, ("a", "b", "c", "d"))


def test_category_weights_by_hand() -> None:
    labels = counted()
    assert category_weights(labels, "none") is None
    # 90 without to 10 with; 98 to 2; always there: 1; never there: 1
    assert category_weights(labels, "balanced") == pytest.approx((9.0, 49.0, 1.0, 1.0))
    assert category_weights(labels, "sqrt") == pytest.approx((3.0, 7.0, 1.0, 1.0))
    rare = ModerationLabels(labels.unsafe, labels.severity, np.eye(107, 1, dtype=np.int64), ("a",))
    assert category_weights(rare, "balanced") == (LARGEST_WEIGHT,)
    with pytest.raises(ValueError, match="unknown weighting"):
        category_weights(labels, "sqroot")


def test_severity_weights_are_scikit_learns() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = counted()
    known = labels.severity[labels.severity >= 0]
    assert severity_weights(labels, "balanced") == pytest.approx(
        tuple(compute_class_weight("balanced", classes=np.arange(4), y=known))
    )
    assert severity_weights(labels, "none") is None
    assert severity_weights(labels, [1, 2, 3, 4]) == (1.0, 2.0, 3.0, 4.0)
    for wrong in ("balance", [1, 2, 3]):
        with pytest.raises(ValueError, match="weight"):
            severity_weights(labels, wrong)
