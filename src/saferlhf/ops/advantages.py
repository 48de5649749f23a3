"""Advantages of tokens or responses: with a critic (GAE) or against the other responses to the same prompt.

Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equations 11 and 16), for the response tokens
t = a..b of a sequence, reward r_t, V_t the critic's value of the state BEFORE token t is written:

    delta_t = r_t + gamma V_{t+1} - V_t          V_{b+1} = 0, or the bootstrap value of a response that was cut off
    A_t     = delta_t + gamma lam A_{t+1}        A_{b+1} = 0
    return_t = A_t + V_t

Without a critic, for the K responses to one prompt with scores s_1..s_K (everything a response earns, its KL included):

    rloo   A_i = s_i - mean of the other K - 1 scores     (Ahmadian et al. 2024, arXiv 2402.14740)
    grpo   A_i = (s_i - mean) / (std + eps)               (Shao et al. 2024, arXiv 2402.03300); std divides by K

With a constraint and no critic, combine the scores first (`Constraint.combine` is linear and takes scores as it takes
advantages) and take `group_advantages` of the result: for rloo the order makes no difference, and for grpo it keeps
lambda and the KL weight free of the spread of each signal.

What differs from the reference code of Safe RLHF: every function takes the response mask, so that padding, its side and
its content (NaN too) never matter; a cut-off response can be bootstrapped.

Legend: `S` sequences, `T` tokens. Masks are bool, True = response token. All outputs are 0 outside the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_KINDS = ("rloo", "grpo")
EPSILON = 1e-6
"""Added to a group's standard deviation: responses that all score the same have advantage 0, not noise."""


# ------------------------------------------------------------------------------------------------ with a critic
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every response token.

    A row without any response token has zeros. Positions outside the mask are stepped over: whatever stands there has
    no influence.

    Args:
        rewards: (S, T) reward received for writing token t.
        values: (S, T) critic's value of the state before token t, from the policy that wrote the responses.
        mask: (S, T) bool, True = response token.
        gamma: discount per token, in [0, 1].
        lam: 0 = one-step difference, 1 = Monte-Carlo return minus value.
        bootstrap: (S,) value of the state after the last token, for responses that were cut off; 0 for those that
            ended. None: all ended.

    Returns:
        advantages, returns: both (S, T), float32 or wider, without gradient.
    """
    _same_shape(rewards=rewards, values=values, mask=mask)
    mask = mask.bool()
    with torch.no_grad():
        dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
        reward = rewards.to(dtype).masked_fill(~mask, 0.0)  # (S, T)
        value = values.to(dtype).masked_fill(~mask, 0.0)  # (S, T)
        advantages = torch.zeros_like(reward)
        after = torch.zeros_like(reward[:, 0]) if bootstrap is None else bootstrap.to(dtype)  # (S,) V_{t+1}
        running = torch.zeros_like(after)  # (S,) A_{t+1}
        occupied = mask.any(dim=0).nonzero().flatten().tolist()
        for t in reversed(occupied):
            here = mask[:, t]  # (S,)
            delta = reward[:, t] + gamma * after - value[:, t]
            running = torch.where(here, delta + gamma * lam * running, running)
            after = torch.where(here, value[:, t], after)
            advantages[:, t] = running.masked_fill(~here, 0.0)
        return advantages, advantages + value


def value_after(values: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
    """The critic's value of the state after each response's last token: what a cut-off response is bootstrapped with.

    It stands one column behind the last token, so `values` must reach that far: give the critic one column of padding
    behind the longest response.

    Args:
        values: (S, T) value of the state before token t. Unlike elsewhere the column behind the response is read.
        mask: (S, T) bool, True = response token.
        rows: (S,) bool, rows for which the value is wanted, as the truncated ones; others have 0. None: all rows.

    Returns:
        (S,), 0 for a row without a response.

    Raises:
        ValueError: a wanted response ends in the last column.
    """
    _same_shape(values=values, mask=mask)
    mask = mask.bool()
    wanted = mask.any(dim=1) if rows is None else mask.any(dim=1) & rows.bool()  # (S,)
    columns = torch.arange(mask.shape[1], device=mask.device)
    behind = torch.where(mask, columns, -1).amax(dim=1) + 1  # (S,)
    if bool((wanted & (behind >= mask.shape[1])).any()):
        raise ValueError("a response ends in the last column; the value after it needs one column of padding behind it")
    picked = values.gather(1, behind.clamp_max(mask.shape[1] - 1).unsqueeze(1)).squeeze(1)  # (S,)
    return picked.masked_fill(~wanted, 0.0)


# ------------------------------------------------------------------------------------------------ without a critic
def group_advantages(scores: Tensor, groups: Tensor, kind: str = "rloo") -> Tensor:
    """Each response against the others to the same prompt.

    All responses of a prompt must be in one call: split a rollout by prompt, never inside one. A response that is alone
    (the others could not be scored) has nothing to be compared with: its advantage is 0.

    Args:
        scores: (S,) what each response earned; every score finite.
        groups: (S,) int64, the prompt each response answers; any numbers, in any order.
        kind: "rloo" or "grpo".

    Returns:
        (S,) float32 or wider, without gradient.

    Raises:
        ValueError: unknown kind, or a score that is not finite.
    """
    if kind not in GROUP_KINDS:
        raise ValueError(f"unknown kind {kind!r}; one of {', '.join(GROUP_KINDS)}")
    _same_shape(scores=scores, groups=groups)
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("a score is not finite; drop rows without a score before comparing")
    with torch.no_grad():
        # one number per response, on the CPU: adding by index is not deterministic on CUDA
        _, code, count = torch.unique(groups.cpu(), return_inverse=True, return_counts=True)  # (S,), (G,)
        wide = scores.cpu().double()

        def group_mean(x: Tensor) -> Tensor:
            return torch.zeros(len(count), dtype=torch.float64).index_add(0, code, x) / count

        mean = group_mean(wide)  # (G,)
        centred = wide - mean[code]  # (S,)
        size = count[code]  # (S,)
        if kind == "rloo":
            # s_i - (K mean - s_i) / (K - 1) = (s_i - mean) K / (K - 1)
            advantages = centred * size / (size - 1).clamp_min(1)
        else:
            advantages = centred / (group_mean(centred.square()).sqrt()[code] + EPSILON)
        advantages = advantages.masked_fill(size < 2, 0.0)
        return advantages.to(scores.device, torch.promote_types(scores.dtype, torch.float32))


def spread(advantages: Tensor, mask: Tensor) -> Tensor:
    """The advantage of a response at each of its tokens: (S,) -> (S, T), 0 outside the mask."""
    return advantages.unsqueeze(1) * mask.to(advantages.dtype)


# ------------------------------------------------------------------------------------------------ whitening
def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares over the mask: (3,) float64.

    They add up: the moments of a whole rollout are the sum of those of its parts, on whatever process they lie.
    """
    _same_shape(x=x, mask=mask)
    kept = x.detach().double().masked_fill(~mask.bool(), 0.0)
    return torch.stack([mask.sum().double(), kept.sum(), kept.square().sum()])


def whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, *, total: Tensor | None = None, epsilon: float = 1e-8
) -> Tensor:
    """Divide by the standard deviation over the mask, after subtracting the mean.

    The scale is one number for the whole rollout, so reward, costs and KL keep their weights against each other. The
    variance divides by the count, and with fewer than two tokens nothing is changed.

    Args:
        x: (S, T).
        mask: (S, T) bool, True = counts.
        shift_mean: False: scale only, so that every sign stays as it is.
        total: (3,) `moments` of the whole rollout, where `x` is a part of it; None: `x` is all.
        epsilon: added to the variance.

    Returns:
        (S, T), 0 outside the mask.
    """
    _same_shape(x=x, mask=mask)
    count, total_sum, squares = (moments(x, mask) if total is None else total.double()).tolist()
    kept = x.masked_fill(~mask.bool(), 0.0)
    if count < 2:
        return kept
    mean = total_sum / count
    deviation = (max(0.0, squares / count - mean * mean) + epsilon) ** 0.5
    shifted = kept - mean if shift_mean else kept
    return (shifted / deviation).masked_fill(~mask.bool(), 0.0)


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
