"""One training by several processes: started, told apart, and ended together.

`trainer.devices=2` starts the second process by itself (Lightning Fabric runs the same command again); under `torchrun`
and in a SLURM job the processes are there already. All of them train; the first alone holds the run's folder, tracks,
speaks, evaluates and exports. None outlives the first: when that fails, or is killed, the others are ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from saferlhf.config.schema import TrainConfig
from saferlhf.errors import UserError
from saferlhf.evaluation.processes import Processes
from saferlhf.training.first_process import follow_first, leading

LEAVE_S = 20.0
"""How long a process that is done, or that met with trouble, waits to be left alone or ended."""

STARTED_WITH = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Environment variables by which Lightning tells the processes that it starts who they are."""


def has_several(config: TrainConfig) -> bool:
    """Whether the config asks for more than one process; `torchrun` may have started more on other machines."""
    return config.strategy.name != "single" and (config.trainer.devices > 1 or started_by_torchrun() > 1)


def comes_first(config: TrainConfig) -> bool:
    """Whether this process is the first of all, known before they have met."""
    if not has_several(config):
        return True
    slurm = "SLURM_PROCID" if int(os.environ.get("SLURM_NTASKS", "1")) > 1 else "RANK"
    return next((int(os.environ[key]) for key in ("RANK", slurm, "LOCAL_RANK") if key in os.environ), 0) == 0


@contextmanager
def assembled(config: TrainConfig) -> Iterator[Processes]:
    """The processes of this training, brought together; starts those that nobody else did. Ends them in the end.

    Raises:
        UserError: another number was started than `trainer.devices` says, or there are not as many GPUs.
    """
    if not has_several(config):
        yield Processes()
        return
    _check_number(config)
    before = {key: os.environ.get(key) for key in STARTED_WITH}
    children = _join(config)
    processes = Processes.current()
    if not processes.first:
        follow_first()
    done = False
    try:
        yield processes
        done = True
    finally:
        _end(children, patient=done)
        if children:
            for key, value in before.items():
                os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


def part() -> None:
    """All have done their work together: leave the group; every process goes on, or ends, alone."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def told(processes: Processes, text: str) -> str:
    """What the first process says."""
    if processes.size == 1:
        return text
    import torch.distributed as dist

    said: list[str] = [text]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def await_the_end(trouble: BaseException) -> None:
    """Of a process that is not the first: what went wrong is said by the first, which then ends this one.

    Raises:
        BaseException: the trouble, where the first knows nothing of it and goes on waiting.
    """
    time.sleep(LEAVE_S)
    raise trouble


def started_by_torchrun() -> int:
    """Processes that `torchrun` has started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def _check_number(config: TrainConfig) -> None:
    import torch

    devices, started = config.trainer.devices, started_by_torchrun()
    if started not in (1, devices):
        what = f"{started} processes were started and trainer.devices is {devices}"
        raise UserError(what, "trainer.devices", f"trainer.devices={started}")
    gpus = torch.cuda.device_count() if config.trainer.accelerator != "cpu" else 0
    if 0 < gpus < devices or (config.trainer.accelerator == "gpu" and not gpus):
        what = f"{devices} devices are asked for and PyTorch finds {gpus} GPUs"
        raise UserError(what, "trainer.devices", "use as many as there are, or trainer.accelerator=cpu")


def _join(config: TrainConfig) -> Sequence[subprocess.Popen[bytes]]:
    """Meet the other processes; those that were started here."""
    import torch

    on_gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    # norms of gradients that lie in the host's memory are added there
    backend = "cpu:gloo,cuda:nccl" if on_gpu and config.strategy.cpu_offload else None
    return launched(config.trainer.accelerator, config.trainer.devices, command="train", backend=backend)


def launched(
    accelerator: str, devices: int, *, command: str, backend: str | None = None
) -> Sequence[subprocess.Popen[bytes]]:
    """Meet the other processes of this command; those that were started here.

    Args:
        accelerator, devices: as in `trainer`, of each machine.
        command: train | evaluate, for those that are started here.
        backend: of the process group; None: the accelerator's.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import SLURMEnvironment
    from lightning.fabric.strategies import DDPStrategy

    nodes = 1
    if started_by_torchrun() > 1:
        nodes = int(os.environ["WORLD_SIZE"]) // started_by_torchrun()
    elif SLURMEnvironment.detect():
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=DDPStrategy(process_group_backend=backend),
    )
    with _words_for_children(command), leading():
        fabric.launch()
    return tuple(getattr(fabric.strategy.launcher, "procs", ()))


@contextmanager
def _words_for_children(command: str) -> Iterator[None]:
    """`python -m saferlhf.cli train ...`, as stages and runs of sweeps are started: the word is needed again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    words = list(sys.argv)
    if getattr(spec, "name", "") == "saferlhf.cli":
        sys.argv.insert(1, command)
    try:
        yield
    finally:
        sys.argv[:] = words


def _end(children: Sequence[subprocess.Popen[bytes]], *, patient: bool) -> None:
    """See the processes that were started here off; those that stay are killed."""
    until = time.monotonic() + (LEAVE_S if patient else 0.0)
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, until - time.monotonic()))
            continue
        child.kill()
        child.wait()
