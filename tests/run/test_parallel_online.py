"""Two processes sample what one samples and learn what it learns: PPO-Lagrangian under ddp, fsdp and hsdp.

As in `test_parallel_training.py`: real processes under gloo on the CPU, one pair of them for all trainings.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models.role_models import Models, on_one_base
from small_runs import (
    RunServer,
    assert_alike_curves,
    assert_alike_weights,
    assert_same,
    curves,
    metrics,
    online,
    only_run,
    own,
    own_rows,
    policy_folder,
    prepared,
    state,
    status,
)

from saferlhf.config.schema import QuantizationConfig
from saferlhf.run import stages
from saferlhf.tracking.base import NullLogger

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CLOSE = 1e-5
TWO = {name: [f"strategy={name}", "trainer.devices=2"] for name in ("ddp", "fsdp", "hsdp")}

# 5 prompts for two processes, 10 responses in steps of 5, those in passes of at most 2: nothing divides evenly.
# 5 rollouts of 2 passes of 2 steps: 20 optimizer steps
BASE = [
    "rollout.prompts=5",
    "trainer.max_steps=5",
    "trainer.micro_batch_size=2",
    "trainer.accelerator=cpu",
    "trainer.log_every_steps=1",
    "task.epochs=2",
    "task.mini_batches=2",
    "optimizer=sgd",
    "optimizer.lr=0.1",
    "task.critic.lr=0.1",
    "schedule=constant",
]
SEES_SCORERS = {"PYTHONPATH": str(ROOT / "tests")}
ADAMW = ["optimizer=adamw", "optimizer.lr=0.003", "optimizer.eps=0.001", "task.critic.lr=0.003"]
SHARED = ["roles=shared", "optimizer.lr=0.02", "task.critic.lr=0.02"]
PACKED = [*SHARED, "quantization=nf4"]

# name -> (what the run is made of, its overrides, strategies)
KINDS: dict[str, tuple[str, list[str], list[str]]] = {
    "functions": ("functions", [], ["ddp", "fsdp", "hsdp"]),
    "supervised": ("functions", ["task.ptx_coefficient=1", "task.loss_mean=response", "task.stop_kl=10"], [*TWO]),
    "rloo": ("functions", ["advantage=rloo", "constraint=none"], ["ddp", "fsdp"]),
    "warmup": ("functions", ["task.critic.warmup_rollouts=2"], ["ddp", "fsdp"]),
    "shared": ("models", SHARED, [*TWO]),
    "separate": ("models", ["roles=separate", "optimizer.lr=0.02", "task.critic.lr=0.02"], ["ddp", "fsdp"]),
    "whole models": ("models", ["roles=separate", "adapter=none"], ["ddp", "fsdp"]),
    "packed": ("packed", PACKED, ["ddp", "fsdp"]),
}
VARIANTS = {
    "fsdp, offloaded": ("functions", ["strategy.cpu_offload=true"]),
    "fsdp, less memory": ("shared", ["strategy.activation_checkpointing=true"]),
    "fsdp, more memory": ("shared", ["strategy.reshard_after_forward=false"]),
    "fsdp, packed shards": ("packed", ["strategy.shard_packed=true"]),
}


@dataclass
class Pair:
    """What two processes did."""

    place: Path
    results: dict[str, dict[str, Any]]


class Runs:
    """The command lines of all runs, and what they start from."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.policy = policy_folder(place / "policy")
        self.models = {
            "models": on_one_base(place / "models"),
            "packed": on_one_base(place / "packed", QuantizationConfig("nf4")),
        }

    def overrides(self, kind: str, name: str, *more: str) -> list[str]:
        """Of a run of one of the kinds, its outputs in a folder of that name."""
        made_of, words, _ = KINDS[kind]
        more = (*BASE, *words, *more, f"output_root={self.place / name}")
        if made_of == "functions":
            return online(self.policy, *more)
        return self._with_models(self.models[made_of], *more)

    def _with_models(self, models: Models, *more: str) -> list[str]:
        rows = self.place / "rows.jsonl"
        if not rows.exists():
            own_rows(rows)
        words = ["task=ppo_lag", f"init={models.sft}", f"roles.reward.model={models.reward}"]
        words += [f"roles.cost.model={models.cost}", "rollout.samples=2", "rollout.max_new_tokens=8"]
        words += [f"backbone.model={models.base}", "adapter.dropout=0"]
        found = own(self.place / "models", *words, f"data.path={rows}", *more)
        return [o for o in found if "adapter=none" not in found or not o.startswith("adapter.")]


def jobs_of(runs: Runs) -> list[dict[str, Any]]:
    """Everything that two processes train, in order."""
    jobs: list[dict[str, Any]] = []

    def add(name: str, kind: str, *more: str, **options: Any) -> None:
        folder = options.pop("folder", name).replace(", ", "-")
        jobs.append({"name": name, "overrides": runs.overrides(kind, folder, *more), **options})

    for kind, (_, _, strategies) in KINDS.items():
        for strategy in strategies:
            add(f"{strategy}, {kind}", kind, *TWO[strategy])
    for name, (kind, changed) in VARIANTS.items():
        add(name, kind, *TWO["fsdp"], *changed)
    for strategy in ("ddp", "fsdp"):
        two = [*ADAMW, *TWO[strategy]]
        add(f"{strategy}, whole", "functions", *two)
        add(f"{strategy}, stopped", "functions", *two, stop_after=3)
        add(f"{strategy}, resumed", "functions", *two, folder=f"{strategy}, stopped")
        add(f"{strategy}, left", "functions", *two, stop_after=3)
    return jobs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def pair(runs: Runs) -> Pair:
    """All jobs, done by one pair of processes."""
    place = runs.place
    jobs = jobs_of(runs)
    (place / "jobs.json").write_text(json.dumps({"folder": str(place), "jobs": jobs}))
    worker = [sys.executable, str(ROOT / "tests" / "parallel_worker.py"), str(place / "jobs.json")]
    done = subprocess.run(worker, capture_output=True, text=True, timeout=850, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "returned a view tensor" not in done.stderr
    return Pair(place, {job["name"]: torch.load(place / f"{job['name']}.pt", weights_only=True) for job in jobs})


ONE: dict[str, dict[str, Any]] = {}


def one_process(runs: Runs, kind: str, *more: str) -> dict[str, Any]:
    """Weights, samples and folder of the same training by one process; each is made once."""
    name = "-".join(("one", kind, *more)).replace("/", "")
    if name not in ONE:
        from parallel_worker import watched_samples

        run = prepared(runs.overrides(kind, f"one-{len(ONE)}", *more))
        samples = watched_samples(run.task)
        stages.fit(run, NullLogger())
        weights = {k: v.detach().clone() for k, v in run.task.model.state_dict().items()}
        ONE[name] = {"weights": weights, "samples": samples, "folder": str(run.folder.path)}
    return ONE[name]


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same samples, the same weights and the same curves, to `CLOSE`."""
    assert len(expected["samples"]) == 5 and found["samples"] == expected["samples"]
    assert_alike_weights(found["weights"], expected["weights"], CLOSE)
    one, other = curves(Path(found["folder"])), curves(Path(expected["folder"]))
    assert "train/mean_reward" in one
    assert_alike_curves(one, other, CLOSE)


@pytest.mark.parametrize(
    ("kind", "strategy"), [(kind, strategy) for kind, (_, _, names) in KINDS.items() for strategy in names]
)
def test_two_processes_do_what_one_does(kind: str, strategy: str, runs: Runs, pair: Pair) -> None:
    expected = one_process(runs, kind)
    assert_close(pair.results[f"{strategy}, {kind}"], expected)
    before = stages_weights(runs, kind)
    moved = [k for k, v in expected["weights"].items() if k in before and not torch.equal(v, before[k])]
    assert any("actor" in key for key in moved), "something was learnt"


def stages_weights(runs: Runs, kind: str) -> dict[str, torch.Tensor]:
    """Of the same run before its first step."""
    run = prepared(runs.overrides(kind, "untrained"))
    run.task.configure_model()
    found: dict[str, torch.Tensor] = run.task.model.state_dict()
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_change_memory_and_speed_alone(variant: str, runs: Runs, pair: Pair) -> None:
    assert_close(pair.results[variant], one_process(runs, VARIANTS[variant][0]))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_resumed_run_ends_as_if_nothing_had_been(strategy: str, pair: Pair) -> None:
    assert "after step 3 of 5" in pair.results[f"{strategy}, stopped"]["stopped"]
    resumed, whole = (pair.results[f"{strategy}, {name}"] for name in ("resumed", "whole"))
    assert_same(resumed["weights"], whole["weights"], "weights")
    one, other = state(Path(resumed["folder"])), state(Path(whole["folder"]))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "running", "callbacks"):
        assert_same(one[key], other[key], key)
    assert_same(curves(Path(resumed["folder"])), curves(Path(whole["folder"])), "curves")
    assert other["running"]["rollouts"] == 5


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_takes_over_from_two(strategy: str, runs: Runs, pair: Pair) -> None:
    assert "after step 3 of 5" in pair.results[f"{strategy}, left"]["stopped"]
    whole = one_process(runs, "functions", *ADAMW)
    run = prepared(runs.overrides("functions", f"{strategy}-left", *ADAMW))
    assert str(run.folder.path) == pair.results[f"{strategy}, left"]["folder"]
    stages.fit(run, NullLogger())
    for key, value in run.task.model.state_dict().items():
        torch.testing.assert_close(value, whole["weights"][key], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_command(strategy: str, server: RunServer, runs: Runs, tmp_path: Path) -> None:
    """Train, evaluate and export: one run to whoever looks at it, with the numbers of one process."""
    ended = {}
    for name, words in (("one", []), ("two", TWO[strategy])):
        overrides = online(runs.policy, *BASE, *ADAMW, *words, f"output_root={tmp_path / name}")
        ended[name] = server.wait(*server.start(*overrides, environment=SEES_SCORERS), seconds=240)
        assert ended[name].code == 0, ended[name].output
        assert ended[name].output.count("metrics:") == 1 and "Traceback" not in ended[name].output
    one, two = (only_run(tmp_path / name) for name in ("one", "two"))
    assert one.name == two.name and status(two)["status"] == "finished"
    assert metrics(two) == pytest.approx(metrics(one), rel=1e-4, abs=1e-4)
