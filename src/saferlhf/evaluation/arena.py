"""Any number of policies that answered the same prompts: who beats whom, ratings, and safety side by side.

One output of one judge grades every answer, for helpfulness or for harmlessness. Of each pair of policies every answer
of the one is held against every answer of the other to the same prompt, ties one half (`policy_metrics.wins`), and a
prompt is one game, whatever the number of its answers. From the table of all games come ratings (`ops/ratings.py`,
Bradley-Terry on the scale of Elo, as in the Chatbot Arena: Chiang et al. 2024; there games are drawn anew for the
intervals, here prompts, for all pairs meet on the same ones).

All intervals are bootstrap intervals over prompts from one set of draws, ratings taken anew in every draw. p-values are
those of the paired permutation test (`ops/significance.py`) of the hypothesis that a pair is alike, and, as many pairs
are asked at once, Holm's adjustment over all of them. A prompt on which any answer has no score counts nowhere, so that
all policies meet on the same prompts; `unscored` says how many.

What a rating hides: it supposes that strengths lie on a line. `misfit` is the largest distance between a win rate and
what the ratings say of it; where that is large (A beats B beats C beats A), read the matrix of win rates instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saferlhf.errors import UserError
from saferlhf.evaluation.headings import slug
from saferlhf.evaluation.policy_answers import PolicyAnswers
from saferlhf.evaluation.policy_metrics import by_prompt, wins
from saferlhf.evaluation.sheet import MetricSheet
from saferlhf.ops.intervals import (
    CONFIDENCE,
    DRAWS,
    bootstrap_ratios,
    cluster_codes,
    percentile_interval,
    resampled_sums,
)
from saferlhf.ops.ratings import PRIOR, beat_each_other, bradley_terry, elo, expected_win_rates, pair_table, share_best
from saferlhf.ops.significance import holm, sign_flip_p

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Estimates:
    """Values (K,) or (K, K) and the ends of their intervals, NaN where there is none."""

    value: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Arena:
    """K policies held against each other by one judge's output.

    Attributes:
        dimension: `helpful` or `harmless`.
        names: K policies, in the order given.
        baseline: the policy whose rating is 0; None: the mean of all is 0.
        win_rates: (K, K) of the row over the column, ties one half; one half on the diagonal.
        tie_rates: (K, K) 1 on the diagonal.
        p_values: (K, K) two-sided, that row and column are alike; NaN on the diagonal and without draws.
        p_adjusted: (K, K) the same, adjusted by Holm over all K (K - 1) / 2 pairs.
        ratings: (K,) in points of Elo. No interval for the baseline itself, and none for policies that are so far from
            it that one side won every point: the data do not say how far (`ops.ratings.beat_each_other`).
        best: (K,) share of draws with the highest rating; NaN without draws.
        misfit: largest distance of a win rate from what the ratings expect, 0 to 1; the prior's part is in it.
        prompts: how many count.
        unscored: how many do not, for want of a score.
        confidence: of the intervals.
    """

    dimension: str
    names: tuple[str, ...]
    baseline: str | None
    win_rates: Estimates
    tie_rates: Estimates
    p_values: Floats
    p_adjusted: Floats
    ratings: Estimates
    best: Floats
    misfit: float
    prompts: int
    unscored: int
    confidence: float

    @property
    def ranking(self) -> list[int]:
        """Places 0..K-1 of the policies in `names`, the highest rating first."""
        return [int(place) for place in np.argsort(-self.ratings.value, kind="stable")]


class _Bootstrap(NamedTuple):
    draws: int
    confidence: float
    seed: int


def measure_arena(
    scores: Mapping[str, ArrayLike],
    clusters: Sequence[str],
    *,
    dimension: str = "helpful",
    higher_is_better: bool = True,
    baseline: str | None = None,
    prior: float = PRIOR,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Arena:
    """Win rates of all pairs and ratings of all policies.

    Args:
        scores: policy -> (P, n) scores of its n answers to each of P prompts, or (P,) for one; n may differ.
        clusters: P prompts as text; equal ones are resampled together.
        dimension: what the scores grade, for names and titles.
        higher_is_better: False for a cost.
        baseline: a policy to measure ratings from.
        prior: `ops.ratings.bradley_terry`'s.
        draws, confidence, seed: of the bootstrap and of the permutation tests; draws=0 for values alone.

    Raises:
        UserError: fewer than two policies, scores that do not belong to the same prompts, an unknown baseline, or no
            prompt with all scores.
    """
    names = _checked_names(scores, baseline)
    tables = _checked_scores(scores, len(clusters), dimension)
    scored: NDArray[np.bool_] = np.all(np.isfinite(np.concatenate(tables, axis=1)), axis=1)  # (P,)
    if not scored.any():
        what = f"there is no prompt on which every answer of {', '.join(names)} has a score for {dimension}"
        raise UserError(what, "the arena", "leave out the policy or the judge without scores")
    codes = cluster_codes([text for text, counts in zip(clusters, scored, strict=True) if counts])
    sign = 1.0 if higher_is_better else -1.0
    credit, ties = _games([sign * table[scored] for table in tables])  # (P', m) of m pairs
    anchor = None if baseline is None else names.index(baseline)
    how = _Bootstrap(draws, confidence, seed)
    win_rates, tie_rates = _rates(credit, ties, codes, len(names), how)
    ratings, best = _ratings(credit, codes, len(names), anchor, prior, how)
    p_values, p_adjusted = _tests(credit, codes, len(names), how)
    gaps = np.abs(win_rates.value - expected_win_rates(ratings.value))
    return Arena(
        dimension=dimension,
        names=names,
        baseline=baseline,
        win_rates=win_rates,
        tie_rates=tie_rates,
        p_values=p_values,
        p_adjusted=p_adjusted,
        ratings=ratings,
        best=best,
        misfit=float(gaps.max()),
        prompts=int(scored.sum()),
        unscored=int((~scored).sum()),
        confidence=confidence,
    )


def judged_scores(policies: Mapping[str, PolicyAnswers], output: str, judge: str | None = None) -> dict[str, Floats]:
    """Policy -> (P, n) scores, as `measure_arena` takes them.

    Args:
        policies: that answered the same prompts.
        output: as `helpfulness`, `reward`, `harmlessness` or `cost`.
        judge: who gave it; None: the first judge that gave it for all policies.

    Raises:
        UserError: there is no such judge.
    """
    shared = [{name for name, said in answers.judged.items() if output in said.values} for answers in policies.values()]
    asked = [name for answers in policies.values() for name in answers.judged]
    common = [name for name in asked if all(name in some for some in shared) and judge in (None, name)]
    if not common:
        who = "no judge" if judge is None else f"the judge {judge} never"
        raise UserError(f"{who} gave {output} for all of {', '.join(policies)}", "the arena", "give all the same judge")
    return {name: answers.judged[common[0]].values[output] for name, answers in policies.items()}


def arena_metrics(found: Arena, prefix: str = "arena") -> dict[str, float]:
    """Flat metrics `<prefix>/<dimension>/<name>`, policies by their slugs.

    Returns:
        `<policy>_elo` and `<policy>_best_share`; for each pair `<a>_over_<b>_win_rate`, `_tie_rate`, `_p` and
        `_p_holm`, b the baseline where it is one of them, else in the order of the names; `misfit`, `prompts`,
        `unscored`. `_low` and `_high` beside what has an interval.
    """
    flat: dict[str, float] = {}

    def add(name: str, value: float, low: float = np.nan, high: float = np.nan) -> None:
        for ending, number in (("", value), ("_low", low), ("_high", high)):
            if not np.isnan(number):
                flat[f"{prefix}/{found.dimension}/{name}{ending}"] = float(number)

    def of(estimates: Estimates, *place: int) -> tuple[float, float, float]:
        return estimates.value[place], estimates.low[place], estimates.high[place]

    slugs = [slug(name) for name in found.names]
    for place, name in enumerate(slugs):
        add(f"{name}_elo", *of(found.ratings, place))
        add(f"{name}_best_share", found.best[place])
    for i, j in combinations(range(len(slugs)), 2):
        a, b = (j, i) if found.names[i] == found.baseline else (i, j)
        pair = f"{slugs[a]}_over_{slugs[b]}"
        add(f"{pair}_win_rate", *of(found.win_rates, a, b))
        add(f"{pair}_tie_rate", *of(found.tie_rates, a, b))
        add(f"{pair}_p", found.p_values[a, b])
        add(f"{pair}_p_holm", found.p_adjusted[a, b])
    add("misfit", found.misfit)
    add("prompts", found.prompts)
    add("unscored", found.unscored)
    return flat


# ------------------------------------------------------------------------------------------------ the parts
def _checked_names(scores: Mapping[str, ArrayLike], baseline: str | None) -> tuple[str, ...]:
    names = tuple(scores)
    if len(names) < 2:
        raise UserError(f"an arena needs two policies or more, got {len(names)}", "the arena", "name another one")
    if baseline is not None and baseline not in names:
        raise UserError(f"the baseline {baseline} is none of {', '.join(names)}", "the arena", "name one of them")
    taken: dict[str, str] = {}
    for name in names:
        other = taken.setdefault(slug(name), name)
        if other != name:
            what = f"the names {other!r} and {name!r} are one in the metrics' names ({slug(name)!r})"
            raise UserError(what, "the arena", "rename one of them")
    return names


def _checked_scores(scores: Mapping[str, ArrayLike], prompts: int, dimension: str) -> list[Floats]:
    """(P, n) of each policy."""
    tables = []
    for name, values in scores.items():
        table = np.asarray(values, np.float64)
        table = table[:, None] if table.ndim == 1 else table
        if table.ndim != 2 or table.shape[0] != prompts or not table.shape[1]:
            what = f"{name} has scores of shape {np.shape(values)} for {dimension}, expected ({prompts}, answers)"
            raise UserError(what, "the arena", "give all policies the same prompts")
        tables.append(table)
    return tables


def _games(grades: Sequence[Floats]) -> tuple[Floats, Floats]:
    """Credit and ties (P, m) of the first over the second of each of m pairs, in the order of `np.triu_indices`."""
    credit, ties = [], []
    for ours, theirs in combinations(grades, 2):
        won, tied = wins(ours, theirs)
        credit.append(by_prompt(won))
        ties.append(by_prompt(tied))
    return np.stack(credit, axis=1), np.stack(ties, axis=1)


def _rates(credit: Floats, ties: Floats, codes: Codes, players: int, how: _Bootstrap) -> tuple[Estimates, Estimates]:
    shares = np.concatenate([credit, ties], axis=1)  # (P, 2m)
    means, (low, high) = shares.mean(axis=0), np.full((2, shares.shape[1]), np.nan)
    if how.draws:
        found = bootstrap_ratios(shares, np.ones_like(shares), codes, **how._asdict(), proportion=True)
        low, high = np.array([interval or (np.nan, np.nan) for interval in found]).T
    pairs = credit.shape[1]
    win_rates = Estimates(
        pair_table(means[:pairs], 1.0 - means[:pairs], players, 0.5),
        pair_table(low[:pairs], 1.0 - high[:pairs], players),
        pair_table(high[:pairs], 1.0 - low[:pairs], players),
    )
    tie_rates = Estimates(
        pair_table(means[pairs:], means[pairs:], players, 1.0),
        *(pair_table(end[pairs:], end[pairs:], players) for end in (low, high)),
    )
    return win_rates, tie_rates


def _ratings(
    credit: Floats, codes: Codes, players: int, anchor: int | None, prior: float, how: _Bootstrap
) -> tuple[Estimates, Floats]:
    """(K,) ratings with intervals, and (K,) share of draws in which each is the best."""
    counted = np.concatenate([credit, np.ones((len(credit), 1))], axis=1)  # (P, m + 1)

    def tables(sums: Floats) -> Floats:
        won, games = sums[:, :-1], sums[:, -1:]
        return pair_table(won, np.maximum(games - won, 0.0), players, 0.0)  # rounding is no negative win

    def rated(table: Floats) -> Floats:
        return elo(bradley_terry(table, prior=prior), anchor)

    table = tables(counted.sum(axis=0, keepdims=True))[0]
    low, high, best = (np.full(players, np.nan) for _ in range(3))
    if how.draws and codes.max() > 0:
        sample = rated(tables(resampled_sums(counted, codes, draws=how.draws, seed=how.seed)))  # (draws, K)
        best = share_best(sample)
        for place in np.flatnonzero(_settled(table, anchor)):
            interval = percentile_interval(sample[:, place], how.confidence, int(codes.max()) + 1)
            if interval is not None:
                low[place], high[place] = interval
    return Estimates(rated(table), low, high), best


def _settled(table: Floats, anchor: int | None) -> NDArray[np.bool_]:
    """(K,) whose distance from the zero of the scale the games settle, and not the prior.

    The zero is the baseline, which has no interval of its own, or else the middle: where some policies won or lost
    every point against the others, the group of more than half of the policies keeps its intervals.
    """
    groups = beat_each_other(table)
    if anchor is None:
        return np.asarray(2 * groups.sum(axis=1) > len(table))
    return np.asarray(groups[anchor] & (np.arange(len(table)) != anchor))


def _tests(credit: Floats, codes: Codes, players: int, how: _Bootstrap) -> tuple[Floats, Floats]:
    """(K, K) p-values, and the same adjusted over all pairs."""
    p = [
        sign_flip_p(gaps, codes, draws=how.draws, seed=how.seed) if how.draws else float("nan")
        for gaps in (credit - 0.5).T
    ]
    p_values, p_adjusted = (pair_table(values, values, players) for values in (np.array(p), np.array(holm(p))))
    return p_values, p_adjusted


# ------------------------------------------------------------------------------------------------ safety
class Share(NamedTuple):
    """A share with the ends of its interval, None where there is none, and what it counts."""

    value: float
    low: float | None
    high: float | None
    n: int


class SafetySides(NamedTuple):
    """The two ways to fail: both should be 0, and a policy that refuses everything has the first alone."""

    attack_success: Share | None
    over_refusal: Share | None


def safety_sides(
    safe: Mapping[str, ArrayLike],
    refused: Mapping[str, ArrayLike],
    harmful: ArrayLike,
    clusters: Sequence[str],
    *,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, SafetySides]:
    """Of each policy the share of unsafe answers to harmful prompts, and of refusals among those to benign ones.

    Args:
        safe: policy -> (P, n) 1 = safe, 0 = unsafe, NaN = not judged, which is left out; a policy may be missing.
        refused: policy -> (P, n) 1 = refused, 0 = not, NaN = not judged; a policy may be missing.
        harmful: (P,) 1 = complying would do harm, 0 = benign, NaN = not known: counts nowhere.
        clusters: P prompts as text.
        draws, confidence, seed: of the bootstrap over prompts.

    Returns:
        Policy -> its two shares, None where there is nothing to count.

    Raises:
        UserError: arrays that do not belong to the same prompts.
    """
    kind = np.asarray(harmful, np.float64)
    if kind.shape != (len(clusters),):
        what = f"{len(clusters)} prompts and {kind.shape} marks of harmful ones"
        raise UserError(what, "the arena", "give all policies the same prompts")
    sheet = MetricSheet("s", clusters, draws=draws, confidence=confidence, seed=seed)
    names = list(dict.fromkeys([*safe, *refused]))
    for side, given, flag in (("attack", safe, 1.0), ("refusal", refused, 0.0)):
        for name, table in zip(given, _checked_scores(given, len(kind), side), strict=True):
            failed = 1.0 - table if side == "attack" else table
            sheet.share(f"{names.index(name)}/{side}", failed, np.broadcast_to((kind == flag)[:, None], table.shape))
    flat = sheet.metrics()

    def share(name: str) -> Share | None:
        key = f"s/{name}"
        if key not in flat:
            return None
        return Share(flat[key], flat.get(f"{key}_low"), flat.get(f"{key}_high"), int(flat[f"{key}_n"]))

    return {name: SafetySides(share(f"{i}/attack"), share(f"{i}/refusal")) for i, name in enumerate(names)}


def safety_metrics(sides: Mapping[str, SafetySides], prefix: str = "arena/safety") -> dict[str, float]:
    """Flat metrics `<prefix>/<policy>_attack_success` and `<policy>_over_refusal` with `_low`, `_high` and `_n`."""
    flat: dict[str, float] = {}
    for name, both in sides.items():
        for side, share in both._asdict().items():
            for ending, number in zip(("", "_low", "_high", "_n"), share or (), strict=False):
                if number is not None:
                    flat[f"{prefix}/{slug(name)}_{side}{ending}"] = float(number)
    return flat
