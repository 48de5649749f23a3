"""Several processes that share the rows of one evaluation.

Rows are shared by whole batches, the same batches that one process would make: of P processes the r-th takes batches r,
r + P, r + 2P, ... What is said of a row then does not depend on the number of processes, and neither does any metric.
The parts are put together by row, each row exactly once.

Whatever a process meets with that the user must mend is raised by all of them, so that none waits for another in vain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from saferlhf.errors import UserError

T = TypeVar("T")
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
        rank: its number.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Those of the process group that this process has joined; without one it is alone."""
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this is the one that measures, writes and speaks."""
        return self.rank == 0

    def mine(self, batches: Sequence[T]) -> Sequence[T]:
        """The part of this process."""
        return batches[self.rank :: self.size]

    def each(self, work: Callable[[], T]) -> list[T]:
        """What every process found, by rank; all must call this.

        Raises:
            UserError: that of the first process whose work raised one.
        """
        if self.size == 1:
            return [work()]
        import torch.distributed as dist

        found: T | None = None
        error: tuple[str, str, str] | None = None
        try:
            found = work()
        except UserError as trouble:
            error = (trouble.what, trouble.where, trouble.mend)
        everything: list[Any] = [None] * self.size
        dist.all_gather_object(everything, (found, error))
        for _, trouble_of in everything:
            if trouble_of is not None:
                raise UserError(*trouble_of)
        return [value for value, _ in everything]

    def united(self, rows: int, work: Callable[[], tuple[NDArray[Any], Arrays]]) -> dict[str, NDArray[Any]]:
        """Arrays over all rows from what every process says of its own.

        Args:
            rows: N, how many there are.
            work: gives the numbers of this process's rows (n,) and arrays of n rows by name; a process without rows may
                give none.

        Returns:
            arrays of N rows in the order of their numbers.

        Raises:
            UserError: as `each`.
            ValueError: a row that nobody has, or that two have.
        """
        parts = [(np.asarray(mine, np.int64), arrays) for mine, arrays in self.each(work)]
        numbers = np.concatenate([mine for mine, _ in parts])
        if len(numbers) != rows or len(np.unique(numbers)) != rows:
            raise ValueError(f"{rows} rows, but {len(numbers)} numbers of {len(np.unique(numbers))} rows came together")
        order = np.argsort(numbers)
        names = dict.fromkeys(name for _, arrays in parts for name in arrays)
        return {name: np.concatenate([arrays[name] for mine, arrays in parts if len(mine)])[order] for name in names}


ALONE = Processes()
"""One process."""
