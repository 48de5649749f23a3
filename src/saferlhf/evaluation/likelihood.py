"""How likely the demonstrations are under a language model: per-token likelihood of responses on held-out rows.

    nll = sum of the rows' negative log-likelihoods / number of response tokens   (nats per token)
    perplexity = exp(nll)

Every token weighs the same, whatever row it stands in, so the numbers do not depend on batches. The end-of-sequence
token is one of them. Numbers of models with different tokenizers cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

import numpy as np
from numpy.typing import ArrayLike

from saferlhf.data.rows import QuestionAnswer, prompt_text
from saferlhf.errors import UserError
from saferlhf.evaluation.preference import checked_scores
from saferlhf.evaluation.sheet import MetricSheet
from saferlhf.ops.intervals import CONFIDENCE, DRAWS


def evaluate_likelihood(
    rows: Sequence[QuestionAnswer],
    nll_sums: ArrayLike,
    token_counts: ArrayLike,
    *,
    prefix: str = "test",
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, float]:
    """Flat metrics `<prefix>/sft/{nll,perplexity,tokens}` with intervals over prompts; `_n` counts rows.

    Args:
        rows: n rows.
        nll_sums: (n,) summed negative log-likelihood of each response, nats.
        token_counts: (n,) tokens scored in each response.

    Raises:
        UserError: no response has a token, or a likelihood is not finite.
    """
    sums = checked_scores([row.id for row in rows], nll_sums)  # (n,)
    counts = np.asarray(token_counts, dtype=np.float64)  # (n,)
    if not counts.sum():
        raise UserError(
            f"none of the {len(rows)} rows to be evaluated has a response token",
            "the evaluation data",
            "raise backbone.max_length, or look at data_report.json",
        )
    sheet = MetricSheet(
        f"{prefix}/sft", [prompt_text(row.prompt) for row in rows], draws=draws, confidence=confidence, seed=seed
    )
    sheet.ratio("nll", sums, counts, n=len(rows))
    flat = sheet.metrics()
    # exp is monotone: the bounds of the perplexity are the bounds of the nll
    for ending in ("", "_low", "_high"):
        if f"{prefix}/sft/nll{ending}" in flat:
            flat[f"{prefix}/sft/perplexity{ending}"] = exp(min(flat[f"{prefix}/sft/nll{ending}"], 700.0))
    flat[f"{prefix}/sft/perplexity_n"] = flat[f"{prefix}/sft/nll_n"]
    flat[f"{prefix}/sft/tokens"] = float(counts.sum())
    return flat
