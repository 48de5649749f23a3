"""Encode: canonical rows become token storage, once, before training.

Ids lie in one flat int32 array with offsets: a hundred thousand rows are two arrays, not millions of Python integers.
All texts go to the tokenizer in one call per kind.

A sequence longer than `max_length` loses the beginning of its prompt first, because the end of a prompt holds the
question and the words after which the assistant speaks; `MIN_PROMPT` tokens of it stay. A response that is still too
long loses its end, the end-of-sequence token with it, and is flagged and counted. See trap 13 of the architecture
page.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saferlhf.config.schema import DataPolicyConfig
from saferlhf.data.batches import AnswerBatch, PairBatch, TokenBatch
from saferlhf.data.collate import Ints, TokenStore, pad_tokens
from saferlhf.data.report import MAX_PLACES, DataReport, short_place
from saferlhf.data.rows import PreferencePair, Prompt, QuestionAnswer, Row
from saferlhf.data.templates import Template, end_id, get_template, pad_id, responses_ids
from saferlhf.errors import UserError
from saferlhf.ops.moderation import ModerationLabels

MIN_PROMPT = 16
"""Tokens of a prompt that stay when the response is too long to leave room for more."""

MAX_UNKNOWN = 0.01
"""Share of unknown tokens above which tokenizer and data do not belong together."""


@dataclass(frozen=True)
class EncodedAnswers:
    """Rows of one sequence each: demonstrations, or answers to be scored.

    Attributes:
        rows: the rows, in order; the sequence of row i is sequence i.
        store: their tokens.
        truncated: (N,) bool, True where the response lost its end.
        pad: padding id.
        labels: name -> (N,) or (N, C) int64, as in `AnswerBatch`; None: batches hold tokens only.
    """

    rows: Sequence[QuestionAnswer]
    store: TokenStore
    truncated: NDArray[np.bool_]
    pad: int
    labels: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Ints:
        """(N,) tokens of each row."""
        return self.store.lengths

    def collate(self, indices: Sequence[int] | Ints) -> Any:
        """The rows of these indices as one batch: `AnswerBatch` with labels, `TokenBatch` without."""
        chosen = np.asarray(indices, dtype=np.int64)
        tokens = pad_tokens(self.store, chosen, self.pad, [self.rows[i].id for i in chosen])
        if self.labels is None:
            return tokens
        at = torch.from_numpy(chosen)
        return AnswerBatch(tokens=tokens, **{name: values[at] for name, values in self.labels.items()})

    def with_labels(self, labels: ModerationLabels) -> EncodedAnswers:
        """The same rows; batches carry these labels of theirs.

        Raises:
            ValueError: the labels are of another number of rows.
        """
        if len(labels) != len(self):
            raise ValueError(f"labels of {len(labels)} rows for {len(self)} rows")
        tensors = {name: torch.from_numpy(getattr(labels, name)) for name in ("unsafe", "severity", "category")}
        return replace(self, labels=tensors)


@dataclass(frozen=True)
class EncodedPairs:
    """Preference pairs: sequence i is response 0 of row i, sequence N + i its response 1.

    Attributes:
        rows: N rows, in order.
        store: 2N sequences.
        truncated: (2N,) bool, True where the response lost its end.
        pad: padding id.
        labels: name -> (N,) or (N, 2) int64, as in `PairBatch`.
    """

    rows: Sequence[PreferencePair]
    store: TokenStore
    truncated: NDArray[np.bool_]
    pad: int
    labels: Mapping[str, Tensor] = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Ints:
        """(N,) tokens of the longer sequence of each row: what the row is padded to."""
        return self.store.lengths.reshape(2, -1).max(axis=0)

    def answers(self) -> EncodedAnswers:
        """The 2N sequences as rows of their own, `response_0` of all pairs first."""
        rows = [
            QuestionAnswer(f"{row.id}#{side}", row.prompt, (row.response_0, row.response_1)[side])
            for side in (0, 1)
            for row in self.rows
        ]
        return EncodedAnswers(rows, self.store, self.truncated, self.pad)

    def collate(self, indices: Sequence[int] | Ints) -> PairBatch:
        """The rows of these indices as one batch of 2B sequences; `row_ids` holds the B ids twice."""
        chosen = np.asarray(indices, dtype=np.int64)
        ids = [self.rows[i].id for i in chosen]
        tokens = pad_tokens(self.store, np.concatenate([chosen, chosen + len(self)]), self.pad, ids + ids)
        return self._labelled(tokens, chosen)

    def labels_alone(self, indices: Sequence[int] | Ints) -> PairBatch:
        """The same without their tokens, for losses of scores that are there already."""
        nothing = torch.zeros(0, 0, dtype=torch.int64)
        return self._labelled(TokenBatch(nothing, nothing.bool(), nothing.bool(), ()), np.asarray(indices))

    def _labelled(self, tokens: TokenBatch, chosen: Ints) -> PairBatch:
        at = torch.from_numpy(chosen)
        return PairBatch(tokens=tokens, **{name: values[at] for name, values in self.labels.items()})


Encoded = EncodedAnswers | EncodedPairs


@dataclass(frozen=True)
class Encoder:
    """Tokenizer, template and length limit of one backbone.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        template: how prompts are written.
        max_length: tokens of prompt + response.
    """

    tokenizer: Any
    template: Template
    max_length: int

    @classmethod
    def build(cls, tokenizer: Any, template: str, max_length: int) -> Encoder:
        """From the names in `backbone`.

        Raises:
            UserError: unknown template, or a length that holds no conversation.
        """
        if max_length < 8:
            raise UserError(f"max_length {max_length} holds no conversation", "backbone.max_length", "use 64 or more")
        # said openly, so that a later fork neither warns nor turns it off; no process of ours tokenizes after a fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        return cls(tokenizer, get_template(template), max_length)

    def pairs(
        self,
        rows: Sequence[PreferencePair],
        split: str = "train",
        report: DataReport | None = None,
        policy: DataPolicyConfig | None = None,
    ) -> EncodedPairs:
        """Encode preference pairs.

        Args:
            split: name in the report.
            report: counts over-long rows and token lengths.
            policy: what to do with over-long rows, and with pairs that differ only behind the cut (`identical`).

        Raises:
            UserError: an unknown-token rate above `MAX_UNKNOWN`, or a row under an `error` policy.
        """
        prompts = self._prompts([row.prompt for row in rows])
        responses = self._responses([row.response_0 for row in rows] + [row.response_1 for row in rows])
        self._refuse_unknown(prompts, responses, split)
        store, cut = self._join(prompts + prompts, responses)
        n = len(rows)
        handler = _Overlong(rows, split, report, policy or DataPolicyConfig())
        keep = handler.keep(cut.reshape(2, -1).max(axis=0), identical=_identical(store, n))
        if len(keep) < n:
            store, cut = store.select(np.concatenate([keep, keep + n])), cut[np.concatenate([keep, keep + n])]
            rows = [rows[i] for i in keep]
        handler.count_lengths(store)
        return EncodedPairs(rows, store, cut == RESPONSE_CUT, pad_id(self.tokenizer), pair_labels(rows))

    def answers(
        self,
        rows: Sequence[QuestionAnswer],
        split: str = "train",
        report: DataReport | None = None,
        policy: DataPolicyConfig | None = None,
        *,
        prompt_only: bool = False,
    ) -> EncodedAnswers:
        """Encode questions with their answers; other arguments and errors as in `pairs`.

        Args:
            prompt_only: leave the responses out: a sequence ends where the assistant would begin to speak.
        """
        prompts = self._prompts([row.prompt for row in rows])
        responses: list[list[int]] = [[]] * len(rows)
        if not prompt_only:
            responses = self._responses([row.response for row in rows])
        self._refuse_unknown(prompts, responses, split)
        store, cut = self._join(prompts, responses)
        handler = _Overlong(rows, split, report, policy or DataPolicyConfig())
        keep = handler.keep(cut, identical=np.zeros(len(rows), dtype=bool))
        if len(keep) < len(rows):
            store, cut, rows = store.select(keep), cut[keep], [rows[i] for i in keep]
        handler.count_lengths(store)
        return EncodedAnswers(rows, store, cut == RESPONSE_CUT, pad_id(self.tokenizer))

    def rows(
        self,
        rows: Sequence[Row],
        split: str = "train",
        report: DataReport | None = None,
        policy: DataPolicyConfig | None = None,
    ) -> Encoded:
        """Encode rows of either kind, by the type of the first one."""
        if rows and isinstance(rows[0], PreferencePair):
            return self.pairs(rows, split, report, policy)  # type: ignore[arg-type]
        return self.answers(rows, split, report, policy)  # type: ignore[arg-type]

    # -------------------------------------------------------------------------------------------- tokens
    def _prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return self.template.prompts_ids(prompts, self.tokenizer)

    def _responses(self, responses: Sequence[str]) -> list[list[int]]:
        return responses_ids(responses, self.tokenizer)

    def _refuse_unknown(self, prompts: list[list[int]], responses: list[list[int]], split: str) -> None:
        """A tokenizer of another vocabulary turns most words into one token; training on that is silently worthless."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        # where unk doubles as a control token (GPT-2), the tokenizer knows every byte
        if unknown is None or unknown in (end_id(self.tokenizer), getattr(self.tokenizer, "bos_token_id", None)):
            return
        total = sum(map(len, prompts)) + sum(map(len, responses))
        found = sum(ids.count(unknown) for ids in prompts) + sum(ids.count(unknown) for ids in responses)
        if total and found / total > MAX_UNKNOWN:
            what = f"this tokenizer does not know the words of this data: {found / total:.0%} of the tokens are unknown"
            raise UserError(what, f"the {split} rows", "use backbone=smollm2, or the data the tokenizer was made for")

    def _join(self, prompts: list[list[int]], responses: list[list[int]]) -> tuple[TokenStore, NDArray[np.int8]]:
        """Prompt + response cut to `max_length`; (N,) how each was cut: 0 not, PROMPT_CUT, RESPONSE_CUT."""
        floor = min(MIN_PROMPT, self.max_length // 2)
        p = np.array([len(ids) for ids in prompts], dtype=np.int64)  # (N,)
        r = np.array([len(ids) for ids in responses], dtype=np.int64)  # (N,)
        # a response may take what a short prompt or the floor leaves
        kept_r = np.minimum(r, self.max_length - np.minimum(p, floor))
        kept_p = np.minimum(p, self.max_length - kept_r)
        offsets = np.concatenate([[0], np.cumsum(kept_p + kept_r)]).astype(np.int64)
        flat = np.empty(offsets[-1], dtype=np.int32)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            middle = offsets[i] + kept_p[i]
            flat[offsets[i] : middle] = prompt[p[i] - kept_p[i] :]
            flat[middle : offsets[i + 1]] = response[: kept_r[i]]
        cut = np.where(kept_r < r, RESPONSE_CUT, np.where(kept_p < p, PROMPT_CUT, 0)).astype(np.int8)
        return TokenStore(flat, offsets, kept_p.astype(np.int32)), cut


PROMPT_CUT, RESPONSE_CUT = 1, 2


def pair_labels(rows: Sequence[PreferencePair]) -> dict[str, Tensor]:
    """The label tensors of `PairBatch` for all rows; -1 where a row is not labelled."""

    def column(values: list[Any]) -> Tensor:
        return torch.tensor([-1 if value is None else int(value) for value in values], dtype=torch.int64)

    unsafe = [
        column([None if safe is None else not safe for safe in flags])
        for flags in ([row.is_response_0_safe for row in rows], [row.is_response_1_safe for row in rows])
    ]
    severity = [
        column([row.response_0_severity_level for row in rows]),
        column([row.response_1_severity_level for row in rows]),
    ]
    return {
        "better": column([row.better_response_id for row in rows]),  # (N,)
        "safer": column([row.safer_response_id for row in rows]),  # (N,)
        "single": column([row.single_response_id for row in rows]),  # (N,)
        "unsafe": torch.stack(unsafe, dim=1),  # (N, 2)
        "severity": torch.stack(severity, dim=1),  # (N, 2)
    }


def _identical(store: TokenStore, n: int) -> NDArray[np.bool_]:
    """(N,) True where the two sequences of a pair are equal: they differ behind the cut, or in what no token tells."""
    same = np.zeros(n, dtype=bool)
    lengths = store.lengths
    for i in np.flatnonzero(lengths[:n] == lengths[n:]):
        same[i] = np.array_equal(store.sequence(int(i)), store.sequence(int(i) + n))
    return same


@dataclass
class _Overlong:
    """Counts and handles rows that do not fit, and writes token lengths into the report."""

    rows: Sequence[Row]
    split: str
    report: DataReport | None
    policy: DataPolicyConfig

    def keep(self, cut: NDArray[np.int8], identical: NDArray[np.bool_]) -> Ints:
        """Indices of the rows that stay. A pair counts once, by its worse side.

        Raises:
            UserError: names the first row, in the order of the rows, that an `error` policy does not let pass.
        """
        keep = np.ones(len(self.rows), dtype=bool)
        first: tuple[int, str, str] | None = None
        for kind, fault, hit in (
            ("overlong", "prompt_cut", cut == PROMPT_CUT),
            ("overlong", "response_cut", cut == RESPONSE_CUT),
            ("identical", "tokens", identical),
        ):
            if self.report is not None and kind == "overlong" and len(cut):
                self.report.truncated.setdefault(self.split, {})[f"{fault}_share"] = float(hit.mean())
            found = np.flatnonzero(hit & keep)
            if not len(found):
                continue
            action = getattr(self.policy, kind)
            if action == "error" and (first is None or found[0] < first[0]):
                first = (int(found[0]), kind, fault)
            if action == "drop":
                keep[found] = False
            self._count(kind, fault, found, len(found) if action == "drop" else 0)
        if first is not None:
            self._refuse(*first)
        kept = np.flatnonzero(keep)
        if self.report is not None and len(kept) < len(self.rows):
            self.report.describe(self.split, [self.rows[i] for i in kept.tolist()])
        return kept

    def _refuse(self, index: int, kind: str, fault: str) -> None:
        row = self.rows[index]
        place = self.report.places.get(row.id) if self.report is not None else None
        what = f"{kind} row {row.id} ({fault.replace('_', ' ')})"
        mend = f"raise backbone.max_length or set data.policy.{kind}=drop"
        raise UserError(what, place or f"the {self.split} rows", mend)

    def _count(self, kind: str, fault: str, found: NDArray[np.intp], dropped: int) -> None:
        if self.report is None:
            return
        finding = self.report.finding(kind, self.split)
        finding.found += len(found)
        finding.dropped += dropped
        finding.detail[fault] = finding.detail.get(fault, 0) + len(found)
        for index in found[: MAX_PLACES - len(finding.places)]:
            place = self.report.places.get(self.rows[index].id)
            if place is not None:
                finding.places.append(short_place(place))

    def count_lengths(self, store: TokenStore) -> None:
        """Token lengths of what is kept."""
        if self.report is None or not len(store):
            return
        lengths = store.lengths
        self.report.lengths.setdefault(self.split, {}).update(
            tokens_mean=float(lengths.mean()), tokens_max=float(lengths.max()), tokens_total=float(lengths.sum())
        )
