"""The measure `preference`: does a reward or cost model order pairs as people did, and what do baselines reach?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.data.build import build_data
from saferlhf.data.encode import Encoder
from saferlhf.data.labels import labels_of
from saferlhf.data.melt import answer_of
from saferlhf.data.rows import PreferencePair
from saferlhf.data.sources.toy import toy_annotators
from saferlhf.evaluation.baselines import answer_baselines, pair_baselines
from saferlhf.evaluation.judgements import of_pairs
from saferlhf.evaluation.plots import score_histograms
from saferlhf.evaluation.preference import evaluate_preference, unsafe_labels
from saferlhf.evaluation.processes import Processes
from saferlhf.evaluation.score import score_rows
from saferlhf.run import measure
from saferlhf.run.judged_model import JudgedModel
from saferlhf.run.measured import Measured
from saferlhf.run.measurements import Measurement, seen_prompts
from saferlhf.run.screen import say

_OF_ORDER = ("pair_accuracy",)
_OF_SIGN = ("sign_accuracy", "fpr", "fnr", "auroc")


def measure_preference(asked: Measurement, model: JudgedModel) -> Measured:
    """Score pairs and hold the scores against their labels.

    Raises:
        UserError: rows without the needed label, or none.
    """
    config, prefix = asked.config, asked.name
    kind: Any = model.kind
    preference = model.preference
    label = (asked.protocol and asked.protocol.preference) or preference  # what the rows are read by
    needs = (f"{label}_response_id",)
    splits = build_data(config.data, PreferencePair, needs)
    rows = _labelled_by(asked.rows(splits), label, preference)
    loaded = model.load(config)
    encoder = Encoder.build(loaded.tokenizer, loaded.metadata.template, loaded.metadata.max_length or 512)
    encoded = encoder.pairs(rows, prefix, splits.report, config.data.policy)
    pairs = list(encoded.rows)
    say(f"{prefix}: scoring {len(pairs):,} pairs with {config.model}")
    autocast = config.trainer.precision != "32-true"
    options: dict[str, Any] = {"batch_size": config.trainer.eval_batch_size, "autocast": autocast}
    scores = score_rows(loaded.model, encoded, processes=Processes.current(), **options)
    metrics = measure.pair_metrics(
        pairs,
        scores,
        kind=kind,
        preference=preference,
        prefix=prefix,
        evaluation=config.evaluation,
        seed=config.seed,
        toyworld=config.data.source == "toyworld",
        annotators=toy_annotators(config.data),
        agreement=config.data.agreement,
    )
    train = asked.training_rows(splits, PreferencePair, (f"{preference}_response_id",))
    if train:
        say(f"{prefix}: training baselines on {len(train):,} pairs")
        metrics |= _baselines(config, kind, preference, train, pairs, prefix)
        if asked.protocol is not None:
            metrics[f"{prefix}/seen_prompt_rate"] = float(np.mean(seen_prompts(pairs, train)))
    drawings = score_histograms(pairs, scores, kind=kind, preference=preference)
    judgements = of_pairs(asked.key, pairs, scores, kind=kind, preference=preference)
    return Measured(
        metrics, splits.report.to_dict(), splits.fingerprint, list(drawings), len(pairs), judgements=judgements
    )


def _labelled_by(rows: Sequence[PreferencePair], label: str, preference: str) -> list[PreferencePair]:
    """The rows, the label that they are read by standing for the one that the model was trained on."""
    if label == preference:
        return list(rows)
    return [replace(row, **{f"{preference}_response_id": getattr(row, f"{label}_response_id")}) for row in rows]


def _baselines(
    config: EvaluateConfig,
    kind: Any,
    preference: str,
    train: Sequence[PreferencePair],
    pairs: Sequence[PreferencePair],
    split: str,
) -> dict[str, float]:
    """`<split>/baseline_<name>/<kind>/<metric>`: pair accuracies, and for a cost the sign and its order too."""

    def measured(name: str, scores: Any, kept: tuple[str, ...]) -> dict[str, float]:
        prefix = f"{split}/baseline_{name}"
        every = evaluate_preference(
            pairs,
            scores,
            kind=kind,
            preference=preference,
            prefix=prefix,
            draws=config.evaluation.bootstrap_draws,
            confidence=config.evaluation.confidence,
            seed=config.seed,
        )
        return {full: value for full, value in every.items() if full.removeprefix(f"{prefix}/{kind}/").startswith(kept)}

    found: dict[str, float] = {}
    sign = -1.0 if kind == "cost" else 1.0  # the safer response costs less
    for name, scores in pair_baselines(train, pairs, preference).items():
        found |= measured(name, sign * scores, _OF_ORDER)
    if kind == "cost" and (unsafe_labels(pairs) >= 0).any() and (unsafe_labels(train) >= 0).any():
        answers = [answer_of(row, side) for side in (0, 1) for row in train]
        asked = [answer_of(row, side) for side in (0, 1) for row in pairs]
        for name, verdicts in answer_baselines(answers, labels_of(answers, ()), asked, heads=("unsafe",)).items():
            p = np.clip(verdicts.p_unsafe, 1e-12, 1 - 1e-12)
            costs = np.log(p / (1 - p)).reshape(2, -1).T  # (n, 2)
            found |= measured(name, costs, _OF_SIGN)
    return found
