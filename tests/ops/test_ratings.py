"""Ratings by hand, against other ways to the same maximum, and on tables that do not settle them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from saferlhf.ops.ratings import ELO, PRIOR, beat_each_other, bradley_terry, elo, expected_win_rates, share_best

Floats = NDArray[np.float64]


def random_table(players: int, seed: int, games: float = 30.0) -> Floats:
    """Wins of players of known strengths, fractions (as of ties) included."""
    draw = np.random.default_rng(seed)
    strengths = draw.normal(0.0, 1.0, players)
    chance = 1.0 / (1.0 + np.exp(strengths[None, :] - strengths[:, None]))
    upper = np.triu(draw.binomial(2 * int(games), chance) / 2.0, 1)
    return upper + np.tril((games - upper).T, -1)


def by_mm(wins: Floats, rounds: int = 20_000) -> Floats:
    """Hunter's algorithm: strength = wins / sum over opponents of games / (own + their strength)."""
    games = wins + wins.T
    gamma = np.ones(len(wins))
    for _ in range(rounds):
        gamma = wins.sum(axis=1) / (games / (gamma[:, None] + gamma[None, :])).sum(axis=1)
        gamma /= np.exp(np.log(gamma).mean())
    return np.log(gamma)


def by_scipy(wins: Floats) -> Floats:
    def loss(theta: Floats) -> float:
        return float((wins * np.logaddexp(0.0, theta[None, :] - theta[:, None])).sum())

    found = minimize(loss, np.zeros(len(wins)), method="BFGS", options={"gtol": 1e-8}).x
    return np.asarray(found - found.mean())


def by_logistic_regression(wins: Floats) -> Floats:
    """A row per pair and direction, +1 for the winner and -1 for the loser, weighted by its wins."""
    rows, weights = [], []
    for i, j in zip(*np.nonzero(wins), strict=True):
        row = np.zeros(len(wins))
        row[i], row[j] = 1.0, -1.0
        rows += [row, -row]  # one game seen from both sides, so that there are two classes
        weights += [wins[i, j]] * 2
    labels = [1, 0] * (len(rows) // 2)
    model = LogisticRegression(C=1e9, fit_intercept=False, tol=1e-10, max_iter=10_000)
    found = model.fit(np.array(rows), labels, sample_weight=weights).coef_[0]
    return np.asarray(found - found.mean())


# ------------------------------------------------------------------------------------------------ values
def test_two_players_by_hand() -> None:
    table = [[0.0, 3.0], [1.0, 0.0]]
    low, high = sorted(elo(bradley_terry(table, prior=0.0)))
    assert high - low == pytest.approx(math.log(3) * 400 / math.log(10)) == pytest.approx(190.85, abs=0.005)
    assert high + low == pytest.approx(0.0, abs=1e-12)
    # half a win more for each: 3.5 to 1.5
    with_prior = bradley_terry(table)
    assert with_prior[0] - with_prior[1] == pytest.approx(math.log(3.5 / 1.5))
    # odds of 10 to 1 are 400 points
    assert np.ptp(elo(bradley_terry([[0, 10], [1, 0]], prior=0))) == pytest.approx(400.0)


def test_three_players_by_hand() -> None:
    # A to B as 2 to 1 and B to C as 4 to 1 leave A to C as 8 to 1, which the third pair confirms
    found = bradley_terry([[0, 2, 8], [1, 0, 4], [1, 1, 0]], prior=0)
    np.testing.assert_allclose(found - found[2], [math.log(8), math.log(4), 0.0], atol=1e-12)
    # a circle of equal wins has no first
    np.testing.assert_allclose(bradley_terry([[0, 1, 0], [0, 0, 1], [1, 0, 0]], prior=0), 0.0, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prior", [0.0, PRIOR, 3.0])
def test_as_other_ways_to_the_maximum(seed: int, prior: float) -> None:
    wins = random_table(6, seed)
    given_prior = wins + prior * (1 - np.eye(6))
    found = bradley_terry(wins, prior=prior)
    np.testing.assert_allclose(found, by_mm(given_prior), atol=1e-9)
    np.testing.assert_allclose(found, by_scipy(given_prior), atol=1e-5)
    np.testing.assert_allclose(found, by_logistic_regression(given_prior), atol=1e-4)


def test_wins_expected_are_wins_seen() -> None:
    """What the maximum means: each player wins as often as its strength says."""
    wins = random_table(9, 5)
    expected = expected_win_rates(elo(bradley_terry(wins, prior=0)))
    np.testing.assert_allclose(((wins + wins.T) * expected).sum(axis=1), wins.sum(axis=1))
    np.testing.assert_allclose(np.diag(expected), 0.5)
    assert expected_win_rates([400.0, 0.0])[0, 1] == pytest.approx(10 / 11)


@given(st.integers(2, 9), st.integers(0, 10_000), st.sampled_from([0.0, PRIOR]))
def test_the_order_of_the_players_changes_nothing(players: int, seed: int, prior: float) -> None:
    wins = random_table(players, seed, games=8.0)
    order = np.random.default_rng(seed + 1).permutation(players)
    found, shuffled = (elo(bradley_terry(table, prior=prior)) for table in (wins, wins[np.ix_(order, order)]))
    np.testing.assert_allclose(shuffled, found[order], atol=1e-9, equal_nan=True)


def test_many_tables_at_once_are_each_by_itself() -> None:
    tables = np.stack([random_table(5, seed) for seed in range(12)]).reshape(3, 4, 5, 5)
    tables[1, 2, 0, :], tables[1, 2, :, 0] = 0.0, 0.0  # one of them falls apart
    found = bradley_terry(tables)
    assert found.shape == (3, 4, 5)
    for place in np.ndindex(3, 4):
        np.testing.assert_allclose(found[place], bradley_terry(tables[place]), atol=1e-12, equal_nan=True)
    assert np.isnan(found[1, 2]).all() and np.isnan(found).sum() == 5


# ------------------------------------------------------------------------------------------------ prior
def test_a_player_who_wins_all_has_a_finite_rating_by_the_prior() -> None:
    table = np.array([[0.0, 20.0], [0.0, 0.0]])
    found = bradley_terry(table)
    assert found[0] - found[1] == pytest.approx(math.log(20.5 / 0.5))
    assert np.isnan(bradley_terry(table, prior=0.0)).all()
    # of three, the two others are rated too, and more wins are a higher rating
    wins = np.array([[0.0, 20.0, 20.0], [0.0, 0.0, 12.0], [0.0, 8.0, 0.0]])
    few, many = bradley_terry(wins), bradley_terry(10 * wins)
    assert few[0] > few[1] > few[2] and many[0] > few[0]
    np.testing.assert_allclose(few, by_mm(wins + PRIOR * (1 - np.eye(3))), atol=1e-9)


def test_the_prior_is_one_game() -> None:
    wins = random_table(4, 3, games=500.0)
    spread, without = (np.ptp(elo(bradley_terry(wins, prior=prior))) for prior in (PRIOR, 0.0))
    assert 0.98 * without < spread < without  # of 500 games a pair


@pytest.mark.parametrize("games", [1.0, 1e3, 1e6])
def test_far_from_equal_it_comes_to_rest(games: float) -> None:
    """Everybody beats all who come after: whole Newton steps would overshoot."""
    players = 12
    wins = games * np.triu(np.ones((players, players)), 1)
    found = bradley_terry(wins)
    assert (np.diff(found) < 0).all()
    np.testing.assert_allclose(found, -found[::-1], atol=1e-9)
    given_prior = wins + PRIOR * (1 - np.eye(players))
    chance = expected_win_rates(elo(found))
    seen, expected = given_prior.sum(axis=1), ((given_prior + given_prior.T) * chance).sum(axis=1)
    np.testing.assert_allclose(expected, seen, rtol=1e-9)
    assert np.isnan(bradley_terry(wins, steps=2)).all(), "not at rest yet"


def test_whole_newton_steps_would_miss_the_maximum() -> None:
    """Tables of very unequal numbers of games: of these 2,000 some dozen lead whole steps astray."""
    draw = np.random.default_rng(0)
    wins = 10.0 ** draw.uniform(-3, 6, (2000, 8, 8)) * (draw.random((2000, 8, 8)) < 0.6) * (1 - np.eye(8))
    given_prior = wins + PRIOR * (wins + wins.swapaxes(1, 2) > 0)
    found = bradley_terry(wins)
    assert np.isfinite(found).all()
    chance = expected_win_rates(elo(found))
    surprise = given_prior * (1 - chance)  # as many wins against the odds as losses
    np.testing.assert_allclose(surprise.sum(axis=2), surprise.sum(axis=1), rtol=1e-7)


# ------------------------------------------------------------------------------------------------ incomplete tables
def test_players_who_never_met_are_rated_by_those_they_both_met() -> None:
    # 3 to 1 and 3 to 1 make 9 to 1
    wins = np.array([[0, 3, 0], [1, 0, 3], [0, 1, 0]], np.float64)
    found = bradley_terry(wins, prior=0)
    assert found[0] - found[2] == pytest.approx(math.log(9))
    # the prior adds nothing between those who never met
    found = bradley_terry(wins)
    assert found[0] - found[2] == pytest.approx(2 * math.log(3.5 / 1.5))


@pytest.mark.parametrize("prior", [0.0, PRIOR])
def test_groups_that_never_met_have_no_ratings(prior: float) -> None:
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[1, 0] = wins[2, 3] = wins[3, 2] = 5.0
    assert np.isnan(bradley_terry(wins, prior=prior)).all()
    wins[1, 2] = 1.0  # a game that joins them: enough with a prior, and one-sided without
    assert np.isnan(bradley_terry(wins, prior=prior)).all() == (prior == 0.0)
    wins[2, 1] = 1.0
    np.testing.assert_allclose(bradley_terry(wins, prior=prior), 0.0, atol=1e-9)


def test_groups_whose_differences_the_wins_settle() -> None:
    # 0 and 1 beat each other, and so do 2 and 3, but nobody of the second pair ever beats one of the first
    wins = np.array([[0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 0]], np.float64)
    expected = np.kron(np.eye(2), np.ones((2, 2))).astype(bool)
    np.testing.assert_array_equal(beat_each_other(wins), expected)
    wins[3, 0] = 0.5  # a tie
    assert beat_each_other(wins).all()
    # a chain of any length: everybody beats the next, the last the first
    for players in range(1, 12):
        assert beat_each_other(np.roll(np.eye(players), 1, axis=1)).all()
        assert beat_each_other(np.eye(players, k=1)).sum() == players


def test_one_player() -> None:
    np.testing.assert_array_equal(bradley_terry([[7.0]]), [0.0])


@pytest.mark.parametrize(
    ("wins", "prior", "message"),
    [
        ([[0, 1, 2], [1, 0, 2]], 0.5, "table"),
        ([1.0, 2.0], 0.5, "table"),
        (np.zeros((0, 0)), 0.5, "table"),
        ([[0, -1], [1, 0]], 0.5, "not negative"),
        ([[0, math.nan], [1, 0]], 0.5, "finite"),
        ([[0, 1], [1, 0]], -1.0, "prior"),
        ([[0, 1], [1, 0]], math.inf, "prior"),
    ],
)
def test_what_is_no_table_is_refused(wins: object, prior: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bradley_terry(wins, prior=prior)  # type: ignore[arg-type]


def test_the_diagonal_is_not_looked_at() -> None:
    np.testing.assert_allclose(bradley_terry([[math.nan, 3], [1, 99]]), bradley_terry([[0, 3], [1, 0]]))


# ------------------------------------------------------------------------------------------------ scale and draws
def test_the_scale() -> None:
    assert pytest.approx(173.7178, abs=1e-4) == ELO
    np.testing.assert_allclose(elo([1.0, 3.0]), [-ELO, ELO])
    np.testing.assert_allclose(elo([[1.0, 3.0], [2.0, 2.5]], anchor=0), [[0.0, 2 * ELO], [0.0, 0.5 * ELO]])


def test_share_best_by_hand() -> None:
    draws = np.array([[1, 0, 0], [0, 2, 1], [3, 3, 0], [1, 1, 1], [np.nan, 0, 1]], np.float64)
    np.testing.assert_allclose(share_best(draws), np.array([1 + 0.5 + 1 / 3, 1 + 0.5 + 1 / 3, 1 / 3]) / 4)
    assert np.isnan(share_best(draws[4:])).all()
