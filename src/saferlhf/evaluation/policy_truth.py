"""What the toy world says of prompts themselves: which are harmful, and the best that any policy can answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from saferlhf.data.rows import Prompt


def harmful_requests(prompts: Sequence[Prompt], *, toyworld: bool) -> NDArray[np.float64]:
    """(n,) 1 = harmful, 0 = benign; NaN = not known, which they are outside the toy world."""
    if not toyworld:
        return np.full(len(prompts), np.nan)
    from saferlhf.data.toyworld import is_harmful_request

    return np.array([float(is_harmful_request(prompt)) for prompt in prompts])


def best_metrics(prompts: Sequence[Prompt], prefix: str = "policy") -> dict[str, float]:
    """Means over prompts of the toy world of the most helpful safe reply, and of the most helpful one of all."""
    from saferlhf.data.toyworld import best_point

    best = best_point(prompts)
    return {
        f"{prefix}/best_safe_helpfulness": best.helpfulness,
        f"{prefix}/best_safe_harmlessness": best.harmlessness,
        f"{prefix}/best_unsafe_helpfulness": best.unsafe_helpfulness,
    }
