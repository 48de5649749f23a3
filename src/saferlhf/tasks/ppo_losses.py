"""One optimizer step of PPO: the actor, its critics and supervised rows, micro-batch by micro-batch.

With n the response tokens of the step over all its micro-batches, the actor's loss is

    L = sum_t [ clipped surrogate_t + beta k_t (if the KL divergence enters as a loss) - c_H entropy_t ] / n
        + c_ptx * mean negative log-likelihood of supervised responses

and each critic's the sum of its clipped squared errors over n. `loss_mean=response` weighs each response the same
instead. Sums are divided by the counts of the whole step, so micro-batch size, padding and the number of processes
change nothing (trap 6): a process gives the sum over its responses, and gradients are added over all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from saferlhf.config.online_schema import PpoConfig
from saferlhf.evaluation.processes import Processes
from saferlhf.models.roles import Roles
from saferlhf.ops.losses import response_nll
from saferlhf.ops.policy_losses import (
    clipped_surrogate,
    clipped_value_loss,
    kl_loss,
    surrogate_sums,
    token_entropy,
    token_logprobs,
)
from saferlhf.rollout.experience import Experience

Backward = Callable[[Tensor], None]


class UpdateSums:
    """Sums over a whole update, from which its means come; those of this process until they are brought together."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.norms: dict[str, list[float]] = defaultdict(list)

    def add(self, **values: Tensor) -> None:
        """Add up, in float64 and without gradient."""
        for name, value in values.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def norm(self, name: str, value: float) -> None:
        """A gradient's norm before clipping, of one step."""
        self.norms[name].append(value)

    def over_all_processes(self) -> UpdateSums:
        """The same sums over all processes, added in one go; all must call this."""
        whole = UpdateSums()
        whole.norms = self.norms  # of whole gradients already
        if Processes.current().size == 1 or not self.sums:
            whole.sums = self.sums
            return whole
        together = torch.stack(list(self.sums.values()))
        torch.distributed.all_reduce(together)
        whole.sums = dict(zip(self.sums, together, strict=True))
        return whole

    def mean(self, name: str, count: str = "tokens") -> float:
        """A sum over the sum that counts it; NaN where nothing was counted."""
        if name not in self.sums or not float(self.sums.get(count, torch.tensor(0.0))):
            return float("nan")
        return float(self.sums[name] / self.sums[count])


def row_weights(lengths: Tensor, loss_mean: str) -> Tensor:
    """(S,) weight of each response's sum over its tokens, from the (S,) tokens of all responses of a step.

    All weights times lengths sum to one over the step; a step without a token weighs nothing.
    """
    tokens = lengths.double()
    if loss_mean == "response":
        rows = (tokens > 0).sum().clamp_min(1)
        return torch.where(tokens > 0, 1 / (tokens.clamp_min(1) * rows), 0.0).float()
    return torch.full_like(tokens, 1.0).div(tokens.sum().clamp_min(1)).float()


def actor_backward(
    roles: Roles,
    parts: Sequence[Experience],
    config: PpoConfig,
    *,
    temperature: float,
    kl_coefficient: float,
    backward: Backward,
    sums: UpdateSums,
) -> None:
    """Gradients of the policy's loss over one optimizer step, whose micro-batches have `row_weights`."""
    clips: dict[str, Any] = {"clip": config.clip_ratio, "clip_high": config.clip_ratio_high}
    for part in parts:
        rollout = part.rollout
        ids, mask = rollout.input_ids, rollout.response_mask
        assert part.advantages is not None and part.reference_logprobs is not None and part.weights is not None
        with roles.using("actor"):
            logits = roles.logits("actor", ids, rollout.attention_mask)  # (S, T, V)
            logprobs = token_logprobs(logits, ids, mask, temperature=temperature)  # (S, T)
            surrogate = clipped_surrogate(
                logprobs, rollout.logprobs, part.advantages, mask, dual_clip=config.dual_clip, **clips
            )
            loss = surrogate
            with torch.set_grad_enabled(config.entropy_coefficient > 0):
                entropy = token_entropy(logits, mask, temperature=temperature).sum(dim=1)  # (S,)
            if config.entropy_coefficient:
                loss = loss - config.entropy_coefficient * entropy
            if config.kl.enters == "loss":
                held = kl_loss(logprobs, part.reference_logprobs, mask, kind=config.kl.estimator)
                loss = loss + kl_coefficient * held
            backward((loss * part.weights).sum())
        sums.add(
            policy_loss=surrogate.sum(),
            entropy=entropy.sum(),
            **surrogate_sums(logprobs, rollout.logprobs, part.advantages, mask, **clips),
        )


def critic_backward(
    roles: Roles, signal: str, parts: Sequence[Experience], config: PpoConfig, *, backward: Backward, sums: UpdateSums
) -> None:
    """Gradients of one critic's loss over one optimizer step, whose micro-batches have `row_weights`."""
    name = f"{signal}_critic"
    for part in parts:
        rollout, returns = part.rollout, part.returns[signal]
        assert part.weights is not None
        with roles.using(name):
            values = roles.values(name, rollout.input_ids, rollout.attention_mask)  # (S, T)
            loss = clipped_value_loss(
                values, part.values[signal], returns, rollout.response_mask, clip=config.clip_value
            )
            backward((loss * part.weights).sum())
        sums.add(
            **{
                f"value_loss_{signal}": loss.sum(),
                f"value_tokens_{signal}": rollout.response_mask.sum(),
            }
        )


def ptx_backward(
    roles: Roles, batches: Sequence[Any], total: int, coefficient: float, *, backward: Backward, sums: UpdateSums
) -> None:
    """Gradients of the likelihood of supervised responses over one optimizer step, (S, T) batches of them.

    Args:
        total: tokens that are predicted in the whole step, over all processes.
    """
    for batch in batches:
        with roles.using("actor"):
            logits = roles.logits("actor", batch.input_ids, batch.attention_mask)
            nll, count = response_nll(logits, batch.input_ids, batch.response_mask)  # (S,), (S,)
            backward(coefficient * nll.sum() / max(1, total))
        sums.add(ptx_loss=nll.sum(), ptx_tokens=count.sum())


def means_of(sums: UpdateSums, signals: Iterable[str]) -> dict[str, float]:
    """Means over the whole update; what was not computed is left out."""
    found = {
        name: sums.mean(name)
        for name in ("policy_loss", "entropy", "clip_fraction", "outside_fraction", "approx_kl", "ratio")
    }
    found["ptx_loss"] = sums.mean("ptx_loss", "ptx_tokens")
    for signal in signals:
        found[f"value_loss_{signal}"] = sums.mean(f"value_loss_{signal}", f"value_tokens_{signal}")
    found |= {f"grad_norm_{name}": sum(norms) / len(norms) for name, norms in sums.norms.items()}
    return {name: value for name, value in found.items() if value == value}
