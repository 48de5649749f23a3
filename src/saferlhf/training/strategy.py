"""How Lightning spreads a training over devices: on one, by DDP, or by our own FSDP2 strategy (docs/parallel.md)."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy, Strategy

from saferlhf.config.schema import TrainConfig


def build_strategy(config: TrainConfig) -> Strategy | str:
    """What `strategy=` means; "auto": one process on one device."""
    if config.strategy.sharded:
        from saferlhf.training.fsdp import FSDP2Strategy

        return FSDP2Strategy(config.strategy, mixed=config.trainer.precision == "bf16-mixed")
    if config.strategy.name == "ddp" and config.trainer.devices > 1:
        unused = config.strategy.find_unused_parameters
        if unused is None:
            # actor and critics are backpropagated one by one, and layers above those that are read not at all
            unused = config.rollout is not None or getattr(config.task, "layers", None) is not None
        return DDPStrategy(find_unused_parameters=unused)
    return "auto"
