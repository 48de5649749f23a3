"""Moderator: is an answer unsafe, of which harm categories, how severe? Three heads on one trunk.

    L = w_u L_unsafe + w_c sum_c L_category + w_s L_severity        per row; the step's sum is divided by its rows

Cross-entropies for unsafe and categories, a cumulative link for severity (`ops/moderation_losses.py`). A missing label
switches off that head's term for its row. Calibration and decisions: `ops/calibration.py`, docs/moderator.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saferlhf.config.task_schema import ModerationConfig
from saferlhf.data.batches import AnswerBatch
from saferlhf.errors import UserError
from saferlhf.models.moderator import head_sizes, logits_of, start_from_base_rates, tie_increments
from saferlhf.models.score_model import ScoreModel
from saferlhf.ops.calibration import Calibration, decide
from saferlhf.ops.moderation import ModerationLabels
from saferlhf.ops.moderation_losses import (
    LossWeights,
    category_weights,
    moderation_loss,
    moderation_terms,
    severity_weights,
)
from saferlhf.ops.moderation_metrics import (
    category_columns,
    category_metrics,
    ranking,
    severity_columns,
    severity_metrics,
    unsafe_columns,
    unsafe_metrics,
)
from saferlhf.tasks.base import SupervisedTask
from saferlhf.tasks.scoring import gather

SHOWN = {
    "unsafe": ("macro_f1", "accuracy", "fpr", "auroc"),
    "severity": ("accuracy", "quadratic_kappa"),
    "category": ("exact_match", "micro_f1"),
}
"""Metrics followed during training; the final measurement has all of them."""


class ModeratorTask(SupervisedTask):
    """Learns to say unsafe or safe, which harm categories, and how severe."""

    @property
    def train_labels(self) -> ModerationLabels:
        """Of the training rows: which heads there are, where they start, and what their labels weigh."""
        labels = self.inputs.labels
        if labels is None:
            raise UserError("the training rows have no labels", "task=moderator", "use data that says which are safe")
        return labels

    def build_model(self, trunk: nn.Module) -> nn.Module:
        """The backbone with the heads that the training rows label."""
        task, labels = self.config.task, self.train_labels
        model = ScoreModel(
            trunk,
            head_sizes(labels),
            pooling=task.pooling,
            seed=self.config.seed,
            layers=task.layers,
            span=task.span,
        )
        start_from_base_rates(model.heads, labels)
        if task.severity_link == "proportional" and "severity" in model.heads:
            tie_increments(model.heads)
        self._weights = loss_weights(task, labels)
        return model

    def scores(self, batch: AnswerBatch) -> dict[str, Tensor]:
        """Head name -> (B, n) float32."""
        assert self.model is not None
        tokens = batch.tokens
        return self.model(tokens.input_ids, tokens.attention_mask, tokens.response_mask)

    def loss_sum(self, batch: AnswerBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over rows, and each head's term before its weight."""
        labels = {"unsafe": batch.unsafe, "severity": batch.severity, "category": batch.category}
        terms = moderation_terms(self.scores(batch), **labels, weights=self._weights)
        loss = sum(getattr(self._weights, head) * term.sum() for head, term in terms.items())
        assert isinstance(loss, Tensor)
        return loss, {f"{head}_loss": term.detach().sum() for head, term in terms.items()}

    def count(self, batch: AnswerBatch) -> int:
        """Rows."""
        return len(batch)

    def outputs(self, batch: AnswerBatch) -> dict[str, Any]:
        """Head outputs, labels and losses of a batch, on the CPU."""
        scores = self.scores(batch)
        labels = {"unsafe": batch.unsafe, "severity": batch.severity, "category": batch.category}
        losses = moderation_loss(scores, **labels, weights=self._weights)
        return {
            "row_ids": batch.tokens.row_ids,
            "losses": losses.float().cpu(),
            **{f"score_{name}": values.float().cpu() for name, values in scores.items()},
            **{name: values.cpu() for name, values in labels.items()},
        }

    def validation_metrics(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
        """Loss, and the main metrics of each head before calibration (temperature 1, thresholds 1/2)."""
        names = self.train_labels.categories
        heads = [name.removeprefix("score_") for name in outputs[0] if name.startswith("score_")]
        scores = {name: torch.from_numpy(gather(outputs, f"score_{name}")) for name in heads}
        labels = ModerationLabels(
            gather(outputs, "unsafe"), gather(outputs, "severity"), gather(outputs, "category"), names
        )
        found: dict[str, float | None] = {"loss": float(gather(outputs, "losses").mean())}
        return found | quick_metrics(scores, labels)


def loss_weights(task: ModerationConfig, labels: ModerationLabels) -> LossWeights:
    """The weights that a task's config means for these training rows."""
    return LossWeights(
        unsafe=task.head_weights.unsafe,
        category=task.head_weights.category,
        severity=task.head_weights.severity,
        unsafe_class=task.unsafe_weight,
        category_positive=category_weights(labels, task.category_weighting),
        severity_level=severity_weights(labels, task.severity_weighting),
    )


def quick_metrics(scores: Mapping[str, Tensor], labels: ModerationLabels) -> dict[str, float | None]:
    """`<head>/<metric>` of `SHOWN`, uncalibrated and without intervals; None where undefined.

    Args:
        scores: head outputs of N rows, as `logits_of`.
        labels: of the same rows.
    """
    logits = logits_of(scores)
    names = labels.categories if logits.category is not None else ()
    verdicts = decide(logits, Calibration.default(names))
    found = {"unsafe": unsafe_metrics(_total(unsafe_columns(verdicts.unsafe, labels.unsafe)))}
    found["unsafe"] |= ranking(logits.unsafe, labels.unsafe)(np.ones((1, len(labels))))
    if verdicts.severity is not None:
        found["severity"] = severity_metrics(_total(severity_columns(verdicts.severity, labels.severity)))
    if verdicts.category is not None:
        columns = category_columns(verdicts.category, labels.category, labels.unsafe)
        found["category"] = category_metrics(_total(columns), names)
    values = {f"{head}/{name}": float(found[head][name][0]) for head in found for name in SHOWN[head]}
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def _total(columns: np.ndarray) -> np.ndarray:
    """(1, m) sums over the rows."""
    return columns.sum(axis=0, keepdims=True)
