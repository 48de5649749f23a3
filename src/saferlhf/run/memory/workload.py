"""How long the rows are and how many steps there will be: what the memory plan has to know of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from saferlhf.config.schema import TrainConfig


@dataclass(frozen=True)
class Workload:
    """The longest row decides on memory, the sum of all on tokens.

    Attributes:
        longest: tokens of the longest row, prompt and response together.
        response: tokens of the longest response.
        steps: optimizer steps; online, rollouts. None: not known.
        tokens_per_step: mean, over all devices. None: not known.
    """

    longest: int
    response: int
    steps: int | None = None
    tokens_per_step: float | None = None

    @property
    def prompt(self) -> int:
        """Tokens of the longest prompt, where prompts stand alone."""
        return max(1, self.longest - self.response)


def full_length(config: TrainConfig) -> Workload:
    """Rows as long as the backbone takes them, where the data are not known: the most that there can be."""
    longest = config.backbone.max_length
    if config.rollout is None:
        return Workload(longest, longest - 1)
    new = min(config.rollout.new_tokens, longest - 1)
    prompt = config.rollout.max_prompt_tokens or longest - new
    return Workload(min(longest, prompt + new), new)


def workload_of(config: TrainConfig, encoded: Any, steps: int) -> Workload:
    """Of the run's own rows.

    Args:
        config: of the run.
        encoded: its `EncodedSplits`.
        steps: of the run.
    """
    if config.rollout is not None:
        lengths, new = np.asarray(encoded.train.lengths), config.rollout.new_tokens
        rows = config.rollout.prompts * config.rollout.samples
        return Workload(int(lengths.max()) + new, new, steps, float((lengths.mean() + new) * rows))
    store = encoded.train.store
    lengths = np.asarray(store.lengths)
    responses = lengths - np.asarray(store.prompt_lengths)
    per_row = lengths.sum() / len(encoded.train)
    return Workload(int(lengths.max()), int(responses.max()), steps, float(per_row * config.trainer.batch_size))
