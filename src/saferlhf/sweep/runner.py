"""Carries a sweep out: runs as processes of their own, dealt to the machine's GPUs or its cores by the one launcher.

What is finished is known by run identity, as everywhere: a repeated command starts what is missing and nothing else. A
run that failed keeps no other from running; the exit code says that it did. The sweep's folder,
`<output_root>/sweeps/<folder or hash10>`, holds its status, the runs' logs, Optuna's database and the report.

Runs that another process is at work on (those of a sweep that was killed a moment ago save their state still; another
sweep may have the same run) are waited for, not refused.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from saferlhf.config.arguments import merged
from saferlhf.config.run_folder import FAILED, FINISHED, KILLED, RunFolder
from saferlhf.config.schema import TrainConfig, TrainerConfig
from saferlhf.config.sweep_schema import OPTUNA, SweepConfig
from saferlhf.errors import UserError
from saferlhf.pipeline.launcher import DevicePool, Job, JobResult, Known, cpu_share, last_words, launch
from saferlhf.sweep.child import Child, Compose, make_child, refuse_twins
from saferlhf.sweep.identity import sweep_hash
from saferlhf.sweep.parent import Parent
from saferlhf.sweep.report import MARKDOWN, SweepReport, check_objective
from saferlhf.sweep.screen import SweepScreen
from saferlhf.sweep.search import Proposal, Search, require_optuna
from saferlhf.sweep.space import Space, grid
from saferlhf.tracking import ui_command
from saferlhf.training.display import duration

RUN = (sys.executable, "-m", "saferlhf.cli", "train")
"""What runs one child, given its overrides."""

CORES_PER_WORKER = 4
FOLDER = "sweeps"


class SweepFailed(Exception):
    """Runs of a sweep did not finish; the message is for the screen already, the code is that of the first of them."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Sweep:
    """What `train.py -m` is about.

    Attributes:
        config: the `sweep` group.
        space: fixed words and swept keys.
        first: the checked config of any one of the runs: where they are tracked and where outputs go.
        compose: from overrides to a run's config.
        flags: Hydra flags to hand on, such as `--config-dir`.
    """

    config: SweepConfig
    space: Space
    first: TrainConfig
    compose: Compose
    flags: Sequence[str] = ()
    folder: RunFolder = field(init=False)
    hash: str = field(init=False)

    def __post_init__(self) -> None:
        self.hash = sweep_hash(self.config, self.space)
        self.folder = RunFolder(Path(self.first.output_root) / FOLDER / (self.config.folder or self.hash))

    def claim(self) -> None:
        """Take the sweep's folder for this process.

        Raises:
            UserError: another process has it, or it is another sweep's.
        """
        known = self.folder.status().get("sweep")
        if known is not None and known != self.hash:
            mend = "another name, or null"
            raise UserError(f"{self.folder.path} belongs to another sweep", "sweep.folder", mend)
        self.folder.acquire()
        self.folder.update_status(sweep=self.hash)

    def parent(self) -> Parent:
        """The sweep's MLflow run, not begun yet."""
        swept = {d.name: ",".join(d.values) or str(d.interval) for d in self.space.dimensions}
        about = {"sweep": self.config.name, "sweep_objective": self.config.objective}
        params = {"sweep": {"kind": self.config.name, "fixed": " ".join(self.space.fixed), **swept}}
        return Parent(self.first, self.folder, tags=about, params=params)


def run_sweep(sweep: Sweep) -> dict[str, float]:
    """Run what is not finished yet.

    Returns:
        The best run's metrics; empty without an objective.

    Raises:
        UserError: the words make no sweep, all runs are refused, or none has the objective.
        SweepFailed: a run did not finish.
        KeyboardInterrupt: a person or the system asked for an end; all runs were stopped.
    """
    if sweep.config.name == OPTUNA:
        require_optuna()
    children = [] if sweep.config.name == OPTUNA else grid_children(sweep)
    pool = DevicePool()
    if sweep.first.plan.only:
        return plan_sweep(sweep, children, pool)
    for child in children:
        pool.check(child.devices())
    sweep.claim()
    parent, end, runs = sweep.parent(), FAILED, None
    try:
        if parent.is_open():  # an earlier call was killed: this one ends what that one began
            parent.begin()
        runs = Runs(sweep, parent, children, pool)
        with runs.screen:
            runs.begin()
            launch(runs.jobs(), at_once=runs.at_once, pool=pool, on_poll=runs.poll, more=runs.more)
        end = keep_report(sweep, parent, runs.in_order())
    except KeyboardInterrupt:
        end = KILLED
        raise
    finally:
        if runs is not None and end != FINISHED:
            SweepReport(sweep.config, sweep.space, tuple(runs.in_order())).write(sweep.folder.path)
        sweep.folder.update_status(status=end, ended=end)
        sweep.folder.release()
        parent.finish(end)
    return tell_result(sweep, runs.in_order())


def plan_sweep(sweep: Sweep, children: Sequence[Child], pool: DevicePool) -> dict[str, float]:
    """`plan=on`: the runs with how they stand, and the plan of one of them; nothing is written."""
    from saferlhf.run.train import train

    total = len(children) or sweep.config.trials
    devices = max([child.devices() for child in children] or [trainer_devices(sweep.first.trainer)])
    pool.check(devices)
    at_once = workers(sweep.config, pool, total, devices)
    if pool.names and devices:
        share = f"{devices} of {len(pool.names)} GPUs each"
    else:
        share = f"{cpu_share(at_once)} of {cpu_share(1)} cores each"
    print(f"sweep: {total} runs, {at_once} at a time, {share}; in {sweep.folder.path}")
    if children:
        SweepReport(sweep.config, sweep.space, tuple(children)).print()
    print("plan of the first run:")
    train(next((child.run.config for child in children if child.run is not None), sweep.first))
    return {}


def grid_children(sweep: Sweep) -> list[Child]:
    """All runs of a grid, composed and located before anything starts.

    Raises:
        UserError: none can be run, or two are the same.
    """
    children = [make_child(n, values, sweep.space, sweep.compose) for n, values in enumerate(grid(sweep.space))]
    refuse_twins(children)
    first = children[0].error
    if first is not None and all(child.error is not None for child in children):
        raise first
    return children


def keep_report(sweep: Sweep, parent: Parent, children: Sequence[Child]) -> str:
    """Write the report, give it to the parent run too; how the sweep ended."""
    report = SweepReport(sweep.config, sweep.space, tuple(children))
    files, best = report.write(sweep.folder.path), report.best
    if best is not None:
        value = best.objective(sweep.config.objective)
        assert value is not None and sweep.config.objective is not None
        about = {"best": best.label, "best_folder": str(best.folder.path.resolve())}
        run_id = best.folder.status().get("mlflow_run_id")
        parent.log({sweep.config.objective: value}, {**about, "best_run_id": run_id}, files)
    else:
        parent.log({}, {}, files)
    return FAILED if report.bad() else FINISHED


def tell_result(sweep: Sweep, children: Sequence[Child]) -> dict[str, float]:
    """Print the table; the best run's metrics.

    Raises:
        SweepFailed: a run is not finished.
        UserError: no finished run has the objective.
    """
    report = SweepReport(sweep.config, sweep.space, tuple(children))
    report.print()
    print(f"report: {sweep.folder.path / MARKDOWN}")
    if ui := ui_command(sweep.first.tracking, Path(sweep.first.output_root)):
        print(f"compare: {ui}")
    if bad := report.bad():
        raise _failure(bad, len(children), sweep.folder.path)
    best = report.best
    if best is None and sweep.config.objective is not None:
        for child in children:
            check_objective(child, sweep.config)
        raise UserError(f"{sweep.config.objective} is no number in any run", "sweep.objective")
    return {} if best is None else best.metrics()


def workers(config: SweepConfig, pool: DevicePool, runs: int, devices: int) -> int:
    """Runs at the same time: what was asked for, else one for each GPU or set of GPUs, else by the cores.

    Args:
        config: the sweep's.
        pool: GPUs there are.
        runs: runs there will be.
        devices: GPUs each wants.
    """
    if pool.names and devices:
        # more would only wait for GPUs, with values that were proposed too early
        most = len(pool.names) // devices
        most = most if config.workers is None else min(most, config.workers)
    elif config.workers is not None:
        most = config.workers
    else:
        cores = cpu_share(1)
        most = max(min(2, cores), cores // CORES_PER_WORKER)
    return max(1, min(most, runs))


class Runs:
    """The children of a sweep as jobs of the launcher.

    Attributes:
        children: as they became known; `in_order` has them by number.
        at_once: how many run at the same time.
        screen: what is seen meanwhile.
    """

    def __init__(self, sweep: Sweep, parent: Parent, children: Sequence[Child], pool: DevicePool) -> None:
        self._sweep, self._parent, self._pool = sweep, parent, pool
        self.children = {child.name: child for child in children}
        self._search: Search | None = None
        total, devices = len(children), max((child.devices() for child in children), default=0)
        if sweep.config.name == OPTUNA:
            self._search = Search(sweep.space, sweep.config, sweep.folder.path)
            total, devices = sweep.config.trials, trainer_devices(sweep.first.trainer)
            pool.check(devices)
        self.at_once = workers(sweep.config, pool, total, devices)
        self.screen = SweepScreen(total)
        self._told: set[str] = set()
        self._said: set[str] = set()

    def in_order(self) -> list[Child]:
        """The children by number."""
        return sorted(self.children.values(), key=lambda child: child.number)

    def begin(self) -> None:
        """Begin the parent run if a child needs one; tell of children that need no process."""
        if any(child.error is None and not child.finished for child in self.in_order()):
            self._parent.begin()
        for child in self.in_order():
            if child.error is not None:
                self.screen.ended(child, f"refused, {child.error}")
        for proposal, _ in self._search.ended() if self._search is not None else ():
            child = self._child(proposal)
            self.screen.ended(child, "finished before" if child.finished else "ended before, its folder is gone")

    def jobs(self) -> list[Job]:
        """Those of a grid."""
        return [] if self._search else [self._job(child) for child in self.in_order() if child.error is None]

    def more(self) -> Job | None:
        """The next one of Optuna's."""
        while self._search is not None and (proposal := self._search.ask()) is not None:
            child = self._child(proposal)
            if child.error is None:
                if not child.finished:
                    self._parent.begin()  # here, where a store that cannot be used ends the sweep and not one run
                return self._job(child)
            self.screen.ended(child, f"refused, {child.error}")
            self._search.tell(proposal.number, None)
        return None

    def poll(self, known: Known) -> None:
        """Note which children have ended, and show how far the others are."""
        for name, result in known.items():
            if result is not None and name not in self._told:
                self._told.add(name)
                self._end(self.children[name], result)
        self.screen.poll()

    # -------------------------------------------------------------------------------------------- inside
    def _child(self, proposal: Proposal) -> Child:
        child = make_child(proposal.number, proposal.values, self._sweep.space, self._sweep.compose)
        child.trial = proposal.number
        self.children[child.name] = child
        return child

    def _log(self, child: Child) -> Path:
        return log_of(self._sweep.folder.path, child)

    def _job(self, child: Child) -> Job:
        share = cpu_share(self.at_once)
        own = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(share)}
        return Job(
            child.name,
            lambda: self._command(child, share),
            self._log(child),
            environment=own,
            devices=child.devices(),
            ready=lambda: self._ready(child),
        )

    def _ready(self, child: Child) -> bool:
        if child.is_free():
            return True
        if child.name not in self._said:
            self._said.add(child.name)
            pid = child.folder.status().get("pid", "?")
            self.screen.say(f"{child.name}: waits for process {pid}, which is at work on it")
        return False

    def _command(self, child: Child, share: int) -> list[str] | None:
        """The process that runs the child; None when it is finished."""
        if child.finished:
            return None
        assert child.run is not None
        # a run's own screen is its log file; its line here comes from its status file
        extra = ["trainer.progress=none", *self._parent.words(child.label)]
        if child.run.config.trainer.threads is None:
            extra.append(f"trainer.threads={share}")
        self.screen.started(child)
        return [*RUN, *self._sweep.flags, *merged(child.words, extra)]

    def _end(self, child: Child, result: JobResult) -> None:
        child.seconds, child.code = result.seconds, result.code
        if result.code:
            child.reason = last_words(self._log(child)) or exit_words(result.code)
            self.screen.ended(child, f"did not finish ({exit_words(result.code)}): {child.reason}")
        elif not child.finished:
            child.reason = f"ended well, but not in {child.folder.path}: code or data changed meanwhile"
            self.screen.ended(child, child.reason)
        else:
            self._note_finished(child)
        if self._search is not None and child.trial is not None:
            self._search.tell(child.trial, child.objective(self._sweep.config.objective))

    def _note_finished(self, child: Child) -> None:
        objective = self._sweep.config.objective
        took = f"finished in {duration(child.seconds)}" if child.seconds else "finished before"
        value = child.objective(objective)
        self.screen.ended(child, took if value is None else f"{took}, {objective} {value:.4g}")
        try:
            check_objective(child, self._sweep.config)
        except UserError as error:
            if self._search is not None:  # there is nothing to go by
                raise
            if "objective" not in self._said:
                self._said.add("objective")
                self.screen.say(f"note: {error}; the runs go on")


def trainer_devices(trainer: TrainerConfig) -> int:
    """GPUs that a run with this trainer wants where there are any."""
    return 0 if trainer.accelerator == "cpu" else trainer.devices


def log_of(folder: Path, child: Child) -> Path:
    """Where a child's output goes: by what it is, since its number changes when a grid grows."""
    assert child.run is not None
    return folder / "logs" / f"{child.run.config.name}-{child.folder.path.name}.log"


def exit_words(code: int) -> str:
    """How a process ended."""
    return f"exit code {code}" if code > 0 else f"ended by signal {-code}"


def _failure(bad: Sequence[Child], total: int, folder: Path) -> SweepFailed:
    """The first run that did not finish in one line, and how many others there are."""
    child = bad[0]
    if child.error is not None:
        text, code = f"{child.name}: {child.error}", 2
    else:
        code = child.code or 1
        code = code if code > 0 else 128 - code
        log = log_of(folder, child)
        text = f"{child.name}: {child.reason or child.status}{f' (log: {log})' if log.exists() else ''}"
    return SweepFailed(f"{len(bad)} of {total} runs of the sweep did not finish; {text}", code)
