"""What a protocol of `evaluate.py` hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from saferlhf.config.schema import EvaluateConfig
from saferlhf.data.build import Splits
from saferlhf.data.splits import take
from saferlhf.errors import UserError


@dataclass
class Measured:
    """Numbers of one protocol, and what the report shows beside them.

    Attributes:
        metrics: flat.
        data_report: of the rows, as in `data_report.json`.
        fingerprint: of the rows.
        drawings: histograms and finished drawings.
    """

    metrics: dict[str, float]
    data_report: dict[str, Any]
    fingerprint: str
    drawings: list[Any] = field(default_factory=list)


def judged_rows(config: EvaluateConfig, rows: Splits[Any]) -> tuple[str, list[Any]]:
    """(name, rows) of the split that is asked for, `evaluation.max_rows` at most.

    Raises:
        UserError: the split has no rows.
    """
    split = config.split or "test"
    part = [*rows.train, *rows.val, *rows.test] if split == "all" else list(getattr(rows, split))
    if not part:
        raise UserError(f"the split '{split}' has no rows", "split", "choose another, or change data.test_fraction")
    return split, part[: config.evaluation.max_rows] if config.evaluation.max_rows else part


def baseline_rows(config: EvaluateConfig, rows: Splits[Any]) -> list[Any]:
    """Training rows for the baselines; none where they would be judged on rows they were trained on, or are off."""
    if not config.baselines or config.split in ("train", "all"):
        return []
    return list(take(list(rows.train), config.baseline_rows, config.seed))
