"""Ratings of any number of players from a table of wins: the Bradley-Terry model on the scale of Elo.

Every player i has a strength theta_i (Bradley & Terry 1952, "Rank analysis of incomplete block designs"), and

    P(i beats j) = sigmoid(theta_i - theta_j),        l(theta) = sum_ij w_ij log sigmoid(theta_i - theta_j)

with w_ij the wins of i over j; a tie is half a win for both. l is concave, so its maximum does not depend on the order
of the games or of the players, as Elo's running update does. Elo's scale: R = 400 / ln 10 theta, so that 400 points are
odds of 10 to 1. Only differences mean anything: ratings have the mean 0, or a player they are measured from.

**Prior.** Without one, a player who wins all games has no finite rating: the maximum exists if and only if every
division into two groups has a win in each direction (Ford 1957, "Solution of a ranking problem from binary
comparisons"). So each pair that met is given `prior` (one half) more wins in both directions, as if they had tied once
more. It moves ratings towards each other by about one game in all that were played, and two players with W : 0 end up
log((W + 1/2) / (1/2)) apart.

**Incomplete tables.** Players who never met are rated by those they both met. Where the players fall into groups that
no game joins, the distance between the groups is unknown and all ratings of the table are NaN; without a prior, so are
those of a table that fails Ford's condition.

Method: Newton steps on many tables at once (the bootstrap has 10,000), each shortened to log(1 + r) / r of its length,
where r is its largest change of a difference. As |f'''| <= r f'' along a step of a logistic likelihood (Bach 2010,
"Self-concordant analysis for logistic regression"), f' stays of one sign for so long: the likelihood grows in every
step and near the maximum the steps are whole. The MM algorithm of Hunter (2004, "MM algorithms for generalized
Bradley-Terry models") has the same fixed point with cheaper and many more steps.
"""

from __future__ import annotations

from math import log

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

ELO = 400.0 / log(10.0)
"""Points of Elo for one unit of log-odds."""

PRIOR = 0.5
"""Wins that every pair of players who met has more in both directions."""

STEPS = 200
_SETTLED = 1e-7  # of a step's largest change: the error after it is about its square
_BLOCK_ELEMENTS = 500_000  # numbers of a stack of tables at once, so that they stay in the cache


def bradley_terry(wins: ArrayLike, *, prior: float = PRIOR, steps: int = STEPS) -> Floats:
    """Strengths of maximum likelihood, for one table or many at once.

    Args:
        wins: (..., K, K) wins of the row over the column, fractions allowed; the diagonal is not looked at.
        prior: wins added in both directions to every pair that met.
        steps: Newton steps at most; some ten are needed, more for players who hardly ever lose.

    Returns:
        (..., K) log-odds with mean 0; all NaN for a table that does not settle the differences (see above), or that
        did not come to rest in these steps.

    Raises:
        ValueError: not a square table, a negative or infinite number of wins, or a negative prior.
    """
    table = _checked(wins)
    if not 0.0 <= prior < np.inf:
        raise ValueError(f"prior must be a finite number of wins, 0 or more, got {prior}")
    players = table.shape[-1]
    tables = table.reshape(-1, players, players)  # (B, K, K)
    found = np.full((len(tables), players), np.nan)
    block = max(1, _BLOCK_ELEMENTS // players**2)
    for start in range(0, len(tables), block):
        part = tables[start : start + block]
        met = part + part.swapaxes(1, 2) > 0
        found[start : start + block] = _maximum(part + prior * met, steps)
    return found.reshape(table.shape[:-1])


def elo(logits: ArrayLike, anchor: int | None = None) -> Floats:
    """Strengths (..., K) in points of Elo: with mean 0, or measured from the player `anchor`, who then has 0."""
    strengths = np.asarray(logits, np.float64)
    zero = strengths.mean(axis=-1, keepdims=True) if anchor is None else strengths[..., anchor, None]
    return np.asarray(ELO * (strengths - zero), np.float64)


def pair_table(above: ArrayLike, below: ArrayLike, players: int, diagonal: float = np.nan) -> Floats:
    """(..., K, K) from values of the m = K (K - 1) / 2 pairs, in the order of `np.triu_indices(K, 1)`.

    Args:
        above: (..., m) of the first of each pair over the second.
        below: (..., m) of the second over the first.
        players: K.
        diagonal: of the table.
    """
    upper, lower = np.asarray(above, np.float64), np.asarray(below, np.float64)
    first, second = np.triu_indices(players, 1)
    table = np.full((*upper.shape[:-1], players, players), diagonal)
    table[..., first, second] = upper
    table[..., second, first] = lower
    return table


def expected_win_rates(ratings: ArrayLike) -> Floats:
    """(..., K, K) what the model says of the row against the column, from Elo ratings (..., K); one half inside."""
    points = np.asarray(ratings, np.float64)
    return _sigmoid((points[..., :, None] - points[..., None, :]) / ELO)


def beat_each_other(wins: ArrayLike) -> Bools:
    """Groups of players whose differences the wins alone settle, without a prior.

    Args:
        wins: (..., K, K) as for `bradley_terry`.

    Returns:
        (..., K, K) True where a chain of wins leads from the row to the column and one leads back; each player is in a
        group with itself. A table of True is Ford's condition.
    """
    table = _checked(wins)
    players = table.shape[-1]
    reached = ((table > 0) | np.eye(players, dtype=bool)).astype(np.float32)
    for _ in range(max(1, players - 1).bit_length()):  # each square doubles the length of the chains
        reached = (reached @ reached > 0).astype(np.float32)
    there: Bools = reached > 0
    return there & there.swapaxes(-1, -2)


def share_best(ratings: ArrayLike) -> Floats:
    """(K,) in which share of draws (B, K) each player has the highest rating; equal ones share the draw.

    Draws with a NaN are left out; all NaN where none is left. The share of bootstrap draws is how stable the first
    place is under another choice of prompts, and no posterior probability.
    """
    sample = np.asarray(ratings, np.float64)
    sample = sample[~np.isnan(sample).any(axis=1)]
    if not len(sample):
        return np.full(sample.shape[1], np.nan)
    first = sample >= sample.max(axis=1, keepdims=True) - 1e-9  # rounding is not an order
    return np.asarray((first / first.sum(axis=1, keepdims=True)).mean(axis=0), np.float64)


# ------------------------------------------------------------------------------------------------ the maximum
def _maximum(wins: Floats, steps: int) -> Floats:
    """(B, K) strengths of the tables (B, K, K), prior included; NaN where there is no maximum."""
    count, players = wins.shape[:2]
    found = np.full((count, players), np.nan)
    rows = np.flatnonzero(beat_each_other(wins).all(axis=(1, 2)))
    wins, strengths = wins[rows], np.zeros((len(rows), players))
    for _ in range(steps):
        if not len(rows):
            break
        change, largest = _newton_step(wins, strengths)
        strengths = strengths + change
        settled = largest < _SETTLED
        found[rows[settled]] = strengths[settled]
        rows, wins, strengths = rows[~settled], wins[~settled], strengths[~settled]
    return np.asarray(found - found.mean(axis=1, keepdims=True), np.float64)


def _newton_step(wins: Floats, strengths: Floats) -> tuple[Floats, Floats]:
    """Step (b, K), shortened so that it cannot miss the maximum, and (b,) the largest change of a difference in it.

    The negative Hessian is the Laplacian of a graph with weights n_ij p_ij p_ji. It says nothing of a common shift;
    a constant matrix beside it fixes the sum of the step to 0, for the gradient's sum is 0.
    """
    players = wins.shape[-1]
    losing = _sigmoid(strengths[:, None, :] - strengths[:, :, None])  # (b, K, K) P(the column beats the row)
    # wins times the chance of the other outcome: no difference of two large numbers where one side wins nearly all
    surprise = wins * losing
    gradient = (surprise - surprise.swapaxes(1, 2)).sum(axis=2)  # (b, K)
    weights = (wins + wins.swapaxes(1, 2)) * losing * losing.swapaxes(1, 2)
    degree = weights.sum(axis=2)
    shift = np.where(degree.sum(axis=1) > 0, degree.mean(axis=1) / players, 1.0)  # a lone player has no weights
    laplacian = shift[:, None, None] - weights
    laplacian[:, np.arange(players), np.arange(players)] += degree
    step = np.linalg.solve(laplacian, gradient[:, :, None])[:, :, 0]
    largest = step.max(axis=1) - step.min(axis=1)
    whole = np.divide(np.log1p(largest), largest, out=np.ones_like(largest), where=largest > 0)
    return step * whole[:, None], largest


def _sigmoid(x: Floats) -> Floats:
    # not by tanh: small probabilities keep all their digits
    return np.asarray(1.0 / (1.0 + np.exp(np.clip(-x, -700.0, 700.0))), np.float64)


def _checked(wins: ArrayLike) -> Floats:
    table = np.array(wins, np.float64)
    if table.ndim < 2 or table.shape[-1] != table.shape[-2] or not table.shape[-1]:
        raise ValueError(f"wins must be a table (..., K, K) of K players, got shape {table.shape}")
    players = np.arange(table.shape[-1])
    table[..., players, players] = 0.0
    if not np.isfinite(table).all() or (table < 0).any():
        raise ValueError("wins must be finite and not negative")
    return table
