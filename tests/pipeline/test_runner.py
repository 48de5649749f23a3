"""Pipelines: order, cache, failures, names, plans.

Stand-ins that train nothing take the place of the stages' processes, but for the slow tests at the end.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import fake_stage
import pytest
from command_lines import FAST, Answer, call, composed, config, finish

from saferlhf.config.run_folder import RunFolder
from saferlhf.config.schema import PipelineConfig, StageConfig
from saferlhf.config.validate import pipeline_config
from saferlhf.pipeline import launcher, runner
from saferlhf.pipeline.launcher import JobResult
from saferlhf.pipeline.screen import StageScreen
from saferlhf.pipeline.stages import Stages
from saferlhf.run.prepare import locate_run

FAKE = Path(__file__).with_name("fake_stage.py")
FEW = ["tracking=none"]
THREE = "pipeline.stages=[sft,reward,cost]"
BASE = config("task=sft")
subprocess_popen = subprocess.Popen


class InThisProcess:
    """Stands for `Popen`: the stage's stand-in runs right here, which saves a process start."""

    def __init__(self, command: list[str], *, stdout: IO[bytes], **_: Any) -> None:
        with io.TextIOWrapper(os.fdopen(os.dup(stdout.fileno()), "wb")) as log, contextlib.redirect_stdout(log):
            self.code = fake_stage.main(command[len(runner.STAGE) :])

    def poll(self) -> int:
        return self.code


class Pipeline:
    """Command lines of one test, with an output root of their own and stand-ins for the stages."""

    def __init__(self, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outputs = outputs
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(launcher, "POLL_S", 0.02)
        monkeypatch.setattr(launcher, "visible_gpus", lambda: ())
        self.use_processes(False)

    def use_processes(self, use: bool = True) -> None:
        """Whether the stand-ins get processes of their own."""
        self._monkeypatch.setattr(runner, "STAGE", (sys.executable, str(FAKE)))
        self._monkeypatch.setattr(launcher.subprocess, "Popen", subprocess_popen if use else InThisProcess)

    def __call__(self, *words: str, **todo: dict[str, Any]) -> Answer:
        """`python train.py words...`; `todo`: what the stand-ins of some tasks do instead of finishing."""
        self._monkeypatch.setenv("FAKE_STAGE", json.dumps(todo))
        return call("train", *FEW, f"output_root={self.outputs}", *words)

    def runs(self, name: str) -> list[Path]:
        return sorted(path for path in (self.outputs / name).glob("*") if path.is_dir())

    def run(self, name: str) -> Path:
        (folder,) = self.runs(name)
        return folder

    def log(self, stage: str, name: str = "quickstart") -> str:
        return (self.run(name) / f"{stage}.log").read_text()

    def gpus(self, stage: str, name: str = "quickstart") -> str:
        """What the stage's last process saw as `CUDA_VISIBLE_DEVICES`."""
        lines = [line for line in self.log(stage, name).splitlines() if line.startswith("gpus ")]
        return lines[-1].removeprefix("gpus ")

    def words(self, stage: str, name: str = "quickstart") -> list[str]:
        """The overrides that the stage's last process was given."""
        lines = [line for line in self.log(stage, name).splitlines() if line.startswith("words ")]
        return json.loads(lines[-1].removeprefix("words "))

    def statuses(self) -> dict[str, str]:
        return {
            folder.parent.name: RunFolder(folder).status().get("status", "none")
            for folder in self.outputs.glob("*/*")
            if folder.is_dir()
        }


@pytest.fixture
def pipeline(tmp_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    return Pipeline(tmp_outputs, monkeypatch)


def test_stages_run_in_order_and_once(pipeline: Pipeline) -> None:
    pipeline.use_processes()
    first = pipeline(THREE)
    assert first.code == 0, first.err
    everything = {"quickstart", "quickstart-sft", "quickstart-reward", "quickstart-cost"}
    assert pipeline.statuses() == dict.fromkeys(everything, "finished")
    # the stages that start from SFT say so
    sft = pipeline.run("quickstart-sft")
    assert f"init='{sft}'" in pipeline.words("reward")
    assert f"init='{sft}'" in pipeline.words("cost")
    assert not [word for word in pipeline.words("sft") if word.startswith("init=")]
    # the end tells the numbers and the places
    metrics = json.loads((pipeline.run("quickstart") / "metrics.json").read_text())
    assert metrics["reward/test/reward/pair_accuracy"] == 0.75
    assert set(metrics) == {f"{task}/test/{task}/pair_accuracy" for task in ("sft", "reward", "cost")}
    assert str(sft) in first.out

    logs = {stage: pipeline.log(stage) for stage in ("sft", "reward", "cost")}
    second = pipeline(THREE)
    assert second.code == 0
    assert [line.strip() for line in second.err.splitlines()] == [
        f"{stage}: finished before" for stage in ("sft", "reward", "cost")
    ]
    assert str(sft) in second.out
    assert {stage: pipeline.log(stage) for stage in logs} == logs, "no process was started"

    # one stage alone uses the earlier run of the one it needs
    (sft / ".touched").touch()
    alone = pipeline("pipeline.stages=[reward]", "seed=0")
    assert alone.code == 0
    assert [line.strip() for line in alone.err.splitlines()] == ["reward: finished before"]


def test_cores_are_shared_by_stages_that_run_together(tmp_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    words = ["debug=fast", "tracking=none", f"output_root={tmp_outputs}"]
    sft = finish(locate_run(config("task=sft", *words)))
    assert threads_of(stages_of(THREE, *words), {"sft": sft}) == {"sft": "6", "reward": "3", "cost": "3"}
    one = stages_of(THREE, "pipeline.parallel=1", *words)
    assert threads_of(one, {"sft": sft}) == {"sft": "6", "reward": "6", "cost": "6"}
    # what the user says wins
    mine = stages_of(THREE, "trainer.threads=2", *words)
    assert threads_of(mine, {"sft": sft}) == {"sft": "2", "reward": "2", "cost": "2"}


def threads_of(stages: Stages, folders: dict[str, Path]) -> dict[str, str]:
    """Threads that each stage's process is told to use."""
    first = stages.configs["sft"]
    summary = RunFolder(Path(first.output_root) / "summary")
    parent = runner._Parent(first, stages, summary)
    jobs = runner._Jobs(stages, dict(folders), summary, parent, StageScreen(list(stages.configs)), ())
    finished = folders["sft"]
    found = {}
    for stage in stages.asked:
        jobs._folders["sft"] = finished
        command = jobs._command(stage)
        assert command is not None
        (found[stage.name],) = [word.partition("=")[2] for word in command if word.startswith("trainer.threads=")]
    return found


def test_stages_that_run_together_see_their_own_gpus(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.use_processes()
    monkeypatch.setattr(launcher, "visible_gpus", lambda: ("4", "7"))
    assert pipeline(THREE).code == 0
    assert pipeline.gpus("sft") == "4"
    assert {pipeline.gpus("reward"), pipeline.gpus("cost")} == {"4", "7"}

    # two each: one after the other, with both
    answer = pipeline(THREE, "name=wide", "strategy=ddp", "trainer.devices=2")
    assert answer.code == 0, answer.err
    assert {pipeline.gpus(stage, "wide") for stage in ("sft", "reward", "cost")} == {"4,7"}
    # on the CPU none is taken, and none is seen
    assert pipeline("pipeline.stages=[sft]", "name=cpu", "trainer.accelerator=cpu").code == 0
    assert pipeline.gpus("sft", "cpu") == ""


def test_a_machine_without_gpus_deals_none(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.use_processes()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    words = ("strategy=ddp", "trainer.devices=2")
    assert pipeline("pipeline.stages=[sft]", *words).code == 0
    assert pipeline.gpus("sft") == "None"


def test_a_stage_that_wants_too_many_gpus_is_refused_at_once(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "visible_gpus", lambda: ("0", "1"))
    wide = ["task=cost", "strategy=ddp", "trainer.devices=3", "trainer.batch_size=48"]
    answer = pipeline(THREE, f"pipeline.definitions.cost.overrides={json.dumps(wide)}")
    assert answer.code == 2
    assert answer.error == "3 GPUs for one run, this machine has 2 GPUs (in trainer.devices, stage cost); use 2"
    assert pipeline.statuses() == {}, "nothing was started"


def test_a_failing_stage_is_one_line_and_the_others_go_on(pipeline: Pipeline) -> None:
    answer = pipeline("debug=fast", THREE, reward={"code": 7, "say": "noise\nerror: the disk is full (in here)"})
    assert answer.code == 7
    (line,) = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    log = pipeline.run("debug") / "reward.log"
    assert line == f"error: stage 'reward' failed with exit code 7: the disk is full (in here) (log: {log})"
    statuses = pipeline.statuses()
    assert (statuses["debug-sft"], statuses["debug-cost"], statuses["debug"]) == ("finished", "finished", "failed")
    assert "Traceback" not in answer.err

    # the next call does what is left
    again = pipeline("debug=fast", THREE)
    assert again.code == 0
    assert "sft: finished before" in again.err and "cost: finished before" in again.err
    assert pipeline.statuses()["debug"] == "finished"


def test_several_failures_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("=== a, 1\nerror: no room\n")
    results = {"a": JobResult(3, 1.0), "b": JobResult(None, 0.0), "c": JobResult(-9, 1.0), "d": JobResult(0, 1.0)}
    failure = runner._failure(results, RunFolder(tmp_path))
    log = tmp_path / "a.log"
    assert str(failure) == f"stage 'a' failed with exit code 3: no room (log: {log}); so did c"
    assert failure.code == 3


def test_what_needs_a_failed_stage_is_not_run(pipeline: Pipeline) -> None:
    pipeline.use_processes()
    answer = pipeline("debug=fast", THREE, sft={"signal": signal.SIGKILL})
    assert answer.code == 128 + signal.SIGKILL
    assert "stage 'sft' was ended by signal 9" in answer.err
    assert "reward: not run: a stage it needs did not finish" in answer.err
    assert pipeline.runs("debug-reward") == pipeline.runs("debug-cost") == []


def test_ctrl_c_stops_the_stages_and_marks_them(pipeline: Pipeline) -> None:
    def send() -> None:
        for _ in range(3000):
            if list(pipeline.outputs.glob("debug-sft/*/status.json")):
                break
            time.sleep(0.01)
        if getattr(signal.getsignal(signal.SIGINT), "__func__", None) is launcher._StopRequests._note:
            os.kill(os.getpid(), signal.SIGINT)

    pipeline.use_processes()
    thread = threading.Thread(target=send)
    thread.start()
    answer = pipeline("debug=fast", "pipeline.stages=[sft]", sft={"wait": True})
    thread.join()
    assert answer.code == 130
    assert "the same command goes on" in answer.err
    assert "error:" not in answer.err and "Traceback" not in answer.err
    assert pipeline.statuses() == {"debug": "killed", "debug-sft": "killed"}
    assert pipeline("debug=fast", "pipeline.stages=[sft]").code == 0, "and it does"


# ------------------------------------------------------------------------------------------------ names and overrides
def test_what_is_typed_wins_over_a_stages_definition() -> None:
    definition = ["task=sft", "trainer=cpu", "trainer.max_steps=9", "optimizer.lr=0.5", "name=theirs"]
    typed = ["+trainer.max_steps=3", "trainer=default", "seed=1"]
    one = PipelineConfig("mine", ["sft"], {"sft": StageConfig(definition)})
    stages = Stages(one, compose=lambda words: BASE, overrides=typed, prefix="mine")
    assert stages.overrides(stages.asked[0], {}) == [
        "~pipeline",
        "task=sft",
        "optimizer.lr=0.5",
        *typed,
        "name=mine-sft",
    ]


def test_a_pipeline_of_ones_own(pipeline: Pipeline, tmp_path: Path) -> None:
    """A chain, defined in any order, in a folder of the user's."""
    mine = tmp_path / "my configs" / "pipeline"
    mine.mkdir(parents=True)
    (mine / "chain.yaml").write_text(
        "name: chain\nstages: [cost, sft]\nparallel: 2\ndefinitions:\n"
        "  cost:\n    overrides: [task=cost]\n    inputs: {init: reward}\n"
        "  reward:\n    overrides: [task=reward]\n    inputs: {init: sft}\n"
        "  sft:\n    overrides: [task=sft]\n    inputs: {}\n"
    )
    words = ["pipeline=chain", "--config-dir", str(mine.parent)]
    missing = pipeline(*words)
    assert missing.code == 2
    assert missing.error == "stage 'reward' has no finished run yet (in pipeline.stages); add reward to the list"
    assert not list(pipeline.outputs.iterdir())

    assert pipeline(*words, "pipeline.stages=[cost,reward,sft]").code == 0
    assert f"init='{pipeline.run('chain-reward')}'" in pipeline.words("cost", "chain")
    # a stage in the middle, which itself needs one that is not asked for
    last = pipeline(*words, "pipeline.stages=[cost]")
    assert last.code == 0
    assert last.err.strip() == "cost: finished before"


def test_an_experiment_may_choose_the_pipeline(pipeline: Pipeline, tmp_path: Path) -> None:
    experiments = tmp_path / "mine" / "experiment"
    experiments.mkdir(parents=True)
    (experiments / "both.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /pipeline: quickstart\nname: both\ntrainer:\n  epochs: 2\n"
        "pipeline:\n  stages: [sft]\n"
    )
    answer = pipeline("experiment=both", "--config-dir", str(tmp_path / "mine"))
    assert answer.code == 0, answer.err
    assert set(pipeline.statuses()) == {"both", "both-sft"}
    # the stage finds the experiment too, and is not asked for a pipeline again
    words = pipeline.words("sft", "both")
    assert words[:2] == ["--config-dir", str(tmp_path / "mine")]
    assert {"~pipeline", "task=sft", "experiment=both", "name=both-sft"} <= set(words)
    assert json.loads((pipeline.run("both-sft") / "identity.json").read_text())["trainer"]["epochs"] == 2


# ------------------------------------------------------------------------------------------------ resume
def test_a_fresh_pipeline(pipeline: Pipeline) -> None:
    stages = "pipeline.stages=[sft,reward]"
    assert pipeline("debug=fast", stages).code == 0
    assert pipeline("debug=fast", stages, "resume=never").code == 0
    (first, second) = pipeline.runs("debug-sft")
    assert second.name == f"{first.name}-2"
    assert len(pipeline.runs("debug-reward")) == 2
    assert f"init='{second}'" in pipeline.words("reward", "debug")
    # a stage that is only needed is not run afresh
    words = ["debug=fast", "tracking=none", f"output_root={pipeline.outputs}"]
    assert stages_of("pipeline.stages=[reward]", "resume=never", *words).earlier() == {"sft": second}


def test_a_stage_that_ended_elsewhere_is_noticed(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code or data that change between the launcher's look and the stage's start make another run."""
    pipeline.use_processes()
    monkeypatch.setattr(runner, "STAGE", (sys.executable, "-S", "-c", "pass"))
    answer = pipeline("debug=fast", "pipeline.stages=[sft]")
    assert answer.code == 2
    assert "stage 'sft' ended well, but not in" in answer.err


def test_one_pipeline_at_a_time(pipeline: Pipeline) -> None:
    words = ["debug=fast", *FEW, f"output_root={pipeline.outputs}"]
    stages = stages_of("pipeline.stages=[sft]", *words)
    holder = RunFolder(pipeline.outputs / "debug" / runner._pipeline_hash(stages))
    holder.acquire()
    try:
        answer = pipeline("debug=fast", "pipeline.stages=[sft]")
    finally:
        holder.release()
    assert answer.code == 2
    assert answer.error.startswith(f"this run is in progress in process {os.getpid()}")
    assert not pipeline.runs("debug-sft")


# ------------------------------------------------------------------------------------------------ refusals
REFUSED = [
    (["pipeline.stages=[rewrd]"], "unknown stage 'rewrd' (in pipeline.stages); did you mean 'reward'?"),
    (["pipeline.stages=reward"], "not a list; write [a,b] (in pipeline.stages)"),
    (["pipeline.stages=[reward]"], "stage 'sft' has no finished run yet (in pipeline.stages); add sft to the list"),
    (["pipeline.parallel=0"], "0 stages at once (in pipeline.parallel)"),
    (["pipeline.stages=[sft]", "task=sft"], "both a task and a pipeline are named"),
    (["+pipeline.definitions.sft.inputs.init=cost"], "stages need each other: sft, reward, cost"),
    (["+pipeline.definitions.sft.inputs.init=cots"], "unknown stage 'cots' (in pipeline.definitions.sft.inputs)"),
    (["init=some/run"], "stage 'reward' takes init from stage 'sft' (in init)"),
    (["resume=outputs/x/0123456789"], "a path names one run, a pipeline has several"),
    (["quantization=nf4"], "a 4-bit base cannot be trained itself (in quantization=nf4, stage sft)"),
    (
        ["pipeline.definitions.cost.overrides=['task=cost','task.margin=1']"],
        "unknown key 'margin' (in task, stage cost)",
    ),
    (["data=jsonl", "data.path=nope.jsonl", "backbone=smollm2", "adapter=lora"], "no such file or folder: nope.jsonl"),
]


@pytest.mark.parametrize(("words", "says"), REFUSED)
def test_refused_in_one_line_before_anything_is_written(pipeline: Pipeline, words: list[str], says: str) -> None:
    answer = pipeline(*words)
    assert answer.code == 2
    assert says in answer.error
    assert answer.out == ""
    assert not list(pipeline.outputs.iterdir())


# ------------------------------------------------------------------------------------------------ plans
@pytest.mark.slow
def test_a_plan_of_a_pipeline_writes_nothing(pipeline: Pipeline) -> None:
    answer = pipeline("plan=on", THREE, *FAST[:-1])
    assert answer.code == 0, answer.err
    assert not list(pipeline.outputs.iterdir())
    plans = answer.out.split("plan of stage ")[1:]
    assert [plan.split()[0] for plan in plans] == ["sft", "reward", "cost"]
    sft, reward, cost = (" ".join(plan.split()) for plan in plans)
    assert "starts from random weights" in sft
    expected = locate_run(config("task=sft", *FAST, "name=debug-sft", f"output_root={pipeline.outputs}")).folder.path
    assert f"results {expected}" in sft
    for plan in (reward, cost):
        assert "starts from the run of stage sft (init), which does not exist yet" in plan
    assert f"results below {pipeline.outputs / 'debug-reward'}, known when that run is finished" in reward
    assert "steps 2 of 32 rows" in cost


@pytest.mark.slow
def test_a_plan_of_stages_whose_roles_are_not_there_yet(pipeline: Pipeline) -> None:
    answer = pipeline("plan=on", "pipeline.stages=[sft,reward,cost,ppo_lag]", *FAST[:-1])
    assert answer.code == 0, answer.err
    plan = " ".join(answer.out.split("plan of stage ppo_lag")[1].split())
    assert "the run of stage cost and reward and sft" in plan
    assert "parameters known when the runs that it starts from are finished" in plan
    assert "constraint lagrangian, advantages by gae" in plan
    assert "memory" not in plan
    assert not list(pipeline.outputs.iterdir())


def test_an_earlier_run_is_found(pipeline: Pipeline) -> None:
    words = ["task=sft", *FAST, "name=debug-sft", f"output_root={pipeline.outputs}"]
    sft = finish(locate_run(config(*words)))
    stages = stages_of("pipeline.stages=[reward]", *FAST, f"output_root={pipeline.outputs}")
    folders = stages.earlier()
    assert folders == {"sft": sft}
    assert stages.locate(stages.asked[0], folders).config.init == str(sft)


def stages_of(*overrides: str) -> Stages:
    """The quickstart with these overrides."""
    mine = [word for word in overrides if not word.startswith("pipeline.")]
    node = composed("pipeline=quickstart", *overrides).pipeline
    return Stages(pipeline_config(node), compose=lambda words: config(*words), overrides=mine, prefix="debug")


# ------------------------------------------------------------------------------------------------ the real thing
@pytest.mark.slow
def test_the_quickstart_in_small(tmp_path: Path) -> None:
    """Real stages, tracked: all finish, children hang under one parent, a second call answers in seconds."""
    stages = ["sft", "reward", "cost", "ppo", "ppo_lag"]
    chosen = f"pipeline.stages=[{','.join(stages)}]"
    words = [*FAST[:-1], chosen, "output_root=outputs", "tracking.system_metrics=false"]

    def python(*more: str) -> tuple[subprocess.CompletedProcess[str], float]:
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "saferlhf.cli", "train", *words, *more], cwd=tmp_path, capture_output=True, text=True
        )
        return done, time.monotonic() - started

    first, _ = python()
    assert first.returncode == 0, first.stderr
    folders = {path.parent.name: path for path in (tmp_path / "outputs").glob("debug*/*") if path.is_dir()}
    assert set(folders) == {"debug", *(f"debug-{stage}" for stage in stages)}
    parents_of: dict[str, list[str]] = {"sft": [], "reward": ["sft"], "cost": ["sft"]}
    for stage in stages:
        lineage = json.loads((folders[f"debug-{stage}"] / "export" / "saferlhf.json").read_text())["lineage"]
        assert [parent["role"] for parent in lineage] == parents_of.get(stage, ["sft", "reward", "cost"])
    # the policies stand side by side in the pipeline's folder and on the screen
    text = (folders["debug"] / "comparison.md").read_text()
    assert "| SFT | PPO | PPO-Lagrangian |" in text and "| PPO-Lagrangian - PPO |" in text
    assert (folders["debug"] / "policies.png").read_bytes().startswith(b"\x89PNG")
    assert "paired differences, prompt by prompt" in first.stdout
    assert "mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db" in first.stdout

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'outputs' / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    parents = {run.info.run_id: run for run in runs if "pipeline" in run.data.tags}
    children = [run for run in runs if "task" in run.data.tags]
    assert len(parents) == 1 and len(children) == len(stages)
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == set(parents)
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = parents.values()
    written = json.loads((folders["debug"] / "metrics.json").read_text())
    compared = {name: value for name, value in written.items() if name.startswith("compare/")}
    assert "compare/ppo-lagrangian_over_ppo/difference/mean_helpfulness" in compared
    assert parent.data.metrics == pytest.approx(compared)
    kept = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert {"comparison.md", "policies.png"} <= kept

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").rglob("*") if path.is_file()}
    second, seconds = python()
    assert second.returncode == 0
    assert second.stderr.count("finished before") == len(stages)
    assert seconds < 30
    plan, _ = python("plan=on")
    assert plan.returncode == 0
    assert plan.stdout.count("(finished)") == len(stages)
    assert f"starts from    {folders['debug-sft'].relative_to(tmp_path)}" in plan.stdout
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").rglob("*") if path.is_file()}
    changed = {path.relative_to(tmp_path / "outputs").parts[0] for path in after if after[path] != before.get(path)}
    assert changed == {"debug"}, "only the pipeline's own status, metrics and comparison are written again"


@pytest.mark.slow
def test_ctrl_c_on_the_real_thing(tmp_path: Path) -> None:
    words = [*FAST, "output_root=outputs", "pipeline.stages=[sft]", "trainer.max_steps=100000", "trainer.epochs=1e6"]
    words.remove("trainer.max_steps=2")
    process = subprocess.Popen(
        [sys.executable, "-m", "saferlhf.cli", "train", *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # a background job of a shell without job control ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            found = list((tmp_path / "outputs").glob("debug-sft/*/status.json"))
            if found and (json.loads(found[0].read_text()).get("step") or 0) > 3:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    (folder,) = (tmp_path / "outputs").glob("debug-sft/*")
    assert RunFolder(folder).status()["status"] == "killed"
    assert list((folder / "checkpoints").glob("*.ckpt")), "a usable checkpoint"
    (summary,) = (tmp_path / "outputs").glob("debug/*")
    assert RunFolder(summary).status()["status"] == "killed"
