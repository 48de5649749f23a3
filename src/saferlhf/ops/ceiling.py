"""What accuracy a judge can at best be expected to have on labels that one annotator each has given.

Labels are not the truth: two annotators of the same row differ now and then, and a judge that is right where the
annotator was wrong is counted wrong. How often two annotators agree says how high a judge can come.

Model (Dawid and Skene 1979, with two equally good annotators and two classes): each annotator gives the true label with
probability p, one error independent of the other, whatever the row and its class. Two of them agree where both are
right or both are wrong,

    a = p^2 + (1 - p)^2,    so    p = (1 + sqrt(2 a - 1)) / 2

A judge that is always right agrees with one annotator's label with probability p: the ceiling. A judge as good as an
annotator reaches a. In general a judge that is right with probability q, independently, reaches q p + (1 - q)(1 - p).

Rows differ in how hard they are, and then p is still a bound. Let g be the probability of a row's likelier label. No
judge can expect more than E[g], whoever is right; and a = E[g^2 + (1 - g)^2] gives 2 a - 1 = E[(2 g - 1)^2] >=
(2 E[g] - 1)^2 (Jensen), hence E[g] <= p. So an accuracy above p, beyond its interval, tells that labels and judge share
something that annotators do not: that two annotators differ in quality, that labels were given together (with a model's
help, say), or that rows leaked.
"""

from __future__ import annotations

from math import sqrt

BEAVERTAILS_AGREEMENT = {"safety": 0.8168, "helpfulness": 0.6239, "harmlessness": 0.6091}
"""Agreement rates of BeaverTails (Ji et al. 2023), as reported in a translation and in summaries of the paper.

Its 30k set has one annotator for each row; the 330k set has 3.34 labels for each.
"""

SAFE_RLHF_AGREEMENT = {"helpfulness": 0.6900, "safety": 0.6653, "single": 0.6165}
"""Agreement rates of Safe RLHF (Dai et al. 2023), as reported in a note on the paper.

Helpfulness and safety were asked apart, `single` is one mixed preference. For PKU-SafeRLHF no number was found.
"""


def expected_ceiling(agreement: float) -> float:
    """What a judge that is always right is expected to reach on one annotator's labels: p = (1 + sqrt(2 a - 1)) / 2.

    Args:
        agreement: a, share of rows of two classes on which two independent annotators give the same label; chance
            correction is not wanted (no kappa).

    Returns:
        p in [0.5, 1]: 0.9 for an agreement of 0.82.

    Raises:
        ValueError: a lies outside [0.5, 1]. Equally good annotators agree on half of the rows when they guess; less
            means that they understand the labels differently.
    """
    if not 0.5 <= agreement <= 1.0:
        raise ValueError(f"agreement of two annotators on two classes must lie between 0.5 and 1, got {agreement}")
    return (1.0 + sqrt(2.0 * agreement - 1.0)) / 2.0


def accuracy_on_labels(right: float, agreement: float) -> float:
    """What a judge is expected to reach on one annotator's labels: q p + (1 - q)(1 - p).

    Args:
        right: q, probability that the judge gives the true label, independently of the annotator.
        agreement: as `expected_ceiling`.

    Returns:
        `expected_ceiling(agreement)` for q = 1, `agreement` for a judge as good as an annotator, 0.5 for a coin.

    Raises:
        ValueError: `right` is no probability, or the agreement is out of its range.
    """
    if not 0.0 <= right <= 1.0:
        raise ValueError(f"right must lie between 0 and 1, got {right}")
    p = expected_ceiling(agreement)
    return right * p + (1.0 - right) * (1.0 - p)
