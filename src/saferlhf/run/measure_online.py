"""Final measurements of a policy trained online: what it answers to held-out prompts, against the policy it began as.

Judges: the run's own reward and costs and, on the toy world, the truth, which counts first. Responses of both policies
are drawn with the same noise. They go to `samples.jsonl` unread: they may be harmful, so none is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from saferlhf.config.rollout_schema import TruthJudgeConfig
from saferlhf.data.templates import end_id, pad_id
from saferlhf.evaluation.overoptimisation import (
    PICTURE,
    Overoptimisation,
    overoptimisation,
    overoptimisation_png,
    overoptimisation_svg,
)
from saferlhf.evaluation.plots import Curve
from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers, PromptSet, judged_by
from saferlhf.evaluation.policy_metrics import policy_metrics
from saferlhf.evaluation.policy_plots import (
    CURVES,
    SCATTER,
    constraint_png,
    scatter_png,
    scatter_svg,
    threshold_levels,
)
from saferlhf.evaluation.policy_samples import sample_lines
from saferlhf.evaluation.policy_truth import best_metrics, harmful_requests
from saferlhf.ops.constraint import UpperBound
from saferlhf.rollout.build import build_scorer
from saferlhf.rollout.experience import Rollout
from saferlhf.rollout.generate import generate
from saferlhf.run.stages import Evaluation, PreparedRun
from saferlhf.tasks.actor_critic import ActorCriticTask
from saferlhf.training.curves import read_curves

PROMPTS = 400
"""Held-out prompts that are answered; `evaluation.max_rows` may say fewer or more."""

OWN_JUDGE = "roles"
"""Name under which the run's own scores stand among the judges."""


def measure_online(prepared: PreparedRun) -> Evaluation:
    """Metrics `policy/...` of the actor on test prompts, with the reference as baseline."""
    config, task = prepared.config, prepared.task
    limit = max(config.evaluation.max_rows or PROMPTS, getattr(config.constraint, "test_prompts", 0))
    chosen = prepared.encoded.test.tokens[:limit]
    if not chosen:
        return Evaluation({}, [], [])
    toyworld = config.data.source == "toyworld"
    prompts = PromptSet(
        ids=tuple(prompt.row_id for prompt in chosen),
        prompts=tuple(prompt.prompt for prompt in chosen),
        harmful=harmful_requests([prompt.prompt for prompt in chosen], toyworld=toyworld),
    )
    policies: dict[str, PolicyAnswers] = {}
    costs: dict[str, Any] = {}
    for name, role in (("policy", "actor"), ("baseline", "reference")):
        rollout = _sampled(prepared, role, chosen)
        answers, own = _own_scores(task, rollout)
        if role == "actor":
            costs = own
        if toyworld:
            truth = build_scorer(TruthJudgeConfig(name="truth", categories=True))
            # the truth first: the first judge names a quantity
            judged = judged_by(prompts, replace(answers, judged={}), [truth]).judged
            answers = replace(answers, judged={**judged, **answers.judged})
        policies[name] = answers
    metrics = policy_metrics(
        prompts,
        policies["policy"],
        policies["baseline"],
        draws=config.evaluation.bootstrap_draws,
        confidence=config.evaluation.confidence,
        seed=config.seed,
    )
    metrics |= {"policy/prompts": float(len(prompts)), "policy/samples": 1.0}
    if toyworld:
        metrics |= best_metrics(prompts.prompts)
    metrics |= {f"train/final_lambda_{name}": value for name, value in task.constraint.lambdas.items()}
    if isinstance(task.constraint, UpperBound):
        test = task.constraint.test(costs, list(prompts.ids))
        metrics |= {f"policy/safety_test/{name}": value for name, value in test.metrics().items()}
        test.require("export")
    curves = read_curves(prepared.folder.path / "curves.jsonl")
    optimised = overoptimisation(curves)
    metrics |= {} if optimised is None else optimised.metrics()
    return Evaluation(metrics, _pictures(prepared, policies, curves, optimised), sample_lines(prompts, policies))


def _pictures(
    prepared: PreparedRun,
    policies: dict[str, PolicyAnswers],
    curves: Mapping[str, Curve],
    optimised: Overoptimisation | None,
) -> list[Any]:
    """PNGs of the responses and of training in the run's folder; drawings for its report."""
    folder, levels = prepared.folder.path, threshold_levels(prepared.config.constraint.threshold)
    scatter_png(folder / SCATTER, policies)
    constraint_png(folder / CURVES, curves, levels)
    drawings = [scatter_svg(policies)]
    if optimised is not None:
        overoptimisation_png(folder / PICTURE, optimised)
        drawings.append(overoptimisation_svg(optimised))
    return [drawing for drawing in drawings if drawing is not None]


def _sampled(prepared: PreparedRun, role: str, chosen: Any) -> Rollout:
    config, task, tokenizer = prepared.config, prepared.task, prepared.tokenizer
    assert config.rollout is not None
    with task.roles.causal(role) as policy:
        return generate(
            policy,
            chosen,
            seed=config.seed,
            temperature=config.rollout.temperature,
            max_new_tokens=config.rollout.new_tokens,
            eos_token_id=end_id(tokenizer),
            pad_token_id=pad_id(tokenizer),
            batch_size=config.rollout.batch_size,
            batch_tokens=config.rollout.batch_tokens,
            tokenizer=tokenizer,
        )


def _own_scores(task: ActorCriticTask, rollout: Rollout) -> tuple[PolicyAnswers, dict[str, Any]]:
    """The answers as the run's own reward and costs see them, and the costs themselves, (n,) each."""
    assert task.roles is not None
    device = next(task.roles.parameters()).device
    scores = task.signals.score(rollout, device)
    values = {name: value.double().numpy()[:, None] for name, value in scores.values.items()}
    rejected = (~scores.scored).numpy()[:, None]
    answers = PolicyAnswers(
        texts=tuple((text,) for text in rollout.responses or ()),
        tokens=rollout.response_lengths.numpy()[:, None],
        truncated=rollout.truncated.numpy()[:, None],
        judged={OWN_JUDGE: Judged(values, rejected=rejected)},
    )
    return answers, {name: torch.as_tensor(value) for name, value in scores.costs.items()}
