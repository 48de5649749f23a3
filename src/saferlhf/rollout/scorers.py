"""Scorers: from (prompt, response) to named numbers, whoever gives them; rollout and evaluation share the protocol.

A scorer is a trained role, the toy world's ground truth, a plain function or a remote judge. What it cannot score it
says so: the value is NaN and a `Failure` names the row, the kind and the reason. Only what `Scores.scored` allows may
count. What becomes of failures is the policy of `GuardedScorer` (`guard.py`), through which every caller goes.

Signs: a cost and a severity above 0 mean unsafe; a reward, helpfulness and harmlessness are better when larger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from saferlhf.data.rows import Prompt

Floats = NDArray[np.float64]

FAILURES = {
    "empty": "the response has no word",
    "not_a_number": "the scorer gave NaN or an infinite number",
    "timeout": "no answer in time",
    "unreachable": "the server could not be reached, or was busy or broken at every try",
    "refused": "the server refused this request",
    "unparsable": "the answer could not be read as the scores asked for",
    "exception": "the scorer's own code failed",
}
"""Kinds of failure, and what each means."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One response to be scored.

    Attributes:
        row_id: of the prompt's row; several responses to one prompt share it.
        prompt: the conversation before the response.
        response: as text, without control tokens.
        truncated: whether the length limit cut it off.
    """

    row_id: str
    prompt: Prompt
    response: str
    truncated: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is no word to score."""
        return not self.response.strip()


@dataclass(frozen=True, slots=True)
class Failure:
    """A response that got no score.

    Attributes:
        row_id: of its request.
        kind: one of `FAILURES`.
        reason: one line, without the texts of prompt and response: they may be harmful.
        index: place of its request among those scored together.
    """

    row_id: str
    kind: str
    reason: str
    index: int

    def __post_init__(self) -> None:
        if self.kind not in FAILURES:
            raise ValueError(f"unknown kind of failure {self.kind!r}; one of {', '.join(FAILURES)}")


@dataclass(frozen=True)
class Scores:
    """What a scorer says of N requests.

    Attributes:
        values: output name -> (N,) float64 in the order of the requests; NaN where there is no score.
        failures: why requests have no score, in their order. A scorer may leave out those whose value is just NaN:
            `GuardedScorer` adds them.

    Raises:
        ValueError: no output, lengths differ, or a failure of a request that was not made.
    """

    values: Mapping[str, Floats]
    failures: tuple[Failure, ...] = ()

    def __post_init__(self) -> None:
        columns = {name: np.asarray(column, dtype=np.float64) for name, column in self.values.items()}
        object.__setattr__(self, "values", columns)
        shapes = {column.shape for column in columns.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"scores need one or more outputs of one length (N,); found shapes {sorted(shapes)}")
        if any(not 0 <= failure.index < len(self) for failure in self.failures):
            raise ValueError("a failure of a request that was not made")

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs."""
        return tuple(self.values)

    @property
    def scored(self) -> NDArray[np.bool_]:
        """(N,) True where every output is a finite number and nothing failed: only these may count."""
        scored = np.ones(len(self), dtype=bool)
        for column in self.values.values():
            scored &= np.isfinite(column)
        scored[[failure.index for failure in self.failures]] = False
        return scored

    def counts(self) -> dict[str, int]:
        """Kind of failure -> requests that failed with it, kinds that occurred only."""
        found: dict[str, set[int]] = {}
        for failure in self.failures:
            found.setdefault(failure.kind, set()).add(failure.index)
        return {kind: len(found[kind]) for kind in FAILURES if kind in found}


@runtime_checkable
class Scorer(Protocol):
    """Gives named scores to responses."""

    @property
    def name(self) -> str:
        """Of the scorer, in metrics and messages."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the scores that `score` always returns, in this order."""
        ...

    def score(self, rows: Sequence[ScoreRequest]) -> Scores:
        """Scores of N requests, each by itself: a request's scores do not depend on its neighbours or their order.

        Raises:
            UserError: the scorer cannot work at all (no such model, a refused key); never for a single request.
        """
        ...


def failed(outputs: Sequence[str], rows: Sequence[ScoreRequest], kind: str, reason: str) -> Scores:
    """Scores of requests that all failed alike."""
    return Scores(
        {name: np.full(len(rows), np.nan) for name in outputs},
        tuple(Failure(row.row_id, kind, reason, index) for index, row in enumerate(rows)),
    )
