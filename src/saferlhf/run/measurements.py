"""What an evaluation measures: the suite's measures on the rows of `data=`, and protocols that bring rows of their own.

Each measurement is one (rows, measure) for the model at hand. What is not for this kind of model, or has no rows here,
is refused or left out with its reason, as the suite says (`suite.unfit`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from saferlhf.config.evaluate_schema import EvaluateConfig, ProtocolConfig
from saferlhf.config.identity import identity_tree
from saferlhf.config.schema import DataConfig
from saferlhf.data.build import Splits, build_data, data_fingerprint
from saferlhf.data.rows import QuestionAnswer, Row
from saferlhf.data.splits import prompt_key, take
from saferlhf.errors import UserError
from saferlhf.evaluation.baselines import AnswerBaselines
from saferlhf.evaluation.policy_config import asked_judges
from saferlhf.run.judged_model import POLICY, JudgedModel, fits, kinds_of, refuse_unfit
from saferlhf.run.screen import say

RowT = TypeVar("RowT", bound=Row)


class LeftOut(NamedTuple):
    """A protocol that was not measured, and why."""

    name: str
    reason: str


class TrainingRows:
    """Rows that the baselines of protocols learn from; loaded once, for all of them.

    Args:
        config: names them in `baseline_data`; below `data.root` where they have no root of their own.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self._known: dict[type[Any], list[Any]] = {}
        self._baselines: dict[bool, tuple[Sequence[QuestionAnswer], AnswerBaselines]] = {}

    @property
    def name(self) -> str:
        """Of the data set."""
        return "" if self._config.baseline_data is None else self._config.baseline_data.name

    def of(self, kind: type[RowT], needs: Sequence[str]) -> list[RowT]:
        """Training rows of this kind; none where there is no such data set here, which is said once."""
        if self._config.baseline_data is None:
            return []
        if kind not in self._known:
            try:
                data = _rooted(self._config.baseline_data, self._config)
                rows = build_data(replace(data, split="train", test_path=None), kind, needs).train
                self._known[kind] = list(take(list(rows), self._config.baseline_rows, self._config.seed))
            except UserError as error:
                say(f"no baselines and no check for known prompts: {error}")
                self._known[kind] = []
        return self._known[kind]

    def baselines(self, rows: Sequence[QuestionAnswer], *, prompt_only: bool) -> AnswerBaselines:
        """Baselines that learn from these rows; those of the rows that were given last time are kept."""
        last = self._baselines.get(prompt_only)
        if last is None or list(last[0]) != list(rows):
            self._baselines[prompt_only] = (rows, AnswerBaselines(rows, prompt_only=prompt_only))
        return self._baselines[prompt_only][1]


@dataclass(frozen=True)
class Measurement:
    """One thing to measure.

    Attributes:
        name: prefix of its metrics: the split, or the protocol's name.
        measure: preference | moderation | policy.
        config: the evaluation's, with the rows of this measurement as `data` and `split`.
        protocol: None for the rows of `data=`.
        training: for the baselines of a protocol.
    """

    name: str
    measure: str
    config: EvaluateConfig
    protocol: ProtocolConfig | None
    training: TrainingRows = field(repr=False, compare=False)

    @property
    def key(self) -> str:
        """Tells it from the others of an evaluation."""
        return self.measure if self.protocol is None else self.protocol.name

    def rows(self, splits: Splits[RowT]) -> list[RowT]:
        """The rows to be judged.

        Raises:
            UserError: there are none.
        """
        split = self.config.split or "test"
        parts = [splits.train, splits.val, splits.test] if split == "all" else [getattr(splits, split)]
        all_rows: list[RowT] = [row for part in parts for row in part]
        if not all_rows:
            raise UserError(f"the split '{split}' has no rows", "split", "choose another, or change data.test_fraction")
        if self.protocol is not None and self.protocol.max_rows is not None:
            groups = splits.groups if self.protocol.per_group else {}
            all_rows = _capped(all_rows, self.protocol.max_rows, groups)
        limit = self.config.evaluation.max_rows
        return all_rows[:limit] if limit else all_rows

    def training_rows(self, splits: Splits[RowT], kind: type[RowT], needs: Sequence[str]) -> list[RowT]:
        """Rows for the baselines; none where they would be judged on rows they learnt from, or are off."""
        config = self.config
        if not config.baselines:
            return []
        if self.protocol is not None:
            return self.training.of(kind, needs)
        if config.split in ("train", "all"):
            return []
        chosen: list[Any] = take(list(splits.train), config.baseline_rows, config.seed)
        return chosen


def _capped(rows: Sequence[RowT], limit: int, groups: dict[str, str]) -> list[RowT]:
    """At most `limit` rows of each group, in their order. Which ones depends on nothing but the rows themselves."""
    order = sorted(range(len(rows)), key=lambda i: hashlib.sha256(rows[i].id.encode()).digest())
    taken: dict[str, int] = {}
    kept = []
    for i in order:
        group = groups.get(rows[i].id, "")
        taken[group] = taken.get(group, 0) + 1
        if taken[group] <= limit:
            kept.append(i)
    return [rows[i] for i in sorted(kept)]


def seen_prompts(rows: Sequence[Row], training: Sequence[Row]) -> list[bool]:
    """Whether each row's prompt is one of the training rows', by its normalised words."""
    known = {prompt_key(row.prompt) for row in training}
    return [prompt_key(row.prompt) in known for row in rows]


# ------------------------------------------------------------------------------------------------ which
def measurements_for(config: EvaluateConfig, model: JudgedModel) -> tuple[list[Measurement], list[LeftOut]]:
    """What to measure of this model, and what is left out.

    Raises:
        UserError: nothing is left to measure; or something does not fit, and the suite does not skip it.
    """
    training = TrainingRows(config)
    suite = config.suite
    wanted = [] if config.protocol is not None else list(suite.measures)
    protocols = [config.protocol] if config.protocol is not None else list(suite.protocols.values())
    skip = suite.unfit == "skip" and config.protocol is None
    fitting = [measure for measure in wanted if fits(model, measure)]
    if len(fitting) < len(wanted) and (not skip or not (fitting or protocols)):
        refuse_unfit(model, f"suite={suite.name}", next(m for m in wanted if m not in fitting))
    found = [Measurement(config.split or "test", measure, config, None, training) for measure in fitting]
    left_out: list[LeftOut] = []
    first: UserError | None = None
    failed = ""
    for protocol in protocols:
        if skip and not any(fits(model, measure) for measure in protocol.measures):
            left_out.append(LeftOut(protocol.name, f"for {kinds_of(protocol.measures)} models"))
            continue
        try:
            found += _of_protocol(protocol, config, model, training)
        except UserError as error:
            if not skip:
                raise
            first, failed = first or error, failed or protocol.name
            left_out.append(LeftOut(protocol.name, str(error)))
    if not found:
        if first is None and protocols:
            refuse_unfit(model, f"suite={suite.name}", *protocols[0].measures)
        if first is None:
            raise UserError("nothing to measure", "suite", "choose a suite with measures or protocols")
        mend = "data.root=FOLDER where the data sets are, or suite=data for what can be measured on data="
        raise UserError(f"no protocol can be measured; {failed}: {first.what}", first.where, mend)
    return found, left_out


def _of_protocol(
    protocol: ProtocolConfig, config: EvaluateConfig, model: JudgedModel, training: TrainingRows
) -> list[Measurement]:
    fitting = [measure for measure in protocol.measures if fits(model, measure)]
    if not fitting:
        refuse_unfit(model, f"protocol={protocol.name}", *protocol.measures)
    harmful = config.harmful if protocol.harmful is None else protocol.harmful
    own = replace(config, data=_rooted(protocol.data, config), split="test", harmful=harmful)
    data_fingerprint(own.data)  # the files are there
    if POLICY in fitting:
        asked_judges(own)
    return [Measurement(protocol.name, measure, own, protocol, training) for measure in fitting]


def _rooted(data: DataConfig, config: EvaluateConfig) -> DataConfig:
    root = config.data.root if data.root is None else data.root
    return replace(data, root=root, seed=config.data.seed)


def measurement_identity(measurement: Measurement) -> dict[str, Any]:
    """What makes the numbers of a protocol: its rows by content, and what is done with them."""
    protocol = measurement.protocol
    assert protocol is not None
    return {
        "name": protocol.name,
        "measure": measurement.measure,
        "data": identity_tree(measurement.config.data, lambda key, value: "by fingerprint"),
        "fingerprint": data_fingerprint(measurement.config.data),
        "unit": protocol.unit,
        "max_rows": protocol.max_rows,
        "per_group": protocol.per_group,
        "preference": protocol.preference,
        "harmful": measurement.config.harmful,
    }
