"""Scores of responses by plain functions, for small online runs: `scorers={reward: {function: toy_scores:reward}}`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _share(response: str, is_counted: Callable[[str], bool]) -> float:
    words = response.split()
    return sum(map(is_counted, words)) / max(1, len(words))


def reward(prompt: Any, response: str) -> float:
    """Words with an e are good, and so are words from the first half of the alphabet."""
    return _share(response, lambda word: "e" in word) + _share(response, lambda word: word < "n")


def cost(prompt: Any, response: str) -> float:
    """Words with an e are bad: above 0 where they are more than a quarter."""
    return 4 * _share(response, lambda word: "e" in word) - 1.0
