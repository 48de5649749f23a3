"""Folds for cross-validation: rows of one group never stand on both sides."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def grouped_folds(groups: Sequence[str], folds: int, seed: int) -> NDArray[np.int64]:
    """(N,) fold of each row, 0 to folds - 1, of nearly equal numbers of rows.

    Groups are taken in the order of a hash of (seed, group) and each goes to the fold that has the fewest rows so far,
    the largest groups first, so one large group does not unbalance the folds.

    Args:
        groups: N names, as of a row's prompt.
        folds: 2 or more.
        seed: of the order.

    Raises:
        ValueError: fewer groups than folds.
    """
    sizes = Counter(groups)
    if folds < 2 or len(sizes) < folds:
        raise ValueError(f"{len(sizes)} groups cannot be dealt to {folds} folds")
    order = sorted(sizes, key=lambda group: (-sizes[group], hashlib.sha256(f"{seed}\x00{group}".encode()).digest()))
    filled = [0] * folds
    fold_of: dict[str, int] = {}
    for group in order:
        fold = filled.index(min(filled))
        fold_of[group] = fold
        filled[fold] += sizes[group]
    return np.array([fold_of[group] for group in groups], dtype=np.int64)
