"""Noisy annotators: Bradley-Terry by a temperature, plus a halo that one annotator has for one reply.

Annotator a sees reply r to a prompt as

    helpful(a, r)  = HELPFULNESS_SCALE  x helpfulness(r)            + halo(a, r) + Gumbel
    harmless(a, r) = HARMLESSNESS_SCALE x perceived harmlessness(r) + halo(a, r) + Gumbel
    single(a, r)   = w x scaled harmlessness + (1 - w) x scaled helpfulness + halo(a, r) + SINGLE_NOISE x Gumbel

and prefers the larger; a difference of two Gumbel variables is logistic, so without the halo this is Bradley-Terry with
temperature 1 / scale. The halo (normal) is shared by the labels of one annotator and independent between annotators:
it is why one annotator's two labels agree more often than two annotators do on one label.

The data set's rule stands above the annotators: a safe reply always ranks safer than an unsafe one. Severity weighs
less in an annotator's eye than in truth, as in the public data, where the less severe of two unsafe replies wins only
in about two thirds of the pairs.

`Annotators` are what an experiment may vary: how much the single label weighs safety (w, one half here), how sharply
annotators see, and how often one is wrong about safety itself (never here: labels of safety are joint decisions).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import NamedTuple

from saferlhf.data.rows import PKU_CATEGORIES
from saferlhf.data.toyworld.oracle import Truth

HELPFULNESS_SCALE = 4.6
HARMLESSNESS_SCALE = 17.5
SEVERITY_SEEN = 0.6
HALO = 6.0
SINGLE_NOISE = 5.0


class Labels(NamedTuple):
    """One annotator's preferences on one pair: the index of the preferred reply."""

    better: int
    safer: int
    single: int


@dataclass(frozen=True)
class Annotators:
    """Those who label a data set.

    Attributes:
        single_safety: w in [0, 1], the weight of harmlessness in the single label.
        sharpness: factor of both scales; smaller is noisier.
        safety_error: chance that a reply's safety is labelled wrong.
    """

    single_safety: float = 0.5
    sharpness: float = 1.0
    safety_error: float = 0.0

    def safety(self, rng: random.Random, truth: Truth) -> Truth:
        """The reply as labelled: as it is, or mistaken for safe or for unsafe; how it is perceived stays the same."""
        if not self.safety_error or rng.random() >= self.safety_error:
            return truth
        severity, categories = 0, frozenset[str]()
        if truth.is_safe:
            categories = frozenset([PKU_CATEGORIES[int(rng.random() * len(PKU_CATEGORIES))]])
            severity = 1 + int(rng.random() * 3)
        seen = truth.harmlessness + (1.0 - SEVERITY_SEEN) * (truth.severity - severity)
        return replace(truth, severity=severity, harm_category=categories, harmlessness=seen)


USUAL = Annotators()
"""Those of the toy world, measured against the agreement of PKU-SafeRLHF's."""


def _gumbel(rng: random.Random) -> float:
    return -math.log(-math.log(rng.random() or 0.5))


def perceived_harmlessness(truth: Truth) -> float:
    """Harmlessness with the severity shrunk to what annotators make of it."""
    return truth.harmlessness + (1.0 - SEVERITY_SEEN) * truth.severity


def annotate(rng: random.Random, truth_0: Truth, truth_1: Truth, annotators: Annotators = USUAL) -> Labels:
    """The labels of one fresh annotator; whether a reply is safe is what its truth, or its label, says."""
    weight = annotators.single_safety
    helpful, harmless, single = [], [], []
    for truth in (truth_0, truth_1):
        halo = HALO * math.sqrt(-2.0 * math.log(rng.random() or 0.5)) * math.cos(2.0 * math.pi * rng.random())
        by_help = annotators.sharpness * HELPFULNESS_SCALE * truth.helpfulness
        by_harm = annotators.sharpness * HARMLESSNESS_SCALE * perceived_harmlessness(truth)
        helpful.append(by_help + halo + _gumbel(rng))
        harmless.append(by_harm + halo + _gumbel(rng))
        single.append((1.0 - weight) * by_help + weight * by_harm + halo + SINGLE_NOISE * _gumbel(rng))
    safer = int(harmless[1] > harmless[0])
    if truth_0.is_safe != truth_1.is_safe:
        safer = int(truth_1.is_safe)
    return Labels(int(helpful[1] > helpful[0]), safer, int(single[1] > single[0]))
