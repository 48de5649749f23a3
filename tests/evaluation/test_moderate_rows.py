"""Heads of a moderator over rows: in the rows' order, each once, the same in any batch, by span and layer too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models.tiny_models import backbone, stir, tokenizer

from saferlhf.data.encode import Encoder
from saferlhf.data.rows import QuestionAnswer, as_prompt
from saferlhf.errors import UserError
from saferlhf.evaluation.moderate import moderate_rows
from saferlhf.models.score_model import ScoreModel


@pytest.fixture(scope="module")
def data() -> Any:
    rng = np.random.default_rng(0)
    rows = [
        QuestionAnswer(
            f"r{i}",
            as_prompt(" ".join(f"w{rng.integers(59)}" for _ in range(rng.integers(1, 8)))),
            " ".join(f"w{rng.integers(59)}" for _ in range(rng.integers(1, 12))),
        )
        for i in range(11)
    ]
    return Encoder.build(tokenizer(), "native", 64).answers(rows)


def moderator(**options: Any) -> ScoreModel:
    model = ScoreModel(backbone(), {"unsafe": 1, "category": 4, "severity": 3}, "mean", **options)
    stir(model, scale=1.0)
    return model.train()


@pytest.mark.parametrize("options", [{}, {"layers": [0, 2], "span": "both"}, {"span": "response"}])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_logits_are_those_of_each_row_alone(batch_size: int, options: dict[str, Any], data: Any) -> None:
    model, seen = moderator(**options), []
    found = moderate_rows(model, data, batch_size=batch_size, progress=seen.append)
    assert model.training and seen[-1] == 11 and seen == sorted(seen)
    model.eval()
    for i in range(11):
        ids = torch.from_numpy(data.store.sequence(i).astype(np.int64))[None]
        response = torch.arange(ids.shape[1])[None] >= int(data.store.prompt_lengths[i])
        with torch.no_grad():
            scores = {k: v.double().numpy()[0] for k, v in model(ids, torch.ones_like(ids), response).items()}
        assert found.unsafe[i] == pytest.approx(scores["unsafe"][0], abs=1e-5)
        np.testing.assert_allclose(found.category[i], scores["category"], rtol=1e-5, atol=1e-5)
        first, *steps = scores["severity"]
        falling = first - np.concatenate([[0.0], np.cumsum(np.log1p(np.exp(steps)))])
        np.testing.assert_allclose(found.severity[i], falling, rtol=1e-5, atol=1e-5)
    assert (np.diff(found.severity, axis=1) <= 0).all()


def test_no_rows(data: Any) -> None:
    import dataclasses

    none = dataclasses.replace(data, rows=[], store=data.store.select(np.zeros(0, np.int64)))
    with pytest.raises(UserError, match="0 rows to evaluate"):
        moderate_rows(moderator(), none)
