"""Verdicts by group: hand-worked shares, groups of two parts, unlabelled rows."""

from __future__ import annotations

import numpy as np
import pytest

from saferlhf.evaluation.by_group import group_metrics
from saferlhf.ops.moderation import Verdicts


def verdicts(p: list[float]) -> Verdicts:
    values = np.array(p)
    return Verdicts(values, None, None, values >= 0.5, None, None)


GROUPS = ["en/drugs", "en/drugs", "en/common sense", "fr/drugs", "fr/common sense", ""]
UNSAFE = np.array([1, 1, 0, 1, 0, 1])
P = [0.9, 0.2, 0.6, 0.8, 0.1, 0.0]


def test_a_group_counts_under_each_of_its_parts() -> None:
    found = group_metrics(
        GROUPS, ["language", "topic"], UNSAFE, verdicts(P), clusters=list("abcdef"), prefix="x", draws=200
    )
    assert found["x/by_language/en_accuracy"] == pytest.approx(1 / 3)
    assert found["x/by_language/en_accuracy_n"] == 3
    assert found["x/by_language/fr_accuracy"] == 1
    assert found["x/by_topic/drugs_accuracy"] == pytest.approx(2 / 3)
    assert found["x/by_topic/common_sense_predicted_rate"] == 0.5
    assert found["x/by_language/en_auroc"] == 0.5  # 0.9 and 0.2 against 0.6
    assert found["x/by_language/fr_auroc"] == 1
    assert "x/by_topic/drugs_auroc" not in found  # one class only
    assert found["x/by_language/en_accuracy_low"] <= 1 / 3 <= found["x/by_language/en_accuracy_high"]
    assert not any(name.endswith("/_accuracy") for name in found)


def test_rows_without_a_label_count_nowhere() -> None:
    unsafe = UNSAFE.copy()
    unsafe[1] = -1
    found = group_metrics(GROUPS, ["language"], unsafe, verdicts(P), clusters=list("abcdef"), prefix="x", draws=0)
    assert found["x/by_language/en_accuracy"] == 0.5
    assert not any("topic" in name for name in found)
