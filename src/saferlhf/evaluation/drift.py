"""How far a moderator falls from the data it was trained on, over all protocols and languages of an evaluation.

Each protocol of an evaluation is *in-domain* (the model was trained on data that the protocol names in `at_home`), of
*other data*, or *off-protocol* (the model reads what it was not made for). A drop is the value on the in-domain
protocol minus the value here: positive where the model is worse away from home. For languages it is the accuracy on
English minus that on the language, of one protocol.

Two test sets are independent samples, so the interval of a drop follows from the two intervals alone, by MOVER, the
"method of variance estimates recovery" (Zou and Donner 2008, "Construction of confidence limits about effect measures:
a general approach", Statistics in Medicine 27). With estimates a, b and intervals (l_a, u_a), (l_b, u_b), a - b is in

    L = a - b - sqrt((a - l_a)^2 + (u_b - b)^2)
    U = a - b + sqrt((u_a - a)^2 + (b - l_b)^2)

which keeps the skew that intervals of shares and areas have near 0 and 1. A second in-domain protocol has no drop: its
rows may be those of the first. Languages of XSafety hold translations of the same prompts; where what is hard in one
is hard in the other, the interval is wider than it need be. Where rows have one label alone and what they would be held
against has both, accuracy and F1 are of different questions, and there is no drop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import hypot, isfinite
from typing import Any

from saferlhf.evaluation.protocol_results import Result
from saferlhf.ops.intervals import CONFIDENCE

Value = Mapping[str, float]
"""`value`, and where there is an interval `low` and `high`."""

HOME, OTHER, OFF = "in-domain", "other data", "off-protocol"
ENGLISH = "en"
UNNAMED = ("jsonl", "hub", "mix")
"""Names of `data=` that tell how rows are read and not which they are."""

_METRICS = ("auroc", "macro_f1", "accuracy", "predicted_rate", "prevalence")
_ONE_LABEL = "one label"


@dataclass(frozen=True)
class Line:
    """A protocol, or one language of it.

    Attributes:
        protocol: its name.
        language: as the metrics name it; empty: the whole protocol.
        domain: in-domain | other data | off-protocol; empty: not known.
        rows: that were judged.
        values: auroc, macro_f1, accuracy, predicted_rate, prevalence, as far as there are such; with `low` and `high`
            where the metrics have an interval.
        drops: the same metrics, of what the line is held against minus this line.
        note: what a reader must know.
    """

    protocol: str
    language: str
    domain: str
    rows: int
    values: dict[str, dict[str, float]]
    drops: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Drift:
    """One moderator over all protocols and languages of an evaluation.

    Attributes:
        trained_on: name of its training data; None: not known.
        home: the in-domain protocol that drops are counted from; None without one.
        remark: why there are no drops from in-domain; empty where there are.
        confidence: of all intervals.
        lines: protocols in falling order of AUROC, each followed by its languages in falling order of accuracy,
            those with a note last.
    """

    trained_on: str | None
    home: str | None
    remark: str
    confidence: float
    lines: list[Line]

    @property
    def protocols(self) -> list[Line]:
        """Whole protocols."""
        return [line for line in self.lines if not line.language]

    @property
    def languages(self) -> list[Line]:
        """Parts of protocols."""
        return [line for line in self.lines if line.language]

    @property
    def shown(self) -> bool:
        """Whether there is something to compare: at least two protocols."""
        return len(self.protocols) > 1

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def read(cls, plain: Mapping[str, Any] | None) -> Drift | None:
        """What `plain` gave; None of None."""
        return None if plain is None else cls(**{**plain, "lines": [Line(**line) for line in plain["lines"]]})


def drift_of(
    results: Sequence[Result],
    metrics: Mapping[str, float],
    trained_on: str | None,
    *,
    confidence: float = CONFIDENCE,
) -> Drift | None:
    """How one model does from in-domain to elsewhere.

    Args:
        results: of its protocols (`protocol_result`); those of other measures than moderation do not count.
        metrics: flat, of the same evaluation.
        trained_on: `data.name` of its training; None: not known.
        confidence: what the intervals in `metrics` were taken at.

    Returns:
        None without any protocol of moderation.
    """
    known = trained_on if trained_on not in UNNAMED else None
    protocols = [_protocol(result, metrics, known) for result in results if result["measure"] == "moderation"]
    if not protocols:
        return None
    home = max(
        (line for line in protocols if line.domain == HOME),
        key=lambda line: ("auroc" in line.values, line.rows),
        default=None,
    )
    protocols.sort(key=lambda line: -line.values.get("auroc", {}).get("value", -1.0))
    lines = []
    for line in protocols:
        if home is not None and line.domain != HOME and not line.note:
            line.drops.update(_drops(home, line, ("auroc", "macro_f1")))
        lines += [line, *_languages(line, metrics)]
    if home is None:
        return Drift(trained_on, None, _remark(trained_on), confidence, lines)
    return Drift(trained_on, home.protocol, "", confidence, lines)


def independent_difference(first: Value, second: Value) -> dict[str, float]:
    """The first minus the second, of two independent samples.

    Returns:
        `value`, and MOVER's `low` and `high` (above) where both have an interval.
    """
    a, b = first["value"], second["value"]
    found = {"value": a - b}
    if "low" in first and "low" in second:
        found["low"] = a - b - hypot(a - first["low"], second["high"] - b)
        found["high"] = a - b + hypot(first["high"] - a, b - second["low"])
    return found


# ------------------------------------------------------------------------------------------------ lines
def _protocol(result: Result, metrics: Mapping[str, float], trained_on: str | None) -> Line:
    name = result["protocol"]
    if trained_on is not None and trained_on in result["at_home"]:
        domain = HOME
    elif any(mark.startswith(OFF) for mark in result["marks"]):
        domain = OFF
    else:
        domain = "" if trained_on is None else OTHER
    values = _values(metrics, f"{name}/unsafe/")
    one = values.get("prevalence", {}).get("value") in (0.0, 1.0)
    return Line(name, "", domain, result["rows"], values, note=_ONE_LABEL if one else "")


def _languages(whole: Line, metrics: Mapping[str, float]) -> list[Line]:
    """The languages of a protocol, with the drop from English where there is English."""
    start, end = f"{whole.protocol}/by_language/", "_accuracy"
    names = [name[len(start) : -len(end)] for name in metrics if name.startswith(start) and name.endswith(end)]
    lines = []
    for name in names:
        rows = int(metrics.get(f"{start}{name}{end}_n", 0))
        lines.append(Line(whole.protocol, name, whole.domain, rows, _values(metrics, f"{start}{name}_")))
    lines.sort(key=lambda line: -line.values["accuracy"]["value"])
    english = next((line for line in lines if line.language == ENGLISH), None)
    if english is None:
        return lines
    # AUROC is there where a group has both labels
    both = [line for line in lines if "auroc" in line.values]
    one = [line for line in lines if "auroc" not in line.values]
    for line in both if english in both else one:
        if line is not english:
            line.drops.update(_drops(english, line, ("accuracy",)))
    return both + ([replace(line, note=_ONE_LABEL) for line in one] if both else one)


def _values(metrics: Mapping[str, float], start: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name in _METRICS:
        full = f"{start}{name}"
        if full in metrics and isfinite(metrics[full]):
            found[name] = {"value": metrics[full]}
            # the share of unsafe rows is a fact about these rows
            if name != "prevalence" and f"{full}_low" in metrics and f"{full}_high" in metrics:
                found[name] |= {"low": metrics[f"{full}_low"], "high": metrics[f"{full}_high"]}
    return found


def _drops(home: Line, here: Line, names: Sequence[str]) -> dict[str, dict[str, float]]:
    both = [name for name in names if name in home.values and name in here.values]
    return {name: independent_difference(home.values[name], here.values[name]) for name in both}


def _remark(trained_on: str | None) -> str:
    if trained_on is None:
        return "what the model was trained on is not known: no drops from in-domain"
    if trained_on in UNNAMED:
        return f"the model was trained on data={trained_on}, which names no data set: no drops from in-domain"
    return f"no protocol of the model's training data, {trained_on}, was measured: no drops from in-domain"


__all__ = ["ENGLISH", "HOME", "OFF", "OTHER", "Drift", "Line", "Value", "drift_of", "independent_difference"]
