"""Preference metrics on rows small enough to work by hand, and against naive counting."""

import numpy as np
import pytest

from saferlhf.data.rows import PreferencePair, as_prompt
from saferlhf.errors import UserError
from saferlhf.evaluation.preference import evaluate_preference, strata
from saferlhf.ops.intervals import bootstrap_mean, cluster_codes


def pair(
    name, prompt="p", better=None, safer=None, safe=(None, None), severity=(None, None), lengths=(5, 5), single=None
):
    return PreferencePair(
        id=name,
        prompt=as_prompt(prompt),
        response_0="a" * lengths[0],
        response_1="b" * lengths[1],
        is_response_0_safe=safe[0],
        is_response_1_safe=safe[1],
        response_0_severity_level=severity[0],
        response_1_severity_level=severity[1],
        better_response_id=better,
        safer_response_id=safer,
        single_response_id=single,
    )


ROWS = [
    pair("r0", "p0", better=0, safer=0, safe=(True, True), severity=(0, 0), lengths=(4, 8)),
    pair("r1", "p1", better=1, safer=0, safe=(True, False), severity=(0, 2), lengths=(3, 9)),
    pair("r2", "p2", better=0, safer=1, safe=(False, False), severity=(3, 1), lengths=(6, 6)),
    pair("r3", "p2", better=None, safer=1, safe=(False, True), severity=(2, 0), lengths=(7, 2)),
]


# ------------------------------------------------------------------------------------------------ by hand
def test_reward_metrics_by_hand():
    # right; wrong (1 preferred, 0 scores higher); tie; unlabelled
    scores = [[1.0, 0.0], [2.0, 1.0], [0.5, 0.5], [9.0, 0.0]]
    found = evaluate_preference(ROWS, scores, kind="reward", draws=200)
    assert found["test/reward/pair_accuracy"] == 0.5
    assert found["test/reward/pair_accuracy_n"] == found["test/reward/pairs"] == 3
    assert found["test/reward/pair_accuracy_both_safe"] == 1.0
    assert found["test/reward/pair_accuracy_mixed"] == 0.0
    assert found["test/reward/pair_accuracy_both_unsafe"] == 0.5
    assert found["test/reward/tie_rate"] == pytest.approx(1 / 3)
    assert found["test/reward/margin_mean"] == pytest.approx((1 - 1 + 0) / 3)
    # -log sigmoid of 1, -1 and 0
    assert found["test/reward/log_loss"] == pytest.approx((0.313262 + 1.313262 + 0.693147) / 3, abs=1e-6)
    assert found["test/reward/score_mean"] == pytest.approx(14 / 8)
    # two labelled pairs with unequal lengths: the model prefers the shorter in both, the label in one
    assert found["test/reward/longer_preferred_rate"] == 0.0
    assert found["test/reward/label_longer_preferred_rate"] == 0.5
    assert not [name for name in found if "sign" in name or "auroc" in name]


def test_cost_metrics_by_hand():
    # lower = safer. r0: response 0 safer and lower, right. r1 right. r2: 1 safer but higher, wrong. r3 right.
    costs = [[-2.0, -1.0], [-1.0, 3.0], [1.0, 2.0], [0.0, -4.0]]
    found = evaluate_preference(ROWS, costs, kind="cost", draws=200)
    assert found["test/cost/pair_accuracy"] == 0.75
    assert found["test/cost/pair_accuracy_mixed"] == 1.0
    assert found["test/cost/pair_accuracy_mixed_n"] == 2
    assert found["test/cost/pair_accuracy_both_unsafe"] == found["test/cost/pair_accuracy_severity_differs"] == 0.0
    # 8 responses; only the unsafe one at exactly 0 has the wrong sign
    assert found["test/cost/sign_accuracy"] == 7 / 8
    assert found["test/cost/sign_accuracy_n"] == 8
    assert found["test/cost/fpr"] == 0.0
    assert found["test/cost/fnr"] == 0.25
    assert found["test/cost/auroc"] == 1.0
    assert found["test/cost/score_mean_safe"] == -2.0
    assert found["test/cost/score_mean_unsafe"] == 1.5


def test_sign_convention_cost_above_zero_is_unsafe():
    """Third parties get this backwards: with all signs turned, everything is wrong."""
    costs = np.array([[-2.0, -1.0], [-1.0, 3.0], [2.0, 1.0], [1.0, -4.0]])
    right = evaluate_preference(ROWS, costs, kind="cost", draws=0)
    turned = evaluate_preference(ROWS, -costs, kind="cost", draws=0)
    assert (right["test/cost/pair_accuracy"], right["test/cost/sign_accuracy"]) == (1.0, 1.0)
    assert (turned["test/cost/pair_accuracy"], turned["test/cost/sign_accuracy"]) == (0.0, 0.0)


def test_preference_chooses_the_label():
    rows = [pair("a", "p0", better=0, safer=1, single=1), pair("b", "p1", better=0, safer=1, single=0)]
    scores = [[1.0, 0.0], [1.0, 0.0]]
    values = {
        name: evaluate_preference(rows, scores, kind="reward", preference=name, draws=0)["test/reward/pair_accuracy"]
        for name in ("better", "safer", "single")
    }
    assert values == {"better": 1.0, "safer": 0.0, "single": 0.5}


def test_strata_partition_labelled_rows():
    rows = [*ROWS, pair("unlabelled")]
    found = strata(rows)
    assert found["both_safe"].tolist() == [True, False, False, False, False]
    assert found["mixed"].tolist() == [False, True, False, True, False]
    assert found["both_unsafe"].tolist() == [False, False, True, False, False]
    assert found["severity_differs"].tolist() == [False, False, True, False, False]


# ------------------------------------------------------------------------------------------------ statistics
def many(n: int = 120, seed: int = 0):
    rng = np.random.default_rng(seed)
    rows, scores = [], rng.normal(size=(n, 2))
    for index in range(n):
        safe = (bool(rng.random() < 0.5), bool(rng.random() < 0.5))
        better = int(scores[index, 1] + rng.normal() > scores[index, 0])
        rows.append(
            pair(f"r{index}", f"prompt {index // 3}", better, 1 - better, safe, lengths=tuple(rng.integers(3, 9, 2)))
        )
    return rows, scores


def test_intervals_cluster_by_prompt_and_surround_the_value():
    rows, scores = many()
    found = evaluate_preference(rows, scores, kind="reward", draws=2000, seed=5)
    credit = [
        float(scores[i, row.better_response_id] > scores[i, 1 - row.better_response_id]) for i, row in enumerate(rows)
    ]
    assert found["test/reward/pair_accuracy"] == pytest.approx(np.mean(credit))
    codes = cluster_codes([f"prompt {i // 3}" for i in range(len(rows))])
    expected = bootstrap_mean(credit, codes, draws=2000, seed=5, proportion=True)
    assert (found["test/reward/pair_accuracy_low"], found["test/reward/pair_accuracy_high"]) == pytest.approx(expected)
    for name in [name.removesuffix("_low") for name in found if name.endswith("_low")]:
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]


def test_gathered_in_another_order_gives_the_same_numbers():
    """What N processes gather arrives in another order than on one; every number must be the same."""
    rows, scores = many()
    order = np.random.default_rng(1).permutation(len(rows))
    first = evaluate_preference(rows, scores, kind="cost", draws=300)
    second = evaluate_preference([rows[i] for i in order], scores[order], kind="cost", draws=300)
    assert first == pytest.approx(second, abs=1e-12)


def test_swapping_sides_changes_nothing():
    rows, scores = many()
    swapped = [
        pair(
            row.id,
            row.prompt[0].content,
            1 - row.better_response_id,
            1 - row.safer_response_id,
            (row.is_response_1_safe, row.is_response_0_safe),
            lengths=(len(row.response_1), len(row.response_0)),
        )
        for row in rows
    ]
    for kind in ("reward", "cost"):
        first = evaluate_preference(rows, scores, kind=kind, draws=0)
        assert first == pytest.approx(evaluate_preference(swapped, scores[:, ::-1], kind=kind, draws=0))


def test_confidence_and_prefix():
    rows, scores = many()
    wide = evaluate_preference(rows, scores, kind="reward", prefix="val", draws=1000, confidence=0.99)
    slim = evaluate_preference(rows, scores, kind="reward", prefix="val", draws=1000, confidence=0.8)
    assert wide["val/reward/pair_accuracy_low"] < slim["val/reward/pair_accuracy_low"]
    assert wide["val/reward/pair_accuracy_high"] > slim["val/reward/pair_accuracy_high"]


def test_without_draws_there_are_values_and_no_intervals():
    rows, scores = many()
    found = evaluate_preference(rows, scores, kind="cost", draws=0)
    assert "test/cost/auroc" in found
    assert not [name for name in found if name.endswith(("_low", "_high"))]


def test_cost_strata_agree_with_naive_counting():
    rows, costs = many(seed=4)
    found = evaluate_preference(rows, costs, kind="cost", draws=0)
    hits = {0: [], 1: [], 2: []}
    for row, (first, second) in zip(rows, costs, strict=True):
        unsafe = (not row.is_response_0_safe) + (not row.is_response_1_safe)
        lower = 0 if first < second else 1
        hits[unsafe].append(lower == row.safer_response_id)
    for count, name in enumerate(("both_safe", "mixed", "both_unsafe")):
        assert found[f"test/cost/pair_accuracy_{name}"] == pytest.approx(np.mean(hits[count]))


# ------------------------------------------------------------------------------------------------ degenerate
def test_only_numbers_come_out_whatever_is_missing():
    cases = {
        "one row": ([pair("a", better=0, safer=0)], [[1.0, 0.0]]),
        "one class": ([pair("a", "x", 0, 0, (True, True)), pair("b", "y", 1, 1, (True, True))], [[1.0, 0.0]] * 2),
        "constant": ([pair("a", "x", 0, 0, (True, False)), pair("b", "y", 1, 1, (True, False))], [[0.0, 0.0]] * 2),
        "signs only": (
            [pair("a", "x", None, None, (True, False)), pair("b", "y", 0, None, (False, None))],
            [[1, 2]] * 2,
        ),
    }
    for name, (rows, scores) in cases.items():
        for kind in ("reward", "cost"):
            found = evaluate_preference(rows, scores, kind=kind, draws=100)
            assert found, name
            assert all(isinstance(value, float) and np.isfinite(value) for value in found.values()), name


def test_missing_labels_are_refused_with_the_column_name():
    rows = [pair("a", better=None, safer=None)]
    with pytest.raises(UserError, match="better_response_id"):
        evaluate_preference(rows, [[0.0, 1.0]], kind="reward")
    with pytest.raises(UserError, match="safer_response_id"):
        evaluate_preference(rows, [[0.0, 1.0]], kind="cost")
    with pytest.raises(UserError, match="better, safer, single"):
        evaluate_preference(ROWS, np.zeros((4, 2)), kind="reward", preference="best")


def test_nan_scores_name_the_rows():
    with pytest.raises(UserError, match=r"2 of 4 rows.*r1, r3"):
        evaluate_preference(ROWS, [[0, 1], [np.nan, 1], [0, 1], [0, np.inf]], kind="reward")


def test_wrong_number_of_scores_is_our_fault():
    with pytest.raises(ValueError, match=r"\(4, 2\)"):
        evaluate_preference(ROWS, np.zeros((3, 2)), kind="reward")


# ------------------------------------------------------------------------------------------------ the ceiling
def test_what_labels_of_one_annotator_allow():
    scores = [[1.0, 0.0], [2.0, 1.0], [0.5, 0.5], [9.0, 0.0]]
    found = evaluate_preference(ROWS, scores, kind="reward", agreement=0.82, draws=50)
    # 0.9^2 + 0.1^2 = 0.82
    assert found["test/reward/expected_ceiling"] == pytest.approx(0.9)
    plain = evaluate_preference(ROWS, scores, kind="reward", draws=50)
    assert plain == {name: value for name, value in found.items() if "ceiling" not in name}
    # annotators who agree less than a coin do not tell one
    assert plain == evaluate_preference(ROWS, scores, kind="reward", agreement=0.4, draws=50)


def test_the_ceiling_of_the_toy_world_lies_above_its_annotators():
    """Its annotators differ most on pairs that are close, so that the ceiling is a bound: the truth stays below it."""
    from saferlhf.config.schema import EvaluationConfig
    from saferlhf.data.toyworld import Annotators, preference_pairs
    from saferlhf.run.measure import pair_metrics

    rows = list(preference_pairs(600, split="test", seed=0))
    options = {"preference": "better", "prefix": "test", "evaluation": EvaluationConfig(bootstrap_draws=0)}
    found = {
        kind: pair_metrics(
            rows, np.zeros((600, 2)), kind=kind, seed=0, toyworld=True, annotators=Annotators(), **options
        )
        for kind in ("reward", "cost")
    }
    for kind, values in found.items():
        ceiling, reached = (values[f"test/{kind}/{name}"] for name in ("expected_ceiling", "annotator_truth_agreement"))
        assert 0.7 < reached < ceiling < reached + 0.1
    assert found["reward"]["test/reward/expected_ceiling"] != found["cost"]["test/cost/expected_ceiling"]
