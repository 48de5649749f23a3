"""The interface of generation engines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from saferlhf.rollout.experience import Rollout
from saferlhf.rollout.prompts import PromptTokens


@runtime_checkable
class Engine(Protocol):
    """Samples responses."""

    @property
    def name(self) -> str:
        """Native | vllm | openai."""
        ...

    def follow(self, policy: Any) -> None:
        """Take over the policy's weights as they are now.

        Args:
            policy: a causal language model, adapters included.

        Raises:
            UserError: this engine cannot.
        """
        ...

    def generate(
        self,
        prompts: Sequence[PromptTokens],
        *,
        samples: int = 1,
        seed: int,
        rollout: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Rollout:
        """Responses to prompts, those to one prompt side by side.

        Log-probabilities are those of the sampling distribution, or NaN where the engine does not tell them. The noise
        depends on (seed, rollout, row id, sample); only the native engine promises equal samples for any batch.

        Args:
            progress: called with the number of responses that are complete so far.
        """
        ...


def request_seed(seed: int, rollout: int, row_id: str, sample: int) -> int:
    """31 bits for engines that take one seed per request."""
    digest = hashlib.sha256(f"{seed}\x00{rollout}\x00{row_id}\x00{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1
