"""The `sweep` group of train.yaml: what `train.py -m` does with several values of a key.

It steers the sweep and belongs to none of its runs: no run's config holds it, so it cannot enter a run's identity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Optional

from saferlhf.config.check_values import one_of, positive, seeds
from saferlhf.errors import UserError

GRID, OPTUNA = "grid", "optuna"
DIRECTIONS = ("maximize", "minimize")
SAMPLERS = ("tpe", "random")


@dataclass
class SweepConfig:
    """grid: every combination of the values; optuna: values proposed from what the runs before them reached."""

    name: str
    objective: Optional[str] = None  # key of metrics.json
    direction: Optional[str] = None  # maximize | minimize
    workers: Optional[int] = None  # runs at the same time; null: as many as the machine has GPUs or cores for
    folder: Optional[str] = None  # below <output_root>/sweeps; null: a hash of what is fixed and what is swept
    params: dict[str, Any] = field(default_factory=dict)  # swept key -> list of values, or text in Hydra's words
    # optuna alone
    trials: int = 20
    sampler: str = "tpe"  # tpe | random
    startup_trials: int = 10  # of tpe: drawn at random
    seed: int = 0


def check_sweep(config: SweepConfig) -> None:
    """Raise `UserError` at the first value that cannot work."""
    one_of(config.name, "sweep.name", [GRID, OPTUNA])
    positive({"sweep.workers": config.workers, "sweep.trials": config.trials})
    positive({"sweep.startup_trials": config.startup_trials})
    one_of(config.sampler, "sweep.sampler", SAMPLERS)
    seeds({"sweep.seed": config.seed})
    if config.direction is not None:
        one_of(config.direction, "sweep.direction", DIRECTIONS)
    if config.objective is None and config.name == OPTUNA:
        mend = "sweep.objective=KEY_OF_METRICS_JSON, as test/reward/pair_accuracy, and sweep.direction=maximize"
        raise UserError("no objective is named", "sweep.objective", mend)
    if (config.objective is None) != (config.direction is None):
        given, missing = ("objective", "direction") if config.direction is None else ("direction", "objective")
        mend = f"sweep.{missing}={'maximize' if missing == 'direction' else 'KEY_OF_METRICS_JSON'}"
        raise UserError(f"sweep.{given} without sweep.{missing}", f"sweep.{missing}", mend)
    if config.folder is not None and not re.fullmatch(r"\w[\w.-]*", config.folder):
        raise UserError(
            f"'{config.folder}' cannot be a folder's name", "sweep.folder", "use letters, digits, - _ and ."
        )
