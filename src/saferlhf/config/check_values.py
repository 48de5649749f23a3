"""Checks of single values, for the checks of whole configs (`checks.py` and beside it)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from saferlhf.errors import UserError

LARGEST_SEED = 2**32 - 1


def one_of(value: str, where: str, choices: Iterable[str]) -> None:
    """Raise unless the value is one of the choices."""
    options = list(choices)
    if value not in options:
        raise UserError(f"'{value}' is not possible", where, "choose one of: " + " | ".join(options))


def positive(values: Mapping[str, float | None]) -> None:
    """Raise at the first value that is not a positive number; None is left alone."""
    for key, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(
                f"{value} is not a positive number", key, "give a number above zero, or null for the default"
            )


def shares(values: Mapping[str, float]) -> None:
    """Raise at the first value outside [0, 1)."""
    for key, value in values.items():
        if not 0 <= value < 1:
            raise UserError(f"{value} is not a share", key, "give a number from 0 up to, but not including, 1")


def layer_numbers(numbers: list[int] | None, where: str) -> None:
    """Raise unless these are different numbers of layers, or None."""
    if numbers is not None and (not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0):
        raise UserError(f"{numbers} are no numbers of layers", where, "different numbers from 0, as [12,18]; or null")


def seeds(values: Mapping[str, int]) -> None:
    """Raise at the first value that is no seed."""
    for key, value in values.items():
        if not 0 <= value <= LARGEST_SEED:
            raise UserError(f"{value} is no seed", key, f"give a whole number from 0 to {LARGEST_SEED}")
