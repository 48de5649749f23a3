"""Reward model: Bradley-Terry on preference pairs.

    L = -log sigmoid(R_w - R_l - margin) + mu (R_w^2 + R_l^2) / 2 + centering (R_w + R_l)^2

Ouyang et al. 2022 and Safe RLHF (Dai et al. 2024), eq. 5; mu is the score regulariser of the released code. Formula and
deviations: docs/reward.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferlhf.data.batches import PairBatch
from saferlhf.ops.losses import reward_loss
from saferlhf.tasks.scoring import PairScoringTask, gather, share_ordered


class RewardTask(PairScoringTask):
    """Learns which of two responses is preferred."""

    def preferred(self, batch: PairBatch) -> Tensor:
        """(B,) index of the preferred response, by the judgement the config names."""
        return getattr(batch, self.config.task.preference)

    def losses(self, scores: Tensor, batch: PairBatch) -> Tensor:
        """(B,) Bradley-Terry loss of each pair."""
        task = self.config.task
        return reward_loss(
            scores,
            self.preferred(batch),
            regularization=task.regularization,
            margin=task.margin,
            centering=task.centering,
        )

    def statistics(self, scores: Tensor, batch: PairBatch) -> dict[str, Tensor]:
        """Pairs ordered right, and the mean score."""
        preferred = self.preferred(batch)  # (B,)
        ahead = torch.where(preferred == 0, scores[:, 0] - scores[:, 1], scores[:, 1] - scores[:, 0])  # (B,)
        right = (0.5 + 0.5 * ahead.sign()) * (preferred >= 0)  # ties half
        return {"pair_accuracy": right.sum(), "score": scores.mean(dim=1).sum()}

    def validation_metrics(self, outputs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
        """Loss and pair accuracy."""
        scores, winner = gather(outputs, "scores"), gather(outputs, self.config.task.preference)
        return {
            "loss": float(gather(outputs, "losses").mean()),
            "reward/pair_accuracy": share_ordered(scores, winner),
            "reward/score_std": float(np.std(scores)),
        }
