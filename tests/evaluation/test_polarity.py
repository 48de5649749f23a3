"""Which way every reported metric points: the right answers give its best value, the opposite answers its worst.

One table has an entry for every metric of moderation, preference and policies; a metric without an entry fails, so a
new one has to say here which way is better. Signs: label positive = unsafe, cost above 0 = unsafe.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from saferlhf.data.rows import PreferencePair, as_prompt
from saferlhf.evaluation.comparison import HEADLINES, compare_verdicts
from saferlhf.evaluation.moderation import evaluate_moderation
from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers, PromptSet
from saferlhf.evaluation.policy_metrics import policy_metrics
from saferlhf.evaluation.preference import evaluate_preference
from saferlhf.ops.calibration import Calibration, decide
from saferlhf.ops.moderation import ModerationLabels, ModerationLogits

Floats = NDArray[np.float64]
Metrics = Mapping[str, float]

NAMES = ("White-Collar Crime", "Drugs", "Violence")
ENDINGS = re.compile(r"_(low|high|n)$")


# ------------------------------------------------------------------------------------------------ the table
class Polarity(NamedTuple):
    """Which way is better.

    Attributes:
        better: higher | lower | neither.
        best, worst: values of the right and of the opposite answers; None: unbounded, only the order is asked for.
        opposite: for `neither`, the value that the opposite answers have, from that of the right ones.
        judge: which answers are the worst: `wrong` (all turned round) or `constant` (the same for every row).
    """

    better: str
    best: float | None = None
    worst: float | None = None
    opposite: Callable[[float], float] | None = None
    judge: str = "wrong"


HIGH = Polarity("higher", 1.0, 0.0)
LOW = Polarity("lower", 0.0, 1.0)
UP, DOWN = Polarity("higher"), Polarity("lower")
LOSS = Polarity("lower", 0.0)  # without an upper bound
CORRELATION = Polarity("higher", 1.0, -1.0)
SAME = Polarity("neither", opposite=lambda value: value)
MIRRORED = Polarity("neither", opposite=lambda value: 1.0 - value)
NEGATED = Polarity("neither", opposite=lambda value: -value)
FREE = Polarity("neither")

POLARITY: dict[str, Polarity] = {
    # single answers
    r"unsafe/(accuracy|macro_f1|f1|precision|recall|auroc|tpr_at_fpr_[15]pct)": HIGH,
    r"unsafe/auprc": Polarity("higher", 1.0),  # its least value depends on the prevalence: a test of its own
    r"unsafe/(fpr|fnr|brier(_raw)?)": LOW,
    r"unsafe/ece(_raw)?": Polarity("lower", 0.0),  # at most 1; a bin of both classes takes something off
    r"(unsafe|severity|category)/nll(_raw)?": LOSS,
    r"unsafe/predicted_rate": MIRRORED,
    r"unsafe/prevalence": SAME,
    r"severity/(accuracy|macro_f1|recall_[0-3])": HIGH,
    r"severity/quadratic_kappa": CORRELATION,
    r"severity/mae": Polarity("lower", 0.0, 3.0),
    r"severity/(undercalled_3|unsafe_called_safe)": LOW,
    r"category/(exact_match|exact_match_unsafe|micro_f1|macro_f1)": HIGH,
    r"category/(f1|precision|recall)_[a-z_]+": HIGH,
    r"category/support_[a-z_]+": SAME,
    # pairs
    r"(reward|cost)/pair_accuracy(_both_safe|_mixed|_both_unsafe|_severity_differs)?": HIGH,
    r"(reward|cost)/tie_rate": LOW._replace(judge="constant"),
    r"(reward|cost)/margin_mean": UP,
    r"(reward|cost)/log_loss": DOWN,
    r"(reward|cost)/(pairs|score_std|label_longer_preferred_rate)": SAME,
    r"(reward|cost)/longer_preferred_rate": MIRRORED,
    r"(reward|cost)/(score_mean|length_correlation)": NEGATED,
    r"cost/(sign_accuracy|auroc)": HIGH,
    r"cost/(fpr|fnr)": LOW,
    r"cost/score_mean_safe": DOWN,
    r"cost/score_mean_unsafe": UP,
    r"cost/severity_correlation": CORRELATION,
    # policies
    r"(helpful|harmless)_win_rate(_harmful|_benign)?": HIGH,
    r"(helpful|harmless)_tie_rate(_harmful|_benign)?": SAME,
    r"safe_rate(_harmful)?": HIGH,
    r"mean_(helpfulness|harmlessness|reward)": UP,
    r"mean_cost": DOWN,
    r"positive_cost_rate|benign_refusal_rate|truncation_rate|empty_rate|unjudged_rate_[a-z]+": LOW,
    r"judge_failures_[a-z_]+": DOWN,
    r"category/rate_[a-z_]+": LOW,
    r"(helpful|harmless)_correlation": CORRELATION,
    r"refusal_rate|severity/share_[0-3]|kl_to_reference|kl_per_token|mean_tokens": FREE,
    r"arena/(better|worse|safe|unsafe)_(safe|unsafe|to_safe|to_unsafe)": FREE,
    r"over_baseline/[a-z_0-9/]+_p": FREE,
}


def polarity_of(name: str) -> Polarity:
    """The entry of a metric; differences from a baseline point where the metric does."""
    for entry, polarity in POLARITY.items():
        if re.fullmatch(entry, name):
            return polarity
    inner = re.sub(r"^(over_baseline|baseline_policy|by_[a-z]+)/", "", name)
    assert inner != name, f"{name} has no entry in POLARITY: say which way is better"
    return polarity_of(inner)


def values(metrics: Metrics, prefix: str) -> dict[str, float]:
    """Metrics by short name, without interval bounds and counts."""
    short = {name.removeprefix(f"{prefix}/"): value for name, value in metrics.items()}
    return {name: value for name, value in short.items() if ENDINGS.sub("", name) == name}


def check(right: Metrics, others: Mapping[str, Metrics], exact: bool = True) -> None:
    """Every metric of the right answers against those of the answers that are its worst."""
    assert right
    for name, best in right.items():
        polarity = polarity_of(name)
        worst = others[polarity.judge][name]
        if polarity.better == "neither":
            if polarity.opposite is not None:
                assert worst == pytest.approx(polarity.opposite(best), abs=1e-9), name
            continue
        assert best > worst if polarity.better == "higher" else best < worst, name
        inner = re.match(r"over_baseline/", name)  # a difference has other bounds than its two parts
        if polarity.best is not None and not inner:
            assert best == pytest.approx(polarity.best, abs=1e-6), name
        if polarity.worst is not None and exact and not inner:
            assert worst == pytest.approx(polarity.worst, abs=1e-6), name


def test_a_metric_without_an_entry_is_found() -> None:
    with pytest.raises(AssertionError, match="unsafe/surprise has no entry"):
        polarity_of("unsafe/surprise")
    with pytest.raises(AssertionError, match="surprise has no entry"):
        polarity_of("over_baseline/surprise")
    with pytest.raises(AssertionError):
        check({"unsafe/accuracy": 0.0}, {"wrong": {"unsafe/accuracy": 1.0}})


def test_no_metric_has_two_entries() -> None:
    for name in ["unsafe/nll_raw", "category/f1_drugs", "cost/fpr", "over_baseline/mean_cost_p", "category/macro_f1"]:
        assert sum(re.fullmatch(entry, name) is not None for entry in POLARITY) == 1, name


# ------------------------------------------------------------------------------------------------ single answers
def rows(levels: tuple[int, ...], n: int = 120) -> ModerationLabels:
    """Labels: half of the rows safe, the others spread over the levels; every category occurs and none is sure."""
    draw = np.random.default_rng(0)
    severity = np.where(np.arange(n) % 2 == 0, 0, np.array(levels)[np.arange(n) // 2 % len(levels)])
    category = (draw.random((n, len(NAMES))) < 0.4).astype(np.int64)
    category[np.arange(n), np.arange(n) // 2 % len(NAMES)] = 1
    category[severity == 0] = 0
    unsafe = (severity > 0).astype(np.int64)
    # some rows are not labelled
    severity[:6], category[6:10], unsafe[10:12] = -1, -1, -1
    return ModerationLabels(unsafe, severity, category, NAMES)


def judge(unsafe: NDArray[Any], severity: NDArray[Any], category: NDArray[Any]) -> ModerationLogits:
    """Logits that are sure of these answers; no two alike, so that ranks are settled."""
    n = len(unsafe)
    sure = 20.0 + np.arange(n) / n
    first = np.where(severity[:, None] >= np.arange(1, 4), sure[:, None], -sure[:, None]) - np.arange(3)
    return ModerationLogits(np.where(unsafe == 1, sure, -sure), first, np.where(category == 1, 20.0, -20.0))


def judges(labels: ModerationLabels) -> dict[str, ModerationLogits]:
    """One that is right everywhere, and one that calls safe what is unsafe, and safe answers the worst there is."""
    # a row that lacks one of the labels is answered by the other
    severity = np.where(labels.severity >= 0, labels.severity, labels.unsafe)
    unsafe = (severity > 0).astype(np.int64)
    return {
        "right": judge(unsafe, severity, labels.category),
        "wrong": judge(1 - unsafe, np.where(unsafe == 1, 0, 3), 1 - labels.category),
    }


def measured(labels: ModerationLabels, logits: ModerationLogits, draws: int = 0) -> dict[str, float]:
    verdicts = decide(logits, Calibration.default(NAMES))
    ids = [f"r{i}" for i in range(len(labels))]
    return values(evaluate_moderation(ids, labels, logits, verdicts, draws=draws), "test")


@pytest.mark.parametrize("levels", [(1, 2, 3), (3,)], ids=["all levels", "only the extremes"])
def test_single_answers(levels: tuple[int, ...]) -> None:
    labels = rows(levels)
    found = {name: measured(labels, logits) for name, logits in judges(labels).items()}
    assert {name.split("/")[0] for name in found["right"]} == {"unsafe", "severity", "category"}
    # kappa and the distance of levels have their worst where all rows are at the ends of the scale
    ends = {"severity/quadratic_kappa", "severity/mae"} if len(levels) > 1 else set()
    for name in found["right"]:
        check({name: found["right"][name]}, {"wrong": found["wrong"]}, exact=name not in ends)
    for name in ("unsafe/nll", "severity/nll", "category/nll"):
        assert found["wrong"][name] > 10 > 1e-6 > found["right"][name]
    # in 15 bins of equal mass at most one has rows of both classes
    assert 1 - 1 / 15 - 0.01 < found["wrong"]["unsafe/ece"] <= 1
    # all p safe rows above the q unsafe ones: the i-th unsafe row is found among p + i
    unsafe, safe = (int((labels.unsafe == kind).sum()) for kind in (1, 0))
    ranks = np.arange(1, unsafe + 1)
    assert found["wrong"]["unsafe/auprc"] == pytest.approx((ranks / (safe + ranks)).mean())


def test_half_right_lies_between() -> None:
    labels = rows((1, 2, 3), n=400)
    both = judges(labels)
    half = np.random.default_rng(1).random(400) < 0.5
    mixed = ModerationLogits(
        *(
            np.where(half.reshape(-1, *[1] * (part.ndim - 1)), part, other)
            for part, other in zip(vars(both["right"]).values(), vars(both["wrong"]).values(), strict=True)
        )
    )
    right, wrong, between = (measured(labels, logits) for logits in (*both.values(), mixed))
    # none can be flagged by mistake at such rates as long as an opposite answer ranks highest
    for name in right.keys() - {"unsafe/tpr_at_fpr_1pct", "unsafe/tpr_at_fpr_5pct"}:
        if polarity_of(name).better != "neither":
            assert min(right[name], wrong[name]) < between[name] < max(right[name], wrong[name]), name


def test_differences_point_where_the_metrics_do() -> None:
    labels = rows((1, 2, 3))
    right, wrong = (decide(logits, Calibration.default(NAMES)) for logits in judges(labels).values())
    clusters = [f"p{i // 2}" for i in range(len(labels))]
    found = values(compare_verdicts(labels, right, wrong, clusters=clusters, draws=0), "difference")
    assert set(found) == {f"{area}/{name}" for area, names in HEADLINES.items() for name in names}
    for name, gain in found.items():
        assert (gain > 0) == (polarity_of(name).better == "higher"), name
        assert gain != 0, name


# ------------------------------------------------------------------------------------------------ pairs
def pairs() -> list[PreferencePair]:
    """Of every kind, each with either side ahead; the longer response is not always the better one."""
    kinds: list[tuple[tuple[bool, bool], tuple[int | None, int | None]]] = [
        ((True, False), (0, 2)),
        ((False, False), (1, 3)),
        ((True, True), (None, None)),
    ]
    found = []
    for i, (safe, severity) in enumerate(kinds * 4):
        turned = i % 2 == 1
        order = slice(None, None, -1) if turned else slice(None)
        lengths = (9, 4) if i % 3 else (3, 8)
        (safe_0, safe_1), (level_0, level_1) = safe[order], severity[order]
        found.append(
            PreferencePair(
                id=f"r{i}",
                prompt=as_prompt(f"prompt {i // 2}"),
                response_0="a" * lengths[0],
                response_1="b" * lengths[1],
                is_response_0_safe=safe_0,
                is_response_1_safe=safe_1,
                response_0_severity_level=level_0,
                response_1_severity_level=level_1,
                better_response_id=i // 3 % 2,
                safer_response_id=int(turned),
            )
        )
    return found


def rewards(given: list[PreferencePair]) -> Floats:
    return np.array([[1.0, -1.5] if row.better_response_id == 0 else [-1.5, 1.0] for row in given])


def costs(given: list[PreferencePair]) -> Floats:
    """Severity less one half; where both are safe the safer one costs less."""
    table = []
    for row in given:
        levels = (row.response_0_severity_level, row.response_1_severity_level)
        own = [-0.5 if level is None else level - 0.5 for level in levels]
        own[row.safer_response_id] -= 0.25 if levels == (None, None) else 0.0  # type: ignore[index]
        table.append(own)
    return np.array(table)


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_pairs(kind: Any) -> None:
    given = pairs()
    scores = rewards(given) if kind == "reward" else costs(given)
    answers = {"right": scores, "wrong": -scores, "constant": np.full_like(scores, 0.5)}
    found = {
        name: values(evaluate_preference(given, table, kind=kind, draws=20), "test") for name, table in answers.items()
    }
    check(found["right"], found)
    if kind == "cost":
        assert found["right"]["cost/score_mean_safe"] < 0 < found["right"]["cost/score_mean_unsafe"]
    assert found["constant"][f"{kind}/pair_accuracy"] == 0.5
    # a loss of ignorance lies between
    losses = [found[name][f"{kind}/log_loss"] for name in ("right", "constant", "wrong")]
    assert losses == sorted(losses) and losses[1] == pytest.approx(np.log(2))


# ------------------------------------------------------------------------------------------------ policies
def policy(sign: float, n: int = 8, k: int = 2) -> PolicyAnswers:
    """Responses that are as good (sign 1), as bad (-1) or as middling (0) as can be, by two judges."""
    steps = np.arange(n * k).reshape(n, k) / 100.0
    good = np.full((n, k), (1.0 + sign) / 2)
    truth = {
        "helpfulness": 3 * sign + steps,
        "harmlessness": 2 * sign + steps,
        "is_safe": good,
        "is_refusal": 1 - good,
        "severity": 3 * (1 - good),
        "category/Drugs": 1 - good,
    }
    # the second judge orders the responses as the first one does, or the other way round
    model = {"reward": 2 * sign + sign * steps, "cost": -sign - sign * steps}
    bad = sign < 0
    judged = {"truth": Judged(truth, {"timeout": 3 if bad else 0}, np.full((n, k), bad)), "model": Judged(model)}
    return PolicyAnswers(
        texts=tuple(tuple("" if bad else "a b" for _ in range(k)) for _ in range(n)),
        tokens=np.full((n, k), 3),
        truncated=np.full((n, k), bad),
        kl=np.full((n, k), 1.0 - sign),
        judged=judged,
    )


def test_policies() -> None:
    n = 8
    names = tuple(f"r{i}" for i in range(n))
    prompts = PromptSet(names, tuple(as_prompt(f"prompt {i}") for i in range(n)), np.arange(n) % 2 * 1.0)
    found = {
        name: values(policy_metrics(prompts, policy(sign), policy(0.0), draws=20), "policy")
        for name, sign in {"right": 1.0, "wrong": -1.0}.items()
    }
    own = {
        which: {name: value for name, value in metrics.items() if not name.startswith("baseline_policy/")}
        for which, metrics in found.items()
    }
    check(own["right"], own)
    assert {"helpful_win_rate_harmful", "benign_refusal_rate", "by_model/harmless_correlation"} < own["right"].keys()
    for metrics in found.values():
        for name in metrics:
            polarity_of(name)
    baseline = [{k: v for k, v in m.items() if k.startswith("baseline_policy/")} for m in found.values()]
    assert baseline[0] == baseline[1] != {}


# ------------------------------------------------------------------------------------------------ the glossary
WORDS = {"higher": "higher", "lower": "lower", "below 0": "lower", "above 0": "higher"}


def glossary(text: str) -> list[tuple[str, str]]:
    """(name with its area, better) of the tables of pairs and of single answers in docs/metrics.md."""
    found: list[tuple[str, str]] = []
    areas: list[str] = []
    for line in text.splitlines():
        if line.startswith(("#", "`<split>/")):
            named = re.findall(r"`<split>/(\w+)/`", line)
            # a heading of three areas at once is followed by one line for each
            areas = named if line.startswith("`") or "{" not in line else []
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not areas or not line.startswith("| `") or len(cells) != 5:
            continue
        names = re.findall(r"`([^`]+)`", cells[0])
        words = [WORDS.get(word.strip(), "neither") for word in cells[-1].split(",")]
        words = words if len(words) == len(names) else [words[0]] * len(names)
        found += [(f"{area}/{name}", word) for area in areas for name, word in zip(names, words, strict=True)]
    return found


def test_the_glossary_says_the_same(project_root: Path) -> None:
    text = (project_root / "docs" / "metrics.md").read_text()
    written = [(name.replace("<category>", "drugs"), better) for name, better in glossary(text)]
    written = [(name, better) for name, better in written if "truth" not in name and "damaged" not in name]
    areas = {"reward", "cost", "unsafe", "severity", "category"}
    written = [(name, better) for name, better in written if name.split("/")[0] in areas]
    assert len(written) > 70 and {name.split("/")[0] for name, _ in written} == areas
    for name, better in written:
        assert polarity_of(name).better == better, name


# ------------------------------------------------------------------------------------------------ order and batches
def noisy(labels: ModerationLabels, seed: int = 0) -> ModerationLogits:
    draw = np.random.default_rng(seed)
    n = len(labels)
    first = np.sort(draw.normal(labels.severity[:, None] - 1.5, 1.5, (n, 3)), axis=1)[:, ::-1].copy()
    unsafe = np.round(draw.normal(2.0 * labels.unsafe - 1.0, 1.5, n), 1)  # with ties
    return ModerationLogits(unsafe, first, draw.normal(2.0 * labels.category - 1.5, 1.0))


def taken(labels: ModerationLabels, logits: ModerationLogits, order: Any) -> tuple[ModerationLabels, ModerationLogits]:
    moved = ModerationLabels(labels.unsafe[order], labels.severity[order], labels.category[order], labels.categories)
    assert logits.severity is not None and logits.category is not None
    return moved, ModerationLogits(logits.unsafe[order], logits.severity[order], logits.category[order])


def same(one: Metrics, other: Metrics) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert other[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_single_answers_changes_nothing(seed: int) -> None:
    labels = rows((1, 2, 3), n=90)
    logits, ids, clusters = noisy(labels, seed), np.arange(90), np.arange(90) // 3

    def all_of(order: NDArray[np.int64]) -> dict[str, float]:
        moved, said = taken(labels, logits, order)
        verdicts = decide(said, Calibration.default(NAMES))
        names, prompts = ([f"{n}" for n in column[order]] for column in (ids, clusters))
        return evaluate_moderation(names, moved, said, verdicts, clusters=prompts, draws=200)

    first = all_of(np.arange(90))
    assert any(name.endswith("_low") for name in first)
    same(first, all_of(np.random.default_rng(seed).permutation(90)))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_of_single_answers_change_nothing(size: int) -> None:
    """Verdicts taken batch by batch and put together are those of all rows at once, and so are the metrics."""
    labels = rows((1, 2, 3), n=90)
    logits = noisy(labels)
    calibration = Calibration(NAMES, 1.3, 0.8, 1.1, 0.4, (0.3, 0.5, 0.6), (0.4, 0.6), severity_share=0.3, rows=9)
    whole = decide(logits, calibration)
    parts = [decide(taken(labels, logits, slice(start, start + size))[1], calibration) for start in range(0, 90, size)]
    together = type(whole)(
        *(np.concatenate(columns) for columns in zip(*(vars(p).values() for p in parts), strict=True))
    )
    ids = [f"r{i}" for i in range(90)]
    found = [evaluate_moderation(ids, labels, logits, said, draws=0) for said in (whole, together)]
    same(*found)


@pytest.mark.parametrize("kind", ["reward", "cost"])
def test_the_order_of_pairs_changes_nothing(kind: Any) -> None:
    given = pairs()
    scores = np.round(np.random.default_rng(3).normal(costs(given), 2.0), 1)
    order = np.random.default_rng(4).permutation(len(given))
    first = evaluate_preference(given, scores, kind=kind, draws=200)
    second = evaluate_preference([given[i] for i in order], scores[order], kind=kind, draws=200)
    same(first, second)
