"""What is swept: the words of the command line, read by Hydra's own parser, and the grid they span.

    a=1,2   a=choice(1,2)   a=range(1,5)   task=glob(*)          values, as many as are listed
    a=interval(0,1)   a=tag(log,interval(1e-5,1e-3))             any value between two: Optuna alone
    a=tag(int,interval(1,8))                                     any whole number from 1 to 8

Every value is kept as the text that Hydra takes for it, so that a run of a sweep is composed as if it had been typed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from saferlhf.config.arguments import key_of
from saferlhf.errors import UserError

LOG, INT = "log", "int"
TAGS = (LOG, INT)
MOST_RUNS = 10_000
"""Of a grid: more is a mistake."""


@dataclass(frozen=True)
class Interval:
    """All numbers from `low` to `high`, both included; on a log scale, whole ones alone, or in steps."""

    low: float
    high: float
    log: bool = False
    whole: bool = False
    step: float | None = None


@dataclass(frozen=True)
class Dimension:
    """One swept key.

    Attributes:
        key: as it was typed, with a `+` where one stood.
        values: its values as texts; empty for an interval.
        interval: the numbers between which a sampler may choose; None where there are only values. A range has both.
    """

    key: str
    values: tuple[str, ...]
    interval: Interval | None = None

    @property
    def name(self) -> str:
        """The key without a `+`."""
        return key_of(self.key)

    @property
    def first(self) -> str:
        """Any one of its values."""
        return self.values[0] if self.values else number_text(self.interval.low if self.interval else 0.0)

    def word(self, value: str) -> str:
        """The override that gives the key this value."""
        return f"{self.key}={value}"


@dataclass(frozen=True)
class Space:
    """What was typed: words that all runs share, and swept keys in the order they were typed."""

    fixed: tuple[str, ...]
    dimensions: tuple[Dimension, ...]

    def words(self, values: Mapping[str, str]) -> list[str]:
        """The overrides of one run, given a value (a text) for each swept key."""
        return [*self.fixed, *(d.word(values[d.name]) for d in self.dimensions)]

    @property
    def first(self) -> dict[str, str]:
        """Values of one run, whichever."""
        return {d.name: d.first for d in self.dimensions}


def number_text(value: float) -> str:
    """A number as Hydra reads it back: the same one, and a whole number where it is a Python int."""
    return str(value) if isinstance(value, int) else repr(float(value))


def read_space(words: Sequence[str], params: Mapping[str, Any] | None = None, config_loader: Any = None) -> Space:
    """Tell swept words from the rest.

    Args:
        words: overrides without `sweep.*` and Hydra's own.
        params: swept key -> list of values, or text in Hydra's words; a key that is typed too is as typed.
        config_loader: Hydra's, which knows the choices of `glob(*)`.

    Raises:
        UserError: an empty range, or a tag that says nothing here.
        HydraException: a word that cannot be read.
    """
    parser = OverridesParser.create(config_loader=config_loader)
    typed = {key_of(word) for word in words}
    saved = [f"{key}={_as_text(value)}" for key, value in (params or {}).items() if key_of(key) not in typed]
    fixed: list[str] = []
    dimensions: list[Dimension] = []
    for word, override in zip([*words, *saved], parser.parse_overrides([*words, *saved]), strict=True):
        if override.is_sweep_override():
            dimensions.append(_dimension(override, word))
        else:
            fixed.append(word)
    return Space(tuple(fixed), tuple(dimensions))


def grid(space: Space) -> list[dict[str, str]]:
    """Every combination, the last key changing fastest: name -> value.

    Raises:
        UserError: an interval, or more runs than anybody means.
    """
    for dimension in space.dimensions:
        if not dimension.values:
            mend = f"sweep=optuna, or values: {dimension.name}=1,2 or range(1,5,2)"
            raise UserError("an interval has no values for a grid", dimension.name, mend)
    runs = prod(len(dimension.values) for dimension in space.dimensions)
    if runs > MOST_RUNS:
        raise UserError(f"{runs:,} runs", "the grid", "sweep=optuna takes sweep.trials of them")
    names = [dimension.name for dimension in space.dimensions]
    return [dict(zip(names, values, strict=True)) for values in product(*(d.values for d in space.dimensions))]


def label(values: Mapping[str, str]) -> str:
    """What a run is called among the others: its swept values, numbers to four digits."""
    return ", ".join(f"{key}={shortened(value)}" for key, value in values.items()) or "as typed"


def shortened(value: str) -> str:
    """A number to four significant digits; any other text as it is."""
    number = as_number(value)
    return value if number is None or len(value) <= 6 else f"{number:.4g}"


def as_number(value: str) -> float | None:
    """The number a value is, if it is one."""
    try:
        return float(value)
    except ValueError:
        return None


def without(words: Iterable[str], *groups: str) -> list[str]:
    """Words that are about none of these groups or keys below them."""
    return [word for word in words if not is_about(word, *groups)]


def is_about(word: str, *groups: str) -> bool:
    """Whether a word chooses in one of these groups, or sets a key of it."""
    key = key_of(word)
    return any(key == group or key.startswith((f"{group}.", f"{group}/", f"{group}@")) for group in groups)


def _dimension(override: Override, word: str) -> Dimension:
    key, value = override.get_key_element(), override.value()
    tags = set(getattr(value, "tags", None) or ())
    if unknown := sorted(tags.difference(TAGS)):
        raise UserError(f"unknown tag '{unknown[0]}'", word, f"known: {', '.join(TAGS)}")
    log, whole = LOG in tags, INT in tags
    if isinstance(value, IntervalSweep):
        assert value.start is not None and value.end is not None
        low, high = float(value.start), float(value.end)
        if whole:
            low, high = int(low), int(high)
        interval = _checked(Interval(low, high, log, whole), word)
        return Dimension(key, (), interval)
    values = tuple(override.sweep_string_iterator())
    if not values:
        raise UserError("no value to sweep over", word, "give some")
    if len(set(values)) < len(values):
        raise UserError("the same value twice", word, "give each once")
    if isinstance(value, RangeSweep) and len(values) > 1:
        first, last = float(values[0]), float(values[-1])
        step, exact = abs(float(value.step)), all("." not in text and "e" not in text for text in values)
        low, high = min(first, last), max(first, last)
        if exact:
            low, high, step = int(low), int(high), int(step)
        interval = Interval(low, high, log=log, whole=exact, step=None if log else step)
        return Dimension(key, values, _checked(interval, word))
    return Dimension(key, values)


def _checked(interval: Interval, word: str) -> Interval:
    if not interval.low < interval.high:
        raise UserError(f"nothing lies between {interval.low:g} and {interval.high:g}", word, "the lower end first")
    if interval.log and interval.low <= 0:
        raise UserError(f"{interval.low:g} has no place on a log scale", word, "begin above zero, or leave log out")
    return interval


def _as_text(value: Any) -> str:
    """A value of `sweep.params` as Hydra would have it typed: a list is its elements."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and value:
        return ",".join(Override._get_value_element_as_str(element) for element in value)
    raise UserError(f"{value!r} is nothing to sweep over", "sweep.params", "as {seed: [0, 1, 2]}")
