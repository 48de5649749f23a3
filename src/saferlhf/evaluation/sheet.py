"""A sheet of metrics: values and shares go in by name, the flat dictionary of `metrics.json` comes out.

All intervals are bootstrap intervals with the prompts as clusters, from one set of draws: shares, means and whatever
else is a function of sums over rows by resampled sums, rank statistics by row weights. A metric without a value on
these rows is left out: `metrics.json` holds numbers only.

Beside `<name>` stand `<name>_low`, `<name>_high` (the interval) and `<name>_n` (how many pairs, responses or rows it
counts).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saferlhf.ops.intervals import (
    CONFIDENCE,
    DRAWS,
    Interval,
    bootstrap_ratios,
    bootstrap_statistic,
    cluster_codes,
    percentile_interval,
    resampled_statistics,
    resampled_sums,
    wilson,
)

Floats = NDArray[np.float64]
Counted = Mapping[str, NDArray[np.bool_]]
"""Name of a metric -> (n,) or (n, k) bool: the things it counts."""

Functions = Callable[[Floats], Mapping[str, Floats]]
"""From (b, m) to names with values (b,), NaN where undefined."""


@dataclass
class _OfSums:
    """Metrics that are functions of sums over rows, waiting for the draws."""

    columns: Floats  # (n, m)
    functions: Functions
    values: dict[str, float]
    shares: Collection[str]
    present: dict[str, int] = field(default_factory=dict)  # clusters with something to count


class MetricSheet:
    """Collects metrics of n rows; order of adding is order of output.

    Args:
        prefix: put before each name, such as `test/reward`.
        clusters: n prompts; rows of one prompt are resampled together.
        draws: bootstrap resamples; 0 gives values without intervals (validation during training).
        confidence: of the intervals.
        seed: of the draws.
    """

    def __init__(
        self,
        prefix: str,
        clusters: Sequence[str],
        *,
        draws: int = DRAWS,
        confidence: float = CONFIDENCE,
        seed: int = 0,
    ) -> None:
        self.prefix = prefix
        self.clusters = cluster_codes(clusters)  # (n,)
        self.draws, self.confidence, self.seed = draws, confidence, seed
        self._values: dict[str, float | None] = {}
        self._intervals: dict[str, Interval | None] = {}
        self._counts: dict[str, int] = {}
        self._ratios: dict[str, tuple[Floats, Floats, bool]] = {}
        self._of_sums: list[_OfSums] = []

    def value(self, name: str, value: float | None) -> None:
        """A plain number; None is left out."""
        self._values[name] = value

    def statistic(self, name: str, statistic: Callable[[Floats], float | None], n: int) -> None:
        """A statistic of row weights (n,), with its interval; `n` is the number of things it counts."""
        self._values[name] = statistic(np.ones(len(self.clusters)))
        self._counts[name] = n
        if self.draws and self._values[name] is not None:
            self._intervals[name] = bootstrap_statistic(
                statistic, self.clusters, draws=self.draws, confidence=self.confidence, seed=self.seed
            )

    def of_sums(
        self,
        columns: ArrayLike,
        functions: Functions,
        counted: Counted | None = None,
        shares: Collection[str] = (),
    ) -> None:
        """Metrics that are functions of sums over rows.

        Args:
            columns: (n, m) each row's contributions.
            functions: from sums (b, m) to values (b,) by name.
            counted: name -> what it counts, for `_n`.
            shares: names of proportions; one that is 0 or 1 gets the Wilson interval over the prompts it counts.
        """
        table = np.asarray(columns, np.float64)
        found = functions(table.sum(axis=0, keepdims=True))
        entry = _OfSums(table, functions, {name: float(value[0]) for name, value in found.items()}, shares)
        for name, value in entry.values.items():
            self._values[name] = None if np.isnan(value) else value
        for name, mask in (counted or {}).items():
            if name in entry.values:
                self._counts[name] = int(mask.sum())
                rows = mask.reshape(len(mask), -1).any(axis=1)
                entry.present[name] = len(np.unique(self.clusters[rows]))
        self._of_sums.append(entry)

    def of_weights(self, functions: Functions, n: int) -> None:
        """Metrics that are functions of row weights (b, n) and of no sums, as AUROC; `n` is what they count."""
        rows = len(self.clusters)
        found = {name: float(value[0]) for name, value in functions(np.ones((1, rows))).items()}
        for name, value in found.items():
            self._values[name] = None if np.isnan(value) else value
            self._counts[name] = n
        if self.draws and rows and int(self.clusters.max()) >= 1 and not all(map(np.isnan, found.values())):
            samples = resampled_statistics(functions, self.clusters, draws=self.draws, seed=self.seed)
            for name, sample in samples.items():
                self._intervals[name] = percentile_interval(sample, self.confidence, int(self.clusters.max()) + 1)

    def share(self, name: str, credit: ArrayLike, where: ArrayLike | None = None) -> None:
        """The mean of values in [0, 1].

        Args:
            credit: (n,) or (n, k) for k things per row; NaN is left out.
            where: same shape, bool: which to count; all by default.
        """
        self._mean(name, credit, where, proportion=True)

    def mean(self, name: str, numbers: ArrayLike, where: ArrayLike | None = None) -> None:
        """The mean of any numbers; arguments as `share`."""
        self._mean(name, numbers, where, proportion=False)

    def _mean(self, name: str, numbers: ArrayLike, where: ArrayLike | None, proportion: bool) -> None:
        table = np.asarray(numbers, dtype=np.float64).reshape(len(self.clusters), -1)  # (n, k)
        counted = ~np.isnan(table)
        if where is not None:
            counted &= np.asarray(where, dtype=bool).reshape(table.shape)
        over, under = np.where(counted, table, 0.0).sum(axis=1), counted.sum(axis=1)  # (n,)
        self._add_ratio(name, over, under, int(under.sum()), proportion)

    def ratio(self, name: str, numerator: ArrayLike, denominator: ArrayLike, n: int) -> None:
        """sum(numerator) / sum(denominator), each (n,); `n` is the number of things it counts."""
        self._add_ratio(name, np.asarray(numerator, np.float64), np.asarray(denominator, np.float64), n, False)

    def _add_ratio(self, name: str, over: Floats, under: Floats, n: int, proportion: bool) -> None:
        whole = under.sum()
        self._values[name] = float(over.sum() / whole) if whole else None
        self._counts[name] = n
        self._ratios[name] = (over, under.astype(np.float64), proportion)

    def metrics(self) -> dict[str, float]:
        """All metrics under their full names, intervals and counts beside them."""
        self._bootstrap_ratios()
        self._bootstrap_sums()
        flat: dict[str, float] = {}
        for name, value in self._values.items():
            if value is None:
                continue
            full = f"{self.prefix}/{name}"
            flat[full] = float(value)
            interval = self._intervals.get(name)
            if interval is not None:
                flat[f"{full}_low"], flat[f"{full}_high"] = interval
            if name in self._counts:
                flat[f"{full}_n"] = float(self._counts[name])
        return flat

    def _bootstrap_ratios(self) -> None:
        for proportion in (True, False):
            chosen = {name: pair[:2] for name, pair in self._ratios.items() if pair[2] == proportion}
            if not chosen or not self.draws or not len(self.clusters):
                continue
            intervals = bootstrap_ratios(
                np.stack([over for over, _ in chosen.values()], axis=1),
                np.stack([under for _, under in chosen.values()], axis=1),
                self.clusters,
                draws=self.draws,
                confidence=self.confidence,
                seed=self.seed,
                proportion=proportion,
            )
            self._intervals.update(zip(chosen, intervals, strict=True))

    def _bootstrap_sums(self) -> None:
        if not self._of_sums or not self.draws or not len(self.clusters) or int(self.clusters.max()) < 1:
            return
        table = np.concatenate([entry.columns for entry in self._of_sums], axis=1)
        sums = resampled_sums(table, self.clusters, draws=self.draws, seed=self.seed)  # (draws, all columns)
        parts = np.split(sums, np.cumsum([entry.columns.shape[1] for entry in self._of_sums])[:-1], axis=1)
        for entry, part in zip(self._of_sums, parts, strict=True):
            for name, sample in entry.functions(part).items():
                self._intervals[name] = self._interval(sample, entry, name)

    def _interval(self, sample: Floats, entry: _OfSums, name: str) -> Interval | None:
        """Of one metric; a share that all its prompts agree on has no spread, and one prompt has none to show."""
        present, value = entry.present.get(name), entry.values[name]
        if name in entry.shares and present is not None:
            if present < 2:
                return None
            if value in (0.0, 1.0):
                return wilson(value * present, present, self.confidence)
        return percentile_interval(sample, self.confidence, present or int(self.clusters.max()) + 1)
