"""`evaluate.py protocol=...` and `suite=all` in this process: small models, files in the layouts of the real sets."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from command_lines import Answer, call
from sklearn import metrics as sk
from test_cli_evaluate import export
from test_cli_moderation import heads_one_by_one, moderator_export

from saferlhf.data.toyworld import question_answers
from saferlhf.evaluation import judgements

FEW = ["evaluation.bootstrap_draws=50", "trainer.threads=1", "tracking=none"]
TEXTS = [row.response for row in question_answers(30, split="test", seed=3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "moderator": moderator_export(folder / "moderator"),
        "of_prompts": moderator_export(folder / "of_prompts", input="prompt"),
        "reward": export(folder / "reward", "reward"),
        "cost": export(folder / "cost", "cost"),
    }


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """HateCheck's and XSTest's files with the toy world's words."""
    root = tmp_path / "data"
    tables: dict[str, list[dict[str, Any]]] = {
        "hatecheck/test_suite_cases.csv": [
            {
                "functionality": f"f{i % 3}",
                "case_id": i,
                "test_case": text,
                "label_gold": "hateful" if i % 2 else "non-hateful",
            }
            for i, text in enumerate(TEXTS)
        ],
        "xstest/xstest_prompts.csv": [
            {"id": i, "prompt": text, "type": f"t{i % 2}", "label": "unsafe" if i % 2 else "safe"}
            for i, text in enumerate(TEXTS)
        ],
    }
    for name, rows in tables.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return root


def evaluate(outputs: Path, *words: str) -> Answer:
    return call("evaluate", *FEW, f"output_root={outputs}", *words)


def only(outputs: Path, name: str = "evaluate") -> Path:
    (folder,) = (outputs / name).iterdir()
    return folder


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_a_protocol_of_texts_alone(tmp_outputs: Path, data_root: Path, models: dict[str, Path]) -> None:
    """A moderator of answers reads each text as an answer to nothing, which is said; a second reading agrees."""
    answer = evaluate(tmp_outputs, "protocol=hatecheck", f"model={models['moderator']}", f"data.root={data_root}")
    assert answer.code == 0, answer.err
    assert "off-protocol" in answer.out and "no baselines" in answer.err
    folder = only(tmp_outputs)
    (result,) = read(folder, "protocols.json")["results"]
    heads = heads_one_by_one(models["moderator"], [""] * 30, list(TEXTS))
    truth = np.arange(30) % 2 == 1
    value = result["values"]["unsafe/auroc"]["value"]
    assert value == pytest.approx(sk.roc_auc_score(truth, heads["unsafe"][:, 0]), abs=1e-6)
    found = read(folder, "metrics.json")
    assert found["hatecheck/unsafe/auroc"] == value
    assert found["hatecheck/by_functionality/f1_accuracy_n"] == 10
    assert result["rows"] == 30 and result["published_rows"] == 3728
    kept = judgements.load(folder / "judgements" / "hatecheck.npz")
    assert len(kept) == 30 and len(set(kept.prompts.tolist())) == 30  # texts are not all one prompt
    page = (folder / "report.html").read_text()
    assert "hatecheck" in page and "off-protocol" in page
    again = evaluate(tmp_outputs, "protocol=hatecheck", f"model={models['moderator']}", f"data.root={data_root}")
    assert "finished before" in again.err and "hatecheck" in again.out


def test_a_moderator_of_prompts_is_on_protocol(tmp_outputs: Path, data_root: Path, models: dict[str, Path]) -> None:
    answer = evaluate(tmp_outputs, "protocol=xstest_prompts", f"model={models['of_prompts']}", f"data.root={data_root}")
    assert answer.code == 0, answer.err
    (result,) = read(only(tmp_outputs), "protocols.json")["results"]
    heads = heads_one_by_one(models["of_prompts"], list(TEXTS), [None] * 30)
    truth = np.arange(30) % 2 == 1
    assert result["marks"] == []
    assert result["values"]["unsafe/auroc"]["value"] == pytest.approx(
        sk.roc_auc_score(truth, heads["unsafe"][:, 0]), abs=1e-6
    )


def test_the_suite_measures_what_is_here(tmp_outputs: Path, data_root: Path, models: dict[str, Path]) -> None:
    with mock.patch("saferlhf.data.sources.locate.fetch", side_effect=AssertionError("the hub was asked")):
        answer = evaluate(tmp_outputs, "suite=all", f"model={models['cost']}", f"data.root={data_root}")
    assert answer.code == 0, answer.err
    content = read(only(tmp_outputs), "protocols.json")
    assert [result["protocol"] for result in content["results"]] == ["xstest_prompts", "hatecheck"]
    left_out = dict(content["left_out"])
    assert "no folder" in left_out["openai_moderation"] and "openai_moderation" in answer.out
    assert left_out["safe_rlhf_83"] == "for language models"
    assert len(content["results"]) + len(left_out) == 14
    drift = content["drift"]
    assert {line["protocol"]: line["domain"] for line in drift["lines"]} == dict.fromkeys(
        ("xstest_prompts", "hatecheck"), "off-protocol"
    )
    assert drift["home"] is None and drift["remark"] in answer.out
    assert "<h2>Drift</h2>" in (only(tmp_outputs) / "report.html").read_text()
    found = read(only(tmp_outputs), "metrics.json")
    assert {name.split("/")[0] for name in found} == {"xstest_prompts", "hatecheck"}


def test_baselines_learn_from_the_training_rows_of_another_set(
    tmp_outputs: Path, data_root: Path, tmp_path: Path, models: dict[str, Path]
) -> None:
    rows = [
        {
            "prompt": row.prompt[-1].content if i else TEXTS[0],
            "response_0": row.response,
            "response_1": TEXTS[i % 30],
            "is_response_0_safe": i % 2 == 0,
            "is_response_1_safe": i % 3 == 0,
        }
        for i, row in enumerate(question_answers(40, split="train", seed=9))
    ]
    path = data_root / "pku-saferlhf" / "train.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = evaluate(tmp_outputs, "protocol=hatecheck", f"model={models['moderator']}", f"data.root={data_root}")
    assert answer.code == 0, answer.err
    found = read(only(tmp_outputs), "metrics.json")
    (result,) = read(only(tmp_outputs), "protocols.json")["results"]
    assert found["hatecheck/baseline_tfidf/unsafe/auroc"] == result["values"]["unsafe/auroc"]["tfidf"]
    assert found["hatecheck/seen_prompt_rate"] == pytest.approx(1 / 30)  # the one text that is a training prompt
    assert found["hatecheck/unseen/unsafe/auroc_n"] == 29
    assert result["unseen"]["value"] == found["hatecheck/unseen/unsafe/auroc"]


def test_caps_depend_on_nothing_but_the_rows(tmp_outputs: Path, data_root: Path, models: dict[str, Path]) -> None:
    words = [f"model={models['moderator']}", f"data.root={data_root}", "protocol=hatecheck", "baselines=false"]
    ids = []
    for name, cap in (("few", ["protocol.max_rows=4", "protocol.per_group=true"]), ("more", ["protocol.max_rows=20"])):
        assert evaluate(tmp_outputs, *words, *cap, f"name={name}").code == 0
        ids.append(set(judgements.load(only(tmp_outputs, name) / "judgements" / "hatecheck.npz").row_ids.tolist()))
    assert len(ids[0]) == 12 and len(ids[1]) == 20
    found = read(only(tmp_outputs, "few"), "metrics.json")
    assert {found[f"hatecheck/by_functionality/f{i}_accuracy_n"] for i in range(3)} == {4}
    lines = (data_root / "hatecheck" / "test_suite_cases.csv").read_text().splitlines()
    (data_root / "hatecheck" / "test_suite_cases.csv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    assert evaluate(tmp_outputs, *words, "protocol.max_rows=20", "name=turned").code == 0
    turned = judgements.load(only(tmp_outputs, "turned") / "judgements" / "hatecheck.npz")
    assert set(turned.row_ids.tolist()) == ids[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["protocol=hatecheck", "model=REWARD"], "protocol=hatecheck is for moderator and cost models"),
        (["protocol=safe_rlhf_83", "model=MODERATOR"], "protocol=safe_rlhf_83 is for language models"),
        (["protocol=openai_moderation", "model=MODERATOR"], "no folder"),
        (["protocol=hatchek", "model=MODERATOR"], "there is no protocol 'hatchek'"),
        (["suite=all", "model=REWARD"], "no protocol can be measured"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    tmp_outputs: Path, data_root: Path, models: dict[str, Path], words: list[str], says: str
) -> None:
    named = [w.replace("REWARD", str(models["reward"])).replace("MODERATOR", str(models["moderator"])) for w in words]
    answer = evaluate(tmp_outputs, *named, f"data.root={data_root}")
    assert answer.code == 2 and says in answer.error, answer.err
    assert not list(tmp_outputs.iterdir())
