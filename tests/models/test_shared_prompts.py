"""Rows packed by their prompts: the features of rows by themselves, and every row exactly once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import backbone, lora_config, stir

from saferlhf.models.adapters import add_lora
from saferlhf.models.features import pooled_parts
from saferlhf.models.score_model import ScoreModel
from saferlhf.models.shared_prompts import (
    LONGEST_PACK,
    SharedPrompts,
    can_share,
    common_prefix,
    make_packs,
    pack_batches,
    relative_difference,
)

LAYERS = (2, 0, 1)


def answers(seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows of seven prompts with one to three responses, some empty; one prompt does not begin as the others do."""
    draw = np.random.default_rng(seed)
    begin = draw.integers(5, 64, 6)
    sequences, prompts = [], []
    for number in range(7):
        prompt = np.concatenate([begin[::-1] if number == 5 else begin, draw.integers(5, 64, 1 + number % 4)])
        for _ in range(1 + number % 3):
            sequences.append(np.concatenate([prompt, draw.integers(5, 64, draw.integers(0, 9))]).astype(np.int32))
            prompts.append(len(prompt))
    return sequences, np.array(prompts)


def by_themselves(trunk: torch.nn.Module, sequences: list[np.ndarray], prompts: np.ndarray, how: str) -> torch.Tensor:
    model = ScoreModel(trunk, {})
    rows = []
    for tokens, length in zip(sequences, prompts, strict=True):
        ids = torch.from_numpy(tokens).long()[None]
        response = torch.arange(len(tokens))[None] >= int(length)
        rows.append(pooled_parts(model, ids, torch.ones_like(ids).bool(), response, LAYERS, how))
    return torch.cat(rows)


@pytest.mark.parametrize("how", ["mean", "last"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.inference_mode()
def test_the_features_of_rows_by_themselves(family: str, attention: str, how: str) -> None:
    trunk = backbone(family, attention=attention).eval()
    sequences, prompts = answers()
    prefix = common_prefix([ids[:n] for ids, n in zip(sequences, prompts, strict=True)])
    assert len(prefix) == 6
    packs = make_packs(sequences, prompts, prefix)
    assert {pack.prefix for pack in packs} == {0, 6} and len(packs) == 7
    sharing = SharedPrompts(trunk, prefix, LAYERS, how, pad=0)
    expected = by_themselves(trunk, sequences, prompts, how)
    seen = []
    for batch in pack_batches(packs, 40):
        rows = [row for pack in batch for row in pack.rows]
        torch.testing.assert_close(sharing.features(batch), expected[rows], atol=2e-6, rtol=1e-4)
        seen += rows
    assert sorted(seen) == list(range(len(sequences)))


@torch.inference_mode()
def test_with_an_adapter() -> None:
    trunk = add_lora(backbone(), lora_config())
    stir(trunk)
    sequences, prompts = answers()
    packs = make_packs(sequences, prompts, common_prefix([ids[:n] for ids, n in zip(sequences, prompts, strict=True)]))
    sharing = SharedPrompts(trunk.eval(), packs[0].prompt[:0], LAYERS, "mean", pad=0)
    batch = [pack for pack in packs if not pack.prefix]
    rows = [row for pack in batch for row in pack.rows]
    torch.testing.assert_close(sharing.features(batch), by_themselves(trunk, sequences, prompts, "mean")[rows])


def test_packs_and_batches_by_hand() -> None:
    prompt, other = np.array([9, 9, 9, 9, 1]), np.array([9, 9, 9, 9, 2, 2])
    responses = [np.array([3]), np.array([4, 4]), np.array([5])]
    sequences = [np.concatenate([p, r]) for p, r in zip((prompt, other, prompt), responses, strict=True)]
    prefix = common_prefix([prompt, other, prompt])
    assert prefix.tolist() == [9, 9, 9, 9]
    one, two = make_packs(sequences, np.array([5, 6, 5]), prefix)
    assert (one.rows, one.prompt.tolist()) == ((1,), [2, 2]) and len(one) == 4
    assert (two.rows, two.prompt.tolist(), [r.tolist() for r in two.responses]) == ((0, 2), [1], [[3], [5]])
    assert [len(batch) for batch in pack_batches([one, two], 8)] == [2]
    assert [len(batch) for batch in pack_batches([one, two], 7)] == [1, 1]


def test_a_prefix_leaves_something_of_every_prompt() -> None:
    same = [np.array([1, 2, 3, 4, 5, 6])] * 3
    assert common_prefix(same).tolist() == [1, 2, 3, 4, 5]
    assert len(common_prefix([np.array([1, 2, 3]), np.array([1, 2, 3])])) == 0, "too short to be worth it"
    assert len(common_prefix([same[0]])) == 0
    # one prompt that was cut from the left does not spoil it for the others
    assert len(common_prefix([*same, np.array([7, 8, 9])])) == 5


def test_many_responses_are_several_packs() -> None:
    prompt, response = np.arange(10), np.arange(LONGEST_PACK // 3)
    sequences = [np.concatenate([prompt, response + k]) for k in range(5)]
    packs = make_packs(sequences, np.full(5, 10), np.zeros(0, np.int32))
    assert sorted(row for pack in packs for row in pack.rows) == [0, 1, 2, 3, 4]
    assert len(packs) == 3 and max(map(len, packs)) <= LONGEST_PACK


def test_only_causal_models_share() -> None:
    assert can_share(backbone("llama")) and can_share(backbone("gpt2"))
    assert not can_share(backbone("bert")) and not can_share(backbone("roberta"))


def test_difference_is_relative_to_the_larger_state() -> None:
    one = torch.tensor([[[[3.0, 4.0]]]])
    assert relative_difference(one, one * 1.1) == pytest.approx(0.1 / 1.1)
    assert relative_difference(one * 0, one * 0) == 0.0
