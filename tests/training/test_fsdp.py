"""FSDP2 on one device: every shard is the whole, so all that is left is the way there and back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from small_runs import assert_same, curves, prepared, small, state
from torch.distributed.tensor import DTensor

from saferlhf.run.stages import fit
from saferlhf.tracking.base import NullLogger
from saferlhf.training.fsdp import FSDP2Strategy
from saferlhf.training.strategy import build_strategy


@pytest.fixture(autouse=True)
def _environment_as_before() -> Iterator[None]:
    """Lightning tells its processes who they are by the environment, a single one too."""
    with mock.patch.dict(os.environ):
        yield


def ended(place: Path, *overrides: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A run after its training, and its weights."""
    run = prepared(small("trainer.accelerator=cpu", "task=reward", *overrides, f"output_root={place}"))
    fit(run, NullLogger())
    return run, {name: value.detach().clone() for name, value in run.task.model.state_dict().items()}


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    return ended(tmp_path / "fsdp", "strategy=fsdp")


def test_one_device_is_one_device(trained: tuple[Any, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    run, found = trained
    plain, expected = ended(tmp_path / "single")
    assert not dist.is_initialized(), "whatever comes later must not think that others are there"
    assert not any(isinstance(value, DTensor) for value in run.task.state_dict().values())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    one, other = state(run.folder.path), state(plain.folder.path)
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert_same(shape_of(one["optimizer_states"]), shape_of(other["optimizer_states"]))
    assert curves(run.folder.path).keys() == curves(plain.folder.path).keys()


def shape_of(value: Any) -> Any:
    """A nested value with tensors replaced by what they look like."""
    if isinstance(value, torch.Tensor):
        return type(value).__name__, str(value.dtype), list(value.shape), str(value.device)
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shape_of(item) for item in value]
    return type(value).__name__


def test_a_finished_training_is_taken_as_it_is(trained: tuple[Any, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """Evaluation and export are repeated from the last checkpoint: every value comes back."""
    _, found = trained
    again, weights = ended(tmp_path / "fsdp", "strategy=fsdp")
    assert_same(weights, found)
    assert state(again.folder.path)["global_step"] == again.steps


def test_half_precision_is_the_same_model(tmp_path: Path) -> None:
    """bf16-mixed: weights stay float32; gathering them in bfloat16 changes numbers, and only where it is asked for."""
    kept, found = ended(tmp_path / "kept", "strategy=fsdp", "trainer.precision=bf16-mixed")
    plain, expected = ended(tmp_path / "plain", "trainer.precision=bf16-mixed")
    rounded, other = ended(
        tmp_path / "rounded", "strategy=fsdp", "strategy.gather_bf16=true", "trainer.precision=bf16-mixed"
    )
    for run in (kept, plain, rounded):
        assert all(value.dtype == torch.float32 for value in run.task.state_dict().values())
    first = [curves(run.folder.path)["train/loss"][0][1] for run in (kept, plain, rounded)]
    assert first[0] == pytest.approx(first[1], abs=1e-4) and first[2] == pytest.approx(first[1], abs=2e-2)
    assert largest(found, expected) < largest(other, expected)


def largest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_what_the_config_means() -> None:
    def made(*overrides: str) -> Any:
        from small_runs import config

        return build_strategy(config(small("task=reward", "trainer.accelerator=cpu", "output_root=x", *overrides)))

    assert made() == made("strategy=ddp") == "auto", "one process on one device"
    assert isinstance(made("strategy=fsdp"), FSDP2Strategy)
    two = made("strategy=ddp", "trainer.devices=2")._ddp_kwargs
    lower = made("strategy=ddp", "trainer.devices=2", "task.layers=[0]")._ddp_kwargs
    told = made("strategy=ddp", "trainer.devices=2", "strategy.find_unused_parameters=true")._ddp_kwargs
    assert [part["find_unused_parameters"] for part in (two, lower, told)] == [False, True, True]
