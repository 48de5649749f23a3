"""Starts of one command, their deaths, and what is left of them: the part of `kills.py` that touches processes.

Where a start was when it was killed is read from what it left: its run's status and log, its curves, and the draft of a
checkpoint that bears its number.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("starting", "data", "model", "training", "saving", "evaluating", "exporting", "finished")
"""In order: interpreter and imports; rows and tokenizer; building the model; training; a checkpoint half written; final
metrics; export and report; all done, the process not gone yet."""
GONE_S = 30.0
"""How long the other processes may take to notice that the first is dead."""
POLL_S = 0.0005


@dataclass
class Start:
    """One start of the command, and how it ended.

    Attributes:
        life: which run it belongs to, from 1.
        asked_s: the moment drawn for its kill, seconds from its start; None: left alone.
        aim: the phase the kill waited for; None: none.
        only_first: the kill hit the first process alone.
        ended_s: seconds from the start to the kill, or to its own end.
        killed: whether it was killed.
        code: exit code of one that ended by itself.
        phase: what it was doing when it was killed.
        resumed: step it went on from; 0: from nothing.
        step: optimizer steps done when it ended.
        checkpoints: steps of the states on disk after it.
        damaged: those of them that cannot be read, and why.
        gone_s: seconds until no process of it was left.
        left: processes that had to be killed one by one.
    """

    life: int
    asked_s: float | None
    aim: str | None = None
    only_first: bool = False
    ended_s: float = 0.0
    killed: bool = False
    code: int | None = None
    phase: str = "starting"
    resumed: int = 0
    step: int = 0
    checkpoints: list[int] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    gone_s: float = 0.0
    left: int = 0


# ------------------------------------------------------------------------------------------------ looking at a run
def run_folder(outputs: Path) -> Path | None:
    """The one run folder under an output root, once it is there."""
    found = [path.parent for path in outputs.glob("*/*/status.json")]
    return found[0] if found else None


class View:
    """What the files of a run say about the start that is at work on it.

    Args:
        outputs: the output root.
        pid: of the first process.
    """

    def __init__(self, outputs: Path, pid: int) -> None:
        self.outputs, self.pid = outputs, pid
        before = run_folder(outputs)
        self._log_from = _size(before / "run.log") if before else 0
        self._curves_from = _size(before / "curves.jsonl") if before else 0

    def is_saving(self) -> bool:
        """Whether a checkpoint of this start is half written."""
        folder = run_folder(self.outputs)
        return folder is not None and any((folder / "checkpoints").glob(f".step-*.ckpt.{self.pid}"))

    def log(self) -> str:
        """What this start has said."""
        folder = run_folder(self.outputs)
        if folder is None or not (folder / "run.log").exists():
            return ""
        return (folder / "run.log").read_bytes()[self._log_from :].decode(errors="replace")

    def phase(self) -> str:
        """Where it is."""
        folder = run_folder(self.outputs)
        said = self.log()
        if folder is None or "run " not in said:
            return "starting"
        status = json.loads((folder / "status.json").read_text())
        if status.get("status") == "finished":
            return "finished"
        if status.get("phase") in ("evaluating", "exporting"):
            return str(status["phase"])
        if self.is_saving():
            return "saving"
        if _size(folder / "curves.jsonl") > self._curves_from + 1:  # a newline may mend a line that was cut
            return "training"
        return "model" if "\nplan" in said else "data"

    def resumed(self) -> int:
        """The step it went on from."""
        lines = [line for line in self.log().splitlines() if line.startswith("going on from")]
        return int(lines[-1].rpartition("step-")[2].partition(".")[0]) if lines else 0

    def step(self) -> int:
        """The newest step in the curves of this start; without one, that it went on from."""
        folder, steps = run_folder(self.outputs), [self.resumed()]
        if folder is not None and (folder / "curves.jsonl").exists():
            for line in (folder / "curves.jsonl").read_bytes()[self._curves_from :].splitlines():
                try:
                    steps.append(int(json.loads(line)["step"]))
                except (ValueError, KeyError, TypeError):  # cut by a kill
                    continue
        return max(steps)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


# ------------------------------------------------------------------------------------------------ starting and killing
class Lives:
    """Starts of one command.

    Args:
        command: what is run; the output root of the life is added as `output_root=`.
        place: folder for the lives' output roots and the log.
        processes: of the command.
        hang_s: a start that takes longer has hung.
    """

    def __init__(self, command: Sequence[str], place: Path, *, processes: int = 1, hang_s: float = 600.0) -> None:
        self.command, self.place, self.processes, self.hang_s = list(command), place, processes, hang_s

    def outputs(self, life: int) -> Path:
        """Output root of a life; 0 is the undisturbed run's."""
        return self.place / ("undisturbed" if life == 0 else f"life-{life}")

    def undisturbed(self) -> tuple[Start, dict[str, float]]:
        """Run to the end; how that went, and the seconds at which each phase was first seen."""
        shutil.rmtree(self.outputs(0), ignore_errors=True)
        seen: dict[str, float] = {}
        start = self.run(Start(0, None), watch=lambda phase, now: seen.setdefault(phase, now))
        if start.code != 0:
            raise SystemExit(f"{' '.join(self.command)} ended with {start.code}: see {self.place / 'output.log'}")
        return start, seen

    def run(self, start: Start, watch: Callable[[str, float], Any] | None = None, within_s: float = 0.0) -> Start:
        """Start the command, kill it when it is time, and see what is left.

        Args:
            start: what shall be done; filled in.
            watch: told of the phase, with the seconds so far, many times a second.
            within_s: how long after the aimed phase has begun the kill strikes (0: at once).
        """
        outputs = self.outputs(start.life)
        with open(self.place / "output.log", "ab") as log:
            process = self._popen(outputs, log)
        view, began = View(outputs, process.pid), time.monotonic()
        try:
            self._wait(process, view, start, began, watch, within_s)
            if start.killed:
                self._kill(process, start)
        finally:
            _end_group(process.pid)
        if not start.killed:
            start.code = process.wait()
        start.ended_s = round(start.ended_s, 2)
        start.phase, start.resumed, start.step = view.phase(), view.resumed(), view.step()
        folder = run_folder(outputs)
        if folder is not None:
            start.checkpoints, start.damaged = read_checkpoints(folder)
        return start

    def _popen(self, outputs: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen(
            [*self.command, f"output_root={outputs}"],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment, start_new_session=True,
        )  # fmt: skip

    def _wait(
        self,
        process: subprocess.Popen[bytes],
        view: View,
        start: Start,
        began: float,
        watch: Callable[[str, float], Any] | None,
        within_s: float,
    ) -> None:
        """Until the moment of the kill, or the start's own end."""
        met: float | None = None
        while process.poll() is None:
            now = time.monotonic() - began
            start.ended_s = now
            if now > self.hang_s:
                raise SystemExit(f"still running after {self.hang_s:.0f} s: {' '.join(self.command)}")
            if watch is not None:
                watch(view.phase(), now)
            if start.asked_s is not None and now >= start.asked_s:
                if met is None and (start.aim is None or self._has_begun(view, start.aim)):
                    met = now
                if met is not None and (start.aim is None or now >= met + within_s):
                    start.killed = True
                    return
            # a checkpoint of a small model is written within milliseconds
            near = start.aim == "saving" and start.asked_s is not None and now >= start.asked_s
            time.sleep(POLL_S if near else 0.01)
        start.ended_s = time.monotonic() - began

    @staticmethod
    def _has_begun(view: View, aim: str) -> bool:
        return view.is_saving() if aim == "saving" else view.phase() == aim

    def _kill(self, process: subprocess.Popen[bytes], start: Start) -> None:
        """SIGKILL to all, or to the first alone; then nobody may be left."""
        began = time.monotonic()
        if start.only_first:
            os.kill(process.pid, signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        while group(process.pid) and time.monotonic() - began < GONE_S:
            time.sleep(0.01)
        start.gone_s = round(time.monotonic() - began, 2)
        start.left = len(group(process.pid))


def group(leader: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(process.info["pid"]) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(int(process.info["pid"]))
        except ProcessLookupError:
            continue
    return found


def _end_group(leader: int) -> None:
    """Nothing that was started here stays, whatever happened."""
    for pid in group(leader):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def read_checkpoints(folder: Path) -> tuple[list[int], dict[str, str]]:
    """Steps of the checkpoints of a run, and those that the run's own reader refuses."""
    from saferlhf.config.run_folder import RunFolder
    from saferlhf.errors import UserError
    from saferlhf.training.checkpoint import PATTERN, AtomicCheckpointIO, checkpoint_step

    steps, damaged = [], {}
    for path in sorted(RunFolder(folder).checkpoints.glob(PATTERN)):
        steps.append(checkpoint_step(path))
        try:
            held = AtomicCheckpointIO().load_checkpoint(path)
        except UserError as error:
            damaged[path.name] = str(error)
            continue
        if held["global_step"] != steps[-1]:
            damaged[path.name] = f"holds step {held['global_step']}"
    return steps, damaged


# ------------------------------------------------------------------------------------------------ the end
def compared(one: Path, other: Path) -> dict[str, Any]:
    """Two run folders: whether they hold the same model, metrics and curves, and the largest differences."""
    from safetensors.torch import load_file

    from saferlhf.training.curves import read_curves

    tensors = [
        {f"{file.name}/{name}": value for file in sorted((f / "export").rglob("*.safetensors"))
         for name, value in load_file(str(file)).items()} for f in (one, other)
    ]  # fmt: skip
    metrics = [json.loads((f / "metrics.json").read_text()) for f in (one, other)]
    for found in metrics:
        found.pop("train/seconds", None)
    curves = [
        {f"{name}@{step}": value for name, points in read_curves(f / "curves.jsonl").items() for step, value in points}
        for f in (one, other)
    ]
    return {
        "weights": _differences(tensors[0], tensors[1]),
        "metrics": _differences(metrics[0], metrics[1]),
        "curves": _differences(curves[0], curves[1]),
        "leftovers": sorted(p.name for p in one.rglob(".*") if p.name != ".lock"),
    }


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """How many values there are, how many are on one side alone, and the largest difference of the others (0: none)."""
    shared = one.keys() & other.keys()
    largest = max((_apart(one[key], other[key]) for key in shared), default=0.0)
    return {"values": len(shared), "on_one_side": len(one.keys() ^ other.keys()), "largest": largest}


def _apart(one: Any, other: Any) -> float:
    """The largest difference of two numbers or tensors; infinite where there is none to speak of."""
    import torch

    a, b = torch.as_tensor(one), torch.as_tensor(other)
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    apart = (a.double() - b.double()).abs()
    apart[a.isnan() & b.isnan() | (a == b)] = 0.0
    return float(apart.nan_to_num(math.inf, math.inf).max()) if apart.numel() else 0.0
