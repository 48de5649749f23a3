"""Prompts as tokens, ready to be continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saferlhf.data.rows import Prompt, Row
from saferlhf.data.templates import Template


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt that a policy is to continue.

    Attributes:
        row_id: what the sampling noise belongs to.
        token_ids: one at least; ends where the assistant begins to speak.
        prompt: the conversation itself, for scorers; empty where nobody needs it.
        truncated: whether it lost its beginning.
    """

    row_id: str
    token_ids: Sequence[int]
    prompt: Prompt = ()
    truncated: bool = False

    def __post_init__(self) -> None:
        if not len(self.token_ids):
            raise ValueError(f"prompt {self.row_id}: it needs at least one token")


def tokenize_prompts(
    rows: Sequence[Row], template: Template, tokenizer: Any, *, max_prompt_tokens: int | None = None
) -> list[PromptTokens]:
    """The prompts of rows of any kind, over-long ones cut from the left (the assistant's cue stays).

    Args:
        rows: what they hold beside the prompt is not looked at.
        template, tokenizer: of the policy.
        max_prompt_tokens: what is kept of each; None: all.
    """
    encoded = template.prompts_ids([row.prompt for row in rows], tokenizer)
    return [
        PromptTokens(row.id, ids if cut is None else ids[-cut:], row.prompt, cut is not None and len(ids) > cut)
        for row, ids, cut in ((row, ids, max_prompt_tokens) for row, ids in zip(rows, encoded, strict=True))
    ]


def first_samples(prompts: Sequence[PromptTokens], samples: int) -> list[int]:
    """Number of each prompt's first sample: a row that stands there again goes on counting."""
    seen: dict[str, int] = {}
    first = []
    for prompt in prompts:
        first.append(seen.get(prompt.row_id, 0))
        seen[prompt.row_id] = first[-1] + samples
    return first
