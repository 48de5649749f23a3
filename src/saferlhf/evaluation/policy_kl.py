"""How far a policy has moved from its reference, along the responses that it wrote itself.

    KL(pi || ref) of a response y to x = sum_t sum_v pi(v | x, y_<t) log [ pi(v | x, y_<t) / ref(v | x, y_<t) ]

The inner sum over the vocabulary is exact. Its mean over sampled responses estimates the KL divergence of whole
responses without bias, as the mean of log pi(y) - log ref(y) does, but is never negative and varies less
(Rao-Blackwell; Amini et al. 2025, "Better estimation of the KL divergence between language models"). Both
distributions are those that are sampled from, softmax(logits / temperature).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saferlhf.evaluation.score import evaluating
from saferlhf.models.causal import unwrapped
from saferlhf.ops.sequences import position_ids

_LOGITS = 2**25
"""Numbers of one batch of logits at once: 128 MiB in float32, for policy and reference each."""


def response_kl(
    policy: nn.Module,
    reference: nn.Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float = 1.0,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """(N,) KL divergence to the reference along each response, in nats; 0 for a response without a token.

    Args:
        policy, reference: causal language models of one vocabulary, adapters included, each on its device.
        prompts: N lists of token ids, one token at least.
        responses: N lists of token ids that the policy sampled, the end-of-sequence token included.
        temperature: of the sampling, above 0.
        batch_size: most responses per forward pass; fewer where the vocabulary is large. Changes nothing but speed.
        progress: called with the number of responses done so far.

    Raises:
        ValueError: no temperature, or vocabularies of different sizes.
    """
    if temperature <= 0:
        raise ValueError("without sampling there is no distribution to compare: give a temperature above 0")
    found = np.zeros(len(prompts))
    order = sorted((i for i in range(len(prompts)) if responses[i]), key=lambda i: len(prompts[i]) + len(responses[i]))
    done = len(prompts) - len(order)
    with evaluating(policy), evaluating(reference):
        while order:
            longest = len(prompts[order[-1]]) + len(responses[order[-1]])
            size = max(1, min(batch_size, _LOGITS // (longest * _vocabulary(policy))))
            chosen, order = order[-size:], order[:-size]
            batch = [([*prompts[i]], [*responses[i]]) for i in chosen]
            found[chosen] = _batch(policy, reference, batch, temperature)
            done += len(chosen)
            if progress is not None:
                progress(done)
    return found


def _vocabulary(model: nn.Module) -> int:
    return int(unwrapped(model).get_output_embeddings().weight.shape[0])


def _batch(
    policy: nn.Module, reference: nn.Module, batch: list[tuple[list[int], list[int]]], temperature: float
) -> NDArray[np.float64]:
    width = max(len(prompt) + len(response) for prompt, response in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)  # (S, T), padded on the right
    mask = torch.zeros_like(ids, dtype=torch.bool)  # (S, T) True = real token
    writes = torch.zeros_like(mask)  # (S, T) True where the next token is one of the response's
    for row, (prompt, response) in enumerate(batch):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        mask[row, :end] = True
        writes[row, len(prompt) - 1 : end - 1] = True
    ours = _logp(policy, ids, mask, temperature)  # (S, T, V)
    theirs = _logp(reference, ids, mask, temperature).to(ours.device)
    if ours.shape[-1] != theirs.shape[-1]:
        raise ValueError(f"vocabularies of {ours.shape[-1]} and {theirs.shape[-1]} tokens")
    # a token of probability 0 adds nothing, whatever the other side says of it
    terms = torch.where(ours > -torch.inf, ours.exp() * (ours - theirs), 0.0).sum(dim=-1, dtype=torch.float64)  # (S, T)
    return np.asarray(terms.cpu().masked_fill(~writes, 0.0).sum(dim=-1).numpy())


def _logp(model: nn.Module, ids: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """(S, T, V) log-probabilities in float32, on the model's device."""
    device = next(model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    output = unwrapped(model)(
        input_ids=ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False
    )
    return torch.log_softmax(output.logits.float() / temperature, dim=-1)
