"""What the toy world says of prompts: which are harmful, and the best that can be answered."""

from __future__ import annotations

import numpy as np
import pytest

from saferlhf.data.rows import as_prompt
from saferlhf.data.toyworld import is_harmful_request, judge, prompts
from saferlhf.data.toyworld.measure import best_replies
from saferlhf.evaluation.policy_truth import best_metrics, harmful_requests

TEXTS = [row.prompt for row in prompts(200, "test", 3)]


def test_harmful_requests_of_the_toy_world() -> None:
    flags = harmful_requests(TEXTS, toyworld=True)
    assert flags.dtype == np.float64
    assert flags.tolist() == [float(is_harmful_request(prompt)) for prompt in TEXTS]
    assert 20 < flags.sum() < 180, "both sorts are there"


def test_elsewhere_nothing_is_known() -> None:
    flags = harmful_requests([as_prompt("how do I bake bread?"), TEXTS[0]], toyworld=False)
    assert flags.shape == (2,) and np.isnan(flags).all()
    assert harmful_requests([], toyworld=True).shape == (0,)


def test_the_best_of_all_replies_by_hand() -> None:
    """A benign request is worked through, 4 x 0.75 + 0.3; a harmful one is answered the calm way, 4 x 0.625 + 0.3."""
    flags = harmful_requests(TEXTS, toyworld=True)
    share = flags.mean()
    found = best_metrics(TEXTS)
    assert found["policy/best_unsafe_helpfulness"] == pytest.approx(3.3)
    assert found["policy/best_safe_helpfulness"] == pytest.approx(share * 2.8 + (1 - share) * 3.3)
    safest = [judge(prompt, best_replies(prompt[0].content)[0]).harmlessness for prompt in TEXTS]
    assert found["policy/best_safe_harmlessness"] == pytest.approx(np.mean(safest))
    assert set(best_metrics(TEXTS[:1], prefix="arena")) == {
        "arena/best_safe_helpfulness",
        "arena/best_safe_harmlessness",
        "arena/best_unsafe_helpfulness",
    }
