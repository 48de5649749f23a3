"""Responses of a policy for evaluation: the one place that calls the sampler, whatever it is.

The noise belongs to (seed, row id, sample, token), so two policies answer a prompt with the same noise: where they
have not moved apart they write the same response, and what is left of their difference is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from saferlhf.data.rows import PromptRow
from saferlhf.data.templates import end_id, get_template, pad_id
from saferlhf.errors import UserError
from saferlhf.evaluation.policy_answers import PolicyAnswers, PromptSet
from saferlhf.rollout.experience import Rollout
from saferlhf.rollout.generate import generate
from saferlhf.rollout.prompts import tokenize_prompts

MAX_LENGTH = 512
"""Tokens of prompt and response for a model that does not say."""


@dataclass(frozen=True)
class SamplingOptions:
    """How a policy is sampled.

    Attributes:
        samples: responses per prompt.
        temperature: divides the logits; 0 takes the most probable token.
        max_new_tokens: where a response is cut off.
        max_prompt_tokens: longer prompts lose their beginning.
        seed: of the noise.
        batch_size: responses at once; changes nothing but speed.
    """

    samples: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 256
    max_prompt_tokens: int = 256
    seed: int = 0
    batch_size: int = 64


@dataclass(frozen=True)
class Sampling:
    """Responses, with the token ids they are made of.

    Attributes:
        answers: n prompts, k responses each.
        prompt_ids: n * k lists of token ids, as the policy read them, those of one prompt side by side.
        response_ids: n * k lists of token ids, the end-of-sequence token included when it came.
        prompts_cut: prompts that lost their beginning.
    """

    answers: PolicyAnswers
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    prompts_cut: int


def room_for(lengths: Sequence[int | None], max_new_tokens: int | None) -> tuple[int, int]:
    """(tokens of a prompt, new tokens) that fit every one of the policies' lengths; half and half by default.

    Raises:
        UserError: the wanted new tokens leave no room for a prompt.
    """
    longest = min(length or MAX_LENGTH for length in lengths)
    new = longest // 2 if max_new_tokens is None else max_new_tokens
    if new >= longest:
        what = f"{new} new tokens leave no room for a prompt in the {longest} tokens that the model was trained for"
        raise UserError(what, "max_new_tokens", f"at most {longest - 1}, or null for {longest // 2}")
    return longest - new, new


def sample_policy(
    model: Any,
    tokenizer: Any,
    template: str,
    prompts: PromptSet,
    options: SamplingOptions,
    progress: Callable[[int], None] | None = None,
) -> Sampling:
    """Sample k responses to each of n prompts.

    Args:
        model: causal language model on the device it is to run on.
        tokenizer: its own.
        template: native | paper: the chat format it was trained in.
        progress: called with the number of responses that are complete so far.
    """
    rows = [PromptRow(row_id, prompt) for row_id, prompt in zip(prompts.ids, prompts.prompts, strict=True)]
    asked = tokenize_prompts(rows, get_template(template), tokenizer, max_prompt_tokens=options.max_prompt_tokens)
    rollout = generate(
        model,
        asked,
        samples=options.samples,
        seed=options.seed,
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        eos_token_id=end_id(tokenizer),
        pad_token_id=pad_id(tokenizer),
        batch_size=options.batch_size,
        tokenizer=tokenizer,
        progress=progress,
    )
    shape = (len(prompts), options.samples)
    assert rollout.responses is not None
    texts, ids = iter(rollout.responses), _response_ids(rollout)
    answers = PolicyAnswers(
        texts=tuple(tuple(next(texts) for _ in range(options.samples)) for _ in rows),
        tokens=rollout.response_lengths.numpy().reshape(shape),
        truncated=rollout.truncated.numpy().reshape(shape),
    )
    kept = [list(prompt.token_ids) for prompt in asked for _ in range(options.samples)]
    return Sampling(answers, kept, ids, sum(prompt.truncated for prompt in asked))


def _response_ids(rollout: Rollout) -> list[list[int]]:
    pairs = zip(rollout.input_ids, rollout.response_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]
