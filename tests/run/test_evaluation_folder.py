"""Of thousands of metrics the tracker is given those that one compares runs by."""

from __future__ import annotations

from saferlhf.run.evaluation_folder import tracked_metrics

KEPT = {
    "xstest/unsafe/f1": 0.7,
    "xstest/unsafe/f1_low": 0.6,
    "xstest/unsafe/f1_high": 0.8,
    "xstest/category/macro_f1": 0.4,
    "xstest/over_tfidf/unsafe/f1": 0.1,
    "ours_over_theirs/unsafe/accuracy_p": 0.02,
    "arena/helpful/a_over_b_win_rate": 0.6,
    "arena/helpful/a_elo": 12.0,
}
LEFT_OUT = {
    "xstest/unsafe/f1_n": 80.0,
    "xstest/baseline_tfidf/unsafe/f1": 0.5,
    "xstest/by_type/homonyms_accuracy": 0.5,
    "xstest/unseen/unsafe/f1": 0.6,
    "xstest/category/f1_violence": 0.3,
    "xstest/category/support_violence": 3.0,
    "arena/helpful/a_over_b_tie_rate": 0.1,
    "arena/helpful/a_over_b_tie_rate_low": 0.0,
    "arena/helpful/a_over_b_p_holm": 0.3,
}


def test_break_downs_stay_in_the_file() -> None:
    assert tracked_metrics({**KEPT, **LEFT_OUT}) == KEPT


def test_headlines_of_all_protocols_stand_together() -> None:
    results = [
        {"protocol": "xstest", "metric": "unsafe/f1", "values": {"unsafe/f1": {"value": 0.7, "low": 0.6}}},
        {"protocol": "odd", "metric": "unsafe/auroc", "values": {"unsafe/f1": {"value": 0.1}}},  # one class only
    ]
    found = tracked_metrics({"xstest/unsafe/f1": 0.7}, {"results": results})
    assert found == {"xstest/unsafe/f1": 0.7, "all_protocols/xstest": 0.7}
