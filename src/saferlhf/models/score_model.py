"""A backbone with score heads: tokens in, named scores out.

`scores[name] = head_name(pool(trunk(tokens), mask))`, with positions and pooling taken from the attention mask, so the
scores are the same left-, right- and un-padded, alone or in a batch, and when the pad token ends sequences too.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from saferlhf.models.heads import build_heads, head_widths
from saferlhf.ops.sequences import POOLINGS, pool, position_ids


class ScoreModel(nn.Module):
    """Scores of whole sequences.

    Args:
        trunk: bare Hugging Face model (no language-model head), with or without adapters.
        heads: name -> number of scores for fresh heads, or heads that were loaded.
        pooling: "last" or "mean" over the attention mask.
        seed: of fresh heads.

    Parameter names start with `trunk.` and `heads.<name>.`.
    """

    def __init__(
        self, trunk: nn.Module, heads: Mapping[str, int] | nn.ModuleDict, pooling: str = "last", seed: int = 0
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}; one of {', '.join(POOLINGS)}")
        self.trunk = trunk
        self.pooling = pooling
        self.heads = heads if isinstance(heads, nn.ModuleDict) else build_heads(hidden_size(trunk), heads, seed)
        self._takes_positions = "position_ids" in inspect.signature(_plain(trunk).forward).parameters
        self._first_position = first_position(trunk)

    @property
    def head_widths(self) -> dict[str, int]:
        """Name -> number of scores."""
        return head_widths(self.heads)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Scores of S sequences.

        Args:
            input_ids: (S, T) int64.
            attention_mask: (S, T) bool or int, True = real token. A row without one scores its heads' bias.

        Returns:
            head name -> (S, n) float32.
        """
        pooled = pool(self.hidden(input_ids, attention_mask), attention_mask, self.pooling)  # (S, H)
        return {name: head(pooled) for name, head in self.heads.items()}

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states (S, T, H); what stands at padding means nothing."""
        mask = attention_mask.bool()
        # a fully masked row would make softmax divide zero by zero, and its gradient NaN for the whole batch
        attended = mask.clone()
        attended[:, 0] |= ~mask.any(dim=-1)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attended.long()}
        if self._takes_positions:
            inputs["position_ids"] = position_ids(mask) + self._first_position
        if getattr(_plain(self.trunk).config, "use_cache", None):
            inputs["use_cache"] = False
        return self.trunk(**inputs).last_hidden_state


def hidden_size(trunk: nn.Module) -> int:
    """H of a Hugging Face model (of its text part)."""
    config: Any = _plain(trunk).config
    return int(config.get_text_config().hidden_size)


def first_position(trunk: nn.Module) -> int:
    """Position id of the first token: 0, but padding_idx + 1 for the RoBERTa family, which reserves the rows before."""
    for name, module in _plain(trunk).named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _plain(trunk: nn.Module) -> Any:
    """The Hugging Face model under an adapter wrapper."""
    base = getattr(trunk, "get_base_model", None)
    return base() if base is not None else trunk
