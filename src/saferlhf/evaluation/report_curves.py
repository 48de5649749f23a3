"""How a constraint was at work while a policy was trained: lambda, KL, reward and cost by rollout, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from saferlhf.evaluation.plots import Curve, curves_svg
from saferlhf.evaluation.policy_plots import constraint_curves

_MOST = 4  # curves of a panel that can be told apart

TITLES = {
    "lambda": "lambda over training",
    "kl": "KL to the reference over training, nats",
    "reward": "reward over training",
    "cost": "cost over training",
}
"""Panel -> its title, in their order."""


def training_drawings(
    curves: Mapping[str, Curve], thresholds: Sequence[float] = (), *, step: str = "rollout"
) -> list[str]:
    """A drawing for each of lambda, KL, reward and cost that was logged.

    Args:
        curves: name -> [(step, value)], as `training/curves.py` reads them.
        thresholds: levels of the cost that the constraint demands, drawn as level curves.
        step: what a step of the curves is.
    """
    panels = constraint_curves(curves)
    if not panels:
        return []  # not trained by rewards
    kl = {name.rpartition("/")[0] or name: curve for name, curve in curves.items() if name.rpartition("/")[2] == "kl"}
    panels["kl"] = {area: curve for area, curve in kl.items() if len(curve)}
    drawings = []
    for wanted, title in TITLES.items():
        series = dict(list(panels.get(wanted, {}).items())[:_MOST])
        if wanted == "cost" and series:
            last = max(curve[-1][0] for curve in series.values())
            first = min(curve[0][0] for curve in series.values())
            for level in thresholds[: _MOST - len(series)]:
                series[f"threshold {level:g}"] = [(first, level), (last, level)]
        if series:
            drawings.append(curves_svg(title, series, step))
    return drawings
