"""Noise belongs to its key; draws follow the distribution; margins say how close another token was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor

from saferlhf.rollout.draw import BLOCK, draw, exponential_noise, row_key

P = torch.tensor([0.1, 0.2, 0.0, 0.4, 0.3], dtype=torch.float64)
MASK = (1 << 64) - 1


def keys(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


# ------------------------------------------------------------------------------------------------ noise
def python_noise(key: int, position: int, token: int) -> float:
    """The same with Python's integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    base = mix((key + 0x9E3779B97F4A7C15 * (position + 1)) & MASK)
    bits = mix((base + (token + 1) * 0xD1B54A32D192ED03) & MASK) >> 11
    return -math.log((bits + 0.5) / 2**53)


def test_the_hash_is_splitmix() -> None:
    """Published first outputs of SplitMix64 with seed 0, of which position 0 and key 0 is the first."""
    from saferlhf.rollout.draw import _mix, _signed

    found = [int(_mix(keys(_signed(0x9E3779B97F4A7C15 * n)))) & MASK for n in (1, 2, 3)]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("position", [0, 1, 500])
def test_noise_is_what_pythons_integers_give(position: int) -> None:
    given = [0, 1, -1, row_key(0, 0, "a", 0), (1 << 63) - 1, -(1 << 63)]
    found = exponential_noise(keys(*given), position, 40)
    expected = [[python_noise(key & MASK, position, token) for token in range(40)] for key in given]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_noise_belongs_to_its_key() -> None:
    given = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1)]
    # no confusion of neighbouring keys either
    given += [(11, 0, "a", 0), (1, 10, "a", 0), (1, 1, "0\x00a", 0), (0, 0, "a", 10), (0, 0, "a0", 0)]
    found = [row_key(*key) for key in given]
    assert len(set(found)) == len(found) and row_key(*given[0]) == found[0]
    noise = exponential_noise(keys(*found), 3, 100)
    assert torch.equal(exponential_noise(keys(found[4]), 3, 100)[0], noise[4]), "neighbours do not matter"
    assert torch.equal(exponential_noise(keys(*found), 3, 7), noise[:, :7]), "a larger vocabulary extends a smaller one"
    many = exponential_noise(keys(*range(1000)), 3, 200)  # more than one block
    assert BLOCK < 1000 * 200 and torch.equal(many[999], exponential_noise(keys(999), 3, 200)[0])
    assert exponential_noise(keys(), 0, 5).shape[0] == 0


def test_noise_is_exponential_and_independent() -> None:
    """Over tokens, positions and keys that lie side by side."""
    given = keys(*range(50))
    cube = torch.stack([exponential_noise(given, position, 50) for position in range(50)]).numpy()  # (50, 50, 50)
    assert (cube > 0).all() and kstest(cube.ravel(), "expon").pvalue > 0.001
    for axis in range(3):
        left, right = np.delete(cube, 0, axis), np.delete(cube, -1, axis)
        correlation = np.corrcoef(left.ravel(), right.ravel())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(left.size)


# ------------------------------------------------------------------------------------------------ draws
def drawn(rows: int = 20_000, **options: float) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) tokens and log-probabilities."""
    given = {"temperature": 1.0, **options}
    noise = exponential_noise(torch.arange(rows), 0, len(P))
    tokens, logprobs, _ = draw(P.log().expand(rows, -1), noise, **given)  # type: ignore[arg-type]
    return tokens.numpy(), logprobs.numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    q = (P ** (1 / temperature) / (P ** (1 / temperature)).sum()).numpy()
    tokens, logprobs = drawn(temperature=temperature)
    np.testing.assert_allclose(logprobs, np.log(q[tokens]), atol=1e-12)
    counts = np.bincount(tokens, minlength=5)
    assert counts[2] == 0
    possible = q > 0
    assert chisquare(counts[possible], len(tokens) * q[possible]).pvalue > 0.001


def test_tokens_and_margins_by_hand() -> None:
    """p / E = 0.5 / 1, 0.25 / 0.2, 0.25 / 1: the second wins, and the first would if its logit grew by ln 2.5."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    token, logprob, margin = draw(logits, torch.tensor([[1.0, 0.2, 1.0]], dtype=torch.float64), 1.0)
    assert int(token) == 1 and float(logprob) == pytest.approx(math.log(0.25))
    assert float(margin) == pytest.approx(math.log(2.5), abs=1e-6)
    changed = logits + torch.tensor([[math.log(2.5) + 1e-4, 0.0, 0.0]])
    assert int(draw(changed, torch.tensor([[1.0, 0.2, 1.0]], dtype=torch.float64), 1.0)[0]) == 0
    # at temperature 2 the margin is that of the logits all the same
    noise = torch.tensor([[1.0, 0.2, 1.0]], dtype=torch.float64)
    _, _, margin = draw(2 * logits, noise, 2.0)
    assert float(margin) == pytest.approx(2 * math.log(2.5), abs=1e-6)


def test_margins_without_a_rival_and_of_the_greedy() -> None:
    noise = torch.ones(1, 3, dtype=torch.float64)
    assert float(draw(torch.tensor([[0.0, -torch.inf, -torch.inf]]), noise, 1.0)[2]) == math.inf
    assert float(draw(torch.tensor([[0.0]]), noise[:, :1], 1.0)[2]) == math.inf
    token, logprob, margin = draw(torch.tensor([[1.0, 3.0, 2.5]]), noise[:, :0], 0)
    assert (int(token), float(logprob), float(margin)) == (1, 0, 0.5)
    for temperature in (0.0, 1.0):
        for wrong in (math.nan, math.inf):
            assert draw(torch.tensor([[1.0, wrong, 2.5]]), noise, temperature)[1].isnan().all()


@pytest.mark.parametrize("vocabulary", [10, 1000, 50_000])
def test_margins_are_rarely_small_whatever_the_vocabulary(vocabulary: int) -> None:
    """The chance of a margin below m is m times the chance that two draws differ."""
    rows = 100 if vocabulary > 1000 else 400
    logits = 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    _, _, margin = draw(logits, exponential_noise(torch.arange(rows), 0, vocabulary), 1.0)
    differ = 1 - torch.softmax(logits.double(), dim=-1).square().sum(dim=-1).mean()
    share, expected = float((margin < 0.1).double().mean()), 0.1 * float(differ)
    assert abs(share - expected) < 4 * math.sqrt(expected / rows) + 0.01


@pytest.mark.parametrize(
    ("cut", "left"),
    [
        ({"top_k": 2}, [3, 4]),
        ({"top_k": 1}, [3]),
        ({"top_p": 0.5}, [3, 4]),
        ({"top_p": 0.39}, [3]),
        ({"top_p": 0.05}, [3]),
        ({"top_p": 0.71}, [1, 3, 4]),
        ({"top_k": 3, "top_p": 0.5}, [3, 4]),
        ({"top_k": 99}, [0, 1, 3, 4]),
    ],
)
def test_what_is_cut_off_is_not_drawn_and_the_rest_is_renormalised(cut: dict[str, float], left: list[int]) -> None:
    tokens, logprobs = drawn(500, **cut)
    assert sorted(set(tokens.tolist())) == left
    mass = float(P[left].sum())
    np.testing.assert_allclose(logprobs, np.log(P.numpy()[tokens] / mass), atol=1e-9)
