"""How processes share a rollout: every row once, all in step, and together again in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from saferlhf.evaluation.processes import Processes
from saferlhf.rollout.experience import Response, Rollout, assemble, joined
from saferlhf.rollout.prompts import PromptTokens
from saferlhf.tasks import shares


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize(("count", "processes"), [(7, 1), (7, 2), (8, 2), (5, 4), (1, 3), (12, 4)])
def test_every_row_counts_once_and_all_keep_in_step(count: int, processes: int, rows: int) -> None:
    lengths = np.random.default_rng(count).integers(1, 50, count)
    dealt = [shares.deal(lengths, rows, Processes(rank, processes)) for rank in range(processes)]
    assert len({tuple(len(part.places) for part in parts) for parts in dealt}) == 1, "as many passes, as many rows"
    assert all(1 <= len(part.places) <= rows for parts in dealt for part in parts)
    counted = [int(i) for parts in dealt for part in parts for i in part.places[part.counted]]
    assert sorted(counted) == list(range(count))
    tokens = [sum(int(lengths[part.places[part.counted]].sum()) for part in parts) for parts in dealt]
    assert max(tokens) - min(tokens) <= lengths.max(), "dealt by length"
    for parts in dealt:
        order = [int(lengths[i]) for part in parts for i in part.places]
        assert order == sorted(order, reverse=True)


def test_nothing_to_deal() -> None:
    assert shares.deal(np.zeros(0, np.int64), 4, Processes(1, 2)) == []


def prompts(*rows: str) -> list[PromptTokens]:
    """Prompts whose lengths are those of their names."""
    return [PromptTokens(row, list(range(1, len(row) + 1)), (), False) for row in rows]


def sample(given: Sequence[PromptTokens], samples: int = 2) -> Rollout:
    """Responses that tell their row and number; a row that stands there twice goes on counting."""
    seen: dict[str, int] = {}
    first = [seen.setdefault(p.row_id, 0) for p in given]
    for i, prompt in enumerate(given):
        first[i] = seen[prompt.row_id]
        seen[prompt.row_id] += samples
    responses = [
        [Response([60 + first[i] + j] * (1 + (len(p.row_id) + j) % 3), [-1.0] * (1 + (len(p.row_id) + j) % 3), False)
         for j in range(samples)]
        for i, p in enumerate(given)
    ]  # fmt: skip
    return assemble(given, responses, pad_token_id=0, decode=lambda ids: [str(i) for i in ids], first_samples=first)


class Waiting(Exception):
    """Others have not answered yet."""


def as_rank(rank: int, size: int, found: list[Any]) -> Callable[[], Processes]:
    """Processes of which this is one and the others have answered already."""

    class Told(Processes):
        def each(self, work: Callable[[], Rollout]) -> list[Rollout]:  # type: ignore[override]
            found[rank] = work()
            if None in found:
                raise Waiting
            return found

    return lambda: Told(rank, size)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_samples_of_several_processes_are_those_of_one(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = prompts("aa", "bbbb", "c", "aa", "ddd", "aa")  # one row three times, as where an epoch ends in a rollout
    whole = sample(given)
    found: list[Any] = [None] * size
    for rank in range(size):  # the last has what all have said
        monkeypatch.setattr(shares.Processes, "current", as_rank(rank, size, found))
        with nullcontext() if rank == size - 1 else pytest.raises(Waiting):
            together = shares.sampled_by_all(given, 2, sample, pad_token_id=0)
    assert together.row_ids == whole.row_ids and together.responses == whole.responses
    for name in ("input_ids", "attention_mask", "response_mask", "logprobs", "truncated", "sample"):
        assert torch.equal(getattr(together, name), getattr(whole, name)), name


def test_joined_rollouts_are_padded_to_the_widest() -> None:
    parts = [sample(prompts("a")), sample([]), sample(prompts("bbbbb"))]
    whole = joined(parts, pad_token_id=0)
    assert len(whole) == 4 and whole.input_ids.shape[1] == parts[2].input_ids.shape[1]
    width = parts[0].input_ids.shape[1]
    assert torch.equal(whole.input_ids[:2, :width], parts[0].input_ids) and not whole.input_ids[:2, width:].any()
    assert not whole.attention_mask[:2, width:].any()


def test_what_models_say_comes_back_to_its_place() -> None:
    """One process: rows in any order of passes, tokens padded to the whole rollout's."""
    rollout = sample(prompts("aa", "bbbb", "c", "ddd"))
    passes = []

    def work(part: Rollout) -> list[torch.Tensor]:
        passes.append(len(part))
        return [part.input_ids.float(), part.lengths]

    tokens, lengths = shares.told_of_all(rollout, 3, work, torch.device("cpu"))
    assert torch.equal(tokens, rollout.input_ids.float()) and torch.equal(lengths, rollout.lengths)
    assert max(passes) <= 3 and sum(passes) == len(rollout)
