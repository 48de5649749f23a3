"""Rows and token batches of a run: which records and labels each task needs, encoded for its backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferlhf.config.online_schema import PpoConfig
from saferlhf.config.schema import DataPolicyConfig, TrainConfig
from saferlhf.config.task_schema import ModerationConfig
from saferlhf.data.build import Splits, build_data
from saferlhf.data.encode import Encoded, EncodedAnswers, EncodedPairs, Encoder
from saferlhf.data.labels import categories_of, labels_of, prompts_of
from saferlhf.data.rows import PreferencePair, PromptRow, QuestionAnswer, Row
from saferlhf.data.splits import prompt_key
from saferlhf.errors import UserError
from saferlhf.ops.folds import grouped_folds
from saferlhf.ops.moderation import ModerationLabels

ROW_KINDS: dict[str, type[Row]] = {
    "sft": QuestionAnswer,
    "reward": PreferencePair,
    "cost": PreferencePair,
    "moderator": QuestionAnswer,
    "probe": QuestionAnswer,
    "ppo": PromptRow,
    "ppo_lag": PromptRow,
}


@dataclass
class EncodedSplits:
    """What the loaders and the evaluation work on.

    Attributes:
        encoder: of the backbone.
        train, val, test: rows with their tokens; with labels for a moderator.
        categories: harm categories in the order of a moderator's columns; empty for other tasks.
        supervised: demonstrations beside an online task's prompts; None: none are used.

    The splits of an online task are `EncodedPrompts`.
    """

    encoder: Encoder
    train: Any
    val: Any
    test: Any
    categories: tuple[str, ...] = ()
    supervised: Any = None

    def labels(self, part: Encoded) -> ModerationLabels:
        """Labels of the answers of a part, which may be a selection of one."""
        assert isinstance(part, EncodedAnswers)
        return labels_of(part.rows, self.categories)


def needed_labels(config: TrainConfig) -> tuple[str, ...]:
    """Label columns that the task cannot do without."""
    if config.task.name == "reward":
        return (f"{config.task.preference}_response_id",)
    if config.task.name == "cost":
        return ("safer_response_id", "is_response_0_safe", "is_response_1_safe")
    if isinstance(config.task, ModerationConfig):
        return ("is_safe",)
    return ()


def load_splits(config: TrainConfig) -> Splits:
    """Checked rows of the task's kind; for a moderator of prompts, one row for each prompt."""
    rows: Any = build_data(config.data, ROW_KINDS[config.task.name], needed_labels(config))
    if isinstance(config.task, ModerationConfig) and config.task.input == "prompt":
        rows = replace(rows, train=prompts_of(rows.train), val=prompts_of(rows.val), test=prompts_of(rows.test))
    return rows


def encode_splits(config: TrainConfig, rows: Splits, tokenizer: Any) -> EncodedSplits:
    """Tokens of all splits; over-long rows are handled as `data.policy.overlong` says and counted in the report."""
    encoder = Encoder.build(tokenizer, config.backbone.template, config.backbone.max_length)
    if isinstance(config.task, ModerationConfig):
        return _encode_labelled(config.task, rows, encoder, config.data.policy)
    if isinstance(config.task, PpoConfig):
        from saferlhf.run.online import encode_prompts, supervised_rows  # with models and trainer: heavy

        train, val, test = (encode_prompts(config, encoder, p, tokenizer) for p in (rows.train, rows.val, rows.test))
        return EncodedSplits(encoder, train, val, test, supervised=supervised_rows(config, encoder))
    pairs = ROW_KINDS[config.task.name] is PreferencePair

    def encode(part: list[Any], split: str) -> Encoded:
        function = encoder.pairs if pairs else encoder.answers
        return function(part, split, rows.report, config.data.policy)  # type: ignore[operator]

    return EncodedSplits(encoder, encode(rows.train, "train"), encode(rows.val, "val"), encode(rows.test, "test"))


def _encode_labelled(task: ModerationConfig, rows: Splits, encoder: Encoder, policy: DataPolicyConfig) -> EncodedSplits:
    """Answers (or prompts) with their labels; the harm categories are those of the training rows if none are named."""
    categories = tuple(task.categories) if task.categories is not None else categories_of(rows.train)

    def encode(part: list[Any], split: str) -> EncodedAnswers:
        answers = encoder.answers(part, split, rows.report, policy, prompt_only=task.input == "prompt")
        return answers.with_labels(labels_of(answers.rows, categories))

    return EncodedSplits(
        encoder, encode(rows.train, "train"), encode(rows.val, "val"), encode(rows.test, "test"), categories
    )


def first_rows(data: Encoded, limit: int | None) -> Encoded:
    """At most `limit` rows of a split, the first ones; all without a limit."""
    n = len(data)
    if limit is None or limit >= n:
        return data
    if isinstance(data, EncodedAnswers):
        known = data.labels and {name: values[:limit] for name, values in data.labels.items()}
        store = data.store.select(np.arange(limit))
        return EncodedAnswers(data.rows[:limit], store, data.truncated[:limit], data.pad, known)
    kept = np.concatenate([np.arange(limit), n + np.arange(limit)])
    labels = {name: values[:limit] for name, values in data.labels.items()}
    return EncodedPairs(data.rows[:limit], data.store.select(kept), data.truncated[kept], data.pad, labels)


def prompt_folds(rows: Sequence[Row], folds: int, seed: int, where: str, mend: str) -> NDArray[np.int64]:
    """(N,) fold of each row; all answers to a prompt are in one.

    Args:
        where, mend: what the error names.

    Raises:
        UserError: fewer prompts than folds.
    """
    groups = [prompt_key(row.prompt) for row in rows]
    if len(set(groups)) < folds:
        raise UserError(f"{len(set(groups))} prompts cannot be dealt to {folds} folds", where, mend)
    return grouped_folds(groups, folds, seed)
