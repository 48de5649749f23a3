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
    one_of(strategy.name, "strategy.name", ["single", "ddp", "fsdp"])
    one_of(strategy.reduce_dtype, "strategy.reduce_dtype", ["float32", "bfloat16"])
    if strategy.name == "single":
        if devices > 1:
            mend = "strategy=ddp (or strategy=fsdp, which shards the model), or trainer.devices=1"
            raise UserError(f"strategy=single cannot use {devices} devices", "trainer.devices", mend)
        return
    where = f"strategy={strategy.name}"
    if isinstance(config.task, PpoConfig | ProbeConfig):
        what = f"{config.task.name} runs on one device so far"
        raise UserError(what, where, "strategy=single trainer.devices=1")
    if config.trainer.batch_size % devices:
        what = f"{config.trainer.batch_size} rows per step cannot be dealt evenly to {devices} devices"
        raise UserError(what, "trainer.batch_size", f"use a multiple of {devices}")
    _check_what_is_kept(config, where)
    if strategy.name == "fsdp":
        _check_fsdp(config, where)


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
    if config.quantization.name != "none":
        # on CUDA, words of packed weights that look like NaN were rewritten when shards are copied
        what = "4-bit weights cannot be sharded without damage"
        raise UserError(what, f"{where} quantization={config.quantization.name}", "strategy=ddp, or quantization=none")
    if config.optimizer.name.endswith("_8bit"):
        what = "8-bit optimizer states are packed by blocks, which shards would cut through"
        raise UserError(what, f"{where} optimizer={config.optimizer.name}", "optimizer=adamw, or strategy=ddp")
    positive({"strategy.replicas": strategy.replicas})
    if devices > 1 and devices % strategy.replicas:
        what = f"{devices} devices cannot be dealt evenly to {strategy.replicas} copies of the model"
        raise UserError(what, "strategy.replicas", "use a divisor of trainer.devices")
