"""Policies of different runs held against each other on the same prompts, from their samples alone.

Two questions of the Safe RLHF paper, each as a paired difference with its bootstrap interval over prompts:

- is A better than B? win rates of A's responses over B's, and differences of means, prompt by prompt;
- is a learned multiplier on or above the front of fixed weights? The front is the upper concave hull of the fixed
  policies' points (x: share of safe responses, y: helpfulness); the policy's height above it at its own x is taken
  anew in every draw of prompts, so that the uncertainty of the front is in the interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from saferlhf.errors import UserError
from saferlhf.evaluation.policy_answers import PolicyAnswers, PromptSet
from saferlhf.evaluation.policy_metrics import by_prompt, policy_metrics, safe_of
from saferlhf.ops.intervals import CONFIDENCE, DRAWS, cluster_codes, percentile_interval, resampled_sums

Floats = NDArray[np.float64]

_HEIGHT = ("helpfulness", "reward")
"""What makes a policy's height in the plane, the first that a judge gives."""


def against(
    prompts: PromptSet,
    ours: PolicyAnswers,
    theirs: PolicyAnswers,
    *,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, float]:
    """Win rates of `ours` over `theirs` and differences of all means, ours minus theirs, with intervals.

    Returns:
        `helpful_win_rate`, `harmless_win_rate`, .. and `difference/<name>`, each with `_low`, `_high`, `_n`.
    """
    found = policy_metrics(prompts, ours, theirs, prefix="p", draws=draws, confidence=confidence, seed=seed)
    wins = {name.removeprefix("p/"): v for name, v in found.items() if "_win_rate" in name or "_tie_rate" in name}
    area = "p/over_baseline/"
    return wins | {f"difference/{name.removeprefix(area)}": v for name, v in found.items() if name.startswith(area)}


def same_prompts(samples: Mapping[str, tuple[PromptSet, Mapping[str, PolicyAnswers]]]) -> PromptSet:
    """The prompts that all policies answered.

    Raises:
        UserError: they did not answer the same ones.
    """
    (first, (prompts, _)), *others = samples.items()
    for name, (asked, _) in others:
        if asked.ids != prompts.ids:
            what = f"{first} and {name} answered different prompts, so that they cannot be compared in pairs"
            raise UserError(what, "pipeline.compare", "give them the same data, seed and evaluation.max_rows")
    return prompts


# ------------------------------------------------------------------------------------------------ the front
def points_of(answers: PolicyAnswers) -> tuple[Floats, Floats]:
    """(n,) share of safe responses and (n,) mean helpfulness of each prompt; NaN where nobody judged one.

    Raises:
        UserError: no judge gives both.
    """
    safe = next((found for said in answers.judged.values() if (found := safe_of(said)) is not None), None)
    height = next((said.values[key] for said in answers.judged.values() for key in _HEIGHT if key in said.values), None)
    if safe is None or height is None:
        raise UserError("no judge says how safe and how helpful the responses are", "pipeline.compare", "name judges")
    return by_prompt(safe), by_prompt(height)


def height_of_front(x: Floats, y: Floats, at: float) -> float:
    """Height at `at` of the upper concave hull of the points (p,): mixtures of the policies reach all of it.

    Left of the leftmost point it is as high as its highest point, for safety is not asked for there; right of the
    rightmost it is that point's height, the best that the fixed weights have to offer.
    """
    order = np.lexsort((-y, x))
    hull: list[tuple[float, float]] = []
    for place in order:
        point = (float(x[place]), float(y[place]))
        if hull and hull[-1][0] == point[0]:
            continue  # below one of the same x
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    # a safer point that is more helpful too makes what lies left of it worthless
    heights = [max(height for _, height in hull[i:]) for i in range(len(hull))]
    return float(np.interp(at, [x for x, _ in hull], heights))


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or below the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


def over_front(
    prompts: PromptSet,
    learned: PolicyAnswers,
    fixed: Sequence[PolicyAnswers],
    *,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, float]:
    """Height of a policy above the front of others, in units of helpfulness.

    Returns:
        `over_front`, `_n` (prompts on which all of them are judged), `_low` and `_high` if those are more than one;
        nothing where there is none.

    Raises:
        ValueError: no fixed policies.
        UserError: no judge says how safe and how helpful responses are.
    """
    if not fixed:
        raise ValueError("a front needs at least one policy with a fixed weight")
    pairs = [points_of(answers) for answers in (learned, *fixed)]
    table = np.stack([*(x for x, _ in pairs), *(y for _, y in pairs)], axis=1)  # (n, 2 p)
    known = np.flatnonzero(~np.isnan(table).any(axis=1))
    if not len(known):
        return {}
    texts = prompts.texts
    codes = cluster_codes([texts[i] for i in known])
    table = table[known]

    def height(sums: Floats) -> float:
        x, y = np.split(sums, 2)
        return float(y[0]) - height_of_front(x[1:], y[1:], float(x[0]))

    found = {"over_front": height(table.mean(axis=0)), "over_front_n": float(len(table))}
    if draws and codes.max() > 0:
        counted = np.concatenate([table, np.ones((len(table), 1))], axis=1)
        sums = resampled_sums(counted, codes, draws=draws, seed=seed)
        heights = [height(row[:-1] / row[-1]) for row in sums]
        interval = percentile_interval(heights, confidence, int(codes.max()) + 1)
        if interval is not None:
            found |= {"over_front_low": interval.low, "over_front_high": interval.high}
    return found
