"""The policy writes itself (`rollout/generate.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from saferlhf.config.rollout_schema import RolloutConfig
from saferlhf.data.templates import end_id, pad_id
from saferlhf.rollout.experience import Rollout
from saferlhf.rollout.generate import generate
from saferlhf.rollout.prompts import PromptTokens


class NativeEngine:
    """Samples from the causal module that a context gives.

    Args:
        policy: called for each rollout, say `lambda: roles.causal("actor")`; its module is used inside the context.
        tokenizer: of the policy.
        config: temperature, lengths and batch size.
    """

    def __init__(
        self, policy: Callable[[], AbstractContextManager[nn.Module]], tokenizer: Any, config: RolloutConfig
    ) -> None:
        self.policy, self.tokenizer, self.config = policy, tokenizer, config

    @property
    def name(self) -> str:
        """Of the engine."""
        return "native"

    def follow(self, policy: Any) -> None:
        """Nothing to do: it is the policy."""

    def generate(
        self,
        prompts: Sequence[PromptTokens],
        *,
        samples: int = 1,
        seed: int,
        rollout: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Rollout:
        """See `Engine`; the samples are the same for any batch."""
        config = self.config
        with self.policy() as causal:
            return generate(
                causal,
                prompts,
                samples=samples,
                seed=seed,
                rollout=rollout,
                temperature=config.temperature,
                max_new_tokens=config.new_tokens,
                eos_token_id=end_id(self.tokenizer),
                pad_token_id=pad_id(self.tokenizer),
                batch_size=config.batch_size,
                batch_tokens=config.batch_tokens,
                top_k=config.top_k,
                top_p=config.top_p,
                tokenizer=self.tokenizer,
                progress=progress,
            )
