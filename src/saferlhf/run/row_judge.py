"""A trained model as a judge of single answers: a moderator by its calibrated verdicts, a cost model by its sign."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import expit

from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.schema import DataPolicyConfig
from saferlhf.data.encode import EncodedAnswers, Encoder
from saferlhf.data.report import DataReport
from saferlhf.errors import UserError
from saferlhf.evaluation.features import row_features
from saferlhf.evaluation.moderate import moderate_rows
from saferlhf.evaluation.score import evaluating, score_rows
from saferlhf.models.adapters import has_active_adapter
from saferlhf.models.metadata import ExportMetadata
from saferlhf.models.moderator import calibration_of, logits_of
from saferlhf.models.score_model import ScoreModel
from saferlhf.ops.calibration import Calibration, decide
from saferlhf.ops.moderation import ModerationLogits, Verdicts
from saferlhf.run.judged_model import JudgedModel
from saferlhf.run.screen import say

_BLOCK = 1024  # rows through the heads at once


class RowJudge:
    """Verdicts of a model.

    Args:
        model: a moderator or a cost model.
        config: device, precision and batch size.

    Attributes:
        calibration: temperatures, thresholds and the names of the harm categories.
        prompt_only: it looks at prompts and not at responses.
    """

    def __init__(self, model: JudgedModel, config: EvaluateConfig) -> None:
        loaded = model.load(config)
        self.calibration = _calibration(loaded.metadata)
        self.prompt_only = reads_prompts_only(loaded.metadata)
        self._kind, self._model = model.kind, loaded.model
        self._encoder = Encoder.build(loaded.tokenizer, loaded.metadata.template, loaded.metadata.max_length or 512)
        self._batch_size = config.trainer.eval_batch_size
        self._autocast = config.trainer.precision != "32-true"
        self._policy = config.data.policy
        self._cache_dir = config.cache_dir

    @property
    def categories(self) -> tuple[str, ...]:
        """Names of the harm categories it tells; none for a cost model."""
        return self.calibration.categories

    def encode(
        self,
        rows: Sequence[Any],
        split: str,
        report: DataReport | None = None,
        policy: DataPolicyConfig | None = None,
    ) -> EncodedAnswers:
        """Tokens of the rows; over-long ones are handled as `policy.overlong` says, by default that of the data."""
        return self._encoder.answers(rows, split, report, policy or self._policy, prompt_only=self.prompt_only)

    def logits(
        self, data: EncodedAnswers, progress: Callable[[int], None] | None = None, *, kept: bool = False
    ) -> ModerationLogits:
        """What the heads say, before calibration; the cost stands for the logit of unsafe.

        Args:
            progress: called with the number of rows done so far.
            kept: keep the hidden states of a probe in the cache, and take them from there. Every probe of these layers
                of its backbone reads the same states.
        """
        if self._kind == "moderator":
            if kept and _reads_frozen_states(self._model):
                return self._of_features(data, progress)
            return moderate_rows(
                self._model, data, batch_size=self._batch_size, autocast=self._autocast, progress=progress
            )
        costs = score_rows(self._model, data, batch_size=self._batch_size, autocast=self._autocast)
        if progress is not None:
            progress(len(data))
        return ModerationLogits(np.asarray(costs, np.float64), None, None)

    def _of_features(self, data: EncodedAnswers, progress: Callable[[int], None] | None) -> ModerationLogits:
        model = self._model
        features = row_features(
            model,
            data,
            layers=model.layers,
            pooling=model.pooling,
            autocast=self._autocast,
            cache_dir=self._cache_dir,
            progress=lambda so_far: progress and progress(len(data) - so_far.total_rows + so_far.rows),
            say=say,
        )
        rows = torch.from_numpy(features.matrix(model.layers, model.span))
        device = next(model.heads.parameters()).device
        parts: dict[str, list[torch.Tensor]] = {}
        with evaluating(model, autocast=False):
            for block in rows.split(_BLOCK):
                for head, values in model.scores(block.to(device)).items():
                    parts.setdefault(head, []).append(values.float().cpu())
        return logits_of({head: torch.cat(values) for head, values in parts.items()})

    def decide(self, logits: ModerationLogits) -> Verdicts:
        """Calibrated probabilities and consistent decisions; a cost above 0 says unsafe."""
        if self._kind == "moderator":
            return decide(logits, self.calibration)
        return Verdicts(expit(logits.unsafe), None, None, logits.unsafe > 0, None, None, logits.unsafe)


def _reads_frozen_states(model: Any) -> bool:
    """Whether this is a probe: heads on chosen layers of a backbone that nothing was added to."""
    return isinstance(model, ScoreModel) and model.layers is not None and not has_active_adapter(model.trunk)


def _calibration(metadata: ExportMetadata) -> Calibration:
    """The calibration of an export, or the defaults for one without.

    Raises:
        UserError: it is damaged, or the export has a category head and does not name its categories.
    """
    where = "saferlhf.json of the export"
    if metadata.calibration is not None:
        return calibration_of(metadata, where)
    width, names = metadata.heads.get("category", 0), tuple(metadata.categories or ())
    if width != len(names):
        what = f"{width} category scores and {len(names)} names of categories"
        raise UserError(what, where, "export the model again")
    return Calibration.default(names)


def reads_prompts_only(metadata: ExportMetadata) -> bool:
    """Whether this is a moderator of prompts."""
    return metadata.input == "prompt"
