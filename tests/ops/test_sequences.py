"""Positions and pooling come from the mask alone."""

from __future__ import annotations

import pytest
import torch

from saferlhf.ops.sequences import last_index, pool, position_ids

MASK = torch.tensor(
    [
        [1, 1, 1, 0, 0],  # right-padded
        [0, 0, 1, 1, 1],  # left-padded
        [0, 1, 1, 0, 0],  # both
        [1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0],  # empty
        [1, 0, 1, 0, 0],  # a hole
    ]
).bool()


def test_position_ids_by_hand() -> None:
    expected = [[0, 1, 2, 2, 2], [0, 0, 0, 1, 2], [0, 0, 1, 1, 1], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]
    assert position_ids(MASK).tolist() == expected
    assert torch.equal(position_ids(MASK.long()), position_ids(MASK))


def test_last_index_by_hand() -> None:
    assert last_index(MASK).tolist() == [2, 4, 2, 4, 0, 2]


def test_pool_last_and_mean_by_hand() -> None:
    hidden = torch.arange(5.0).view(1, 5, 1).repeat(6, 1, 2)  # the state of token t is (t, t)
    assert pool(hidden, MASK, "last")[:, 0].tolist() == [2, 4, 2, 4, 0, 2]
    assert pool(hidden, MASK, "mean")[:, 1].tolist() == [1, 3, 1.5, 2, 0, 1]


def test_pool_equals_a_loop_over_rows() -> None:
    torch.manual_seed(0)
    hidden, mask = torch.randn(40, 9, 3), torch.rand(40, 9) < 0.5
    for row in range(40):
        real = hidden[row][mask[row]]
        last = real[-1] if len(real) else torch.zeros(3)
        mean = real.mean(0) if len(real) else torch.zeros(3)
        torch.testing.assert_close(pool(hidden, mask, "last")[row], last)
        torch.testing.assert_close(pool(hidden, mask, "mean")[row], mean)


@pytest.mark.parametrize("how", ["last", "mean"])
def test_nan_at_padding_and_in_an_empty_row_reaches_neither_scores_nor_gradients(how: str) -> None:
    values = torch.ones(6, 5, 2)
    values[~MASK] = float("nan")
    hidden = values.requires_grad_()
    pooled = pool(hidden, MASK, how)
    assert torch.isfinite(pooled).all()
    assert pooled[4].tolist() == [0, 0]
    pooled.sum().backward()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()
    assert hidden.grad[4].abs().sum() == 0


def test_mean_of_half_precision_is_taken_in_float32() -> None:
    hidden = torch.full((1, 4096, 1), 1.0078125, dtype=torch.bfloat16)
    assert pool(hidden, torch.ones(1, 4096), "mean").item() == pytest.approx(1.0078125, abs=1e-6)
    assert pool(hidden, torch.ones(1, 4096), "last").dtype == torch.bfloat16


def test_unknown_pooling_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown pooling"):
        pool(torch.zeros(1, 2, 3), torch.ones(1, 2), "first")
    with pytest.raises(ValueError, match="differ"):
        pool(torch.zeros(1, 2, 3), torch.ones(1, 3))
