"""How far the log-probabilities an engine reports are from those the policy computes itself for the same tokens.

With d = log p_policy - log p_engine at each response token, over tokens that the engine sampled,

    mean |d|,   max |d|,   KL(engine || policy) ~ mean(exp(d) - 1 - d)      (never negative, Schulman's k3)

and the share of tokens that the engine told nothing about. An update that takes the engine's numbers for the old
policy's is wrong by exp(d); ours recompute them and use the engine's for this check alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saferlhf.errors import UserError


@torch.no_grad()
def logprob_mismatch(engine: Tensor, policy: Tensor, mask: Tensor) -> dict[str, float]:
    """`mean_abs`, `max_abs`, `kl` in nats and `unknown_share`.

    Args:
        engine: (S, T) log-probabilities as the engine reports them, NaN where it does not.
        policy: (S, T) those of the policy for the same tokens, under the same temperature.
        mask: (S, T) bool, True = response token.

    Returns:
        NaN for the first three where the engine told nothing.
    """
    known = mask & ~engine.isnan()
    tokens = int(mask.sum())
    unknown = 1 - int(known.sum()) / tokens if tokens else 0.0
    if not known.any():
        return {"mean_abs": math.nan, "max_abs": math.nan, "kl": math.nan, "unknown_share": unknown}
    d = policy[known].double() - engine[known].double()
    return {
        "mean_abs": float(d.abs().mean()),
        "max_abs": float(d.abs().max()),
        "kl": float((torch.expm1(d) - d).mean()),
        "unknown_share": unknown,
    }


def refuse_mismatch(found: dict[str, float], limit: float, engine: str) -> None:
    """End a run whose engine samples from another distribution than the policy's.

    Raises:
        UserError: the mean difference is above the limit, or not known.
    """
    mean = found["mean_abs"]
    if not mean <= limit:
        told = "tells no log-probabilities" if math.isnan(mean) else f"is off by {mean:.3g} nats per token"
        mend = "are its weights, dtype and temperature the policy's? Else rollout=native"
        raise UserError(f"engine '{engine}' {told}, {limit:g} is allowed", "rollout.max_logprob_mismatch", mend)
