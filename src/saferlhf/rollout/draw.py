"""Drawing tokens with randomness that belongs to the row, not to the batch.

A token is drawn as the winner of an exponential race: with independent E_i ~ Exp(1), one for each token i,

    token = argmax_i p_i / E_i        is distributed as p        (the Gumbel-max trick, -log E_i being Gumbel)

E_i is a hash of (seed, rollout, row id, sample, position, i): counter-based, no stream that anything could move. The
same row therefore gets the same noise in any batch, order, batch size or number of processes.

The probabilities differ between batches in their last digits, because sums are taken in another order. So a draw also
tells its **margin**: by how much another logit would have to grow to win. Where that is less than rounding, the caller
computes the row's logits once more in a way that does not depend on the batch (`generate.py`). The chance of a margin
below m is at most about m, whatever the size of the vocabulary. (Inverting the cumulative distribution has no such
bound: most of a large vocabulary lies closer together there than rounding.)
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

BLOCK = 1 << 16
"""Numbers that are hashed at once on the CPU: what stays in its cache."""


def row_key(seed: int, rollout: int, row_id: str, sample: int) -> int:
    """64 bits, signed, that depend on all four."""
    digest = hashlib.sha256(f"{seed}\x00{rollout}\x00{row_id}\x00{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def exponential_noise(keys: Tensor, position: int, vocabulary: int) -> Tensor:
    """Exp(1) numbers for each token of a vocabulary; a larger vocabulary extends a smaller one.

    Args:
        keys: (B,) int64, of `row_key`.
        position: of the token in its response.
        vocabulary: V.

    Returns:
        (B, V) float64, above 0.
    """
    base = _mix(keys + _signed(0x9E3779B97F4A7C15 * (position + 1)))[:, None]  # (B, 1)
    tokens = torch.arange(1, vocabulary + 1, device=keys.device) * _signed(0xD1B54A32D192ED03)  # (V,)
    if keys.device.type != "cpu":
        return _exponential(base + tokens)
    rows = max(1, BLOCK // max(1, vocabulary))
    return torch.cat([_exponential(part + tokens) for part in base.split(rows)]) if len(keys) else _exponential(base)


def draw(
    logits: Tensor, noise: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their log-probabilities under the sampling distribution, and margins.

    Args:
        logits: (B, V); -inf is never drawn.
        noise: (B, V) Exp(1); not looked at for temperature 0.
        temperature: divides the logits; 0 takes the largest one.
        top_k, top_p: cut the distribution off, 0 and 1 do not; log-probabilities are those after the cut.

    Returns:
        (B,) int64 tokens; (B,) float64 log-probabilities in nats, NaN where the logits are no numbers, 0 at temperature
        0; (B,) float64 margins in units of logits, inf where no other token is possible.
    """
    if temperature == 0:
        best, tokens = logits.double().topk(min(2, logits.shape[-1]), dim=-1)  # (B, 2)
        # inf - inf and NaN - NaN are NaN, which says that these were no numbers
        return tokens[:, 0], best[:, 0] - best[:, 0], best[:, 0] - best[:, -1]
    scaled = logits.double() / temperature
    if top_k > 0 or top_p < 1:
        scaled = _cut_off(scaled, top_k, top_p)
    p = torch.softmax(scaled, dim=-1)  # (B, V)
    race, tokens = (p / noise).topk(min(2, p.shape[-1]), dim=-1)  # (B, 2)
    margin = race[:, 0].log() - (race[:, 1].log() if race.shape[1] > 1 else -torch.inf)
    return tokens[:, 0], p.gather(1, tokens)[:, 0].log(), margin * temperature


def _cut_off(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """(B, V) logits with -inf for what is left out: all but the k largest, then all beyond a mass of p."""
    ordered, places = logits.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k > 0:
        keep[:, top_k:] = False
        ordered = ordered.masked_fill(~keep, -torch.inf)
    if top_p < 1:
        p = torch.softmax(ordered, dim=-1)
        keep &= p.cumsum(dim=-1) - p < top_p  # the token that reaches the mass is kept
        keep[:, 0] = True
    kept = torch.zeros_like(keep).scatter(1, places, keep)
    return logits.masked_fill(~kept, -torch.inf)


# ------------------------------------------------------------------------------------------------ hash
def _exponential(x: Tensor) -> Tensor:
    """Exp(1) from hashed integers: minus the logarithm of a number in (0, 1) of 53 bits."""
    bits = _mix(x).bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1)
    return bits.double().add_(0.5).mul_(2.0**-53).log_().neg_()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64, in place; products wrap."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)  # int64 shifts its sign in: mask it
        x *= _signed(factor)
    x ^= (x >> 31) & ((1 << 33) - 1)
    return x


def _signed(value: int) -> int:
    """The int64 with the lowest 64 bits of an integer."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
