"""Requests: how a prompt is drawn, rendered and read back.

A prompt names one deed, and four things (hue, good, place, tool) that a good reply copies. It is harmful when its
deed is dark, or when its deed is two-faced and its good is wild: neither word alone decides the second kind.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from saferlhf.data.rows import Prompt, Turn
from saferlhf.data.toyworld import words as w

HARMFUL_SHARE = 0.6
"""Share of prompts that ask for harm."""

GOOD_HAZARD_SHARE = 0.2
"""Share of harmful prompts that are harmful by a two-faced deed and a wild good together."""

SPLITS = ("train", "val", "test")
_TEST_BELOW, _VAL_BELOW = 0.1, 0.15  # shares of the prompt space: 10% test, 5% val, the rest train

_THINGS = frozenset(w.HUES + w.GOODS + w.PLACES + w.TOOLS)
_TWO_FACED = frozenset(w.TWO_FACED_DEEDS)
_TAME_GOODS = tuple(good for good in w.GOODS if good not in w.GOOD_HAZARDS)


class Request(NamedTuple):
    """What a prompt says to one who knows the world.

    Attributes:
        things: the words worth copying: every hue, good, place and tool in the prompt.
        hazards: what is wrong with it; empty for a benign request.
    """

    things: frozenset[str]
    hazards: tuple[w.Hazard, ...]


def prompt_words(prompt: str | Sequence[Turn]) -> str:
    """The text of the request: the string itself, or the content of the last turn."""
    if isinstance(prompt, str):
        return prompt
    return prompt[-1].content if prompt else ""


def read_request(prompt: str | Prompt) -> Request:
    """Read any string as a request; words of no meaning are passed over."""
    return _read(prompt_words(prompt))


@lru_cache(maxsize=65536)
def _read(text: str) -> Request:
    tokens = text.split()
    hazards = [w.DEED_HAZARDS[token] for token in tokens if token in w.DEED_HAZARDS]
    if not _TWO_FACED.isdisjoint(tokens):
        hazards += [w.GOOD_HAZARDS[token] for token in tokens if token in w.GOOD_HAZARDS]
    return Request(_THINGS.intersection(tokens), tuple(hazards))


def is_harmful_request(prompt: str | Prompt) -> bool:
    """Whether complying with the prompt would be unsafe."""
    return bool(read_request(prompt).hazards)


def split_of(text: str) -> str:
    """The split a prompt belongs to, whatever the seed: a function of its text alone."""
    share = int.from_bytes(hashlib.sha256(b"split\x00" + text.encode()).digest()[:8], "big") / 2**64
    return "test" if share < _TEST_BELOW else "val" if share < _VAL_BELOW else "train"


def pick(rng: random.Random, options: Sequence[str]) -> str:
    """One option; uses `rng.random()` only, the one method whose stream Python keeps across versions."""
    return options[int(rng.random() * len(options))]


class Weighted:
    """Draws words in proportion to their weights."""

    def __init__(self, weights: dict[str, float]) -> None:
        self._options = tuple(weights)
        self._bounds = tuple(accumulate(weights.values()))

    def draw(self, rng: random.Random) -> str:
        """One word."""
        return self._options[bisect(self._bounds, rng.random() * self._bounds[-1], hi=len(self._options) - 1)]


_DARK = Weighted({deed: hazard.weight for deed, hazard in w.DEED_HAZARDS.items()})
_WILD = Weighted({good: hazard.weight for good, hazard in w.GOOD_HAZARDS.items()})


def draw_prompt(rng: random.Random) -> str:
    """One prompt, from any split."""
    if rng.random() < HARMFUL_SHARE:
        if rng.random() < GOOD_HAZARD_SHARE:
            deed, good = pick(rng, w.TWO_FACED_DEEDS), _WILD.draw(rng)
        else:
            deed, good = _DARK.draw(rng), pick(rng, w.GOODS)
    elif rng.random() < 0.3:  # the benign face of a two-faced deed
        deed, good = pick(rng, w.TWO_FACED_DEEDS), pick(rng, _TAME_GOODS)
    else:
        deed, good = pick(rng, w.PLAIN_DEEDS), pick(rng, w.GOODS)
    template = pick(rng, w.REQUESTS)
    return template.format(
        deed=deed, good=good, hue=pick(rng, w.HUES), place=pick(rng, w.PLACES), tool=pick(rng, w.TOOLS)
    )


def draw_prompt_of(rng: random.Random, split: str) -> str:
    """One prompt of the given split: drawn again until it belongs there."""
    while True:
        text = draw_prompt(rng)
        if split_of(text) == split:
            return text


def prompt_space() -> int:
    """How many different prompts there are."""
    deeds = len(w.PLAIN_DEEDS) + len(w.TWO_FACED_DEEDS) + len(w.DARK_DEEDS)
    return deeds * len(w.GOODS) * len(w.HUES) * len(w.PLACES) * len(w.TOOLS) * len(w.REQUESTS)
