"""A judge of single answers: a moderator by its calibrated verdicts, a cost model by its sign, others by what they say.

A guard model of others or a remote judge may give no verdict on a row (`OutsideJudge`). Such a row is of no class: it
is counted, and left out of what is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, logit

from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.rollout_schema import GuardJudgeConfig
from saferlhf.config.schema import DataPolicyConfig
from saferlhf.data.encode import EncodedAnswers, Encoder
from saferlhf.data.report import DataReport
from saferlhf.data.rows import QuestionAnswer
from saferlhf.errors import UserError
from saferlhf.evaluation.features import row_features
from saferlhf.evaluation.moderate import moderate_rows
from saferlhf.evaluation.processes import Processes
from saferlhf.evaluation.score import evaluating, score_rows
from saferlhf.models.adapters import has_active_adapter
from saferlhf.models.layers import layer_count
from saferlhf.models.metadata import ExportMetadata
from saferlhf.models.moderator import calibration_of, logits_of
from saferlhf.models.score_model import ScoreModel
from saferlhf.ops.calibration import Calibration, decide
from saferlhf.ops.moderation import ModerationLogits, Verdicts
from saferlhf.rollout.chat_guard import Guard
from saferlhf.rollout.guard import GuardedScorer
from saferlhf.rollout.scorers import ScoreRequest
from saferlhf.run.judged_model import VERDICTS, JudgedModel
from saferlhf.run.screen import say

_BLOCK = 1024  # rows through the heads at once
_ASKED = 256  # rows that a judge of others is asked about at once

Bools = NDArray[np.bool_]


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
        self._cache_dir, self._kept_layers = config.cache_dir, config.kept_layers
        self._processes = Processes.current()

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
            kept: keep the hidden states of a probe in the cache, and take them from there. Every probe of its backbone
                reads the same states; with `kept_layers=own`, every probe of these layers.
        """
        if self._kind == "moderator":
            if kept and _reads_frozen_states(self._model):
                return self._of_features(data, progress)
            progress = _of_all(progress, self._processes, len(data))
            return moderate_rows(self._model, data, progress=progress, **self._pass)
        costs = score_rows(self._model, data, **self._pass)
        if progress is not None:
            progress(len(data))
        return ModerationLogits(np.asarray(costs, np.float64), None, None)

    @property
    def _pass(self) -> dict[str, Any]:
        """How rows go through the model."""
        return {"batch_size": self._batch_size, "autocast": self._autocast, "processes": self._processes}

    def _of_features(self, data: EncodedAnswers, progress: Callable[[int], None] | None) -> ModerationLogits:
        model, processes = self._model, self._processes
        layers = model.layers if self._kept_layers == "own" else range(layer_count(model.trunk) + 1)
        features = row_features(
            model,
            data,
            layers=tuple(layers),
            pooling=model.pooling,
            autocast=self._autocast,
            cache_dir=self._cache_dir,
            progress=lambda f: progress and progress(max(0, len(data) - processes.size * (f.total_rows - f.rows))),
            say=say,
            processes=processes,
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

    def parsed(self, logits: ModerationLogits) -> Bools | None:
        """None: there is a verdict on every row."""
        return None


@dataclass(frozen=True)
class AskedRows:
    """Rows as a judge of others reads them: whole.

    Attributes:
        rows: N of them.
    """

    rows: Sequence[QuestionAnswer]

    def __len__(self) -> int:
        return len(self.rows)


class OutsideJudge:
    """A guard model of others, or a remote judge, in the place of a model: verdicts on `unsafe` alone.

    A guard's number is the log odds of its verdict words (`rollout/chat_guard.py`), unsafe above those of its `zero`. A
    remote judge's is `p_unsafe`, unsafe above one half, or its `cost`, unsafe above 0, or 1 - `is_safe`.

    Args:
        model: with a judge.
        config: device, and where answers are kept.

    Attributes:
        calibration: the defaults: nothing is known of its scale.
        prompt_only: no; texts alone are answers to nothing.
    """

    prompt_only = False

    def __init__(self, model: JudgedModel, config: EvaluateConfig) -> None:
        assert model.judge is not None
        self.calibration = Calibration.default(())
        self._judge, self._scorer = model.judge, model.load(config)
        self._output = next((name for name in VERDICTS if name in self._scorer.outputs), "")
        self._first: tuple[str, str] | None = None  # (row, reason) of the first without a verdict
        self._processes = Processes.current()

    @property
    def categories(self) -> tuple[str, ...]:
        """None: a guard has names of its own for them."""
        return ()

    def encode(self, rows: Sequence[Any], split: str, report: DataReport | None = None) -> AskedRows:
        """The rows; what is too long for the judge is its own affair."""
        return AskedRows(rows)

    def logits(
        self, data: AskedRows, progress: Callable[[int], None] | None = None, *, kept: bool = False
    ) -> ModerationLogits:
        """Log odds of unsafe (of a remote judge's cost: the cost); NaN where there is no verdict.

        Args:
            data: of `encode`.
            progress: called with the number of rows done so far.
            kept: of no meaning here.

        Raises:
            UserError: too many rows have none (`judge.max_failed_share`).
        """
        progress = _of_all(progress, self._processes, len(data))

        def mine() -> tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]:
            numbers = np.array(self._processes.mine(range(len(data))), np.int64)
            said = [np.zeros(0)]
            for start in range(0, len(numbers), _ASKED):
                some = [data.rows[i] for i in numbers[start : start + _ASKED]]
                said.append(self._ask([ScoreRequest(row.id, row.prompt, row.response) for row in some]))
                if progress is not None:
                    progress(start + len(some))
            return numbers, {"unsafe": np.concatenate(said)}

        found = self._processes.united(len(data), mine)["unsafe"]
        self._first = next(filter(None, self._processes.each(lambda: self._first)), None)
        missing = int(np.isnan(found).sum())
        if missing == len(data) or missing > self._judge.max_failed_share * len(data):
            row, reason = self._first or ("", "")
            what = f"{missing:,} of {len(data):,} answers got no verdict; the first, row {row}: {reason}"
            raise UserError(what, f"judge '{self._judge.name}'", "mend the judge, or raise judge.max_failed_share")
        return ModerationLogits(found, None, None)

    def _ask(self, asked: Sequence[ScoreRequest]) -> NDArray[np.float64]:
        scorer = self._scorer.scorer
        if isinstance(scorer, Guard):
            readings = scorer.readings(asked)
            reasons = dict(readings.reasons)
            values = np.where(readings.unparsed, np.nan, readings.logits)
        else:
            policy = replace(self._scorer.policy, max_failed_share=1.0)  # counted over all rows, not over these
            scores = GuardedScorer(scorer, policy).score(asked)
            reasons = {failure.index: failure.reason for failure in scores.failures}
            values = scores.values[self._output]
            if self._output != "cost":
                values = logit(1 - values if self._output == "is_safe" else values)
        if reasons and self._first is None:
            place = min(reasons)
            self._first = (asked[place].row_id, reasons[place])
        return np.asarray(values, np.float64)

    def decide(self, logits: ModerationLogits) -> Verdicts:
        """Probabilities as they are given, not calibrated; rows without a verdict are NaN and not to be read."""
        zero = self._judge.zero if isinstance(self._judge, GuardJudgeConfig) else 0.5
        p = expit(logits.unsafe)
        # a certain judge (p of 0 or 1) has no finite log odds, and rows are then ranked by p
        ranks = logits.unsafe if np.isfinite(logits.unsafe[~np.isnan(logits.unsafe)]).all() else None
        return Verdicts(p, None, None, logits.unsafe > logit(zero), None, None, ranks)

    def parsed(self, logits: ModerationLogits) -> Bools:
        """(N,) True where there is a verdict."""
        return ~np.isnan(logits.unsafe)


def _of_all(progress: Callable[[int], None] | None, processes: Processes, total: int) -> Callable[[int], None] | None:
    """From rows of this process to rows of all, as if the others were as far."""
    if progress is None or processes.size == 1:
        return progress
    return lambda done: progress(min(total, done * processes.size))


def judge_of(model: JudgedModel, config: EvaluateConfig) -> RowJudge | OutsideJudge:
    """The judge that this model is, or the one that stands in its place."""
    return RowJudge(model, config) if model.judge is None else OutsideJudge(model, config)


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
