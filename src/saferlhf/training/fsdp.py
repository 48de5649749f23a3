"""Fully sharded training: PyTorch's FSDP2 under Lightning's strategy for models that are split over devices.

Weights, gradients and optimizer state of P devices are split along their first dimension, each device holding 1 / P of
every tensor. A transformer block's weights are gathered just before it runs and given back after it; gradients are
added and split in one step (Rajbhandari et al. 2020, ZeRO stage 3; Zhao et al. 2023, FSDP; here by `fully_shard`).

What differs from Lightning's own `ModelParallelStrategy`: the mesh is of shards (and of copies of them, if wanted), not
of nodes and tensor-parallel groups; the model is sharded here, so that tasks need not know of it; and checkpoints are
those of one process: one file of whole tensors, trained ones alone, keyed as the optimizer keys them. So a run can go
on with another number of devices, or with another strategy.

A policy that samples is gathered once for each rollout: through sharded weights every token would move all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from saferlhf.config.schema import StrategyConfig
from saferlhf.models.backbone import checkpoint_activations
from saferlhf.models.causal import unwrapped
from saferlhf.models.layers import blocks_of
from saferlhf.models.roles import Roles
from saferlhf.models.score_model import ScoreModel

FORWARDS = ("loss_sum", "outputs")
"""Methods of a task that run its model."""

ROLE_FORWARDS = ("logits", "scores", "values_and_end", "with_whole_weights")
"""Methods of roles that run models."""

T = TypeVar("T")


class FSDP2Strategy(ModelParallelStrategy):
    """Shards the model of a task, or those of all roles, over all devices.

    Args:
        config: the options of `conf/strategy/fsdp.yaml`.
        mixed: whether the forward pass runs in bfloat16 (`trainer.precision=bf16-mixed`).
    """

    def __init__(self, config: StrategyConfig, *, mixed: bool = False) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.config, self.mixed = config, mixed

    # -------------------------------------------------------------------------------------------- setting up
    def setup_environment(self) -> None:
        """Join the processes and lay the devices out: one row of shards for each copy of the model."""
        self._setup_distributed()
        copies = self.config.replicas
        kind = self.root_device.type
        if copies == 1:
            self._device_mesh = init_device_mesh(kind, (self.world_size,), mesh_dim_names=("shard",))
        else:
            shape = (copies, self.world_size // copies)
            self._device_mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))

    def setup(self, trainer: L.Trainer) -> None:
        """Shard the model, which is built by now, before the optimizer takes its parameters."""
        assert self.model is not None
        self.model = self.precision_plugin.convert_module(self.model)
        shard(self.model, self.device_mesh, self.config, mixed=self.mixed)
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Shards are where they belong already."""

    # -------------------------------------------------------------------------------------------- checkpoints
    @property
    def lightning_restore_optimizer(self) -> bool:
        """Restored by `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors on the CPU of what training changes; of the first process alone, though all must ask."""
        task: Any = self.lightning_module
        trained = task.trained_names()
        found = {k: self._whole(v) for k, v in task.state_dict(keep_vars=True).items() if k in trained}
        return found if self.is_global_zero else {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """As one process would save it."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        whole = {number: {k: self._whole(v) for k, v in held.items()} for number, held in state["state"].items()}
        return {**state, "state": whole} if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Every process reads the file."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give each device its share; that nothing trained is missing, the task has checked."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, whole in checkpoint["state_dict"].items():
                local, share = _local(own[name]), _local(_share_as(whole, own[name]))
                local.copy_(share)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each device its share of the optimizer's tensors."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {k: _share_as(v, parameters[number]) for k, v in held.items()}
                for number, held in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def _whole(self, value: Any) -> Any:
        """A tensor gathered from all devices, on the CPU; anything else as it is. None but on the first process."""
        if isinstance(value, DTensor):
            shards: Any = value.detach().to(self.device_mesh.device_type)
            value = shards.full_tensor()
        if not self.is_global_zero:
            return None
        return value.detach().cpu() if isinstance(value, Tensor) else value


def shard(task: nn.Module, mesh: DeviceMesh, config: StrategyConfig, *, mixed: bool = False) -> None:
    """Split a task's model over the devices of a mesh: each block by itself, each head too, all else together.

    Heads are sharded like the rest, so that one norm can be taken over all gradients, but never rounded: their scores
    are computed in float32. 4-bit weights stay whole on every device, unless `config.shard_packed`.
    """
    # nothing here writes into what a model returns
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    model: Any = task.model
    rounded = {"float32": None, "bfloat16": torch.bfloat16}[config.reduce_dtype]
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if mixed and config.gather_bf16 else None,
        reduce_dtype=rounded or (torch.float32 if mixed else None),
    )
    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if config.cpu_offload else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": offload,
        "reshard_after_forward": config.reshard_after_forward,
        "ignored_params": set() if config.shard_packed else _kept_whole(model, mesh),
    }
    parts = _parts(model)
    for trunk in _trunks(parts):
        if config.activation_checkpointing:
            checkpoint_activations(trunk)
        for block in blocks_of(trunk):
            fully_shard(block, mp_policy=policy, **options)
    for head in _heads(parts):
        fully_shard(head, mp_policy=MixedPrecisionPolicy(reduce_dtype=rounded), **options)
    if not isinstance(model, Roles):
        fully_shard(task, mp_policy=policy, **options)
        _run_by(task, FORWARDS)
        return
    for trunk in _of_one_role(model):
        fully_shard(trunk, mp_policy=policy, **options)
    fully_shard(model, mp_policy=policy, **options)
    gathered = partial(_with_whole_weights, model, again=config.reshard_after_forward)
    model.with_whole_weights = gathered  # type: ignore[method-assign]
    _run_by(model, ROLE_FORWARDS)


def _run_by(root: Any, methods: Sequence[str]) -> None:
    """Through these methods, and no others, the sharded model is run."""
    for name in methods:
        register_fsdp_forward_method(root, name)


def _kept_whole(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """4-bit weights, brought to their device."""
    found = set()
    for module in list(model.modules()):
        weight = getattr(module, "weight", None)
        if getattr(weight, "quant_state", None) is not None:
            module.to(mesh.device_type)
            found.add(module.weight)
    return found  # type: ignore[return-value]


def _parts(model: nn.Module) -> list[Any]:
    """Of roles, each model, or what they share and each one's heads; of anything else, itself."""
    return list(model.children()) if isinstance(model, Roles) else [model]


def _trunks(parts: Sequence[Any]) -> list[Any]:
    """Their transformers."""
    found = [unwrapped(getattr(part, "trunk", part)) for part in parts]
    return [trunk for trunk in found if hasattr(trunk, "config")]


def _heads(parts: Sequence[Any]) -> list[nn.Module]:
    """Their heads."""
    found = [getattr(part, "heads", part) for part in parts]
    return [head for heads in found if isinstance(heads, nn.ModuleDict) for head in heads.values()]


def _of_one_role(roles: Roles) -> list[Any]:
    """Transformers that one role runs, always as a whole: what is not in their blocks is gathered for that role alone.

    A base that roles share is entered as a language model and as the trunk of scores, and a model that reads lower
    layers is left in the middle. What these have beside blocks is gathered whenever any role runs.
    """
    parts = _parts(roles)
    if not any(isinstance(part, ScoreModel) for part in parts):
        return []
    return _trunks([part for part in parts if getattr(part, "layers", None) is None])


def _with_whole_weights(roles: Roles, work: Callable[[], T], *, again: bool) -> T:
    """Run work with the weights of the actor's model gathered; they are given back after it.

    Args:
        again: whether a block's weights are otherwise given back after each forward pass.
    """
    actor = unwrapped(roles.role("actor").module)
    sharded = [module for module in actor.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        return work()
    finally:
        for module in sharded:
            module.set_reshard_after_forward(again, recurse=False)
            module.reshard()


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _share_as(whole: Any, like: Tensor) -> Any:
    """This device's share of a tensor that every process has whole, split like a parameter of its shape."""
    if not (isinstance(whole, Tensor) and isinstance(like, DTensor) and whole.shape == like.shape):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
