"""Sampling responses whose randomness belongs to the row, not to the batch.

Token t of sample s of a row is drawn by inverse transform: one uniform number u in [0, 1) from a counter-based
generator keyed by (seed, row id, s), position t; the token is the first whose cumulative probability exceeds u. The
same row therefore gets the same noise in any batch, order, batch size or number of processes.

Log-probabilities are those of the sampling distribution softmax(logits / temperature), nothing cut off: no top-k, no
top-p (trap 4 of docs/architecture.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saferlhf.errors import UserError
from saferlhf.models.causal import unwrapped
from saferlhf.ops.sequences import position_ids


@dataclass(frozen=True)
class Sampled:
    """One sampled response.

    Attributes:
        token_ids: its tokens, the end-of-sequence token included when it came.
        truncated: True when the length limit cut it off.
        logprob: sum of the tokens' log-probabilities under the sampling distribution, in nats.
    """

    token_ids: list[int]
    truncated: bool
    logprob: float


def row_noise(seed: int, row_id: str, sample: int, length: int) -> np.ndarray:
    """(length,) uniform float64 numbers that depend on the arguments only; a longer request extends a shorter one."""
    key = hashlib.sha256(f"{seed}\x00{row_id}\x00{sample}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(length)


@torch.inference_mode()
def sample_responses(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    row_ids: Sequence[str],
    *,
    eos_token_id: int,
    pad_token_id: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    sample: int = 0,
    batch_size: int = 64,
) -> list[Sampled]:
    """Sample one response to each prompt, in the prompts' order.

    The model is put into eval mode for the time being. Batches are made of prompts of like length.

    Args:
        model: causal language model, adapters included, on the device it is to run on.
        prompts: token ids, at least one each.
        row_ids: what each row's noise belongs to.
        eos_token_id: ends a response; it may be the padding token as well.
        pad_token_id: fills what is masked.
        max_new_tokens: where a response is cut off.
        temperature: divides the logits; 0 takes the most probable token, with log-probability 0.
        seed, sample: the rest of the noise's key.
        batch_size: prompts per forward pass; changes nothing but speed.

    Raises:
        UserError: the model's logits are not numbers.
        ValueError: an empty prompt, or a negative temperature.
    """
    if temperature < 0:
        raise ValueError("temperature must not be negative")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt needs at least one token")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    results: list[Sampled | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            noise = np.stack([row_noise(seed, row_ids[i], sample, max_new_tokens) for i in chosen])
            batch = [list(prompts[i]) for i in chosen]
            for i, result in zip(
                chosen, _batch(model, batch, noise, eos_token_id, pad_token_id, temperature), strict=True
            ):
                results[i] = result
    finally:
        for module, training in modes:
            module.training = training
    return [result for result in results if result is not None]


def _batch(
    model: nn.Module, prompts: list[list[int]], noise: np.ndarray, eos: int, pad: int, temperature: float
) -> list[Sampled]:
    """Left-padded prompts, key-value cache, until all rows ended or `noise.shape[1]` tokens are there."""
    causal: Any = unwrapped(model)
    device = next(model.parameters()).device
    rows, width, limit = len(prompts), max(map(len, prompts)), noise.shape[1]
    ids = torch.full((rows, width), pad, dtype=torch.long, device=device)  # (B, P)
    mask = torch.zeros((rows, width), dtype=torch.bool, device=device)  # (B, P) True = real token
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, width - len(prompt) :] = True
    uniform = torch.from_numpy(noise).to(device)  # (B, R) float64
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    lengths = torch.zeros(rows, dtype=torch.long, device=device)
    logprobs = torch.zeros(rows, dtype=torch.float64, device=device)
    tokens = torch.full((rows, limit), pad, dtype=torch.long, device=device)  # (B, R)
    broken = torch.zeros(rows, dtype=torch.bool, device=device)
    positions, cache = position_ids(mask), None
    for t in range(limit):
        output = causal(
            input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache, logits = output.past_key_values, output.logits[:, -1]  # (B, V)
        broken |= logits.isnan().any(dim=-1)
        chosen, logprob = _draw(logits, uniform[:, t], temperature)  # (B,), (B,)
        tokens[:, t] = torch.where(ended, pad, chosen)
        logprobs += torch.where(ended, 0.0, logprob)
        lengths += (~ended).long()
        ended = ended | (chosen == eos)
        if bool(ended.all()):
            break
        ids = tokens[:, t : t + 1]
        # a row that ended goes on unseen: its tokens never leave this function
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions[:, -1:] + 1
    if bool(broken.any()):
        raise UserError("the model's logits are not numbers", "sampling", "its weights have diverged: train it again")
    return [
        Sampled(tokens[row, : int(lengths[row])].tolist(), not bool(ended[row]), float(logprobs[row]))
        for row in range(rows)
    ]


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Token ids and their log-probabilities, (B,) each, from logits (B, V)."""
    if temperature == 0:
        best = logits.argmax(dim=-1)
        return best, torch.zeros_like(uniform)
    logp = torch.log_softmax(logits.double() / temperature, dim=-1)  # (B, V)
    cumulative = logp.exp().cumsum(dim=-1)
    # rounding can leave the last sum a hair below 1
    total = cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, uniform[:, None] * total, right=True).clamp_max(logits.shape[-1] - 1)
    return chosen.squeeze(1), logp.gather(1, chosen).squeeze(1)
