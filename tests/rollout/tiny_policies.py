"""Small policies, prompts of random tokens, and a second way to a model's log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from models.tiny_models import backbone
from torch import Tensor, nn

from saferlhf.rollout.experience import Rollout
from saferlhf.rollout.generate import generate
from saferlhf.rollout.prompts import PromptTokens

EOS, PAD = 2, 0


def sharp(model: Any) -> Any:
    """Weights of a real model's size, so that next-token distributions are far from flat."""
    with torch.no_grad():
        stream = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=stream) / parameter.shape[-1] ** 0.5)
        model.get_output_embeddings().weight.mul_(4)
    return model.train()


def sharp_llama() -> Any:
    return sharp(backbone(lm_head=True))


class Cache:
    """Remembers nothing but which rows are left."""

    def reorder_cache(self, rows: Tensor) -> None:
        self.rows = len(rows)


class Chain(nn.Module):
    """A language model that looks at the last token only; keeps how many rows each call had."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)  # (V, V)
        self.calls: list[int] = []

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        self.calls.append(len(input_ids))
        return SimpleNamespace(logits=self.logits[input_ids], past_key_values=past_key_values or Cache())


def counting(vocabulary: int = 12, step_logit: float = 50.0) -> Chain:
    """After token n comes n + 1, surely; the last stays."""
    logits = torch.zeros(vocabulary, vocabulary)
    for token in range(vocabulary):
        logits[token, min(token + 1, vocabulary - 1)] = step_logit
    return Chain(logits)


def prompts_of(ids: Sequence[Sequence[int]], names: Sequence[str] | None = None) -> list[PromptTokens]:
    return [PromptTokens((names or [f"row-{i}" for i in range(len(ids))])[i], given) for i, given in enumerate(ids)]


def some_prompts(count: int = 9, seed: int = 0) -> list[PromptTokens]:
    stream = np.random.default_rng(seed)
    return prompts_of([stream.integers(5, 64, stream.integers(1, 14)).tolist() for _ in range(count)])


def sampled(model: nn.Module, prompts: Sequence[PromptTokens], **options: Any) -> Rollout:
    given = {"eos_token_id": EOS, "pad_token_id": PAD, "max_new_tokens": 12, "seed": 7, **options}
    return generate(model, prompts, **given)


def written(rollout: Rollout) -> list[list[int]]:
    """The responses' tokens."""
    return [ids[mask].tolist() for ids, mask in zip(rollout.input_ids, rollout.response_mask, strict=True)]


def logprobs_of(rollout: Rollout) -> list[list[float]]:
    """The log-probabilities of the responses' tokens."""
    return [values[mask].tolist() for values, mask in zip(rollout.logprobs, rollout.response_mask, strict=True)]


def logits_after(model: Any, tokens: Sequence[int]) -> Tensor:
    """(T, V) of one unpadded sequence, without a cache."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    model.train()
    return logits
