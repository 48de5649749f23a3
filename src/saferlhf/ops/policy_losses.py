"""Losses of the policy and its critics: tensors in, one SUM per row out.

No function takes a mean. The caller sums over rows, micro-batches and processes and divides by the count of the whole
optimizer step (tokens, or rows after dividing each row's sum by its own count), so that neither padding nor the split
changes a loss or its gradient.

Clipped surrogate (PPO, Schulman et al. 2017, arXiv 1707.06347, equation 7), with the ratio rho_t = pi / pi_old at the
sampled token and the advantage A_t:

    L_t = -min(rho_t A_t, clip(rho_t, 1 - epsilon, 1 + epsilon_high) A_t)

Safe RLHF's paper clips reward and cost branch each by itself; its released code, and this one, combines the advantages
first and clips once. The two differ only where the clip is active. Optional: a higher upper bound (Yu et al. 2025,
arXiv 2503.14476), and a bound D > 1 on what a negative advantage can do when the ratio explodes (dual clip, Ye et al.
2020, arXiv 1912.09729): L_t = min(L_t, -D A_t) where A_t < 0.

Clipped value loss, G_t the return, V_t the value now and V_old,t that of the rollout:

    L_t = max((V_t - G_t)^2, (clip(V_t, V_old,t - c, V_old,t + c) - G_t)^2) / 2

The ptx loss is the likelihood of supervised responses: `saferlhf.ops.losses.response_nll`.

Explained variance: 1 - Var(G - V) / Var(G); 1 = perfect critic, 0 = no better than a constant, below = worse.

Legend: `S` sequences, `T` tokens, `V` vocabulary. Per-token tensors are aligned with the tokens: the logits at position
t - 1 speak of token t. Masks are bool, True = response token; what stands outside has no influence, NaN included.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from saferlhf.ops.shaping import LOG_RATIO_LIMIT, kl_estimate


# ------------------------------------------------------------------------------------------------ distribution
def token_logprobs(logits: Tensor, input_ids: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each response token given the tokens before it, under the sampling distribution.

    Args:
        logits: (S, T, V), any float dtype; only the positions in front of response tokens are widened to float32.
        input_ids: (S, T) int64.
        mask: (S, T) bool, True = response token. Position 0 has nothing before it and must be False.
        temperature: the one the tokens were sampled with; above 0.

    Returns:
        (S, T) float32, 0 outside the mask.
    """
    scored, rows = _in_front(logits, mask, temperature)
    targets = input_ids[:, 1:][scored]  # (N,)
    return _back(-F.cross_entropy(rows, targets, reduction="none"), scored)


def token_entropy(logits: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of the distribution that each response token was drawn from.

    Args:
        logits, mask, temperature: as `token_logprobs`.

    Returns:
        (S, T) float32, 0 outside the mask; differentiable. A logit of -inf (a forbidden token) adds nothing.
    """
    scored, rows = _in_front(logits, mask, temperature)
    logp = rows.log_softmax(dim=-1)  # (N, V)
    # p log p is 0 at p = 0, where -inf * 0 would be NaN, in the gradient too
    possible = torch.isfinite(logp)
    return _back(-(logp.exp() * logp.masked_fill(~possible, 0.0)).sum(dim=-1), scored)


def _in_front(logits: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Which tokens are scored, (S, T-1) bool, and the tempered logits in front of them, (N, V) float32."""
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if bool(mask[:, 0].any()):
        raise ValueError("the first token has nothing before it and cannot be a response token")
    scored = mask[:, 1:].bool()
    rows = logits[:, :-1][scored]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return scored, rows if temperature == 1.0 else rows / temperature


def _back(token_values: Tensor, scored: Tensor) -> Tensor:
    """(N,) values at the True positions of (S, T-1), placed at their tokens in (S, T)."""
    grid = torch.zeros(scored.shape, dtype=token_values.dtype, device=token_values.device)
    return F.pad(grid.masked_scatter(scored, token_values), (1, 0))


# ------------------------------------------------------------------------------------------------ losses
def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's policy loss, summed over each row's response tokens.

    Args:
        logprobs: (S, T) of the policy being trained; the gradient flows here alone.
        old_logprobs: (S, T) of the policy that wrote the responses.
        advantages: (S, T).
        mask: (S, T) bool, True = response token.
        clip: epsilon, how far the ratio may fall (and rise) before the gradient stops.
        clip_high: how far it may rise, if not as far.
        dual_clip: D > 1; None: off.

    Returns:
        (S,) float32 or wider.
    """
    ratio = _log_ratio(logprobs, old_logprobs, mask).exp()  # (S, T)
    advantage = advantages.detach().to(ratio.dtype).masked_fill(~mask.bool(), 0.0)
    upper = clip if clip_high is None else clip_high
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + upper) * advantage)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    return loss.sum(dim=1)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None
) -> Tensor:
    """A critic's loss, summed over each row's response tokens.

    Args:
        values: (S, T) of the critic being trained; the gradient flows here alone.
        old_values: (S, T) of the rollout.
        returns: (S, T).
        mask: (S, T) bool, True = response token.
        clip: how far a value may move from the old one before the gradient stops, in score units; None: off.

    Returns:
        (S,) float32 or wider.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    outside = ~mask.bool()
    value = values.to(wide).masked_fill(outside, 0.0)
    target = returns.detach().to(wide).masked_fill(outside, 0.0)
    error = (value - target).square()
    if clip is not None:
        old = old_values.detach().to(wide).masked_fill(outside, 0.0)
        near = torch.minimum(torch.maximum(value, old - clip), old + clip)
        error = torch.maximum(error, (near - target).square())
    return error.sum(dim=1) / 2


def kl_loss(logprobs: Tensor, reference: Tensor, mask: Tensor, *, kind: str = "k3") -> Tensor:
    """Divergence from the reference as a loss term (as GRPO has it), summed over each row's response tokens: (S,).

    Args:
        logprobs, reference, mask: (S, T) each, as `kl_estimate`.
        kind: "k2" | "k3". The gradient of k1 is 0 on average: it would hold nothing.
    """
    if kind == "k1":
        raise ValueError("k1 as a loss holds nothing: its expected gradient is 0; take k2 or k3")
    return kl_estimate(logprobs, reference.detach(), mask, kind).sum(dim=1)


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """(S, T) log pi - log pi_old, 0 outside the mask."""
    wide = torch.promote_types(logprobs.dtype, torch.float32)
    # filled before the exponential: what stands outside the mask may be anything
    difference = (logprobs.to(wide) - old_logprobs.detach().to(wide)).masked_fill(~mask.bool(), 0.0)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


# ------------------------------------------------------------------------------------------------ diagnostics
def surrogate_sums(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
) -> dict[str, Tensor]:
    """Sums over all response tokens that describe an update; divide by `tokens` after adding up all its parts.

    Args:
        logprobs, old_logprobs, advantages, mask, clip, clip_high: as `clipped_surrogate`.

    Returns:
        Scalars, float64, without gradient: `tokens`; `clip_fraction` where the clip stops the gradient (ratio too high
        and advantage positive, or too low and negative); `outside_fraction` where the ratio lies outside the bounds,
        whatever the advantage; `approx_kl` of the old policy from the new one (k3), for the early stop; `ratio`.
    """
    with torch.no_grad():
        log_ratio = _log_ratio(logprobs, old_logprobs, mask).double()  # (S, T)
        ratio, here = log_ratio.exp(), mask.bool()
        high = here & (ratio > 1 + (clip if clip_high is None else clip_high))
        low = here & (ratio < 1 - clip)
        stopped = (high & (advantages > 0)) | (low & (advantages < 0))
        return {
            "tokens": here.sum().double(),
            "clip_fraction": stopped.sum().double(),
            "outside_fraction": (high | low).sum().double(),
            "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
            "ratio": ratio.masked_fill(~here, 0.0).sum(),
        }


def value_moments(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Count, and sum and sum of squares of the returns and of what the values miss of them: (5,) float64, additive.

    Args:
        values, returns: (S, T).
        mask: (S, T) bool, True = response token.
    """
    here = mask.bool()
    target = returns.detach().double().masked_fill(~here, 0.0)
    missed = target - values.detach().double().masked_fill(~here, 0.0)
    return torch.stack([here.sum().double(), target.sum(), target.square().sum(), missed.sum(), missed.square().sum()])


def explained_variance(total: Tensor) -> float:
    """From the summed `value_moments` of a whole update; NaN where all returns are the same."""
    count, target, target_squares, missed, missed_squares = total.tolist()
    if count < 2:
        return float("nan")
    variance = target_squares / count - (target / count) ** 2
    # sums of squares lose about this much of their digits
    if variance <= 1e-12 * max(target_squares / count, 1e-30):
        return float("nan")
    return 1.0 - (missed_squares / count - (missed / count) ** 2) / variance
