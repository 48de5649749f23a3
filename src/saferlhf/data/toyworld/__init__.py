"""The toy world: a small generated language with known ground truth, in PKU-SafeRLHF's schema."""

from saferlhf.data.toyworld.annotators import Annotators
from saferlhf.data.toyworld.generate import (
    damaged_replies,
    demonstrations,
    preference_pairs,
    prompts,
    question_answers,
)
from saferlhf.data.toyworld.measure import BestPoint, best_point, best_replies, statistics
from saferlhf.data.toyworld.oracle import Truth, judge
from saferlhf.data.toyworld.requests import is_harmful_request, prompt_space, split_of
from saferlhf.data.toyworld.words import vocabulary

__all__ = [
    "Annotators",
    "BestPoint",
    "Truth",
    "best_point",
    "best_replies",
    "damaged_replies",
    "demonstrations",
    "is_harmful_request",
    "judge",
    "preference_pairs",
    "prompt_space",
    "prompts",
    "question_answers",
    "split_of",
    "statistics",
    "vocabulary",
]
