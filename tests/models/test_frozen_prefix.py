"""States below the first trained block, kept on disk: the same scores and gradients, whatever is stored already."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, backbone, lora_config, stir

from saferlhf.errors import UserError
from saferlhf.models.adapters import add_lora, trainable_parameters
from saferlhf.models.frozen_prefix import FrozenPrefix
from saferlhf.models.score_model import ScoreModel
from saferlhf.models.state_store import StateStore

BLOCKS = 4
FIRST = 2


def score_model(layers: list[int] | None = None) -> ScoreModel:
    trunk = backbone(architecture={**ARCHITECTURES["llama"], "num_hidden_layers": BLOCKS}, seed=1)
    adapted = add_lora(trunk, lora_config(blocks=[FIRST, FIRST + 1]), seed=3)
    stir(adapted)
    return ScoreModel(adapted, {"score": 1}, "mean", layers=layers)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 5:] = False
    mask[2, 2:] = False
    return ids, mask


def kept(model: ScoreModel, cache: Path) -> FrozenPrefix:
    return FrozenPrefix(model.trunk, FIRST, "tiny", cache)


@pytest.mark.parametrize("layers", [None, [2, 4], [3]])
def test_scores_and_gradients_are_those_of_the_whole_model(layers: Any, tmp_path: Path) -> None:
    ids, mask = batch()
    plain, cut = score_model(layers), score_model(layers)
    cut.keep_frozen(kept(cut, tmp_path))
    for _ in range(2):  # computed, then read
        for model in (plain, cut):
            model.zero_grad()
            model(ids, mask)["score"].square().sum().backward()
        theirs = trainable_parameters(cut)
        for name, one in trainable_parameters(plain).items():
            assert (one.grad is None) == (theirs[name].grad is None), name
            if one.grad is not None:
                assert torch.allclose(one.grad, theirs[name].grad, atol=1e-5), name
        assert torch.allclose(plain(ids, mask)["score"], cut(ids, mask)["score"], atol=1e-5)


def test_a_row_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = batch()
    model = score_model()
    prefix = kept(model, tmp_path)
    first = prefix.states(ids, mask)
    assert len(prefix._store(False)) == 3 and not first[1, 5:].any()
    again = kept(model, tmp_path)
    monkeypatch.setattr(again, "_computed", None)  # would be called for any row that is missing
    order = torch.tensor([2, 0, 1])
    assert torch.equal(again.states(ids[order], mask[order]), first[order])


def test_damaged_rows_are_computed_again(tmp_path: Path) -> None:
    ids, mask = batch()
    prefix = kept(score_model(), tmp_path)
    first = prefix.states(ids, mask)
    file = prefix._store(False).file
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE rows SET states = zeroblob(length(states))")
    assert torch.equal(kept(score_model(), tmp_path).states(ids, mask), first)
    file.write_bytes(b"no database at all, but some bytes")
    for beside in file.parent.glob(file.name + "-*"):
        beside.unlink()
    with pytest.raises(UserError, match="remove this file"):
        kept(score_model(), tmp_path).states(ids, mask)


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store = StateStore({"model": "x"}, 2, "float16", tmp_path)
    store.put({b"a" * 16: np.array([[1.0, 2.0]], dtype=np.float32)})
    with pytest.raises(UserError, match="float16"):
        store.put({b"b" * 16: np.array([[1.0, 1e6]], dtype=np.float32)})
    found, missing = store.get([b"a" * 16, b"b" * 16])
    assert found is not None and found.tolist() == [[1.0, 2.0]] and missing is None
    assert StateStore({"model": "y"}, 2, "float16", tmp_path).get([b"a" * 16]) == [None]


def test_what_cannot_be_cut_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = score_model(layers=[1, 4])
    with pytest.raises(UserError, match="state 1, below block 2"):
        model.keep_frozen(kept(model, tmp_path))
    with pytest.raises(UserError, match="nothing frozen below block 3"):
        FrozenPrefix(score_model().trunk, 3, "tiny", tmp_path)  # block 2 has an adapter
    # a model that scales what it is handed does more with embeddings than its blocks do
    odd = score_model()
    inner = odd.trunk.get_base_model()
    plain = inner.forward
    monkeypatch.setattr(
        inner,
        "forward",
        lambda **k: plain(**{**k, **({"inputs_embeds": 2 * k["inputs_embeds"]} if "inputs_embeds" in k else {})}),
    )
    with pytest.raises(UserError, match="cannot be cut at block 2"):
        odd.keep_frozen(kept(odd, tmp_path))


def test_the_model_keeps_all_its_blocks(tmp_path: Path) -> None:
    ids, mask = batch()
    model = score_model(layers=[3])
    names = list(model.state_dict())
    model.keep_frozen(kept(model, tmp_path))
    model(ids, mask)
    assert list(model.state_dict()) == names
