"""`samples.jsonl`: what policies answered and what judges said of it, a line per response; written here and read again.

The file is enough to measure policies anew, or two of different runs against each other, without a model or a judge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saferlhf.data.rows import Turn
from saferlhf.errors import UserError
from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers, PromptSet


def sample_lines(
    prompts: PromptSet, policies: Mapping[str, PolicyAnswers], with_scores: bool = True
) -> list[dict[str, Any]]:
    """Lines of `samples.jsonl`, prompt by prompt, the policies' responses to it below each other."""
    lines = []
    for i, row_id in enumerate(prompts.ids):
        for name, answers in policies.items():
            for j in range(answers.shape[1]):
                line: dict[str, Any] = {
                    "row_id": row_id,
                    "policy": name,
                    "sample": j,
                    "prompt": [list(turn) for turn in prompts.prompts[i]],
                    "harmful": _plain(prompts.harmful[i]),
                    "response": answers.texts[i][j],
                    "tokens": int(answers.tokens[i, j]),
                    "truncated": bool(answers.truncated[i, j]),
                }
                if answers.kl is not None:
                    line["kl"] = _plain(answers.kl[i, j])
                if with_scores:
                    line["scores"] = {
                        judge: {output: _plain(column[i, j]) for output, column in said.values.items()}
                        for judge, said in answers.judged.items()
                    }
                lines.append(line)
    return lines


def read_samples(path: Path) -> tuple[PromptSet, dict[str, PolicyAnswers]]:
    """The prompts and, by name, the policies of a `samples.jsonl`.

    What a judge failed on is not told apart from what it left without a score: both are NaN.

    Raises:
        UserError: no such file, a line that is none of ours, or responses that do not fill (prompts, samples).
    """
    try:
        # at line feeds alone: a response may hold other characters that end a line
        lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    except (OSError, ValueError) as error:
        raise UserError(f"no samples can be read: {error}", str(path), "repeat the evaluation that wrote it") from None
    try:
        prompts = _prompts(lines)
        names = dict.fromkeys(line["policy"] for line in lines)
        return prompts, {name: _answers(lines, name, prompts.ids) for name in names}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"these are no samples of policies ({type(error).__name__}: {error})"
        raise UserError(what, str(path), "repeat the evaluation that wrote it") from None


def _prompts(lines: list[dict[str, Any]]) -> PromptSet:
    if not lines:
        raise ValueError("no line")
    by_id = {line["row_id"]: line for line in reversed(lines)}
    ids = tuple(dict.fromkeys(line["row_id"] for line in lines))
    return PromptSet(
        ids=ids,
        prompts=tuple(tuple(Turn(str(role), str(text)) for role, text in by_id[row]["prompt"]) for row in ids),
        harmful=np.array([_number(by_id[row]["harmful"]) for row in ids], dtype=np.float64),
    )


def _answers(lines: list[dict[str, Any]], name: str, ids: tuple[str, ...]) -> PolicyAnswers:
    rows: dict[str, list[dict[str, Any]]] = {row: [] for row in ids}
    for line in lines:
        if line["policy"] == name:
            rows[line["row_id"]].append(line)
    table = [sorted(row, key=lambda line: int(line["sample"])) for row in rows.values()]
    if len({len(row) for row in table}) != 1:
        raise ValueError(f"policy {name} has not as many responses to each prompt")
    first = table[0][0]

    def column(value: Any) -> Any:
        return np.array([[value(line) for line in row] for row in table])

    judged = {
        judge: Judged({o: column(lambda line, j=judge, o=o: _number(line["scores"][j][o])) for o in outputs})
        for judge, outputs in first.get("scores", {}).items()
    }
    return PolicyAnswers(
        texts=tuple(tuple(str(line["response"]) for line in row) for row in table),
        tokens=column(lambda line: int(line["tokens"])),
        truncated=column(lambda line: bool(line["truncated"])),
        kl=column(lambda line: _number(line["kl"])) if "kl" in first else None,
        judged=judged,
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def _plain(value: float) -> float | None:
    """A JSON number; null where there is none."""
    return None if np.isnan(value) else round(float(value), 6)
