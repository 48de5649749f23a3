"""Splits: train, validation and test never share a prompt.

Each prompt gets a number in [0, 1) from a hash of its normalised words and the data seed; test is below
`test_fraction`, validation below `test_fraction + val_fraction`. So a prompt's split does not depend on the other
rows of the file, and more rows never move old ones. Prompts are compared in lower case with everything but letters
and digits taken as a space.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

from saferlhf.data.rows import Prompt, Row, prompt_text
from saferlhf.errors import UserError

_NOT_WORDS = re.compile(r"[\W_]+")


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
