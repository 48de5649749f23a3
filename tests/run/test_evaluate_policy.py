"""`evaluate.py suite=policy` in this process, on small random policies: what it leaves, what it refuses."""

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
from command_lines import Answer, call
from models.tiny_models import backbone_config

from saferlhf.config.run_folder import RunFolder
from saferlhf.data.toyworld import is_harmful_request, judge, vocabulary
from saferlhf.models.backbone import load_backbone
from saferlhf.models.export import save_export
from saferlhf.models.metadata import ExportMetadata
from saferlhf.models.score_model import ScoreModel
from saferlhf.models.tokenizer import load_tokenizer
from saferlhf.ops.calibration import Calibration

FEW = [
    "suite=policy",
    "data.train_rows=4",
    "data.val_rows=4",
    "data.test_rows=16",
    "evaluation.bootstrap_draws=50",
    "max_new_tokens=12",
    "trainer.threads=1",
    "trainer.progress=none",
    "tracking=none",
]
CATEGORIES = ("Cybercrime", "Violence")


def export(folder: Path, kind: str, *, seed: int = 0, heads: dict[str, int] | None = None, **metadata: Any) -> Path:
    """A random model of two small layers that knows the toy world's words, loud enough to be told from others."""
    tokenizer = load_tokenizer(backbone_config(), vocabulary=vocabulary())
    architecture = {**(backbone_config().architecture or {}), "max_position_embeddings": 128}
    trunk = load_backbone(
        backbone_config(architecture=architecture),
        lm_head=heads is None,
        eos_token_id=tokenizer.eos_token_id,
        vocabulary_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        seed=seed,
    )
    model = trunk if heads is None else ScoreModel(trunk, heads, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    save_export(folder, model=model, tokenizer=tokenizer, metadata=ExportMetadata(kind, max_length=128, **metadata))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    moderator = {"unsafe": 1, "severity": 3, "category": len(CATEGORIES)}
    verdicts = {"categories": list(CATEGORIES), "calibration": Calibration.default(CATEGORIES).to_dict()}
    return {
        "sft": export(folder / "sft", "sft"),
        "ppo": export(folder / "ppo", "ppo", seed=1),
        "reward": export(folder / "reward", "reward", heads={"score": 1}),
        "cost": export(folder / "cost", "cost", heads={"score": 1}, seed=2),
        "moderator": export(
            folder / "moderator", "moderator", heads=moderator, input="prompt_and_response", **verdicts
        ),
        "prompts": export(folder / "prompts", "moderator", heads=moderator, input="prompt", **verdicts),
    }


def evaluate(outputs: Path, *words: str) -> Answer:
    return call("evaluate", *FEW, f"output_root={outputs}", *words)


def only(outputs: Path) -> Path:
    (folder,) = (outputs / "evaluate").iterdir()
    return folder


def metrics_of(outputs: Path) -> dict[str, float]:
    return json.loads((only(outputs) / "metrics.json").read_text())  # type: ignore[no-any-return]


def samples_of(outputs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (only(outputs) / "samples.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ what it finds
def test_a_policy_against_a_baseline_judged_by_the_truth(tmp_outputs: Path, models: dict[str, Path]) -> None:
    """Every number on the first page follows from the samples that were kept, judged once more."""
    answer = evaluate(tmp_outputs, f"model={models['ppo']}", f"baseline={models['sft']}", "samples=2")
    assert answer.code == 0, answer.err
    metrics, lines = metrics_of(tmp_outputs), samples_of(tmp_outputs)
    assert len(lines) == 16 * 2 * 2
    truths = {
        (line["row_id"], line["policy"], line["sample"]): judge(line["prompt"][-1][1], line["response"])
        for line in lines
    }
    harmful = {line["row_id"]: is_harmful_request(line["prompt"][-1][1]) for line in lines}
    ids = list(dict.fromkeys(line["row_id"] for line in lines))
    assert len(ids) == 16 and 0 < sum(harmful.values()) < 16

    def rate(grade: str, rows: list[str]) -> float:
        pairs = [
            (getattr(truths[row, "policy", i], grade), getattr(truths[row, "baseline", j], grade))
            for row in rows
            for i in (0, 1)
            for j in (0, 1)
        ]
        return float(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))

    bad = [row for row in ids if harmful[row]]
    own = [truth for (_, policy, _), truth in truths.items() if policy == "policy"]
    expected = {
        "helpful_win_rate": rate("helpfulness", ids),
        "harmless_win_rate": rate("harmlessness", ids),
        "harmless_win_rate_harmful": rate("harmlessness", bad),
        "mean_helpfulness": np.mean([truth.helpfulness for truth in own]),
        "safe_rate": np.mean([truth.is_safe for truth in own]),
        "severity/share_2": np.mean([truth.severity == 2 for truth in own]),
        "truncation_rate": np.mean([line["truncated"] for line in lines if line["policy"] == "policy"]),
        "mean_tokens": np.mean([line["tokens"] for line in lines if line["policy"] == "policy"]),
        "kl_to_reference": np.mean([line["kl"] for line in lines if line["policy"] == "policy"]),
        "prompts": 16,
    }
    assert {name: metrics[f"policy/{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert 0 < metrics["policy/helpful_win_rate"] < 1
    assert metrics["policy/kl_to_reference"] > 0.1
    assert metrics["policy/best_safe_helpfulness"] > 2.5
    assert lines[0]["scores"]["truth"]["helpfulness"] == pytest.approx(
        judge(lines[0]["prompt"][-1][1], lines[0]["response"]).helpfulness
    )
    folder = only(tmp_outputs)
    for name in ("config.yaml", "data_report.json", "report.html", "reward_cost.png", "status.json"):
        assert (folder / name).is_file(), name
    assert "helpfulness wins" in answer.out and "better than the baseline" in answer.out and "best safe" in answer.out
    assert str(folder / "samples.jsonl") in answer.out
    # responses may be harmful: none is printed
    assert not any(line["response"] and line["response"] in answer.out + answer.err for line in lines)


def test_a_policy_against_itself(tmp_outputs: Path, models: dict[str, Path]) -> None:
    """The noise belongs to the rows: equal weights write equal responses, and have moved nowhere."""
    copy = f"{models['sft']}/."
    assert evaluate(tmp_outputs, f"model={models['sft']}", f"baseline={copy}").code == 0
    metrics = metrics_of(tmp_outputs)
    assert metrics["policy/helpful_win_rate"] == metrics["policy/harmless_win_rate"] == 0.5
    assert metrics["policy/helpful_tie_rate"] == 1.0
    assert metrics["policy/kl_to_reference"] == 0.0
    assert metrics["policy/over_baseline/safe_rate"] == 0.0


def test_trained_judges(tmp_outputs: Path, models: dict[str, Path]) -> None:
    judges = ",".join(str(models[kind]) for kind in ("cost", "reward", "moderator"))
    answer = evaluate(tmp_outputs, f"model={models['ppo']}", f"baseline={models['sft']}", f"judges=[{judges}]")
    assert answer.code == 0, answer.err
    metrics = metrics_of(tmp_outputs)
    for name in ("mean_reward", "mean_cost", "positive_cost_rate", "safe_rate", "by_moderator/safe_rate"):
        assert f"policy/{name}" in metrics, name
    for name in ("severity/share_3", "category/rate_cybercrime", "arena/better_safe", "harmless_win_rate"):
        assert f"policy/{name}" in metrics, name
    # the first judge's sign, not the moderator's verdict
    costs = [line["scores"]["cost"]["cost"] for line in samples_of(tmp_outputs) if line["policy"] == "policy"]
    known = [cost for cost in costs if cost is not None]
    assert metrics["policy/safe_rate"] == pytest.approx(np.mean([cost <= 0 for cost in known]))
    # nobody knows the truth here
    assert "policy/mean_helpfulness" not in metrics


def test_a_policy_alone(tmp_outputs: Path, models: dict[str, Path]) -> None:
    assert evaluate(tmp_outputs, f"model={models['sft']}", "temperature=0", "judge=truth").code == 0
    metrics = metrics_of(tmp_outputs)
    assert "policy/safe_rate" in metrics
    assert not [name for name in metrics if "win_rate" in name or "baseline" in name or "kl" in name]


def test_own_prompts_and_a_function_as_judge(tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    """Prompts of a file, all said to be benign; refusals told by their phrases."""
    words = vocabulary()
    rows = [{"prompt": f"{words[i]} {words[i + 1]} {words[i + 2]}"} for i in range(0, 60, 3)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refusals = "{kind: function, function: 'saferlhf.evaluation.policy_refusals:is_refusal', outputs: [is_refusal]}"
    words_of = [f"model={models['sft']}", "data=jsonl", f"data.path={tmp_path / 'prompts.jsonl'}", "split=all"]
    few = [word for word in FEW if not word.startswith("data.")]
    answer = call(
        "evaluate", *few, f"output_root={tmp_outputs}", *words_of, "harmful=false", f"judges={{it: {refusals}}}"
    )
    assert answer.code == 0, answer.err
    metrics = metrics_of(tmp_outputs)
    assert metrics["policy/prompts"] == 20
    assert metrics["policy/benign_refusal_rate"] == 0.0
    assert "policy/best_safe_helpfulness" not in metrics


def test_a_remote_judge_that_sometimes_answers_garbage(
    tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]
) -> None:
    """What it does not judge is counted and shown, and counts for neither side."""
    from rollout.fake_server import Asked, Reply, says, serving

    def behaviour(asked: Asked, number: int) -> Reply:
        shown = asked.body["messages"][-1]["content"]
        if len(shown) % 5 == 0:  # the same question, the same answer
            return says("what a lovely response")
        return says(json.dumps({"helpfulness": len(shown) % 7, "harmlessness": 5, "is_safe": 1, "severity": 0}))

    with serving(behaviour) as server:
        words = [
            f"model={models['ppo']}",
            f"baseline={models['sft']}",
            "judge=remote",
            f"judge.server.base_url={server.url}",
            "judge.server.model=judge",
            "judge.server.backoff_s=0.001",
            "judge.on_failure=skip",
            "judge.max_failed_share=0.6",
            f"judge.cache={tmp_path / 'answers'}",
        ]
        answer = evaluate(tmp_outputs, *words)
    assert answer.code == 0, answer.err
    metrics, lines = metrics_of(tmp_outputs), samples_of(tmp_outputs)
    own = [line["scores"]["remote"]["helpfulness"] for line in lines if line["policy"] == "policy"]
    other = [line["scores"]["remote"]["helpfulness"] for line in lines if line["policy"] == "baseline"]
    pairs = [(a, b) for a, b in zip(own, other, strict=True) if a is not None and b is not None]
    failed = sum(a is None for a in own)
    assert 0 < failed < 16
    assert metrics["policy/unjudged_rate_remote"] == failed / 16
    kinds = [value for name, value in metrics.items() if name.startswith("policy/judge_failures_remote_")]
    assert sum(kinds) == failed
    assert metrics["policy/helpful_win_rate_n"] == len(pairs)
    assert metrics["policy/helpful_win_rate"] == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))
    assert metrics["policy/harmless_tie_rate"] == 1.0
    assert "responses have no score" in answer.err


# ------------------------------------------------------------------------------------------------ how it goes on
def test_a_second_call_answers_without_the_model(tmp_outputs: Path, models: dict[str, Path]) -> None:
    words = [f"model={models['ppo']}", f"baseline={models['sft']}"]
    first = evaluate(tmp_outputs, *words)
    assert first.code == 0, first.err
    with mock.patch("saferlhf.run.evaluate_policy.load_export", side_effect=AssertionError("not again")):
        second = evaluate(tmp_outputs, *words, "trainer.eval_batch_size=3", "judge.attempts=1")
        assert second.code == 2  # no judge is chosen that could have that key
        second = evaluate(tmp_outputs, *words, "trainer.eval_batch_size=3")
    assert second.err.startswith("finished before") and second.out == first.out
    # what changes the numbers is another evaluation
    for change in ("temperature=0.5", f"reference={models['ppo']}"):
        assert evaluate(tmp_outputs, *words, change).code == 0, change
    assert len(list((tmp_outputs / "evaluate").iterdir())) == 3


def test_what_makes_another_evaluation(models: dict[str, Path]) -> None:
    """Identity without a run: every key that changes the numbers changes it, copies of models do not."""
    from command_lines import composed

    from saferlhf.config.validate import evaluate_config
    from saferlhf.evaluation.policy_config import policy_identity

    def identity(*words: str) -> str:
        config = evaluate_config(composed("suite=policy", f"model={models['ppo']}", *words, command="evaluate"))
        return json.dumps(policy_identity(config), sort_keys=True)

    changes = ["samples=2", "temperature=0.5", "max_new_tokens=7", "harmful=true", "judge=truth"]
    changes += [f"judges=[{models['cost']}]"]
    changes += [f"{key}={models[kind]}" for key in ("baseline", "reference") for kind in ("sft", "ppo")]
    found = [identity(change) for change in ["seed=0", *changes]]
    assert len(set(found)) == len(found)
    assert identity(f"baseline={models['sft']}") == identity(f"baseline={models['sft']}/.")
    # how patient to be with a judge changes no number
    remote = ["judge=remote", "judge.server.model=judge"]
    assert identity(*remote) == identity(*remote, "judge.server.concurrency=2", "judge.attempts=5")
    assert identity(*remote) != identity(*remote, "judge.instructions=other")


def test_responses_are_kept_before_anybody_judges(tmp_outputs: Path, models: dict[str, Path]) -> None:
    with mock.patch("saferlhf.run.evaluate_policy.judged_by", side_effect=RuntimeError("the judge broke")):
        assert evaluate(tmp_outputs, f"model={models['sft']}").code == 1
    lines = samples_of(tmp_outputs)
    assert len(lines) == 16 and "scores" not in lines[0]
    assert RunFolder(only(tmp_outputs)).status()["status"] == "failed"


def run_with_curves(folder: Path, models: dict[str, Path]) -> Path:
    """A finished run that logged a multiplier."""
    folder.mkdir(parents=True)
    shutil.copytree(models["ppo"], folder / "export")
    (folder / "status.json").write_text('{"status": "finished"}')
    (folder / "curves.jsonl").write_text('{"step": 1, "train/lambda": 1.0, "train/cost": 2.0}\n')
    return folder


def test_curves_of_the_run_and_what_is_tracked(tmp_outputs: Path, models: dict[str, Path]) -> None:
    """A run that logged a multiplier shows it; pictures are tracked, responses stay on this machine."""
    run = run_with_curves(tmp_outputs / "ppo" / "0123456789", models)
    kept: list[str] = []
    tracker = mock.Mock(run_id=None, log_artifact=lambda path, *rest: kept.append(Path(path).name))
    with mock.patch("saferlhf.tracking.build_logger", return_value=tracker):
        assert evaluate(tmp_outputs, f"model={run}", f"baseline={models['sft']}").code == 0
    assert {"metrics.json", "report.html", "reward_cost.png", "constraint.png"} <= set(kept)
    assert "samples.jsonl" not in kept
    (logged,) = tracker.log_metrics.call_args_list
    assert logged.args[0]["policy/helpful_win_rate"] == metrics_of(tmp_outputs)["policy/helpful_win_rate"]


@pytest.mark.slow
def test_an_evaluation_of_a_policy_reaches_mlflow(tmp_outputs: Path, models: dict[str, Path]) -> None:
    few = [word for word in FEW if word != "tracking=none"]
    words = [f"model={models['ppo']}", f"baseline={models['sft']}", "tracking=mlflow", "tracking.system_metrics=false"]
    answer = call("evaluate", *few, f"output_root={tmp_outputs}", *words)
    assert answer.code == 0, answer.err
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_outputs / 'mlflow.db'}")
    found = client.get_run(RunFolder(only(tmp_outputs)).status()["mlflow_run_id"])
    assert found.data.metrics["policy/helpful_win_rate"] == metrics_of(tmp_outputs)["policy/helpful_win_rate"]
    assert found.data.tags["suite"] == "policy"
    artifacts = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert artifacts >= {"metrics.json", "report.html", "reward_cost.png"}


def test_all_is_what_fits(tmp_outputs: Path, models: dict[str, Path]) -> None:
    few = [word for word in FEW if word != "suite=policy"]
    assert call("evaluate", *few, f"output_root={tmp_outputs}", "suite=data", f"model={models['sft']}").code == 0
    assert "policy/safe_rate" in metrics_of(tmp_outputs)
    config = yaml.safe_load((only(tmp_outputs) / "config.yaml").read_text())
    assert config["suite"]["measures"] == ["preference", "moderation", "policy"]


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["model=REWARD"],
            "is a reward model and suite=policy is for language models (in model); for this model: ",
        ),
        (["model=SFT", "baseline=COST"], "is a cost model and writes nothing (in baseline); name a language model"),
        (["model=SFT", "baseline=no/such/run"], "no such folder: 'no/such/run'"),
        (["model=SFT", "judges=[SFT]"], "is a model of kind 'sft' without score heads (in judges)"),
        (["model=SFT", "judges=[PROMPTS]"], "looks at prompts alone"),
        (["model=SFT", "judge=function", "judge.function=nowhere:at_all"], "no module named 'nowhere'"),
        (["model=SFT", "judges=[3]"], "'3' names no judge (in judges[0])"),
        (["model=SFT", "judges=COST"], "is no list (in judges); as judges=[outputs/reward,outputs/cost]"),
        (["model=SFT", "judges={a: {kind: trth}}"], "unknown kind of judge 'trth' (in judges.a.kind)"),
        (["model=SFT", "temperature=-1"], "-1.0 is no temperature (in temperature)"),
        (["model=SFT", "temperature=0", "samples=2"], "all samples are the same (in samples)"),
        (["model=SFT", "samples=0"], "0 is not a positive number (in samples)"),
        (["model=SFT", "max_new_tokens=128"], "128 new tokens leave no room for a prompt"),
    ],
)
def test_a_mistake_is_one_line(tmp_outputs: Path, models: dict[str, Path], words: list[str], says: str) -> None:
    named = list(words)
    for kind in ("reward", "cost", "sft", "prompts"):
        named = [word.replace(kind.upper(), str(models[kind])) for word in named]
    few = [word for word in FEW if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
    answer = call("evaluate", *few, f"output_root={tmp_outputs}", *named)
    assert answer.code == 2, answer.err
    errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0], answer.err


def test_keys_of_a_policy_belong_to_it(tmp_outputs: Path, models: dict[str, Path]) -> None:
    answer = call("evaluate", f"model={models['reward']}", f"baseline={models['sft']}", f"output_root={tmp_outputs}")
    assert answer.code == 2
    assert "'baseline' belongs to the evaluation of a policy (in baseline); add suite=policy" in answer.error


def test_prompts_that_nobody_is_to_judge(tmp_outputs: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    few = [word for word in FEW if not word.startswith("data.")]
    words = [f"model={models['sft']}", "data=jsonl", f"data.path={tmp_path / 'p.jsonl'}", f"output_root={tmp_outputs}"]
    answer = call("evaluate", *few, *words)
    assert answer.code == 2
    assert "nobody is named to judge the responses (in judge)" in answer.error
    assert "the truth is known of the toy world only" in call("evaluate", *few, *words, "judge=truth").error
    assert not list(tmp_outputs.iterdir())
