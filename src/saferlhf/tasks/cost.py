"""Cost model: pairwise and sign terms; cost > 0 means unsafe.

    L = -log sigmoid(C_u - C_s) - sum over both responses of log sigmoid(z C) + mu (C_u^2 + C_s^2) / 2

with z = +1 for an unsafe and -1 for a safe response, C_u the cost of the less safe and C_s of the safer one. Safe RLHF
(Dai et al. 2024), eq. 6. Formula and deviations: docs/cost.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from saferlhf.data.batches import PairBatch
from saferlhf.ops.losses import cost_loss
from saferlhf.tasks.scoring import PairScoringTask, gather, share_ordered


class CostTask(PairScoringTask):
    """Learns which of two responses is less harmful, and the boundary between safe and unsafe."""

    def losses(self, scores: Tensor, batch: PairBatch) -> Tensor:
        """(B,) pairwise and sign loss of each pair."""
        task = self.config.task
        return cost_loss(
            scores,
            batch.safer,
            batch.unsafe,
            pair_weight=task.pair_weight,
            safe_sign_weight=task.safe_sign_weight,
            unsafe_sign_weight=task.unsafe_sign_weight,
            regularization=task.regularization,
        )

    def statistics(self, scores: Tensor, batch: PairBatch) -> dict[str, Tensor]:
        """Share of each pair's responses with the right sign, and the mean cost."""
        right = ((scores > 0) & (batch.unsafe == 1)) | ((scores < 0) & (batch.unsafe == 0))  # (B, 2)
        return {"sign_accuracy": right.float().mean(dim=1).sum(), "cost": scores.mean(dim=1).sum()}

    def validation_metrics(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
        """Loss, pair accuracy (the safer response costs less) and sign accuracy over labelled responses."""
        costs, unsafe = gather(outputs, "scores"), gather(outputs, "unsafe")
        labelled = unsafe >= 0
        right = ((costs > 0) & (unsafe == 1)) | ((costs < 0) & (unsafe == 0))
        return {
            "loss": float(gather(outputs, "losses").mean()),
            "cost/pair_accuracy": share_ordered(-costs, gather(outputs, "safer")),
            "cost/sign_accuracy": float(right[labelled].mean()) if labelled.any() else None,
        }
