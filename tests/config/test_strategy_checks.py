"""What several devices cannot do is one line before anything loads; how the work is spread is no part of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from command_lines import composed

from saferlhf.config.schema import StrategyConfig, TrainConfig
from saferlhf.config.validate import train_config
from saferlhf.errors import UserError
from saferlhf.run.prepare import checked, locate_run

PPO = ["task=ppo", "init=somewhere", "roles.reward.model=somewhere"]
QLORA = ["backbone=smollm2", "adapter=lora", "quantization=nf4"]


def made(*overrides: str) -> TrainConfig:
    return checked(train_config(composed(*overrides)))


REFUSED = [
    (["task=reward", "trainer.devices=2"], "strategy=single cannot use 2 devices", "strategy=ddp"),
    ([*PPO, "strategy=ddp", "trainer.devices=2", "rollout=vllm"], "rollout=vllm samples for one device", "native"),
    ([*PPO, "strategy=fsdp", "trainer.devices=8", "rollout.prompts=6"], "6 prompts per rollout for 8 devices", "use 8"),
    (["task=probe", "strategy=fsdp"], "a probe is fitted on one device", "strategy=single"),
    (["task=sft", "strategy=ddp", "trainer.devices=3"], "32 rows per step cannot be dealt evenly", "multiple of 3"),
    (["task=reward", "strategy=fsdp", "strategy.shard_packed=true"], "there are no 4-bit weights", "quantization=nf4"),
    (["task=cost", "strategy=fsdp", "optimizer=adamw_8bit"], "cut through", "strategy=ddp"),
    (["task=cost", "strategy=fsdp", "optimizer=paged_adamw_8bit"], "cut through", "optimizer=adamw"),
    (["task=reward", "strategy=ddp", "task.head_start=linear_probe"], "task.head_start works on one device", "default"),
    (
        ["task=reward", "strategy=ddp", "backbone=smollm2", "adapter=lora", "adapter.blocks=[28,29]"]
        + ["adapter.cache_frozen=true"],
        "adapter.cache_frozen works on one device",
        "default",
    ),
    (["task=sft", "strategy=hsdp", "trainer.devices=4", "strategy.replicas=3"], "3 copies", "divisor"),
    (["task=sft", "strategy=hsdp", "strategy.replicas=0"], "strategy.replicas", ""),
    (["task=sft", "strategy=fsdp", "strategy.reduce_dtype=float16"], "strategy.reduce_dtype", "bfloat16"),
    (["task=sft", "strategy.name=dpp"], "strategy.name", "ddp"),
]


@pytest.mark.parametrize(("overrides", "what", "mend"), REFUSED, ids=[" ".join(r[0]) for r in REFUSED])
def test_refused(overrides: list[str], what: str, mend: str) -> None:
    with pytest.raises(UserError) as error:
        made(*overrides)
    assert what in str(error.value) and mend in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=ddp", "trainer.devices=4", *QLORA],
        ["strategy=ddp", "optimizer=adamw_8bit"],
        ["strategy=fsdp", "strategy.cpu_offload=true"],
        ["strategy=fsdp", "trainer.devices=4", *QLORA],
        ["strategy=fsdp", "strategy.shard_packed=true", *QLORA],
        ["strategy=hsdp", "trainer.devices=8", "backbone=smollm2", "adapter=lora"],
    ],
)
def test_allowed(overrides: list[str]) -> None:
    found = made("task=reward", *overrides)
    assert f"strategy={found.strategy.name}" in overrides


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
def test_online_tasks_are_allowed_and_prompts_need_not_divide(strategy: str) -> None:
    found = made(*PPO, f"strategy={strategy}", "trainer.devices=2", "rollout.prompts=7", "trainer.batch_size=33")
    assert found.strategy.sharded == (strategy != "ddp")


def test_the_strategy_is_no_part_of_a_run(tmp_path: Path) -> None:
    plain = made("task=reward", f"output_root={tmp_path}")
    spread = [("ddp", 2, "strategy.find_unused_parameters=true"), ("fsdp", 4, "strategy.cpu_offload=true")]
    for strategy, devices, more in spread:
        words = [f"output_root={tmp_path}", f"strategy={strategy}", f"trainer.devices={devices}", more]
        other = made("task=reward", *words)
        assert other.strategy != plain.strategy
        assert locate_run(other).hash == locate_run(plain).hash


def test_the_files_say_what_the_schema_says() -> None:
    """One place for each default."""
    for name in ("ddp", "fsdp"):
        assert made("task=reward", f"strategy={name}").strategy == StrategyConfig(name)
    hybrid = made("task=reward", "strategy=hsdp", "trainer.devices=2").strategy
    assert hybrid == dataclasses.replace(StrategyConfig("hsdp"), replicas=2)
