"""Supervised fine-tuning: the mean negative log-likelihood of response tokens.

    L = - sum_t m_t log p(y_t | x, y_<t) / sum_t m_t

over all tokens t of the optimizer step, m_t = 1 for response tokens (the end-of-sequence token included), 0 for prompt
and padding. Labels are shifted: the first response token counts. Formula and metrics: docs/sft.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from saferlhf.data.batches import TokenBatch
from saferlhf.models.causal import hidden_states, output_layer
from saferlhf.ops.losses import response_nll_from_hidden
from saferlhf.tasks.base import SupervisedTask
from saferlhf.tasks.scoring import gather


class SftTask(SupervisedTask):
    """Learns to imitate responses."""

    lm_head = True

    def build_model(self, trunk: nn.Module) -> nn.Module:
        """The causal language model itself."""
        return trunk

    def scored_mask(self, batch: TokenBatch) -> Tensor:
        """(S, T) True at the tokens whose likelihood counts; the very first token has nothing before it."""
        return batch.attention_mask if self.config.task.train_on_prompt else batch.response_mask

    def _nll(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Sum of negative log-likelihoods and number of tokens per row, (S,) each."""
        assert self.model is not None
        hidden = hidden_states(self.model, batch.input_ids, batch.attention_mask)  # (S, T, H)
        return response_nll_from_hidden(hidden, output_layer(self.model), batch.input_ids, self.scored_mask(batch))

    def loss_sum(self, batch: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative log-likelihood summed over tokens."""
        nll, _ = self._nll(batch)
        return nll.sum(), {}

    def count(self, batch: TokenBatch) -> int:
        """Response tokens."""
        return int(self.scored_mask(batch)[:, 1:].sum())

    def outputs(self, batch: TokenBatch) -> dict[str, Any]:
        """Per row: negative log-likelihood and number of tokens."""
        nll, count = self._nll(batch)
        return {"row_ids": batch.row_ids, "nll_sum": nll.float().cpu(), "tokens": count.cpu()}

    def validation_metrics(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
        """Mean negative log-likelihood per token, in nats, and its exponential."""
        nll = float(gather(outputs, "nll_sum").sum() / max(1, gather(outputs, "tokens").sum()))
        return {"loss": nll, "sft/nll": nll, "sft/perplexity": math.exp(min(nll, 50.0))}
