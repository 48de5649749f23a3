"""A file of toy pairs in PKU-SafeRLHF's columns, with rows damaged in every way, so many of each, none in two ways."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saferlhf.data import toyworld
from saferlhf.data.rows import PKU_CATEGORIES, PreferencePair

Raw = dict[str, Any]

COUNTS = {
    "non_text": 90,
    "bad_label": 110,
    "severity_range": 70,
    "unknown_category": 60,
    "wrong_hash": 50,
    "unlabelled": 40,
    "empty": 80,
    "identical": 75,
    "contradictory": 150,
    "duplicate": 95,
    "overlap": 100,
    "overlong": 80,
}
"""Damaged training rows of each kind: a thousand."""

TEST_COUNTS = {"non_text": 3, "empty": 4, "contradictory": 5}
"""And among the test rows."""

LONG = 300  # words of an over-long response


def raw(row: PreferencePair) -> Raw:
    """A pair as one line of the released files."""
    out: Raw = {"prompt": row.prompt[0].content, "response_0": row.response_0, "response_1": row.response_1}
    out |= {"prompt_source": "toyworld", "response_0_source": "toyworld", "response_1_source": "toyworld"}
    for side in (0, 1):
        found = getattr(row, f"response_{side}_harm_category") or ()
        out[f"is_response_{side}_safe"] = getattr(row, f"is_response_{side}_safe")
        out[f"response_{side}_harm_category"] = {name: name in found for name in PKU_CATEGORIES}
        out[f"response_{side}_severity_level"] = getattr(row, f"response_{side}_severity_level")
    out |= {"better_response_id": row.better_response_id, "safer_response_id": row.safer_response_id}
    return rehashed(out)


def rehashed(row: Raw) -> Raw:
    """With the right hashes where prompt and response are text."""
    for side in (0, 1):
        prompt, response = row["prompt"], row[f"response_{side}"]
        if isinstance(prompt, str) and isinstance(response, str):
            row[f"response_{side}_sha256"] = hashlib.sha256((prompt + response).encode()).hexdigest()
    return row


# ------------------------------------------------------------------------------------------------ damage
def _unsafe(row: Raw) -> int | None:
    """A side that is unsafe."""
    return next((side for side in (0, 1) if not row[f"is_response_{side}_safe"]), None)


def _non_text(row: Raw, n: int) -> None:
    column = ("prompt", "response_0", "response_1")[n % 3]
    row[column] = (None, 17, 2.5, ["a", "b"], {"text": 1}, True)[n % 6]


def _bad_label(row: Raw, n: int) -> None:
    bad = (("is_response_0_safe", "maybe"), ("safer_response_id", 2), ("better_response_id", "first"))
    bad += (("response_1_severity_level", "severe"), ("response_0_harm_category", {PKU_CATEGORIES[0]: "rather"}))  # type: ignore[assignment]
    column, value = bad[n % len(bad)]
    row[column] = value


def _severity_range(row: Raw, n: int) -> None:
    row[f"response_{n % 2}_severity_level"] = (4, -1, 17)[n % 3]


def _unknown_category(row: Raw, n: int) -> None:
    row[f"response_{n % 2}_harm_category"][("Time Travel", "violence")[n % 2]] = True


def _wrong_hash(row: Raw, n: int) -> None:
    row[f"response_{n % 2}_sha256"] = hashlib.sha256(b"something else").hexdigest()


def _unlabelled(row: Raw, n: int) -> None:
    row["better_response_id"], row["safer_response_id"] = (None, None) if n % 2 else (-1, -1)


def _empty(row: Raw, n: int) -> None:
    row[("prompt", "response_0", "response_1")[n % 3]] = ("", " \n\t")[n % 2]


def _identical(row: Raw, n: int) -> None:
    row["response_1"] = row["response_0"] + ("", " \n")[n % 2]


def _contradictory(row: Raw, n: int) -> None:
    side, other = n % 2, 1 - n % 2
    if n % 3 == 0:  # the safer response is the unsafe one
        _judge(row, side, safe=False)
        _judge(row, other, safe=True)
        row["safer_response_id"] = side
    else:  # safe with a severity or category; unsafe without one
        _judge(row, side, safe=n % 3 == 2)
        _judge(row, other, safe=n % 3 == 2)
        row[f"is_response_{side}_safe"] = n % 3 == 1
        row["safer_response_id"] = side if n % 3 == 1 else other


def _judge(row: Raw, side: int, *, safe: bool) -> None:
    row[f"is_response_{side}_safe"] = safe
    row[f"response_{side}_severity_level"] = 0 if safe else 2
    row[f"response_{side}_harm_category"] = {name: not safe and name == "Violence" for name in PKU_CATEGORIES}


def _overlong(row: Raw, n: int) -> None:
    words = row[f"response_{n % 2}"].split()
    row[f"response_{n % 2}"] = " ".join((words * LONG)[:LONG])


DAMAGE: dict[str, Callable[[Raw, int], None]] = {
    "non_text": _non_text,
    "bad_label": _bad_label,
    "severity_range": _severity_range,
    "unknown_category": _unknown_category,
    "wrong_hash": _wrong_hash,
    "unlabelled": _unlabelled,
    "empty": _empty,
    "identical": _identical,
    "contradictory": _contradictory,
    "overlong": _overlong,
}

CONTRADICTIONS = ("safer_is_unsafe", "safe_with_harm", "unsafe_without_harm")
"""What `_contradictory` does to row n, by n modulo 3."""


# ------------------------------------------------------------------------------------------------ files
@dataclass
class Damaged:
    """A folder with `train.jsonl` and `test.jsonl`.

    Attributes:
        counts: split -> kind -> damaged rows.
        lines: (split, kind) -> line numbers of the damaged rows.
        sound: split -> rows without damage.
    """

    folder: Path
    counts: dict[str, dict[str, int]]
    lines: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    sound: dict[str, int] = field(default_factory=dict)


def write(folder: Path, counts: dict[str, int], test_counts: dict[str, int], sound: int, seed: int = 0) -> Damaged:
    """Write the files; damaged rows stand anywhere among the sound ones, a duplicate somewhere below its original."""
    draw = random.Random(seed)
    out = Damaged(folder, {"train": counts, "test": test_counts})
    folder.mkdir(parents=True, exist_ok=True)
    in_place = sum(count for kind, count in counts.items() if kind != "duplicate")
    pairs = toyworld.preference_pairs(sound + in_place, split="train", seed=seed)
    tests = toyworld.preference_pairs(60 + sum(test_counts.values()), split="test", seed=seed)
    sound_tests = _damaged([raw(row) for row in tests], test_counts, draw)
    prompts = [row["prompt"] for kind, row in sound_tests if kind is None]
    _write(out, "test", sound_tests)

    rows = _damaged([raw(row) for row in pairs], {k: n for k, n in counts.items() if k in DAMAGE}, draw)
    free = [i for i, (kind, _) in enumerate(rows) if kind is None]
    draw.shuffle(free)
    for n in range(counts.get("overlap", 0)):
        _, row = rows[free[n]]
        # the same words, written otherwise
        prompt = prompts[n % len(prompts)]
        row["prompt"] = prompt.upper() + "?!" if n % 2 else f" {prompt}"
        rows[free[n]] = ("overlap", rehashed(row))
    free = free[counts.get("overlap", 0) :]
    copies = [(i, copy.deepcopy(rows[i][1])) for i in draw.sample(free, counts.get("duplicate", 0))]
    for n, (_, row) in enumerate(copies):
        if n % 2:
            _swap(row)
    for i, row in sorted(copies, key=lambda found: -found[0]):
        rows.insert(draw.randint(i + 1, len(rows)), ("duplicate", row))
    _write(out, "train", rows)
    return out


def _damaged(rows: list[Raw], counts: dict[str, int], draw: random.Random) -> list[tuple[str | None, Raw]]:
    found: list[tuple[str | None, Raw]] = [(None, row) for row in rows]
    places = draw.sample(range(len(rows)), sum(counts.values()))
    for kind, count in counts.items():
        for n in range(count):
            i = places.pop()
            DAMAGE[kind](rows[i], n)
            found[i] = (kind, rows[i] if kind == "wrong_hash" else rehashed(rows[i]))
    return found


def _swap(row: Raw) -> None:
    for name in [name for name in row if "response_0" in name]:
        other = name.replace("response_0", "response_1")
        row[name], row[other] = row[other], row[name]
    for name in ("better_response_id", "safer_response_id"):
        row[name] = 1 - row[name]


def _write(out: Damaged, split: str, rows: list[tuple[str | None, Raw]]) -> None:
    for number, (kind, _) in enumerate(rows, start=1):
        if kind is not None:
            out.lines.setdefault((split, kind), []).append(number)
    out.sound[split] = sum(kind is None for kind, _ in rows)
    text = "".join(json.dumps(row) + "\n" for _, row in rows)
    (out.folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
