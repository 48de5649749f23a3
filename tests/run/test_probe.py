"""A probe from command to export: the fitted heads are what is loaded, the cache carries it over any interruption."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import (
    RunServer,
    assert_same,
    config,
    hf_folder,
    make_cheap,
    metrics,
    only_run,
    own_rows,
    prepared,
    small,
    status,
    weights,
)

from saferlhf.errors import UserError
from saferlhf.evaluation.moderate import moderate_rows
from saferlhf.models.loading import load_export
from saferlhf.ops.calibration import Calibration, decide
from saferlhf.run import measure_probe
from saferlhf.run.stages import fit
from saferlhf.run.train import train
from saferlhf.tracking.base import NullLogger

PROBE = (
    "task=probe",
    "task.folds=3",
    "task.l2=[0.1]",
    "task.feature_dtype=float32",
    "task.batch_tokens=256",
    "data.train_rows=60",
    "data.val_rows=20",
    "data.test_rows=30",
)


def probe(root: Path, *overrides: str) -> list[str]:
    return small(*PROBE, f"output_root={root / 'outputs'}", f"cache_dir={root / 'cache'}", *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished run."""
    root = tmp_path_factory.mktemp("probe")
    with pytest.MonkeyPatch.context() as patch:
        make_cheap(patch.setattr)
        train(config(probe(root)))
    return root


def test_the_contract(finished: Path) -> None:
    folder = only_run(finished / "outputs")
    found = metrics(folder)
    for name in ("unsafe/macro_f1", "unsafe/auroc", "severity/quadratic_kappa", "category/exact_match"):
        low, value, high = (found[f"test/{name}{ending}"] for ending in ("_low", "", "_high"))
        assert low <= value <= high, name
        assert f"val/{name}" in found and f"cv/{name}" in found
    assert found["cv/unsafe/accuracy_n"] == 60 and found["test/unsafe/accuracy_n"] == 30
    assert all(math.isfinite(value) for value in found.values())
    assert found["train/export_difference"] < 1e-4
    record = json.loads((folder / "probe.json").read_text())
    assert record["layers"] == min(record["tried"], key=lambda tried: tried["relative_loss"])["layers"]
    assert {"0", "1"} <= set(record["ridge_regression"]) <= {"0", "1", "0,1", "1,0"}
    for file in ("config.yaml", "data_report.json", "samples.jsonl", "report.html", "run.log"):
        assert (folder / file).stat().st_size, file
    assert status(folder)["status"] == "finished"


def test_what_is_loaded_is_the_fitted_probe(finished: Path, tmp_path: Path) -> None:
    """An ordinary moderator: its own forward pass gives the fit's logits, its verdicts the run's."""
    folder = only_run(finished / "outputs")
    loaded = load_export(str(folder / "export"), require_heads=True)
    assert loaded.metadata.kind == "moderator" and loaded.metadata.weights == "base"
    assert set(loaded.heads) == {"unsafe", "category", "severity"}
    assert (loaded.model.span, list(loaded.model.layers)) == ("all_and_response", loaded.metadata.layers)
    run = prepared(probe(tmp_path, f"cache_dir={finished / 'cache'}"))
    fit(run, NullLogger())
    test = run.encoded.test
    own = moderate_rows(loaded.model, test)
    cached = measure_probe._logits(run, "test")
    for one, other in ((own.unsafe, cached.unsafe), (own.severity, cached.severity), (own.category, cached.category)):
        assert one.std() > 0.01
        np.testing.assert_allclose(one, other, atol=1e-4)
    calibration = Calibration.from_dict(loaded.metadata.calibration)
    assert calibration.fitted_on == "out-of-fold outputs of the train rows" and calibration.rows == 60
    verdicts = decide(own, calibration)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["unsafe"] for line in lines] == verdicts.unsafe.tolist()
    assert [line["row_id"] for line in lines] == [row.id for row in test.rows]


def test_nothing_of_the_backbone_changed(finished: Path, tmp_path: Path) -> None:
    run = prepared(probe(tmp_path))
    run.task.configure_model()
    exported = weights(only_run(finished / "outputs"))
    before = {f"model.safetensors/{name}": value for name, value in run.task.score_model.trunk.state_dict().items()}
    after = {name: value for name, value in exported.items() if name.startswith("model.safetensors/")}
    assert len(after) > 5
    for name, value in after.items():
        assert torch.equal(value, before[name])


def test_neither_test_nor_validation_rows_reach_the_fit(finished: Path, tmp_path: Path) -> None:
    """Other held-out rows, the same heads and thresholds."""
    other = tmp_path / "other"
    train(config(probe(other, "data.test_rows=17", "data.val_rows=9", f"cache_dir={finished / 'cache'}")))
    one, two = only_run(finished / "outputs"), only_run(other / "outputs")
    assert_same(weights(one), weights(two))
    stored = [json.loads((folder / "export/saferlhf.json").read_text())["calibration"] for folder in (one, two)]
    assert stored[0] == stored[1]
    assert metrics(one)["test/unsafe/accuracy_n"] != metrics(two)["test/unsafe/accuracy_n"]


def test_another_choice_on_the_same_rows_computes_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from saferlhf.evaluation import features

    monkeypatch.setattr(features, "_compute", None)
    cache = f"cache_dir={finished / 'cache'}"
    train(config(probe(tmp_path, cache, "task.layers=all", "task.span=response", "task.combine=average")))
    folder = only_run(tmp_path / "outputs")
    assert json.loads((folder / "probe.json").read_text())["layers"] == [0, 1]
    # the plan says so
    train(config(probe(tmp_path, cache, "plan=on", "task.layers=auto", "task.span=all")))
    assert "110 of them cached in" in capsys.readouterr().out
    assert len(list((tmp_path / "outputs").glob("*/*"))) == 1, "a plan leaves nothing"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.layers=[7]"], "no layer 7"),
        (["task.layers=some"], "task.layers"),
        (["task.folds=1"], "task.folds"),
        (["task.l2=[0]"], "task.l2"),
        (["adapter=lora", "init=x"], "leaves its backbone as it is"),
        (["data.train_rows=2"], "cannot be dealt to 3 folds|same safety label"),
    ],
)
def test_what_cannot_be_is_one_clear_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(config(probe(tmp_path, *overrides)))


def test_features_of_another_model_are_noticed(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(probe(tmp_path, f"cache_dir={finished / 'cache'}"))
    fit(run, NullLogger())
    logits = measure_probe._logits
    monkeypatch.setattr(
        measure_probe, "_logits", lambda *given: replace(logits(*given), unsafe=logits(*given).unsafe + 1)
    )
    with pytest.raises(RuntimeError, match="differ by"):
        measure_probe._export_difference(run)


@pytest.mark.slow
def test_killed_while_it_computes_features_goes_on_there(finished: Path, server: RunServer, tmp_path: Path) -> None:
    die = {"signal": signal.SIGKILL, "at": "features", "step": 30}
    assert server.run(*probe(tmp_path), die=die).code == -signal.SIGKILL
    folder = only_run(tmp_path / "outputs")
    assert status(folder)["status"] == "running"
    assert server.run(*probe(tmp_path), die={"signal": signal.SIGINT, "at": "features", "step": 10}).code == 130
    assert status(folder)["status"] == "killed"
    ended = server.run(*probe(tmp_path))
    assert ended.code == 0, ended.output
    whole = only_run(finished / "outputs")
    assert folder.name == whole.name
    assert_same(weights(folder), weights(whole), "export")
    assert_same(metrics(folder), metrics(whole), "metrics")
    again = server.run(*probe(tmp_path))
    assert again.code == 0 and "finished before" in again.output


@pytest.mark.slow
def test_prompts_alone_and_four_bits(tmp_path: Path, server: RunServer) -> None:
    model, rows = hf_folder(tmp_path / "model"), tmp_path / "answers.jsonl"
    pairs = [json.loads(line) for line in Path(own_rows(tmp_path / "rows.jsonl", count=60)).read_text().splitlines()]
    names = {"prompt": "prompt", "response": "response_0", "is_safe": "is_response_0_safe"}
    rows.write_text("".join(json.dumps({to: p[source] for to, source in names.items()}) + "\n" for p in pairs))
    own = [f"backbone.model={model}", "backbone=hf", "backbone.max_length=64", "data=jsonl", f"data.path={rows}"]
    not_for_files = ("backbone.arch", "data.train_", "data.val_r", "data.test_r", "output_root")
    overrides = [o for o in probe(tmp_path, *own) if not o.startswith(not_for_files)]
    for more in (["task.input=prompt", "task.span=prompt"], ["quantization=nf4", "quantization.compute_dtype=float32"]):
        root = tmp_path / more[0].partition("=")[2]
        ended = server.run(*overrides, *more, f"output_root={root}")
        assert ended.code == 0, ended.output
        loaded = load_export(str(only_run(root) / "export"), device="cpu")
        assert loaded.metadata.weights == "base" and not list((only_run(root) / "export").glob("model*"))
        assert set(loaded.heads) == {"unsafe"}, "nothing else is labelled"
