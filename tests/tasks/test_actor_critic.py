"""Rollouts of a small online run: what holds at the first step, and what micro-batches may not change."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import curves, online, policy_folder, prepared

from saferlhf.run.online import online_plan_rows
from saferlhf.run.stages import fit
from saferlhf.tracking.mlflow_logger import build_logger


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_folder(tmp_path_factory.mktemp("policy") / "sft")


def trained(policy: Path, outputs: Path, *overrides: str) -> Path:
    """The folder of a run that was trained and not measured."""
    run = prepared(online(policy, f"output_root={outputs}", *overrides))
    tracker = build_logger(
        run.config.tracking, output_root=outputs, run_folder=run.folder.path, run_name="x", identity="x"
    )
    fit(run, tracker)
    return run.folder.path


def test_the_first_rollout(policy: Path, tmp_path: Path) -> None:
    """The policy is the reference, and the old policy is the policy: divergence 0, ratio 1, nothing clipped."""
    found = curves(trained(policy, tmp_path, "trainer.max_steps=1", "task.epochs=1", "task.mini_batches=1"))
    at_first = {name: values[0][1] for name, values in found.items()}
    assert at_first["train/kl"] == 0 and at_first["train/approx_kl"] == 0
    assert at_first["train/ratio"] == 1 and at_first["train/clip_fraction"] == 0
    assert at_first["train/logprob_mismatch"] < 1e-5
    # lambda 1, lr 0.1: ln lambda moves by lr times the mean cost
    gap = at_first["train/mean_cost"]
    assert at_first["train/lambda"] == pytest.approx(math.exp(0.1 * gap))


def test_the_plan_names_where_roles_start_before_they_are_loaded(policy: Path, tmp_path: Path) -> None:
    run = prepared(online(policy, f"output_root={tmp_path}"))
    planned = dict(online_plan_rows(run.config, run.task, run.steps))
    assert run.task.roles is None
    assert planned["actor"] == f"trained, {policy}" and planned["reference"] == str(policy)
    assert planned["cost_critic"].startswith("trained, ") and "reward" not in planned, "scorers reward here"
    run.task.configure_model()
    loaded = dict(online_plan_rows(run.config, run.task, run.steps))
    assert loaded.keys() == planned.keys() and loaded["actor"] == planned["actor"]


def test_rows_go_where_the_strategy_says_while_it_trains(policy: Path, tmp_path: Path) -> None:
    """Sharded weights lie on GPUs that the module itself knows nothing of."""
    task = prepared(online(policy, f"output_root={tmp_path}")).task
    assert task.home == torch.device("cpu")
    strategy = SimpleNamespace(root_device=torch.device("meta"))
    task._trainer = SimpleNamespace(training=True, strategy=strategy)
    assert task.home == torch.device("meta")
    task._trainer = SimpleNamespace(training=False, strategy=strategy)
    assert task.home == torch.device("cpu"), "afterwards it is where it was moved"


@pytest.mark.slow
def test_the_path_of_lambda_does_not_depend_on_micro_batches(policy: Path, tmp_path: Path) -> None:
    paths = []
    for place, size in enumerate(("null", "1", "5")):
        found = curves(trained(policy, tmp_path / str(place), f"trainer.micro_batch_size={size}"))
        paths.append(found["train/lambda"])
        assert len(found["train/lambda"]) == 4
    assert paths[0] == paths[1] == paths[2]


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_learns_a_plain_reward_and_keeps_a_plain_cost_down(policy: Path, tmp_path: Path, advantage: str) -> None:
    long = ["trainer.max_steps=16", "rollout.prompts=16", "rollout.samples=4", "optimizer.lr=5e-3"]
    long += ["trainer.micro_batch_size=null", "checkpoint.every_steps=null", "task.truncation=none"]
    long += ["data.train_rows=64", f"advantage={advantage}", "advantage.whiten=standard"]
    free = curves(trained(policy, tmp_path / "free", *long, "constraint=none"))
    held = curves(trained(policy, tmp_path / "held", *long, "constraint.lambda_lr=0.3"))

    def late(found: dict[str, list[tuple[int, float]]], name: str) -> float:
        return sum(value for _, value in found[name][-5:]) / 5

    assert late(free, "train/mean_reward") > free["train/mean_reward"][0][1] + 0.2
    assert late(held, "train/mean_cost") < late(free, "train/mean_cost") - 0.2
