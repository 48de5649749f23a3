"""Losses of the supervised tasks: tensors in, one value per row out.

Every function returns values PER ROW, never a mean. The caller sums them and divides by the count of the whole
optimizer step (rows, or response tokens for `sft`), over micro-batches and processes, so that the loss and its
gradient do not depend on how the step was split or padded.

Reward (Bradley-Terry; Safe RLHF, arXiv 2310.12773, section 3.2, plus the regulariser of its code), for a pair with
preferred score s_w and other score s_l:

    L_R = -log sigmoid(s_w - s_l - margin) + mu (s_w^2 + s_l^2) / 2 + centering (s_w + s_l)^2

The mean over B pairs of the middle term is mu times the mean over the 2B squared scores. `centering` pulls the sum of a
pair to zero (arXiv 2312.09244), which fixes the free constant of Bradley-Terry.

Cost (Safe RLHF, equation 6), for a pair with costs c_s of the safer and c_u of the less safe response, z = +1 for an
unsafe response and -1 for a safe one:

    L_C = -a log sigmoid(c_u - c_s) - sum over both responses i of b_{z_i} log sigmoid(z_i c_i) + mu (c_s^2 + c_u^2) / 2

The UNSAFER response wins the comparison: cost > 0 means unsafe. The paper has a = b_+ = b_- = 1; each weight is a knob
here. A label that is missing (-1) switches off its own term only.

Response likelihood: labels are shifted by one, so the token at position t is scored by the logits at t - 1; the first
response token counts, padding never does.

Known values at zero scores: L_R = ln 2 = 0.6931, L_C = 3 ln 2 = 2.0794.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Maps hidden states (N, H) to logits (N, V)."""


# ------------------------------------------------------------------------------------------------ preference
def reward_loss(
    scores: Tensor, preferred: Tensor, *, regularization: float, margin: float = 0.0, centering: float = 0.0
) -> Tensor:
    """Bradley-Terry loss of each pair.

    Args:
        scores: (B, 2), column = response index; any float dtype, computed in float32.
        preferred: (B,) index of the preferred response, 0 or 1; -1 = not labelled: no pair term.
        regularization: mu, weight of the mean squared score.
        margin: how far apart the scores are wanted, in score units.
        centering: weight of the squared sum of a pair's scores.

    Returns:
        (B,) float32.
    """
    scores = scores.float()  # (B, 2)
    pair = _pair_term(scores, preferred, margin)  # (B,)
    return pair + regularization * _mean_square(scores) + centering * scores.sum(dim=1).square()


def cost_loss(
    costs: Tensor,
    safer: Tensor,
    unsafe: Tensor,
    *,
    pair_weight: float = 1.0,
    safe_sign_weight: float = 1.0,
    unsafe_sign_weight: float = 1.0,
    regularization: float = 0.0,
) -> Tensor:
    """Pairwise and sign loss of each pair; cost > 0 means unsafe.

    Args:
        costs: (B, 2), column = response index; any float dtype, computed in float32.
        safer: (B,) index of the safer response, 0 or 1; -1 = not labelled: no pair term.
        unsafe: (B, 2) 1 unsafe, 0 safe; -1 = not labelled: no sign term for that response.
        pair_weight: weight of the comparison.
        safe_sign_weight, unsafe_sign_weight: weight of the sign term of each safe / unsafe response.
        regularization: mu, weight of the mean squared cost.

    Returns:
        (B,) float32.
    """
    costs = costs.float()  # (B, 2)
    less_safe = torch.where(safer >= 0, 1 - safer, safer)  # (B,) -1 stays -1
    pair = _pair_term(costs, less_safe, margin=0.0)  # (B,)

    no_sign = torch.zeros_like(costs)  # (B, 2)
    sign = torch.where(unsafe == 1, -unsafe_sign_weight * F.logsigmoid(costs), no_sign)
    sign = torch.where(unsafe == 0, -safe_sign_weight * F.logsigmoid(-costs), sign)  # (B, 2)
    return pair_weight * pair + sign.sum(dim=1) + regularization * _mean_square(costs)


def _pair_term(scores: Tensor, winner: Tensor, margin: float) -> Tensor:
    """-log sigmoid(winner - loser - margin), (B,); 0 where `winner` is -1."""
    ahead = torch.where(winner == 0, scores[:, 0] - scores[:, 1], scores[:, 1] - scores[:, 0])  # (B,)
    return torch.where(winner >= 0, -F.logsigmoid(ahead - margin), torch.zeros_like(ahead))


def _mean_square(scores: Tensor) -> Tensor:
    return scores.square().mean(dim=1)  # (B,)


# ------------------------------------------------------------------------------------------------ likelihood
def response_nll(logits: Tensor, input_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row's response, in nats.

    Args:
        logits: (S, T, V), any float dtype; only response positions are widened to float32.
        input_ids: (S, T) int64.
        response_mask: (S, T) bool, True at the tokens to be scored. A token at position 0 has nothing before it and is
            never scored.

    Returns:
        nll_sum: (S,) float32, sum over the response's tokens; 0 for a row without any.
        count: (S,) int64, tokens scored.
    """
    scored = response_mask[:, 1:].bool()  # (S, T-1) polarity: True = scored
    token_nll = F.cross_entropy(logits[:, :-1][scored].float(), input_ids[:, 1:][scored], reduction="none")  # (N,)
    return _sum_by_row(token_nll, scored)


def response_nll_from_hidden(
    hidden: Tensor, lm_head: Tensor | Head, input_ids: Tensor, response_mask: Tensor, *, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """As `response_nll`, without ever holding the logits of more than `chunk` positions.

    Only response positions are projected to the vocabulary. Each chunk's logits are thrown away after the forward and
    computed anew in the backward, so memory is chunk * V float32 instead of S * T * V. Costs one more projection.

    Args:
        hidden: (S, T, H) the backbone's last hidden states, after its final norm.
        lm_head: weight (V, H), or a callable from (N, H) to (N, V) for heads with a bias, a scale or a soft cap.
        input_ids: (S, T) int64.
        response_mask: (S, T) bool, True at the tokens to be scored.
        chunk: positions per projection.

    Returns:
        nll_sum (S,) float32 and count (S,) int64, as `response_nll`.
    """
    project: Head = (lambda states: F.linear(states, lm_head)) if isinstance(lm_head, Tensor) else lm_head

    def chunk_nll(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(project(states).float(), targets, reduction="none")

    scored = response_mask[:, 1:].bool()  # (S, T-1)
    states = hidden[:, :-1][scored]  # (N, H)
    targets = input_ids[:, 1:][scored]  # (N,)
    parts = []
    for some_states, some_targets in zip(states.split(chunk), targets.split(chunk), strict=True):
        if torch.is_grad_enabled():
            # the head draws no random numbers, so there is no generator state to keep
            part = checkpoint(chunk_nll, some_states, some_targets, use_reentrant=False, preserve_rng_state=False)
        else:
            part = chunk_nll(some_states, some_targets)
        parts.append(part)
    return _sum_by_row(torch.cat(parts), scored)


def _sum_by_row(token_nll: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) values at the True positions of (S, T-1), summed per row.

    Placed back into the grid rather than added by row index: that addition is not deterministic on CUDA.
    """
    grid = torch.zeros(scored.shape, dtype=token_nll.dtype, device=token_nll.device).masked_scatter(scored, token_nll)
    return grid.sum(dim=1), scored.sum(dim=1)
