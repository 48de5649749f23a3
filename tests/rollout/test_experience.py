"""Rollout and experience: where things stand, what a selection keeps, and how responses are dealt to mini-batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout.tiny_policies import prompts_of

from saferlhf.data.rows import Turn
from saferlhf.rollout.experience import (
    Experience,
    Response,
    Rollout,
    assemble,
    micro_batch_indices,
    minibatch_indices,
)
from saferlhf.rollout.prompts import PromptTokens

PAD = 0


def small_rollout(**options: Any) -> Rollout:
    prompts = [
        PromptTokens("a", [5, 6], (Turn("user", "one"),)),
        PromptTokens("b", [7], (Turn("user", "two"),)),
    ]
    responses = [
        [Response([8, 2], [-0.1, -0.2], False), Response([9, 9, 9], [-1.0, -2.0, -3.0], True)],
        [Response([2], [-0.5], False), Response([0, 2], [-0.25, -0.75], False)],
    ]
    return assemble(prompts, responses, pad_token_id=PAD, **options)


def decode(ids: list[list[int]]) -> list[str]:
    return [" ".join(str(i) for i in row if i != 2) for row in ids]


# ------------------------------------------------------------------------------------------------ layout
def test_layout_by_hand() -> None:
    """Prompt and response without a gap, padding on the right; a sampled token that looks like padding is none."""
    rollout = small_rollout(decode=decode)
    assert rollout.input_ids.tolist() == [[5, 6, 8, 2, 0], [5, 6, 9, 9, 9], [7, 2, 0, 0, 0], [7, 0, 2, 0, 0]]
    assert rollout.attention_mask.int().tolist() == [[1, 1, 1, 1, 0], [1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert rollout.response_mask.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    expected = [[0, 0, -0.1, -0.2, 0], [0, 0, -1, -2, -3], [0, -0.5, 0, 0, 0], [0, -0.25, -0.75, 0, 0]]
    torch.testing.assert_close(rollout.logprobs, torch.tensor(expected))
    assert rollout.truncated.tolist() == [False, True, False, False]
    assert rollout.row_ids == ("a", "a", "b", "b") and rollout.sample.tolist() == [0, 1, 0, 1]
    assert rollout.groups.tolist() == [0, 0, 1, 1]
    assert rollout.lengths.tolist() == [4, 5, 2, 3] and rollout.response_lengths.tolist() == [2, 3, 1, 2]
    assert rollout.responses == ("8", "9 9 9", "", "0")


def test_requests_and_statistics() -> None:
    rollout = small_rollout(decode=decode)
    requests = rollout.requests()
    assert [request.row_id for request in requests] == ["a", "a", "b", "b"]
    assert requests[1].truncated and requests[1].response == "9 9 9" and requests[1].prompt[0].content == "one"
    assert [request.is_empty for request in requests] == [False, False, True, False]
    assert rollout.statistics() == {"response_tokens": 2.0, "truncation_rate": 0.25, "empty_rate": 0.25}


def test_texts_are_the_engines_own_where_it_gives_them() -> None:
    given_text = [[Response([8, 2], [0.0, 0.0], False, text="mine"), Response([9, 2], [0.0, 0.0], False)]]
    prompts = prompts_of([[5]], ["a"])
    assert assemble(prompts, given_text, pad_token_id=PAD, decode=decode).responses == ("mine", "9")
    rollout = assemble(prompts, given_text, pad_token_id=PAD)
    assert rollout.responses is None
    with pytest.raises(ValueError, match="no texts"):
        rollout.requests()


@pytest.mark.parametrize(
    "response", [Response([], [], False), Response([4], [], False), Response([4], [0.0, 1.0], True)]
)
def test_responses_that_do_not_fit_are_refused(response: Response) -> None:
    with pytest.raises(ValueError, match="a response to a has"):
        assemble(prompts_of([[5]], ["a"]), [[response]], pad_token_id=PAD)


# ------------------------------------------------------------------------------------------------ selection
def experience() -> Experience:
    rollout = small_rollout(decode=decode)
    tokens = torch.arange(20.0).reshape(4, 5) * rollout.response_mask
    whole = torch.arange(4.0)
    return Experience(
        rollout,
        reference_logprobs=tokens - 1,
        rewards=whole,
        costs={"cost": whole + 10, "other": whole + 20},
        values={"reward_critic": tokens + 100},
        returns={"reward_critic": tokens + 200},
        advantages=tokens + 300,
        weights=torch.tensor([1.0, 0.0, 1.0, 1.0]),
    )


def test_a_selection_keeps_everything_in_step_and_cuts_padding() -> None:
    whole = experience()
    part = whole.select([3, 0, 3])
    assert part.rollout.input_ids.tolist() == [[7, 0, 2, 0], [5, 6, 8, 2], [7, 0, 2, 0]], "four columns are left"
    assert part.rollout.row_ids == ("b", "a", "b") and part.rollout.responses == ("0", "8", "0")
    assert part.rollout.sample.tolist() == [1, 0, 1]
    assert (
        part.rewards is not None and part.rewards.tolist() == [3, 0, 3] and part.costs["other"].tolist() == [23, 20, 23]
    )
    assert part.advantages is not None and whole.advantages is not None
    assert torch.equal(part.advantages, whole.advantages[[3, 0, 3], :4])
    assert torch.equal(part.values["reward_critic"], whole.values["reward_critic"][[3, 0, 3], :4])
    assert torch.equal(part.rollout.select([0, 2]).input_ids, part.rollout.input_ids[[0, 2], :3])
    empty = whole.select([])
    assert len(empty) == 0 and empty.rollout.input_ids.shape == (0, 0) and empty.rollout.row_ids == ()


def test_what_nobody_scored_is_left_out() -> None:
    scored = experience().scored()
    assert scored.rollout.row_ids == ("a", "b", "b") and scored.rewards is not None
    assert scored.rewards.tolist() == [0, 2, 3] and scored.rollout.input_ids.shape == (3, 4)
    unweighted = replace(experience(), weights=None)
    assert unweighted.scored() is unweighted


def test_to_moves_every_tensor() -> None:
    moved = experience().to("meta")
    tensors = [moved.rollout.input_ids, moved.rollout.truncated, moved.rewards, moved.costs["cost"], moved.advantages]
    tensors += [moved.values["reward_critic"], moved.returns["reward_critic"], moved.weights, moved.reference_logprobs]
    assert all(tensor is not None and tensor.device.type == "meta" for tensor in tensors)
    assert moved.rollout.responses == ("8", "9 9 9", "", "0")


@pytest.mark.parametrize(
    "wrong",
    [
        {"rewards": torch.zeros(3)},
        {"rewards": torch.zeros(4, 5)},
        {"costs": {"cost": torch.zeros(5)}},
        {"advantages": torch.zeros(4)},
        {"values": {"reward_critic": torch.zeros(4, 4)}},
        {"reference_logprobs": torch.zeros(5, 4)},
    ],
)
def test_shapes_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Experience(small_rollout(), **wrong)


# ------------------------------------------------------------------------------------------------ mini-batches
def test_every_response_once_in_an_order_of_the_seed_alone() -> None:
    parts = minibatch_indices(10, 4, [7, 3, 0])
    assert [len(part) for part in parts] == [4, 4, 2] and sorted(np.concatenate(parts)) == list(range(10))
    same = minibatch_indices(10, 3, [7, 3, 0])
    assert np.array_equal(np.concatenate(same), np.concatenate(parts)), "the size of a batch does not change the order"
    for other in ([7, 3, 1], [7, 4, 0], [8, 3, 0]):
        assert not np.array_equal(np.concatenate(minibatch_indices(10, 4, other)), np.concatenate(parts))
    with pytest.raises(ValueError, match="at least one"):
        minibatch_indices(10, 0, [7])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200), st.integers(0, 5))
def test_micro_batches_keep_to_their_budget(lengths: list[int], budget: int, seed: int) -> None:
    known = np.array(lengths, dtype=np.int64)
    chosen = np.random.default_rng(seed).permutation(len(lengths))[: max(0, len(lengths) - 3)]
    parts = micro_batch_indices(known, chosen, budget)
    assert sorted(i for part in parts for i in part) == sorted(chosen)
    for part in parts:
        assert len(part) == 1 or len(part) * known[part].max() <= budget
    everyone = micro_batch_indices(known, chosen, None)
    assert len(everyone) == (1 if len(chosen) else 0)


def test_a_step_holds_the_same_responses_whatever_its_micro_batches() -> None:
    whole = experience()
    for budget in (None, 1, 5, 8, 100):
        steps = list(whole.minibatches(3, seed=[0, 1, 2], batch_tokens=budget))
        found = [sorted(float(x) for part in step for x in part.rewards) for step in steps]  # type: ignore[union-attr]
        assert found == [sorted(part) for part in minibatch_indices(4, 3, [0, 1, 2])]
        widths = [[part.rollout.input_ids.shape[1] for part in step] for step in steps]
        assert all(row == sorted(row, reverse=True) for row in widths), "longest first"
        if budget is not None:
            assert all(len(p) == 1 or p.rollout.input_ids.numel() <= budget for step in steps for p in step)
