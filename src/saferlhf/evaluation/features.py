"""Features of rows by a frozen backbone: computed once, kept on disk, read back as a matrix.

Rows are sorted by length and cut into batches of about equal numbers of tokens, padding included; what rows have in
common is computed once where the model allows it (`models/shared_prompts.py`). Which rows share a batch depends on the
rows that are asked for, not on which of them are cached already: a run that was killed and goes on gets the same
numbers to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saferlhf.data.batches import tokens_of
from saferlhf.data.encode import EncodedAnswers
from saferlhf.errors import UserError
from saferlhf.evaluation.processes import ALONE, Processes
from saferlhf.evaluation.score import evaluating
from saferlhf.models.feature_store import FeatureStore, row_key, stored_features
from saferlhf.models.features import PARTS, pooled_parts, span_matrix, trunk_id
from saferlhf.models.score_model import ScoreModel, hidden_size
from saferlhf.models.shared_prompts import (
    Pack,
    SharedPrompts,
    can_share,
    common_prefix,
    make_packs,
    pack_batches,
    relative_difference,
)
from saferlhf.ops.sequences import SPANS

BATCH_TOKENS = 4096

_READ_ROWS = 512

_WORTH_SHARING = 0.95
"""Share of the tokens that must remain at most for packs to be worth their more expensive attention."""

_CHECKED_ROWS = 4
_AGREES = {False: 1e-3, True: 0.03}
"""Relative difference of features, packed and row by row, that is rounding: in float32, in bfloat16."""


@dataclass(frozen=True)
class Progress:
    """How far the computing is.

    Attributes:
        rows, total_rows: done, and to do in this call; cached ones are not among them.
        tokens, total_tokens: the same in tokens.
        seconds: since the first batch began.
    """

    rows: int
    total_rows: int
    tokens: int
    total_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """So far."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float:
        """At this rate."""
        return (self.total_tokens - self.tokens) / self.tokens_per_s if self.tokens else 0.0


@dataclass(frozen=True)
class RowFeatures:
    """Features of N rows in a store.

    Attributes:
        store: on disk.
        keys: of N rows.
        counts: (N, 2) tokens of prompt and response.
        layers: numbers of the hidden states that were asked for; the store may have more.
        pooling: mean | last.
    """

    store: FeatureStore
    keys: Sequence[bytes]
    counts: NDArray[np.int64]
    layers: tuple[int, ...]
    pooling: str

    def __len__(self) -> int:
        return len(self.keys)

    def matrix(self, layers: Sequence[int], span: str) -> NDArray[np.float32]:
        """(N, F) float32, as a `ScoreModel` with these layers and this span hands it to its heads."""
        states, places = self.store.states(), self.store.places(self.keys)
        columns = [self.store.about["layers"].index(layer) for layer in layers]
        parts = []
        for start in range(0, len(places), _READ_ROWS):
            rows = slice(start, start + _READ_ROWS)
            block = np.asarray(states[places[rows]][:, columns], dtype=np.float32)  # (n, layers, 2, H)
            parts.append(span_matrix(block, self.counts[rows], self.pooling, span))
        width = states.shape[-1] * len(columns) * SPANS[span]
        return np.concatenate(parts) if parts else np.zeros((0, width), np.float32)


def row_features(
    model: ScoreModel,
    data: EncodedAnswers,
    *,
    layers: Sequence[int],
    pooling: str = "mean",
    autocast: bool = False,
    dtype: str = "float16",
    batch_tokens: int = BATCH_TOKENS,
    cache_dir: str | Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    processes: Processes = ALONE,
) -> RowFeatures:
    """Features of all rows, from the store as far as they are there.

    Args:
        model: on the device it is to run on; its trunk is read.
        data: N encoded rows.
        layers: numbers of the hidden states to keep.
        pooling: mean | last.
        autocast: compute in bfloat16; such features are kept apart from exact ones.
        dtype: float16 | float32, as stored.
        batch_tokens: most tokens per forward pass, padding included; at least one row.
        cache_dir: the project's cache folder.
        progress: called after each batch.
        say: told of waiting and of damage.
        processes: share the batches, and the cache folder.

    Raises:
        UserError: the cache folder cannot be written, numbers that do not fit `dtype`, or processes that do not see
            each other's rows in the cache.
    """
    keys = row_keys(data)
    counts = np.stack([data.store.prompt_lengths, data.lengths - data.store.prompt_lengths], axis=1).astype(np.int64)
    about: dict[str, Any] = {"pooling": pooling, "autocast": autocast, "dtype": dtype, "cache_dir": cache_dir}
    larger = _larger_store(model, layers, keys, **about)
    # all processes go the same way, whatever each happens to find
    if all(processes.each(lambda: larger is not None)) and larger is not None:
        return RowFeatures(larger, keys, counts, tuple(layers), pooling)
    store = feature_store(model, layers=layers, **about)
    found = RowFeatures(store, keys, counts, tuple(layers), pooling)
    damaged = store.drop_damaged(keys)
    if damaged:
        say(f"{damaged:,} cached rows of features are damaged and computed again ({store.folder})")
    options: dict[str, Any] = {"autocast": autocast, "batch_tokens": batch_tokens, "progress": progress, "say": say}
    if all(processes.each(lambda: all(key in store for key in keys))):
        return found
    if processes.size > 1:
        _compute_together(model, data, found, processes, **options)
        return found
    with store.writing(lambda: say(f"another process is computing features in {store.folder}: waiting for it")) as add:
        store.drop_damaged(keys)  # the store was read again
        _compute(model, data, found, add, **options)
    return found


def feature_store(
    model: ScoreModel,
    *,
    layers: Sequence[int],
    pooling: str,
    autocast: bool,
    dtype: str,
    cache_dir: str | Path | None = None,
) -> FeatureStore:
    """The store of what this model makes of rows; arguments as in `row_features`."""
    about = {
        "model": trunk_id(model.trunk),
        "layers": list(layers),
        "pooling": pooling,
        "compute": "bfloat16 autocast" if autocast else "as loaded",
    }
    return FeatureStore(about, (len(layers), PARTS, hidden_size(model.trunk)), dtype, cache_dir)


def _larger_store(
    model: ScoreModel, layers: Sequence[int], keys: Sequence[bytes], *, cache_dir: str | Path | None, **about: Any
) -> FeatureStore | None:
    """A store of more layers than these that has all the rows, undamaged."""
    for known in stored_features(cache_dir):
        more = known.get("layers", [])
        if not set(layers) < set(more):
            continue
        store = feature_store(model, layers=more, cache_dir=cache_dir, **about)
        if store.about == known and all(key in store for key in keys) and not store.drop_damaged(keys):
            return store
    return None


def row_keys(data: EncodedAnswers) -> list[bytes]:
    """One key per row, in the rows' order."""
    return [row_key(data.store.sequence(i), int(data.store.prompt_lengths[i])) for i in range(len(data))]


def token_batches(lengths: NDArray[Any], batch_tokens: int) -> list[NDArray[np.int64]]:
    """Row numbers, longest first, in batches of at most `batch_tokens` tokens, padding included; one row at least."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, batch_tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


# ------------------------------------------------------------------------------------------------ computing
Batch = tuple[NDArray[np.int64], Callable[[], NDArray[Any]]]
"""Row numbers, and what computes their features (rows, layers, 2, H)."""


def _compute(
    model: ScoreModel,
    data: EncodedAnswers,
    found: RowFeatures,
    add: Callable[[Sequence[bytes], Any], None],
    *,
    autocast: bool,
    batch_tokens: int,
    progress: Callable[[Progress], None],
    say: Callable[[str], None],
    processes: Processes = ALONE,
) -> None:
    """Append the rows that the store lacks, those of this process."""
    keys, store, lengths = found.keys, found.store, np.asarray(data.lengths)
    with evaluating(model, autocast=autocast):
        batches = _batches(model, data, found, autocast, batch_tokens, say)
        batches = [batch for batch in processes.mine(batches) if any(keys[i] not in store for i in batch[0])]
        total_rows = sum(len(rows) for rows, _ in batches)
        total_tokens = int(sum(lengths[rows].sum() for rows, _ in batches))
        done = tokens = 0
        started = time.monotonic()
        for rows, compute in batches:
            numbers = compute()
            # two rows of one content, or one that was cached: once is enough
            fresh = {keys[i]: j for j, i in enumerate(rows) if keys[i] not in store}
            add(list(fresh), numbers[list(fresh.values())])
            done, tokens = done + len(rows), tokens + int(lengths[rows].sum())
            progress(Progress(done, total_rows, tokens, total_tokens, time.monotonic() - started))


def _compute_together(
    model: ScoreModel, data: EncodedAnswers, found: RowFeatures, processes: Processes, **options: Any
) -> None:
    """Every process appends its rows, and finds those of the others."""
    processes.each(lambda: _compute(model, data, found, found.store.add, processes=processes, **options))
    found.store.refresh()

    def complete() -> None:
        missing = sum(key not in found.store for key in found.keys)
        if missing:
            what = f"{missing:,} rows that other processes computed are not in {found.store.folder}"
            raise UserError(what, "cache_dir", "name a folder that all processes see")

    processes.each(complete)


def _batches(
    model: ScoreModel,
    data: EncodedAnswers,
    found: RowFeatures,
    autocast: bool,
    batch_tokens: int,
    say: Callable[[str], None],
) -> list[Batch]:
    """All rows in batches: several responses to a prompt in one pass where the model can do that, else row by row."""
    shared = _shared(model, data, found, batch_tokens) if can_share(model.trunk) else []
    if shared:
        rows, compute = shared[0]
        some = rows[:_CHECKED_ROWS]
        difference = relative_difference(
            torch.from_numpy(compute()[: len(some)]), torch.from_numpy(_plain(model, data, found, some)())
        )
        half = autocast or next(model.parameters()).dtype != torch.float32
        if difference <= _AGREES[half]:
            return shared
        say(f"prompts are not shared: it would change features by {difference:.1%}")
    return [(rows, _plain(model, data, found, rows)) for rows in token_batches(np.asarray(data.lengths), batch_tokens)]


def _plain(
    model: ScoreModel, data: EncodedAnswers, found: RowFeatures, rows: NDArray[np.int64]
) -> Callable[[], NDArray[Any]]:
    def compute() -> NDArray[Any]:
        t = tokens_of(data.collate(rows)).to(next(model.parameters()).device)
        masks = (t.input_ids, t.attention_mask, t.response_mask)
        return pooled_parts(model, *masks, found.layers, found.pooling).cpu().numpy()

    return compute


def _shared(model: ScoreModel, data: EncodedAnswers, found: RowFeatures, batch_tokens: int) -> list[Batch]:
    """Batches of packs; none where prompts have too little in common to gain by it."""
    sequences = [data.store.sequence(i) for i in range(len(data))]
    prompts = data.store.prompt_lengths
    prefix = common_prefix([ids[:n] for ids, n in zip(sequences, prompts, strict=True)])
    packs = make_packs(sequences, prompts, prefix)
    if sum(map(len, packs)) > _WORTH_SHARING * sum(map(len, sequences)):
        return []
    sharing = SharedPrompts(model.trunk, prefix, found.layers, found.pooling, data.pad)

    def compute(batch: Sequence[Pack]) -> Callable[[], NDArray[Any]]:
        return lambda: sharing.features(batch).cpu().numpy()

    return [
        (np.array([row for pack in batch for row in pack.rows], dtype=np.int64), compute(batch))
        for batch in pack_batches(packs, batch_tokens)
    ]
