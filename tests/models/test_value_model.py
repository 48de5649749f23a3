"""A critic's value of an unfinished response is the score model's score of it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import backbone, padded, rows, stir

from saferlhf.errors import UserError
from saferlhf.models.kernel_map import KernelMap
from saferlhf.models.score_model import ScoreModel
from saferlhf.models.value_model import check_critic, prefix_scores, token_values

T, F = True, False


def model_of(family: str = "llama", pooling: str = "last", layers: tuple[int, ...] | None = None) -> ScoreModel:
    model = ScoreModel(backbone(family), {"value": 1}, pooling, layers=layers)
    stir(model)
    with torch.no_grad():
        model.heads["value"].bias.fill_(0.7)
    return model.eval()


@pytest.mark.parametrize("layers", [None, (1,), (0, 2)])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(("family", "side"), [("llama", "right"), ("llama", "left"), ("gpt2", "both")])
def test_values_are_scores_of_prefixes(family: str, side: str, pooling: str, layers: tuple[int, ...] | None) -> None:
    model, sequences = model_of(family, pooling, layers), rows(3)
    ids, mask = padded(sequences, side, extra=1)
    with torch.no_grad():
        values, end = token_values(prefix_scores(model, "value", ids, mask), mask)
        for row, sequence in enumerate(sequences):
            # each prefix alone, unpadded, through the score model itself
            alone = [
                model(sequence[None, :n], torch.ones(1, n, dtype=torch.bool))["value"].item()
                for n in range(1, len(sequence) + 1)
            ]
            found = values[row][mask[row]]
            torch.testing.assert_close(found[1:], torch.tensor(alone[:-1]), atol=2e-5, rtol=0)
            assert found[0] == 0, "nothing comes before the first token"
            assert end[row].item() == pytest.approx(alone[-1], abs=2e-5)
        assert values[~mask].eq(0).all()
        assert values.std() > 0.01


def test_shift_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 9.0], [9.0, 4.0, 5.0, 6.0], [7.0, 9.0, 9.0, 9.0]])
    mask = torch.tensor([[T, T, T, F], [F, T, T, T], [T, F, F, F]])
    values, end = token_values(scores, mask)
    assert values.tolist() == [[0, 1, 2, 0], [0, 0, 4, 5], [0, 0, 0, 0]]
    assert end.tolist() == [3, 6, 7]


def test_nan_at_padding_stays_there_in_values_and_gradients() -> None:
    model = model_of(pooling="mean")
    ids, mask = padded(rows(3), "right", extra=2)
    clean = prefix_scores(model, "value", ids, mask)
    hidden = model.hidden

    def with_nan(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return hidden(input_ids, attention_mask).masked_fill(~mask.unsqueeze(-1), float("nan"))

    model.hidden = with_nan  # type: ignore[method-assign]
    dirty = prefix_scores(model, "value", ids, mask)
    torch.testing.assert_close(dirty, clean)
    dirty.sum().backward()
    trunk = [p.grad for p in model.trunk.parameters() if p.grad is not None]
    assert trunk
    assert all(torch.isfinite(grad).all() for grad in trunk)


def test_models_that_pool_otherwise_are_refused() -> None:
    trunk = backbone()
    with pytest.raises(UserError, match="token by token: it pools the response"):
        check_critic(ScoreModel(trunk, {"cost": 1}, span="response"), "roles.cost.model")
    kernel = KernelMap(torch.zeros(64), torch.ones(64), torch.eye(64)[:, :3], torch.zeros(5, 3), torch.tensor(1.0))
    with pytest.raises(UserError, match="not linear"):
        check_critic(ScoreModel(trunk, {"cost": 1}, kernel=kernel), "roles.cost.model")
    check_critic(ScoreModel(trunk, {"cost": 1}, "mean", layers=(1, 2)), "")
