"""Scores of sampled responses: the reward and the costs, of roles (frozen models) or of scorers (anybody).

What nobody gave a number is NaN and counted. Scorers answer for their own failures (`rollout/guard.py`); a role whose
scores are not numbers for more than `MAX_FAILED_SHARE` of the responses ends the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferlhf.config.rollout_schema import SignalConfig
from saferlhf.errors import UserError
from saferlhf.models.roles import Roles
from saferlhf.rollout.build import build_scorer
from saferlhf.rollout.experience import Rollout
from saferlhf.rollout.guard import GuardedScorer

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
                scorer, output, scale = self._scorers[name]
                found = scorer.score(rollout.requests()).values[output] * scale
                values[name] = torch.from_numpy(np.asarray(found, dtype=np.float32))
                found_out = scorer.take_report().metrics(f"scorer_{name}")
                metrics |= {key: value for key, value in found_out.items() if value}
            else:
                values[name] = self._of_role(name, rollout, device)
        return SignalScores(values, metrics)

    def _of_role(self, name: str, rollout: Rollout, device: torch.device) -> Tensor:
        scores = torch.zeros(len(rollout))
        for at, part in chunks(rollout, self.batch_size):
            part = part.to(device)
            found = self.roles.scores(name, part.input_ids, part.attention_mask, part.response_mask)
            scores[at] = found.cpu()
        bad = ~scores.isfinite()
        if bad.float().mean() > MAX_FAILED_SHARE:
            what = f"{int(bad.sum())} of {len(scores)} scores are not numbers"
            raise UserError(what, f"roles.{name}.model", "train the model again, or name another")
        return scores.masked_fill(bad, float("nan"))


def chunks(rollout: Rollout, rows: int) -> Iterator[tuple[Tensor, Rollout]]:
    """Responses of like length together, `rows` at most, longest first: (their places (n,), they)."""
    order = torch.argsort(-rollout.lengths.cpu(), stable=True)
    for at in order.split(rows):
        yield at, rollout.select(at)


def _output(name: str, signal: SignalConfig, scorer: GuardedScorer) -> str:
    """Which of a scorer's scores is the signal."""
    known = scorer.outputs
    wanted = signal.take or (name if name in known else known[0] if len(known) == 1 else None)
    if wanted not in known:
        what = f"the scorer gives {', '.join(known)}" + (f", not {wanted!r}" if wanted else "")
        raise UserError(what, f"scorers.{name}.take", f"say which: {' | '.join(known)}")
    return wanted
