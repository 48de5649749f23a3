"""What a measurement of `evaluate.py` hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from saferlhf.evaluation.judgements import Judgements


@dataclass
class Measured:
    """Numbers of one measurement, and what the report shows beside them.

    Attributes:
        metrics: flat.
        data_report: of the rows, as in `data_report.json`.
        fingerprint: of the rows.
        drawings: histograms and finished drawings.
        rows: how many were judged.
        marks: what a reader must know of the way they were judged, as "off-protocol: ...".
        judgements: row by row, for comparisons with other models; None for policies, which have samples.
    """

    metrics: dict[str, float]
    data_report: dict[str, Any]
    fingerprint: str
    drawings: list[Any] = field(default_factory=list)
    rows: int = 0
    marks: list[str] = field(default_factory=list)
    judgements: Judgements | None = None
