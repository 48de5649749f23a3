"""Features of several responses to one prompt in one pass: what rows have in common is computed once.

Two responses to a prompt make two rows whose first tokens are equal, and a chat template begins every row with the same
words. In a causal model the states of equal beginnings are equal, so

    prefix   the tokens that (nearly) all rows begin with: once per call, kept as keys and values
    pack     the rest of a prompt and all its responses in one sequence: once per prompt

Within a pack a token attends to the prefix, to the prompt and to its own response, never to another one, and its
position is that in its own row: the numbers are those of rows by themselves up to rounding. PKU-SafeRLHF, two short
answers per prompt in SmolLM2's template, has a quarter fewer tokens this way.

Only for models that are causal; whether that holds, and the model minds its masks and positions, is checked against the
plain way on the first, longest rows (`evaluation/features.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saferlhf.models.causal import unwrapped
from saferlhf.models.layers import layer_count, visit_states
from saferlhf.ops.sequences import last_index

LEAST_PREFIX = 4
"""Tokens below which a common beginning is not worth a cache."""

LONGEST_PACK = 1024
"""Tokens from which further responses to a prompt begin a new pack: attention grows with the square."""

Ids = NDArray[np.integer]


@dataclass(frozen=True)
class Pack:
    """Rows of one prompt.

    Attributes:
        rows: their numbers.
        prompt: ids of the prompt after the prefix; one at least.
        responses: ids of each row's response.
        prefix: tokens of the prefix that come before, 0 or that of the whole call.
    """

    rows: tuple[int, ...]
    prompt: Ids
    responses: tuple[Ids, ...]
    prefix: int

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


def common_prefix(prompts: Sequence[Ids]) -> Ids:
    """The beginning that saves most: its length times the prompts that have it, as a proper part of each."""
    if len(prompts) < 2:
        return np.zeros(0, np.int32)
    # the middle one in order of tokens: what most have in common, it has too
    middle = sorted(prompts, key=lambda ids: tuple(ids.tolist()))[len(prompts) // 2]
    shared = np.array([_equal(middle, ids) for ids in prompts])
    lengths = np.arange(len(middle) + 1)
    saved = lengths * np.array([(shared >= n).sum() - 1 for n in lengths])
    best = int(saved.argmax())
    return middle[:best] if best >= LEAST_PREFIX else middle[:0]


def _equal(one: Ids, other: Ids) -> int:
    """Tokens that both begin with, leaving one at least of each."""
    n = min(len(one), len(other)) - 1
    if n <= 0:
        return 0
    differ = np.flatnonzero(one[:n] != other[:n])
    return int(differ[0]) if len(differ) else n


def make_packs(sequences: Sequence[Ids], prompt_lengths: Ids, prefix: Ids) -> list[Pack]:
    """Every row in one pack, longest pack first.

    Args:
        sequences: token ids of each row.
        prompt_lengths: (N,) tokens of its prompt.
        prefix: as of `common_prefix`.
    """
    prompts: dict[bytes, list[int]] = {}
    for row, (ids, length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        prompts.setdefault(np.asarray(ids[:length], np.int32).tobytes(), []).append(row)
    packs = []
    for rows in prompts.values():
        prompt = sequences[rows[0]][: prompt_lengths[rows[0]]]
        known = len(prefix) if len(prefix) and _equal(prompt, np.append(prefix, -1)) == len(prefix) else 0
        rest = prompt[known:]
        chosen: list[int] = []
        size = len(rest)
        for row in rows:
            length = len(sequences[row]) - len(prompt)
            if chosen and size + length > LONGEST_PACK:
                packs.append(_pack(chosen, rest, sequences, len(prompt), known))
                chosen, size = [], len(rest)
            chosen.append(row)
            size += length
        packs.append(_pack(chosen, rest, sequences, len(prompt), known))
    return sorted(packs, key=lambda pack: (-pack.prefix, -len(pack), pack.rows))


def _pack(rows: Sequence[int], rest: Ids, sequences: Sequence[Ids], prompt: int, known: int) -> Pack:
    return Pack(tuple(rows), rest, tuple(sequences[row][prompt:] for row in rows), known)


def pack_batches(packs: Sequence[Pack], batch_tokens: int) -> list[list[Pack]]:
    """Packs of one prefix and similar length together: one at least, `batch_tokens` tokens with padding at most."""
    batches: list[list[Pack]] = []
    for pack in packs:
        batch = batches[-1] if batches else []
        fits = batch and batch[0].prefix == pack.prefix and (len(batch) + 1) * len(batch[0]) <= batch_tokens
        if fits:
            batch.append(pack)
        else:
            batches.append([pack])
    return batches


def can_share(trunk: nn.Module) -> bool:
    """Whether a backbone is a causal decoder that takes masks of its own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    config = unwrapped(trunk).config
    kind = config.model_type
    attention = getattr(config, "_attn_implementation", None)
    return kind in CAUSAL and kind not in MASKED and attention in ("sdpa", "eager")


class SharedPrompts:
    """Features of packs.

    Args:
        trunk: bare causal model, with or without adapters.
        prefix: token ids that packs may begin with.
        layers: numbers of hidden states, in the order wanted.
        how: mean | last.
        pad: a token id for padded places.
    """

    def __init__(self, trunk: nn.Module, prefix: Ids, layers: Sequence[int], how: str, pad: int) -> None:
        self.trunk, self.prefix, self.layers, self.how, self.pad = trunk, prefix, tuple(layers), how, pad
        self.device = next(trunk.parameters()).device
        self._place = {layer: index for index, layer in enumerate(self.layers)}
        self._cache: Any = None
        self._prefix_sums: dict[int, Tensor] = {}  # layer -> (H,)

    def features(self, packs: Sequence[Pack]) -> Tensor:
        """(rows, layers, 2, H) float32 features of the packs' rows, in their order; all packs of one prefix."""
        known = packs[0].prefix
        if known and self._cache is None:
            self._run_prefix()
        ids, segments, positions = self._layout(packs)
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": self._mask(segments, known),
            "position_ids": positions,
            "use_cache": False,
        }
        if known:
            cache = copy.deepcopy(self._cache)
            cache.batch_repeat_interleave(len(packs))
            inputs |= {"past_key_values": cache, "use_cache": True}
        weights = self._weights(packs, segments)  # (B, 1 + R, T)
        found: list[Tensor | None] = [None] * len(self.layers)

        def take(layer: int, states: Tensor) -> None:
            with torch.autocast(states.device.type, enabled=False):
                parts = torch.bmm(weights, states.float())  # (B, 1 + R, H)
                if known and self.how == "mean":
                    full = torch.tensor([known + len(pack.prompt) for pack in packs], device=self.device)
                    parts[:, 0] += self._prefix_sums[layer] / full[:, None]
                found[self._place[layer]] = parts

        visit_states(self.trunk, lambda: self.trunk(**inputs).last_hidden_state, self.layers, take)
        stacked = torch.stack([parts for parts in found if parts is not None], dim=2)  # (B, 1 + R, layers, H)
        rows = [(b, r) for b, pack in enumerate(packs) for r in range(len(pack.rows))]
        at = torch.tensor(rows, device=self.device)
        return torch.stack([stacked[at[:, 0], 0], stacked[at[:, 0], at[:, 1] + 1]], dim=2)  # (rows, layers, 2, H)

    # -------------------------------------------------------------------------------------------- one pass
    def _run_prefix(self) -> None:
        ids = torch.tensor(self.prefix, dtype=torch.int64, device=self.device)[None]
        mask = torch.ones_like(ids)

        def take(layer: int, states: Tensor) -> None:
            self._prefix_sums[layer] = states[0].float().sum(dim=0)

        kept: list[Any] = []

        def call() -> Tensor:
            output = self.trunk(input_ids=ids, attention_mask=mask, use_cache=True)
            kept.append(output.past_key_values)
            return output.last_hidden_state

        # the last layer too, so that the cache is whole
        visit_states(self.trunk, call, {*self.layers, layer_count(self.trunk)}, take)
        self._cache = kept[0]

    def _layout(self, packs: Sequence[Pack]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, segments (0 the prompt, k the k-th response, -1 padding) and positions, (B, T) each."""
        width = max(map(len, packs))
        ids = np.full((len(packs), width), self.pad, np.int64)
        segments = np.full((len(packs), width), -1, np.int64)
        positions = np.zeros((len(packs), width), np.int64)
        for b, pack in enumerate(packs):
            at = 0
            for number, part in enumerate((pack.prompt, *pack.responses)):
                end = at + len(part)
                first = pack.prefix + (len(pack.prompt) if number else 0)
                ids[b, at:end], segments[b, at:end] = part, number
                positions[b, at:end] = first + np.arange(len(part))
                at = end
        return tuple(torch.from_numpy(values).to(self.device) for values in (ids, segments, positions))  # type: ignore[return-value]

    def _mask(self, segments: Tensor, known: int) -> Tensor:
        """(B, 1, T, prefix + T) what each token attends to: bool for sdpa, added numbers for eager attention."""
        width = segments.shape[1]
        here = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        own = segments[:, :, None] == segments[:, None, :]  # padding attends to padding: no row is empty
        seen = here & (own | (segments[:, None, :] == 0))  # (B, T, T)
        before = torch.ones(len(segments), width, known, dtype=torch.bool, device=self.device)
        mask = torch.cat([before, seen], dim=2)[:, None]
        if unwrapped(self.trunk).config._attn_implementation == "sdpa":
            return mask
        dtype = next(p.dtype for p in self.trunk.parameters() if p.is_floating_point())
        return torch.zeros(mask.shape, dtype=dtype, device=self.device).masked_fill(~mask, torch.finfo(dtype).min)

    def _weights(self, packs: Sequence[Pack], segments: Tensor) -> Tensor:
        """(B, 1 + R, T) what each token counts in the prompt's and each response's features."""
        most = max(len(pack.responses) for pack in packs)
        parts = torch.stack([segments == number for number in range(most + 1)], dim=1)  # (B, 1 + R, T)
        if self.how == "last":
            last = last_index(parts.flatten(0, 1)).view(parts.shape[:2])
            return torch.zeros(parts.shape, device=self.device).scatter_(2, last[..., None], 1.0) * parts
        counts = parts.sum(dim=2, keepdim=True)
        full = counts.clone()
        full[:, 0] += packs[0].prefix
        return parts.float() / full.clamp_min(1)


def relative_difference(one: Tensor, other: Tensor) -> float:
    """Largest relative difference of two sets of features (rows, layers, 2, H), in the norm over H."""
    size = torch.maximum(one.norm(dim=-1), other.norm(dim=-1))
    return float(((one - other).norm(dim=-1) / size.clamp_min(1e-6)).max())
