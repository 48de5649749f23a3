"""SIGKILL in the middle of a PPO-Lagrangian run, the same command again, and the end is the same to the last bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from small_runs import RunServer, assert_same_end, online, only_run, policy_folder, state, status

KILL = signal.SIGKILL


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_folder(tmp_path_factory.mktemp("policy") / "sft")


@pytest.fixture(scope="module")
def whole(server: RunServer, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("whole")
    ended = server.run(*online(policy, f"output_root={outputs}"))
    assert ended.code == 0, ended.output
    return only_run(outputs)


@pytest.mark.parametrize(("at", "step"), [("train_batch_start", 3), ("train_batch_end", 4)])
def test_killed_between_and_in_rollouts(
    at: str, step: int, server: RunServer, policy: Path, whole: Path, tmp_path: Path
) -> None:
    overrides = online(policy, f"output_root={tmp_path}")
    assert server.run(*overrides, die={"signal": KILL, "at": at, "step": step}).code == -KILL
    folder = only_run(tmp_path)
    assert status(folder)["status"] == "running"
    ended = server.run(*overrides)
    assert ended.code == 0, ended.output
    assert "going on from" in ended.output
    assert_same_end(folder, whole)
    running = state(folder)["running"]
    assert running["rollouts"] == 4 and running["constraint"]["rollouts"] == 4
    names = set(state(folder)["state_dict"])
    for role in ("actor", "reward_critic", "cost_critic"):
        assert any(role in name for name in names), role
    assert not any("reference" in name for name in names), "frozen weights are found again by their names"
