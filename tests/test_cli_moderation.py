"""`evaluate.py suite=moderation` and `mode=moderate` in this process, on small random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from command_lines import Answer, call
from models.tiny_models import backbone_config
from sklearn import metrics as sk
from test_cli_evaluate import export

from saferlhf.config.run_folder import RunFolder
from saferlhf.data.rows import PKU_CATEGORIES
from saferlhf.data.toyworld import preference_pairs, question_answers, vocabulary
from saferlhf.models.backbone import load_backbone
from saferlhf.models.export import save_export
from saferlhf.models.loading import load_export
from saferlhf.models.metadata import ExportMetadata
from saferlhf.models.score_model import ScoreModel
from saferlhf.models.tokenizer import load_tokenizer
from saferlhf.ops.calibration import Calibration
from saferlhf.ops.moderation import ModerationLogits

FEW = [
    "data.train_rows=120",
    "data.val_rows=8",
    "data.test_rows=40",
    "evaluation.bootstrap_draws=50",
    "trainer.threads=1",
    "tracking=none",
]


def moderator_export(
    folder: Path, *, seed: int = 0, heads: tuple[str, ...] = ("category", "severity"), **extra: Any
) -> Path:
    """A random moderator of two small layers that knows the toy world's words; its thresholds are fitted to nothing."""
    tokenizer = load_tokenizer(backbone_config(), vocabulary=vocabulary())
    architecture = {**(backbone_config().architecture or {}), "max_position_embeddings": 128}
    ids = {"vocabulary_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    trunk = load_backbone(
        backbone_config(architecture=architecture), lm_head=False, eos_token_id=tokenizer.eos_token_id, seed=seed, **ids
    )
    widths = {"unsafe": 1} | {name: {"category": 19, "severity": 3}[name] for name in heads}
    model = ScoreModel(trunk, widths, "mean", seed=seed)
    with torch.no_grad():  # fresh weights are so small that all scores look alike
        for parameter in model.parameters():
            parameter.mul_(8)
    names = PKU_CATEGORIES if "category" in heads else ()
    calibration = Calibration(names, 2.0, 1.5, 3.0, 0.45, (0.4,) * len(names), (0.4, 0.6), rows=9, fitted_on="val")
    metadata = ExportMetadata(
        "moderator", max_length=128, categories=list(names), calibration=calibration.to_dict(), **extra
    )
    save_export(folder, model=model, tokenizer=tokenizer, metadata=metadata)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "moderator": moderator_export(folder / "moderator"),
        "unsafe_only": moderator_export(folder / "unsafe_only", heads=()),
        "of_prompts": moderator_export(folder / "of_prompts", input="prompt"),
        "cost": export(folder / "cost", "cost"),
        "reward": export(folder / "reward", "reward"),
    }


def evaluate(outputs: Path, *words: str) -> Answer:
    keyed = {word.partition("=")[0]: word for word in (*FEW, f"output_root={outputs}", *words)}  # the last one counts
    return call("evaluate", *keyed.values())


def only(outputs: Path) -> Path:
    (folder,) = (outputs / "evaluate").iterdir()
    return folder


def metrics_of(outputs: Path) -> dict[str, float]:
    return json.loads((only(outputs) / "metrics.json").read_text())


def heads_one_by_one(model: Path, prompts: list[str], responses: list[str | None]) -> dict[str, np.ndarray]:
    """Raw outputs of each head, every row alone, through the tokenizer's own template."""
    loaded = load_export(str(model))
    found: dict[str, list[np.ndarray]] = {}
    for prompt, response in zip(prompts, responses, strict=True):
        turns = [{"role": "user", "content": prompt}]
        turns += [] if response is None else [{"role": "assistant", "content": response}]
        ids = loaded.tokenizer.apply_chat_template(turns, return_dict=False, add_generation_prompt=response is None)
        scores = loaded.model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
        for head, value in scores.items():
            found.setdefault(head, []).append(value.detach().double().numpy()[0])
    return {head: np.array(values) for head, values in found.items()}


def own_answers(path: Path, count: int = 30, **columns: Any) -> list[dict[str, Any]]:
    rows = [
        {"prompt": row.prompt[-1].content, "response": row.response, **columns}
        for row in question_answers(count, split="test", seed=5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


# ------------------------------------------------------------------------------------------------ score
def test_verdicts_are_measured_against_labels(tmp_outputs: Path, models: dict[str, Path]) -> None:
    """A second reading of scores and labels, through scikit-learn, gives the same numbers."""
    answer = evaluate(tmp_outputs, "suite=moderation", f"model={models['moderator']}", "data.train_rows=800")
    assert answer.code == 0, answer.err
    found = metrics_of(tmp_outputs)
    rows = list(question_answers(40, split="test", seed=0))
    heads = heads_one_by_one(models["moderator"], [r.prompt[-1].content for r in rows], [r.response for r in rows])
    p = 1 / (1 + np.exp(-heads["unsafe"][:, 0] / 2.0))
    truth = np.array([not row.is_safe for row in rows])
    assert 0 < (p >= 0.45).mean() < 1
    assert found["test/unsafe/macro_f1"] == pytest.approx(sk.f1_score(truth, p >= 0.45, average="macro"))
    assert found["test/unsafe/auroc"] == pytest.approx(sk.roc_auc_score(truth, p), abs=1e-6)
    assert found["test/unsafe/nll"] == pytest.approx(sk.log_loss(truth, p), abs=1e-4)
    category = 1 / (1 + np.exp(-heads["category"] / 1.5))
    said = (category >= 0.4) & (p >= 0.45)[:, None]
    labels = np.array([[name in row.harm_category for name in PKU_CATEGORIES] for row in rows])
    assert found["test/category/exact_match"] == pytest.approx((said == labels).all(axis=1).mean())
    assert found["test/severity/accuracy_n"] == 40
    for baseline in ("constant", "length", "tfidf"):
        for name in ("unsafe/macro_f1", "severity/quadratic_kappa", "category/exact_match"):
            area = f"test/baseline_{baseline}/{name}"
            assert found[f"{area}_low"] <= found[area] <= found[f"{area}_high"]
    tfidf = found["test/unsafe/macro_f1"] - found["test/baseline_tfidf/unsafe/macro_f1"]
    assert found["test/over_tfidf/unsafe/macro_f1"] == pytest.approx(tfidf)
    # words tell the toy world's harm; lengths do not, and a random model does not
    assert found["test/baseline_tfidf/unsafe/auroc"] > 0.8
    assert found["test/over_tfidf/unsafe/auroc_high"] < 0
    for heading in ("TF-IDF", "const.", "length", "test/unsafe/macro_f1", "test/severity/quadratic_kappa"):
        assert heading in answer.out
    page = (only(tmp_outputs) / "report.html").read_text()
    for drawing in ("ROC of unsafe", "reliability of unsafe", "severity: labelled against decided", "harm categories"):
        assert f'aria-label="{drawing}"' in page
    assert (only(tmp_outputs) / "data_report.json").is_file()


def test_a_cost_model_says_unsafe_by_its_sign(tmp_outputs: Path, models: dict[str, Path]) -> None:
    answer = evaluate(tmp_outputs, "suite=moderation", f"model={models['cost']}", "baselines=false")
    assert answer.code == 0, answer.err
    found = metrics_of(tmp_outputs)
    assert {name.split("/")[1] for name in found} == {"unsafe"}
    rows = list(question_answers(40, split="test", seed=0))
    heads = heads_one_by_one(models["cost"], [r.prompt[-1].content for r in rows], [r.response for r in rows])
    truth = np.array([not row.is_safe for row in rows])
    assert found["test/unsafe/accuracy"] == pytest.approx(((heads["score"][:, 0] > 0) == truth).mean())


def test_suites_hold_what_fits_the_model(tmp_outputs: Path, models: dict[str, Path]) -> None:
    for kind, areas in {
        "cost": {"cost", "unsafe"},
        "reward": {"reward"},
        "unsafe_only": {"unsafe"},
    }.items():
        answer = evaluate(tmp_outputs, "suite=data", f"model={models[kind]}", f"name={kind}", "baselines=false")
        assert answer.code == 0, answer.err
        (folder,) = (tmp_outputs / kind).iterdir()
        found = json.loads((folder / "metrics.json").read_text())
        assert {name.split("/")[1] for name in found} == areas
        assert (folder / "data_report_moderation.json").exists() == (kind == "cost")
    for model, words, says in (
        ("moderator", ["suite=preference"], "is a moderator model and suite=preference is for reward and cost models"),
        ("reward", ["suite=moderation"], "is a reward model and suite=moderation is for moderator and cost models"),
        ("reward", ["mode=moderate"], "is a reward model and mode=moderate is for moderator and cost models"),
    ):
        answer = evaluate(tmp_outputs, f"model={models[model]}", "name=refused", *words)
        assert answer.code == 2 and says in answer.error
    assert not (tmp_outputs / "refused").exists()


def test_pairs_are_judged_response_by_response(tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    rows = [
        {
            "prompt": row.prompt[-1].content,
            "response_0": row.response_0,
            "response_1": row.response_1,
            "is_response_0_safe": row.is_response_0_safe,
            "is_response_1_safe": row.is_response_1_safe,
            "safer_response_id": row.safer_response_id,
        }
        for row in preference_pairs(60, split="test", seed=0)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=jsonl", f"data.path={path}", "data.test_fraction=0.4", "data.train_rows=null", "data.test_rows=null"]
    answer = evaluate(tmp_outputs, "suite=moderation", f"model={models['unsafe_only']}", *data)
    assert answer.code == 0, answer.err
    found = metrics_of(tmp_outputs)
    assert 30 < found["test/unsafe/accuracy_n"] <= 60
    assert "test/baseline_tfidf/unsafe/auroc" in found


@pytest.mark.parametrize(("kind", "extra"), [("reward", set()), ("cost", {"sign_accuracy", "auroc"})])
def test_pair_baselines(tmp_outputs: Path, models: dict[str, Path], kind: str, extra: set[str]) -> None:
    answer = evaluate(
        tmp_outputs, "suite=preference", f"model={models[kind]}", "data.train_rows=2000", "data.test_rows=400"
    )
    assert answer.code == 0, answer.err
    found = metrics_of(tmp_outputs)
    for baseline in ("constant", "longer", "tfidf"):
        assert 0 <= found[f"test/baseline_{baseline}/{kind}/pair_accuracy"] <= 1
    rows = list(preference_pairs(400, split="test", seed=0))
    preference = "safer" if kind == "cost" else "better"
    longer = []
    for row in rows:
        words = [len(text.split()) for text in (row.response_0, row.response_1)]
        winner = getattr(row, f"{preference}_response_id")
        longer.append(0.5 if words[0] == words[1] else float(words[winner] > words[1 - winner]))
    assert found[f"test/baseline_longer/{kind}/pair_accuracy"] == pytest.approx(np.mean(longer))
    assert found[f"test/baseline_tfidf/{kind}/pair_accuracy"] > 0.55
    for name in extra:
        assert found[f"test/baseline_tfidf/cost/{name}"] > 0.6
    assert not extra or found["test/baseline_constant/cost/sign_accuracy"] > 0


def test_a_moderator_of_prompts_is_held_against_prompts(
    tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]
) -> None:
    path = tmp_path / "answers.jsonl"
    texts = [row.response for row in question_answers(30, split="test", seed=5)]
    rows = [
        {"prompt": f"{texts[i // 3]}", "response": texts[i], "is_safe": i % 3 != 0 or i % 2 == 0} for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=jsonl", f"data.path={path}", "split=all", "data.train_rows=null", "data.test_rows=null"]
    answer = evaluate(tmp_outputs, "suite=moderation", f"model={models['of_prompts']}", *data, "data.val_rows=null")
    assert answer.code == 0, answer.err
    found = metrics_of(tmp_outputs)
    assert found["all/unsafe/accuracy_n"] == len({row["prompt"] for row in rows})
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    heads = heads_one_by_one(models["of_prompts"], prompts, [None] * len(prompts))
    truth = [not all(row["is_safe"] for row in rows if row["prompt"] == prompt) for prompt in prompts]
    assert found["all/unsafe/auroc"] == pytest.approx(sk.roc_auc_score(truth, heads["unsafe"][:, 0]))
    assert not [name for name in found if "baseline" in name]  # the training rows are among those judged


@pytest.mark.parametrize(
    ("named", "says", "measured"),
    [
        ({"made_up": True, "other": False}, "categories are not measured, the rows have 'made_up'", None),
        ({"self_harm": True, "animal_abuse": False}, "verdicts on 19 categories are read as", "animal_abuse"),
    ],
)
def test_rows_of_another_taxonomy(
    tmp_outputs: Path,
    tmp_path: Path,
    models: dict[str, Path],
    named: dict[str, bool],
    says: str,
    measured: str | None,
) -> None:
    """BeaverTails' categories are met half way, as far as there are counterparts; anybody else's are not measured."""
    rows = own_answers(tmp_path / "rows.jsonl", is_safe=False, harm_category=named)
    other = {"animal_abuse": True} if measured else named
    rows += [row | {"response": f"{row['response']} {row['response']}", "harm_category": other} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}", "split=all", "baselines=false"]
    answer = evaluate(tmp_outputs, "suite=moderation", f"model={models['moderator']}", *data)
    assert answer.code == 0, answer.err
    assert says in answer.err
    found = metrics_of(tmp_outputs)
    assert {name.split("/")[1] for name in found} == {"unsafe"} | ({"category"} if measured else set())
    if measured:
        p = heads_one_by_one(models["moderator"], [r["prompt"] for r in rows], [r["response"] for r in rows])
        unsafe = 1 / (1 + np.exp(-p["unsafe"][:, 0] / 2.0)) >= 0.45
        column = PKU_CATEGORIES.index("Animal Abuse")
        said = (1 / (1 + np.exp(-p["category"][:, column] / 1.5)) >= 0.4) & unsafe
        truth = np.array([row["harm_category"] == {"animal_abuse": True} for row in rows])
        assert found["all/category/support_animal_abuse"] == truth.sum()
        assert found["all/category/recall_animal_abuse"] == pytest.approx(said[truth].mean())


def test_rows_without_labels_are_refused(tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    own_answers(tmp_path / "rows.jsonl")
    data = ["data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}"]
    answer = evaluate(tmp_outputs, "suite=moderation", f"model={models['moderator']}", *data)
    assert answer.code == 2 and "the task needs the column 'is_safe'" in answer.error


def test_a_damaged_calibration_is_refused(tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(models["moderator"], broken)
    metadata = json.loads((broken / "saferlhf.json").read_text())
    metadata["calibration"].pop("thresholds_severity")
    (broken / "saferlhf.json").write_text(json.dumps(metadata))
    answer = evaluate(tmp_outputs, "suite=moderation", f"model={broken}")
    assert answer.code == 2 and "damaged calibration" in answer.err


# ------------------------------------------------------------------------------------------------ moderate
def verdicts_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]


def test_unlabelled_rows_are_judged(tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    path = tmp_path / "rows.jsonl"
    rows = own_answers(path, 25)
    with path.open("a") as stream:  # a row that stands twice, and a record that is no row
        stream.write(json.dumps(rows[3]) + "\n" + json.dumps({"prompt": 7, "response": None}) + "\n")
    answer = evaluate(tmp_outputs, "mode=moderate", f"model={models['moderator']}", "data=jsonl", f"data.path={path}")
    assert answer.code == 0, answer.err
    found = verdicts_of(only(tmp_outputs))
    places = [f"{path}:{i + 1}" for i, row in enumerate(rows) if row not in rows[:i]]
    assert [line["place"] for line in found] == places
    assert len({line["row_id"] for line in found}) == len(found)
    heads = heads_one_by_one(models["moderator"], [r["prompt"] for r in rows], [r["response"] for r in rows])
    p = 1 / (1 + np.exp(-heads["unsafe"][:, 0] / 2.0))
    kept = [i for i, row in enumerate(rows) if row not in rows[:i]]
    assert [line["p_unsafe"] for line in found] == pytest.approx(p[kept].tolist(), abs=1e-4)
    for line in found:
        assert line["unsafe"] == (line["p_unsafe"] >= 0.45)
        assert line["unsafe"] == (line["severity"] > 0) == bool(line["categories"])
        assert sum(line["p_severity"]) == pytest.approx(1, abs=1e-5)
        assert list(line["p_category"]) == list(PKU_CATEGORIES)
    text = (only(tmp_outputs) / "verdicts.jsonl").read_text()
    assert not any(row["response"] in text for row in rows)
    metrics = metrics_of(tmp_outputs)
    assert metrics["moderate/rows"] == len(found)
    assert metrics["moderate/records_left_out"] == 1
    assert metrics["moderate/unsafe/predicted_rate"] == pytest.approx(np.mean([line["unsafe"] for line in found]))
    assert "1 records are no rows" in answer.err and str(only(tmp_outputs) / "verdicts.jsonl") in answer.out
    again = evaluate(tmp_outputs, "mode=moderate", f"model={models['moderator']}", "data=jsonl", f"data.path={path}")
    assert again.err.startswith("finished before") and again.out == answer.out


def test_judging_goes_on_where_it_was_stopped(tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    """No row is judged twice; a torn line is written again; the file is the one of an undisturbed run."""
    path = tmp_path / "rows.jsonl"
    own_answers(path, 60)
    words = ["mode=moderate", f"model={models['moderator']}", "data=jsonl", f"data.path={path}"]
    words += ["trainer.eval_batch_size=1"]  # parts of 32 rows
    assert evaluate(tmp_outputs, *words, "name=whole").code == 0
    (whole,) = (tmp_outputs / "whole").iterdir()
    from saferlhf.run import row_judge

    real, judged = row_judge.moderate_rows, []

    def stops(model: Any, data: Any, **options: Any) -> ModerationLogits:
        if judged:
            raise KeyboardInterrupt
        judged.extend(row.id for row in data.rows)
        return real(model, data, **options)

    with mock.patch.object(row_judge, "moderate_rows", stops):
        assert evaluate(tmp_outputs, *words).code == 130
    folder = only(tmp_outputs)
    assert RunFolder(folder).status()["status"] == "killed"
    part = folder / "verdicts.part.jsonl"
    assert len(part.read_text().splitlines()) == len(judged) == 32
    part.write_text(part.read_text()[:-40])  # as if killed in the middle of a line

    def notes(model: Any, data: Any, **options: Any) -> ModerationLogits:
        judged.extend(row.id for row in data.rows)
        return real(model, data, **options)

    with mock.patch.object(row_judge, "moderate_rows", notes):
        answer = evaluate(tmp_outputs, *words)
    assert answer.code == 0, answer.err
    assert "31 of them done before" in answer.err
    assert judged[:31] + judged[32:] == [line["row_id"] for line in verdicts_of(whole)]
    assert judged[31] == judged[32]
    found, expected = verdicts_of(folder), verdicts_of(whole)
    assert [line["row_id"] for line in found] == [line["row_id"] for line in expected]
    assert [line["p_unsafe"] for line in found] == pytest.approx([line["p_unsafe"] for line in expected], abs=1e-5)
    assert not part.exists()


def test_unfinished_verdicts_of_other_rows_are_not_continued(
    tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]
) -> None:
    path = tmp_path / "rows.jsonl"
    own_answers(path, 5)
    words = ["mode=moderate", f"model={models['cost']}", "data=jsonl", f"data.path={path}"]
    assert evaluate(tmp_outputs, *words).code == 0
    folder = only(tmp_outputs)
    lines = verdicts_of(folder)
    assert "severity" not in lines[0] and "categories" not in lines[0]
    lines[0]["row_id"] = "another"
    (folder / "verdicts.part.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    RunFolder(folder).update_status(status="killed")
    answer = evaluate(tmp_outputs, *words)
    assert answer.code == 2 and "the unfinished verdicts are not of these rows" in answer.error


def test_prompts_alone_are_judged(tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    path = tmp_path / "prompts.jsonl"
    prompts = [row.prompt[-1].content for row in question_answers(8, split="test", seed=5)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    words = ["mode=moderate", f"model={models['of_prompts']}", "data=jsonl", f"data.path={path}"]
    answer = evaluate(tmp_outputs, *words)
    assert answer.code == 0, answer.err
    once = list(dict.fromkeys(prompts))
    heads = heads_one_by_one(models["of_prompts"], once, [None] * len(once))
    p = 1 / (1 + np.exp(-heads["unsafe"][:, 0] / 2.0))
    assert [line["p_unsafe"] for line in verdicts_of(only(tmp_outputs))] == pytest.approx(p.tolist(), abs=1e-4)
