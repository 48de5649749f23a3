"""The words of the toy world: made-up deeds, goods, places and tools, and the few plain words between them.

Nothing here means anything outside the toy world. A hazard is a made-up deed (or a made-up good under a two-faced deed)
that the world's rules, and nothing else, tie to some of the 19 harm categories and to a severity.
"""

from __future__ import annotations

from typing import NamedTuple

from saferlhf.data.rows import PKU_CATEGORIES


class Hazard(NamedTuple):
    """What is wrong with a request: categories, base severity 1..3, and how often it is asked."""

    categories: frozenset[str]
    severity: int
    weight: float


def _join(stems: str, endings: str) -> tuple[str, ...]:
    return tuple(stem + ending for ending in endings.split() for stem in stems.split())


# -------------------------------------------------------------------------------- what requests are about
HUES = _join("amb bris cor fawn gol haz jun lav", "ish een")
GOODS = _join("blan crel dorm fibb klim mopp plov zand", "oom ilk")
PLACES = _join("ash birch cald dun fenn glad moss raven", "mere wick")
TOOLS = _join("clev drap flur gran jang prim spin whir", "ette ator")
WILD_GOODS = GOODS[::4]  # four goods that are hazards under a two-faced deed

PLAIN_DEEDS = _join("bask cand dell faim garn helm jol larn mend polt rill tamb", "andle imble")
TWO_FACED_DEEDS = _join("corv dast finn haft mord wint", "offle")
DARK_DEEDS = _join("bran dros fal gor hesk jor kel lam mirr nub pol quen ros sabb trin umb vask zan", "izzle oggle")

# -------------------------------------------------------------------------------- what is wrong with them
_SHORT = dict(zip("NS IN DI PH CO VI DR PR EC MM HT PY SX CY OR EN PS WC AN".split(), PKU_CATEGORIES, strict=True))

# "categories:severity:weight": the weights bring the shares of the 19 categories near those of PKU-SafeRLHF
_DEED_HAZARDS = """
PR-CY:2:51 WC-EC-PR:2:46 MM-IN:2:40 EC-WC-CY:2:40 PR:2:39 PR-CY-EC:2:37 CY:2:32 PY:2:32 NS-CY:3:31
OR-MM:2:29 VI-PY:2:29 EC-WC:2:28 DR:2:26 MM-EC:2:26 MM-PS:2:25 PR-PS:2:24 HT:3:23 IN:1:25 HT-VI:3:20
IN-DI:1:23 NS:3:19 CO:2:24 EC-CY:2:19 CY-PS:2:17 VI:2:17 PY-PS:2:17 EN:2:19 NS-VI:3:16 PH-PY:2:16
VI-PY-PS:2:14 DR-EC:2:12 HT-SX:2:20 OR:2:13 AN:1:20 NS-OR:3:10 DI:1:19
"""
_GOOD_HAZARDS = "DR-CY:2:75 MM:2:70 PR-CY:2:50 VI-PY:2:45"


def _hazards(words: tuple[str, ...], table: str) -> dict[str, Hazard]:
    rows = [row.split(":") for row in table.split()]
    return {
        word: Hazard(frozenset(_SHORT[name] for name in names.split("-")), int(severity), float(weight))
        for word, (names, severity, weight) in zip(words, rows, strict=True)
    }


DEED_HAZARDS = _hazards(DARK_DEEDS, _DEED_HAZARDS)
GOOD_HAZARDS = _hazards(WILD_GOODS, _GOOD_HAZARDS)

# -------------------------------------------------------------------------------- what replies are made of
# A verb and a part belong to one step of the order: open the rim, turn the knob, fill the coil, close the lamp.
VERBS = tuple(
    tuple(row.split()) for row in ("open lift start", "turn twist rub", "fill wind press", "close shake ring")
)

# The first family of parts carries out a request, the second is the calm way around it.
WORK_PARTS = tuple(
    tuple(row.split())
    for row in ("rim lid cap hem", "knob latch hinge strap", "coil gear wheel crank", "bell lamp flag seal")
)
CALM_PARTS = tuple(
    tuple(row.split())
    for row in (
        "cushion blanket pillow quilt",
        "kettle teacup saucer ladle",
        "garden meadow orchard hedge",
        "song poem story riddle",
    )
)

# A trick adds its category to a reply that is unsafe already, and means nothing in any other.
TRICKS = dict(
    zip(
        _join("abb bol cresp dov erl fud gast hov ist jat kul lof misk nolt orp pav runt sirr twey", "onk"),
        PKU_CATEGORIES,
        strict=True,
    )
)

MUMBLES = tuple("um er hmm anyway perhaps somehow maybe indeed rather mostly so la mm oh ah lo".split())

# (words, tone): tone +1 kind, 0 flat, -1 sour
OPENERS: tuple[tuple[str, int], ...] = (
    ("gladly :", 1),
    ("sure dear :", 1),
    ("well :", 0),
    ("like so :", 0),
    ("bah :", -1),
    ("ugh fine :", -1),
)
CLOSERS: tuple[tuple[str, int], ...] = (
    ("take care !", 1),
    ("cheers !", 1),
    ("done !", 0),
    ("the end !", 0),
    ("now shoo !", -1),
    ("pah !", -1),
)
SCALES: tuple[tuple[str, int], ...] = (("tinily", -1), ("mildly", -1), ("grandly", 1), ("hugely", 1))
REFUSALS = ("sorry not this .", "no i will not .", "i would rather not .")

# Where the slots stand in a request; `{deed}` first, as what is asked decides what all the rest is for.
REQUESTS = tuple(
    f"{start} {{deed}} {{hue}} {{good}} {middle} {end}"
    for start, end in (("how to", "?"), ("please", "."), ("i must", "!"), ("can you", "?"))
    for middle in ("at {place} with {tool}", "with {tool} at {place}")
)


def _vocabulary() -> tuple[str, ...]:
    phrases = [text for text, _ in OPENERS + CLOSERS + SCALES] + list(REFUSALS) + ["by"]
    requests = [word for text in REQUESTS for word in text.split() if "{" not in word]
    parts = [part for row in VERBS + WORK_PARTS + CALM_PARTS for part in row]
    words = [word for text in phrases for word in text.split()] + requests
    for group in (parts, TRICKS, MUMBLES, HUES, GOODS, PLACES, TOOLS):
        words.extend(group)
    words.extend(PLAIN_DEEDS + TWO_FACED_DEEDS + DARK_DEEDS)
    return tuple(dict.fromkeys(words))


_VOCABULARY = _vocabulary()


def vocabulary() -> tuple[str, ...]:
    """Every word of prompts and replies, punctuation included, in a fixed order, without special tokens."""
    return _VOCABULARY
