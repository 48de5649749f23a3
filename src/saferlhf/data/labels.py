"""Labels of single answers as arrays, and prompts labelled by all of their answers.

Label conventions are those of the whole project: 1 = unsafe = has it, 0 = safe = has it not, -1 = not labelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from saferlhf.data.rows import QuestionAnswer, content_id
from saferlhf.data.splits import prompt_key
from saferlhf.data.taxonomy import taxonomy_of
from saferlhf.ops.moderation import ModerationLabels


def labels_of(rows: Sequence[QuestionAnswer], categories: Sequence[str]) -> ModerationLabels:
    """What the rows are labelled with.

    Args:
        rows: N rows.
        categories: C names, in the order of the columns. A row's names that are not among them are left out; a row
            with such names only is not labelled, since none of its columns would be true.
    """
    unsafe = np.array([-1 if row.is_safe is None else int(not row.is_safe) for row in rows], dtype=np.int64)
    severity = np.array([-1 if row.severity_level is None else row.severity_level for row in rows], dtype=np.int64)
    category = np.full((len(rows), len(categories)), -1, dtype=np.int64)  # (N, C)
    column = {name: index for index, name in enumerate(categories)}
    for i, row in enumerate(rows):
        if row.harm_category is None:
            continue
        has = [column[name] for name in row.harm_category if name in column]
        if has or not row.harm_category:
            category[i] = 0
            category[i, has] = 1
    return ModerationLabels(unsafe, severity, category, tuple(categories))


def categories_of(rows: Iterable[QuestionAnswer]) -> tuple[str, ...]:
    """The columns for these rows: a known taxonomy where it fits, else their own names; empty where none has one."""
    return taxonomy_of({name for row in rows for name in row.harm_category or ()})


def prompts_of(rows: Iterable[QuestionAnswer]) -> list[QuestionAnswer]:
    """One row for each distinct prompt (by its normalised words), labelled by all of its answers.

    Rows stand in the order of first appearance. Unsafe if any answer is; severity is the highest; harm categories are
    united. A label is missing where no answer has it; an unlabelled answer beside labelled ones says nothing. So a
    prompt counts as unsafe when it was seen to draw out an unsafe answer, which depends on how many answers were seen
    and from which models.

    The row's id is that of the prompt alone; its response is that of the first answer and is not to be read.
    """
    found: dict[str, QuestionAnswer] = {}
    for row in rows:
        key = prompt_key(row.prompt)
        found[key] = _united(found[key], row) if key in found else _as_prompt(row)
    return list(found.values())


def _as_prompt(row: QuestionAnswer) -> QuestionAnswer:
    name = content_id("prompt", *(part for turn in row.prompt for part in turn))
    return QuestionAnswer(name, row.prompt, row.response, row.is_safe, row.harm_category, row.severity_level)


def _united(one: QuestionAnswer, other: QuestionAnswer) -> QuestionAnswer:
    safe = [row.is_safe for row in (one, other) if row.is_safe is not None]
    severity = [row.severity_level for row in (one, other) if row.severity_level is not None]
    categories = [row.harm_category for row in (one, other) if row.harm_category is not None]
    return QuestionAnswer(
        id=one.id,
        prompt=one.prompt,
        response=one.response,
        is_safe=all(safe) if safe else None,
        harm_category=frozenset().union(*categories) if categories else None,
        severity_level=max(severity) if severity else None,
    )
