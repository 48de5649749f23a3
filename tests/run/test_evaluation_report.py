"""What `evaluate.py` puts into its report: samples, curves of the training, where the numbers come from."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from command_lines import call
from test_cli_moderation import moderator_export
from test_evaluate_policy import FEW, export, only, run_with_curves

from saferlhf.data.rows import prompt_text
from saferlhf.data.toyworld import question_answers
from saferlhf.evaluation.report_samples import WARNING


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"sft": export(folder / "sft", "sft"), "ppo": export(folder / "ppo", "ppo", seed=1)}


def test_the_report_of_a_policy(tmp_outputs: Path, models: dict[str, Path]) -> None:
    run = run_with_curves(tmp_outputs / "ppo" / "0123456789", models)
    words = [f"model={run}", f"baseline={models['sft']}"]
    answer = call("evaluate", *FEW, f"output_root={tmp_outputs}", *words)
    assert answer.code == 0, answer.err
    folder = only(tmp_outputs)
    page = (folder / "report.html").read_text()
    before, _, inside = page.partition('<details class="samples">')
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    responses = {line["response"] for line in lines if len(line["response"]) > 20}
    assert responses and not any(response in before for response in responses)
    assert sum(response in inside for response in responses) >= 12 and WARNING in inside
    assert "lambda over training" in page
    assert "truth: the toy world&#x27;s ground truth" in page and "Provenance" in page
    # the command in the page finds the same evaluation
    command = page.partition('<pre class="command">')[2].partition("</pre>")[0].replace("&#x27;", "'")
    again = call("evaluate", f"output_root={tmp_outputs}", "tracking=none", *shlex.split(command)[2:])
    assert again.code == 0 and f"finished before: {folder}" in again.err


def test_a_page_that_is_sent_away_holds_no_response(tmp_outputs: Path, models: dict[str, Path]) -> None:
    sent: list[str] = []

    def keep(path: Any, *_: Any) -> None:
        if Path(path).name == "report.html":
            sent.append(Path(path).read_text())

    few = [word for word in FEW if word != "tracking=none"]
    tracker = mock.Mock(run_id=None, log_artifact=keep)
    with mock.patch("saferlhf.tracking.build_logger", return_value=tracker):
        words = [f"model={models['ppo']}", "tracking=mlflow", "tracking.uri=http://127.0.0.1:9"]
        assert call("evaluate", *few, f"output_root={tmp_outputs}", *words).code == 0
    (page,) = sent
    assert "stay on the machine" in page and '<details class="samples">' not in page
    lines = [json.loads(line) for line in (only(tmp_outputs) / "samples.jsonl").read_text().splitlines()]
    assert not any(line["response"] in page for line in lines if len(line["response"]) > 20)


def test_the_report_of_a_moderator_names_its_files(tmp_outputs: Path, tmp_path: Path) -> None:
    model = moderator_export(tmp_path / "moderator")
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for qa in question_answers(20, split="test", seed=3):
            row = {"prompt": prompt_text(qa.prompt), "response": qa.response, "is_safe": qa.is_safe}
            file.write(json.dumps(row) + "\n")
    words = ["suite=moderation", f"model={model}", "data=jsonl", f"data.path={rows}", "split=all", "baselines=false"]
    few = ["evaluation.bootstrap_draws=50", "trainer.threads=1", "trainer.progress=none", "tracking=none"]
    answer = call("evaluate", *few, f"output_root={tmp_outputs}", *words)
    assert answer.code == 0, answer.err
    page = (only(tmp_outputs) / "report.html").read_text()
    assert hashlib.sha256(rows.read_bytes()).hexdigest() in page
    assert "held-out rows (val); unsafe from p = " in page and "git commit" in page
    assert "precision and recall of unsafe" in page and "samples.jsonl" not in page
