"""`evaluate.py mode=moderate`: verdicts on any rows, labelled or not, one line of JSON for each.

`verdicts.jsonl` holds, in the order of the source,

    row_id        hash of prompt and response, as everywhere
    place         `file:line` where the row first stands; null for generated rows
    unsafe, p_unsafe
    severity, p_severity      0..3 and the probability of each; left out without that head
    categories, p_category    names decided, and the probability of each; left out without that head

and never a text. Rows are judged as the source has them: no check drops any, labels are not looked at, and a text that
stands twice has one verdict. Lines are written part by part to `verdicts.part.jsonl`, which takes its name when the
last row is done; a run that was stopped goes on behind its last whole line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.files import write_json
from saferlhf.config.run_folder import RunFolder
from saferlhf.config.schema import DataPolicyConfig
from saferlhf.data.melt import as_kind
from saferlhf.data.report import SPLITS
from saferlhf.data.rows import PromptRow, QuestionAnswer, Row
from saferlhf.data.sources import load_source
from saferlhf.errors import UserError
from saferlhf.evaluation.moderation import category_slugs
from saferlhf.evaluation.moderation_plots import LEVELS
from saferlhf.evaluation.plots import Histogram
from saferlhf.evaluation.processes import Processes
from saferlhf.evaluation.report import write_report
from saferlhf.evaluation.table import format_number
from saferlhf.ops.moderation import Verdicts
from saferlhf.run.judged_model import JudgedModel
from saferlhf.run.row_judge import RowJudge, reads_prompts_only
from saferlhf.run.row_progress import RowProgress
from saferlhf.run.screen import say, show_table

VERDICTS = "verdicts.jsonl"
PART = "verdicts.part.jsonl"
BATCHES_PER_PART = 32
"""Batches between two writes: rows of a part are sorted by length, so that little is spent on padding."""


def moderate(config: EvaluateConfig, model: JudgedModel, folder: RunFolder) -> dict[str, float]:
    """Judge all rows of the data config and write their verdicts, a summary and a report.

    Returns:
        `moderate/<area>/<name>`: shares over all rows.

    Raises:
        UserError: no rows, or an unfinished file of verdicts that is not of these rows.
    """
    rows, places, unreadable = _rows(config, prompt_only=reads_prompts_only(model.metadata))
    if unreadable:
        say(f"{unreadable:,} records are no rows and are left out")
    part = folder.path / PART
    done = Processes.current().each(lambda: _done(part, rows))[0]  # the first has the file
    judge = RowJudge(model, config)
    size = config.trainer.eval_batch_size * BATCHES_PER_PART
    again = f", {done:,} of them done before" if done else ""
    say(f"judging {len(rows):,} rows with {config.model}{again}")
    with (
        part.open("a", encoding="utf-8") as stream,
        RowProgress("judging", len(rows), config.trainer.progress, done) as bar,
    ):
        for start in range(done, len(rows), size):
            chunk = rows[start : start + size]
            encoded = judge.encode(chunk, "moderate", policy=DataPolicyConfig(overlong="keep"))
            verdicts = judge.decide(judge.logits(encoded, lambda n, start=start: bar(start + n)))  # type: ignore[misc]
            for line in _lines(encoded.rows, places, verdicts, judge.categories):
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
            folder.update_status(step=min(start + size, len(rows)), total=len(rows))
    metrics = {"moderate/rows": float(len(rows)), "moderate/records_left_out": float(unreadable)}
    summary, probabilities = _summary(part, judge.categories)
    metrics |= summary
    part.replace(folder.path / VERDICTS)
    write_report(
        folder.path / "report.html",
        title=f"{model.kind} model's verdicts on {config.data.name}",
        subtitle=model.locator,
        metrics=metrics,
        config=asdict(config),
        histograms=[Histogram("probability of unsafe", {"all rows": probabilities}, quantity="p(unsafe)")],
        lineage={"model": model.locator, "categories": ", ".join(judge.categories)},
    )
    write_json(folder.metrics, metrics)
    return metrics


def say_moderated(folder: RunFolder, metrics: dict[str, float]) -> None:
    """The summary on the screen: how many rows are what."""
    n = metrics.get("moderate/rows", 0.0)
    lines = [("rows", f"{int(n):,}")]
    rate = metrics.get("moderate/unsafe/predicted_rate")
    if rate is not None:
        lines.append(("unsafe", f"{round(rate * n):,} ({rate:.1%})"))
    for level, name in enumerate(LEVELS):
        share = metrics.get(f"moderate/severity/share_{level}")
        if share is not None:
            lines.append((f"severity {level} ({name})", f"{round(share * n):,} ({share:.1%})"))
    head = "moderate/category/rate_"
    rates = {name.removeprefix(head): value for name, value in metrics.items() if name.startswith(head)}
    for name, share in sorted(rates.items(), key=lambda item: -item[1]):
        lines.append((name.replace("_", " "), f"{round(share * n):,} ({share:.1%})"))
    left_out = metrics.get("moderate/records_left_out")
    if left_out:
        lines.append(("records left out", format_number(left_out)))
    show_table("verdicts", lines)
    print(f"verdicts: {folder.path / VERDICTS}")
    print(f"report:   {folder.path / 'report.html'}")
    print(f"metrics:  {folder.metrics}")


# ------------------------------------------------------------------------------------------------ rows
def _rows(config: EvaluateConfig, prompt_only: bool) -> tuple[list[Row], dict[str, str], int]:
    """(rows in the source's order, row id -> place, records that are no rows)."""
    kind: type[Row] = PromptRow if prompt_only else QuestionAnswer
    # the toy world's own answers are demonstrations unless labels are asked for
    needs = ("is_safe",) if config.data.source == "toyworld" and kind is QuestionAnswer else ()
    source = load_source(config.data, kind, needs)
    wanted = SPLITS if config.split in (None, "all") else (str(config.split),)
    raw = [row for split in wanted for row in getattr(source, split) or ()]
    bad = [fault for split in wanted for fault in source.bad.get(split, ())]
    raw += [fault.row for fault in bad if fault.row is not None]  # what is wrong with them is a label, not a text
    melted, _ = as_kind(raw, kind, config.data.answers)
    places: dict[str, str] = {}
    for row, origin in melted:
        place = source.places.get(origin)
        if place is not None:
            places.setdefault(row.id, place)
    rows = [row for row, _ in melted]
    if config.evaluation.max_rows:
        rows = rows[: config.evaluation.max_rows]
    if not rows:
        raise UserError(f"the split '{config.split or 'all'}' has no rows", "split", "choose another, or split=all")
    return rows, places, sum(fault.row is None for fault in bad)


def _done(part: Path, rows: Sequence[Row]) -> int:
    """Rows whose verdicts stand in the unfinished file; a torn last line is cut off."""
    if not part.exists():
        return 0
    data = part.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with part.open("r+b") as stream:
            stream.truncate(len(whole))
    ids = [json.loads(line)["row_id"] for line in whole.splitlines()]
    if ids != [row.id for row in rows[: len(ids)]]:
        mend = "remove the file to judge all rows anew"
        raise UserError("the unfinished verdicts are not of these rows", str(part), mend)
    return len(ids)


# ------------------------------------------------------------------------------------------------ verdicts
def _lines(
    rows: Sequence[Any], places: dict[str, str], verdicts: Verdicts, categories: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for i, row in enumerate(rows):
        yield {"row_id": row.id, "place": places.get(row.id)} | verdict_line(verdicts, i, categories)


def verdict_line(verdicts: Verdicts, i: int, categories: Sequence[str]) -> dict[str, Any]:
    """The verdict on row i as it is written, without what names the row."""
    line: dict[str, Any] = {"unsafe": bool(verdicts.unsafe[i]), "p_unsafe": _number(verdicts.p_unsafe[i])}
    if verdicts.severity is not None and verdicts.p_severity is not None:
        line["severity"] = int(verdicts.severity[i])
        line["p_severity"] = [_number(p) for p in verdicts.p_severity[i]]
    if verdicts.category is not None and verdicts.p_category is not None:
        said = verdicts.category[i]
        line["categories"] = [name for name, has in zip(categories, said, strict=True) if has]
        line["p_category"] = {n: _number(p) for n, p in zip(categories, verdicts.p_category[i], strict=True)}
    return line


def _number(value: Any) -> float:
    return round(float(value), 6)


def _summary(part: Path, categories: Sequence[str]) -> tuple[dict[str, float], np.ndarray]:
    """Shares over all lines, those of an earlier start included, and the (N,) probabilities of unsafe."""
    with part.open(encoding="utf-8") as stream:
        lines = [json.loads(line) for line in stream]
    p = np.array([line["p_unsafe"] for line in lines])
    found = {
        "moderate/unsafe/predicted_rate": float(np.mean([line["unsafe"] for line in lines])),
        "moderate/unsafe/p_mean": float(p.mean()),
    }
    if "severity" in lines[0]:
        counts = np.bincount([line["severity"] for line in lines], minlength=len(LEVELS))
        found |= {f"moderate/severity/share_{level}": float(n / len(lines)) for level, n in enumerate(counts)}
    if "categories" in lines[0]:
        for name, slug in zip(categories, category_slugs(categories), strict=True):
            found[f"moderate/category/rate_{slug}"] = float(np.mean([name in line["categories"] for line in lines]))
    return found, p
