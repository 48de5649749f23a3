"""What to change when a run does not fit, in order: first what leaves the result as it is, then what changes it.

Each remedy is planned on top of those before it that helped, so that what is printed is a command that was planned and
not a hope. What `config/checks.py` refuses is left out. docs/oom.md has the same list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from saferlhf.config.checks import check_config
from saferlhf.config.schema import TrainConfig
from saferlhf.errors import UserError
from saferlhf.run.memory.plan import GIB, MemoryPlan, plan_memory
from saferlhf.run.memory.workload import Workload
from saferlhf.run.trainer import micro_batch_size

HELPS = 0.99
"""A remedy that leaves more than this share of the peak is left out."""


@dataclass(frozen=True)
class Remedy:
    """A change that was planned.

    Attributes:
        words: for the command line.
        peak: bytes with it and with all before it.
        fits: whether that is enough.
    """

    words: str
    peak: int
    fits: bool


def _smaller_batches(config: TrainConfig) -> tuple[TrainConfig, str] | None:
    """One row at once: gradients add up to the same step."""
    if micro_batch_size(config) == 1:
        return None
    few = min(8, config.trainer.eval_batch_size)
    trainer = replace(config.trainer, micro_batch_size=1, eval_batch_size=few)
    words, rollout = f"trainer.micro_batch_size=1 trainer.eval_batch_size={few}", config.rollout
    if rollout is not None and rollout.batch_size is None:
        rollout, words = replace(rollout, batch_size=8), f"{words} rollout.batch_size=8"
    return replace(config, trainer=trainer, rollout=rollout), words


def _recomputed(config: TrainConfig) -> tuple[TrainConfig, str] | None:
    if config.backbone.gradient_checkpointing:
        return None
    backbone = replace(config.backbone, gradient_checkpointing=True)
    return replace(config, backbone=backbone), "backbone.gradient_checkpointing=true"


def _half_precision(config: TrainConfig) -> tuple[TrainConfig, str] | None:
    if config.backbone.dtype == "bfloat16" and config.trainer.precision != "32-true":
        return None
    trainer, backbone = replace(config.trainer, precision="bf16-mixed"), replace(config.backbone, dtype="bfloat16")
    return replace(config, trainer=trainer, backbone=backbone), "trainer.precision=bf16-mixed backbone.dtype=bfloat16"


def _adapters(config: TrainConfig) -> tuple[TrainConfig, str] | None:
    if config.adapter.name == "lora":
        return None
    return replace(config, adapter=replace(config.adapter, name="lora")), "adapter=lora"


def _shared(config: TrainConfig) -> tuple[TrainConfig, str] | None:
    if config.roles is None or config.roles.name == "shared" or config.adapter.name != "lora":
        return None
    return replace(config, roles=replace(config.roles, name="shared")), "roles=shared"


def _packed(config: TrainConfig) -> tuple[TrainConfig, str] | None:
    if config.quantization.name == "nf4" or config.adapter.name != "lora":
        return None
    stored = replace(config.quantization, name="nf4", double_quant=True, compute_dtype="bfloat16")
    return replace(config, quantization=stored), "quantization=nf4 quantization.compute_dtype=bfloat16"


def _small_states(config: TrainConfig) -> tuple[TrainConfig, str] | None:
    if config.optimizer.name != "adamw":
        return None
    return replace(config, optimizer=replace(config.optimizer, name="adamw_8bit")), "optimizer=adamw_8bit"


def _paged_states(config: TrainConfig) -> tuple[TrainConfig, str] | None:
    if config.optimizer.name in ("paged_adamw_8bit", "sgd"):  # plain descent keeps nothing
        return None
    return replace(config, optimizer=replace(config.optimizer, name="paged_adamw_8bit")), "optimizer=paged_adamw_8bit"


def _sharded_here(config: TrainConfig) -> tuple[TrainConfig, str] | None:
    """Over the devices that there are."""
    if config.trainer.devices == 1 or config.strategy.sharded:
        return None
    return replace(config, strategy=replace(config.strategy, name="fsdp")), "strategy=fsdp"


def _sharded(devices: int) -> Callable[[TrainConfig], tuple[TrainConfig, str] | None]:
    def change(config: TrainConfig) -> tuple[TrainConfig, str] | None:
        if config.trainer.devices >= devices and config.strategy.sharded:
            return None
        # 8-bit states are not sharded
        optimizer = replace(config.optimizer, name="adamw")
        trainer = replace(config.trainer, devices=max(devices, config.trainer.devices))
        changed = replace(config, trainer=trainer, strategy=replace(config.strategy, name="fsdp"), optimizer=optimizer)
        return changed, f"strategy=fsdp trainer.devices={trainer.devices} optimizer=adamw"

    return change


def _offloaded(config: TrainConfig) -> tuple[TrainConfig, str] | None:
    if not config.strategy.sharded or config.strategy.cpu_offload:
        return None
    return replace(config, strategy=replace(config.strategy, cpu_offload=True)), "strategy.cpu_offload=true"


REMEDIES: tuple[Callable[[TrainConfig], tuple[TrainConfig, str] | None], ...] = (
    _smaller_batches,
    _recomputed,
    _sharded_here,
    _half_precision,
    _adapters,
    _shared,
    _packed,
    _small_states,
    _paged_states,
    _sharded(2),
    _sharded(4),
    _sharded(8),
    _offloaded,
)
"""In the order in which they are tried; those for a GPU alone are left out on a CPU."""

GPU_ONLY = (_small_states, _paged_states)


def remedies_for(
    config: TrainConfig,
    plan: MemoryPlan,
    gib: float,
    *,
    workload: Workload | None = None,
    vocabulary_size: int | None = None,
) -> list[Remedy]:
    """The remedies that help, up to the first with which the run fits; all of them where none is enough.

    Args:
        config: of the run that does not fit.
        plan: its plan.
        gib: what the device has.
        workload, vocabulary_size: see `plan_memory`.
    """
    found: list[Remedy] = []
    peak = plan.peak
    for change in REMEDIES:
        if plan.device == "cpu" and change in GPU_ONLY:
            continue
        changed = change(config)
        if changed is None:
            continue
        try:
            check_config(changed[0])
            planned = plan_memory(changed[0], workload, device=plan.device, vocabulary_size=vocabulary_size)
        except UserError:  # a combination that is refused
            continue
        if planned.peak > HELPS * peak:
            continue
        config, peak = changed[0], planned.peak
        found.append(Remedy(changed[1], peak, planned.fits(gib)))
        if planned.fits(gib):
            break
    return found


def in_gib(size: int) -> str:
    """Bytes as GiB, three digits at least."""
    return f"{size / GIB:.2f}" if size < 10 * GIB else f"{size / GIB:.1f}"
