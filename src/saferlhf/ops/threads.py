"""Independent pieces of work side by side, each on one core.

Threads inside an operation wait for each other at its end, thousands of times in a fit of seconds; where cores are
shared with other processes that makes two threads slower than one. Folds need not wait for each other at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def one_thread() -> Iterator[int]:
    """Operations use one core; gives how many they used before, and will again."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`work` of each item, in their order, as many at once as there are threads for operations.

    Worth it where most of the work is in PyTorch or NumPy, which let other threads run.
    """
    with one_thread() as threads:
        if threads == 1 or len(items) == 1:
            return [work(item) for item in items]
        with ThreadPoolExecutor(min(threads, len(items))) as pool:
            return list(pool.map(work, items))
