"""A grid whose runs are started by one of Hydra's launchers, such as `hydra/launcher=submitit_slurm`.

Everything but the starting is as in `runner.py`: one parent in MLflow, made before; finished runs answer from their
folders; the report at the end is made from the run folders, which the machines of a cluster share. Hydra's sweeper
expands the same grid from the same words, and a child is named by Hydra's own list of its overrides.
"""

from __future__ import annotations

from saferlhf.config.arguments import assign, key_of, merged
from saferlhf.config.run_folder import FAILED, KILLED
from saferlhf.config.sweep_schema import OPTUNA
from saferlhf.errors import UserError
from saferlhf.sweep.child import Child
from saferlhf.sweep.command import SweepWords
from saferlhf.sweep.runner import Sweep, grid_children, keep_report, tell_result

OVERRIDES_OF_JOB = "tracking.run_name='${hydra:job.override_dirname}'"
"""Hydra's name for a job, without the keys that all jobs share."""


class Elsewhere:
    """A sweep between `begin`, after which Hydra runs the jobs, and `end`.

    Args:
        sweep: what was asked for.
        words: the same as words.

    Raises:
        UserError: Optuna is to propose the values, or none of the runs is possible.
    """

    def __init__(self, sweep: Sweep, words: SweepWords) -> None:
        if sweep.config.name == OPTUNA:
            mend = "leave hydra/launcher out, or take sweep=grid"
            raise UserError("Optuna asks for one run at a time, a launcher of Hydra's takes all", "sweep=optuna", mend)
        self._sweep, self._words = sweep, words
        self._children: list[Child] = grid_children(sweep)
        self._parent = sweep.parent()

    def begin(self) -> list[str]:
        """Claim the sweep's folder, begin the parent run; the arguments with which Hydra starts the jobs.

        Returns:
            Flags and words; empty when all runs are finished.
        """
        self._sweep.claim()
        if all(child.finished for child in self._children) and not self._parent.is_open():
            return []
        try:
            self._parent.begin()
        except BaseException:
            self._close(FAILED)
            raise
        fixed = ",".join(key_of(word) for word in self._sweep.space.fixed)
        told = self._parent.words()
        if told:
            told = [*told, OVERRIDES_OF_JOB]
            hidden = [key_of(word) for word in told]
            told.append(f"hydra.job.config.override_dirname.exclude_keys=[{','.join([fixed, *hidden]).strip(',')}]")
        swept = [f"{d.key}={','.join(d.values)}" for d in self._sweep.space.dimensions]
        # where Hydra and the launcher put what they write
        place = [assign("hydra.sweep.dir", str(self._sweep.folder.path / "jobs"))]
        return ["-m", *self._words.flags, *merged(self._sweep.space.fixed, swept, place, self._words.hydra, told)]

    def end(self) -> dict[str, float]:
        """Report what the jobs left; see `runner.tell_result`."""
        ended = FAILED
        try:
            for child in self._children:
                if child.run is not None and not child.finished:
                    child.reason = str(child.folder.status().get("error") or "see the launcher's log")
            ended = keep_report(self._sweep, self._parent, self._children)
        finally:
            self._close(ended)
        return tell_result(self._sweep, self._children)

    def abandon(self, interrupted: bool) -> None:
        """The jobs could not be started, or were interrupted."""
        self._close(KILLED if interrupted else FAILED)

    def _close(self, status: str) -> None:
        self._sweep.folder.update_status(status=status, ended=status)
        self._sweep.folder.release()
        self._parent.finish(status)
