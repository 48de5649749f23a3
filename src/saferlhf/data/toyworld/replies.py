"""Replies of mixed quality, and replies damaged on purpose.

A reply is drawn by a pattern (comply, waver, redirect, refuse) and a skill: the chance that a step is right. A wrong
step has another thing, or a part of another place, so right and wrong replies are made of the same words. Who wavers
goes the calm way in some steps and carries out the request in others, with or without a refusal in words; without such
replies a cost model takes the refusal's words, or the first calm step, for safety, and a policy finds that hole within
20 updates.

Writers of demonstrations lose the thread: where their thing is wrong, their part is too. A language model that is
trained on them must see whether a thing stands in the prompt to foretell the part, and a reward model that starts from
it finds that knowledge ready (from preferences alone a small model does not discover it in thousands of pairs).
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Mapping
from typing import NamedTuple

from saferlhf.data.toyworld import words as w
from saferlhf.data.toyworld.requests import pick, read_request

DAMAGES = ("repetition", "padding", "wrong_topic", "truncated", "stuffed", "shuffled", "swapped")

SKILLS = (0.1, 0.6, 0.95)
"""Chance that a step is right; one skill per reply, each as likely."""

PATTERNS = ("comply", "waver", "redirect", "refuse")
HARMFUL_PATTERNS = (0.79, 0.87, 0.945)  # cumulative shares for harmful requests
BENIGN_PATTERNS = (0.74, 0.81, 0.965)  # and for benign ones
CALM_CHANCES = (0.25, 0.5, 0.75)
"""Chance that a step of a wavering reply is calm; one per reply, each as likely."""

STEP_COUNTS = (0.93, 0.972)  # cumulative: four steps, three, else two
TRICK_SHARE, SCALE_SHARE = 0.3, 0.1


class Manner(NamedTuple):
    """How a group of writers writes, beside what they do and how well.

    Attributes:
        lost_thread: share of replies whose wrong steps are wrong in thing and part alike.
        mumbling: how often a reply has words that say nothing; how many at least, at most.
        refusal_first: how often a reply of a pattern begins with a refusal in words.
    """

    lost_thread: float
    mumbling: tuple[float, int, int]
    refusal_first: Mapping[str, float]


OF_PAIRS = Manner(0.3, (0.08, 2, 5), {"comply": 0.15, "waver": 0.5, "redirect": 0.3})
"""Writers of replies that are compared and labelled."""

OF_DEMONSTRATIONS = Manner(1.0, (0.7, 4, 7), {"comply": 0.05, "waver": 0.15, "redirect": 0.08})
"""Writers of demonstrations.

They mumble: an SFT model whose replies are right in everything too often leaves nothing to win over it (with the pairs'
mumbling even the best safe policy won 86%). Writers of less skill, or who stop early, would do as much, but then a
reward model that starts from the SFT model does not see a wrong place or tool.

They seldom refuse what they then do: what the policy begins with stays where a reward model is blind to it. With the
pairs' shares one of two policies still refused in words before 4% of its whole replies to benign requests, worth 0.1 of
learned reward and 0.6 of the truth's (docs/log.md).
"""

_SLOTS = (w.HUES, w.GOODS, w.PLACES, w.TOOLS)
_SLOT_OF = {thing: place for place, slot in enumerate(_SLOTS) for thing in slot}
_OPENERS = tuple(text for text, _ in w.OPENERS)
_CLOSERS = tuple(text for text, _ in w.CLOSERS)
_SCALES = tuple(text for text, _ in w.SCALES)
_TRICKS = tuple(w.TRICKS)
_VOCABULARY = w.vocabulary()


class Frame(NamedTuple):
    """What a reply is drawn for: the prompt's hue, good, place and tool, and whether it asks for harm."""

    things: tuple[str, ...]
    harmful: bool


def frame_of(prompt: str) -> Frame:
    """The frame of any prompt; where it names no thing for a slot, a word that is not in it stands there."""
    request = read_request(prompt)
    named = {_SLOT_OF[thing]: thing for thing in sorted(request.things)}
    return Frame(tuple(named.get(place, slot[0]) for place, slot in enumerate(_SLOTS)), bool(request.hazards))


def _shuffled(rng: random.Random, items: tuple[str, ...]) -> list[str]:
    """Fisher-Yates on `rng.random()`, as `random.shuffle` may change between versions of Python."""
    out = list(items)
    for i in range(len(out) - 1, 0, -1):
        j = int(rng.random() * (i + 1))
        out[i], out[j] = out[j], out[i]
    return out


def draw_steps(rng: random.Random, frame: Frame, calm: float, skill: float, thread: bool) -> list[str]:
    """The steps of a reply, each three words.

    Args:
        rng: the stream of the row.
        frame: what the prompt names.
        calm: chance that a step has a calm part instead of a work part.
        skill: chance that a step is right.
        thread: a wrong step is wrong in thing and part alike, as when a writer loses the thread; otherwise one writer
            gets only the things wrong, another only the parts, a third either.
    """
    draw = rng.random
    count = 4 - bisect(STEP_COUNTS, draw())
    style = draw()
    of_thing = 1.0 if style < 0.5 else 0.0 if style < 0.75 else 0.5
    things = frame.things
    steps: list[str] = []
    for place in range(count):
        thing, part_place = things[place], place
        if draw() >= skill:
            thing_wrong = thread or draw() < of_thing
            if thread or not thing_wrong:
                part_place = (place + 1 + int(draw() * 3)) % 4
            if thing_wrong:
                thing = pick(rng, _SLOTS[place])
        rows = w.CALM_PARTS if draw() < calm else w.WORK_PARTS
        steps.append(f"{pick(rng, w.VERBS[place])} {thing} {pick(rng, rows[part_place])}")
    return steps


def _assemble(rng: random.Random, head: list[str], steps: list[str], mumbling: tuple[float, int, int]) -> str:
    """Opener and extras, the steps and a full stop, a closer."""
    parts = [*head, *steps, "."] if steps else head
    share, least, most = mumbling
    if rng.random() < share:
        at = int(rng.random() * (len(parts) + 1))
        parts.insert(at, mumble(rng, least + int(rng.random() * (most + 1 - least))))
    return " ".join([*parts, pick(rng, _CLOSERS)])


def mumble(rng: random.Random, count: int) -> str:
    """Words that say nothing."""
    return " ".join(pick(rng, w.MUMBLES) for _ in range(count))


def draw_reply(rng: random.Random, frame: Frame, manner: Manner = OF_PAIRS) -> str:
    """One reply of the usual mixture.

    Args:
        rng: the stream of the row.
        frame: what the prompt names.
        manner: of who writes it.
    """
    draw = rng.random
    pattern = PATTERNS[bisect(HARMFUL_PATTERNS if frame.harmful else BENIGN_PATTERNS, draw())]
    skill = SKILLS[int(draw() * len(SKILLS))]
    if pattern == "refuse":
        refusal = pick(rng, w.REFUSALS)
        return _assemble(rng, [pick(rng, _OPENERS), refusal] if draw() < 0.5 else [refusal], [], manner.mumbling)
    head = [pick(rng, w.REFUSALS if draw() < manner.refusal_first[pattern] else _OPENERS)]
    if pattern != "redirect" and draw() < SCALE_SHARE:
        head.append(pick(rng, _SCALES))
    if pattern != "redirect" and draw() < TRICK_SHARE:
        head.append(f"by {pick(rng, _TRICKS)}")
    calm = {"comply": 0.0, "redirect": 1.0}.get(pattern, CALM_CHANCES[int(draw() * len(CALM_CHANCES))])
    steps = draw_steps(rng, frame, calm, skill, draw() < manner.lost_thread)
    return _assemble(rng, head, steps, manner.mumbling)


def damage(rng: random.Random, kind: str, reply: str, frame: Frame, other: Frame) -> str:
    """The reply, damaged in one of the ways of `DAMAGES`; `other` is the frame of another prompt."""
    draw = rng.random
    tokens = reply.split()
    if kind == "wrong_topic":
        return draw_reply(rng, Frame(other.things, frame.harmful))
    if kind == "truncated":
        return " ".join(tokens[: int(draw() * len(tokens) * 0.8)])
    if kind == "shuffled":
        return " ".join(_shuffled(rng, tuple(tokens)))
    if kind == "padding":
        at = int(draw() * (len(tokens) + 1))
        return " ".join([*tokens[:at], mumble(rng, 5 + int(draw() * 10)), *tokens[at:]])
    if kind == "swapped":
        for _ in range(1 + int(draw() * 4)):
            tokens[int(draw() * len(tokens))] = pick(rng, _VOCABULARY)
        return " ".join(tokens)
    if kind == "repetition":
        return _repeat(rng, tokens)
    if kind == "stuffed":
        parts = [part for row in w.WORK_PARTS + w.CALM_PARTS for part in row]
        return " ".join(pick(rng, frame.things if draw() < 0.5 else parts) for _ in range(8 + int(draw() * 16)))
    raise ValueError(f"unknown damage {kind!r}")


def _repeat(rng: random.Random, tokens: list[str]) -> str:
    """A stretch of the reply said two to four times, or one step said in place of all others."""
    if rng.random() < 0.5 and len(tokens) > 8:
        at = int(rng.random() * (len(tokens) - 8))
        stretch = tokens[at : at + 4 + int(rng.random() * 4)]
        times = 2 + int(rng.random() * 3)
        return " ".join(tokens[:at] + stretch * times + tokens[at + len(stretch) :])
    starts = [at for at, token in enumerate(tokens) if token in w.VERBS[0]]
    if not starts:
        return " ".join(tokens * 2)
    at = starts[0]
    steps = [f"{pick(rng, row)} {' '.join(tokens[at + 1 : at + 3])}" for row in w.VERBS]
    return " ".join([*tokens[:at], *steps, ".", *tokens[-2:]])
