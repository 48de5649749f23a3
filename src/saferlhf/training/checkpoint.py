"""Training state on disk: written atomically, loaded without pickle, resumed to the bit.

What a checkpoint holds beside Lightning's own (trained weights, optimizer, schedule, loops, the stream's cursor): the
state of every random generator, restored last, since loading itself may draw numbers.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from saferlhf.config.run_folder import RunFolder
from saferlhf.config.schema import CheckpointConfig
from saferlhf.errors import UserError

PATTERN = "step-*.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, then renames: a kill or a full disk leaves the old file intact."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save to `path`."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load plain tensors and numbers only, whoever asks."""
        return super().load_checkpoint(path, map_location=map_location, weights_only=True)


class RandomState(L.Callback):
    """Random generators in and out of checkpoints."""

    def __init__(self) -> None:
        self._to_restore: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The state of Python's, NumPy's and PyTorch's generators, as plain data."""
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
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        self._to_restore = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore after everything else was loaded."""
        state, self._to_restore = self._to_restore, None
        if state is None:
            return
        python, numpy = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
        keys = numpy["keys"].numpy().astype(np.uint32)
        np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda"])


class RunCheckpoint(L.Callback):
    """Saves by steps, by minutes, on a request to stop, and at the end.

    Args:
        folder: the run's folder.
        config: when to save and how many states to keep.
        stop_requested: asked after each step; true ends training with a checkpoint.
    """

    def __init__(
        self, folder: RunFolder, config: CheckpointConfig, stop_requested: Callable[[], bool] = lambda: False
    ) -> None:
        self.folder, self.config, self.stop_requested = folder, config, stop_requested
        self._last_save = time.monotonic()
        self._saved_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The clock starts with training."""
        self._last_save = time.monotonic()
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every batch is a whole optimizer step, so the state here is never torn."""
        step = trainer.global_step
        every_steps, every_minutes = self.config.every_steps, self.config.every_minutes
        due = every_steps is not None and step % every_steps == 0
        if every_minutes is not None and time.monotonic() - self._last_save >= 60 * every_minutes:
            due = True
        stop = self.stop_requested()
        if due or stop:
            self.save(trainer)
        if stop:
            trainer.should_stop = True

    def save(self, trainer: L.Trainer) -> None:
        """Write the current state unless it is on disk already; then drop the oldest beyond `keep`.

        Raises:
            UserError: the disk refuses; the previous checkpoint is still there.
        """
        step = trainer.global_step
        if step == self._saved_step:
            return
        try:
            trainer.save_checkpoint(self.folder.checkpoints / f"step-{step:08d}.ckpt")
        except OSError as error:
            raise UserError(
                f"the checkpoint of step {step} could not be written: {error.strerror or error}",
                str(self.folder.checkpoints),
                "make room and type the same command: it goes on from the previous checkpoint",
            ) from None
        self._saved_step, self._last_save = step, time.monotonic()
        for old in sorted(self.folder.checkpoints.glob(PATTERN))[: -self.config.keep]:
            old.unlink()


def newest_checkpoint(folder: RunFolder) -> Path | None:
    """The state with the most steps, if there is any."""
    found = sorted(folder.checkpoints.glob(PATTERN))
    return found[-1] if found else None
