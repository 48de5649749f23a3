"""What `strategy` and `trainer.devices` can and cannot do, refused before anything heavy loads; see `checks.py`."""

from __future__ import annotations

from saferlhf.config.check_values import one_of, positive
from saferlhf.config.online_schema import PpoConfig
from saferlhf.config.schema import TrainConfig
from saferlhf.config.task_schema import ProbeConfig
from saferlhf.errors import UserError


def check_strategy(config: TrainConfig) -> None:
    """Refuse what does not run on several devices.

    Raises:
        UserError: one line each.
    """
    strategy, devices = config.strategy, config.trainer.devices
    one_of(strategy.name, "strategy.name", ["single", "ddp", "fsdp", "hsdp"])
    one_of(strategy.reduce_dtype, "strategy.reduce_dtype", ["float32", "bfloat16"])
    if strategy.name == "single":
        if devices > 1:
            mend = "strategy=ddp (or strategy=fsdp, which shards the model), or trainer.devices=1"
            raise UserError(f"strategy=single cannot use {devices} devices", "trainer.devices", mend)
        return
    where = f"strategy={strategy.name}"
    if isinstance(config.task, ProbeConfig):
        raise UserError("a probe is fitted on one device", where, "strategy=single trainer.devices=1")
    if isinstance(config.task, PpoConfig):
        _check_rollout(config, where)
    elif config.trainer.batch_size % devices:
        what = f"{config.trainer.batch_size} rows per step cannot be dealt evenly to {devices} devices"
        raise UserError(what, "trainer.batch_size", f"use a multiple of {devices}")
    _check_what_is_kept(config, where)
    if strategy.sharded:
        _check_fsdp(config, where)


def _check_rollout(config: TrainConfig, where: str) -> None:
    rollout, devices = config.rollout, config.trainer.devices
    assert rollout is not None
    if rollout.engine != "native" and devices > 1:
        what = f"rollout={rollout.engine} samples for one device, this run has {devices}"
        raise UserError(what, where, "rollout=native, or trainer.devices=1")
    if rollout.prompts < devices:
        what = f"{rollout.prompts} prompts per rollout for {devices} devices leave some without work"
        raise UserError(what, "rollout.prompts", f"use {devices} or more")


def _check_what_is_kept(config: TrainConfig, where: str) -> None:
    """What one process alone computes beforehand."""
    for key, given in (
        ("task.head_start", getattr(config.task, "head_start", None) == "linear_probe"),
        ("adapter.cache_frozen", config.adapter.cache_frozen),
    ):
        if given:
            raise UserError(f"{key} works on one device so far", where, f"leave {key} as it is by default")


def _check_fsdp(config: TrainConfig, where: str) -> None:
    strategy, devices = config.strategy, config.trainer.devices
    if config.optimizer.name.endswith("_8bit"):
        what = "8-bit optimizer states are packed by blocks, which shards would cut through"
        raise UserError(what, f"{where} optimizer={config.optimizer.name}", "optimizer=adamw, or strategy=ddp")
    if strategy.shard_packed and config.quantization.name == "none":
        what = "there are no 4-bit weights to shard"
        raise UserError(what, "strategy.shard_packed", "strategy.shard_packed=false, or quantization=nf4")
    positive({"strategy.replicas": strategy.replicas})
    if devices > 1 and devices % strategy.replicas:
        what = f"{devices} devices cannot be dealt evenly to {strategy.replicas} copies of the model"
        raise UserError(what, "strategy.replicas", "use a divisor of trainer.devices")
