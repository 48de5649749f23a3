"""The one-screen plan: what will be trained, on what, for how long, in how much memory, and where the results go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from saferlhf.config.online_schema import PpoConfig
from saferlhf.config.run_folder import FINISHED, RunFolder
from saferlhf.config.schema import TrainConfig
from saferlhf.config.task_schema import ProbeConfig
from saferlhf.errors import UserError
from saferlhf.run.rows import EncodedSplits
from saferlhf.run.trainer import micro_batch_size, validation_interval

GIB = 2**30


def plan_rows(
    config: TrainConfig,
    encoded: EncodedSplits,
    task: Any,
    steps: int,
    folder: Path,
    *,
    start: str | None = None,
) -> list[tuple[str, str]]:
    """Lines of the plan. `plan=on` counts the model's size and the run's memory on fake tensors and loads no weights.

    Args:
        task: None: models that it needs are not there yet, so that its size is not known.
        start: where the weights will come from, if that is not there yet: then the run has no folder yet either, and
            `folder` is only the beginning of its path.

    Raises:
        UserError: the device that is asked for is not there (no matter where `plan.gpu` says what it has), or online
            training of a policy that no device of that size can hold.
    """
    device = "gpu" if config.plan.gpu is not None else _device(config)
    size = _sizes(config, encoded, task, steps, device)
    lengths = np.asarray(encoded.train.lengths)
    longest = int(lengths.max())
    policy = config.roles.actor.model if config.roles is not None else None
    given = policy or config.init or ("random weights" if config.backbone.architecture else str(config.backbone.model))
    rows = f"{len(encoded.train):,} train, {len(encoded.val):,} validation, {len(encoded.test):,} test"
    trainer = config.trainer
    epochs = steps * trainer.batch_size / len(encoded.train)
    if isinstance(config.task, ProbeConfig):
        from saferlhf.run.fit_probe import probe_plan_rows

        work = probe_plan_rows(config, encoded, task)
    elif isinstance(config.task, PpoConfig):
        from saferlhf.run.online import online_plan_rows

        work = online_plan_rows(config, task, steps)
    else:
        interval = validation_interval(config, steps)
        work = [
            ("steps", f"{steps:,} of {trainer.batch_size} rows ({epochs:.2f} epochs)"),
            ("", f"in micro-batches of {micro_batch_size(config)}; validation every {interval}"),
            ("learning rate", f"{config.optimizer.lr:g}, {config.schedule.name}, {config.optimizer.name}"),
        ]
    return [
        ("task", f"{config.task.name} with {config.backbone.name}, {config.adapter.name} adapter"),
        ("starts from", start or given),
        ("data", f"{config.data.name}: {rows}; {lengths.mean():.0f} tokens on average, {longest} at most"),
        *size[:1],
        *work,
        ("device", f"{trainer.devices} x {device}, {trainer.precision}, {torch.get_num_threads()} CPU threads"),
        *size[1:],
        ("results", _place(config, folder) if start is None else f"below {folder}, known when that run is finished"),
    ]


def _sizes(config: TrainConfig, encoded: EncodedSplits, task: Any, steps: int, device: str) -> list[tuple[str, str]]:
    """Parameters and memory: planned, or of the model itself where the run is about to build it anyhow."""
    if task is None:
        return [("parameters", "known when the runs that it starts from are finished")]
    if not config.plan.only or isinstance(config.task, ProbeConfig):
        return _size(config, task)
    from saferlhf.run.memory.plan import plan_memory
    from saferlhf.run.memory.policy_size import check_policy_fits
    from saferlhf.run.memory.table import memory_rows
    from saferlhf.run.memory.workload import workload_of

    words = _words(encoded)
    if config.plan.gpu is not None:
        check_policy_fits(config, config.plan.gpu, vocabulary_size=words)
    planned = plan_memory(config, workload_of(config, encoded, steps), device=device, vocabulary_size=words)
    return memory_rows(config, planned, vocabulary_size=words)


def _words(encoded: EncodedSplits) -> int:
    """Of the tokenizer's vocabulary, which is that of a model from scratch."""
    return len(encoded.encoder.tokenizer)


def _size(config: TrainConfig, task: Any) -> list[tuple[str, str]]:
    """Parameters and memory of the model, which is built."""
    task.configure_model()
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    frozen = sum(_elements(p) for p in task.parameters() if not p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in task.parameters())
    gradients = sum(p.numel() * p.element_size() for p in task.parameters() if p.requires_grad)
    states = {"adamw": 2 * gradients, "sgd": 0}.get(config.optimizer.name, 2 * trained)
    memory = (
        f"weights {weights / GIB:.3f} GiB, gradients {gradients / GIB:.3f} GiB, optimizer {states / GIB:.3f} GiB; "
        "activations come on top"
    )
    return [("parameters", f"{trained:,} trained, {frozen:,} frozen"), ("memory", memory)]


def device_kind(accelerator: str) -> str:
    """What `auto` means on this machine: cpu | gpu.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    there = torch.cuda.is_available()
    if accelerator == "gpu" and not there:
        raise UserError(
            "PyTorch finds no GPU on this machine", "trainer.accelerator", "trainer=cpu, or trainer=default"
        )
    return "gpu" if there and accelerator != "cpu" else "cpu"


def device_for(accelerator: str) -> torch.device:
    """The device that an `accelerator` key means on this machine; raises as `device_kind`."""
    return torch.device("cuda" if device_kind(accelerator) == "gpu" else "cpu")


def _device(config: TrainConfig) -> str:
    device = device_kind(config.trainer.accelerator)
    if device == "cpu" and config.optimizer.name.endswith("_8bit"):
        raise UserError("8-bit optimizers need a GPU", f"optimizer={config.optimizer.name}", "optimizer=adamw")
    return device


def _place(config: TrainConfig, folder: Path) -> str:
    """The run's folder; in a mere plan also what an earlier start of the run left there."""
    status = RunFolder(folder).status() if config.plan.only else {}
    known, step = status.get("status"), status.get("step")
    if known is None:
        return str(folder)
    return f"{folder} ({known}{f' at step {step}' if step and known != FINISHED else ''})"


def _elements(parameter: torch.nn.Parameter) -> int:
    """Weights in a parameter; a packed 4-bit one holds two per byte."""
    packed = getattr(parameter, "quant_state", None)
    return int(np.prod(packed.shape)) if packed is not None else parameter.numel()
