"""A backbone with score heads: tokens in, named scores out.

`scores[name] = head_name(pool(trunk(tokens), mask))`, with positions and pooling taken from the attention mask, so the
scores are the same left-, right- and un-padded, alone or in a batch, and when the pad token ends sequences too.

The state that is pooled is the last one, or those of chosen layers side by side; the mask is the whole sequence's, or
the prompt's, the response's, or both side by side: for layers (a, b) and span `both` the heads read
`[a of prompt, a of response, b of prompt, b of response]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saferlhf.errors import UserError
from saferlhf.models.causal import unwrapped
from saferlhf.models.frozen_prefix import FrozenPrefix
from saferlhf.models.heads import build_heads, head_widths
from saferlhf.models.kernel_map import KernelMap
from saferlhf.models.layers import blocks_of, check_layers, visit_states
from saferlhf.ops.sequences import POOLINGS, SPANS, pool, position_ids, span_masks


class ScoreModel(nn.Module):
    """Scores of whole sequences.

    Args:
        trunk: bare Hugging Face model (no language-model head), with or without adapters.
        heads: name -> number of scores for fresh heads, or heads that were loaded.
        pooling: "last" or "mean" over the mask.
        seed: of fresh heads.
        layers: numbers of the hidden states to read (0 = embeddings, L = after the last block and the final norm);
            None: the last one.
        span: which tokens are pooled: "all", "prompt", "response", or two side by side: "both" (prompt and
            response), "all_and_response".
        kernel: stands between the pooled states and the heads, which are then linear in its values; None: nothing does.

    Parameter names start with `trunk.` and `heads.<name>.`.
    """

    def __init__(
        self,
        trunk: nn.Module,
        heads: Mapping[str, int] | nn.ModuleDict,
        pooling: str = "last",
        seed: int = 0,
        layers: Sequence[int] | None = None,
        span: str = "all",
        kernel: KernelMap | None = None,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}; one of {', '.join(POOLINGS)}")
        if span not in SPANS:
            raise ValueError(f"unknown span {span!r}; one of {', '.join(SPANS)}")
        self.trunk = trunk
        self.pooling, self.span = pooling, span
        self.layers = None if layers is None else check_layers(layers, len(blocks_of(trunk)), "layers")
        self.kernel = kernel
        self.prefix: FrozenPrefix | None = None  # frozen lower blocks whose states are kept
        width = feature_width(hidden_size(trunk), self.layers, span) if kernel is None else kernel.width
        self.heads = heads if isinstance(heads, nn.ModuleDict) else build_heads(width, heads, seed)
        self._takes_positions = "position_ids" in inspect.signature(unwrapped(trunk).forward).parameters
        self._first_position = first_position(trunk)

    @property
    def head_widths(self) -> dict[str, int]:
        """Name -> number of scores."""
        return head_widths(self.heads)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Scores of S sequences.

        Args:
            input_ids: (S, T) int64.
            attention_mask: (S, T) bool or int, True = real token. A row without one scores its heads' bias.
            response_mask: (S, T) bool or int, True at the response's tokens; needed where prompt and response are
                told apart. A row without prompt or response has zeros in that part.

        Returns:
            head name -> (S, n) float32.
        """
        return self.scores(self.pooled(input_ids, attention_mask, response_mask))

    def scores(self, pooled: Tensor) -> dict[str, Tensor]:
        """Head name -> (S, n) float32 of pooled states (S, F)."""
        seen = pooled if self.kernel is None else self.kernel(pooled)
        return {name: head(seen) for name, head in self.heads.items()}

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor | None = None) -> Tensor:
        """(S, F) what the heads read; arguments as in `forward`."""
        masks = span_masks(attention_mask, response_mask, self.span)
        if self.layers is None:
            states = [self.hidden(input_ids, attention_mask)]
        else:
            kept: dict[int, Tensor] = {}
            self.visit(input_ids, attention_mask, self.layers, kept.__setitem__)
            states = [kept[layer] for layer in self.layers]
        parts = [pool(state, mask, self.pooling) for state in states for mask in masks]  # (S, H) each
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def visit(
        self, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int], take: Callable[[int, Tensor], None]
    ) -> None:
        """Hand the (S, T, H) states of some layers to `take(layer, states)`, see `models/layers.py`."""
        visit_states(self.trunk, lambda: self.hidden(input_ids, attention_mask), layers, take)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states (S, T, H); what stands at padding means nothing."""
        mask = attention_mask.bool()
        # a fully masked row would make softmax divide zero by zero, and its gradient NaN for the whole batch
        attended = mask.clone()
        attended[:, 0] |= ~mask.any(dim=-1)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attended.long()}
        if self._takes_positions:
            inputs["position_ids"] = position_ids(mask) + self._first_position
        if getattr(unwrapped(self.trunk).config, "use_cache", None):
            inputs["use_cache"] = False
        if self.prefix is not None:
            return self.prefix.continued(self._run, **inputs)
        return self._run(**inputs)

    def _run(self, **inputs: Any) -> Tensor:
        return self.trunk(**inputs).last_hidden_state

    def keep_frozen(self, prefix: FrozenPrefix) -> None:
        """From now on read the states below the first trained block from a store.

        Raises:
            UserError: the heads read below that block, or the backbone cannot be cut there.
        """
        if self.layers is not None and min(self.layers) < prefix.first:
            what = f"the heads read state {min(self.layers)}, below block {prefix.first}, the first that is trained"
            raise UserError(what, "task.layers", "read higher states, or adapter.cache_frozen=false")
        self.prefix = prefix
        prefix.check(self.hidden)


def hidden_size(trunk: nn.Module) -> int:
    """H of a Hugging Face model (of its text part)."""
    config: Any = unwrapped(trunk).config
    return int(config.get_text_config().hidden_size)


def feature_width(size: int, layers: Sequence[int] | None, span: str) -> int:
    """F: numbers that the heads read of hidden states of `size`."""
    return size * (1 if layers is None else len(layers)) * SPANS[span]


def first_position(trunk: nn.Module) -> int:
    """Position id of the first token: 0, but padding_idx + 1 for the RoBERTa family, which reserves the rows before."""
    for name, module in unwrapped(trunk).named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
