"""Tasks with one scalar score per response: the reward and the cost model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saferlhf.data.batches import PairBatch
from saferlhf.models.score_model import ScoreModel
from saferlhf.ops import metrics
from saferlhf.tasks.base import SupervisedTask


class PairScoringTask(SupervisedTask):
    """One head of size one over the pooled response."""

    head_name = "score"

    def build_model(self, trunk: nn.Module) -> nn.Module:
        """The backbone with a linear head (bias included)."""
        task = self.config.task
        return ScoreModel(trunk, {self.head_name: 1}, pooling=task.pooling, seed=self.config.seed, layers=task.layers)

    def pair_scores(self, batch: PairBatch) -> Tensor:
        """(B, 2) float32 scores, column = response index."""
        assert self.model is not None
        scores = self.model(batch.tokens.input_ids, batch.tokens.attention_mask)[self.head_name]  # (2B, 1)
        return scores.squeeze(-1).view(2, -1).T  # (B, 2)

    @abstractmethod
    def losses(self, scores: Tensor, batch: PairBatch) -> Tensor:
        """(B,) loss of each pair from its (B, 2) scores."""

    @abstractmethod
    def statistics(self, scores: Tensor, batch: PairBatch) -> dict[str, Tensor]:
        """Sums over pairs to log beside the loss."""

    def loss_sum(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over pairs."""
        scores = self.pair_scores(batch)  # (B, 2)
        return self.losses(scores, batch).sum(), self.statistics(scores.detach(), batch)

    def count(self, batch: PairBatch) -> int:
        """Pairs."""
        return len(batch)

    def outputs(self, batch: PairBatch) -> dict[str, Any]:
        """Scores and labels of a batch, on the CPU."""
        scores = self.pair_scores(batch)  # (B, 2)
        return {
            "row_ids": batch.tokens.row_ids[: len(batch)],
            "scores": scores.float().cpu(),
            "losses": self.losses(scores, batch).float().cpu(),
            "better": batch.better.cpu(),
            "safer": batch.safer.cpu(),
            "single": batch.single.cpu(),
            "unsafe": batch.unsafe.cpu(),
        }


def gather(outputs: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One array over all batches of a pass; floats as float64, so that means over many rows keep their digits."""
    joined = torch.cat([torch.atleast_1d(output[key]) for output in outputs])
    return (joined.double() if joined.is_floating_point() else joined).numpy()


def share_ordered(scores: np.ndarray, winner: np.ndarray) -> float | None:
    """Share of labelled pairs whose winner has the higher score, ties half; None without labels.

    Args:
        scores: (n, 2).
        winner: (n,) 0 or 1; -1 = not labelled.
    """
    return metrics.pair_accuracy(scores[:, 0] - scores[:, 1], winner).accuracy
