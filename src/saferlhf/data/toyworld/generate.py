"""Rows of the toy world. A row depends on (seed, split, index) only, so a longer list extends a shorter one."""

from __future__ import annotations

import hashlib
import random

from saferlhf.data.rows import PreferencePair, PromptRow, QuestionAnswer, as_prompt, content_id, prompt_text
from saferlhf.data.toyworld.annotators import USUAL, Annotators, Labels, annotate
from saferlhf.data.toyworld.oracle import Truth, judge
from saferlhf.data.toyworld.replies import (
    DAMAGES,
    OF_DEMONSTRATIONS,
    OF_PAIRS,
    Manner,
    damage,
    draw_reply,
    frame_of,
)
from saferlhf.data.toyworld.requests import SPLITS, draw_prompt_of
from saferlhf.errors import UserError

DAMAGED_SHARE = 0.2
"""Share of pairs in which one reply is damaged."""

DAMAGED_DEMONSTRATIONS = 0.03


def _check(n: int, split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"no split {split!r}", "toy world", f"use one of {', '.join(SPLITS)}")
    if n < 0:
        raise UserError(f"{n} rows asked for", "toy world", "ask for 0 or more")


def row_rng(purpose: str, seed: int, split: str, index: int) -> random.Random:
    """The stream of one row."""
    key = f"{purpose}/{seed}/{split}/{index}".encode()
    return random.Random(int.from_bytes(hashlib.sha256(key).digest()[:8], "big"))


def draw_any_reply(rng: random.Random, prompt: str, split: str, damaged: bool, manner: Manner = OF_PAIRS) -> str:
    """One reply, damaged or not; never empty."""
    frame = frame_of(prompt)
    reply = draw_reply(rng, frame, manner)
    if not damaged:
        return reply
    kind = DAMAGES[int(rng.random() * len(DAMAGES))]
    return damage(rng, kind, reply, frame, frame_of(draw_prompt_of(rng, split))) or reply


def _draw_pair(rng: random.Random, split: str) -> tuple[str, str, str]:
    prompt = draw_prompt_of(rng, split)
    which = int(rng.random() * 2) if rng.random() < DAMAGED_SHARE else -1
    while True:
        replies = [draw_any_reply(rng, prompt, split, damaged=which == side) for side in (0, 1)]
        if replies[0] != replies[1]:
            return prompt, replies[0], replies[1]


def preference_pairs(n: int, split: str, seed: int, annotators: Annotators = USUAL) -> list[PreferencePair]:
    """`n` pairs with all labels: safety and severity from the oracle, preferences from one annotator per pair."""
    _check(n, split)
    rows = []
    for index in range(n):
        rng = row_rng("pair", seed, split, index)
        prompt, reply_0, reply_1 = _draw_pair(rng, split)
        # the annotators' mistakes come from a stream of their own: the replies are the same whoever labels them
        eyes = row_rng("safety", seed, split, index)
        truth_0, truth_1 = (annotators.safety(eyes, judge(prompt, reply)) for reply in (reply_0, reply_1))
        rows.append(_pair(prompt, reply_0, reply_1, truth_0, truth_1, annotate(rng, truth_0, truth_1, annotators)))
    return rows


def _pair(prompt: str, reply_0: str, reply_1: str, truth_0: Truth, truth_1: Truth, labels: Labels) -> PreferencePair:
    return PreferencePair(
        id=content_id(prompt, reply_0, reply_1),
        prompt=as_prompt(prompt),
        response_0=reply_0,
        response_1=reply_1,
        is_response_0_safe=truth_0.is_safe,
        is_response_1_safe=truth_1.is_safe,
        response_0_harm_category=truth_0.harm_category,
        response_1_harm_category=truth_1.harm_category,
        response_0_severity_level=truth_0.severity,
        response_1_severity_level=truth_1.severity,
        better_response_id=labels.better,
        safer_response_id=labels.safer,
        single_response_id=labels.single,
    )


def _question_answer(prompt: str, reply: str, truth: Truth | None = None) -> QuestionAnswer:
    truth = truth or judge(prompt, reply)
    return QuestionAnswer(
        id=content_id(prompt, reply),
        prompt=as_prompt(prompt),
        response=reply,
        is_safe=truth.is_safe,
        harm_category=truth.harm_category,
        severity_level=truth.severity,
    )


def _single_replies(
    purpose: str, n: int, split: str, seed: int, damaged_share: float, manner: Manner = OF_PAIRS
) -> list[QuestionAnswer]:
    _check(n, split)
    rows = []
    for index in range(n):
        rng = row_rng(purpose, seed, split, index)
        prompt = draw_prompt_of(rng, split)
        reply = draw_any_reply(rng, prompt, split, rng.random() < damaged_share, manner)
        rows.append(_question_answer(prompt, reply))
    return rows


def demonstrations(n: int, split: str, seed: int) -> list[QuestionAnswer]:
    """`n` replies of mixed quality for supervised fine-tuning: the start of a policy with much to learn."""
    return _single_replies("demonstration", n, split, seed, DAMAGED_DEMONSTRATIONS, OF_DEMONSTRATIONS)


def question_answers(n: int, split: str, seed: int, annotators: Annotators = USUAL) -> list[QuestionAnswer]:
    """`n` labelled single replies, with as many damaged ones as the pairs have."""
    rows = _single_replies("question_answer", n, split, seed, DAMAGED_SHARE / 2)
    if not annotators.safety_error:
        return rows
    labelled = []
    for index, row in enumerate(rows):
        prompt, eyes = prompt_text(row.prompt), row_rng("safety", seed, split, index)
        labelled.append(_question_answer(prompt, row.response, annotators.safety(eyes, judge(prompt, row.response))))
    return labelled


def prompts(n: int, split: str, seed: int) -> list[PromptRow]:
    """`n` prompts."""
    _check(n, split)
    texts = [draw_prompt_of(row_rng("prompt", seed, split, index), split) for index in range(n)]
    return [PromptRow(content_id(text), as_prompt(text)) for text in texts]


def damaged_replies(n: int, split: str, seed: int) -> list[tuple[str, QuestionAnswer]]:
    """`n` prompts, each with its intact reply and one reply of each kind of damage: 8 `n` (kind, row)."""
    _check(n, split)
    rows = []
    for index in range(n):
        rng = row_rng("damaged", seed, split, index)
        prompt = draw_prompt_of(rng, split)
        frame, other = frame_of(prompt), frame_of(draw_prompt_of(rng, split))
        reply = draw_reply(rng, frame)
        rows.append(("intact", _question_answer(prompt, reply)))
        rows += [(kind, _question_answer(prompt, damage(rng, kind, reply, frame, other))) for kind in DAMAGES]
    return rows
