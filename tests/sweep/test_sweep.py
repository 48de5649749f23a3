"""`train.py -m` through the command line, with runs that are noted instead of trained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from command_lines import FAST, Answer, call, config, finish

from saferlhf.config.run_folder import RunFolder
from saferlhf.errors import UserError
from saferlhf.pipeline import launcher
from saferlhf.pipeline.launcher import DevicePool, Job, JobResult
from saferlhf.run.prepare import locate_run
from saferlhf.sweep import runner
from saferlhf.sweep.runner import workers

R = "task=reward"
OBJECTIVE = ["sweep.objective=test/x", "sweep.direction=maximize"]


@dataclass
class Trained:
    """Stands for the processes: finishes runs with the metrics that `score` gives, or fails, or is interrupted."""

    score: Callable[[dict[str, str]], dict[str, float] | int] = lambda words: {"test/x": float(words["seed"])}
    started: list[list[str]] = field(default_factory=list)
    pools: list[DevicePool] = field(default_factory=list)
    at_once: int = 0
    most: int | None = None  # processes until Ctrl-C

    def launch(
        self,
        jobs: Sequence[Job],
        *,
        at_once: int,
        pool: DevicePool,
        on_poll: Callable[..., None],
        more: Callable[[], Job | None],
    ) -> dict[str, JobResult]:
        self.at_once = at_once
        self.pools.append(pool)
        done: dict[str, JobResult] = {}
        waiting = list(jobs)
        while waiting or (job := more()) is not None:
            job = waiting.pop(0) if waiting else job
            if self.most is not None and len(self.started) == self.most:
                raise KeyboardInterrupt
            assert job.ready()
            command = job.command()
            done[job.name] = JobResult(0, 0.0) if command is None else JobResult(self.run(job, list(command)), 1.0)
            on_poll(done)
        return done

    def run(self, job: Job, command: list[str]) -> int:
        assert command[1:4] == ["-m", "saferlhf.cli", "train"]
        words = command[4:]
        self.started.append(words)
        reached = self.score(dict(word.split("=", 1) for word in words))
        if isinstance(reached, int):
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.write_text("=== start\nerror: it went wrong\n")
            return reached
        # by the words of the process alone, as it would find its folder itself
        with mock.patch("sys.argv", ["train.py"]):
            finish(locate_run(config(*(word for word in words if not word.startswith("-")))), reached)
        return 0


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trained]:
    fake = Trained()
    monkeypatch.setattr(runner, "launch", fake.launch)
    monkeypatch.setattr(launcher, "visible_gpus", lambda: ())
    yield fake


def sweep(outputs: Path, *words: str) -> Answer:
    return call("train", "-m", R, *FAST, f"output_root={outputs}", *words)


def report(outputs: Path) -> dict[str, Any]:
    (file,) = outputs.glob("sweeps/*/sweep.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


# ------------------------------------------------------------------------------------------------ grid
def test_a_grid_runs_each_once_and_names_the_best(trained: Trained, tmp_outputs: Path) -> None:
    trained.score = lambda words: {"test/x": float(words["seed"]) + (words["optimizer.lr"] == "0.01") / 2}
    answer = sweep(tmp_outputs, "seed=0,1,2", "optimizer.lr=0.1,0.01", *OBJECTIVE)
    assert answer.code == 0, answer.err
    assert len(trained.started) == 6
    assert all("trainer.progress=none" in words for words in trained.started)
    assert not any(word.startswith(("sweep.", "-m")) for words in trained.started for word in words)
    told = report(tmp_outputs)
    assert [run["objective"] for run in told["runs"]] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert told["best"]["overrides"] == {"seed": "2", "optimizer.lr": "0.01"}
    assert told["swept"] == ["seed", "optimizer.lr"]
    assert "best: run 5: seed=2, optimizer.lr=0.01, test/x = 2.5" in answer.out
    (folder,) = (tmp_outputs / "sweeps").iterdir()
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert told["best"]["folder"] in (folder / "sweep.md").read_text()
    assert RunFolder(folder).status()["status"] == "finished"


def test_a_repeated_command_runs_nothing_and_tells_the_same(trained: Trained, tmp_outputs: Path) -> None:
    sweep(tmp_outputs, "seed=0,1", *OBJECTIVE)
    before = report(tmp_outputs)
    answer = sweep(tmp_outputs, "seed=0,1", *OBJECTIVE)
    assert len(trained.started) == 2, "none of them again"
    assert answer.err.count("finished before") == 2
    assert report(tmp_outputs) == before
    worst = sweep(tmp_outputs, "seed=0,1", "sweep.objective=test/x", "sweep.direction=minimize")
    assert "best: run 0: seed=0" in worst.out and len(trained.started) == 2


def test_a_grown_grid_is_the_same_sweep(trained: Trained, tmp_outputs: Path) -> None:
    sweep(tmp_outputs, "seed=0,1", *OBJECTIVE)
    sweep(tmp_outputs, "seed=range(0,4)", *OBJECTIVE, "trainer.log_every_steps=3")
    assert len(trained.started) == 4, "the two that are new"
    assert len(report(tmp_outputs)["runs"]) == 4, "one folder"
    sweep(tmp_outputs, "seed=0,1", "trainer.batch_size=4", *OBJECTIVE)
    assert len(list((tmp_outputs / "sweeps").iterdir())) == 2, "runs of another kind are another sweep"


def test_ctrl_c_in_the_middle_and_once_more(trained: Trained, tmp_outputs: Path) -> None:
    trained.most = 2
    answer = sweep(tmp_outputs, "seed=0,1,2", *OBJECTIVE)
    assert answer.code == 130
    assert answer.err.strip().endswith("the same command goes on")
    (folder,) = (tmp_outputs / "sweeps").iterdir()
    assert RunFolder(folder).status()["status"] == "killed"
    assert [run["status"] for run in report(tmp_outputs)["runs"]] == ["finished", "finished", "not run"]
    trained.most = None
    assert sweep(tmp_outputs, "seed=0,1,2", *OBJECTIVE).code == 0
    assert [dict(w.split("=", 1) for w in words)["seed"] for words in trained.started] == ["0", "1", "2"]


def test_a_failed_run_stops_no_other(trained: Trained, tmp_outputs: Path) -> None:
    trained.score = lambda words: 3 if words["seed"] == "0" else {"test/x": 1.0}
    answer = sweep(tmp_outputs, "seed=0,1,2", *OBJECTIVE)
    assert answer.code == 3
    assert answer.err.splitlines()[-1].startswith(
        "error: 1 of 3 runs of the sweep did not finish; run 0: seed=0: it went wrong (log: "
    )
    assert [run["status"] for run in report(tmp_outputs)["runs"]] == ["failed", "finished", "finished"]
    assert report(tmp_outputs)["runs"][0]["error"] == "it went wrong"
    assert "best: run 1" in answer.out
    trained.score = lambda words: {"test/x": 5.0}
    assert sweep(tmp_outputs, "seed=0,1,2", *OBJECTIVE).code == 0
    assert len(trained.started) == 4, "only the failed one again"


def test_values_that_are_refused(trained: Trained, tmp_outputs: Path) -> None:
    answer = sweep(tmp_outputs, "seed=-1,1", *OBJECTIVE)
    assert answer.code == 2
    assert "run 0: seed=-1: refused, -1 is no seed" in answer.err
    assert "1 of 2 runs of the sweep did not finish; run 0: seed=-1: -1 is no seed" in answer.err
    assert [run["status"] for run in report(tmp_outputs)["runs"]] == ["refused", "finished"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=-1,-2"], "-1 is no seed (in seed)"),
        (["trainer.max_stps=1,2"], "unknown key 'max_stps' (in trainer); did you mean 'max_steps'?"),
        (["+trainer.max_stps=1,2"], "unknown key 'max_stps' (in trainer.max_stps); did you mean 'max_steps'?"),
        (["data=toyworld,toyworl"], "there is no data 'toyworl'"),
        (["seed=interval(0,1)"], "an interval has no values for a grid (in seed); sweep=optuna"),
        (["trainer.threads=1,2"], "runs 0 and 1 would be the same run (in trainer.threads)"),
        (["sweep=optunaa"], "there is no sweep 'optunaa'"),
        (["sweep.objectiv=x"], "unknown key 'objectiv' (in sweep); did you mean 'objective'?"),
        (["sweep.trials=3"], "unknown key 'trials' (in sweep); another choice of this group has it, yours has not"),
        (["sweep.objective=x"], "sweep.objective without sweep.direction"),
        (["sweep.objective=x", "sweep.direction=up"], "'up' is not possible (in sweep.direction)"),
        (["sweep.workers=0"], "0 is not a positive number (in sweep.workers)"),
        (["sweep=optuna"], "no objective is named (in sweep.objective)"),
        (["sweep=optuna", *OBJECTIVE], "nothing is swept (in sweep=optuna)"),
        (["seed=0,1", "seed=2"], "'seed' is given twice"),
        (["resume=outputs/x", "seed=0,1"], "a path names one run, a sweep has several"),
    ],
)
def test_what_is_refused_before_anything_starts(
    trained: Trained, tmp_outputs: Path, words: list[str], said: str
) -> None:
    kept = [w for w in FAST if not (w.startswith("trainer.threads") and any("threads" in x for x in words))]
    answer = call("train", "-m", R, *kept, f"output_root={tmp_outputs}", *words)
    assert (answer.code, trained.started) == (2, [])
    assert said in answer.error


def test_words_of_a_sweep_without_m(tmp_outputs: Path) -> None:
    answer = call("train", R, "sweep.workers=2", f"output_root={tmp_outputs}")
    assert (answer.code, answer.error) == (
        2,
        "'sweep.workers=2' belongs to a sweep (in the command line); add -m, or leave it out",
    )


def test_an_objective_that_is_not_there(trained: Trained, tmp_outputs: Path) -> None:
    answer = sweep(tmp_outputs, "seed=0,1", "sweep.objective=tst/x", "sweep.direction=maximize")
    assert answer.code == 2
    assert "no metric 'tst/x'" in answer.err and "did you mean 'test/x'?" in answer.err
    assert len(trained.started) == 2, "the runs are of use all the same"


def test_a_store_out_of_reach_ends_the_sweep_before_its_runs(trained: Trained, tmp_outputs: Path) -> None:
    words = [*FAST[:-1], "tracking.uri=http://127.0.0.1:9", f"output_root={tmp_outputs}", "seed=0,1"]
    answer = call("train", "-m", R, *words)
    assert (answer.code, trained.started) == (2, [])
    assert answer.error.startswith("the tracking server http://127.0.0.1:9 does not answer")


def test_without_an_objective_none_is_chosen(trained: Trained, tmp_outputs: Path) -> None:
    answer = sweep(tmp_outputs, "seed=0,1")
    assert answer.code == 0 and "best" not in answer.out
    assert report(tmp_outputs)["best"] is None


def test_a_number_that_is_none_is_never_the_best(trained: Trained, tmp_outputs: Path) -> None:
    trained.score = lambda words: {"test/x": math.nan if words["seed"] == "1" else -5.0}
    sweep(tmp_outputs, "seed=0,1,2", *OBJECTIVE)
    assert report(tmp_outputs)["best"]["overrides"] == {"seed": "0"}, "the first of equal ones"


def test_a_folder_of_a_name(trained: Trained, tmp_outputs: Path) -> None:
    assert sweep(tmp_outputs, "seed=0,1", "sweep.folder=mine").code == 0
    assert (tmp_outputs / "sweeps" / "mine" / "sweep.md").is_file()
    answer = sweep(tmp_outputs, "optimizer.lr=0.1,0.2", "sweep.folder=mine")
    assert answer.code == 2 and "mine belongs to another sweep" in answer.error


def test_saved_values_are_swept(trained: Trained, tmp_outputs: Path) -> None:
    assert sweep(tmp_outputs, "sweep.params={seed: [3, 4]}", *OBJECTIVE).code == 0
    assert [run["overrides"] for run in report(tmp_outputs)["runs"]] == [{"seed": "3"}, {"seed": "4"}]


def test_the_plan_is_one_screen_and_starts_nothing(trained: Trained, tmp_outputs: Path) -> None:
    with mock.patch("saferlhf.run.train.train") as planned:
        answer = sweep(tmp_outputs, "seed=0,1", "plan=on")
    assert answer.code == 0, answer.err
    assert planned.call_count == 1, "the first run's plan"
    assert "sweep: 2 runs, " in answer.out and not trained.started
    assert not list(tmp_outputs.iterdir())


# ------------------------------------------------------------------------------------------------ Optuna
LR = "optimizer.lr=tag(log,interval(1e-5,1e-1))"


def near(words: dict[str, str]) -> dict[str, float]:
    return {"test/x": -((math.log10(float(words["optimizer.lr"])) + 3) ** 2)}


def test_optuna_by_the_command_line(trained: Trained, tmp_outputs: Path) -> None:
    trained.score, trained.most = near, 3
    words = ["sweep=optuna", "sweep.trials=6", "sweep.startup_trials=2", LR, *OBJECTIVE]
    assert sweep(tmp_outputs, *words).code == 130
    trained.most = None
    answer = sweep(tmp_outputs, *words)
    assert answer.code == 0, answer.err
    assert len(trained.started) == 6, "three before the stop, three behind it"
    rates = [dict(w.split("=", 1) for w in one)["optimizer.lr"] for one in trained.started]
    assert len(set(rates)) == 6
    told = report(tmp_outputs)
    assert [run["trial"] for run in told["runs"]] == list(range(6))
    assert told["best"]["objective"] == pytest.approx(max(near({"optimizer.lr": rate})["test/x"] for rate in rates))
    more = [word.replace("trials=6", "trials=7") if word.startswith("sweep.trials") else word for word in words]
    assert sweep(tmp_outputs, *more).code == 0
    assert len(trained.started) == 7, "a greater number goes on with the same study"


def test_optuna_without_the_objective_stops(trained: Trained, tmp_outputs: Path) -> None:
    trained.score = near
    wrong = ["sweep.objective=test/y", "sweep.direction=maximize"]
    answer = sweep(tmp_outputs, "sweep=optuna", "sweep.trials=6", LR, *wrong)
    assert answer.code == 2 and "no metric 'test/y'" in answer.err
    assert len(trained.started) == 1, "there is nothing to go by"


def test_optuna_goes_on_behind_a_failed_run(trained: Trained, tmp_outputs: Path) -> None:
    trained.score = lambda words: 1 if float(words["optimizer.lr"]) > 1e-3 else near(words)
    answer = sweep(tmp_outputs, "sweep=optuna", "sweep.trials=8", "sweep.sampler=random", LR, *OBJECTIVE)
    assert answer.code == 1 and len(trained.started) == 8
    assert {run["status"] for run in report(tmp_outputs)["runs"]} == {"finished", "failed"}


# ------------------------------------------------------------------------------------------------ workers
@pytest.mark.parametrize(
    ("asked", "gpus", "devices", "cores", "expected"),
    [
        (None, 4, 1, 64, 4),
        (None, 4, 2, 64, 2),
        (None, 4, 3, 64, 1),
        (None, 4, 0, 64, 16),  # trainer=cpu on a machine with GPUs
        (None, 0, 1, 1, 1),
        (None, 0, 1, 2, 2),
        (None, 0, 1, 16, 4),
        (3, 4, 1, 64, 3),
        (9, 4, 2, 64, 2),  # more would only wait
        (99, 0, 1, 2, 20),  # never more than there are runs
    ],
)
def test_workers(
    asked: int | None, gpus: int, devices: int, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "cpu_share", lambda at_once: cores // at_once)
    settings = mock.Mock(workers=asked)
    assert workers(settings, DevicePool([str(n) for n in range(gpus)]), 20, devices) == expected


def test_more_gpus_than_there_are(trained: Trained, tmp_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "visible_gpus", lambda: ("0", "1"))
    monkeypatch.setattr("saferlhf.sweep.child.Child.devices", lambda self: 4)
    answer = sweep(tmp_outputs, "seed=0,1")
    assert (answer.code, trained.started) == (2, [])
    assert answer.error == "4 GPUs for one run, this machine has 2 GPUs (in trainer.devices); use 2"


def test_a_run_at_work_elsewhere_is_waited_for(tmp_outputs: Path) -> None:
    from saferlhf.sweep.child import make_child
    from saferlhf.sweep.space import read_space

    words = [R, *FAST, f"output_root={tmp_outputs}", "seed=0,1"]
    child = make_child(0, {"seed": "0"}, read_space(words), lambda made: config(*made))
    assert child.is_free()
    other = RunFolder(child.folder.path)
    other.acquire()
    assert not child.is_free()
    other.release()
    assert child.is_free() and child.status == "killed"


def test_the_same_values_have_the_same_words() -> None:
    with pytest.raises(UserError, match="nothing to sweep over"):
        from saferlhf.sweep.space import read_space

        read_space([], {"seed": {"a": 1}})
