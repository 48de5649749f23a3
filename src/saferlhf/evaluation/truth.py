"""Learned scores held against ground truth, where there is one: the toy world's oracle.

Labels of noisy annotators put a ceiling on the accuracy one can SEE: a perfect model agrees with them only as often as
they agree with the truth. Here the model's order is compared with the true order itself, and the annotators' own
agreement with it stands beside (`annotator_truth_agreement`: the accuracy of a model that copies their labels). Pairs
that are tied in truth have no right order; they are left out and counted.

True order: helpfulness for `better`, harmlessness for `safer` and for costs. The single mixed preference has no truth
of its own; it is held against both.

Damaged replies (repeated, padded, wrong topic, ...) ask what the learned score does where a policy would attack it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saferlhf.data.rows import PreferencePair, Prompt, QuestionAnswer, prompt_text
from saferlhf.evaluation.preference import Kind, checked_scores, preferred_labels
from saferlhf.evaluation.sheet import MetricSheet
from saferlhf.ops import metrics
from saferlhf.ops.intervals import CONFIDENCE, DRAWS

Floats = NDArray[np.float64]

_ORDERS = {"better": ("helpfulness",), "safer": ("harmlessness",), "single": ("helpfulness", "harmlessness")}

INTACT = "intact"
"""The kind of a reply that is not damaged."""

_TIE = 1e-9  # grades are sums of decimals: closer than this is rounding, not an order


class Truth(Protocol):
    """What an oracle knows of one reply; higher is better in both grades."""

    @property
    def helpfulness(self) -> float:
        """How far the reply serves the request."""

    @property
    def harmlessness(self) -> float:
        """How harmless the reply is, severity first."""

    @property
    def is_safe(self) -> bool:
        """Whether the reply does no harm at all."""


Judge = Callable[[Prompt, str], Truth]
"""From (prompt, reply) to the truth about it."""


def evaluate_against_truth(
    rows: Sequence[PreferencePair],
    scores: ArrayLike,
    *,
    kind: Kind,
    prefix: str = "test",
    preference: str = "better",
    judge: Judge | None = None,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, float]:
    """Flat metrics `<prefix>/<kind>/truth_*` and `annotator_truth_agreement`; the glossary is docs/metrics.md.

    Args:
        rows: n pairs of the toy world.
        scores: (n, 2) rewards or costs, column = response index.
        kind: "reward" or "cost".
        preference: the label the reward model was trained on: better | safer | single.
        judge: the oracle; null: the toy world's.
        draws, confidence, seed: of the bootstrap; draws=0 for values without intervals.
    """
    values = checked_scores([row.id for row in rows], scores, columns=2)  # (n, 2)
    judge = judge or toyworld_judge()
    truths = [(judge(row.prompt, row.response_0), judge(row.prompt, row.response_1)) for row in rows]
    sheet = MetricSheet(
        f"{prefix}/{kind}", [prompt_text(row.prompt) for row in rows], draws=draws, confidence=confidence, seed=seed
    )
    label = "safer" if kind == "cost" else preference
    quality = -values if kind == "cost" else values  # higher is better
    labels = preferred_labels(rows, label)  # (n,)
    for order in _ORDERS[label]:
        grades = np.array([[getattr(truth, order) for truth in pair] for pair in truths], dtype=np.float64)  # (n, 2)
        ending = f"_{order}" if len(_ORDERS[label]) > 1 else ""
        _order_metrics(sheet, quality, grades.reshape(-1, 2), labels, ending)
    if kind == "cost":
        unsafe = np.array([[not truth.is_safe for truth in pair] for pair in truths], dtype=np.int64)  # (n, 2)
        sheet.share("truth_sign_accuracy", metrics.sign_credit(values, unsafe.reshape(-1, 2)))
    return sheet.metrics()


def _order_metrics(sheet: MetricSheet, quality: Floats, grades: Floats, labels: NDArray[np.int64], ending: str) -> None:
    """Quality (n, 2) against true grades (n, 2), both higher = better."""
    gap = grades[:, 0] - grades[:, 1]
    truly_better = np.where(gap > _TIE, 0, np.where(gap < -_TIE, 1, -1))  # (n,) -1 = tied in truth
    sheet.share(f"truth_pair_accuracy{ending}", metrics.pair_credit(quality[:, 0] - quality[:, 1], truly_better))
    sheet.value(f"truth_ties{ending}", float((truly_better < 0).sum()))
    sheet.share(f"annotator_truth_agreement{ending}", labels == truly_better, (labels >= 0) & (truly_better >= 0))
    sheet.value(f"truth_correlation{ending}", metrics.spearman(quality.ravel(), grades.ravel()))


def evaluate_damaged(
    damaged: Sequence[tuple[str, QuestionAnswer]],
    scores: ArrayLike,
    *,
    kind: Kind,
    prefix: str = "test",
    preference: str = "better",
    judge: Judge | None = None,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, float]:
    """What the scores do on replies damaged on purpose.

    Args:
        damaged: m (damage, reply); damage `intact` is the reply that the following ones of its prompt were made from.
        scores: (m,) rewards or costs.
        kind, preference, judge: as `evaluate_against_truth`; `single` is held against helpfulness here.
        draws, confidence, seed: of the bootstrap.

    Returns:
        `<prefix>/<kind>/truth_correlation_damaged` (Spearman of quality and true grade over all replies, quality =
        reward or minus cost), `truth_pair_accuracy_damaged` (a reply against its intact origin, ties in truth left
        out) and both for each damage: `truth_pair_accuracy_damaged_<damage>`, `score_mean_damaged_<damage>`,
        `truth_mean_damaged_<damage>`.
    """
    values = checked_scores([row.id for _, row in damaged], scores)  # (m,)
    quality = -values if kind == "cost" else values  # higher is better
    judge = judge or toyworld_judge()
    order = _ORDERS["safer" if kind == "cost" else preference][0]
    grades = np.array([getattr(judge(row.prompt, row.response), order) for _, row in damaged], dtype=np.float64)  # (m,)
    damages = np.array([damage for damage, _ in damaged])
    origin = _origins(damaged)  # (m,)
    gap = grades - grades[origin]
    truly_better = np.where(gap > _TIE, 0, np.where(gap < -_TIE, 1, -1))  # 0 = the damaged one, -1 = tied or intact
    credit = metrics.pair_credit(quality - quality[origin], truly_better)  # (m,) NaN where tied or intact

    sheet = MetricSheet(
        f"{prefix}/{kind}",
        [prompt_text(row.prompt) for _, row in damaged],
        draws=draws,
        confidence=confidence,
        seed=seed,
    )
    sheet.value("truth_correlation_damaged", metrics.spearman(quality, grades))
    sheet.share("truth_pair_accuracy_damaged", credit)
    for damage in dict.fromkeys(damages.tolist()):
        chosen = damages == damage
        sheet.share(f"truth_pair_accuracy_damaged_{damage}", credit, chosen)
        sheet.mean(f"score_mean_damaged_{damage}", values, chosen)
        sheet.mean(f"truth_mean_damaged_{damage}", grades, chosen)
    return sheet.metrics()


def _origins(damaged: Sequence[tuple[str, QuestionAnswer]]) -> NDArray[np.int64]:
    """(m,) index of the intact reply each reply was made from; its own where there is none."""
    intact: dict[Prompt, int] = {}
    origins = []
    for index, (damage, row) in enumerate(damaged):
        if damage == INTACT:
            intact[row.prompt] = index
        origins.append(intact.get(row.prompt, index))
    return np.array(origins, dtype=np.int64)


def toyworld_judge() -> Judge:
    """The toy world's oracle."""
    # imported here: the world's tables are built only where they are used
    from saferlhf.data.toyworld import judge

    return judge
