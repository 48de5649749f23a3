"""Final measurements of a probe: calibrated on out-of-fold outputs of the training rows, measured on held-out rows.

Validation and test rows go through the same heads by way of their features, which are cached too. The exported model
computes its hidden states itself; on a few rows its outputs are compared with these before anything is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from saferlhf.data.encode import EncodedAnswers
from saferlhf.data.rows import prompt_text
from saferlhf.evaluation.comparison import compare_verdicts
from saferlhf.evaluation.moderate import moderate_rows
from saferlhf.evaluation.moderation import evaluate_moderation
from saferlhf.models.moderator import logits_of
from saferlhf.ops.calibration import Calibration, decide, fit_calibration
from saferlhf.ops.linear_probe import apply_heads
from saferlhf.ops.moderation import ModerationLogits
from saferlhf.run.fit_probe import probe_task, split_features
from saferlhf.run.measure import measured_splits
from saferlhf.run.measure_moderator import ModeratedSplit, first_of, moderator_evaluation, objectives_of
from saferlhf.run.rows import first_rows
from saferlhf.run.screen import say
from saferlhf.run.stages import Evaluation, PreparedRun
from saferlhf.tasks.probe_fit import LinearFit, ProbeFit

CHECKED_ROWS = 16
LARGEST_DIFFERENCE = 0.5
"""Of a logit between cached features and the model's own forward pass; beyond it something is mixed up."""

FITTED_ON = "out-of-fold outputs of the train rows"


def measure_probe(prepared: PreparedRun) -> Evaluation:
    """Calibrate on what cross-validation left, then measure: `cv/...` on the training rows, `val/...`, `test/...`."""
    config, encoded, fit = prepared.config, prepared.encoded, probe_task(prepared).fit_result
    assert fit is not None
    labels, logits = encoded.labels(encoded.train), logits_of(fit.scores)
    calibration = fit_calibration(logits, labels, objectives_of(config), fitted_on=FITTED_ON)
    splits = []
    for name, data in measured_splits(prepared):
        whole = getattr(encoded, name)
        split = ModeratedSplit(name, whole.rows, encoded.labels(whole), _logits(prepared, name))
        splits.append(first_of(split, len(data)))
    found = moderator_evaluation(config, splits, calibration)
    row_ids = [row.id for row in encoded.train.rows]
    out_of_fold = evaluate_moderation(row_ids, labels, logits, decide(logits, calibration), prefix="cv", draws=0)
    metrics = {**out_of_fold, **found.metrics, "train/export_difference": _export_difference(prepared)}
    if fit.linear is not None:
        metrics |= _over_linear(prepared, fit.linear, calibration, splits)
    return replace(found, metrics=metrics, calibration=calibration)


def _over_linear(
    prepared: PreparedRun, linear: LinearFit, calibration: Calibration, splits: Sequence[ModeratedSplit]
) -> dict[str, float]:
    """What the kernel gains over linear heads (logistic regressions) on the same features and test rows, paired.

    Both were cross-validated on the same folds, and both have thresholds of their own.
    """
    config, encoded, fit = prepared.config, prepared.encoded, probe_task(prepared).fit_result
    assert fit is not None
    labels = encoded.labels(encoded.train)
    theirs = fit_calibration(logits_of(linear.scores), labels, objectives_of(config), fitted_on=FITTED_ON)
    for split in splits:
        if split.name == "test":
            pooled = _pooled(prepared, "test", fit)[: len(split.rows)]
            return compare_verdicts(
                split.labels,
                decide(split.logits, calibration),
                decide(logits_of(apply_heads(linear.heads, pooled)), theirs),
                clusters=[prompt_text(row.prompt) for row in split.rows],
                prefix="test/over_linear",
                draws=config.evaluation.bootstrap_draws,
                confidence=config.evaluation.confidence,
                seed=config.seed,
            )
    return {}


def _logits(prepared: PreparedRun, split: str) -> ModerationLogits:
    """Outputs of the fitted heads for the features of a split."""
    return logits_of(_scores(prepared, split))


def _scores(prepared: PreparedRun, split: str) -> dict[str, Tensor]:
    task = probe_task(prepared)
    assert task.fit_result is not None
    rows = _pooled(prepared, split, task.fit_result)
    with torch.no_grad():
        return task.score_model.to("cpu").scores(rows)


def _pooled(prepared: PreparedRun, split: str, fit: ProbeFit) -> Tensor:
    """(N, F) pooled states of a split, as the heads read them."""
    features = split_features(prepared, split, probe_task(prepared).candidates())
    return torch.from_numpy(features.matrix(fit.layers, prepared.config.task.span))


def _export_difference(prepared: PreparedRun) -> float:
    """Largest difference of a logit between the heads on cached features and the model as it will be used.

    Raises:
        RuntimeError: so large that the two are not the same model.
    """
    config, model = prepared.config, probe_task(prepared).score_model
    split = "test" if len(prepared.encoded.test) else "train"
    data = getattr(prepared.encoded, split)
    assert isinstance(data, EncodedAnswers)
    part = first_rows(data, CHECKED_ROWS)
    assert isinstance(part, EncodedAnswers)
    model.to(next(model.trunk.parameters()).device)
    own = moderate_rows(model, part, batch_size=4, autocast=config.trainer.precision != "32-true")
    cached = _logits(prepared, split)
    differences = [np.abs(own.unsafe - cached.unsafe[: len(part)])]
    for one, other in ((own.severity, cached.severity), (own.category, cached.category)):
        if one is not None and other is not None:
            differences.append(np.abs(one - other[: len(part)]).ravel())
    largest = float(np.concatenate(differences).max())
    say(f"the model's own forward pass gives the logits of the cached features to {largest:.1g}")
    if not largest <= LARGEST_DIFFERENCE:
        raise RuntimeError(f"cached features and forward pass differ by {largest:.3g} in a logit")
    return largest
