"""Scores of sampled responses: the reward and the costs, of roles (frozen models) or of scorers (anybody).

What nobody gave a number is NaN and counted. Scorers answer for their own failures (`rollout/guard.py`); a role whose
scores are not numbers for more than `MAX_FAILED_SHARE` of the responses ends the run. Several processes share the
responses of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferlhf.config.rollout_schema import SignalConfig
from saferlhf.errors import UserError
from saferlhf.evaluation.processes import Processes
from saferlhf.models.roles import Roles
from saferlhf.rollout.build import build_scorer
from saferlhf.rollout.experience import Rollout
from saferlhf.rollout.guard import GuardedScorer, ScoringReport
from saferlhf.tasks.shares import told_of_all

MAX_FAILED_SHARE = 0.2


@dataclass(frozen=True)
class SignalScores:
    """What is said of S responses.

    Attributes:
        values: "reward" and each cost -> (S,) float32 on the CPU; NaN: no score.
        metrics: counts of what went wrong, by signal.
    """

    values: Mapping[str, Tensor]
    metrics: Mapping[str, float]

    @property
    def scored(self) -> Tensor:
        """(S,) bool, True where every signal gave a number: only these responses may be learned from."""
        return torch.stack([value.isfinite() for value in self.values.values()]).all(dim=0)

    @property
    def costs(self) -> dict[str, Tensor]:
        """The costs alone."""
        return {name: value for name, value in self.values.items() if name != "reward"}


class Signals:
    """Scores rollouts.

    Args:
        names: "reward" and the costs, in order.
        roles: those among them that are models of ours.
        scorers: the others.
        batch_size: responses per forward pass of a role.
        output_root, cache_dir, device: see `build_scorer`.

    Raises:
        UserError: a signal that nobody gives, or a scorer without the score that is wanted of it.
    """

    def __init__(
        self,
        names: Sequence[str],
        roles: Roles,
        scorers: Mapping[str, SignalConfig],
        *,
        batch_size: int,
        output_root: Path | str,
        cache_dir: str | None = None,
        device: Any = None,
    ) -> None:
        self.names, self.roles, self.batch_size = tuple(names), roles, batch_size
        self._scorers: dict[str, tuple[GuardedScorer, str, float]] = {}
        for name, signal in scorers.items():
            scorer = build_scorer(signal.judge, output_root=output_root, cache_dir=cache_dir, device=device)
            self._scorers[name] = (scorer, _output(name, signal, scorer), signal.scale)
        for name in self.names:
            if name not in roles and name not in self._scorers:
                raise UserError(f"nobody gives the {name!r}", f"roles.{name}.model", "name a model or a scorer")

    def score(self, rollout: Rollout, device: torch.device) -> SignalScores:
        """Scores of all responses of a rollout.

        Raises:
            UserError: see the module.
        """
        values: dict[str, Tensor] = {}
        metrics: dict[str, float] = {}
        for name in self.names:
            if name in self._scorers:
                values[name], found_out = self._of_scorer(name, rollout)
                metrics |= {key: value for key, value in found_out.items() if value}
            else:
                values[name] = self._of_role(name, rollout, device)
        return SignalScores(values, metrics)

    def _of_scorer(self, name: str, rollout: Rollout) -> tuple[Tensor, dict[str, float]]:
        """Scores, and counts of what went wrong with them, over all processes."""
        scorer, output, scale = self._scorers[name]
        requests, processes = rollout.requests(), Processes.current()
        mine = np.arange(processes.rank, len(requests), processes.size)
        reports = []

        def score() -> tuple[Any, Mapping[str, Any]]:
            found = scorer.score([requests[i] for i in mine]).values[output] * scale
            reports.append(scorer.take_report())
            return mine, {"score": np.asarray(found, dtype=np.float32)}

        scores = processes.united(len(requests), score)["score"]
        together = sum(processes.each(lambda: reports[0]), start=ScoringReport())
        return torch.from_numpy(scores), together.metrics(f"scorer_{name}")

    def _of_role(self, name: str, rollout: Rollout, device: torch.device) -> Tensor:
        def scores_of(part: Rollout) -> list[Tensor]:
            part = part.to(device)
            return [self.roles.scores(name, part.input_ids, part.attention_mask, part.response_mask)]

        (scores,) = told_of_all(rollout, self.batch_size, scores_of, device)
        scores = scores.cpu()
        bad = ~scores.isfinite()
        if bad.float().mean() > MAX_FAILED_SHARE:
            what = f"{int(bad.sum())} of {len(scores)} scores are not numbers"
            raise UserError(what, f"roles.{name}.model", "train the model again, or name another")
        return scores.masked_fill(bad, float("nan"))


def _output(name: str, signal: SignalConfig, scorer: GuardedScorer) -> str:
    """Which of a scorer's scores is the signal."""
    known = scorer.outputs
    wanted = signal.take or (name if name in known else known[0] if len(known) == 1 else None)
    if wanted not in known:
        what = f"the scorer gives {', '.join(known)}" + (f", not {wanted!r}" if wanted else "")
        raise UserError(what, f"scorers.{name}.take", f"say which: {' | '.join(known)}")
    return wanted
