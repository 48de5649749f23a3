"""`evaluate.py` in this process, on small random models: what it measures, what it leaves, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from command_lines import Answer, call, config, finish
from models.tiny_models import backbone_config

from saferlhf.config.files import read_json
from saferlhf.config.run_folder import RunFolder
from saferlhf.data.toyworld import preference_pairs, vocabulary
from saferlhf.models.backbone import load_backbone
from saferlhf.models.export import save_export
from saferlhf.models.loading import load_export
from saferlhf.models.metadata import ExportMetadata
from saferlhf.models.score_model import ScoreModel
from saferlhf.models.tokenizer import load_tokenizer
from saferlhf.run.prepare import locate_run

FEW = [
    "data.train_rows=8",
    "data.val_rows=12",
    "data.test_rows=24",
    "evaluation.bootstrap_draws=50",
    "trainer.threads=1",
]


def export(folder: Path, kind: str, *, seed: int = 0, **extra: Any) -> Path:
    """A random model of two small layers that knows the toy world's words."""
    tokenizer = load_tokenizer(backbone_config(), vocabulary=vocabulary())
    architecture = {**(backbone_config().architecture or {}), "max_position_embeddings": 128}
    ids = {"vocabulary_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    trunk = load_backbone(
        backbone_config(architecture=architecture),
        lm_head=kind == "sft",
        eos_token_id=tokenizer.eos_token_id,
        seed=seed,
        **ids,
    )
    model = trunk if kind == "sft" else ScoreModel(trunk, {"score": 1}, seed=seed)
    with torch.no_grad():  # fresh weights are so small that all scores look alike
        for parameter in model.parameters():
            parameter.mul_(8)
    save_export(folder, model=model, tokenizer=tokenizer, metadata=ExportMetadata(kind, max_length=128, extra=extra))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {kind: export(folder / kind, kind) for kind in ("sft", "reward", "cost")}
    return {**made, "safer": export(folder / "safer", "reward", preference="safer")}


def evaluate(outputs: Path, *words: str) -> Answer:
    return call("evaluate", *FEW, f"output_root={outputs}", "tracking=none", *words)


def only(outputs: Path) -> Path:
    (folder,) = (outputs / "evaluate").iterdir()
    return folder


def test_scores_are_measured_against_labels(tmp_outputs: Path, models: dict[str, Path]) -> None:
    """The pair accuracy is the one that a second reading of scores and labels gives."""
    answer = evaluate(tmp_outputs, f"model={models['reward']}", "data.shuffle_sides=false")
    assert answer.code == 0, answer.err
    folder = only(tmp_outputs)
    metrics = json.loads((folder / "metrics.json").read_text())
    loaded = load_export(str(models["reward"]))
    rows = list(preference_pairs(24, split="test", seed=0))
    right = []
    for row in rows:
        ids = [
            loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": row.prompt[-1].content}, {"role": "assistant", "content": response}],
                return_dict=False,
            )
            for response in (row.response_0, row.response_1)
        ]
        scores = [float(loaded.model(torch.tensor([i]), torch.ones(1, len(i), dtype=torch.bool))["score"]) for i in ids]
        right.append(int(np.argmax(scores) == row.better_response_id))
    assert metrics["test/reward/pair_accuracy"] == pytest.approx(np.mean(right))
    assert 0 < np.mean(right) < 1
    for name in ("config.yaml", "data_report.json", "report.html", "metrics.json", "status.json"):
        assert (folder / name).is_file()
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"] == str(models["reward"])
    assert str(folder / "report.html") in answer.out


def test_a_second_call_answers_without_the_model(tmp_outputs: Path, models: dict[str, Path]) -> None:
    words = [f"model={models['cost']}"]
    first = evaluate(tmp_outputs, *words)
    assert first.code == 0, first.err
    with mock.patch("saferlhf.models.loading.load_export", side_effect=AssertionError("not again")):
        second = evaluate(tmp_outputs, *words)
        # a copy of the model elsewhere, devices and batches do not change the numbers
        copy = tmp_outputs / "copy"
        shutil.copytree(models["cost"], copy)
        third = evaluate(tmp_outputs, f"model={copy}", "trainer=cpu", "trainer.eval_batch_size=3")
    assert (second.code, third.code) == (0, 0), third.err
    assert second.err.startswith("finished before") and third.err.startswith("finished before")
    assert second.out == first.out
    only(tmp_outputs)
    # what does, does
    assert evaluate(tmp_outputs, *words, "seed=1").code == 0
    assert evaluate(tmp_outputs, *words, "split=val").code == 0
    assert evaluate(tmp_outputs, *words, "trainer.precision=bf16-mixed").code == 0
    assert len(list((tmp_outputs / "evaluate").iterdir())) == 4


def test_a_split_and_a_limit(tmp_outputs: Path, models: dict[str, Path]) -> None:
    assert evaluate(tmp_outputs, f"model={models['cost']}", "split=val", "evaluation.max_rows=5").code == 0
    metrics = json.loads((only(tmp_outputs) / "metrics.json").read_text())
    assert metrics["val/cost/pair_accuracy"] * 5 == pytest.approx(round(metrics["val/cost/pair_accuracy"] * 5))
    assert not [name for name in metrics if name.startswith("test/")]


def test_a_reward_model_is_held_against_the_judgement_it_learned(tmp_outputs: Path, models: dict[str, Path]) -> None:
    """Equal weights, other label: `safer` stands in the export."""
    seen: list[str] = []
    from saferlhf.run import measure

    real = measure.pair_metrics

    def note(*args: Any, **options: Any) -> dict[str, float]:
        seen.append(options["preference"])
        return real(*args, **options)

    with mock.patch("saferlhf.run.measure.pair_metrics", note):
        assert evaluate(tmp_outputs, f"model={models['safer']}", "name=one").code == 0
        assert evaluate(tmp_outputs, f"model={models['reward']}", "name=two").code == 0
        assert evaluate(tmp_outputs, f"model={models['cost']}", "name=three").code == 0
    assert seen == ["safer", "better", "safer"]


def test_an_evaluation_is_tracked(tmp_outputs: Path, models: dict[str, Path]) -> None:
    words = [f"model={models['reward']}", "tracking=mlflow", "tracking.system_metrics=false"]
    answer = call("evaluate", *FEW, f"output_root={tmp_outputs}", *words)
    assert answer.code == 0, answer.err
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_outputs / 'mlflow.db'}")
    run = client.get_run(RunFolder(only(tmp_outputs)).status()["mlflow_run_id"])
    metrics = json.loads((only(tmp_outputs) / "metrics.json").read_text())
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/reward/pair_accuracy"] == metrics["test/reward/pair_accuracy"]
    assert (run.data.tags["suite"], run.data.tags["kind"]) == ("preference", "reward")
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"metrics.json", "report.html"}


# ------------------------------------------------------------------------------------------------ refusals
def test_models_that_cannot_be_scored(tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    headless = tmp_path / "headless"
    shutil.copytree(models["reward"], headless)
    (headless / "heads.safetensors").unlink()
    unfinished = locate_run(config("task=reward", f"output_root={tmp_path}")).folder
    unfinished.acquire()
    unfinished.release()
    for model, says in {
        "no/such/run": "no such folder: 'no/such/run'",
        str(tmp_path): "is no model",
        str(plain): "has no score heads (in model); name a run of task=reward or task=cost",
        str(headless): "heads",
        str(models["sft"]): "is a model of kind 'sft' without score heads (in model)",
        str(unfinished.path): "has no export yet",
        "some/hub-model": "has no score heads",
    }.items():
        answer = evaluate(tmp_outputs, f"model={model}")
        assert answer.code == 2, (model, answer.err)
        errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and says in errors[0], (model, answer.err)
        assert "Traceback" not in answer.err


def test_a_start_needs_no_heads(tmp_outputs: Path, models: dict[str, Path]) -> None:
    for model in ("sft", "reward"):
        assert locate_run(config("task=cost", f"init={models[model]}", f"output_root={tmp_outputs}")).hash


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mode=compute"], "'compute' is not possible (in mode); choose one of: score | moderate | compare"),
        (["mode=compare"], "a comparison names its models together (in model); models=[A,B]"),
        (["models=[a,b]"], "several models are compared (in models); add mode=compare"),
        (["split=tst"], "'tst' is not possible (in split); choose one of: train | val | test"),
        (["suite=prefrence"], "there is no suite 'prefrence' (in suite=prefrence); did you mean 'preference'?"),
        (["suite.measures=[polcy]"], "'polcy' is not possible (in suite.measures)"),
        (["+modle=x"], "unknown key 'modle' (in modle); did you mean 'mode' or 'model'?"),
        (["trainer.eval_batch_size=0"], "0 is not a positive number (in trainer.eval_batch_size)"),
        (
            ["data.agreement={better: 0.3}"],
            "two annotators who agree on 0.3 of the pairs (in data.agreement.better); give a share from 0.5 to 1,",
        ),
        (["data=jsonl", "data.path=nope.jsonl"], "no such file or folder: nope.jsonl (in data.path)"),
        (["data.policy.empty=dorp"], "'dorp' is no policy for empty rows"),
        (["split=val", "split=test"], "'split' is given twice"),
    ],
)
def test_a_mistake_is_one_line(tmp_outputs: Path, models: dict[str, Path], words: list[str], says: str) -> None:
    answer = evaluate(tmp_outputs, f"model={models['reward']}", *words)
    assert answer.code == 2
    assert says in answer.error
    assert not list(tmp_outputs.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no models to compare are named (in models); models=[A,B]"),
        (["models=[COST]"], "a comparison needs two models at least (in models)"),
        (["models=[COST,COST]"], "is named twice (in models."),
        (["models=[COST,no/such]"], "'no/such' has no score heads (in model)"),
    ],
)
def test_a_comparison_needs_models(tmp_outputs: Path, models: dict[str, Path], words: list[str], says: str) -> None:
    named = [word.replace("COST", str(models["cost"])) for word in words]
    answer = evaluate(tmp_outputs, "mode=compare", *named)
    assert answer.code == 2 and says in answer.error, answer.err
    assert not list(tmp_outputs.iterdir())


def test_models_are_evaluated_and_compared(tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    """Both are measured on the same rows first; what was measured is found again, the comparison too."""
    other = export(tmp_path / "other_cost", "cost", seed=3)
    words = ["mode=compare", f"models={{ours: {models['cost']}, theirs: {other}}}"]
    answer = evaluate(tmp_outputs, *words, "name=compared")
    assert answer.code == 0, answer.err
    folders = {path: read_json(path / "metrics.json") for path in (tmp_outputs / "compared").iterdir()}
    (comparison,) = [path for path in folders if (path / "comparison.json").is_file()]
    metrics = folders.pop(comparison)
    assert len(folders) == 2
    ours, theirs = (
        next(found for path, found in folders.items() if str(model) in (path / "config.yaml").read_text())
        for model in (models["cost"], other)
    )
    name = "test/cost/pair_accuracy"
    found = {key: value for key, value in metrics.items() if key.endswith("pair_accuracy/ours_minus_theirs")}
    assert list(found.values()) == [pytest.approx(ours[name] - theirs[name])]
    assert "ours" in answer.out and "theirs" in answer.out
    again = evaluate(tmp_outputs, *words, "name=compared")
    assert again.err.count("finished before") == 3 and "ours" in again.out


def test_rows_without_the_needed_label(tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    rows = [{"prompt": f"p {i}", "chosen": "a b", "rejected": "c"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = evaluate(tmp_outputs, f"model={models['cost']}", "data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}")
    assert answer.code == 2
    assert "the task needs the column 'safer_response_id'" in answer.error
    assert RunFolder(only(tmp_outputs)).status()["status"] == "failed"


def test_agreement_of_annotators_gives_the_ceiling(tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    """Two who agree on 62.5% are right with (1 + sqrt(0.25)) / 2 each; rates are by label, and a cost's is safer."""
    pairs = [
        {
            "prompt": row.prompt[-1].content,
            "response_0": row.response_0,
            "response_1": row.response_1,
            "safer_response_id": row.safer_response_id,
        }
        for row in preference_pairs(12, split="test", seed=0)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    words = [f"model={models['cost']}", "data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}", "data.test_fraction=0.9"]
    known = evaluate(tmp_outputs, *words, "data.agreement={safer: 0.625, better: 0.9}", "name=known")
    other = evaluate(tmp_outputs, *words, "data.agreement={better: 0.9}", "name=other")
    assert (known.code, other.code) == (0, 0), known.err
    found = [json.loads(next((tmp_outputs / n).glob("*/metrics.json")).read_text()) for n in ("known", "other")]
    assert found[0]["test/cost/expected_ceiling"] == pytest.approx(0.75)
    assert "test/cost/expected_ceiling" not in found[1]


def test_an_interrupt_marks_the_evaluation_killed(tmp_outputs: Path, models: dict[str, Path]) -> None:
    with mock.patch("saferlhf.models.loading.load_export", side_effect=KeyboardInterrupt):
        answer = evaluate(tmp_outputs, f"model={models['cost']}")
    assert answer.code == 130
    assert RunFolder(only(tmp_outputs)).status()["status"] == "killed"
    assert evaluate(tmp_outputs, f"model={models['cost']}").code == 0
    assert RunFolder(only(tmp_outputs)).status()["status"] == "finished"


def test_a_finished_evaluation_of_a_run(tmp_outputs: Path, models: dict[str, Path]) -> None:
    """A run's folder names its export."""
    run = finish(locate_run(config("task=reward", f"output_root={tmp_outputs}")))
    shutil.rmtree(run / "export")
    shutil.copytree(models["reward"], run / "export")
    assert evaluate(tmp_outputs, f"model={run}").code == 0
    again = evaluate(tmp_outputs, f"model={run / 'export'}")
    assert again.err.startswith("finished before")
