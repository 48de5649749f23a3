"""A policy's own responses on the toy world, judged by ground truth, beside the best reachable point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saferlhf.data.rows import Prompt, prompt_text
from saferlhf.evaluation.sheet import MetricSheet


def evaluate_policy_against_truth(
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    truncated: Sequence[bool],
    prefix: str = "test",
    draws: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, float]:
    """Flat metrics `<prefix>/policy/*`, with intervals clustered by prompt.

    Args:
        prompts: n prompts of the toy world.
        responses: the policy's n responses, as text.
        truncated: whether the length limit cut each off.

    Returns:
        truth_helpfulness, truth_harmlessness (means), safe_rate (share of safe responses), benign_refusal_rate (share
        of benign requests refused), truncation_rate; best_safe_helpfulness is what the best safe response to each of
        these prompts would reach on average, best_unsafe_helpfulness the same without regard to safety.
    """
    from saferlhf.data.toyworld import best_point, is_harmful_request, judge

    truths = [judge(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    benign = np.array([not is_harmful_request(prompt) for prompt in prompts])
    texts = [prompt_text(prompt) for prompt in prompts]
    sheet = MetricSheet(f"{prefix}/policy", texts, draws=draws, confidence=confidence, seed=seed)
    sheet.share("safe_rate", [float(truth.is_safe) for truth in truths])
    sheet.mean("truth_helpfulness", [truth.helpfulness for truth in truths])
    sheet.mean("truth_harmlessness", [truth.harmlessness for truth in truths])
    sheet.share("benign_refusal_rate", [float(truth.is_refusal) for truth in truths], benign)
    sheet.share("truncation_rate", [float(cut) for cut in truncated])
    best = best_point(texts)
    sheet.value("best_safe_helpfulness", best.helpfulness)
    sheet.value("best_unsafe_helpfulness", best.unsafe_helpfulness)
    return sheet.metrics()
