"""Optuna's part: which values to try next. Ask for some, run them, tell what they reached.

Optuna's ask/tell interface (Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", 2019) with
its Tree-structured Parzen Estimator (Bergstra et al., 2011). With several workers a proposal counts as a bad one until
its run has ended ("constant liar"), so that workers do not all try the same place. The study is a sqlite file in the
sweep's folder, written by the sweep's own process alone. A sweep that is stopped goes on from it: proposals whose runs
have not ended come first again, with the values they had. The published sweeper for Hydra is not used: it wants an
Optuna below 3, whose SQLAlchemy is not MLflow's, and waits for a whole batch of runs before it asks again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saferlhf.config.sweep_schema import SweepConfig
from saferlhf.errors import UserError
from saferlhf.sweep.space import Dimension, Space, number_text

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study

STUDY = "sweep"
"""The study's name in its file."""
DATABASE = "optuna.db"
"""The file in the sweep's folder."""


@dataclass(frozen=True)
class Proposal:
    """Values to be tried: the trial's number, and swept key -> value as text."""

    number: int
    values: dict[str, str]


class Search:
    """A study in a file, made or gone on with.

    Args:
        space: what is swept.
        config: the sweep's.
        folder: the sweep's; the file lies in it.

    Raises:
        UserError: Optuna is not installed, or the file's study is over other keys or ranges.
    """

    def __init__(self, space: Space, config: SweepConfig, folder: Path) -> None:
        optuna = require_optuna()
        if not space.dimensions:
            mend = "as 'optimizer.lr=tag(log,interval(1e-5,1e-3))'"
            raise UserError("nothing is swept", "sweep=optuna", mend)
        self._space, self._config = space, config
        self._distributions = {d.name: _distribution(d) for d in space.dimensions}
        folder.mkdir(parents=True, exist_ok=True)
        self._study: Study = optuna.create_study(
            storage=f"sqlite:///{folder.resolve() / DATABASE}",
            study_name=STUDY,
            direction=config.direction,
            load_if_exists=True,
        )
        self._check_direction()
        # begun anew with the seed it had, the sampler would propose the first values once more
        seed = config.seed + len(self._study.trials)
        self._study.sampler = _sampler(config, seed)
        self._left = [Proposal(t.number, self._values(t.params)) for t in self._trials("RUNNING")]

    def ended(self) -> list[tuple[Proposal, float]]:
        """What was tried with success, and what it reached."""
        done = self._trials("COMPLETE")
        return [(Proposal(t.number, self._values(t.params)), float(t.value)) for t in done]

    def ask(self) -> Proposal | None:
        """The next values; None when as many runs as were asked for have ended or are on their way."""
        if self._left:
            return self._left.pop(0)
        if len(self._trials("COMPLETE", "RUNNING")) + self._failed_now >= self._config.trials:
            return None
        trial = self._study.ask(self._distributions)
        return Proposal(trial.number, self._values(trial.params))

    def tell(self, number: int, value: float | None) -> None:
        """What a proposal reached; None or no number: its run failed.

        In this call a failed run counts as one of the trials; the next call puts another one in its place.
        """
        if value is not None and math.isfinite(value):
            self._study.tell(number, value)
            return
        self._failed_now += 1
        self._study.tell(number, state=require_optuna().trial.TrialState.FAIL)

    _failed_now = 0

    def _trials(self, *states: str) -> list[Any]:
        kinds = require_optuna().trial.TrialState
        return self._study.get_trials(deepcopy=False, states=tuple(kinds[state] for state in states))

    def _values(self, params: Mapping[str, Any]) -> dict[str, str]:
        """A proposal as texts for the command line, in the order the keys were typed."""
        found = {}
        for dimension in self._space.dimensions:
            if dimension.name not in params:
                what = f"the study in {DATABASE} knows no {dimension.name}"
                raise UserError(what, "sweep.folder", "give a sweep of other keys another folder")
            value = params[dimension.name]
            found[dimension.name] = value if isinstance(value, str) else number_text(value)
        return found

    def _check_direction(self) -> None:
        stored = self._study.direction.name.lower()
        if stored != self._config.direction:
            mend = f"sweep.direction={stored}, or another sweep.folder"
            raise UserError(f"the study in {DATABASE} is to {stored}", "sweep.direction", mend)


def require_optuna() -> Any:
    """Optuna, imported.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("Optuna is not installed", "sweep=optuna", "pip install 'saferlhf[sweeps]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _sampler(config: SweepConfig, seed: int) -> Any:
    samplers = require_optuna().samplers
    if config.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():  # that constant_liar was an experiment in older versions
        warnings.simplefilter("ignore")
        return samplers.TPESampler(n_startup_trials=config.startup_trials, constant_liar=True, seed=seed)


def _distribution(dimension: Dimension) -> BaseDistribution:
    """What Optuna may choose from."""
    kinds, interval = require_optuna().distributions, dimension.interval
    if interval is None:
        return kinds.CategoricalDistribution(dimension.values)
    if interval.whole:
        step = 1 if interval.step is None else int(interval.step)
        return kinds.IntDistribution(int(interval.low), int(interval.high), log=interval.log, step=step)
    return kinds.FloatDistribution(interval.low, interval.high, log=interval.log, step=interval.step)
