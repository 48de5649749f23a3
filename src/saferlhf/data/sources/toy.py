"""The embedded toy world as a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Protocol

from saferlhf.config.schema import DataConfig
from saferlhf.data.rows import PreferencePair, QuestionAnswer, Row
from saferlhf.data.sources.base import SourceRows

if TYPE_CHECKING:
    from saferlhf.data.toyworld import Annotators

TOY_ROWS = {"train": 24_000, "val": 500, "test": 2_000}
"""Rows generated when the config leaves a count open."""


class Generate(Protocol):
    """A generator of toy rows."""

    def __call__(self, n: int, split: str, seed: int) -> Sequence[Row]:
        """`n` rows of a split."""
        ...


def toyworld_rows(cfg: DataConfig, kind: type[Row], needs: Sequence[str]) -> SourceRows:
    """Generated rows. Answers are demonstrations unless labels are needed."""
    from saferlhf.data import toyworld

    annotators = toy_annotators(cfg)
    generate: Generate
    if kind is PreferencePair:
        generate = partial(toyworld.preference_pairs, annotators=annotators)
    elif kind is QuestionAnswer and needs:
        generate = partial(toyworld.question_answers, annotators=annotators)
    elif kind is QuestionAnswer:
        generate = toyworld.demonstrations
    else:
        generate = toyworld.prompts
    rows: dict[str, list[Row]] = {
        split: list(generate(TOY_ROWS[split] if count is None else count, split=split, seed=cfg.seed))
        for split, count in (("train", cfg.train_rows), ("val", cfg.val_rows), ("test", cfg.test_rows))
    }
    return SourceRows(train=rows["train"], val=rows["val"], test=rows["test"])


def toy_annotators(cfg: DataConfig) -> Annotators:
    """Who labels the toy world."""
    from saferlhf.data.toyworld import Annotators

    return Annotators() if cfg.annotators is None else Annotators(**asdict(cfg.annotators))
