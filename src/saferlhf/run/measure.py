"""Final measurements of a run, by task: on the validation and the test rows, and against truth where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from saferlhf.config.online_schema import PpoConfig
from saferlhf.config.schema import EvaluationConfig
from saferlhf.config.task_schema import ModerationConfig, ProbeConfig
from saferlhf.data.encode import Encoded
from saferlhf.data.rows import PreferencePair
from saferlhf.data.sources.toy import toy_annotators
from saferlhf.evaluation.plots import score_histograms
from saferlhf.evaluation.preference import evaluate_preference
from saferlhf.evaluation.score import score_rows
from saferlhf.evaluation.truth import evaluate_against_truth, evaluate_damaged
from saferlhf.run.plan import device_for
from saferlhf.run.rows import first_rows
from saferlhf.run.stages import Evaluation, PreparedRun

if TYPE_CHECKING:
    from saferlhf.data.toyworld import Annotators

DAMAGED_PROMPTS = 300


def measure(prepared: PreparedRun) -> Evaluation:
    """Final metrics of the run's task."""
    model = prepared.task.model
    assert model is not None
    model.to(device_for(prepared.config.trainer.accelerator))
    if prepared.config.task.name == "sft":
        from saferlhf.run.measure_sft import measure_sft

        return measure_sft(prepared)
    if isinstance(prepared.config.task, PpoConfig):
        from saferlhf.run.measure_online import measure_online

        return measure_online(prepared)
    if isinstance(prepared.config.task, ProbeConfig):
        from saferlhf.run.measure_probe import measure_probe

        return measure_probe(prepared)
    if isinstance(prepared.config.task, ModerationConfig):
        from saferlhf.run.measure_moderator import measure_moderator

        return measure_moderator(prepared)
    return _measure_scores(prepared, model)


def _measure_scores(prepared: PreparedRun, model: torch.nn.Module) -> Evaluation:
    config = prepared.config
    kind = config.task.name
    preference = getattr(config.task, "preference", "safer")
    autocast = config.trainer.precision != "32-true"
    metrics: dict[str, float] = {}
    histograms: list[Any] = []
    samples: list[dict[str, Any]] = []
    for split, data in measured_splits(prepared):
        scores = score_rows(model, data, batch_size=config.trainer.eval_batch_size, autocast=autocast)  # type: ignore[arg-type]
        rows: list[PreferencePair] = list(data.rows)  # type: ignore[arg-type]
        metrics |= pair_metrics(
            rows,
            scores,
            kind=kind,
            preference=preference,
            prefix=split,
            evaluation=config.evaluation,
            seed=config.seed,
            toyworld=config.data.source == "toyworld" and split == "test",
            annotators=toy_annotators(config.data),
            agreement=config.data.agreement,
        )
        if split == "test":
            histograms = score_histograms(rows, scores, kind=kind, preference=preference)
            samples = [{"row_id": r.id, "scores": [float(x) for x in s]} for r, s in zip(rows, scores, strict=True)]
    if config.data.source == "toyworld":
        metrics |= _measure_damaged(prepared, model, kind, preference)
    return Evaluation(metrics, histograms, samples)


def measured_splits(prepared: PreparedRun) -> list[tuple[str, Encoded]]:
    """(name, rows) of the held-out splits that have rows, `evaluation.max_rows` of each at most."""
    encoded, limit = prepared.encoded, prepared.config.evaluation.max_rows
    splits = (("val", encoded.val), ("test", encoded.test))
    return [(name, first_rows(data, limit)) for name, data in splits if len(data)]


def pair_metrics(
    rows: list[PreferencePair],
    scores: Any,
    *,
    kind: Any,
    preference: str,
    prefix: str,
    evaluation: EvaluationConfig,
    seed: int,
    toyworld: bool,
    annotators: Annotators | None = None,
    agreement: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Metrics of scored pairs against their labels and, on the toy world, against ground truth.

    How often two annotators agree gives the ceiling: `agreement` says it by label, and on the toy world two further
    annotators of the same kind label every pair.
    """
    label = "safer" if kind == "cost" else preference
    options: dict[str, Any] = {
        "kind": kind,
        "preference": preference,
        "prefix": prefix,
        "draws": evaluation.bootstrap_draws,
        "confidence": evaluation.confidence,
        "seed": seed,
    }
    known = (agreement or {}).get(label)
    if toyworld and annotators is not None:
        from saferlhf.data.toyworld import statistics

        known = statistics(rows, annotators).get(f"agreement/{label}")
    metrics = evaluate_preference(rows, scores, agreement=known, **options)
    return metrics | evaluate_against_truth(rows, scores, **options) if toyworld else metrics


def _measure_damaged(prepared: PreparedRun, model: torch.nn.Module, kind: Any, preference: str) -> dict[str, float]:
    """Does the score see through repetition, padding, wrong topics? A policy will try them all."""
    from saferlhf.data.toyworld import damaged_replies

    config = prepared.config
    damaged = damaged_replies(DAMAGED_PROMPTS, "test", config.data.seed)
    answers = prepared.encoded.encoder.answers([answer for _, answer in damaged], "test")
    autocast = config.trainer.precision != "32-true"
    scores = score_rows(model, answers, batch_size=config.trainer.eval_batch_size, autocast=autocast)
    return evaluate_damaged(
        damaged,
        scores,
        kind=kind,
        preference=preference,
        draws=config.evaluation.bootstrap_draws,
        confidence=config.evaluation.confidence,
        seed=config.seed,
    )
