"""Training state on disk: written atomically, loaded without pickle, resumed to the bit.

What a checkpoint holds beside Lightning's own (trained weights, optimizer, schedule, loops, the stream's cursor): the
state of every random generator, restored last, since loading itself may draw numbers, and whether the validation that
is due at its step was done.

Of several processes the first writes, and decides when. Whichever is asked to stop, all do, after the same step.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import IO, Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from saferlhf.config.run_folder import RunFolder
from saferlhf.config.schema import CheckpointConfig
from saferlhf.errors import UserError
from saferlhf.evaluation.processes import Processes
from saferlhf.training.stop import GracefulStop, StopRequested

PATTERN = "step-*.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, then renames: a kill or a full disk leaves the old file intact."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save to `path`.

        Raises:
            OSError: the disk refuses.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.parent / f".{target.name}.{os.getpid()}"
        try:
            with open(draft, "wb") as file:
                writer = _Writer(file)
                try:
                    torch.save(checkpoint, writer)  # type: ignore[arg-type]
                except Exception:
                    # torch closes its archive on the way out and fails again, hiding what happened first
                    if writer.error is not None:
                        raise writer.error from None
                    raise
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
            _flush_folder(target.parent)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load plain tensors and numbers only, whoever asks.

        Raises:
            UserError: the file is damaged.
        """
        try:
            return super().load_checkpoint(path, map_location=map_location, weights_only=True)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            mend = "delete it to go on from the one before, or type resume=never"
            raise UserError(f"the checkpoint cannot be read: {first}", str(path), mend) from error


class _Writer:
    """A file that remembers what went wrong in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`."""
        try:
            return self._file.write(data)
        except BaseException as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()


def _flush_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RandomState(L.Callback):
    """Random generators in and out of checkpoints: of several processes each its own.

    A process that was not there when the state was saved keeps the generators it has.
    """

    def __init__(self) -> None:
        self._to_restore: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state of Python's, NumPy's and PyTorch's generators, as plain data; several processes must all ask."""
        processes = Processes.current()
        own = self._to_restore if self._to_restore is not None else _generators(processes.size == 1)
        return own if processes.size == 1 else {"processes": processes.each(lambda: own)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training goes on."""
        states = state_dict.get("processes", [state_dict])
        rank = Processes.current().rank
        self._to_restore = states[rank] if rank < len(states) else None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore when everything else is loaded and set up, just before the first step."""
        state, self._to_restore = self._to_restore, None  # saved again before training went on: as it came
        if state is None:
            return
        python, numpy = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
        keys = numpy["keys"].numpy().astype(np.uint32)
        np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
        torch.set_rng_state(state["torch"])
        if "cuda" not in state or not torch.cuda.is_available():
            return
        if Processes.current().size > 1:
            torch.cuda.set_rng_state(state["cuda"][0])
        else:
            torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def _generators(all_devices: bool) -> dict[str, Any]:
    """The state of this process's generators; of the current device, or of all."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all() if all_devices else [torch.cuda.get_rng_state()]
    return state


class RunCheckpoint(L.Callback):
    """Saves by steps, by minutes, on a request to stop, and at the end.

    A state saved after a step whose validation is still to come says so, and the validation is made up for on resume:
    saving never waits for a validation, and no point of the curve is lost.

    Args:
        folder: the run's folder.
        config: when to save and how many states to keep.
        stop: asked between steps and between validation batches; ends training with a checkpoint.
        resumed: the checkpoint that training goes on from.
    """

    def __init__(
        self, folder: RunFolder, config: CheckpointConfig, stop: GracefulStop | None = None, resumed: Path | None = None
    ) -> None:
        self.folder, self.config, self.stop = folder, config, stop or GracefulStop()
        self._last_save = time.monotonic()
        self._trained_s = 0.0 if resumed is None else seconds_trained(folder)  # up to `_last_save`
        self._saved_step = -1 if resumed is None else checkpoint_step(resumed)
        self._validated_step = -1

    # -------------------------------------------------------------------------------------------- hooks
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The clock starts with training."""
        self.stop.listen()
        self._last_save = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every batch is a whole optimizer step, so the state here is never torn."""
        step = trainer.global_step
        every_steps, every_minutes = self.config.every_steps, self.config.every_minutes
        late = every_minutes is not None and time.monotonic() - self._last_save >= 60 * every_minutes
        due, asked = _of_any(trainer, late and trainer.is_global_zero, self.stop())
        if due or (every_steps is not None and step % every_steps == 0):
            self.save(trainer)
        self._end_if(trainer, asked)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation can take longer than the system waits between SIGTERM and SIGKILL."""
        (asked,) = _of_any(trainer, self.stop())
        self._end_if(trainer, asked)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a saved state needs no validation on resume."""
        self._validated_step = trainer.global_step

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the due validation into the loops' state as begun, none of its batches done."""
        if not self._validation_is_due(trainer):
            return
        loops = checkpoint["loops"]["fit_loop"]
        for scope in ("total", "current"):
            trained = loops["epoch_loop.batch_progress"][scope]
            trained["completed"] = trained["processed"]
            validated = loops["epoch_loop.val_loop.batch_progress"][scope]
            validated.update(ready=1, started=1, processed=0, completed=0)
        loops["epoch_loop.val_loop.batch_progress"]["is_last_batch"] = False

    # -------------------------------------------------------------------------------------------- saving
    def save(self, trainer: L.Trainer) -> None:
        """Write the current state unless it is on disk already; then drop the oldest beyond `keep`. All must call this.

        Raises:
            UserError: the disk refuses; the previous checkpoint is still there.
        """
        step = trainer.global_step
        if step == self._saved_step:
            return
        for logger in trainer.loggers:  # what was logged up to here is not logged again on resume
            logger.save()
        try:
            trainer.save_checkpoint(checkpoint_path(self.folder, step))
        except OSError as error:
            older = newest_checkpoint(self.folder)
            go_on = "starts anew" if older is None else f"goes on from step {checkpoint_step(older)}"
            raise UserError(
                f"the checkpoint of step {step} could not be written: {error.strerror or error}",
                str(self.folder.checkpoints),
                f"make room; the same command {go_on}",
            ) from None
        now = time.monotonic()
        self._trained_s += now - self._last_save
        self._saved_step, self._last_save = step, now
        if not trainer.is_global_zero:
            return
        self.folder.update_status(trained_s=round(self._trained_s, 1))
        for old in sorted(self.folder.checkpoints.glob(PATTERN))[: -self.config.keep]:
            old.unlink()

    def _end_if(self, trainer: L.Trainer, asked: bool) -> None:
        if asked:
            self.save(trainer)
            raise StopRequested

    def _validation_is_due(self, trainer: L.Trainer) -> bool:
        interval = trainer.val_check_batch
        if not trainer.enable_validation or not isinstance(interval, int):
            return False
        return trainer.global_step % interval == 0 and self._validated_step != trainer.global_step


def _of_any(trainer: L.Trainer, *flags: bool) -> list[bool]:
    """Each flag: whether any process has it raised; all must ask."""
    if trainer.world_size == 1:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.int32, device=trainer.strategy.root_device)
    return [bool(flag) for flag in trainer.strategy.reduce(raised, reduce_op="sum").tolist()]


# ------------------------------------------------------------------------------------------------ files
def checkpoint_path(folder: RunFolder, step: int) -> Path:
    """Where the state after `step` optimizer steps lies."""
    return folder.checkpoints / f"step-{step:08d}.ckpt"


def checkpoint_step(path: Path) -> int:
    """Optimizer steps done when this state was written."""
    return int(path.stem.partition("-")[2])


def newest_checkpoint(folder: RunFolder) -> Path | None:
    """The state with the most steps, if there is any."""
    found = sorted(folder.checkpoints.glob(PATTERN))
    return found[-1] if found else None


def seconds_trained(folder: RunFolder) -> float:
    """Seconds of training that the newest checkpoint stands for, in one process or in many; 0 without one."""
    return float(folder.status().get("trained_s", 0.0)) if newest_checkpoint(folder) is not None else 0.0


def discard_checkpoints(folder: RunFolder) -> None:
    """Delete all training states."""
    for path in folder.checkpoints.glob(PATTERN):
        path.unlink()
