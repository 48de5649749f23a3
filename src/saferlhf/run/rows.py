"""Rows and token batches of a run: which records and labels each task needs, encoded for its backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from saferlhf.config.schema import TrainConfig
from saferlhf.data.build import Splits, build_data
from saferlhf.data.encode import Encoded, EncodedAnswers, EncodedPairs, Encoder
from saferlhf.data.rows import PreferencePair, QuestionAnswer, Row

ROW_KINDS: dict[str, type[Row]] = {"sft": QuestionAnswer, "reward": PreferencePair, "cost": PreferencePair}


@dataclass
class EncodedSplits:
    """What the loaders and the evaluation work on."""

    encoder: Encoder
    train: Encoded
    val: Encoded
    test: Encoded


def needed_labels(config: TrainConfig) -> tuple[str, ...]:
    """Label columns that the task cannot do without."""
    if config.task.name == "reward":
        return (f"{config.task.preference}_response_id",)
    if config.task.name == "cost":
        return ("safer_response_id", "is_response_0_safe", "is_response_1_safe")
    return ()


def load_splits(config: TrainConfig) -> Splits:
    """Checked rows of the task's kind."""
    return build_data(config.data, ROW_KINDS[config.task.name], needed_labels(config))


def encode_splits(config: TrainConfig, rows: Splits, tokenizer: Any) -> EncodedSplits:
    """Tokens of all splits; over-long rows are handled as `data.policy.overlong` says and counted in the report."""
    encoder = Encoder.build(tokenizer, config.backbone.template, config.backbone.max_length)
    pairs = ROW_KINDS[config.task.name] is PreferencePair

    def encode(part: list[Any], split: str) -> Encoded:
        function = encoder.pairs if pairs else encoder.answers
        return function(part, split, rows.report, config.data.policy)  # type: ignore[operator]

    return EncodedSplits(encoder, encode(rows.train, "train"), encode(rows.val, "val"), encode(rows.test, "test"))


def first_rows(data: Encoded, limit: int | None) -> Encoded:
    """At most `limit` rows of a split, the first ones; all without a limit."""
    n = len(data)
    if limit is None or limit >= n:
        return data
    if isinstance(data, EncodedAnswers):
        return EncodedAnswers(data.rows[:limit], data.store.select(np.arange(limit)), data.truncated[:limit], data.pad)
    kept = np.concatenate([np.arange(limit), n + np.arange(limit)])
    labels = {name: values[:limit] for name, values in data.labels.items()}
    return EncodedPairs(data.rows[:limit], data.store.select(kept), data.truncated[kept], data.pad, labels)
