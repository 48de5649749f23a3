"""Who is first, how many there are, and what is wrong with their number: known before any process is started."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from small_runs import config, small

from saferlhf.config.schema import TrainConfig
from saferlhf.errors import UserError
from saferlhf.evaluation.processes import Processes
from saferlhf.training import processes as module
from saferlhf.training.processes import assembled, await_the_end, comes_first, has_several, told

KEYS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def _nobody_started_us(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)


def made(*overrides: str) -> TrainConfig:
    return config(small("task=reward", "trainer.accelerator=cpu", "output_root=unused", *overrides))


def under(monkeypatch: pytest.MonkeyPatch, **variables: Any) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, str(value))


@pytest.mark.parametrize(
    ("overrides", "several"),
    [
        ((), False),
        (("strategy=ddp",), False),
        (("strategy=fsdp",), False),
        (("strategy=ddp", "trainer.devices=2"), True),
        (("strategy=fsdp", "trainer.devices=2"), True),
    ],
)
def test_several_or_one(overrides: tuple[str, ...], several: bool) -> None:
    assert has_several(made(*overrides)) == several
    assert comes_first(made(*overrides)), "whoever types the command is the first"


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({"LOCAL_RANK": 0}, True),
        ({"LOCAL_RANK": 1}, False),
        # the first of the second machine
        ({"RANK": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "x"}, False),
        ({"SLURM_PROCID": 1, "SLURM_NTASKS": 2}, False),
        # a job of one task that starts its processes itself
        ({"SLURM_PROCID": 1, "SLURM_NTASKS": 1}, True),
    ],
)
def test_who_is_first(variables: dict[str, Any], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    under(monkeypatch, **variables)
    assert comes_first(made("strategy=ddp", "trainer.devices=2")) == first
    assert comes_first(made()), "a run of one process does not ask"


def test_another_number_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    under(monkeypatch, TORCHELASTIC_RUN_ID="x", LOCAL_WORLD_SIZE=4, LOCAL_RANK=0)
    with pytest.raises(UserError, match="4 processes were started") as error:
        assembled(made("strategy=ddp", "trainer.devices=2")).__enter__()
    assert error.value.mend == "trainer.devices=4"


@pytest.mark.parametrize(("accelerator", "gpus"), [("gpu", 0), ("gpu", 1), ("auto", 1)])
def test_fewer_gpus_than_devices(accelerator: str, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    wanted = made("strategy=ddp", "trainer.devices=2")
    wanted.trainer.accelerator = accelerator
    with pytest.raises(UserError, match=f"2 devices are asked for and PyTorch finds {gpus} GPUs"):
        assembled(wanted).__enter__()


def test_one_process_meets_nobody() -> None:
    with assembled(made()) as processes:
        assert processes == Processes(0, 1) and told(processes, "a folder") == "a folder"


def test_who_stays_is_ended() -> None:
    sleepers = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
    module._end(sleepers, patient=False)
    assert [sleeper.returncode for sleeper in sleepers] == [-9, -9]
    done = subprocess.Popen([sys.executable, "-c", ""])
    module._end([done], patient=True)
    assert done.returncode == 0


def test_trouble_that_the_first_does_not_know_of_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAVE_S", 0.0)
    with pytest.raises(ValueError, match="of mine"):
        await_the_end(ValueError("of mine"))


def test_stages_start_their_processes_with_all_their_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m saferlhf.cli train x=1` has taken `train` off its words by then."""
    monkeypatch.setattr(sys, "argv", ["cli.py", "x=1"])
    with module._words_for_children("train"):
        assert sys.argv == ["cli.py", "x=1"]
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", type("Spec", (), {"name": "saferlhf.cli"})())
    with module._words_for_children("train"):
        assert sys.argv == ["cli.py", "train", "x=1"]
    assert sys.argv == ["cli.py", "x=1"]
