"""An evaluation computes as its model was trained, unless another precision is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from command_lines import composed
from test_cli_evaluate import evaluate, export

from saferlhf.config.checks import check_config, check_evaluate
from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.validate import evaluate_config, train_config
from saferlhf.errors import UserError
from saferlhf.models.locator import Location
from saferlhf.models.metadata import ExportMetadata
from saferlhf.run.as_trained import as_trained
from saferlhf.run.judged_model import JudgedModel


def config(*words: str) -> EvaluateConfig:
    return evaluate_config(composed("model=any", *words, command="evaluate"))


def model(run_folder: Path | None = None, **extra: str) -> JudgedModel:
    return JudgedModel(
        "any", Location("any", "export", run_folder, run_folder=run_folder), ExportMetadata("cost", extra=extra)
    )


def test_what_the_export_says() -> None:
    assert as_trained(config(), model(precision="bf16-mixed")).trainer.precision == "bf16-mixed"


def test_what_the_run_says_of_exports_that_do_not(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": {"precision": "bf16-mixed"}}))
    assert as_trained(config(), model(tmp_path)).trainer.precision == "bf16-mixed"
    (tmp_path / "config.yaml").write_text("")
    assert as_trained(config(), model(tmp_path)).trainer.precision == "32-true"


def test_models_of_others_are_computed_in_float32() -> None:
    assert as_trained(config(), model()).trainer.precision == "32-true"
    assert as_trained(config(), model(precision="odd")).trainer.precision == "32-true"


@pytest.mark.parametrize("words", [["trainer=default"], ["trainer=cpu"], ["trainer.precision=32-true"]])
def test_what_is_asked_for_wins(words: list[str]) -> None:
    assert as_trained(config(*words), model(precision="bf16-mixed")).trainer.precision == "32-true"


def test_training_names_its_precision() -> None:
    with pytest.raises(UserError, match="no precision is named"):
        check_config(train_config(composed("task=reward", "trainer=as_trained")))
    check_evaluate(config())
    with pytest.raises(UserError, match="is not possible"):
        check_evaluate(config("trainer.precision=half"))


def test_the_precision_makes_the_numbers(tmp_outputs: Path, tmp_path: Path) -> None:
    """Asked for by name or found in the export: the same evaluation; in another precision it is another one."""
    folder = export(tmp_path / "cost", "cost", precision="bf16-mixed")
    for words in ([], ["trainer.precision=bf16-mixed"], ["trainer.precision=32-true"]):
        assert evaluate(tmp_outputs, f"model={folder}", *words).code == 0
    folders = list((tmp_outputs / "evaluate").iterdir())
    assert len(folders) == 2
    scores = [json.loads((path / "metrics.json").read_text())["test/cost/score_mean"] for path in folders]
    assert scores[0] != scores[1] and scores[0] == pytest.approx(scores[1], abs=0.05)
