"""What becomes of responses that a scorer gives no number: counted, reported, retried, skipped or refused by policy.

Every scorer is called through `GuardedScorer`. It hands over the responses that have words (`on_empty`), turns NaN,
infinite numbers and the scorer's own exceptions into failures, tries failed responses again (`on_failure=retry`), and
ends the run where a policy says `error` or more than `max_failed_share` of what was handed over has no score: a policy
must not be trained or judged on the rest as if it were the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from saferlhf.config.rollout_schema import ON_EMPTY, ON_FAILURE
from saferlhf.errors import UserError
from saferlhf.rollout.scorers import FAILURES, Failure, Scorer, ScoreRequest, Scores


@dataclass(frozen=True)
class FailurePolicy:
    """What to do about responses without a score.

    Attributes:
        on_empty: skip | score (the scorer knows what silence is worth) | error.
        on_failure: skip | retry (then skip) | error.
        attempts: of `retry`, the first one included.
        max_failed_share: of the responses handed to the scorer; more is an error.
    """

    on_empty: str = "skip"
    on_failure: str = "retry"
    attempts: int = 2
    max_failed_share: float = 0.2

    def __post_init__(self) -> None:
        if self.on_empty not in ON_EMPTY or self.on_failure not in ON_FAILURE:
            raise ValueError(f"unknown policy {self.on_empty!r}, {self.on_failure!r}")
        if self.attempts < 1 or not 0 <= self.max_failed_share <= 1:
            raise ValueError("attempts must be at least 1 and max_failed_share from 0 to 1")


@dataclass
class ScoringReport:
    """What was asked of a scorer and what came of it, summed over calls.

    Attributes:
        requests: responses that were to be scored.
        empty: those without a word, whether they were scored or not.
        unscored: those that have no score in the end.
        retried: responses that were tried again, once for each try.
        recovered: those that got their score from a later try.
        failures: kind -> responses that have no score for it in the end.
        examples: kind -> reason of the first such failure.
    """

    requests: int = 0
    empty: int = 0
    unscored: int = 0
    retried: int = 0
    recovered: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def __add__(self, other: ScoringReport) -> ScoringReport:
        """Of both, say of two processes."""
        return ScoringReport(
            self.requests + other.requests,
            self.empty + other.empty,
            self.unscored + other.unscored,
            self.retried + other.retried,
            self.recovered + other.recovered,
            self.failures + other.failures,
            {**other.examples, **self.examples},
        )

    def metrics(self, prefix: str) -> dict[str, float]:
        """`<prefix>/{unscored_share,empty_share,retried,recovered}`, and `failed_<kind>` of kinds that occurred."""
        if not self.requests:
            return {}
        return {
            f"{prefix}/unscored_share": self.unscored / self.requests,
            f"{prefix}/empty_share": self.empty / self.requests,
            f"{prefix}/retried": float(self.retried),
            f"{prefix}/recovered": float(self.recovered),
            **{f"{prefix}/failed_{kind}": float(self.failures[kind]) for kind in FAILURES if self.failures[kind]},
        }

    def line(self) -> str:
        """What went wrong, for the screen; empty when nothing did."""
        parts = [f"{self.failures[kind]:,} {kind.replace('_', ' ')}" for kind in FAILURES if self.failures[kind]]
        return f"{self.unscored:,} of {self.requests:,} responses have no score: {', '.join(parts)}" if parts else ""


class GuardedScorer:
    """A scorer under a policy for failures; itself a scorer.

    Args:
        scorer: any.
        policy: see `FailurePolicy`.

    Attributes:
        report: of all calls since it was made or `take_report` was called.
    """

    def __init__(self, scorer: Scorer, policy: FailurePolicy | None = None) -> None:
        self.scorer, self.policy = scorer, policy or FailurePolicy()
        self.report = ScoringReport()

    @property
    def name(self) -> str:
        """That of the scorer."""
        return self.scorer.name

    @property
    def outputs(self) -> tuple[str, ...]:
        """Those of the scorer."""
        return self.scorer.outputs

    def take_report(self) -> ScoringReport:
        """The report so far; a fresh one begins."""
        report, self.report = self.report, ScoringReport()
        return report

    def score(self, rows: Sequence[ScoreRequest]) -> Scores:
        """Scores of N requests; exactly the failures are NaN, and all of them in every output.

        Raises:
            UserError: a policy says so, or the scorer returned something else than scores of these requests.
        """
        empty = [i for i, row in enumerate(rows) if row.is_empty]
        if empty and self.policy.on_empty == "error":
            raise self._refusal(len(empty), len(rows), Failure(rows[empty[0]].row_id, "empty", "no word", empty[0]))
        skipped = set(empty) if self.policy.on_empty == "skip" else set()
        wanted = np.array([i for i in range(len(rows)) if i not in skipped], dtype=np.int64)
        values = {name: np.full(len(rows), np.nan) for name in self.outputs}
        failures = {i: Failure(rows[i].row_id, "empty", "the response has no word", i) for i in skipped}
        failed, retried = self._attempts(rows, wanted, values)
        failures |= failed
        self._count(len(rows), len(empty), failures, retried, len(retried - failed.keys()))
        self._refuse(failed, len(wanted))
        return Scores(values, tuple(failures[i] for i in sorted(failures)))

    # -------------------------------------------------------------------------------------------- attempts
    def _attempts(
        self, rows: Sequence[ScoreRequest], wanted: np.ndarray, values: dict[str, np.ndarray]
    ) -> tuple[dict[int, Failure], set[int]]:
        """Fills the values; (failures by place, places that were tried again)."""
        failed: dict[int, Failure] = {}
        retried: set[int] = set()
        attempts = self.policy.attempts if self.policy.on_failure == "retry" else 1
        for attempt in range(attempts):
            if attempt:
                wanted = np.array(sorted(failed), dtype=np.int64)
                retried |= failed.keys()
                self.report.retried += len(wanted)
            if not len(wanted):
                break
            asked = [rows[i] for i in wanted]
            scores = self._ask(asked)
            reasons = {failure.index: failure for failure in scores.failures}
            failed = {}
            for k in np.flatnonzero(~scores.scored).tolist():
                at = int(wanted[k])
                known = reasons.get(k)
                kind, reason = (known.kind, known.reason) if known else ("not_a_number", self._what(scores, k))
                failed[at] = Failure(rows[at].row_id, kind, reason, at)
            good = scores.scored
            for name in self.outputs:
                values[name][wanted[good]] = scores.values[name][good]
        return failed, retried

    def _ask(self, rows: Sequence[ScoreRequest]) -> Scores:
        """One call, made into scores of these rows whatever happens in it."""
        try:
            scores: Any = self.scorer.score(rows)
        except UserError:
            raise
        except Exception as error:  # a scorer may be anybody's code
            nan = {name: np.full(len(rows), np.nan) for name in self.outputs}
            # the type only: a message may quote the texts
            reason = f"{type(error).__name__} in the scorer"
            return Scores(nan, tuple(Failure(row.row_id, "exception", reason, i) for i, row in enumerate(rows)))
        where = f"scorer '{self.name}'"
        if not isinstance(scores, Scores):
            raise UserError(f"it returned {type(scores).__name__} instead of Scores", where, "mend its score()")
        missing = [name for name in self.outputs if name not in scores.values]
        if missing:
            raise UserError(f"it returned no '{missing[0]}'", where, f"it promises {', '.join(self.outputs)}")
        if len(scores) != len(rows):
            raise UserError(f"it returned {len(scores)} scores for {len(rows)} responses", where, "mend its score()")
        return Scores({name: scores.values[name] for name in self.outputs}, scores.failures)

    def _what(self, scores: Scores, k: int) -> str:
        bad = [name for name in self.outputs if not np.isfinite(scores.values[name][k])]
        return f"{bad[0]} is {scores.values[bad[0]][k]}"

    # -------------------------------------------------------------------------------------------- report
    def _count(
        self, requests: int, empty: int, failures: dict[int, Failure], retried: set[int], recovered: int
    ) -> None:
        self.report.requests += requests
        self.report.empty += empty
        self.report.unscored += len(failures)
        self.report.recovered += recovered
        for _, failure in sorted(failures.items()):
            self.report.failures[failure.kind] += 1
            self.report.examples.setdefault(failure.kind, failure.reason)

    def _refuse(self, failed: dict[int, Failure], asked: int) -> None:
        if failed and (self.policy.on_failure == "error" or len(failed) > self.policy.max_failed_share * asked):
            raise self._refusal(len(failed), asked, failed[min(failed)])

    def _refusal(self, failed: int, asked: int, first: Failure) -> UserError:
        what = f"{failed:,} of {asked:,} responses got no score; the first, row {first.row_id}: {first.reason}"
        where = f"judge '{self.name}'"
        if first.kind == "empty":
            return UserError(what, where, "on_empty=skip leaves them out")
        if self.policy.on_failure == "error":
            return UserError(what, where, "on_failure=retry tries again, on_failure=skip leaves them out")
        return UserError(what, where, "mend the judge, or raise max_failed_share")
