"""Models held against each other from their judgements: hand-worked numbers, planted differences, tests, seeds."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score, f1_score, roc_auc_score

from saferlhf.data.labels import labels_of
from saferlhf.data.rows import PreferencePair, QuestionAnswer, as_prompt
from saferlhf.errors import UserError
from saferlhf.evaluation.comparison import compare_verdicts
from saferlhf.evaluation.judgement_measures import aligned, measures_of
from saferlhf.evaluation.judgements import Judgements, of_pairs, of_verdicts
from saferlhf.evaluation.model_comparison import (
    Difference,
    MetricComparison,
    ProtocolComparison,
    compare_protocol,
    flat_metrics,
    pairs_of,
    slug,
    with_holm,
)
from saferlhf.evaluation.moderation import evaluate_moderation
from saferlhf.evaluation.paired_tests import decisions_p, swap_p
from saferlhf.ops.intervals import cluster_codes
from saferlhf.ops.moderation import Verdicts
from saferlhf.ops.significance import sign_flip_p

DRAWS = 1000


def rows_of(unsafe: ArrayLike, per_prompt: int = 1) -> list[QuestionAnswer]:
    flags = np.asarray(unsafe, bool)
    return [
        QuestionAnswer(f"r{i}", as_prompt(f"question {i // per_prompt}"), f"answer {i}", not bad, None, None)
        for i, bad in enumerate(flags)
    ]


def judged(rows: list[QuestionAnswer], logits: ArrayLike, **options: Any) -> Judgements:
    """Of a moderator with the head for unsafe alone."""
    scores = np.asarray(logits, np.float64)
    verdicts = Verdicts(1 / (1 + np.exp(-scores)), None, None, scores > 0, None, None, scores)
    return of_verdicts(options.pop("protocol", "toy"), rows, labels_of(rows, ()), verdicts, **options)


def noisy(unsafe: ArrayLike, right: float, seed: int) -> np.ndarray:
    """Logits of a model that is right on this share of rows."""
    rng = np.random.default_rng(seed)
    truth = np.asarray(unsafe, bool)
    said = np.where(rng.random(len(truth)) < right, truth, ~truth)
    return np.where(said, 1.0, -1.0) * (0.5 + rng.random(len(truth)))


def one(found: ProtocolComparison, metric: str = "unsafe/macro_f1") -> MetricComparison:
    return next(m for m in found.metrics if m.metric == metric)


def difference(found: ProtocolComparison, metric: str = "unsafe/macro_f1") -> Difference:
    (only,) = one(found, metric).differences
    return only


UNSAFE = np.random.default_rng(0).random(400) < 0.5
ROWS = rows_of(UNSAFE, per_prompt=2)


# ------------------------------------------------------------------------------------------------ values
def test_a_difference_worked_by_hand() -> None:
    rows = rows_of([True, True, False, False, False])
    ours, theirs = judged(rows, [1, 1, -1, -1, 1]), judged(rows, [1, -1, -1, 1, 1])
    found = compare_protocol({"ours": [ours], "theirs": [theirs]}, draws=200)
    # ours: 2 hits, 1 alarm, 2 passes; F1 of unsafe 4/5, of safe 4/5. theirs: 1 hit, 2 alarms, 1 miss, 1 pass
    assert one(found).values["ours"].value == pytest.approx(0.8)
    assert one(found).values["theirs"].value == pytest.approx((2 / 5 + 2 / 5) / 2)
    assert difference(found).estimate.value == pytest.approx(0.4)
    assert difference(found, "unsafe/accuracy").estimate.value == pytest.approx(4 / 5 - 2 / 5)
    assert difference(found, "unsafe/fpr").estimate.value == pytest.approx(1 / 3 - 2 / 3)
    assert (found.rows, found.prompts, found.protocol) == (5, 5, "toy")
    # ours alone is right on two rows, theirs alone on none
    assert difference(found).p_mcnemar == pytest.approx(binomtest(2, 2).pvalue)
    # 32 ways to swap; rows 1 and 3 differ. Swapping both gives the mirror, one of them 1/3 less or more
    assert difference(found).p == pytest.approx(2 / 4)
    assert one(found).headline and not one(found, "unsafe/fpr").headline
    assert np.isnan(difference(found, "unsafe/fpr").p)


def test_values_are_those_of_scikit_learn() -> None:
    models = {f"m{i}": [judged(ROWS, noisy(UNSAFE, right, i))] for i, right in enumerate((0.9, 0.7))}
    found = compare_protocol(models, draws=0)
    for heading, (run,) in models.items():
        assert run.verdicts is not None
        said, scores = run.verdicts.unsafe, run.verdicts.unsafe_logit
        assert one(found).values[heading].value == pytest.approx(f1_score(UNSAFE, said, average="macro"))
        assert one(found, "unsafe/auroc").values[heading].value == pytest.approx(roc_auc_score(UNSAFE, scores))
    assert one(found).values["m0"].interval is None and difference(found).estimate.interval is None
    assert np.isnan(difference(found).p)


def test_intervals_are_those_of_compare_verdicts() -> None:
    """Another way to the same numbers: the same draws of the same prompts."""
    ours, theirs = judged(ROWS, noisy(UNSAFE, 0.9, 1)), judged(ROWS, noisy(UNSAFE, 0.8, 2))
    assert ours.labels is not None and ours.verdicts is not None and theirs.verdicts is not None
    options: dict[str, Any] = {"draws": DRAWS, "seed": 3}
    found = compare_protocol({"a": [ours], "b": [theirs]}, **options)
    clusters = ours.prompts.tolist()
    wanted = compare_verdicts(ours.labels, ours.verdicts, theirs.verdicts, clusters=clusters, **options)
    for metric in found.metrics:
        (d,) = metric.differences
        assert d.estimate.interval is not None
        assert d.estimate.value == pytest.approx(wanted[f"difference/{metric.metric}"])
        ends = [wanted[f"difference/{metric.metric}_{end}"] for end in ("low", "high")]
        # they rank by p and we by the logit, which is the same order
        assert list(d.estimate.interval) == pytest.approx(ends), metric.metric


def test_all_heads_of_a_moderator() -> None:
    rng = np.random.default_rng(4)
    names, severity = ("Weather", "Gardening"), rng.integers(0, 4, 200)
    rows = [
        QuestionAnswer(f"r{i}", as_prompt(f"q {i}"), "a", s == 0, frozenset(["Weather"] if s else []), int(s))
        for i, s in enumerate(severity)
    ]

    def of(shift: int) -> Judgements:
        said = np.where(np.arange(200) % 5 < shift, (severity + 1) % 4, severity)
        flags = np.stack([said > 0, np.zeros(200, bool)], axis=1)
        p = np.eye(4)[said] * 0.9 + 0.025
        p_category = np.where(flags, 0.9, 0.1)
        verdicts = Verdicts((said > 0) * 0.8 + 0.1, p, p_category, said > 0, said, flags, None)
        return of_verdicts("toy", rows, labels_of(rows, names), verdicts)

    found = compare_protocol({"good": [of(1)], "bad": [of(3)]}, draws=300)
    asked = [metric.metric for metric in found.metrics if metric.headline]
    assert asked == ["unsafe/macro_f1", "severity/quadratic_kappa", "category/micro_f1"]
    verdicts = of(1).verdicts
    assert verdicts is not None
    kappa = cohen_kappa_score(severity, verdicts.severity, weights="quadratic")
    assert one(found, "severity/quadratic_kappa").values["good"].value == pytest.approx(kappa)
    for metric in asked:
        assert difference(found, metric).estimate.value > 0 and difference(found, metric).p < 0.05
    # a model without those heads: they are left out, and it is said
    alone = judged(rows, np.where(severity > 0, 1.0, -1.0))
    less = compare_protocol({"good": [of(1)], "alone": [alone]}, draws=50)
    assert {metric.metric.split("/")[0] for metric in less.metrics} == {"unsafe"}
    assert len(less.notes) == 2 and "severity is not compared" in less.notes[1]


# ------------------------------------------------------------------------------------------------ tests
def test_a_planted_difference_is_found_and_no_other() -> None:
    good, same, worse = (noisy(UNSAFE, right, seed) for right, seed in ((0.9, 1), (0.9, 2), (0.8, 3)))
    models = {"good": [judged(ROWS, good)], "same": [judged(ROWS, same)], "worse": [judged(ROWS, worse)]}
    (found,) = with_holm([compare_protocol(models, draws=DRAWS)])
    by_pair = {(d.first, d.second): d for d in one(found).differences}
    assert set(by_pair) == {("good", "same"), ("good", "worse"), ("same", "worse")}
    null, planted = by_pair["good", "same"], by_pair["good", "worse"]
    assert planted.estimate.interval is not None and planted.estimate.interval.low > 0
    assert planted.p_holm < 0.05 and planted.p_mcnemar < 0.05
    assert null.estimate.interval is not None and null.estimate.interval.low < 0 < null.estimate.interval.high
    assert null.p_holm > 0.05 and null.p_mcnemar > 0.05
    # what could have been found: larger than the null's difference, of the order of the interval
    assert abs(null.estimate.value) < null.mde < null.estimate.interval.high - null.estimate.interval.low


def test_false_alarms_are_as_rare_as_they_should_be() -> None:
    """Alike models, 60 times: p is below 0.1 about 6 times."""
    rows = rows_of(UNSAFE[:80])
    alarms = 0
    for seed in range(60):
        models = {name: [judged(rows, noisy(UNSAFE[:80], 0.8, 100 + 2 * seed + k))] for k, name in enumerate("ab")}
        alarms += difference(compare_protocol(models, draws=199, seed=seed)).p < 0.1
    assert 1 <= alarms <= 14  # 99.8% of binomial(60, 0.1)


def test_the_swap_test_of_a_mean_is_the_sign_flip_test() -> None:
    for count, right, tolerance in ((24, 0.4, 0.0), (400, 0.72, 0.02)):  # 12 prompts: all patterns; 200: drawn
        rows, truth = ROWS[:count], UNSAFE[:count]
        models = {"a": [judged(rows, noisy(truth, 0.8, 1))], "b": [judged(rows, noisy(truth, right, 2))]}
        both = aligned(models)
        one, other = (measures_of(both.runs[name][0], ["unsafe"])["unsafe"] for name in "ab")
        p = swap_p(one, other, "accuracy", both.clusters, draws=20_000)
        gaps = (one.right["accuracy"] - other.right["accuracy"])[:, 0]
        wanted = sign_flip_p(gaps, both.clusters, draws=20_000, seed=5)
        assert p == pytest.approx(wanted, abs=tolerance + 1e-12)
        assert 0.001 < p < 0.9


@pytest.mark.parametrize("name", ["macro_f1", "auroc"])
def test_the_swap_test_by_hand(name: str) -> None:
    """All 2^6 swaps of six prompts of two rows each, written out with scikit-learn."""
    truth = UNSAFE[:12]
    ours, theirs = noisy(truth, 0.95, 4), 3.0 * noisy(truth, 0.4, 5)
    rows = rows_of(truth, per_prompt=2)
    both = aligned({"a": [judged(rows, ours)], "b": [judged(rows, theirs)]})
    measures = [measures_of(both.runs[name][0], ["unsafe"])["unsafe"] for name in "ab"]
    p = swap_p(measures[0], measures[1], name, both.clusters, draws=10)

    def value(scores: np.ndarray) -> float:
        if name == "auroc":
            return float(roc_auc_score(truth, scores))
        return float(f1_score(truth, scores > 0, average="macro"))

    if name == "auroc":  # of ranks: the second model's scores have another scale
        ours, theirs = ours.argsort().argsort() + 1.0, theirs.argsort().argsort() + 1.0
    gaps = []
    for pattern in itertools.product([False, True], repeat=6):
        swapped = np.repeat(pattern, 2)
        gaps.append(value(np.where(swapped, theirs, ours)) - value(np.where(swapped, ours, theirs)))
    assert p == pytest.approx(np.mean(np.abs(gaps) >= abs(gaps[0]) - 1e-9))
    assert 0 < p < 0.9


def test_holm_runs_over_all_questions() -> None:
    models = {"a": noisy(UNSAFE, 0.9, 1), "b": noisy(UNSAFE, 0.83, 2)}
    found = [
        compare_protocol({name: [judged(ROWS, said, protocol=p)] for name, said in models.items()}, draws=DRAWS)
        for p in ("first", "second", "third")
    ]
    alone, together = with_holm(found[:1])[0], with_holm(found)
    assert difference(alone).p_holm == pytest.approx(difference(found[0]).p)
    # three equal p-values
    assert [difference(c).p_holm for c in together] == pytest.approx([min(3 * difference(found[0]).p, 1.0)] * 3)
    assert np.isnan(difference(together[0], "unsafe/accuracy").p_holm)


def test_models_that_say_the_same() -> None:
    run = judged(ROWS, noisy(UNSAFE, 0.9, 1))
    found = difference(compare_protocol({"a": [run], "b": [run]}, draws=100))
    assert found.estimate == (0.0, (0.0, 0.0)) and found.p == 1.0 and found.p_mcnemar == 1.0
    assert np.isnan(found.mde)


def test_one_prompt_is_no_sample() -> None:
    rows = rows_of([True, False], per_prompt=2)
    found = difference(compare_protocol({"a": [judged(rows, [1, -1])], "b": [judged(rows, [1, 1])]}, draws=100))
    assert found.estimate.interval is None and np.isnan(found.p) and found.estimate.value == pytest.approx(2 / 3)


def test_a_perfect_model_is_not_certain() -> None:
    """Wilson's interval over the prompts that a share counts, as the evaluation itself gives it."""
    rows, truth = ROWS[:100], UNSAFE[:100]
    perfect = judged(rows, np.where(truth, 1.0, -1.0))
    models = {"a": [perfect], "b": [judged(rows, noisy(truth, 0.8, 1))]}
    found = compare_protocol(models, draws=100)
    assert perfect.labels is not None and perfect.verdicts is not None
    wanted = evaluate_moderation(
        perfect.row_ids.tolist(), perfect.labels, None, perfect.verdicts, clusters=perfect.prompts.tolist(), draws=100
    )
    for name in ("accuracy", "fpr", "recall", "precision"):
        value, interval = one(found, f"unsafe/{name}").values["a"]
        assert interval is not None and interval.high - interval.low > 0.02
        ends = [wanted[f"test/unsafe/{name}{end}"] for end in ("", "_low", "_high")]
        assert [value, *interval] == pytest.approx(ends)


# ------------------------------------------------------------------------------------------------ order
def test_the_order_of_models_flips_the_sign_and_nothing_else() -> None:
    a, b = judged(ROWS, noisy(UNSAFE, 0.9, 1)), [judged(ROWS, noisy(UNSAFE, 0.85, s)) for s in (2, 3, 4)]
    shuffled = [run.taken(np.random.default_rng(0).permutation(len(ROWS))) for run in b]
    for several in ([b[0]], b):
        one_way = compare_protocol({"a": [a], "b": several}, draws=300, seed=7)
        back = compare_protocol({"b": shuffled[: len(several)], "a": [a]}, draws=300, seed=7)
        for metric in one_way.metrics:
            (d,), (r,) = metric.differences, one(back, metric.metric).differences
            assert r.estimate.value == pytest.approx(-d.estimate.value)
            assert d.estimate.interval is not None and r.estimate.interval is not None
            assert list(r.estimate.interval) == pytest.approx([-d.estimate.interval.high, -d.estimate.interval.low])
            for name in ("p", "mde", "p_mcnemar"):
                assert getattr(r, name) == pytest.approx(getattr(d, name), nan_ok=True)
            for heading in "ab":
                assert one(back, metric.metric).values[heading].value == pytest.approx(metric.values[heading].value)


def test_pairs() -> None:
    assert pairs_of(["a", "b", "c"]) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs_of(["a", "b", "c"], "b") == [("a", "b"), ("c", "b")]
    with pytest.raises(UserError, match="'d' is not among the models"):
        pairs_of(["a", "b"], "d")
    with pytest.raises(UserError, match="two models at least"):
        pairs_of(["a"])


# ------------------------------------------------------------------------------------------------ alignment
def test_rows_that_are_not_everywhere_are_counted_and_left_out() -> None:
    logits = noisy(UNSAFE, 0.9, 1)
    ours, theirs = judged(ROWS, logits), judged(ROWS, logits).taken(np.arange(399, 9, -1))
    found = compare_protocol({"ours": [ours], "theirs": [theirs]}, draws=50)
    assert found.rows == 390 and found.left_out == {"ours": 10, "theirs": 0}
    assert difference(found).estimate.value == 0.0  # the same verdicts, in another order


def test_copies_of_a_row_are_told_apart_by_their_place() -> None:
    rows = rows_of([True, False, True])
    ours = judged(rows, [1.0, -1.0, 2.0]).taken([0, 1, 0, 2, 0])
    theirs = judged(rows, [3.0, -1.0, 4.0]).taken([2, 0, 1, 0])
    found = aligned({"ours": [ours], "theirs": [theirs]})
    (kept,), (others,) = found.runs["ours"], found.runs["theirs"]
    assert kept.row_ids.tolist() == others.row_ids.tolist() == ["r0", "r1", "r0", "r2"]
    assert found.left_out == {"ours": 1, "theirs": 0}
    # the three copies of our row 0 differ when they are told apart
    marked = dataclasses.replace(ours, groups=np.array(["first", "", "second", "", "third"]))
    (kept,) = aligned({"ours": [marked], "theirs": [theirs]}).runs["ours"]
    assert kept.groups is not None and kept.groups.tolist() == ["first", "", "second", ""]


def test_rows_without_a_verdict_count_for_nobody() -> None:
    logits = noisy(UNSAFE, 0.9, 1)
    parsed = np.arange(400) % 4 != 0
    broken = np.where(parsed, noisy(UNSAFE, 0.9, 2), np.nan)
    silent = judged(ROWS, broken, parsed=parsed)
    found = compare_protocol({"ours": [judged(ROWS, logits)], "silent": [silent]}, draws=50)
    assert found.rows == 300 and found.unjudged == {"ours": 0, "silent": 100}
    wanted = f1_score(UNSAFE[parsed], logits[parsed] > 0, average="macro")
    assert one(found).values["ours"].value == pytest.approx(wanted)
    flat = flat_metrics([found])
    assert flat["compare/toy/unjudged/silent"] == 100 and "compare/toy/unjudged/ours" not in flat


def test_a_judge_without_probabilities() -> None:
    """Metrics of decisions are compared, those of probabilities and of order are not."""
    logits = noisy(UNSAFE, 0.9, 1)
    yes_no = Verdicts(np.full(400, np.nan), None, None, logits > 0, None, None)
    guard = of_verdicts("toy", ROWS, labels_of(ROWS, ()), yes_no)
    found = compare_protocol({"ours": [judged(ROWS, noisy(UNSAFE, 0.8, 2))], "guard": [guard]}, draws=50)
    names = {metric.metric for metric in found.metrics}
    assert "unsafe/f1" in names and not names & {"unsafe/auroc", "unsafe/auprc", "unsafe/nll"}
    wanted = f1_score(UNSAFE, logits > 0, average="macro")
    assert one(found).values["guard"].value == pytest.approx(wanted)
    with pytest.raises(UserError, match=r"rests on unsafe/auroc, which not every model has"):
        models = {"ours": judged(ROWS, logits), "guard": guard}
        both = {name: [dataclasses.replace(run, metric="unsafe/auroc")] for name, run in models.items()}
        compare_protocol(both, draws=50)


def test_what_cannot_be_compared() -> None:
    ours = judged(ROWS, noisy(UNSAFE, 0.9, 1))
    assert ours.labels is not None
    flipped = ours.labels.unsafe.copy()
    flipped[[3, 5]] ^= 1
    other = dataclasses.replace(ours, labels=dataclasses.replace(ours.labels, unsafe=flipped))
    with pytest.raises(UserError, match="labels of unsafe of a and b differ in 2 rows of toy, first in r3"):
        aligned({"a": [ours], "b": [other]})
    moved = dataclasses.replace(ours, prompts=ours.prompts[::-1])
    with pytest.raises(UserError, match="prompts of a and b differ"):
        aligned({"a": [ours], "b": [moved]})
    foreign = dataclasses.replace(ours, row_ids=np.array([f"x{i}" for i in range(400)]))
    with pytest.raises(UserError, match="a and b have no row of toy in common"):
        aligned({"a": [ours], "b": [foreign]})
    with pytest.raises(UserError, match="headline metric is unsafe/macro_f1 for a and unsafe/f1 for b"):
        aligned({"a": [ours], "b": [dataclasses.replace(ours, metric="unsafe/f1")]})
    silent = dataclasses.replace(ours, parsed=np.zeros(400, bool))
    with pytest.raises(UserError, match="no row of toy has a verdict of every model"):
        aligned({"a": [ours], "b": [silent]})


# ------------------------------------------------------------------------------------------------ pairs
def test_cost_models_on_pairs() -> None:
    pairs = [
        PreferencePair(f"p{i}", as_prompt(f"q {i}"), "a", "b", safe, other, safer_response_id=safer)
        for i, (safe, other, safer) in enumerate(
            [(True, False, 0), (False, True, 1), (False, False, 0), (True, True, None)]
        )
    ]
    ours = of_pairs("pairs", pairs, [[-1, 1], [2, -2], [1, 1], [-1, 1]], kind="cost")
    theirs = of_pairs("pairs", pairs, [[1, 2], [-2, 2], [1, 2], [-1, -1]], kind="cost")
    found = compare_protocol({"ours": [ours], "theirs": [theirs]}, draws=100)
    assert [m.metric for m in found.metrics if m.headline] == ["cost/pair_accuracy", "cost/sign_accuracy"]
    # pairs: ours right, right, tie; theirs right, wrong, right
    pair = one(found, "cost/pair_accuracy")
    assert (pair.values["ours"].value, pair.values["theirs"].value) == pytest.approx((2.5 / 3, 2 / 3))
    # signs: ours is wrong on the last response alone; theirs on the first three of the first two pairs
    sign = one(found, "cost/sign_accuracy")
    assert (sign.values["ours"].value, sign.values["theirs"].value) == pytest.approx((7 / 8, 5 / 8))
    assert one(found, "cost/auroc").values["ours"].value == pytest.approx(14.5 / 16)
    # the tie is no decision: 2 against 1 right of the two others
    assert pair.differences[0].p_mcnemar == pytest.approx(1.0)
    assert one(found, "cost/fpr").values["ours"].value == pytest.approx(1 / 4)


def test_reward_models_on_pairs() -> None:
    rng = np.random.default_rng(0)
    better = rng.integers(0, 2, 300)
    pairs = [
        PreferencePair(f"p{i}", as_prompt(f"q {i // 3}"), "a", "b", better_response_id=int(b))
        for i, b in enumerate(better)
    ]
    margin = np.where(better == 0, 1.0, -1.0)

    def of(right: float, seed: int) -> Judgements:
        kept = np.where(np.random.default_rng(seed).random(300) < right, margin, -margin)
        return of_pairs("pairs", pairs, np.stack([kept, np.zeros(300)], axis=1), kind="reward")

    found = compare_protocol({"good": [of(0.9, 1)], "bad": [of(0.7, 2)]}, draws=500)
    (metric,) = found.metrics
    assert metric.metric == "reward/pair_accuracy" and difference(found, metric.metric).p < 0.01
    assert found.prompts == 100 and found.rows == 300
    with pytest.raises(UserError, match="kind is reward for a and cost for b"):
        cost = of_pairs("pairs", pairs, np.zeros((300, 2)), kind="cost", preference="better")
        aligned({"a": [of(0.9, 1)], "b": [cost]})


# ------------------------------------------------------------------------------------------------ seeds
def test_seeds_that_differ_widen_the_interval() -> None:
    theirs = [judged(ROWS, noisy(UNSAFE, 0.8, 9))]
    runs = [judged(ROWS, noisy(UNSAFE, right, s)) for s, right in enumerate((0.7, 0.85, 0.97))]
    alike = [runs[1]] * 3

    def of(ours: list[Judgements]) -> Difference:
        return difference(compare_protocol({"ours": ours, "theirs": theirs}, draws=DRAWS))

    def width(d: Difference) -> float:
        assert d.estimate.interval is not None
        return d.estimate.interval.high - d.estimate.interval.low

    single, same, spread = of([runs[1]]), of(alike), of(runs)
    # three times the same run is that run: Student's interval of many prompts is the percentile's up to its own noise
    assert same.estimate.value == pytest.approx(single.estimate.value)
    assert width(same) == pytest.approx(width(single), rel=0.1)
    assert width(spread) > 2 * width(same)
    assert spread.p > same.p and np.isnan(spread.p_mcnemar) and spread.mde > same.mde
    # the value is the mean over runs
    values = [one(compare_protocol({"a": [r], "b": theirs}, draws=0)).values["a"].value for r in runs]
    assert one(compare_protocol({"a": runs, "b": theirs}, draws=0)).values["a"].value == pytest.approx(np.mean(values))


def test_the_spread_of_seeds_is_counted_once() -> None:
    """The standard error from its parts: prompts, and what runs differ by beyond errors on prompts of their own."""
    rows, truth = rows_of(UNSAFE), np.where(UNSAFE, 1.0, -1.0)
    rng = np.random.default_rng(3)
    perfect = [dataclasses.replace(judged(rows, truth), metric="unsafe/accuracy")]
    for rates in ((0.05, 0.2), (0.1, 0.15, 0.3, 0.35), (0.1, 0.1, 0.1)):
        wrong = np.stack([rng.permutation(400) < 400 * rate for rate in rates])  # (R, 400)
        ours = [
            dataclasses.replace(judged(rows, np.where(row, -truth, truth)), metric="unsafe/accuracy") for row in wrong
        ]
        found = difference(compare_protocol({"a": ours, "b": perfect}, draws=20_000), "unsafe/accuracy")
        assert found.estimate.value == pytest.approx(-np.mean(rates))
        errors = wrong.astype(np.float64)
        of_prompts = errors.mean(axis=0).var() / 400
        of_own = np.mean([row.var() for row in errors - errors.mean(axis=0)]) / 400 / (len(rates) - 1)
        of_runs = max(0.0, np.var(rates, ddof=1) / len(rates) - of_own)
        assert (found.mde / 2.8015852) ** 2 == pytest.approx(of_prompts + of_runs, rel=0.05)  # 1.959964 + 0.841621
        assert (of_runs == 0) == (len(set(rates)) == 1)


def test_more_runs_that_differ_by_chance_narrow_the_interval() -> None:
    """Runs that are equally good, each with errors of its own: their mean is known better than one of them."""
    theirs = [judged(ROWS, noisy(UNSAFE, 0.8, 99))]
    runs = [judged(ROWS, noisy(UNSAFE, 0.8, seed)) for seed in range(6)]
    options: dict[str, Any] = {"draws": DRAWS, "seed": 1}
    few, many = (one(compare_protocol({"a": r, "b": theirs}, **options)).values["a"] for r in (runs[:1], runs))
    assert few.interval is not None and many.interval is not None
    assert many.interval.high - many.interval.low < 0.8 * (few.interval.high - few.interval.low)


# ------------------------------------------------------------------------------------------------ names
def test_flat_names() -> None:
    models = {"Ours, v2": [judged(ROWS, noisy(UNSAFE, 0.9, 1))], "theirs": [judged(ROWS, noisy(UNSAFE, 0.8, 2))]}
    comparisons = with_holm([compare_protocol(models, draws=100)])
    flat = flat_metrics(comparisons)
    assert slug("Ours, v2") == "ours_v2"
    name = "compare/toy/unsafe/macro_f1/ours_v2_minus_theirs"
    d = difference(comparisons[0])
    assert flat[name] == d.estimate.value
    assert d.estimate.interval is not None
    assert (flat[f"{name}_low"], flat[f"{name}_high"]) == tuple(d.estimate.interval)
    assert [flat[f"{name}_{end}"] for end in ("p", "p_holm", "p_mcnemar", "mde")] == [
        d.p,
        d.p_holm,
        d.p_mcnemar,
        d.mde,
    ]
    beside = {full.removeprefix("compare/toy/unsafe/fpr/") for full in flat if "/fpr/" in full}
    wanted = {"ours_v2", "theirs", "ours_v2_minus_theirs"}
    assert beside == {f"{head}{end}" for head in wanted for end in ("", "_low", "_high")}
    assert flat["compare/toy/rows"] == 400 and flat["compare/toy/prompts"] == 200
    assert all(isinstance(value, float) and np.isfinite(value) for value in flat.values())


def test_decisions_of_categories() -> None:
    """A metric that counts no decisions takes the area's."""
    both = aligned({"a": [judged(ROWS, noisy(UNSAFE, 0.9, 1))], "b": [judged(ROWS, noisy(UNSAFE, 0.7, 2))]})
    first, second = (measures_of(both.runs[name][0], ["unsafe"])["unsafe"] for name in "ab")
    assert decisions_p(first, second, "macro_f1") == decisions_p(first, second, "accuracy") < 0.01
    assert np.isnan(decisions_p(dataclasses.replace(first, right={}), second, "macro_f1"))
    assert cluster_codes(both.runs["a"][0].prompts.tolist()).max() == 199
