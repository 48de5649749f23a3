"""What each token of a response earns and costs: scores at its end, and the divergence from the reference all along.

With k_t the estimated KL divergence at token t, R and C_1..C_K the scores of a whole response, b its last token and
beta the KL coefficient (Safe RLHF, arXiv 2310.12773, section 3.3 and its released code):

    r_t   = -beta k_t + [t = b] R
    c_k,t = +beta k_t + [t = b] C_k          for every cost k

so that, advantages being linear in rewards, the combined advantage keeps its KL weight for every lambda:

    (A_r - sum_k lambda_k A_k) / (1 + sum_k lambda_k)  =  (A_R - sum_k lambda_k A_Ck) / (1 + sum_k lambda_k) - beta A_kl

Estimators of the KL divergence from one sampled token (Schulman 2020, "Approximating KL divergence"), with
x = log pi_reference - log pi at that token:

    k1 = -x          unbiased, may be negative; the one for rewards
    k2 = x^2 / 2     biased, never negative; its gradient as a loss is that of the KL divergence
    k3 = e^x - 1 - x unbiased, never negative; the one for loss terms and reports

What differs from the reference code: the score is clipped by itself and before the KL term joins it (there their sum is
clipped, at +-50), and a response that ran into the token limit is penalised or bootstrapped (there it is scored as if
it had ended).

The adaptive coefficient is that of Ziegler et al. 2019 (arXiv 1909.08593, section 2.2, with the gain of its code):

    e = clip((KL - target) / target, -0.2, 0.2)          beta <- beta (1 + e responses / horizon)

Legend: `S` sequences, `T` tokens. Masks are bool, True = response token. All outputs are 0 outside the mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from saferlhf.errors import UserError
from saferlhf.ops.sequences import last_index

KL_ESTIMATORS = ("k1", "k2", "k3")
TRUNCATIONS = ("penalty", "bootstrap", "none")
"""What a response that ran into the token limit gets instead of, or on top of, its score."""

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are cut here before the exponential: e^20 is beyond any use, and its square still finite."""

ADAPTIVE_LIMIT = 0.2
"""Largest relative error the adaptive coefficient answers to."""


# ------------------------------------------------------------------------------------------------ divergence
def kl_estimate(logprobs: Tensor, reference: Tensor, mask: Tensor, kind: str = "k1") -> Tensor:
    """Estimated KL divergence of the policy from the reference at each response token, in nats.

    Differentiable in `logprobs`. Exactly 0 where the two agree.

    Args:
        logprobs: (S, T) log p(token t | before) of the policy, under the sampling distribution.
        reference: (S, T) the same of the reference, at the same temperature.
        mask: (S, T) bool, True = response token.
        kind: "k1" | "k2" | "k3".

    Returns:
        (S, T) float32 or wider.
    """
    if kind not in KL_ESTIMATORS:
        raise ValueError(f"unknown estimator {kind!r}; one of {', '.join(KL_ESTIMATORS)}")
    wide = torch.promote_types(logprobs.dtype, torch.float32)
    # filled before anything is computed: what stands outside the mask may be NaN or -inf
    away = (reference.to(wide) - logprobs.to(wide)).masked_fill(~mask.bool(), 0.0)  # (S, T)
    if kind == "k1":
        return -away
    if kind == "k2":
        return away.square() / 2
    return torch.expm1(away.clamp(max=LOG_RATIO_LIMIT)) - away


# ------------------------------------------------------------------------------------------------ scores
def clip_scores(scores: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    """Scores within +-limit, and which of them were cut.

    Args:
        scores: (S,).
        limit: null: nothing is cut.

    Returns:
        scores (S,), cut (S,) bool.
    """
    if limit is None:
        return scores, torch.zeros_like(scores, dtype=torch.bool)
    return scores.clamp(-limit, limit), scores.abs() > limit


def truncated_scores(scores: Tensor, truncated: Tensor, how: str, penalty: float = 0.0) -> Tensor:
    """Scores of responses of which some ran into the token limit.

    `penalty` takes a fixed amount from the score; `bootstrap` gives no score at all, since the end that earns it was
    never reached: the critic's value after the last token stands for it (`value_after`, `gae(bootstrap=...)`). Use it
    on the rewards with a penalty, on costs without: length is no harm.

    Args:
        scores: (S,).
        truncated: (S,) bool, True = ran into the limit.
        how: "penalty" | "bootstrap" | "none".
        penalty: what is taken away, in score units, from zero up.

    Returns:
        (S,).
    """
    if how not in TRUNCATIONS:
        raise ValueError(f"unknown treatment {how!r}; one of {', '.join(TRUNCATIONS)}")
    if how == "penalty":
        return scores - penalty * truncated.to(scores.dtype)
    if how == "bootstrap":
        return scores.masked_fill(truncated.bool(), 0.0)
    return scores


def place_at_end(scores: Tensor, mask: Tensor) -> Tensor:
    """Each row's score at its last response token: (S,) -> (S, T). A row without a response keeps zeros."""
    mask = mask.bool()
    columns = torch.arange(mask.shape[1], device=mask.device)
    is_last = mask & (columns == last_index(mask).unsqueeze(1))  # (S, T)
    return torch.where(is_last, scores.unsqueeze(1), torch.zeros_like(scores).unsqueeze(1))


def shape_rewards(
    rewards: Tensor, costs: Mapping[str, Tensor], kl: Tensor, mask: Tensor, *, kl_coefficient: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """What each token earns and costs: the score at the end, the KL term at every token.

    Its row sums are what a response earns and costs as a whole, for advantages without a critic.

    Args:
        rewards: (S,) score of each response.
        costs: name -> (S,) raw cost of each response; empty where no advantage is taken of a cost.
        kl: (S, T) from `kl_estimate`.
        mask: (S, T) bool, True = response token.
        kl_coefficient: beta; 0 where the KL divergence enters as a loss instead.

    Returns:
        rewards (S, T) and name -> costs (S, T).
    """
    penalty = kl_coefficient * kl.detach().masked_fill(~mask.bool(), 0.0)  # (S, T)
    per_token = {name: place_at_end(cost, mask) + penalty for name, cost in costs.items()}
    return place_at_end(rewards, mask) - penalty, per_token


# ------------------------------------------------------------------------------------------------ coefficient
class KlCoefficient:
    """beta: fixed, or moved once per rollout so that the divergence stays near a target.

    Args:
        initial: beta at the start.
        target: wanted KL divergence per response, in nats; None: fixed.
        horizon: responses over which a lasting error of 20% moves beta by about 20%.
    """

    def __init__(self, initial: float, target: float | None = None, horizon: float = 10_000) -> None:
        self.value = float(initial)
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, responses: int) -> float:
        """Answer to a rollout.

        Args:
            kl: mean over its responses, on all processes, of their summed divergence, in nats.
            responses: how many.

        Returns:
            beta for the next rollout.
        """
        if self.target is not None:
            error = min(max(kl / self.target - 1, -ADAPTIVE_LIMIT), ADAPTIVE_LIMIT)
            # a rollout longer than the horizon must not turn the sign
            self.value *= max(1 + error * responses / self.horizon, ADAPTIVE_LIMIT)
        return self.value

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps; plain numbers, exact."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue where a checkpoint stopped."""
        if "value" not in state:
            raise UserError("the KL coefficient is missing", "checkpoint", "start afresh with resume=never")
        self.value = float(state["value"])
