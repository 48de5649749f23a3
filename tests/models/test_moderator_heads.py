"""Which heads a data set gives, where they start, and what is stored with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit

from saferlhf.errors import UserError
from saferlhf.models.heads import build_heads
from saferlhf.models.metadata import ExportMetadata
from saferlhf.models.moderator import (
    calibration_of,
    head_sizes,
    logits_of,
    start_from_base_rates,
    tie_increments,
)
from saferlhf.ops.calibration import Calibration
from saferlhf.ops.moderation import ModerationLabels
from saferlhf.ops.moderation_losses import moderation_loss, severity_log_probabilities, severity_logits

SEVERITY = np.array([0] * 48 + [1] * 18 + [2] * 8 + [3] * 22 + [-1] * 5)
CATEGORY = np.zeros((101, 2), dtype=np.int64)
CATEGORY[48:96, 0] = 1
CATEGORY[96:] = -1
LABELS = ModerationLabels(np.where(SEVERITY < 0, -1, SEVERITY > 0).astype(np.int64), SEVERITY, CATEGORY, ("a", "b"))


def test_heads_are_those_that_the_rows_label() -> None:
    assert head_sizes(LABELS) == {"unsafe": 1, "category": 2, "severity": 3}
    none = np.full(101, -1)
    assert head_sizes(replace(LABELS, severity=none)) == {"unsafe": 1, "category": 2}
    assert head_sizes(replace(LABELS, category=np.full((101, 2), -1))) == {"unsafe": 1, "severity": 3}
    assert "category" not in head_sizes(replace(LABELS, category=CATEGORY[:, :0], categories=()))
    with pytest.raises(UserError, match="no row says"):
        head_sizes(replace(LABELS, unsafe=none))
    with pytest.raises(UserError, match="same safety label"):
        head_sizes(replace(LABELS, unsafe=np.zeros(101, dtype=np.int64)))


def test_fresh_heads_say_the_base_rates() -> None:
    heads = build_heads(8, head_sizes(LABELS))
    start_from_base_rates(heads, LABELS)
    state = torch.zeros(1, 8)
    assert heads["unsafe"](state).sigmoid().item() == pytest.approx(49 / 98)
    assert heads["category"](state).sigmoid().tolist()[0] == pytest.approx([49 / 98, 1 / 98])
    tail = severity_logits(heads["severity"](state)).sigmoid().tolist()[0]
    assert tail == pytest.approx([49 / 98, 31 / 98, 23 / 98], abs=1e-6)


def test_levels_that_never_occur_start_finite() -> None:
    labels = replace(LABELS, severity=np.where(SEVERITY == 3, 2, SEVERITY))
    heads = build_heads(8, head_sizes(labels))
    start_from_base_rates(heads, replace(labels, severity=np.where(SEVERITY > 0, 3, SEVERITY)))
    found = severity_log_probabilities(heads["severity"](torch.zeros(1, 8)))
    assert found.isfinite().all()


def test_proportional_odds_move_all_rows_alike() -> None:
    heads = build_heads(8, head_sizes(LABELS))
    tie_increments(heads)
    states = torch.randn(101, 8, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.05)
    targets = {name: torch.from_numpy(getattr(LABELS, name)) for name in ("unsafe", "severity", "category")}
    before = heads["severity"].bias.clone()
    for _ in range(5):
        optimizer.zero_grad()
        moderation_loss({n: h(states) for n, h in heads.items()}, **targets).sum().backward()
        optimizer.step()
    head = heads["severity"]
    assert (head.weight[1:] == 0).all() and (head.weight[0] != 0).all()
    assert (head.bias != before).all()
    steps = severity_logits(head(states)).diff(dim=1)
    torch.testing.assert_close(steps, steps[:1].expand_as(steps))


def test_outputs_become_logits() -> None:
    raw = torch.tensor([[0.5, 1.0, -2.0], [30.0, -30.0, 0.0]], requires_grad=True)
    found = logits_of({"unsafe": torch.tensor([[1.0], [-1.0]]), "severity": raw})
    assert found.unsafe.tolist() == [1.0, -1.0] and found.category is None
    assert found.unsafe.dtype == found.severity.dtype == np.float64
    by_hand = [0.5, 0.5 - np.log1p(np.e), 0.5 - np.log1p(np.e) - np.log1p(np.exp(-2))]
    assert found.severity[0] == pytest.approx(by_hand)
    assert (expit(found.severity[1]) <= 1).all() and found.severity[1, 1] < found.severity[1, 0]


def test_the_calibration_of_an_export() -> None:
    stored = Calibration.default(("a", "b"))
    metadata = ExportMetadata("moderator", heads={"unsafe": 1, "category": 2}, calibration=stored.to_dict())
    assert calibration_of(metadata, "here") == stored
    for damaged in (
        replace(metadata, calibration=None),
        replace(metadata, calibration={"rows": 3}),
        replace(metadata, heads={"unsafe": 1}),
    ):
        with pytest.raises(UserError) as caught:
            calibration_of(damaged, "here")
        assert caught.value.where == "here"


def test_a_calibration_is_part_of_a_models_identity() -> None:
    one = ExportMetadata("moderator", calibration=Calibration.default(("a",)).to_dict())
    other = replace(one, calibration=replace(Calibration.default(("a",)), threshold_unsafe=0.4).to_dict())
    assert len({one.identity(), other.identity(), replace(one, input="prompt").identity()}) == 3
