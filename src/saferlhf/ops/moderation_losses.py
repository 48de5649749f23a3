"""Losses of a moderator's three heads: tensors in, one value per row out.

Legend: `B` rows, `C` harm categories. Labels: 1 unsafe / has the category, 0 safe / has not, -1 not labelled.

Unsafe, one logit u, and each category, one logit a_c: binary cross-entropy,

    L_unsafe   = -w+ y log sigmoid(u) - (1 - y) log sigmoid(-u)
    L_category = sum over c of  -w_c y_c log sigmoid(a_c) - (1 - y_c) log sigmoid(-a_c)

Severity 0..3, cumulative link (McCullagh 1980, "Regression models for ordinal data"; with offsets that depend on the
row the partial proportional odds of Peterson & Harrell 1990). The head gives raw numbers r_1, r_2, r_3; the logits of
severity >= k fall along the row by construction:

    g_1 = r_1,   g_k = g_{k-1} - softplus(r_k),   P(s >= k) = sigmoid(g_k),   P(s = k) = sigmoid(g_k) - sigmoid(g_{k+1})

Because sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^{b-a}) and 1 - e^{-softplus(r)} = sigmoid(r), the
logarithm is a sum of three logsigmoids, with no difference of near numbers anywhere:

    log P(s = k) = log sigmoid(g_k) + log sigmoid(-g_{k+1}) + log sigmoid(r_{k+1})        for k = 1, 2
    log P(s = 0) = log sigmoid(-g_1),   log P(s = 3) = log sigmoid(g_3)

Every function returns values PER ROW, never a mean; the caller divides the sum by the rows of the whole optimizer step.
A label that is missing switches off its own term only. The sum over categories, not their mean, is the log-likelihood
of the label set; at zero scores the terms are ln 2, C ln 2 and, for levels 0..3 (g = 0, -ln 2, -2 ln 2), ln 2, ln 6,
ln 7.5 and ln 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from saferlhf.ops.moderation import SEVERITIES, ModerationLabels

LARGEST_WEIGHT = 50.0
"""No row counts more than so many ordinary ones, however rare its label."""

WEIGHTINGS = ("none", "sqrt", "balanced")


@dataclass(frozen=True)
class LossWeights:
    """How much each head, and within a head each label, counts.

    Attributes:
        unsafe, category, severity: weights of the heads' terms.
        unsafe_class: w+, weight of an unsafe row in the unsafe head's term; a safe row has 1.
        category_positive: (C,) w_c, weight of a category where it applies; None: all 1.
        severity_level: (4,) weight of a row by its severity in the severity head's term; None: all 1.
    """

    unsafe: float = 1.0
    category: float = 1.0
    severity: float = 1.0
    unsafe_class: float = 1.0
    category_positive: tuple[float, ...] | None = None
    severity_level: tuple[float, ...] | None = None


def moderation_loss(
    scores: Mapping[str, Tensor],
    *,
    unsafe: Tensor,
    severity: Tensor,
    category: Tensor,
    weights: LossWeights = LossWeights(),
) -> Tensor:
    """The weighted sum of the heads' terms, (B,) float32 or wider; arguments as `moderation_terms`."""
    terms = moderation_terms(scores, unsafe=unsafe, severity=severity, category=category, weights=weights)
    return torch.stack([getattr(weights, head) * term for head, term in terms.items()]).sum(dim=0)


def moderation_terms(
    scores: Mapping[str, Tensor],
    *,
    unsafe: Tensor,
    severity: Tensor,
    category: Tensor,
    weights: LossWeights = LossWeights(),
) -> dict[str, Tensor]:
    """The term of each head that is there, before its head's weight.

    Args:
        scores: head name -> output: `unsafe` (B, 1), `category` (B, C), `severity` (B, 3) raw; half precision is
            widened.
        unsafe: (B,) int64 1, 0 or -1.
        severity: (B,) int64 0..3 or -1.
        category: (B, C) int64 1, 0 or -1.
        weights: of classes, categories and levels.

    Returns:
        head name -> (B,).
    """
    terms: dict[str, Tensor] = {}
    if "unsafe" in scores:
        terms["unsafe"] = unsafe_term(_wide(scores["unsafe"]).squeeze(-1), unsafe, weights.unsafe_class)
    if "category" in scores:
        terms["category"] = category_term(_wide(scores["category"]), category, weights.category_positive)
    if "severity" in scores:
        terms["severity"] = severity_term(_wide(scores["severity"]), severity, weights.severity_level)
    return terms


def unsafe_term(logits: Tensor, unsafe: Tensor, positive_weight: float = 1.0) -> Tensor:
    """(B,) cross-entropy of (B,) logits against 1 unsafe, 0 safe; 0 where the label is -1."""
    return _binary(logits, unsafe, logits.new_tensor(positive_weight))


def category_term(logits: Tensor, category: Tensor, positive_weights: Sequence[float] | None = None) -> Tensor:
    """(B,) cross-entropies of (B, C) logits, summed over the categories that are labelled (not -1)."""
    weight = logits.new_ones(()) if positive_weights is None else logits.new_tensor(positive_weights)
    return _binary(logits, category, weight).sum(dim=-1)


def severity_term(raw: Tensor, severity: Tensor, level_weights: Sequence[float] | None = None) -> Tensor:
    """(B,) -log P(level) of the cumulative link, times the level's weight; 0 where the label is -1.

    Args:
        raw: (B, 3) the head's output.
        severity: (B,) 0..3 or -1.
        level_weights: (4,).
    """
    level = severity.clamp_min(0)
    nll = -severity_log_probabilities(raw).gather(-1, level.unsqueeze(-1)).squeeze(-1)  # (B,)
    if level_weights is not None:
        nll = nll * raw.new_tensor(level_weights)[level]
    return torch.where(severity >= 0, nll, torch.zeros_like(nll))


def severity_logits(raw: Tensor) -> Tensor:
    """Logits of severity >= 1, >= 2, >= 3, never rising along a row.

    Args:
        raw: (..., 3) the head's output.

    Returns:
        (..., 3), in the dtype of `raw`.
    """
    falls = torch.cat([torch.zeros_like(raw[..., :1]), F.softplus(raw[..., 1:])], dim=-1)  # (..., 3)
    return raw[..., :1] - falls.cumsum(dim=-1)


def severity_log_probabilities(raw: Tensor) -> Tensor:
    """(..., 4) log P(severity = 0..3) from the head's raw output (..., 3)."""
    g = severity_logits(raw)
    middle = F.logsigmoid(g[..., :-1]) + F.logsigmoid(-g[..., 1:]) + F.logsigmoid(raw[..., 1:])  # (..., 2)
    return torch.cat([F.logsigmoid(-g[..., :1]), middle, F.logsigmoid(g[..., -1:])], dim=-1)


def _binary(logits: Tensor, labels: Tensor, positive_weight: Tensor) -> Tensor:
    """Cross-entropy by element; 0 where the label is -1."""
    loss = torch.where(labels == 1, -positive_weight * F.logsigmoid(logits), -F.logsigmoid(-logits))
    return torch.where(labels >= 0, loss, torch.zeros_like(loss))


def _wide(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------ weights from counts
def category_weights(labels: ModerationLabels, how: str) -> tuple[float, ...] | None:
    """Weight of each category where it applies, from how often it does.

    `balanced`: (rows without) / (rows with), so that both sides weigh the same; `sqrt`: the square root of that;
    `none`: None. Never below 1 nor above `LARGEST_WEIGHT`; a category without any row has 1.

    Args:
        labels: of the training rows.
        how: one of `WEIGHTINGS`.
    """
    if how not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {how!r}; one of {', '.join(WEIGHTINGS)}")
    if how == "none":
        return None
    having, lacking = (labels.category == 1).sum(axis=0), (labels.category == 0).sum(axis=0)  # (C,)
    ratios = [float(n / p) if p else 1.0 for p, n in zip(having, lacking, strict=True)]
    return tuple(min(LARGEST_WEIGHT, max(1.0, r**0.5 if how == "sqrt" else r)) for r in ratios)


def severity_weights(labels: ModerationLabels, how: str | Sequence[float]) -> tuple[float, ...] | None:
    """Weight of each severity level.

    `balanced`: rows / (levels that occur x rows of the level), as scikit-learn's class weights, never above
    `LARGEST_WEIGHT`; `none`: None; four numbers are taken as they are.

    Args:
        labels: of the training rows.
        how: "none", "balanced" or four numbers.
    """
    if not isinstance(how, str):
        if len(how) != SEVERITIES:
            raise ValueError(f"{len(how)} weights for {SEVERITIES} levels")
        return tuple(float(weight) for weight in how)
    if how == "none":
        return None
    if how != "balanced":
        raise ValueError(f"unknown weighting {how!r}; none, balanced or {SEVERITIES} numbers")
    counts = [int((labels.severity == level).sum()) for level in range(SEVERITIES)]
    occurring = sum(1 for count in counts if count)
    return tuple(min(LARGEST_WEIGHT, sum(counts) / (occurring * n)) if n else 1.0 for n in counts)
