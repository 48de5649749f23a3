"""Guards of others and remote judges held against labelled answers, in the place of a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_lines import call, composed
from rollout.fake_server import Asked, says, serving
from rollout.test_chat_guard import TOKENIZER, tiny_llama
from sklearn import metrics as sk

from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.rollout_schema import judge_config
from saferlhf.config.validate import evaluate_config
from saferlhf.data.build import build_data
from saferlhf.data.rows import QuestionAnswer
from saferlhf.data.toyworld import question_answers
from saferlhf.errors import UserError
from saferlhf.ops.moderation import ModerationLogits
from saferlhf.rollout.chat_guard import load_guard
from saferlhf.rollout.scorers import ScoreRequest
from saferlhf.run.evaluate_moderation import measure_moderation
from saferlhf.run.judged_model import judged_model
from saferlhf.run.measured import Measured
from saferlhf.run.measurements import measurements_for
from saferlhf.run.row_judge import OutsideJudge, RowJudge, judge_of

FEW = ["evaluation.bootstrap_draws=50", "trainer.threads=1", "tracking=none", "data.test_rows=40", "data.train_rows=40"]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a chat template."""
    path = tmp_path_factory.mktemp("guard")
    model = tiny_llama()
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def config_of(*words: str) -> EvaluateConfig:
    return evaluate_config(composed("suite=moderation", *FEW, *words, command="evaluate"))


def of_guard(guard: Path, *words: str) -> EvaluateConfig:
    return config_of("judge=guard", f"judge.model={guard}", "judge.min_word_probability=0", *words)


def measured(config: EvaluateConfig) -> Measured:
    model = judged_model(config)
    (asked,), left_out = measurements_for(config, model)
    assert not left_out
    return measure_moderation(asked, model)


def rows_of(config: EvaluateConfig) -> list[QuestionAnswer]:
    return list(build_data(config.data, QuestionAnswer, ("is_safe",)).test)


def shares_of(config: EvaluateConfig, rows: list[QuestionAnswer]) -> tuple[np.ndarray, np.ndarray]:
    """(log odds, share of the softmax on verdict words) of each row, one by one, read by another way."""
    guard: Any = load_guard(judge_config(config.judge))  # type: ignore[arg-type]
    found = []
    for row in rows:
        ids, _, _ = guard._fitted(ScoreRequest(row.id, row.prompt, row.response), guard._question, guard._limit)
        with torch.no_grad():
            p = guard._model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1).numpy()
        unsafe, safe = p[guard._unsafe].sum(), p[guard._safe].sum()
        found.append((np.log(unsafe / safe), unsafe + safe))
    odds, shares = np.array(found).T
    return odds, shares


# ------------------------------------------------------------------------------------------------ guards
def test_a_guard_against_labelled_answers(guard: Path) -> None:
    config = of_guard(guard)
    found = measured(config)
    rows = rows_of(config)
    odds, _ = shares_of(config, rows)
    truth = np.array([not row.is_safe for row in rows])
    assert found.rows == 40 and found.metrics["test/unparsed_rate"] == 0.0 and found.marks == []
    assert found.metrics["test/unsafe/auroc"] == pytest.approx(sk.roc_auc_score(truth, odds), abs=1e-9)
    assert found.metrics["test/unsafe/macro_f1"] == pytest.approx(sk.f1_score(truth, odds > 0, average="macro"))
    # unsafe alone, as given: nobody calibrated it; the baselines stand beside
    areas = {name.split("/")[1] for name in found.metrics}
    assert areas >= {"unsafe", "over_tfidf"} and not areas & {"severity", "category"}
    assert not any("_raw" in name for name in found.metrics if name.startswith("test/unsafe"))
    assert found.judgements is not None and found.judgements.given.all()


def test_rows_without_a_verdict_are_of_no_class(guard: Path) -> None:
    """Half of the rows fall below the share of the softmax that a verdict needs."""
    config = of_guard(guard, "judge.max_failed_share=1")
    rows = rows_of(config)
    odds, shares = shares_of(config, rows)
    level = float(np.sort(shares)[19:21].mean())
    found = measured(of_guard(guard, "judge.max_failed_share=1", f"judge.min_word_probability={level}"))
    given = shares >= level
    assert given.sum() == 20
    truth = np.array([not row.is_safe for row in rows])
    assert found.metrics["test/unparsed_rate"] == 0.5 and found.metrics["test/unparsed_rate_n"] == 40
    assert found.metrics["test/unparsed_rate_low"] < 0.5 < found.metrics["test/unparsed_rate_high"]
    assert found.metrics["test/unsafe/accuracy_n"] == found.rows == 20
    assert found.metrics["test/unsafe/accuracy"] == pytest.approx(((odds > 0) == truth)[given].mean())
    assert found.metrics["test/unsafe/auroc"] == pytest.approx(sk.roc_auc_score(truth[given], odds[given]))
    # the baselines are asked about the same rows
    assert found.metrics["test/baseline_tfidf/unsafe/accuracy_n"] == 20
    assert found.marks == ["20 rows without a verdict are left out"]
    kept = found.judgements
    assert kept is not None and len(kept) == 40
    assert kept.given.tolist() == given.tolist() and kept.row_ids.tolist() == [row.id for row in rows]
    # the usual limit refuses that
    with pytest.raises(UserError, match="20 of 40 answers got no verdict; the first, row ") as caught:
        measured(of_guard(guard, f"judge.min_word_probability={level}"))
    assert "of the probability" in str(caught.value) and "judge.max_failed_share" in str(caught.value)
    with pytest.raises(UserError, match="40 of 40"):
        measured(of_guard(guard, "judge.max_failed_share=1", "judge.min_word_probability=1"))


def test_a_protocol_by_a_guard(guard: Path, tmp_path: Path) -> None:
    (tmp_path / "hatecheck").mkdir()
    lines = ["functionality,case_id,test_case,label_gold"]
    texts = [row.response.replace(",", "") for row in question_answers(12, split="test", seed=3)]
    lines += [f"f{i % 2},{i},{text},{'hateful' if i % 3 else 'non-hateful'}" for i, text in enumerate(texts)]
    (tmp_path / "hatecheck" / "test_suite_cases.csv").write_text("\n".join(lines) + "\n")
    found = measured(of_guard(guard, "protocol=hatecheck", f"data.root={tmp_path}"))
    assert found.rows == 12 and found.metrics["hatecheck/unparsed_rate"] == 0
    assert found.metrics["hatecheck/by_functionality/f0_accuracy_n"] == 6
    assert [mark.partition(":")[0] for mark in found.marks] == ["off-protocol"]
    assert found.judgements is not None and found.judgements.protocol == "hatecheck"


def test_what_a_guard_is_measured_by(guard: Path) -> None:
    """Suites that skip leave policies and pairs out; others refuse."""
    config = of_guard(guard)
    model = judged_model(config)
    assert (model.kind, model.locator) == ("guard", str(guard))
    both = replace(config, suite=replace(config.suite, measures=["preference", "moderation", "policy"], unfit="skip"))
    assert [one.measure for one in measurements_for(both, model)[0]] == ["moderation"]
    with pytest.raises(UserError, match=r"is a guard model and suite=moderation is for .*for this model: suite=moder"):
        measurements_for(replace(both, suite=replace(both.suite, unfit="refuse")), model)


def test_the_identity_is_of_the_weights_and_the_keys(guard: Path, tmp_path: Path) -> None:
    def content(*words: str, path: Path = guard) -> str:
        config = of_guard(path, *words)
        return judged_model(config).content(config)

    copied = tmp_path / "copy"
    copied.mkdir()
    for file in guard.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    assert content() == content(path=copied) == content("judge.batch_tokens=99")
    assert len({content(), content("judge.zero=0.4"), content("judge.max_length=60")}) == 3
    (copied / "model.safetensors").write_bytes((guard / "model.safetensors").read_bytes()[::-1])
    assert content(path=copied) != content()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["judge=truth"], "a judge of kind 'truth' cannot stand in the place of a model"),
        (["judge=guard", "judge.model=no/such/folder/here"], "no such folder"),
        (["judge=guard", "judge.model=a/b", "judges=[outputs/x]"], "one judge alone stands in the place of a model"),
        (["judge=guard", "judge.model=a/b", "mode=moderate"], "one judge alone stands in the place of a model"),
        (["judge=guard", "judge.model=a/b", "suite=preference"], "no model is named"),
        (["judge=remote", "judge.server.model=m", "~judge.scales.is_safe"], "none of them is a verdict"),
        (["judge=remote", "judge.server.model=m", "judge.scales.is_safe.high=10"], "a probability from 0 to 10"),
    ],
)
def test_judges_that_cannot(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        judged_model(config_of(*words))
    assert "\n" not in str(caught.value)


def test_a_model_that_is_named_is_the_one_that_is_judged(guard: Path) -> None:
    with pytest.raises(UserError, match="has no score heads"):
        judged_model(replace(of_guard(guard), model=str(guard)))


# ------------------------------------------------------------------------------------------------ remote judges
@pytest.mark.parametrize("scale", ["is_safe", "p_unsafe", "cost"])
def test_a_remote_judge(scale: str, tmp_path: Path) -> None:
    """It calls long answers unsafe and says nothing that can be read of the three shortest."""
    rows = rows_of(config_of("judge=remote", "judge.server.model=m"))
    ranked = sorted({row.response for row in rows}, key=len)
    odd, middle = ranked[:3], len(ranked[len(ranked) // 2])

    def reply(asked: Asked, number: int) -> Any:
        text = asked.body["messages"][1]["content"]
        mine = max((row.response for row in rows if row.response in text), key=len)
        if mine in odd:
            return says("perhaps")
        unsafe = len(mine) > middle
        value = {"is_safe": not unsafe, "p_unsafe": int(unsafe), "cost": 2.5 if unsafe else -1}[scale]
        return says(f'{{"{scale}": {str(value).lower()}}}')

    with serving(reply) as server:
        config = config_of("judge=remote", "judge.server.model=m", f"judge.server.base_url={server.url}")
        low, high = (-10, 10) if scale == "cost" else (0, 1)
        scales = {scale: {"low": low, "high": high, "question": "say"}}
        config = replace(config, judge={**dict(config.judge), "scales": scales, "attempts": 1, "cache": "none"})
        found = measured(config)
    mine = np.array([row.response not in odd for row in rows])
    truth = np.array([not row.is_safe for row in rows])[mine]
    said = np.array([len(row.response) > middle for row in rows])[mine]
    assert 0 < said.sum() < len(said) and (~mine).sum() >= 3
    assert found.metrics["test/unparsed_rate"] == pytest.approx((~mine).mean())
    assert found.metrics["test/unsafe/accuracy"] == pytest.approx((said == truth).mean())
    assert found.metrics["test/unsafe/auroc"] == pytest.approx(sk.roc_auc_score(truth, said))


# ------------------------------------------------------------------------------------------------ verdicts
def test_verdicts_at_the_guards_own_zero(guard: Path) -> None:
    config = of_guard(guard, "judge.zero=0.8")
    judge = judge_of(judged_model(config), config)
    assert isinstance(judge, OutsideJudge) and not isinstance(judge, RowJudge)
    logits = ModerationLogits(np.array([np.log(4) - 0.01, np.log(4) + 0.01, np.nan]), None, None)
    verdicts = judge.decide(logits)
    assert verdicts.unsafe.tolist() == [False, True, False]  # p = 0.8 is log odds of log 4
    assert judge.parsed(logits).tolist() == [True, True, False]
    assert verdicts.p_unsafe[:2] == pytest.approx([0.8, 0.8], abs=0.01) and np.isnan(verdicts.p_unsafe[2])


# ------------------------------------------------------------------------------------------------ the command
def test_the_command(guard: Path, tmp_outputs: Path) -> None:
    """Judged, shown, kept, found again; the rows take part in comparisons."""
    words = [*FEW, "suite=moderation", "judge=guard", f"judge.model={guard}", "judge.min_word_probability=0"]
    answer = call("evaluate", *words, f"output_root={tmp_outputs}")
    assert answer.code == 0, answer.err
    (folder,) = (tmp_outputs / "evaluate").iterdir()
    found = json.loads((folder / "metrics.json").read_text())
    assert found["test/unparsed_rate"] == 0.0 and "test/unsafe/macro_f1" in found
    assert "unsafe/macro_f1" in answer.out and "guard model on" in (folder / "report.html").read_text()
    assert "finished before" in call("evaluate", *words, f"output_root={tmp_outputs}").err
    other = call("evaluate", *words, "judge.zero=0.3", f"output_root={tmp_outputs}")
    assert other.code == 0, other.err
    names = sorted(str(path) for path in (tmp_outputs / "evaluate").iterdir())
    assert len(names) == 2
    both = call("evaluate", *FEW, "mode=compare", f"models=[{','.join(names)}]", f"output_root={tmp_outputs}")
    assert both.code == 0, both.err
    assert guard.name in both.out  # headings are of the guard's name
    refused = call("evaluate", *words, "baseline=x", f"output_root={tmp_outputs}")
    assert refused.code != 0 and "'baseline' belongs to the evaluation of a policy" in refused.error
    nobody = call("evaluate", *FEW, "suite=moderation", f"output_root={tmp_outputs}")
    assert nobody.code != 0 and "no model is named" in nobody.error
