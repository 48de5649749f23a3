"""Values that depend on other keys."""

from __future__ import annotations

import pytest
from command_lines import composed

from saferlhf.config.defaults import FROM_SCRATCH_LR, TOYWORLD_ROWS, fill_defaults
from saferlhf.config.schema import TrainConfig
from saferlhf.config.task_schema import TASKS
from saferlhf.config.validate import train_config


def filled(*overrides: str) -> TrainConfig:
    return fill_defaults(train_config(composed(*overrides)))


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        (["task=sft"], 2e-3),
        (["task=reward"], 1e-3),
        (["task=cost"], 1e-3),
        # PKU-SafeRLHF's scripts: 2e-5 for SFT, reward and cost
        (["task=sft", "backbone=smollm2"], 2e-5),
        (["task=cost", "backbone=smollm2"], 2e-5),
        (["task=reward", "backbone=smollm2", "adapter=lora"], 2e-4),
        (["task=reward", "backbone=smollm2", "adapter=lora", "quantization=nf4"], 2e-4),
        # what is given stays
        (["task=reward", "optimizer.lr=0.5"], 0.5),
    ],
)
def test_the_learning_rate_fits_what_is_trained(overrides: list[str], rate: float) -> None:
    assert filled(*overrides).optimizer.lr == rate


def test_rows_of_the_toy_world() -> None:
    for task in TASKS:
        assert filled(f"task={task}").data.train_rows == TOYWORLD_ROWS[task]
    assert filled("task=sft", "data.train_rows=7").data.train_rows == 7
    mine = filled("task=sft", "data=jsonl", "data.path=x", "backbone=smollm2")
    assert mine.data.train_rows is None, "all rows of a file"


def test_every_task_has_its_defaults() -> None:
    assert {*FROM_SCRATCH_LR, "probe"} == set(TOYWORLD_ROWS) == set(TASKS), "a probe is fitted without a learning rate"


def test_the_name() -> None:
    assert filled("task=cost").name == "cost"
    assert filled("task=cost", "name=mine").name == "mine"


def test_filling_twice_changes_nothing_and_the_original_stays() -> None:
    config = train_config(composed("task=reward"))
    once = fill_defaults(config)
    assert fill_defaults(once) == once
    assert (config.optimizer.lr, config.data.train_rows, config.name) == (None, None, None)
