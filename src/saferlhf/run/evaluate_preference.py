"""The protocol `preference`: does a reward or cost model order pairs as people did, and what do baselines reach?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from saferlhf.config.schema import EvaluateConfig
from saferlhf.data.build import build_data
from saferlhf.data.encode import Encoder
from saferlhf.data.labels import labels_of
from saferlhf.data.melt import answer_of
from saferlhf.data.rows import PreferencePair
from saferlhf.evaluation.baselines import answer_baselines, pair_baselines
from saferlhf.evaluation.plots import score_histograms
from saferlhf.evaluation.preference import evaluate_preference, unsafe_labels
from saferlhf.evaluation.score import score_rows
from saferlhf.run import measure
from saferlhf.run.judged_model import JudgedModel
from saferlhf.run.measured import Measured, baseline_rows, judged_rows
from saferlhf.run.screen import say

_OF_ORDER = ("pair_accuracy",)
_OF_SIGN = ("sign_accuracy", "fpr", "fnr", "auroc")


def measure_preference(config: EvaluateConfig, model: JudgedModel) -> Measured:
    """Score the pairs of a split and hold the scores against their labels.

    Raises:
        UserError: rows without the needed label, or none.
    """
    kind: Any = model.kind
    preference = model.preference
    rows = build_data(config.data, PreferencePair, (f"{preference}_response_id",))
    split, part = judged_rows(config, rows)
    loaded = model.load(config)
    encoder = Encoder.build(loaded.tokenizer, loaded.metadata.template, loaded.metadata.max_length or 512)
    encoded = encoder.pairs(part, split, rows.report, config.data.policy)
    pairs = list(encoded.rows)
    say(f"scoring {len(pairs):,} pairs with {config.model}")
    autocast = config.trainer.precision != "32-true"
    scores = score_rows(loaded.model, encoded, batch_size=config.trainer.eval_batch_size, autocast=autocast)
    metrics = measure.pair_metrics(
        pairs,
        scores,
        kind=kind,
        preference=preference,
        prefix=split,
        evaluation=config.evaluation,
        seed=config.seed,
        toyworld=config.data.source == "toyworld",
    )
    train = baseline_rows(config, rows)
    if train:
        say(f"training baselines on {len(train):,} pairs")
        metrics |= _baselines(config, kind, preference, train, pairs, split)
    drawings = score_histograms(pairs, scores, kind=kind, preference=preference)
    return Measured(metrics, rows.report.to_dict(), rows.fingerprint, list(drawings))


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
