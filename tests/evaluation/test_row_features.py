"""Features of rows: each once, from the cache where it is there, the same numbers however often it was interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import prepared, small

from saferlhf.evaluation import features as module
from saferlhf.evaluation.features import Progress, row_features, token_batches
from saferlhf.models.feature_store import FeatureStore
from saferlhf.models.score_model import ScoreModel
from saferlhf.ops.sequences import SPANS

LAYERS = (0, 1)
SMALL_BATCHES = {"layers": LAYERS, "batch_tokens": 128, "dtype": "float32"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    prepared_run = prepared(small("task=probe", f"output_root={tmp_path_factory.mktemp('outputs')}"))
    prepared_run.task.configure_model()
    return prepared_run


def features(run: Any, cache: Path, split: str = "train", **changes: Any) -> tuple[Any, list[Progress]]:
    seen: list[Progress] = []
    arguments = {**SMALL_BATCHES, "cache_dir": cache, "progress": seen.append, **changes}
    return row_features(run.task.score_model, getattr(run.encoded, split), **arguments), seen


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("span", sorted(SPANS))
def test_row_by_row_what_a_score_model_reads(run: Any, tmp_path: Path, span: str, pooling: str) -> None:
    found, _ = features(run, tmp_path, pooling=pooling)
    data, trunk = run.encoded.train, run.task.score_model.trunk.eval()
    for layers in ([1, 0], [1]):
        matrix = found.matrix(layers, span)
        model = ScoreModel(trunk, {}, pooling, layers=layers, span=span)
        for i in range(len(data)):
            t = data.collate([i]).tokens
            with torch.no_grad():
                alone = model.pooled(t.input_ids, t.attention_mask, t.response_mask)
            np.testing.assert_allclose(matrix[i], alone[0].numpy(), rtol=1e-5, atol=1e-5)


def test_computed_once(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, seen = features(run, tmp_path)
    assert len(seen) > 3 and [p.rows for p in seen] == sorted({p.rows for p in seen})
    last = seen[-1]
    assert last.rows == last.total_rows == 20 and last.tokens == last.total_tokens == run.encoded.train.lengths.sum()
    assert last.tokens_per_s > 0 and last.seconds_left == 0
    monkeypatch.setattr(module, "_compute", None)
    again, seen = features(run, tmp_path)
    assert not seen and np.array_equal(again.matrix([0, 1], "both"), found.matrix([0, 1], "both"))
    # not for another precision or pooling
    for changes in ({"autocast": True}, {"pooling": "last"}, {"dtype": "float16"}):
        with pytest.raises(TypeError):
            features(run, tmp_path, **changes)


def test_interrupted_and_gone_on_with_it_is_the_same_to_the_last_bit(run: Any, tmp_path: Path) -> None:
    whole, seen = features(run, tmp_path / "whole")
    assert len(seen) >= 4

    def stop(now: Progress) -> None:
        if now.rows >= seen[1].rows:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features(run, tmp_path / "parts", progress=stop)
    rest, late = features(run, tmp_path / "parts")
    assert len(late) == len(seen) - 2 and late[-1].total_rows == 20 - seen[1].rows
    assert np.array_equal(rest.matrix([0, 1], "both"), whole.matrix([0, 1], "both"))


def test_damaged_rows_are_said_and_computed_again(run: Any, tmp_path: Path) -> None:
    whole, _ = features(run, tmp_path)
    expected = whole.matrix([0, 1], "both")
    path = whole.store.folder / "states.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 64
    path.write_bytes(content)
    said: list[str] = []
    again, seen = features(run, tmp_path, say=said.append)
    assert len(said) == 1 and said[0].startswith("1 cached rows of features are damaged")
    assert len(seen) == 1  # its batch
    np.testing.assert_allclose(again.matrix([0, 1], "both"), expected, rtol=1e-5, atol=1e-6)
    said.clear()
    features(run, tmp_path, say=said.append)
    assert not said


def test_equal_rows_are_kept_once(run: Any, tmp_path: Path) -> None:
    data = run.encoded.train
    twice = type(data)(
        [*data.rows, data.rows[0]], data.store.select(np.array([*range(20), 0])), data.truncated, data.pad
    )
    found = row_features(run.task.score_model, twice, cache_dir=tmp_path, **SMALL_BATCHES)
    assert len(found) == 21 and len(FeatureStore.places(found.store, found.keys)) == 21
    assert len(found.store) == len(found.store.states()) == 20
    matrix = found.matrix([0, 1], "both")
    assert np.array_equal(matrix[0], matrix[20])


def test_bfloat16_is_close(run: Any, tmp_path: Path) -> None:
    exact, half = (features(run, tmp_path, autocast=autocast)[0].matrix([1], "both") for autocast in (False, True))
    assert 0 < np.abs(exact - half).max() < 0.1 * np.abs(exact).max()


def test_batches_hold_about_equal_numbers_of_tokens() -> None:
    lengths = np.array([5, 100, 7, 30, 30, 1])
    batches = token_batches(lengths, 64)
    assert [b.tolist() for b in batches] == [[1], [3, 4], [2, 0, 5]]
    assert all(len(b) == 1 or lengths[b].max() * len(b) <= 64 for b in batches)
    assert token_batches(lengths[:0], 64) == []


# ------------------------------------------------------------------------------------------------ shared prompts
@pytest.fixture(scope="module")
def twins(run: Any) -> Any:
    """Two answers to each of ten prompts, and one that stands alone."""
    rows = run.encoded.train.rows[:11]
    answers = [
        replace(row, id=f"{i} {k}", response=rows[i + k].response) for i, row in enumerate(rows[:10]) for k in (0, 1)
    ]
    return run.encoded.encoder.answers([*answers, rows[10]])


def of_twins(run: Any, twins: Any, cache: Path, **changes: Any) -> Any:
    return row_features(run.task.score_model, twins, **{**SMALL_BATCHES, "cache_dir": cache, **changes})


def test_what_prompts_have_in_common_is_computed_once(
    run: Any, twins: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    found = of_twins(run, twins, tmp_path / "shared", say=said.append)
    batches = module._shared(run.task.score_model, twins, found, 128)
    assert len(batches) > 2 and sorted(np.concatenate([rows for rows, _ in batches])) == list(range(21))
    monkeypatch.setattr(module, "can_share", lambda trunk: False)
    plain = of_twins(run, twins, tmp_path / "plain")
    for pooled in ("both", "all"):
        np.testing.assert_allclose(found.matrix([0, 1], pooled), plain.matrix([0, 1], pooled), rtol=1e-5, atol=1e-5)
    assert not said


def test_a_model_that_does_not_mind_its_mask_is_found_out(
    run: Any, twins: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everywhere = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    monkeypatch.setattr(module.SharedPrompts, "_mask", lambda *_: everywhere)
    said: list[str] = []
    found = of_twins(run, twins, tmp_path, say=said.append)
    assert len(said) == 1 and said[0].startswith("prompts are not shared")
    monkeypatch.setattr(module, "can_share", lambda trunk: False)
    plain = of_twins(run, twins, tmp_path / "plain")
    assert np.array_equal(found.matrix([0, 1], "both"), plain.matrix([0, 1], "both"))


def test_a_cache_of_more_layers_serves_a_choice_of_them(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_layers, _ = features(run, tmp_path, layers=(0, 1))
    monkeypatch.setattr(module, "_compute", None)
    some, seen = features(run, tmp_path, layers=(1,))
    assert not seen and some.store.folder == all_layers.store.folder and some.layers == (1,)
    assert np.array_equal(some.matrix([1], "both"), all_layers.matrix([1], "both"))
    # where a row is damaged, the smaller choice is computed by itself
    monkeypatch.undo()
    states = all_layers.store.folder / "states.bin"
    content = bytearray(states.read_bytes())
    content[0] ^= 0xFF
    states.write_bytes(content)
    again, seen = features(run, tmp_path, layers=(1,))
    assert seen and again.store.folder != all_layers.store.folder and again.layers == (1,)
