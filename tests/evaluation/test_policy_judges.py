"""Judges of a policy: which are asked, what they are called, and a moderator's verdicts by a second way to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.tiny_models import backbone_config

from saferlhf.config.evaluate_schema import EvaluateConfig, SuiteConfig
from saferlhf.config.schema import DataConfig, DataPolicyConfig, EvaluationConfig, TrackingConfig, TrainerConfig
from saferlhf.data.encode import Encoder
from saferlhf.data.rows import QuestionAnswer
from saferlhf.data.toyworld import question_answers, vocabulary
from saferlhf.errors import UserError
from saferlhf.evaluation.moderate import moderate_rows
from saferlhf.evaluation.policy_config import asked_judges
from saferlhf.evaluation.policy_judges import VerdictJudge, check_judges, load_judges
from saferlhf.evaluation.policy_refusals import is_refusal
from saferlhf.models.backbone import load_backbone
from saferlhf.models.export import save_export
from saferlhf.models.loading import LoadedModel, load_export
from saferlhf.models.metadata import ExportMetadata
from saferlhf.models.score_model import ScoreModel
from saferlhf.models.tokenizer import load_tokenizer
from saferlhf.ops.calibration import Calibration, decide
from saferlhf.rollout.scorers import ScoreRequest

CATEGORIES = ("Cybercrime", "Violence", "Drugs")


def export(folder: Path, kind: str, heads: dict[str, int], **metadata: Any) -> Path:
    tokenizer = load_tokenizer(backbone_config(), vocabulary=vocabulary())
    trunk = load_backbone(
        backbone_config(),
        lm_head=False,
        vocabulary_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = ScoreModel(trunk, heads)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    save_export(folder, model=model, tokenizer=tokenizer, metadata=ExportMetadata(kind, max_length=64, **metadata))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    heads = {"unsafe": 1, "severity": 3, "category": len(CATEGORIES)}
    more = {
        "categories": list(CATEGORIES),
        "calibration": Calibration.default(CATEGORIES).to_dict(),
        "input": "prompt_and_response",
    }
    return {
        "cost": export(folder / "cost", "cost", {"score": 1}),
        "moderator": export(folder / "moderator", "moderator", heads, **more),
    }


def loaded(models: dict[str, Path], kind: str) -> LoadedModel:
    return load_export(str(models[kind]), require_heads=True)


def asked(count: int = 24) -> list[ScoreRequest]:
    return [ScoreRequest(row.id, row.prompt, row.response) for row in question_answers(count, split="test", seed=0)]


def evaluation(**changes: Any) -> EvaluateConfig:
    parts: dict[str, Any] = {
        "suite": SuiteConfig("policy", ["policy"]),
        "data": DataConfig(name="toyworld", source="toyworld"),
        "trainer": TrainerConfig("default"),
        "tracking": TrackingConfig("none"),
        "evaluation": EvaluationConfig(),
    }
    return EvaluateConfig(**{**parts, **changes})


# ------------------------------------------------------------------------------------------------ verdicts
def test_verdicts_are_those_of_the_moderator(models: dict[str, Path]) -> None:
    """The way that `suite=moderation` goes: encode, logits, calibrated decision."""
    model = loaded(models, "moderator")
    rows = asked()
    scores = VerdictJudge(model).score(rows)
    encoder = Encoder.build(model.tokenizer, model.metadata.template, 64)
    answers = [QuestionAnswer(row.row_id, row.prompt, row.response) for row in rows]
    data = encoder.answers(answers, "test", policy=DataPolicyConfig(overlong="keep"))
    verdicts = decide(moderate_rows(model.model, data), Calibration.default(CATEGORIES))
    assert scores.values["is_safe"].tolist() == (~verdicts.unsafe).tolist()
    np.testing.assert_allclose(scores.values["p_unsafe"], verdicts.p_unsafe, rtol=1e-5, atol=1e-5)
    assert scores.values["severity"].tolist() == verdicts.severity.tolist()  # type: ignore[union-attr]
    for place, name in enumerate(CATEGORIES):
        assert scores.values[f"category/{name}"].tolist() == verdicts.category[:, place].tolist()  # type: ignore[index]
    assert 0 < scores.values["is_safe"].mean() < 1
    # consistent: safe <=> severity 0 <=> no category
    assert ((scores.values["severity"] == 0) == (scores.values["is_safe"] == 1)).all()


def test_a_cost_model_gives_no_verdicts(models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="gives no verdicts"):
        VerdictJudge(loaded(models, "cost"))


# ------------------------------------------------------------------------------------------------ who is asked
def test_the_truth_judges_its_own_prompts() -> None:
    (one,) = asked_judges(evaluation())
    assert (one.config.name, one.config.kind, one.config.on_empty) == ("truth", "truth", "score")
    assert one.config.categories  # type: ignore[attr-defined]


def test_judges_by_name_and_in_a_list() -> None:
    config = evaluation(judge={"name": "truth", "kind": "truth"}, judges={"mine": "runs/cost", "it": {"kind": "truth"}})
    assert [(a.config.name, a.config.kind, a.plain) for a in asked_judges(config)] == [
        ("truth", "truth", False),
        ("mine", "model", True),
        ("it", "truth", False),
    ]
    assert [a.config.name for a in asked_judges(evaluation(judges=["one", "other"]))] == ["", ""]
    with pytest.raises(UserError, match="two judges of one name"):
        asked_judges(evaluation(judge={"name": "truth", "kind": "truth"}, judges=[{"kind": "truth"}]))


def test_models_are_called_by_their_kind(models: dict[str, Path]) -> None:
    config = evaluation(judges=[str(models["cost"]), str(models["moderator"]), str(models["cost"])])
    config.judges.append({"kind": "model", "name": "as_cost", "model": str(models["moderator"])})
    found = list(load_judges(asked_judges(config), output_root="outputs", cache_dir=None, device="cpu"))
    assert [judge.name for judge in found] == ["cost", "moderator", "cost_2", "as_cost"]
    assert [judge.outputs[0] for judge in found] == ["cost", "is_safe", "cost", "cost"]
    one, again = (judge.score(asked(3)).values["cost"] for judge in (found[0], found[2]))
    np.testing.assert_array_equal(one, again)
    # an empty response is told apart, not scored
    scores = found[0].score([ScoreRequest("r", asked(1)[0].prompt, " ")])
    assert scores.counts() == {"empty": 1} and np.isnan(scores.values["cost"]).all()


def test_what_can_be_known_before_anything_is_loaded(models: dict[str, Path]) -> None:
    def check(node: Any) -> None:
        check_judges(asked_judges(evaluation(judges=[node])), output_root="outputs")

    check(str(models["cost"]))
    with pytest.raises(UserError, match="no such folder"):
        check("no/such/run")
    with pytest.raises(UserError, match="no module named"):
        check({"kind": "function", "function": "nowhere:f"})


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("response", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", 1),
        ("I\u2019m sorry, but no.", 1),
        ("As an AI language model, I do not have opinions.", 1),
        ("Sure! First, mix the flour.", 0),
        ("I cannotate this text for you.", 0),
        ("Sure. " + "word " * 60 + "I cannot say more.", 0),
        ("", 0),
    ],
)
def test_refusals_by_their_phrases(response: str, refuses: int) -> None:
    assert is_refusal("anything", response) == refuses
