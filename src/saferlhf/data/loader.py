"""Loaders: an exactly resumable training stream, and evaluation in which every row counts once.

The training stream is an endless chain of epochs, each a fresh permutation of all rows seeded by (seed, epoch).
Optimizer step k reads positions k * batch_size to (k + 1) * batch_size of it, across the border of two epochs where
it falls so; no row is dropped or repeated within an epoch. So the rows of step k depend on seed and k alone: to
resume is to know k. Within a step the rows are sorted by length, dealt over the processes like cards and cut into
micro-batches of similar length; the loss of a step must not depend on that cut.

The cursor counts steps that were handed out. A trainer that saves its state after a step finds k + 1 there; a state
saved in the middle of a step would skip that step, so save between steps. Iterating does not read ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch

from saferlhf.data.batches import AnswerBatch, PairBatch, TokenBatch
from saferlhf.data.collate import Ints
from saferlhf.errors import UserError

Batch = TypeVar("Batch", TokenBatch, PairBatch, AnswerBatch)
Collated = TypeVar("Collated", bound=TokenBatch | PairBatch | AnswerBatch, covariant=True)


class Dataset(Protocol[Collated]):
    """What a loader needs: `EncodedPairs`, `EncodedAnswers`, or anything alike."""

    @property
    def lengths(self) -> Ints:
        """(N,) tokens of each row."""
        ...

    def __len__(self) -> int: ...

    def collate(self, indices: Sequence[int] | Ints) -> Collated:
        """These rows as one batch."""
        ...


class StepBatch(Generic[Batch]):
    """The rows of one optimizer step on one process, as micro-batches; reads like a tuple of them.

    It is neither a tuple nor a dataclass on purpose: Lightning looks into those for floats to convert and refuses
    frozen dataclasses under `bf16-true`. Our batches hold no floats; their move to a device goes through `to`.

    Attributes:
        step: number of the optimizer step, from 0.
        micro_batches: the rows, longest first.
    """

    def __init__(self, step: int, micro_batches: tuple[Batch, ...]) -> None:
        self.step = step
        self.micro_batches: tuple[Batch, ...] = micro_batches

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.micro_batches)

    def __getitem__(self, index: int) -> Batch:
        return self.micro_batches[index]

    @property
    def rows(self) -> int:
        """Rows (pairs count once) of this step on this process."""
        return sum(len(batch) for batch in self.micro_batches)

    def to(self, device: torch.device, **_: Any) -> StepBatch[Batch]:
        """The same step on another device."""
        return StepBatch(self.step, tuple(batch.to(device) for batch in self.micro_batches))


class EvalBatch(Generic[Batch]):
    """One batch of evaluation and where its rows stand in the data set; no dataclass, for the reason of `StepBatch`.

    Attributes:
        indices: (B,) int64 places in the data set, to put results back in order.
        batch: the rows.
    """

    def __init__(self, indices: Ints, batch: Batch) -> None:
        self.indices = indices
        self.batch: Batch = batch

    def to(self, device: torch.device, **_: Any) -> EvalBatch[Batch]:
        """The same batch on another device."""
        return EvalBatch(self.indices, self.batch.to(device))


class StepLoader(Generic[Batch]):
    """The training stream: item k is the `StepBatch` of optimizer step k.

    Args:
        dataset: encoded rows.
        batch_size: rows per optimizer step over all processes.
        micro_batch_size: most rows per forward pass on one process; null: all of the process's share.
        total_steps: steps of the whole run; also `len`, wherever the cursor stands.
        seed: of the permutations.
        rank, world_size: this process and how many there are.
        start_step: the step to begin with.

    Raises:
        UserError: an empty data set, sizes below one, or a batch that cannot be dealt evenly.
    """

    def __init__(
        self,
        dataset: Dataset[Batch],
        *,
        batch_size: int,
        micro_batch_size: int | None = None,
        total_steps: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        if len(dataset) == 0:
            raise UserError("no rows to train on")
        if batch_size < 1 or (micro_batch_size is not None and micro_batch_size < 1):
            raise UserError("a batch needs at least one row", "trainer.batch_size, trainer.micro_batch_size")
        if batch_size % world_size:
            what = f"batch_size {batch_size} cannot be dealt evenly to {world_size} processes"
            raise UserError(what, "trainer.batch_size", f"use a multiple of {world_size}")
        self.dataset: Dataset[Batch] = dataset
        self.batch_size, self.total_steps, self.seed = batch_size, total_steps, seed
        self.micro_batch_size = micro_batch_size or batch_size // world_size
        self.rank, self.world_size = rank, world_size
        self._lengths = dataset.lengths
        self._epochs: dict[int, Ints] = {}
        self._cursor = 0
        self.seek(start_step)

    def __len__(self) -> int:
        return self.total_steps

    def __iter__(self) -> Iterator[StepBatch[Batch]]:
        """The steps from the cursor on. The cursor is read when a step is asked for, not when the iterator is made."""
        while self._cursor < self.total_steps:
            item = self.step(self._cursor)
            self._cursor += 1
            yield item

    # -------------------------------------------------------------------------------------------- order
    def step_indices(self, step: int) -> Ints:
        """(batch_size,) rows of a step over all processes, in stream order."""
        n = len(self.dataset)
        start, stop = step * self.batch_size, (step + 1) * self.batch_size  # positions in the stream
        epochs = range(start // n, (stop - 1) // n + 1)
        self._epochs = {e: self._epochs[e] if e in self._epochs else self._permutation(e) for e in epochs}
        return np.concatenate([self._epochs[e][max(start - e * n, 0) : stop - e * n] for e in epochs])

    def step(self, step: int) -> StepBatch[Batch]:
        """The batch of any step; the cursor stays where it is."""
        rows = self.step_indices(step)
        # longest first: a batch that does not fit the memory shows at once
        rows = rows[np.argsort(-self._lengths[rows], kind="stable")][self.rank :: self.world_size]
        parts = np.array_split(rows, math.ceil(len(rows) / self.micro_batch_size))
        return StepBatch(step, tuple(self.dataset.collate(part) for part in parts))

    def _permutation(self, epoch: int) -> Ints:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))

    def epoch_of(self, step: int) -> float:
        """Epochs that are done once `step` steps are."""
        return step * self.batch_size / len(self.dataset)

    # -------------------------------------------------------------------------------------------- state
    @property
    def cursor(self) -> int:
        """Steps handed out so far."""
        return self._cursor

    def seek(self, step: int) -> None:
        """Go to a step; it is the next one handed out.

        Raises:
            ValueError: outside 0..total_steps.
        """
        if not 0 <= step <= self.total_steps:
            raise ValueError(f"step {step} is outside 0..{self.total_steps}")
        self._cursor = step

    def state_dict(self) -> dict[str, int]:
        """The cursor, and what has to be equal for it to mean the same rows."""
        return {"step": self._cursor, **self._meaning()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to the saved cursor.

        Raises:
            UserError: the state belongs to other data, another seed or another batch size.
        """
        for name, value in self._meaning().items():
            if state.get(name) != value:
                what = f"the checkpoint was written with {name} {state.get(name)}, this run has {value}"
                raise UserError(what, "resume", "use the same settings, or resume=never")
        self.seek(state["step"])

    def _meaning(self) -> dict[str, int]:
        return {"seed": self.seed, "rows": len(self.dataset), "batch_size": self.batch_size}


class EvalLoader(Generic[Batch]):
    """Every row exactly once over all processes, in batches of similar length, longest first.

    All processes get the same number of batches, so that sharded models can run in step.

    Args:
        dataset: encoded rows.
        batch_size: rows per batch. Exceeded by one where the rows do not divide and one-row batches would leave a
            process without its last batch.

    Raises:
        UserError: fewer rows than processes.
    """

    def __init__(self, dataset: Dataset[Batch], *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        n = len(dataset)
        if n < world_size or n == 0:
            raise UserError(f"{n} rows to evaluate on {world_size} processes", "data", "use more rows or fewer devices")
        if batch_size < 1:
            raise UserError("a batch needs at least one row", "trainer.eval_batch_size")
        self.dataset: Dataset[Batch] = dataset
        order = np.argsort(-dataset.lengths, kind="stable")
        mine = order[rank::world_size]
        batches = min(math.ceil(math.ceil(n / world_size) / batch_size), n // world_size)
        self._parts: list[Ints] = np.array_split(mine, batches)

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[EvalBatch[Batch]]:
        for part in self._parts:
            yield EvalBatch(part, self.dataset.collate(part))

    @property
    def parts(self) -> list[Ints]:
        """Places of this process's rows, batch by batch."""
        return self._parts

    @property
    def indices(self) -> Ints:
        """Places of this process's rows in the order in which they come out."""
        return np.concatenate(self._parts)


def steps_for_epochs(rows: int, batch_size: int, epochs: float) -> int:
    """Optimizer steps that see `epochs` times all rows, rounded up; at least one."""
    return max(1, math.ceil(rows * epochs / batch_size - 1e-9))
