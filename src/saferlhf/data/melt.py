"""Melt: pairs taken apart into answers or prompts, after they were checked as pairs.

Every response of a pair becomes one answer with its own labels; a response that several pairs share stays once, as it
was labelled first. `data.answers` may take only some of them: demonstrations must not teach unsafe responses. Published
numbers over one side of the pairs are over all pairs, so `response_0` and `response_1` give an answer for each of them,
those that several pairs share too, as each was labelled there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from saferlhf.data.columns import answer_id, prompt_id
from saferlhf.data.rows import PreferencePair, PromptRow, QuestionAnswer, Row

Melted = list[tuple[Row, str]]
"""Rows, each with the id of the row it was taken from."""


def as_kind(rows: Iterable[Row], kind: type[Row], answers: str | None = None) -> tuple[Melted, Counter[str]]:
    """Rows of the wanted kind.

    Args:
        rows: checked rows; rows of the wanted kind pass as they are.
        kind: `QuestionAnswer` and `PromptRow` are taken out of pairs, prompts out of answers too.
        answers: which responses of a pair become answers, a key of `ANSWERS`; None is `all`.

    Returns:
        The rows, and counts: `made` out of others, `repeated` ones left out, and of these those with `other_labels`.
    """
    out: Melted = []
    counts: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    seen: dict[str, Row] = {}
    for row in rows:
        if isinstance(row, kind):
            made = [row]
        elif kind is PromptRow:
            made = [PromptRow(prompt_id(row.prompt), row.prompt)]
        else:
            assert isinstance(row, PreferencePair) and kind is QuestionAnswer, "rows are not put together into pairs"
            made = [answer_of(row, side) for side in ANSWERS[answers or "all"](row)]
        for new in made:
            if new.id in seen and new is not row and kind is QuestionAnswer and answers in ONE_OF_EACH:
                copies[new.id] += 1
                new = replace(new, id=f"{new.id}-{copies[new.id]}")
            elif new.id in seen:
                counts["repeated"] += 1
                counts["other_labels"] += seen[new.id] != new
                continue
            seen[new.id] = new
            counts["made"] += new is not row
            out.append((new, row.id))
    return out, counts


def answer_of(row: PreferencePair, side: int) -> QuestionAnswer:
    """One response of a pair with its labels."""
    response = row.response_1 if side else row.response_0
    return QuestionAnswer(
        id=answer_id(row.prompt, response),
        prompt=row.prompt,
        response=response,
        is_safe=row.is_response_1_safe if side else row.is_response_0_safe,
        harm_category=row.response_1_harm_category if side else row.response_0_harm_category,
        severity_level=row.response_1_severity_level if side else row.response_0_severity_level,
    )


# ------------------------------------------------------------------------------------------------ which answers
def _safe(row: PreferencePair) -> tuple[bool | None, bool | None]:
    return (row.is_response_0_safe, row.is_response_1_safe)


def _winner(row: PreferencePair, *names: str) -> list[int]:
    ids = [getattr(row, f"{name}_response_id") for name in names]
    return [side for side in ids if side is not None][:1]


ANSWERS: dict[str, Callable[[PreferencePair], list[int]]] = {
    "all": lambda row: [0, 1],
    "better": lambda row: _winner(row, "better"),
    "safer": lambda row: _winner(row, "safer"),
    "safe": lambda row: [side for side in (0, 1) if _safe(row)[side]],
    # the better one, else the preferred, else the safer; never one that is labelled unsafe
    "best": lambda row: [s for s in _winner(row, "better", "single", "safer") if _safe(row)[s] is not False],
    # sides as the file has them: shuffling comes later
    "response_0": lambda row: [0],
    "response_1": lambda row: [1],
}
"""`data.answers` -> sides of a pair."""

ONE_OF_EACH = ("response_0", "response_1")
"""Those that give one answer for each pair, repeated ones with ids of their own."""

__all__ = ["ANSWERS", "Melted", "answer_of", "as_kind"]
