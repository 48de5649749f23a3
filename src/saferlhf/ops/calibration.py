"""Calibration: from the logits of three heads to probabilities that mean what they say, and to one consistent verdict.

Temperatures (Guo et al. 2017, arXiv 1706.04599): each head's logits are divided by one number T > 0 that minimises the
negative log-likelihood of held-out labels. Order, and so AUROC, does not change.

Probabilities. Two heads say how likely a row is unsafe: the unsafe head by u, the severity head by g_1, its logit of
severity >= 1. The second's share w of their mean is fitted together with the temperature: two estimates of one event
err less than one of them. The severity head then says how severe a row is if unsafe:

    p_unsafe = sigmoid(((1 - w) u + w g_1) / T_u)
    P(s = 0) = 1 - p_unsafe,   P(s >= k) = p_unsafe sigmoid(g_k / T_s) / sigmoid(g_1 / T_s)      for k = 1, 2, 3
    p_category = sigmoid(a_c / T_c)

so the levels sum to 1 and agree with p_unsafe.

Decisions: unsafe where p_unsafe >= its threshold. Safe: severity 0 and no category. Unsafe: severity 3 where
P(s >= 3 | s >= 1) >= its threshold, else 2 where P(s >= 2 | s >= 1) >= its threshold, else 1; every category at or
above its threshold, and if none is, the one that is least below (in log-odds). So safe <=> severity 0 <=> no category.

Fitting is for held-out rows that are not the test rows. Where the rarer side of a decision has fewer than `LEAST` rows
the default (T = 1, threshold 1/2) stays; above, log-odds of thresholds shrink by n / (n + `LEAST`), n the rarer side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_expit, logit

from saferlhf.ops.moderation import ModerationLabels, ModerationLogits, Verdicts
from saferlhf.ops.thresholds import DEFAULT, best_severity_thresholds, best_threshold, false_positive_rate

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LEAST = 10
"""Rows of the rarer side below which nothing is fitted; also the pseudo-count of the shrinkage."""

TEMPERATURES = (0.05, 20.0)
"""Bounds: on separable rows the likelihood has no optimum."""

UNSAFE_OBJECTIVES = ("macro_f1", "accuracy", "f1", "fpr@0.05")
CATEGORY_OBJECTIVES = ("f1", "accuracy", "exact_match")
SEVERITY_OBJECTIVES = ("accuracy", "kappa")


@dataclass(frozen=True)
class Objectives:
    """What each head's thresholds maximise.

    Attributes:
        unsafe: macro_f1 | accuracy | f1 | fpr@X (most unsafe rows found at a false-positive rate of at most X).
        category: f1 | accuracy (each category by itself) | exact_match (whole label sets).
        severity: accuracy | kappa (quadratic), over all rows.
    """

    unsafe: str = "macro_f1"
    category: str = "f1"
    severity: str = "accuracy"

    def __post_init__(self) -> None:
        if self.unsafe not in UNSAFE_OBJECTIVES and false_positive_rate(self.unsafe) is None:
            raise ValueError(f"unknown objective {self.unsafe!r}; one of {', '.join(UNSAFE_OBJECTIVES)}")
        if self.category not in CATEGORY_OBJECTIVES:
            raise ValueError(f"unknown objective {self.category!r}; one of {', '.join(CATEGORY_OBJECTIVES)}")
        if self.severity not in SEVERITY_OBJECTIVES:
            raise ValueError(f"unknown objective {self.severity!r}; one of {', '.join(SEVERITY_OBJECTIVES)}")


@dataclass(frozen=True)
class Calibration:
    """Temperatures and thresholds; stored with an export, applied wherever it is used.

    Attributes:
        categories: names, in the order of the category head.
        temperature_unsafe, temperature_category, temperature_severity: what logits are divided by.
        threshold_unsafe: on p_unsafe.
        thresholds_category: (C,) on p_category.
        thresholds_severity: on P(s >= 2 | s >= 1) and on P(s >= 3 | s >= 1).
        severity_share: w, what the severity head has to say in whether a row is unsafe, 0 to 1.
        rows: labelled held-out rows it was fitted on; 0: defaults, nothing was fitted.
        fitted_on: which rows, in words, as "val"; None: nothing was fitted.
        objectives: head -> what its thresholds maximise.
    """

    categories: tuple[str, ...] = ()
    temperature_unsafe: float = 1.0
    temperature_category: float = 1.0
    temperature_severity: float = 1.0
    threshold_unsafe: float = DEFAULT
    thresholds_category: tuple[float, ...] = ()
    thresholds_severity: tuple[float, float] = (DEFAULT, DEFAULT)
    severity_share: float = 0.0
    rows: int = 0
    fitted_on: str | None = None
    objectives: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.thresholds_category) != len(self.categories):
            raise ValueError(f"{len(self.thresholds_category)} thresholds for {len(self.categories)} categories")

    @classmethod
    def default(cls, categories: tuple[str, ...] = ()) -> Calibration:
        """Temperatures 1 and thresholds 1/2: what an uncalibrated model has."""
        return cls(categories=tuple(categories), thresholds_category=(DEFAULT,) * len(categories))

    @property
    def fitted(self) -> bool:
        """Whether anything was fitted at all."""
        return self.rows > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self) | {
            "categories": list(self.categories),
            "thresholds_category": list(self.thresholds_category),
            "thresholds_severity": list(self.thresholds_severity),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Calibration:
        """What `to_dict` wrote.

        Raises:
            ValueError: fields are missing, unknown, or do not fit each other.
        """
        try:
            second, third = raw["thresholds_severity"]
            return cls(
                **dict(raw)
                | {
                    "categories": tuple(raw["categories"]),
                    "thresholds_category": tuple(float(t) for t in raw["thresholds_category"]),
                    "thresholds_severity": (float(second), float(third)),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"damaged calibration: {error!r}") from error


# ------------------------------------------------------------------------------------------------ apply
def decide(logits: ModerationLogits, calibration: Calibration) -> Verdicts:
    """Calibrated probabilities and consistent decisions.

    Raises:
        ValueError: the category head and the calibration differ in their number of categories.
    """
    if logits.category is not None and logits.category.shape[1] != len(calibration.categories):
        raise ValueError(f"{logits.category.shape[1]} category logits, {len(calibration.categories)} thresholds")
    unsafe_logit = joint_unsafe(logits, calibration.severity_share) / calibration.temperature_unsafe  # (N,)
    p_unsafe = expit(unsafe_logit)
    unsafe = p_unsafe >= calibration.threshold_unsafe  # (N,)
    p_severity = severity = p_category = category = None
    if logits.severity is not None:
        at_least = severity_given_unsafe(logits.severity, calibration.temperature_severity)  # (N, 2)
        tail = np.column_stack([np.ones_like(p_unsafe), at_least, np.zeros_like(p_unsafe)])  # (N, 4) s >= 1..4
        p_severity = np.column_stack([1.0 - p_unsafe, p_unsafe[:, None] * -np.diff(tail, axis=1)])  # (N, 4)
        severity = _severity_decision(at_least, unsafe, calibration.thresholds_severity)
    if logits.category is not None:
        p_category = expit(logits.category / calibration.temperature_category)  # (N, C)
        category = _category_decision(p_category, unsafe, np.array(calibration.thresholds_category))
    return Verdicts(p_unsafe, p_severity, p_category, unsafe, severity, category, unsafe_logit)


def joint_unsafe(logits: ModerationLogits, share: float) -> Floats:
    """(N,) what the unsafe head and the severity head say together, the second with this share, before temperature."""
    if logits.severity is None or not share:
        return logits.unsafe
    return (1.0 - share) * logits.unsafe + share * logits.severity[:, 0]


def severity_given_unsafe(logits: Floats, temperature: float = 1.0) -> Floats:
    """(N, 2) P(s >= 2 | s >= 1) and P(s >= 3 | s >= 1) from cumulative logits (N, 3)."""
    logs = log_expit(logits / temperature)
    return np.exp(np.minimum(logs[:, 1:] - logs[:, :1], 0.0))


def _severity_decision(at_least: Floats, unsafe: Bools, thresholds: tuple[float, float]) -> NDArray[np.int64]:
    level = np.where(at_least[:, 1] >= thresholds[1], 3, np.where(at_least[:, 0] >= thresholds[0], 2, 1))
    return np.where(unsafe, level, 0).astype(np.int64)


def _category_decision(probabilities: Floats, unsafe: Bools, thresholds: Floats) -> Bools:
    """(N, C); none for a safe row, at least one for an unsafe row."""
    passed = probabilities >= thresholds
    if not probabilities.shape[1]:
        return passed
    nearest = np.argmax(_log_odds(probabilities) - _log_odds(thresholds), axis=1)  # (N,)
    alone = unsafe & ~passed.any(axis=1)
    passed[alone, nearest[alone]] = True
    return passed & unsafe[:, None]


def _log_odds(p: Any) -> Any:
    return logit(np.clip(p, 1e-15, 1 - 1e-15))


# ------------------------------------------------------------------------------------------------ fit
def fit_calibration(
    logits: ModerationLogits,
    labels: ModerationLabels,
    objectives: Objectives = Objectives(),
    *,
    fitted_on: str = "val",
    least: int = LEAST,
) -> Calibration:
    """Temperatures by likelihood, then thresholds by objective, on held-out rows.

    The unsafe head first; then severity and category thresholds given the unsafe decisions, so that they maximise what
    is measured over all rows.

    Args:
        logits: of N rows.
        labels: of the same rows; rows without a head's label do not count for it.
        objectives: by head.
        fitted_on: which rows these are, in words.
        least: rows of the rarer side below which a default stays, and pseudo-count of the shrinkage.
    """
    names = labels.categories if logits.category is not None else ()
    found: dict[str, Any] = asdict(Calibration.default(names))
    known = labels.unsafe >= 0
    rows = int((known | (labels.severity >= 0) | (labels.category >= 0).any(axis=1)).sum())
    found |= {"rows": rows, "fitted_on": fitted_on if rows else None, "objectives": asdict(objectives)}
    positive = labels.unsafe == 1
    joint = logits.unsafe
    if _rarer(positive[known]) >= least:
        if logits.severity is not None:
            n = _rarer(positive[known])
            share = severity_share(logits.unsafe[known], logits.severity[known, 0], positive[known]) * n / (n + least)
            joint, found["severity_share"] = joint_unsafe(logits, share), share
        temperature = binary_temperature(joint[known], positive[known])
        p = expit(joint / temperature)
        threshold = best_threshold(p[known], positive[known], objectives.unsafe)
        if false_positive_rate(objectives.unsafe) is None:  # a promised rate is not to be shrunk away
            threshold = shrunk(threshold, _rarer(positive[known]), least)
        found |= {"temperature_unsafe": temperature, "threshold_unsafe": threshold}
    decided = expit(joint / found["temperature_unsafe"]) >= found["threshold_unsafe"]  # (N,)
    if logits.severity is not None:
        found |= _fit_severity(logits.severity, labels.severity, decided, objectives.severity, least)
    if logits.category is not None:
        found |= _fit_category(logits.category, labels.category, decided, objectives.category, least)
    return Calibration(**found)


def _fit_severity(
    logits: Floats, severity: NDArray[np.int64], decided: Bools, objective: str, least: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    harmful = severity >= 1
    if harmful.sum() >= least:
        found["temperature_severity"] = severity_temperature(logits[harmful], severity[harmful])
    known = severity >= 0
    at_least = severity_given_unsafe(logits, found.get("temperature_severity", 1.0))[known]
    if (decided & known).any():
        best = best_severity_thresholds(at_least[:, 0], at_least[:, 1], decided[known], severity[known], objective)
        sides = [_rarer(severity[harmful] >= level) for level in (2, 3)]
        found["thresholds_severity"] = tuple(shrunk(t, n, least) for t, n in zip(best, sides, strict=True))
    return found


def _fit_category(
    logits: Floats, category: NDArray[np.int64], decided: Bools, objective: str, least: int
) -> dict[str, Any]:
    whole = (category >= 0).all(axis=1)  # rows with labels
    truth, open_rows = category[whole] == 1, decided[whole]
    sides = [_rarer(truth[:, c]) for c in range(truth.shape[1])]
    temperature = 1.0
    if truth.any() and sum(sides) >= least:
        temperature = binary_temperature(logits[whole].ravel(), truth.ravel())
    p = expit(logits[whole] / temperature)  # (n, C)
    single = "accuracy" if objective == "exact_match" else objective
    thresholds = [
        shrunk(best_threshold(p[:, c], truth[:, c], single, open_rows=open_rows), n, least) if n >= least else DEFAULT
        for c, n in enumerate(sides)
    ]
    if objective == "exact_match":
        thresholds = _exact_match_thresholds(p, truth, open_rows, thresholds, sides, least)
    return {"temperature_category": temperature, "thresholds_category": tuple(thresholds)}


SWEEPS, TRIED = 2, 32


def _exact_match_thresholds(
    p: Floats, truth: Bools, unsafe: Bools, start: list[float], sides: list[int], least: int
) -> list[float]:
    """Coordinate ascent on the share of rows whose whole set is right, the fallback to one category included."""
    thresholds = np.array(start)

    def exact(values: Floats) -> float:
        return float((_category_decision(p, unsafe, values) == truth).all(axis=1).mean()) if len(p) else 0.0

    best = exact(thresholds)
    for _ in range(SWEEPS):
        for c, n in enumerate(sides):
            if n < least or not unsafe.any():
                continue
            options = np.quantile(p[unsafe, c], np.linspace(0.0, 1.0, TRIED))
            for option in (shrunk(float(value), n, least) for value in options):
                trial = thresholds.copy()
                trial[c] = option
                if (value := exact(trial)) > best:
                    best, thresholds = value, trial
    return [float(t) for t in thresholds]


def binary_temperature(logits: Floats, positive: Bools) -> float:
    """T that minimises the mean binary cross-entropy of logits / T, within `TEMPERATURES`.

    Args:
        logits: (N,).
        positive: (N,).
    """
    signed = np.where(positive, logits, -logits)
    return _temperature(lambda t: float(-log_expit(signed / t).mean()))


def severity_share(unsafe: Floats, at_least_one: Floats, positive: Bools) -> float:
    """The share w that minimises the mean binary cross-entropy of ((1 - w) u + w g_1) / T at the best T > 0.

    With a = (1 - w) / T and b = w / T that is a logistic regression on (u, g_1) without intercept and with weights that
    are not negative: convex.

    Args:
        unsafe: (N,) u.
        at_least_one: (N,) g_1.
        positive: (N,).

    Returns:
        w in [0, 1]; 0 where neither logit tells the labels at all.
    """
    signed = np.where(positive, 1.0, -1.0)[:, None] * np.column_stack([unsafe, at_least_one])  # (N, 2)

    def nll(weights: Floats) -> tuple[float, Floats]:
        margin = signed @ weights
        return float(-log_expit(margin).mean()), -(expit(-margin)[:, None] * signed).mean(axis=0)

    most = 1.0 / TEMPERATURES[0]
    a, b = minimize(nll, np.array([0.5, 0.5]), jac=True, method="L-BFGS-B", bounds=[(0.0, most)] * 2).x
    return float(b / (a + b)) if a + b > 0 else 0.0


def severity_temperature(logits: Floats, severity: NDArray[np.int64]) -> float:
    """T that minimises -log P(s | s >= 1) of cumulative logits / T, within `TEMPERATURES`.

    Args:
        logits: (N, 3).
        severity: (N,) 1..3.
    """

    def nll(t: float) -> float:
        at_least = severity_given_unsafe(logits, t)  # (N, 2)
        levels = np.column_stack([1 - at_least[:, 0], at_least[:, 0] - at_least[:, 1], at_least[:, 1]])
        return float(-np.log(np.maximum(levels[np.arange(len(levels)), severity - 1], 1e-12)).mean())

    return _temperature(nll)


def _temperature(nll: Callable[[float], float]) -> float:
    """In the logarithm of T, where the likelihood has one optimum."""
    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(
        lambda x: nll(float(np.exp(x))), bounds=(low, high), method="bounded", options={"xatol": 1e-6}
    )
    return float(np.exp(found.x))


def shrunk(threshold: float, rarer: int, least: int = LEAST) -> float:
    """A fitted threshold moved towards 1/2: log-odds times n / (n + least); 1/2 itself below `least` rows.

    Args:
        threshold: fitted, on a probability.
        rarer: n, rows of the rarer side.
        least: pseudo-count.
    """
    if rarer < least:
        return DEFAULT
    return float(expit(_log_odds(threshold) * rarer / (rarer + least)))


def _rarer(positive: Bools) -> int:
    return int(min(positive.sum(), (~positive).sum()))
