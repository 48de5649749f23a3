"""Loaders: the stream is a function of (seed, step), every row once per epoch; evaluation counts every row once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from saferlhf.data.batches import TokenBatch
from saferlhf.data.collate import Ints
from saferlhf.data.loader import EvalLoader, StepLoader, steps_for_epochs
from saferlhf.errors import UserError


class Numbers:
    """Rows that are their own index; row i has i % 7 + 1 tokens."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    @property
    def lengths(self) -> Ints:
        return np.arange(self.n) % 7 + 1

    def collate(self, indices: Sequence[int] | Ints) -> TokenBatch:
        chosen = np.asarray(indices)
        lengths = self.lengths[chosen]
        mask = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])
        ids = torch.from_numpy(chosen)[:, None] * mask
        return TokenBatch(ids, mask, mask, tuple(str(i) for i in chosen))


def loader(n: int, **options: Any) -> StepLoader[TokenBatch]:
    defaults: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 3, "total_steps": 20, "seed": 1}
    return StepLoader(Numbers(n), **(defaults | options))


def rows_of(item: Any) -> list[int]:
    return [int(name) for batch in item for name in batch.row_ids]


@pytest.mark.parametrize(("n", "batch"), [(12, 4), (10, 4), (7, 4), (3, 4), (3, 10), (1, 4)])
def test_each_epoch_is_a_permutation_even_where_a_batch_spans_two(n: int, batch: int) -> None:
    stream = loader(n, batch_size=batch, total_steps=30)
    order = [int(i) for step in range(30) for i in stream.step_indices(step)]
    epochs = [order[start : start + n] for start in range(0, len(order) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 6:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # shuffled afresh each time
    # the batches hold the very rows of the stream
    for step, item in enumerate(stream):
        assert Counter(rows_of(item)) == Counter(order[step * batch : (step + 1) * batch])


def test_steps_depend_on_seed_and_step_alone() -> None:
    reference = [rows_of(item) for item in loader(10)]
    backwards = loader(10)
    assert [rows_of(backwards.step(k)) for k in reversed(range(20))] == reference[::-1]
    assert [rows_of(item) for item in loader(10, total_steps=5)] == reference[:5]
    assert [rows_of(item) for item in loader(10, seed=2)] != reference


@pytest.mark.parametrize("stop", [0, 1, 5, 7, 19, 20])
def test_resumed_stream_is_the_rest_of_the_uninterrupted_one(stop: int) -> None:
    reference = [rows_of(item) for item in loader(10)]  # an epoch is 2.5 steps: step 5 is a border
    first = loader(10)
    taken = iter(first)
    head = [rows_of(next(taken)) for _ in range(stop)]
    state = first.state_dict()
    second = loader(10)
    iterator = iter(second)  # a trainer may make its iterator before it loads the state
    second.load_state_dict(state)
    assert state["step"] == stop and len(second) == 20
    assert head + [rows_of(item) for item in iterator] == reference


def test_iterators_do_not_read_ahead() -> None:
    stream = loader(10)
    iter(stream), iter(stream)
    assert stream.cursor == 0
    next(iter(stream))
    assert stream.cursor == stream.state_dict()["step"] == 1


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 3, 8, None])
def test_processes_and_micro_batches_only_cut_the_same_rows(world: int, micro: int | None) -> None:
    parts = [loader(11, batch_size=8, micro_batch_size=micro, rank=r, world_size=world) for r in range(world)]
    whole = loader(11, batch_size=8, micro_batch_size=8)
    for items in zip(*parts, whole, strict=True):
        dealt = [row for item in items[:-1] for row in rows_of(item)]
        assert Counter(dealt) == Counter(rows_of(items[-1]))
        assert {item.rows for item in items[:-1]} == {8 // world}
        assert len({len(item) for item in items[:-1]}) == 1  # in step, for collectives
        assert all(len(batch) <= (micro or 8) for item in items for batch in item if item is not items[-1])


def test_micro_batches_are_sorted_by_length_longest_first() -> None:
    for item in loader(50, batch_size=12, micro_batch_size=4):
        widths = [batch.attention_mask.sum(1) for batch in item]
        assert torch.equal(torch.cat(widths), torch.cat(widths).sort(descending=True).values)


def test_state_of_other_data_is_refused() -> None:
    state = loader(10).state_dict()
    for other in (loader(11), loader(10, seed=2), loader(10, batch_size=2)):
        with pytest.raises(UserError, match="checkpoint was written with"):
            other.load_state_dict(state)
    loader(10, total_steps=40, micro_batch_size=1).load_state_dict(state)  # neither changes the order


def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="no rows to train on"):
        loader(0)
    with pytest.raises(UserError, match="use a multiple of 3"):
        loader(10, world_size=3)
    with pytest.raises(UserError, match="at least one row"):
        loader(10, batch_size=0)
    with pytest.raises(ValueError, match="outside"):
        loader(10, start_step=21)


def test_epochs_and_steps() -> None:
    assert loader(10).epoch_of(5) == 2.0
    assert [
        steps_for_epochs(*args) for args in ((10, 4, 1.0), (12, 4, 1.0), (10, 4, 0.1), (100, 10, 0.3), (3, 8, 1.0))
    ] == [3, 3, 1, 3, 1]


def test_items_move_to_a_device() -> None:
    item = next(iter(loader(10)))
    moved = item.to(torch.device("meta"))
    assert moved.step == 0 and len(moved) == len(item) and moved[0].input_ids.device.type == "meta"
    assert moved[0].row_ids == item[0].row_ids


# ------------------------------------------------------------------------------------------------ evaluation
@pytest.mark.parametrize(
    ("n", "batch", "world"), [(10, 4, 1), (10, 4, 2), (11, 3, 3), (5, 1, 2), (3, 8, 3), (64, 64, 4), (9, 2, 4)]
)
def test_every_row_is_evaluated_once_and_all_processes_keep_step(n: int, batch: int, world: int) -> None:
    loaders = [EvalLoader(Numbers(n), batch_size=batch, rank=r, world_size=world) for r in range(world)]
    assert sorted(int(i) for one in loaders for i in one.indices) == list(range(n))
    assert len({len(one) for one in loaders}) == 1
    for one in loaders:
        items = list(one)
        assert len(items) == len(one) and all(1 <= len(item.batch) <= max(batch, 2) for item in items)
        assert all([str(i) for i in item.indices] == list(item.batch.row_ids) for item in items)


def test_results_go_back_in_order() -> None:
    out = np.full(23, -1)
    for item in EvalLoader(Numbers(23), batch_size=5):
        out[item.indices] = [int(name) for name in item.batch.row_ids]
    assert out.tolist() == list(range(23))


def test_evaluation_refuses_fewer_rows_than_processes() -> None:
    with pytest.raises(UserError, match="1 rows to evaluate on 2 processes"):
        EvalLoader(Numbers(1), batch_size=4, world_size=2)
