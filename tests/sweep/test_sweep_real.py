"""The real thing: six runs with two workers, tracked; killed in the middle and repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_lines import FAST

WORDS = [
    *FAST[:-1],  # tracked
    "task=reward",
    "seed=0,1,2",
    "optimizer.lr=1e-4,1e-3",
    "output_root=outputs",
    "tracking.system_metrics=false",
    "sweep.objective=test/reward/pair_accuracy",
    "sweep.direction=maximize",
    "sweep.workers=2",
]


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "saferlhf.cli", "train", "-m", *WORDS],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group of its own, to be killed as a whole
    )


def statuses(folder: Path) -> dict[str, dict[str, Any]]:
    found = (folder / "outputs" / "debug").glob("*/status.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def runs_of(folder: Path) -> list[Any]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'outputs' / 'mlflow.db'}")
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_six_runs_two_workers_killed_and_repeated(tmp_path: Path) -> None:
    first = start(tmp_path)
    at_work: list[int] = []

    def some_are_at_work() -> bool:
        at_work[:] = [s["pid"] for s in statuses(tmp_path).values() if s["status"] == "running"]
        return bool(at_work)

    try:
        # in the middle: some have finished, others are at work
        wait_for(lambda: sum(s["status"] == "finished" for s in statuses(tmp_path).values()) >= 2, 600)
        wait_for(some_are_at_work, 120)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate()
    before = statuses(tmp_path)
    done = {
        name: (tmp_path / "outputs" / "debug" / name / "metrics.json").stat().st_mtime_ns
        for name, s in before.items()
        if s["status"] == "finished"
    }
    assert 2 <= len(done) < 6

    second = start(tmp_path)  # at once: what the first one left behind may be at work still
    output, _ = second.communicate(timeout=1000)
    assert second.returncode == 0, output
    assert output.count("finished before") >= len(done)
    assert output.count(": started, ") <= 6 - len(done)
    assert "6 of 6 runs finished" in output
    assert "locked" not in output and "locked" not in "".join(
        log.read_text() for log in (tmp_path / "outputs" / "sweeps").glob("*/logs/*.log")
    )
    assert not any(map(alive, at_work)), "nobody is left at work"

    after = statuses(tmp_path)
    assert [s["status"] for s in after.values()] == ["finished"] * 6
    for name, stamp in done.items():
        assert (tmp_path / "outputs" / "debug" / name / "metrics.json").stat().st_mtime_ns == stamp, "not run again"

    runs = runs_of(tmp_path)
    parents = [run for run in runs if "sweep" in run.data.tags]
    children = [run for run in runs if "sweep" not in run.data.tags]
    assert len(parents) == 1 and len(children) == 6
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    names = {f"seed={seed}, optimizer.lr={lr}" for seed in (0, 1, 2) for lr in ("0.0001", "0.001")}
    assert {run.info.run_name for run in children} == names

    (report,) = (tmp_path / "outputs" / "sweeps").glob("*/sweep.json")
    told = json.loads(report.read_text())
    assert len(told["runs"]) == 6
    assert told["best"]["objective"] == max(run["objective"] for run in told["runs"])
    assert parents[0].data.metrics["test/reward/pair_accuracy"] == pytest.approx(told["best"]["objective"])
    assert (report.parent / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert told["best"]["folder"] in (report.parent / "sweep.md").read_text()
