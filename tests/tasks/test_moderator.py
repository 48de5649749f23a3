"""The moderator: its loss row by row, its heads by the data, its calibration from validation rows only."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import config, make_cheap, metrics, only_run, prepared, small
from torch import Tensor
from torch.nn import functional as F

from saferlhf.data.encode import EncodedAnswers
from saferlhf.errors import UserError
from saferlhf.evaluation.moderate import moderate_rows
from saferlhf.models.loading import load_export
from saferlhf.models.moderator import calibration_of
from saferlhf.ops.calibration import Calibration, decide
from saferlhf.run import measure_moderator as measuring
from saferlhf.run.measure import measure
from saferlhf.run.stages import fit
from saferlhf.run.train import train
from saferlhf.tracking.base import NullLogger

HELD_OUT = ("data.val_rows=60", "data.test_rows=40")


def ready(*overrides: str) -> Any:
    """A moderator of random weights on the toy world."""
    run = prepared(small("task=moderator", *overrides))
    run.task.configure_model()
    return run


@pytest.fixture(autouse=True, scope="module")
def _cheap_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        make_cheap(patch.setattr)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    outputs = tmp_path_factory.mktemp("outputs")
    train(config(small("task=moderator", *HELD_OUT, f"output_root={outputs}")))
    return only_run(outputs)


# ------------------------------------------------------------------------------------------------ loss and scores
@torch.no_grad()
def test_the_loss_row_by_row(tmp_path: Path) -> None:
    """Each row alone and unpadded, from plain formulas in float64."""
    weights = ("task.unsafe_weight=2", "task.head_weights={unsafe: 0.5, category: 2, severity: 3}")
    levels = ("task.severity_weighting=[1,2,3,4]", "task.category_weighting=sqrt")
    run = ready(*weights, *levels, f"output_root={tmp_path}")
    labels = run.encoded.labels(run.encoded.train)
    positives = (labels.category == 1).sum(axis=0)
    of_category = [max(1.0, ((20 - n) / n) ** 0.5) if n else 1.0 for n in positives]
    batch = run.encoded.train.collate([0, 3, 5, 7, 11])
    expected = 0.0
    for i in range(5):
        ids = batch.tokens.input_ids[i][batch.tokens.attention_mask[i]][None]
        scores = run.task.model(ids, torch.ones_like(ids), torch.zeros_like(ids))
        u, raw = scores["unsafe"].double().squeeze(), scores["severity"].double().squeeze()
        bad, level = int(batch.unsafe[i]), int(batch.severity[i])
        expected += 0.5 * (2.0 if bad else 1.0) * float(F.softplus(-u if bad else u))
        for c, logit in enumerate(scores["category"].double().squeeze()):
            has = int(batch.category[i, c])
            expected += 2.0 * (of_category[c] if has else 1.0) * float(F.softplus(-logit if has else logit))
        tail = [1.0, *raw_tail(raw), 0.0]
        expected -= 3.0 * (level + 1) * math.log(tail[level] - tail[level + 1])
    loss, terms = run.task.loss_sum(batch)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert set(terms) == {"unsafe_loss", "category_loss", "severity_loss"}
    assert run.task.count(batch) == 5


def raw_tail(raw: Tensor) -> list[float]:
    """P(severity >= 1, 2, 3) of one row, step by step."""
    g = [float(raw[0])]
    for k in (1, 2):
        g.append(g[-1] - math.log1p(math.exp(float(raw[k]))))
    return [1 / (1 + math.exp(-x)) for x in g]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_scores_do_not_depend_on_padding(pooling: str, tmp_path: Path) -> None:
    run = ready(f"task.pooling={pooling}", f"output_root={tmp_path}")
    run.task.model.eval()
    batch = run.encoded.train.collate(range(6))
    together = run.task.scores(batch)
    left = replace(
        batch,
        tokens=replace(
            batch.tokens,
            **{
                name: F.pad(getattr(batch.tokens, name), (3, 1), value=7 if name == "input_ids" else False)
                for name in ("input_ids", "attention_mask", "response_mask")
            },
        ),
    )
    for i in range(6):
        alone = run.task.scores(run.encoded.train.collate([i]))
        for name, values in together.items():
            torch.testing.assert_close(alone[name][0], values[i], atol=1e-5, rtol=0)
            torch.testing.assert_close(run.task.scores(left)[name][i], values[i], atol=1e-5, rtol=0)


def test_it_is_trained_in_training_mode_and_learns(tmp_path: Path) -> None:
    run = prepared(
        small(
            "task=moderator",
            "data.train_rows=40",
            "optimizer.lr=0.02",
            "trainer.max_steps=40",
            "schedule=constant",
            f"output_root={tmp_path}",
        )
    )
    run.task.configure_model()
    assert all(module.training for module in run.task.modules())
    before = float(run.task.loss_sum(run.encoded.train.collate(range(40)))[0].detach())
    fit(run, NullLogger())
    after = float(run.task.loss_sum(run.encoded.train.collate(range(40)))[0].detach())
    assert after < 0.5 * before
    seen = set(run.task.last_validation)
    assert seen >= {"val/loss", "val/unsafe/macro_f1", "val/severity/accuracy", "val/category/exact_match"}
    assert all(module.training for module in run.task.modules())


def test_validation_metrics_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.metrics import cohen_kappa_score, f1_score, roc_auc_score

    run = ready(*HELD_OUT, f"output_root={tmp_path}")
    run.task.model.eval()
    val = run.encoded.val
    with torch.no_grad():
        parts = [run.task.outputs(val.collate(part)) for part in np.array_split(np.arange(len(val)), 3)]
    found = run.task.validation_metrics(parts)
    labels = run.encoded.labels(val)
    verdicts = decide(moderate_rows(run.task.model, val), Calibration.default(labels.categories))
    assert found["unsafe/macro_f1"] == pytest.approx(f1_score(labels.unsafe, verdicts.unsafe, average="macro"))
    assert found["unsafe/auroc"] == pytest.approx(roc_auc_score(labels.unsafe, verdicts.p_unsafe))
    assert found["severity/accuracy"] == pytest.approx((labels.severity == verdicts.severity).mean())
    kappa = cohen_kappa_score(labels.severity, verdicts.severity, weights="quadratic")
    assert found["severity/quadratic_kappa"] == pytest.approx(kappa)
    exact = ((labels.category == 1) == verdicts.category).all(axis=1).mean()
    assert found["category/exact_match"] == pytest.approx(exact)


# ------------------------------------------------------------------------------------------------ heads by the data
def own_answers(path: Path, tags: list[str], count: int = 60) -> str:
    """Answers with safety and categories, without severity, in words the small model knows."""
    draw = random.Random(0)
    lines = []
    for i in range(count):
        safe = draw.random() < 0.5
        text = [" ".join(f"w{draw.randrange(59)}" for _ in range(6)) for _ in range(2)]
        record = {"prompt": text[0], "response": text[1], "is_safe": safe}
        record["category"] = {tag: not safe and i % len(tags) == t for t, tag in enumerate(tags)}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_heads_that_the_data_do_not_label_do_not_exist(tmp_path: Path) -> None:
    from models.tiny_models import folder_of

    from saferlhf.data.taxonomy import BEAVERTAILS_CATEGORIES

    path = own_answers(tmp_path / "rows.jsonl", list(BEAVERTAILS_CATEGORIES))
    columns = "data.columns={prompt: prompt, response: response, is_safe: is_safe, harm_category: category}"
    mine = [o for o in small("data=jsonl", f"data.path={path}", columns) if "architecture" not in o]
    mine = [o for o in mine if not o.startswith(("data.train_rows", "data.val_rows", "data.test_rows"))]
    words = tmp_path / "model"
    more = ["backbone=hf", f"backbone.model={folder_of(words, max_position_embeddings=256)}", "data.val_fraction=0.2"]
    run = prepared([*mine, *more, "task=moderator", "optimizer.lr=0.001", f"output_root={tmp_path}"])
    run.task.configure_model()
    assert run.task.model.head_widths == {"unsafe": 1, "category": 14}
    found = measure(run)
    assert not any("/severity/" in name for name in found.metrics)
    assert {"test/unsafe/macro_f1", "test/category/exact_match"} <= set(found.metrics)
    assert found.calibration is not None and found.calibration.categories == BEAVERTAILS_CATEGORIES
    assert "severity" not in found.samples[0]


def test_categories_by_name(tmp_path: Path) -> None:
    run = ready("task.categories=[Drugs,Violence]", f"output_root={tmp_path}")
    assert run.task.model.head_widths["category"] == 2
    assert run.encoded.categories == ("Drugs", "Violence")


def test_rows_of_one_kind_are_refused(tmp_path: Path) -> None:
    run = prepared(small("task=moderator", "data.train_rows=1", f"output_root={tmp_path}"))
    with pytest.raises(UserError, match="same safety label"):
        run.task.configure_model()


def test_prompts_alone(tmp_path: Path) -> None:
    run = ready("task.input=prompt", "data.train_rows=40", f"output_root={tmp_path}")
    train = run.encoded.train
    assert len({row.prompt for row in train.rows}) == len(train.rows) <= 40
    assert not train.collate(range(len(train))).tokens.response_mask.any()
    result = measure(run)
    assert result.metrics["test/unsafe/accuracy_n"] == len(run.encoded.test)


def test_proportional_odds(tmp_path: Path) -> None:
    run = prepared(small("task=moderator", "task.severity_link=proportional", f"output_root={tmp_path}"))
    fit(run, NullLogger())
    assert (run.task.model.heads["severity"].weight[1:] == 0).all()


# ------------------------------------------------------------------------------------------------ calibration
def test_thresholds_never_see_the_test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ready(*HELD_OUT, f"output_root={tmp_path}")
    seen: list[int] = []

    def watched(logits: Any, labels: Any, *more: Any, **options: Any) -> Calibration:
        seen.append(len(labels))
        return fitted(logits, labels, *more, **options)

    fitted = measuring.fit_calibration
    monkeypatch.setattr(measuring, "fit_calibration", watched)
    first = measure(run)
    assert seen == [60] and first.calibration is not None
    # other test rows, with the opposite labels: the same calibration
    rows = [replace(row, is_safe=not row.is_safe) for row in run.encoded.test.rows[:10]]
    run.encoded.test = first_answers(run.encoded.test, rows)
    second = measure(run)
    assert second.calibration == first.calibration
    assert second.metrics["test/unsafe/accuracy"] != first.metrics["test/unsafe/accuracy"]


def first_answers(data: EncodedAnswers, rows: list[Any]) -> EncodedAnswers:
    return replace(data, rows=rows, store=data.store.select(np.arange(len(rows))), truncated=data.truncated[:10])


def test_all_validation_rows_serve_the_calibration_however_few_are_measured(tmp_path: Path) -> None:
    run = ready(*HELD_OUT, "evaluation.max_rows=5", f"output_root={tmp_path}")
    found = measure(run)
    assert found.calibration is not None and found.calibration.rows == 60
    assert found.metrics["val/unsafe/accuracy_n"] == found.metrics["test/unsafe/accuracy_n"] == 5
    assert len(found.samples) == 5


def test_without_validation_rows_nothing_is_calibrated_and_the_card_says_so(tmp_path: Path) -> None:
    from saferlhf.models.card import model_card
    from saferlhf.models.metadata import ExportMetadata

    run = ready(f"output_root={tmp_path}")
    run.encoded.val = first_answers(run.encoded.val, [])
    found = measure(run)
    assert found.calibration == Calibration.default(run.encoded.categories)
    run.encoded.test = run.encoded.val
    nothing = measure(run)
    assert nothing.calibration == found.calibration and not nothing.metrics
    heads = run.task.model.head_widths
    bare = ExportMetadata("moderator", heads=heads, calibration=found.calibration.to_dict())
    assert "Not calibrated" in model_card(bare, name="x")


# ------------------------------------------------------------------------------------------------ a finished run
def test_a_run_measures_what_scripts_rely_on(finished: Path) -> None:
    found = metrics(finished)
    names = ["unsafe/macro_f1", "unsafe/auroc", "severity/accuracy", "severity/quadratic_kappa", "category/exact_match"]
    for name in names:
        low, value, high = (found[f"test/{name}{ending}"] for ending in ("_low", "", "_high"))
        assert low <= value <= high, name
        assert f"val/{name}" in found
    assert (finished / "report.html").stat().st_size


def test_the_export_gives_the_verdicts_of_the_run(finished: Path, tmp_path: Path) -> None:
    loaded = load_export(str(finished / "export"))
    calibration = calibration_of(loaded.metadata, "export")
    assert loaded.metadata.input == "prompt_and_response"
    assert loaded.metadata.categories == list(calibration.categories) and len(calibration.categories) == 19
    assert calibration.fitted_on == "val" and calibration.rows == 60
    run = prepared(small("task=moderator", *HELD_OUT, f"output_root={tmp_path}"))
    verdicts = decide(moderate_rows(loaded.model, run.encoded.test), calibration)
    lines = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [line["row_id"] for line in lines] == [row.id for row in run.encoded.test.rows]
    assert [line["unsafe"] for line in lines] == verdicts.unsafe.tolist()
    assert [line["severity"] for line in lines] == verdicts.severity.tolist()
    assert [len(line["categories"]) for line in lines] == verdicts.category.sum(axis=1).tolist()
    np.testing.assert_allclose([line["p_unsafe"] for line in lines], verdicts.p_unsafe, atol=1e-6)
    assert all((line["severity"] > 0) == line["unsafe"] == bool(line["categories"]) for line in lines)
    card = (finished / "export" / "README.md").read_text()
    assert "Fitted on 60 rows (val), never on test rows" in card
