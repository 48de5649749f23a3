"""Splits: train, validation and test never share a prompt.

Each prompt gets a number in [0, 1) from a hash of its normalised words and the data seed; test is below
`test_fraction`, validation below `test_fraction + val_fraction`. So a prompt's split does not depend on the other
rows of the file, and more rows never move old ones. Prompts are compared in lower case with everything but letters
and digits taken as a space.

Near copies: two prompts are near when their sets of three-word runs have a Jaccard index |A and B| / |A or B| of
`NEAR` or more. Found exactly, without comparing all pairs, by prefix filtering (Chaudhuri et al. 2006, Bayardo et al.
2007): with a fixed order of all runs, rarest first, two sets of index t or more have a common element among the first
n - ceil(t n) + 1 of each, n being the size of the set.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from saferlhf.data.rows import Prompt, Row, prompt_text
from saferlhf.errors import UserError

_NOT_WORDS = re.compile(r"[\W_]+")

NEAR = 0.6
"""Jaccard index of three-word runs from which two prompts are near copies."""

_NEAR_WORDS = 64  # of long dialogues the last words count: they hold the question


@functools.lru_cache(maxsize=1 << 18)  # each prompt is asked for several times, and a regular expression is slow
def prompt_key(prompt: Prompt) -> str:
    """The normalised words of a prompt; equal keys are the same prompt."""
    text = prompt_text(prompt)
    # a prompt of signs only keeps them, else all such prompts would be one
    return _NOT_WORDS.sub(" ", text.lower()).strip() or text.strip()


def keyed_fraction(seed: int, purpose: str, key: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}\x00{purpose}\x00{key}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def split_by_prompt(
    rows: Sequence[Row], seed: int, val_fraction: float, test_fraction: float
) -> tuple[list[Row], list[Row], list[Row]]:
    """Train, validation and test rows, in the order given. A wanted split gets one prompt at least.

    Raises:
        UserError: fractions that leave nothing to train on, or too few distinct prompts.
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        what = f"val_fraction {val_fraction} and test_fraction {test_fraction} leave no rows to train on"
        raise UserError(what, "data", "both are shares of the prompts, together below 1")
    keys = [prompt_key(row.prompt) for row in rows]
    order = sorted((keyed_fraction(seed, "split", key), key) for key in set(keys))
    wanted = (test_fraction > 0) + (val_fraction > 0)
    if len(order) <= wanted:
        what = f"{len(order)} distinct prompts cannot be split into {wanted + 1} parts without sharing one"
        raise UserError(what, "data", "give more rows, or data.test_path=FILE and data.val_fraction=0")
    n_test = max(sum(f < test_fraction for f, _ in order), int(test_fraction > 0))
    n_val = max(sum(test_fraction <= f < test_fraction + val_fraction for f, _ in order), int(val_fraction > 0))
    while n_test + n_val >= len(order):  # a tiny file, by chance
        n_test, n_val = (n_test - 1, n_val) if n_test > n_val else (n_test, n_val - 1)
    side = {key: 2 if i < n_test else 1 if i < n_test + n_val else 0 for i, (_, key) in enumerate(order)}
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for row, key in zip(rows, keys, strict=True):
        parts[side[key]].append(row)
    return parts


def take(rows: Sequence[Row], count: int | None, seed: int) -> list[Row]:
    """At most `count` rows in their order, chosen by a hash of seed and id; a smaller choice is part of a larger."""
    if count is None or count >= len(rows):
        return list(rows)
    order = sorted(range(len(rows)), key=lambda i: (keyed_fraction(seed, "take", rows[i].id), i))
    return [rows[i] for i in sorted(order[:count])]


def prompt_keys(*groups: Iterable[Row]) -> set[str]:
    """The prompt keys of all given rows."""
    return {prompt_key(row.prompt) for rows in groups for row in rows}


def near_prompts(keys: Iterable[str], held_out: Iterable[str], threshold: float = NEAR) -> set[str]:
    """Those of the prompt keys that are near copies of a held-out key; equal keys are none.

    Args:
        keys, held_out: as `prompt_key` makes them.
        threshold: smallest Jaccard index of a near copy, above 0.
    """
    held_out = set(held_out)
    theirs = [_runs(key) for key in held_out]
    seen = Counter(run for runs in theirs for run in runs)
    # runs that no held-out prompt has come first in the order of all; they need no number
    rank = {run: i for i, (run, _) in enumerate(sorted(seen.items(), key=lambda item: (item[1], item[0])))}

    def prefix(runs: frozenset[Run]) -> list[int]:
        # the small number keeps products like 0.6 * 5, a little above 3, from being rounded up
        length = len(runs) - math.ceil(threshold * len(runs) - _EPSILON) + 1
        known = [rank[run] for run in runs if run in rank]
        length -= len(runs) - len(known)
        return sorted(known)[:length] if length > 0 else []

    index: dict[int, list[frozenset[Run]]] = {}
    for runs in theirs:
        for number in prefix(runs):
            index.setdefault(number, []).append(runs)
    found = set()
    for key in set(keys) - held_out:
        runs = _runs(key)
        others = (other for number in prefix(runs) for other in index.get(number, ()))
        if any(_are_near(runs, other, threshold) for other in others):
            found.add(key)
    return found


Run = tuple[str, ...]
_EPSILON = 1e-9


def _runs(key: str) -> frozenset[Run]:
    words = key.split()[-_NEAR_WORDS:]
    return frozenset(zip(words, words[1:], words[2:], strict=False)) if len(words) > 2 else frozenset([tuple(words)])


def _are_near(one: frozenset[Run], other: frozenset[Run], threshold: float) -> bool:
    if min(len(one), len(other)) < threshold * max(len(one), len(other)) - _EPSILON:
        return False
    common = len(one & other)
    return common >= threshold * (len(one) + len(other) - common) - _EPSILON
