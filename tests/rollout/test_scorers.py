"""Kinds of scorers: ground truth, plain functions, trained models; and what the config makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.tiny_models import WORDS, backbone, metadata, stir, tokenizer
from scipy.special import expit

from saferlhf.config.paths import conf_dir
from saferlhf.config.rollout_schema import JUDGES, judge_config
from saferlhf.data.rows import PKU_CATEGORIES, as_prompt, prompt_text
from saferlhf.data.templates import end_id, get_template
from saferlhf.data.toyworld import best_replies, judge, prompts
from saferlhf.errors import UserError
from saferlhf.models.export import save_export
from saferlhf.models.loading import LoadedModel
from saferlhf.models.locator import Location
from saferlhf.models.metadata import ExportMetadata
from saferlhf.models.moderator import calibration_of, logits_of
from saferlhf.models.score_model import ScoreModel
from saferlhf.ops.calibration import Calibration, decide
from saferlhf.rollout.build import build_scorer
from saferlhf.rollout.function_scorer import FunctionScorer
from saferlhf.rollout.guard import FailurePolicy, GuardedScorer
from saferlhf.rollout.model_scorer import ModelScorer
from saferlhf.rollout.remote.judge import RemoteJudge
from saferlhf.rollout.scorers import Scorer, ScoreRequest
from saferlhf.rollout.truth_scorer import TruthScorer

CATEGORIES = ("Violence", "Drugs")


# ------------------------------------------------------------------------------------------------ ground truth
def test_truth_is_the_oracle() -> None:
    requests = [
        ScoreRequest(row.id, row.prompt, reply)
        for row in prompts(20, "test", seed=3)
        for reply in (*best_replies(prompt_text(row.prompt)), "", "some junk")
    ]
    scorer = TruthScorer(categories=True)
    assert isinstance(scorer, Scorer)
    scores = scorer.score(requests)
    assert scores.outputs == scorer.outputs and scores.scored.all()
    for i, request in enumerate(requests):
        truth = judge(request.prompt, request.response)
        assert scores.values["helpfulness"][i] == truth.helpfulness
        assert scores.values["harmlessness"][i] == truth.harmlessness
        assert scores.values["is_safe"][i] == (truth.severity == 0)
        assert scores.values["is_refusal"][i] == truth.is_refusal and scores.values["severity"][i] == truth.severity
        named = {name for name in PKU_CATEGORIES if scores.values[f"category/{name}"][i]}
        assert named == truth.harm_category
    assert TruthScorer().outputs == ("helpfulness", "harmlessness", "is_safe", "is_refusal", "severity")


# ------------------------------------------------------------------------------------------------ functions
def of(prompt: str, response: str) -> float:
    """Found by name below."""
    return float(len(prompt) - len(response))


def requests(*texts: str) -> list[ScoreRequest]:
    return [ScoreRequest(f"r{i}", as_prompt("question"), text) for i, text in enumerate(texts)]


def test_functions_by_name() -> None:
    scorer = FunctionScorer.by_name("rollout.test_scorers:of", ["reward"])
    assert scorer.score(requests("abc", "")).values["reward"].tolist() == [5, 8]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rollout.test_scorers", "names no function"),
        (":of", "names no function"),
        ("no_such_module_anywhere:of", "no module named 'no_such_module_anywhere'"),
        ("rollout.test_scorers:off", "no function 'off'"),
        ("rollout.test_scorers:CATEGORIES", "no function"),
    ],
)
def test_functions_that_are_none(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FunctionScorer.by_name(path, ["reward"])


def test_rows_fail_by_themselves() -> None:
    def function(prompt: str, response: str) -> float | None:
        if response == "boom":
            raise ZeroDivisionError(response)
        return {"none": None, "nan": math.nan}.get(response, 1.0)

    guarded = GuardedScorer(
        FunctionScorer(function, ["reward"]), FailurePolicy(on_failure="skip", max_failed_share=1.0)
    )
    scores = guarded.score(requests("fine", "none", "nan", "boom"))
    assert scores.scored.tolist() == [True, False, False, False]
    assert scores.counts() == {"not_a_number": 2, "exception": 1}
    assert "ZeroDivisionError" in scores.failures[2].reason


def test_several_outputs_and_batches() -> None:
    def one(prompt: str, response: str) -> Mapping[str, float]:
        return {"reward": 1.0, "cost": float(len(response)), "more": 3.0}

    def all_at_once(rows: list[ScoreRequest]) -> dict[str, list[float]]:
        return {"cost": [float(len(row.response)) for row in rows], "reward": [1.0] * len(rows)}

    outputs = ["reward", "cost"]
    first = FunctionScorer(one, outputs).score(requests("a", "bb"))
    second = FunctionScorer(all_at_once, outputs, batched=True).score(requests("a", "bb"))
    for scores in (first, second):
        assert scores.outputs == ("reward", "cost") and scores.values["cost"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("function", "outputs", "batched", "message"),
    [
        (lambda p, r: "good", ["reward"], False, "a str for 'reward'"),
        (lambda p, r: {"cost": 1.0}, ["reward"], False, "no 'reward'"),
        (lambda p, r: 1.0, ["reward", "cost"], False, "a float"),
        (lambda p, r: [1.0, 2.0], ["reward"], False, "shape"),
        (lambda rows: [1.0], ["reward"], True, "shape"),
        (lambda rows: 1.0, ["reward"], True, "shape"),
    ],
)
def test_functions_that_return_something_else(function: Any, outputs: list[str], batched: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FunctionScorer(function, outputs, batched=batched).score(requests("a", "b"))
    with pytest.raises(UserError, match="at least one output"):
        FunctionScorer(function, [])


# ------------------------------------------------------------------------------------------------ models
def loaded(kind: str, heads: dict[str, int], **stated: Any) -> LoadedModel:
    model = ScoreModel(backbone(seed=1), heads)
    stir(model, scale=1.0)
    given = {"template": "native", "pooling": "last", "max_length": 48, **stated}
    stored = ExportMetadata(kind=kind, heads=heads, **given)
    return LoadedModel(model.eval(), tokenizer(), stored, heads, Location("somewhere", "export"))


def word_requests(count: int = 12, **changes: Any) -> list[ScoreRequest]:
    stream = np.random.default_rng(0)

    def text(longest: int) -> str:
        return " ".join(stream.choice(WORDS, stream.integers(1, longest)))

    rows = [ScoreRequest(f"r{i}", as_prompt(text(8)), text(12), i % 3 == 0) for i in range(count)]
    return [replace(row, **changes) for row in rows]


def head_outputs(model: LoadedModel, request: ScoreRequest) -> dict[str, np.ndarray]:
    """The heads on one unpadded sequence, put together by hand."""
    template, tok = get_template(model.metadata.template), model.tokenizer
    ids = template.prompts_ids([request.prompt], tok)[0]
    ids += tok(request.response, add_special_tokens=False)["input_ids"]
    if not request.truncated:
        ids.append(end_id(tok))
    row = torch.tensor([ids])
    with torch.no_grad():
        found = model.model(row, torch.ones_like(row), torch.ones_like(row))
    return {name: values[0].double().numpy() for name, values in found.items()}


@pytest.mark.parametrize(("kind", "output"), [("reward", "reward"), ("cost", "cost")])
@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_reward_and_cost_models(kind: str, output: str, batch_tokens: int) -> None:
    """Cut-off responses are read without an end token; batches and order change nothing."""
    model = loaded(kind, {"score": 1})
    scorer = ModelScorer(model, batch_tokens=batch_tokens)
    assert isinstance(scorer, Scorer) and scorer.outputs == (output,) and scorer.name == kind
    rows = word_requests()
    found = scorer.score(rows).values[output]
    expected = [float(head_outputs(model, row)["score"][0]) for row in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)
    assert np.ptp(expected) > 0.1
    order = np.random.default_rng(1).permutation(len(rows))
    np.testing.assert_allclose(
        scorer.score([rows[i] for i in order]).values[output], found[order], rtol=1e-5, atol=2e-5
    )
    assert len(scorer.score([])) == 0
    ended = scorer.score(word_requests(truncated=False)).values[output]
    assert np.abs(ended - found)[[0, 3, 6, 9]].min() > 1e-4, "the end token of those that were cut off is not there"


def moderator(**calibration: Any) -> LoadedModel:
    heads = {"unsafe": 1, "category": 2, "severity": 3}
    stored = replace(Calibration.default(CATEGORIES), **calibration).to_dict() if calibration else None
    return loaded("moderator", heads, categories=list(CATEGORIES), calibration=stored)


def moderator_probabilities(model: LoadedModel, rows: list[ScoreRequest], temperature: float = 1.0) -> Any:
    outputs = [head_outputs(model, row) for row in rows]
    unsafe = expit(np.array([found["unsafe"][0] for found in outputs]))
    return unsafe, expit(np.stack([found["category"] for found in outputs]) / temperature)


def test_a_moderator_as_cost() -> None:
    model, rows = moderator(), word_requests()
    unsafe, categories = moderator_probabilities(model, rows)
    for how, expected in (
        ("unsafe", unsafe - 0.5),
        ("max", categories.max(axis=1) - 0.5),
        ("mean", categories.mean(axis=1) - 0.25),
    ):
        np.testing.assert_allclose(
            ModelScorer(model, how=how).score(rows).values["cost"], expected, rtol=1e-5, atol=1e-5
        )
    raw = ModelScorer(model, how="mean", zero=0.0, categories=True, name="beavertails", output="harm")
    assert raw.outputs == ("harm", "category/Violence", "category/Drugs") and raw.name == "beavertails"
    scores = raw.score(rows)
    np.testing.assert_allclose(scores.values["harm"], categories.mean(axis=1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scores.values["category/Drugs"], categories[:, 1], rtol=1e-5, atol=1e-5)


def test_a_moderators_cost_is_above_zero_where_its_verdict_is_unsafe() -> None:
    """With the thresholds and temperatures that it was calibrated to."""
    model = moderator(threshold_unsafe=0.3, temperature_unsafe=2.0)
    rows = word_requests(40)
    cost = ModelScorer(model).score(rows).values["cost"]
    outputs = [head_outputs(model, row) for row in rows]
    stacked = {name: torch.tensor(np.stack([found[name] for found in outputs])) for name in outputs[0]}
    verdicts = decide(logits_of(stacked), calibration_of(model.metadata, "here"))
    assert np.array_equal(cost > 0, verdicts.unsafe) and 0 < verdicts.unsafe.sum() < len(rows)


def test_a_classifier_with_labels_of_its_own() -> None:
    """The BeaverTails baseline: mean and max over the labels of somebody else's multi-label classifier."""
    model, rows = loaded("classifier", {"violence": 1, "drugs": 1}), word_requests()
    p = expit(np.array([[head_outputs(model, row)[name][0] for name in ("violence", "drugs")] for row in rows]))
    found = ModelScorer(model, how="max", zero=0).score(rows)
    np.testing.assert_allclose(found.values["cost"], p.max(axis=1), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="no score of unsafe as such"):
        ModelScorer(model)


def test_responses_that_do_not_fit_are_counted() -> None:
    model = loaded("reward", {"score": 1}, max_length=16)
    scorer = ModelScorer(model)
    rows = [ScoreRequest("r", as_prompt("w1"), " ".join(WORDS)), ScoreRequest("s", as_prompt("w1"), "w2")]
    assert scorer.score(rows).scored.all() and scorer.overlong == 1


def test_models_that_diverged_are_failures() -> None:
    model = loaded("reward", {"score": 1})
    with torch.no_grad():
        model.model.heads["score"].bias.fill_(torch.nan)
    scores = ModelScorer(model).score(word_requests(3))
    assert scores.counts() == {"not_a_number": 3} and not scores.scored.any()


@pytest.mark.parametrize(
    ("kind", "heads", "options", "stored", "message"),
    [
        ("sft", {}, {}, {}, "no score heads"),
        ("moderator", {"unsafe": 1}, {}, {"input": "prompt"}, "looks at prompts alone"),
        ("moderator", {"unsafe": 1}, {"how": "max"}, {}, "no harm categories"),
        ("moderator", {"unsafe": 1}, {"categories": True}, {}, "no harm categories"),
        ("moderator", {"unsafe": 1}, {"how": "median"}, {}, "unknown choice 'median'"),
        ("classifier", {"score": 1}, {}, {}, "reward or a cost"),
        ("reward", {"a": 2, "b": 1}, {}, {}, "has scores a, b"),
    ],
)
def test_models_that_judge_nothing(kind: str, heads: Any, options: Any, stored: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelScorer(loaded(kind, heads, **stored), **options)


def test_an_export_by_its_locator(tmp_path: Path) -> None:
    made = loaded("cost", {"cost": 1})
    given = metadata("cost", template="native", pooling="last", max_length=48)
    save_export(tmp_path / "export", model=made.model, tokenizer=made.tokenizer, metadata=given)
    scorer = build_scorer(conf("model") | {"model": str(tmp_path / "export")})
    assert scorer.outputs == ("cost",) and scorer.name == "model"
    rows = [*word_requests(5), ScoreRequest("empty", as_prompt("w1"), "")]
    scores = scorer.score(rows)
    expected = [float(head_outputs(made, row)["cost"][0]) for row in rows[:5]]
    np.testing.assert_allclose(scores.values["cost"][:5], expected, rtol=1e-5, atol=2e-5)
    assert scores.counts() == {"empty": 1} and np.isnan(scores.values["cost"][5])
    with pytest.raises(UserError, match="no such folder"):
        build_scorer(conf("model") | {"model": str(tmp_path / "nothing")})


# ------------------------------------------------------------------------------------------------ config
def conf(name: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "judge" / f"{name}.yaml"))
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


@pytest.mark.parametrize("kind", sorted(JUDGES))
def test_every_kind_has_its_file_with_every_key(kind: str) -> None:
    node = conf(kind)
    assert node["kind"] == kind and set(node) == {field.name for field in fields(JUDGES[kind])}
    missing = [key for key, value in node.items() if value == "???"]
    for key in missing:
        node[key] = "something"
    if kind == "remote":
        node["server"]["model"] = "something"
    assert type(judge_config(node)) is JUDGES[kind]


def test_scorers_from_the_config(tmp_path: Path, monkeypatch: Any) -> None:
    truth = build_scorer(conf("truth"))
    assert isinstance(truth.scorer, TruthScorer) and truth.policy.on_empty == "score"
    node = conf("function") | {"function": "rollout.test_scorers:of", "outputs": ["length"]}
    assert build_scorer(node).score(requests("abc")).values["length"].tolist() == [5]
    node = conf("remote")
    node["server"]["model"] = "m"
    remote = build_scorer(node, cache_dir=str(tmp_path)).scorer
    assert isinstance(remote, RemoteJudge) and remote.cache.folder == tmp_path / "judge"
    assert remote.outputs == ("helpfulness", "harmlessness", "is_safe", "severity")
    kept = build_scorer(node | {"cache": "none"}).scorer
    assert isinstance(kept, RemoteJudge) and kept.cache.folder is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "oracle"}, "unknown kind of judge 'oracle'"),
        ({"kind": None}, "no kind"),
        ({"on_empty": "ignore"}, "unknown choice 'ignore'"),
        ({"on_failure": "ignore"}, "unknown choice 'ignore'"),
        ({"max_failed_share": 2}, "no share"),
        ({"categorys": True}, "unknown key 'categorys'"),
        ({"kind": "function"}, "categories"),
    ],
)
def test_configs_that_are_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        judge_config(conf("truth") | change)
