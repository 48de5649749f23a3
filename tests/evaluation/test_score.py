"""Scores of rows: in the rows' order, each once, the same in any batch; the model's modes come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import prepared, small

from saferlhf.evaluation.score import evaluating, score_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = prepared(small("task=cost", "data.test_rows=23", f"output_root={tmp_path_factory.mktemp('runs')}"))
    found.task.configure_model()
    with torch.no_grad():
        found.task.model.heads["score"].weight.normal_(std=3.0)
    return found


def one_by_one(model: Any, data: Any) -> np.ndarray:
    """(2n,) every sequence alone, unpadded."""
    model.eval()
    scores = []
    with torch.no_grad():
        for i in range(len(data.store)):
            ids = torch.from_numpy(data.store.sequence(i).astype(np.int64))[None]
            scores.append(float(model(ids, torch.ones_like(ids))["score"]))
    model.train()
    return np.array(scores)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_pairs(batch_size: int, run: Any) -> None:
    data = run.encoded.test
    found = score_rows(run.task.model, data, batch_size=batch_size)
    expected = one_by_one(run.task.model, data)
    assert found.shape == (23, 2) and len(set(found.ravel())) > 40
    np.testing.assert_allclose(found[:, 0], expected[:23], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[:, 1], expected[23:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_single_answers(batch_size: int, run: Any) -> None:
    from saferlhf.data.toyworld import question_answers

    answers = run.encoded.encoder.answers(question_answers(11, "test", 0), "test")
    found = score_rows(run.task.model, answers, batch_size=batch_size)
    assert found.shape == (11,)
    np.testing.assert_allclose(found, one_by_one(run.task.model, answers), rtol=1e-5, atol=1e-5)


def test_modes_gradients_and_precision(run: Any) -> None:
    model = run.task.model
    model.train()
    model.heads["score"].eval()
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    with pytest.raises(RuntimeError), evaluating(model, autocast=True):
        assert torch.is_autocast_enabled("cpu")
        raise RuntimeError
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    model.train()


def test_half_precision_is_close(run: Any) -> None:
    exact = score_rows(run.task.model, run.encoded.test)
    half = score_rows(run.task.model, run.encoded.test, autocast=True)
    assert 0 < np.abs(half - exact).max() < 0.05 * np.abs(exact).max()


def test_training_after_scoring(run: Any, tmp_path: Path) -> None:
    """Tensors made without gradients must not be left behind in the model."""
    score_rows(run.task.model, run.encoded.val)
    batch = run.encoded.train.collate([0, 1])
    loss, _ = run.task.loss_sum(batch)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in run.task.parameters())
