"""Two processes reach the losses and weights of one: ddp and fsdp, for every supervised task, and after a resume.

Real processes under gloo on the CPU; on GPUs only device and backend are others. All trainings of this file that need
two processes run in one pair of them (`parallel_worker.py`), the command line's excepted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from parallel_worker import StopAfter
from small_runs import (
    ALL_TASKS,
    Ended,
    RunServer,
    assert_alike_curves,
    assert_alike_weights,
    assert_same,
    curves,
    metrics,
    only_run,
    own,
    prepared,
    small,
    state,
    status,
    weights,
)

from saferlhf.run import stages
from saferlhf.run.train import Interrupted
from saferlhf.tracking.base import NullLogger
from saferlhf.training.checkpoint import newest_checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CLOSE = 1e-5
Curves = dict[str, list[tuple[int, float]]]

# 11 validation rows in batches of 8: the processes have 6 and 5
BASE = [
    "backbone.architecture.num_hidden_layers=2",
    "data.val_rows=11",
    "trainer.max_steps=20",
    "trainer.val_every_steps=5",
    "trainer.log_every_steps=1",
    "trainer.accelerator=cpu",
    "optimizer=sgd",
    "optimizer.lr=0.1",
    "schedule=constant",
]
# moments to be resumed; with a large eps rounding is not magnified where a gradient is nearly zero
ADAMW = ["optimizer=adamw", "optimizer.lr=0.003", "optimizer.eps=0.001"]
TWO = {"ddp": ["strategy=ddp", "trainer.devices=2"], "fsdp": ["strategy=fsdp", "trainer.devices=2"]}
VARIANTS = {
    "fsdp, offloaded": ["strategy=fsdp", "strategy.cpu_offload=true"],
    "fsdp, less memory": ["strategy=fsdp", "strategy.activation_checkpointing=true"],
    "fsdp, more memory": ["strategy=fsdp", "strategy.reshard_after_forward=false"],
    "hsdp, two copies": ["strategy=hsdp"],
    "fsdp, lower layers": ["strategy=fsdp", "task.layers=[1]"],
    "ddp, lower layers": ["strategy=ddp", "task.layers=[1]"],
    "fsdp, no clipping": ["strategy=fsdp", "trainer.gradient_clip=null", "optimizer.lr=0.02"],
}


PACKED = {
    "ddp, packed": ["strategy=ddp"],
    "fsdp, packed": ["strategy=fsdp"],
    "fsdp, packed shards": ["strategy=fsdp", "strategy.shard_packed=true"],
}


@dataclass
class Pair:
    """What two processes did: a result for each job, and where it all lies."""

    place: Path
    results: dict[str, dict[str, Any]]

    def folder(self, name: str) -> Path:
        return Path(self.results[name]["folder"])


def overrides_of(place: Path, name: str, *more: str) -> list[str]:
    return small(*BASE, *more, f"output_root={place / name}")


def lora(place: Path, name: str, *more: str) -> list[str]:
    """A LoRA run on a model from a folder and rows of a file."""
    base = [o for o in BASE if not o.startswith(("backbone.", "data."))]
    return own(place, *base, "task=reward", *more, f"output_root={place / name}")


def jobs_of(place: Path) -> list[dict[str, Any]]:
    """Everything that two processes train, in order."""
    jobs: list[dict[str, Any]] = []

    def add(name: str, overrides: list[str], **more: Any) -> None:
        jobs.append({"name": name, "overrides": overrides, **more})

    for strategy, two in TWO.items():
        for task in ALL_TASKS:
            add(f"{strategy}, {task}", overrides_of(place, f"{strategy}-{task}", f"task={task}", *two))
        add(f"{strategy}, lora", lora(place, f"{strategy}-lora", "adapter.dropout=0", *two))
        # both processes draw dropout of their own
        dropout = lora(place, f"{strategy}-whole", *ADAMW, *two)
        add(f"{strategy}, whole", dropout)
        dropout = lora(place, f"{strategy}-stopped", *ADAMW, *two)
        add(f"{strategy}, stopped", dropout, stop_after=7)
        add(f"{strategy}, resumed", dropout)
        # begun by one process, see `_begun_alone`
        add(f"{strategy}, taken over", overrides_of(place, f"{strategy}-from-one", "task=reward", *ADAMW, *two))
        # gone on with by one process in the test
        left = overrides_of(place, f"{strategy}-to-one", "task=reward", *ADAMW, *two)
        add(f"{strategy}, left", left, stop_after=8)
        bad = overrides_of(place, f"{strategy}-spoilt", "task=reward", *two)
        add(f"{strategy}, spoilt", bad, spoil=3)
    for name, words in PACKED.items():
        words = ["quantization=nf4", "adapter.dropout=0", "trainer.devices=2", *words]
        add(name, lora(place, name.replace(", ", "-"), *words))
    for name, changed in VARIANTS.items():
        add(name, overrides_of(place, name.replace(", ", "-"), "task=reward", "trainer.devices=2", *changed))
    return jobs


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """All jobs, done by one pair of processes."""
    place = tmp_path_factory.mktemp("pair")
    jobs = jobs_of(place)
    for strategy in TWO:
        _begun_alone(place, strategy)
    (place / "jobs.json").write_text(json.dumps({"folder": str(place), "jobs": jobs}))
    worker = [sys.executable, str(ROOT / "tests" / "parallel_worker.py"), str(place / "jobs.json")]
    done = subprocess.run(worker, capture_output=True, text=True, timeout=850, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return Pair(place, {job["name"]: torch.load(place / f"{job['name']}.pt", weights_only=True) for job in jobs})


def _begun_alone(place: Path, strategy: str) -> None:
    """The first 9 steps of a run, by one process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        build = stages.build_trainer
        stopped = lambda *a, callbacks, **k: build(*a, callbacks=[StopAfter(9), *callbacks], **k)  # noqa: E731
        patch.setattr(stages, "build_trainer", stopped)
        run = prepared(overrides_of(place, f"{strategy}-from-one", "task=reward", *ADAMW))
        stages.fit(run, NullLogger())


ONE: dict[str, tuple[dict[str, torch.Tensor], Path]] = {}


def one_process(place: Path, name: str, overrides: list[str]) -> tuple[dict[str, torch.Tensor], Path]:
    """Weights and folder of the same training by one process; each is made once."""
    if name not in ONE:
        run = prepared(overrides)
        stages.fit(run, NullLogger())
        ONE[name] = {k: v.detach().clone() for k, v in run.task.model.state_dict().items()}, run.folder.path
    return ONE[name]


def assert_close(pair: Pair, name: str, expected: tuple[dict[str, torch.Tensor], Path]) -> None:
    """The same weights, and the same curves at the same steps, to `CLOSE`."""
    whole, folder = expected
    assert_alike_weights(pair.results[name]["weights"], whole, CLOSE)
    assert_close_curves(curves(pair.folder(name)), curves(folder))


def assert_close_curves(found: Curves, expected: Curves) -> None:
    assert "val/loss" in found
    assert_alike_curves(found, expected, CLOSE)


@pytest.mark.parametrize("task", ALL_TASKS)
@pytest.mark.parametrize("strategy", TWO)
def test_two_processes_reach_what_one_does(strategy: str, task: str, pair: Pair) -> None:
    name = f"one-{task}"
    expected = one_process(pair.place, name, overrides_of(pair.place, name, f"task={task}"))
    assert_close(pair, f"{strategy}, {task}", expected)
    points = curves(expected[1])["train/loss"]
    assert len(points) == 20 and points[-1][1] < points[0][1] - 0.05, "something was learnt"


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_change_memory_and_speed_alone(variant: str, pair: Pair) -> None:
    changed = [o for o in VARIANTS[variant] if not o.startswith("strategy")]
    name = f"one-reward-{'-'.join(changed)}"
    expected = one_process(pair.place, name, overrides_of(pair.place, name, "task=reward", *changed))
    assert_close(pair, variant, expected)


@pytest.mark.parametrize("strategy", TWO)
def test_adapters_on_a_frozen_base(strategy: str, pair: Pair) -> None:
    expected = one_process(pair.place, "one-lora", lora(pair.place, "one-lora", "adapter.dropout=0"))
    assert_close(pair, f"{strategy}, lora", expected)
    names = set(state(pair.folder(f"{strategy}, lora"))["state_dict"])
    assert names and all("lora_" in name or "heads." in name for name in names), "the frozen base is not in the file"


@pytest.mark.parametrize("name", PACKED)
def test_adapters_on_a_4_bit_base(name: str, pair: Pair) -> None:
    words = ["quantization=nf4", "adapter.dropout=0"]
    assert_close(pair, name, one_process(pair.place, "one-packed", lora(pair.place, "one-packed", *words)))


@pytest.mark.parametrize("strategy", TWO)
def test_a_resumed_run_ends_as_if_nothing_had_been(strategy: str, pair: Pair) -> None:
    """To the last bit, dropout included; it was the second process alone that was asked to stop."""
    assert "after step 7 of 20" in pair.results[f"{strategy}, stopped"]["stopped"]
    resumed, whole = (pair.results[f"{strategy}, {name}"] for name in ("resumed", "whole"))
    assert_same(resumed["weights"], whole["weights"], "weights")
    one, other = state(Path(resumed["folder"])), state(Path(whole["folder"]))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "running", "callbacks"):
        assert_same(one[key], other[key], key)
    assert_same(curves(Path(resumed["folder"])), curves(Path(whole["folder"])), "curves")
    generators = one["callbacks"]["RandomState"]["processes"]
    assert not torch.equal(generators[0]["torch"], generators[1]["torch"]), "each draws noise of its own"


@pytest.mark.parametrize("strategy", TWO)
def test_two_processes_take_over_from_one(strategy: str, pair: Pair) -> None:
    expected = one_process(pair.place, "one-adamw", overrides_of(pair.place, "one-adamw", "task=reward", *ADAMW))
    assert_close(pair, f"{strategy}, taken over", expected)


@pytest.mark.parametrize("strategy", TWO)
def test_one_process_takes_over_from_two(strategy: str, pair: Pair) -> None:
    assert "after step 8 of 20" in pair.results[f"{strategy}, left"]["stopped"]
    whole, folder = one_process(pair.place, "one-adamw", overrides_of(pair.place, "one-adamw", "task=reward", *ADAMW))
    run = prepared(overrides_of(pair.place, f"{strategy}-to-one", "task=reward", *ADAMW))
    assert run.folder.path == pair.folder(f"{strategy}, left") and newest_checkpoint(run.folder) is not None
    stages.fit(run, NullLogger())
    for key, value in run.task.model.state_dict().items():
        torch.testing.assert_close(value, whole[key], rtol=0, atol=CLOSE)
    assert_close_curves(curves(run.folder.path), curves(folder))
    # the file is that of one process, moments included
    assert_alike(state(run.folder.path)["optimizer_states"], state(folder)["optimizer_states"])


def assert_alike(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_alike(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE)
    else:
        assert found == expected


@pytest.mark.parametrize("strategy", TWO)
def test_trouble_of_the_second_process_is_told_by_the_first(strategy: str, pair: Pair) -> None:
    found = pair.results[f"{strategy}, spoilt"]
    assert "the loss became nan in step 3 of 20" in found["trouble"]
    assert found["rows"] and all(row in found["trouble"] for row in found["rows"][:3])


# ------------------------------------------------------------------------------------------------ the command line
def command(place: Path, *overrides: str) -> list[str]:
    return small(*BASE, *ADAMW, "task=reward", *overrides, f"output_root={place}", f"cache_dir={place / 'cache'}")


def run_to_end(server: RunServer, *words: str, **options: Any) -> Ended:
    return server.wait(*server.start(*words, **options), seconds=300)


@pytest.fixture(scope="module")
def alone(server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by one process."""
    place = tmp_path_factory.mktemp("alone")
    ended = server.run(*command(place))
    assert ended.code == 0, ended.output
    return only_run(place)


def assert_close_end(found: Path, expected: Path) -> None:
    assert found.name == expected.name, "how the work was spread is no part of the run"
    assert status(found)["status"] == "finished"
    exported = weights(found)
    assert exported.keys() == weights(expected).keys()
    for name, value in weights(expected).items():
        torch.testing.assert_close(exported[name], value, rtol=0, atol=CLOSE)
    assert_close_curves(curves(found), curves(expected))
    # the test's server measures on fewer damaged replies
    one, other = ({k: v for k, v in metrics(of).items() if "damaged" not in k} for of in (found, expected))
    assert one == pytest.approx(other, rel=1e-4, abs=1e-4)


def processes_of(place: Path) -> list[int]:
    """Living processes that have this folder in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(str(place) in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


@pytest.mark.parametrize("strategy", TWO)
def test_a_command_is_one_run_whoever_works_on_it(
    strategy: str, alone: Path, server: RunServer, tmp_path: Path
) -> None:
    ended = run_to_end(server, *command(tmp_path, *TWO[strategy]))
    assert ended.code == 0, ended.output
    assert ended.output.count("metrics:") == 1 and ended.output.count("run ") >= 1
    assert "Traceback" not in ended.output and "distributed" not in ended.output
    assert_close_end(only_run(tmp_path), alone)
    assert not processes_of(tmp_path)
    again = server.run(*command(tmp_path, *TWO[strategy]))
    assert again.code == 0 and again.output.count("finished before") == 1


def test_killed_and_gone_on_with_by_two_and_by_one(alone: Path, server: RunServer, tmp_path: Path) -> None:
    die = {"signal": signal.SIGKILL, "at": "train_batch_start", "step": 7}
    ended = run_to_end(server, *command(tmp_path, *TWO["ddp"]), die=die)
    assert ended.code == -signal.SIGKILL, ended.output
    until = time.monotonic() + 10
    while processes_of(tmp_path):
        assert time.monotonic() < until, "the second process outlives the first"
        time.sleep(0.1)
    folder = only_run(tmp_path)
    assert newest_step(folder) == 6
    die["step"] = 13
    ended = run_to_end(server, *command(tmp_path, *TWO["ddp"]), die=die)
    assert ended.code == -signal.SIGKILL and "step-00000006.ckpt" in ended.output
    ended = server.run(*command(tmp_path))
    assert ended.code == 0 and "step-00000012.ckpt" in ended.output, ended.output
    assert_close_end(folder, alone)


def newest_step(folder: Path) -> int:
    return int(max(folder.glob("checkpoints/step-*.ckpt")).stem.partition("-")[2])


def test_asked_to_stop_all_save_and_go(server: RunServer, tmp_path: Path) -> None:
    die = {"signal": signal.SIGTERM, "at": "train_batch_start", "step": 4}
    ended = run_to_end(server, *command(tmp_path, *TWO["fsdp"]), die=die)
    assert ended.code == 130, ended.output
    assert "stopped by SIGTERM after step 5 of 20" in ended.lines[-1] and "Traceback" not in ended.output
    folder = only_run(tmp_path)
    assert status(folder)["status"] == "killed" and newest_step(folder) == 5
    assert not processes_of(tmp_path)


def test_trouble_is_one_line_and_no_process_is_left_waiting(server: RunServer, tmp_path: Path) -> None:
    rows = tmp_path / "none.jsonl"
    rows.write_text("")
    words = ["task=reward", "data=jsonl", f"data.path={rows}", "backbone=smollm2", "trainer.accelerator=cpu"]
    words += [f"output_root={tmp_path}", "tracking=none", *TWO["ddp"]]
    ended = run_to_end(server, *words)
    assert ended.code == 2, ended.output
    assert len([line for line in ended.lines if line.startswith("error: ")]) == 1 and "Traceback" not in ended.output
    assert not processes_of(tmp_path)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
STAGE = ["-m", "saferlhf.cli", "train"]


@pytest.mark.parametrize("start", [TORCHRUN, STAGE], ids=["torchrun", "stage"])
def test_started_by_others(start: list[str], alone: Path, tmp_path: Path) -> None:
    """By torchrun, which starts all; as pipelines and sweeps start their runs."""
    words = [sys.executable, *start, *command(tmp_path, *TWO["ddp"])]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("metrics:") == 1
    assert_close_end(only_run(tmp_path), alone)


def test_the_environment_is_as_before() -> None:
    assert not {"LOCAL_RANK", "NODE_RANK"} & os.environ.keys(), "left over, these would make later runs wait for others"
