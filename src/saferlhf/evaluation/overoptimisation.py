"""Over-optimisation: what a policy gains by its reward model, and what of it is there.

A policy that is trained against a model of a reward finds, sooner or later, what the model likes and people do not.
Gao, Schulman and Hilton ("Scaling laws for reward model overoptimization", 2023) draw it as a curve over the distance
from the policy that training began with, x = sqrt(KL): the proxy goes on rising where the true reward has turned down.
There a larger reward model stands for the truth; here it is the toy world's own (`data/toyworld/oracle.py`), asked
about the very responses that were learned from.

A point is the mean of one rollout, and rollouts are few prompts: curves are averaged over a window of rollouts, about
a tenth of all. The true curve's highest window is the best of many noisy ones, so that some of what is "lost" since is
noise even where nothing was lost. `noise` is the standard error of a difference of two windows, from the differences of
neighbouring rollouts (which a slow trend hardly enters): a loss of less than about twice that says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferlhf.evaluation.drawing import GRID, INK, ON_PAGE, ON_WHITE, SERIES, save_png, to_svg
from saferlhf.evaluation.plots import Curve

Floats = NDArray[np.float64]


PICTURE = "overoptimisation.png"
"""Its name in a run's folder."""

KL, PROXY, TRUTH, SAFE = "train/kl", "train/mean_reward", "train/truth_helpfulness", "train/truth_safe_rate"
"""Curves it is made of, as in `curves.jsonl`."""

WINDOWS = 10
"""A window is this part of all rollouts."""

_LEAST = 4  # rollouts, for a curve to be one


@dataclass(frozen=True)
class Overoptimisation:
    """Proxy and truth over training, T rollouts.

    Attributes:
        steps: (T,) numbers of the rollouts.
        kl: (T,) estimated KL divergence from the reference, in nats per response; near 0 it may be negative.
        proxy: (T,) mean reward of the reward model.
        truth: (T,) mean true helpfulness of the same responses.
        safe: (T,) share of them that are safe in truth.
        window: rollouts that are averaged.
    """

    steps: NDArray[np.int64]
    kl: Floats
    proxy: Floats
    truth: Floats
    safe: Floats
    window: int

    def distance(self, window: int) -> Floats:
        """(T,) square root of the mean KL of a window: averaged first, since a root of noise is no longer near 0."""
        return np.sqrt(np.maximum(averaged(self.kl, window), 0.0))

    @property
    def peak(self) -> int:
        """Place of the rollout around which the truth was highest."""
        return int(np.argmax(averaged(self.truth, self.window)))

    def metrics(self, prefix: str = "policy/overoptimisation") -> dict[str, float]:
        """`peak_rollout`, `peak_distance`; `truth_lost` with `truth_lost_noise` and `proxy_gained` since then."""
        at, last = self.peak, len(self.steps) - 1
        proxy, truth = (averaged(y, self.window) for y in (self.proxy, self.truth))
        return {
            f"{prefix}/peak_rollout": float(self.steps[at]),
            f"{prefix}/peak_distance": float(self.distance(self.window)[at]),
            f"{prefix}/truth_lost": float(truth[at] - truth[last]),
            f"{prefix}/truth_lost_noise": _noise(self.truth, self.window),
            f"{prefix}/proxy_gained": float(proxy[last] - proxy[at]),
        }


def overoptimisation(curves: Mapping[str, Curve]) -> Overoptimisation | None:
    """From what a run logged.

    Args:
        curves: metric -> (step, value), as `training.curves.read_curves` gives them.

    Returns:
        None without the truth, which only runs on the toy world have, or with fewer than four rollouts.
    """
    known = {name: dict(curves.get(name, ())) for name in (KL, PROXY, TRUTH, SAFE)}
    steps = sorted(set.intersection(*(set(values) for values in known.values())))
    table = np.array([[known[name][step] for step in steps] for name in known]).reshape(len(known), len(steps))
    finite: NDArray[np.bool_] = np.isfinite(table).all(axis=0)
    if finite.sum() < _LEAST:
        return None
    kl, proxy, truth, safe = table[:, finite]
    numbers = np.array(steps, np.int64)[finite]
    window = max(1, round(len(numbers) / WINDOWS))
    return Overoptimisation(numbers, kl, proxy, truth, safe, window)


def averaged(values: Floats, window: int) -> Floats:
    """(T,) means over `window` neighbours; at the ends over the first and the last window, so that all are as sure."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    starts = np.clip(np.arange(len(values)) - (window - 1) // 2, 0, len(values) - window)
    return np.asarray((sums[starts + window] - sums[starts]) / window, np.float64)


def _noise(values: Floats, window: int) -> float:
    """Standard error of the difference of two windows that share no rollout."""
    single = np.diff(values).std() / sqrt(2.0)
    return float(single * sqrt(2.0 / window))


# ------------------------------------------------------------------------------------------------ pictures
def overoptimisation_svg(found: Overoptimisation, title: str = "reward model and truth over training") -> str:
    """The curves as an <svg> element for the report."""
    return to_svg(_drawn(found, ON_PAGE), title)


def overoptimisation_png(path: Path, found: Overoptimisation) -> None:
    """Write the same as a PNG on white ground."""
    save_png(_drawn(found, ON_WHITE), path)


def _drawn(found: Overoptimisation, colours: Mapping[str, str]) -> Any:
    """Three panels over one axis: rollouts faint, the average as a line, a dotted one where the truth was highest."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(5.6, 6.0), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    distance, single = found.distance(found.window), found.distance(1)
    shown = (
        (found.proxy, SERIES[1], "reward (proxy)"),
        (found.truth, SERIES[0], "true helpfulness"),
        (found.safe, SERIES[2], "safe in truth"),
    )
    for axes, (values, mark, words) in zip(panels, shown, strict=True):
        axes.plot(single, values, "o", color=colours[mark], markersize=2.5, alpha=0.3, linestyle="none")
        axes.plot(distance, averaged(values, found.window), "-", color=colours[mark], linewidth=1.8)
        axes.axvline(distance[found.peak], color=colours[INK], linewidth=1.0, linestyle=":")
        axes.set_ylabel(words, fontsize=9, color=colours[INK])
        axes.set_facecolor("none")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(colours[GRID])
        axes.tick_params(colors=colours[INK], labelcolor=colours[INK], color=colours[GRID], labelsize=9)
        axes.grid(axis="y", color=colours[GRID], linewidth=0.6)
        axes.set_axisbelow(True)
    panels[-1].yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    note = f"rollouts, and means of {found.window}; dotted: where the truth was highest"
    panels[-1].set_xlabel(f"distance from the reference, √KL in √nats\n{note}", fontsize=9, color=colours[INK])
    return figure
