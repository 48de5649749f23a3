"""A moderator's heads: which there are for a data set, how they start, and what their outputs mean.

Heads are plain linear maps on one pooled state: `unsafe` (1), `category` (C) and `severity` (3, raw numbers of a
cumulative link, `ops/moderation_losses.py`). A head exists only where the training rows label it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from saferlhf.errors import UserError
from saferlhf.models.heads import ScoreHead
from saferlhf.models.metadata import ExportMetadata
from saferlhf.ops.calibration import Calibration
from saferlhf.ops.moderation import SEVERITIES, ModerationLabels, ModerationLogits
from saferlhf.ops.moderation_losses import severity_logits

LINKS = ("partial", "proportional")


def head_sizes(labels: ModerationLabels) -> dict[str, int]:
    """Head name -> number of outputs, for the heads that these training rows label.

    Raises:
        UserError: no row says whether it is unsafe, or all say the same.
    """
    unsafe = labels.unsafe[labels.unsafe >= 0]
    if not len(unsafe) or unsafe.min() == unsafe.max():
        what = "no row says whether it is safe" if not len(unsafe) else "all rows have the same safety label"
        raise UserError(f"{what}: there is nothing to learn", "the train rows", "use data with safe and unsafe answers")
    sizes = {"unsafe": 1}
    if labels.category.shape[1] and (labels.category >= 0).any():
        sizes["category"] = labels.category.shape[1]
    if (labels.severity >= 0).any():
        sizes["severity"] = SEVERITIES - 1
    return sizes


@torch.no_grad()
def start_from_base_rates(heads: nn.ModuleDict, labels: ModerationLabels) -> None:
    """Set the biases so that fresh heads give about the training rows' base rates: no steps are spent on learning them.

    Rates are smoothed by one row on either side, so a label that never occurs starts rare, not impossible.
    """
    head = {name: cast(ScoreHead, module) for name, module in heads.items()}
    unsafe = labels.unsafe[labels.unsafe >= 0]
    head["unsafe"].bias.copy_(torch.tensor([_log_odds(int(unsafe.sum()), len(unsafe))]))
    if "category" in head:
        rows = labels.category[(labels.category >= 0).all(axis=1)]
        head["category"].bias.copy_(torch.tensor([_log_odds(int(n), len(rows)) for n in rows.sum(axis=0)]))
    if "severity" in head:
        known = labels.severity[labels.severity >= 0]
        g = [_log_odds(int((known >= level).sum()), len(known)) for level in range(1, SEVERITIES)]
        falls = [max(a - b, 1e-3) for a, b in itertools.pairwise(g)]
        head["severity"].bias.copy_(torch.tensor([g[0], *(math.log(math.expm1(fall)) for fall in falls)]))


def _log_odds(having: int, rows: int) -> float:
    return math.log((having + 1) / (rows - having + 1))


def tie_increments(heads: nn.ModuleDict) -> None:
    """Proportional odds: the steps between severity levels are the bias alone, the same for every row.

    The weights of the two increments are set to zero and take no gradient, so the head stays an ordinary linear map.
    """
    weight = cast(ScoreHead, heads["severity"]).weight  # (3, H)
    mask = torch.zeros(SEVERITIES - 1, 1)
    mask[0] = 1.0
    with torch.no_grad():
        weight.mul_(mask)
    weight.register_hook(lambda gradient: gradient * mask.to(gradient))


def calibration_of(metadata: ExportMetadata, where: str) -> Calibration:
    """Temperatures and thresholds of an exported moderator.

    Args:
        metadata: of the export.
        where: the export's folder, for messages.

    Raises:
        UserError: a model of another kind, or a calibration that is damaged or does not fit the heads.
    """
    if metadata.calibration is None:
        raise UserError(f"a {metadata.kind} model gives no verdicts", where, "name a moderator (task=moderator)")
    try:
        found = Calibration.from_dict(metadata.calibration)
    except ValueError as error:
        raise UserError(f"the stored calibration is damaged: {error}", where, "export the model again") from error
    if len(found.categories) != metadata.heads.get("category", 0):
        what = f"the calibration has {len(found.categories)} categories, the head {metadata.heads.get('category', 0)}"
        raise UserError(what, where, "export the model again")
    return found


def logits_of(scores: Mapping[str, Tensor]) -> ModerationLogits:
    """Head outputs as cumulative and plain logits in float64.

    Args:
        scores: `unsafe` (N, 1), and where there are such heads `category` (N, C) and `severity` (N, 3) raw.
    """
    plain = {name: values.detach().double().cpu() for name, values in scores.items()}
    severity = plain.get("severity")
    category = plain.get("category")
    return ModerationLogits(
        unsafe=_numbers(plain["unsafe"].squeeze(-1)),
        severity=None if severity is None else _numbers(severity_logits(severity)),
        category=None if category is None else _numbers(category),
    )


def _numbers(values: Tensor) -> np.ndarray:
    return np.ascontiguousarray(values.numpy())
