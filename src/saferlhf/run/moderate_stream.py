"""`evaluate.py mode=moderate input=FILE|- output=FILE|-`: records come in line by line, verdicts go out line by line.

    {"id": 7, "prompt": "...", "response": "..."}
    -> {"line": 1, "id": 7, "unsafe": true, "p_unsafe": 0.91, "unsafe_threshold": 0.45, "severity": 2, ...}

Beside `mode=moderate data=...`, which judges a data set as a run of its own with a report, this is a filter for a shell
pipeline and for files of any size:

- Memory is bounded: `BATCHES` batches, of a slow pipe what is there, are read, judged in the order of their lengths,
  written in the order in which they came, and forgotten.
- One line out for each line in that is not blank, and no other: all else that is said goes to the error stream. A line
  that cannot be judged gives `{"line": n, "error": "..."}`. No line holds a text.
- Each record is read by itself, in any form that `data.columns` and `data.layout` can name; labels are not looked at,
  and a text that stands twice is judged twice.
- A stopped file goes on: `run/stream_output.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from saferlhf import __version__
from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.schema import DataConfig, DataPolicyConfig
from saferlhf.data.columns import HASH_COLUMNS, answer_id, canonical_columns, choose_columns, prompt_id
from saferlhf.data.files import Record
from saferlhf.data.parse import BadValue, Reader
from saferlhf.data.rows import PromptRow, QuestionAnswer, Row
from saferlhf.data.sources.layouts import choose_layout
from saferlhf.errors import UserError
from saferlhf.models.locator import content_id_of
from saferlhf.ops.calibration import Calibration
from saferlhf.run.as_trained import as_trained
from saferlhf.run.judged_model import JudgedModel, judged_model
from saferlhf.run.moderate import verdict_line
from saferlhf.run.row_judge import RowJudge, reads_prompts_only
from saferlhf.run.screen import say
from saferlhf.run.stream_input import InputLines, Line
from saferlhf.run.stream_output import Tally, VerdictFile, VerdictPipe, open_output
from saferlhf.training.display import duration
from saferlhf.training.progress import LINE_S, resolve_mode

BATCHES = 8
"""Batches that are read at once: rows are sorted by length among them, so that little is spent on padding."""

TEXTS = ("prompt", "response")
"""Canonical columns that are read."""


def moderate_stream(config: EvaluateConfig) -> dict[str, float]:
    """Judge the lines of `input` and write one line about each to `output`.

    Returns:
        `moderate/rows`, `moderate/records_left_out` and the share called unsafe, over all lines of the output.

    Raises:
        UserError: no such input, no model for this, no record of the first ones has the columns, or an output that was
            begun with something else.
    """
    model = judged_model(config)
    config = as_trained(config, model)
    assert config.input is not None, "whoever calls this has looked"
    settings = _settings(config, model)
    # whatever a library prints while it loads, standard output is for verdicts
    with (
        InputLines(config.input) as lines,
        open_output(config.output, lines) as out,
        contextlib.redirect_stdout(sys.stderr),
    ):
        if lines.path is None and sys.stdin.isatty():
            say("reading from the terminal: one JSON object per line, Ctrl-D ends")
        try:
            _judge_all(config, model, settings, lines, out)
        except KeyboardInterrupt:
            if isinstance(out, VerdictFile):
                raise
            what = f"interrupted: verdicts up to line {out.tally.last:,} were written"
            raise KeyboardInterrupt(what) from None
    _say_done(out)
    tally = out.tally
    metrics = {"moderate/rows": float(tally.rows), "moderate/records_left_out": float(tally.errors)}
    if tally.rows:
        metrics["moderate/unsafe/predicted_rate"] = tally.unsafe / tally.rows
    return metrics


def _judge_all(
    config: EvaluateConfig,
    model: JudgedModel,
    settings: Mapping[str, Any],
    lines: InputLines,
    out: VerdictPipe | VerdictFile,
) -> None:
    """Go on where it was stopped: read, note how far was read, judge, write; then the next."""
    pending = out.go_on(lines, settings)
    before, share = out.tally.last, lines.share
    records = Records(config.data, prompt_only=reads_prompts_only(model.metadata), where=lines.where)
    size = BATCHES * config.trainer.eval_batch_size
    chunks = ([records.read(line) for line in chunk] for chunk in _chunks(lines, pending, size))
    meta = {"saferlhf": __version__, "model": model.locator, "kind": model.kind, "settings": dict(settings)}
    first = next(chunks, None)
    if first is None:
        if before:
            say(f"finished before: line {before:,} of {lines.where} is the last")
        out.note(lines, meta | out.meta | _counts(out.tally, finished=True))
        return
    if not before:
        _refuse_without_columns(first)
    judge = RowJudge(model, config)
    meta["calibration"] = judge.calibration.to_dict()
    again = f", behind the {before:,} lines judged before" if before else ""
    say(f"judging {lines.where} with {config.model}{again}; {_thresholds(judge.calibration)}")
    with StreamProgress("judging", config.trainer.progress, share) as bar:
        for asked in itertools.chain([first], chunks):
            out.note(lines, meta | _counts(out.tally, finished=False))
            till = lines.share
            out.write(_judged(asked, judge, bar.part(len(asked), till)))
            bar.done(len(asked), till)
    out.note(lines, meta | _counts(out.tally, finished=True))


def _chunks(lines: InputLines, pending: list[Line], size: int) -> Iterator[list[Line]]:
    """Lines that were read already, then the rest, so many at once."""
    for start in range(0, len(pending), size):
        yield pending[start : start + size]
    pending.clear()
    while chunk := lines.read(size):
        yield chunk


# ------------------------------------------------------------------------------------------------ records
class Asked(NamedTuple):
    """A record as it was understood: a row, or why there is none."""

    head: dict[str, Any]
    row: Row | None = None
    error: UserError | None = None


class Records:
    """Rows out of lines, each by itself: the columns of one say nothing of those of the next.

    Args:
        data: its columns and its layout are used.
        prompt_only: responses are not needed.
        where: the input, for messages.
    """

    def __init__(self, data: DataConfig, prompt_only: bool, where: str) -> None:
        self._kind: type[Row] = PromptRow if prompt_only else QuestionAnswer
        self._layout, self._where = data.layout, where
        others = {name for kind in HASH_COLUMNS for name in (*canonical_columns(kind), *HASH_COLUMNS[kind])}
        labels = (others | {"group"}) - set(TEXTS)
        self._mapping = {name: column for name, column in (data.columns or {}).items() if name not in labels}

    def read(self, line: Line) -> Asked:
        """What stands in a line; nothing is raised, whatever it is."""
        head: dict[str, Any] = {"line": line.number}
        place = f"{self._where}:{line.number}"
        try:
            record = Record(_values(line, place), place)
            name = record.values.get("id")
            if isinstance(name, str | int) or (isinstance(name, float) and math.isfinite(name)):
                head["id"] = name
            return Asked(head, self._row(record))
        except UserError as error:
            return Asked(head, None, error)

    def _row(self, record: Record) -> Row:
        made = choose_layout(self._layout, [record]).records(record, self._kind)
        if len(made) != 1:
            raise BadValue("unreadable", f"this record holds {len(made)} rows, one is needed", record.place)
        plain = made[0]
        if isinstance(plain, BadValue):
            raise plain
        read = Reader(plain, choose_columns(self._kind, self._mapping, [plain], check_hashes=False).names)
        prompt = read.prompt("prompt")
        if self._kind is PromptRow:
            return PromptRow(prompt_id(prompt), prompt)
        response = read.text("response")
        return QuestionAnswer(answer_id(prompt, response), prompt, response)


def _values(line: Line, place: str) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        BadValue: it is none.
    """
    what = line.fault
    if what is None:
        try:
            values = json.loads(line.data.decode("utf-8-sig" if line.number == 1 else "utf-8"))
            if isinstance(values, dict):
                return values
            what = f"a JSON object is needed, this is a {type(values).__name__}"
        except UnicodeDecodeError as error:
            what = f"this line is not UTF-8 text (byte {error.start})"
        except (ValueError, RecursionError) as error:  # json.JSONDecodeError; numbers of thousands of digits
            what = f"this line is not JSON: {getattr(error, 'msg', type(error).__name__)}"
    raise BadValue("unreadable", what, place)


def _refuse_without_columns(asked: Sequence[Asked]) -> None:
    """Where no record has the columns it is their names that are wrong; one by one each would be an error."""
    if any(one.row is not None for one in asked):
        return
    for one in asked:
        if one.error is not None and not isinstance(one.error, BadValue):
            raise one.error


# ------------------------------------------------------------------------------------------------ verdicts
def _judged(asked: Sequence[Asked], judge: RowJudge, progress: Callable[[int], None]) -> list[dict[str, Any]]:
    """A line about each record, in their order."""
    rows = [one.row for one in asked if one.row is not None]
    verdicts: Iterator[dict[str, Any]] = iter(())
    if rows:
        encoded = judge.encode(rows, "moderate", policy=DataPolicyConfig(overlong="keep"))
        found = judge.decide(judge.logits(encoded, progress))
        verdicts = (verdict_line(found, i, judge.categories) for i in range(len(rows)))
    out = []
    for one in asked:
        if one.row is None:
            assert one.error is not None
            out.append(one.head | {"error": one.error.what})
            continue
        verdict = next(verdicts)
        if not math.isfinite(verdict["p_unsafe"]):  # JSON has no word for it
            out.append(one.head | {"error": "the model's score is no number"})
            continue
        first = {name: verdict[name] for name in ("unsafe", "p_unsafe")}
        out.append(one.head | first | {"unsafe_threshold": judge.calibration.threshold_unsafe} | verdict)
    return out


def _settings(config: EvaluateConfig, model: JudgedModel) -> dict[str, Any]:
    """What verdicts depend on; an output that was begun with others is not continued."""
    columns = config.data.columns or {}
    return {
        "model": content_id_of(model.location, output_root=config.output_root, cache_dir=config.cache_dir),
        "precision": config.trainer.precision,
        "columns": {name: columns[name] for name in TEXTS if name in columns},
        "layout": config.data.layout,
    }


def _counts(tally: Tally, finished: bool) -> dict[str, Any]:
    return {"finished": finished, "written": asdict(tally)}


def _thresholds(calibration: Calibration) -> str:
    """What decides, in one line."""
    text = f"unsafe from p_unsafe {calibration.threshold_unsafe:.3g}"
    if calibration.categories:
        low, high = min(calibration.thresholds_category), max(calibration.thresholds_category)
        span = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
        text += f", {len(calibration.categories)} categories from p_category {span}"
    return text


def _say_done(out: VerdictPipe | VerdictFile) -> None:
    tally = out.tally
    share = f" ({tally.unsafe / tally.rows:.1%})" if tally.rows else ""
    say(f"{tally.rows:,} verdicts, {tally.unsafe:,} of them unsafe{share}")
    if tally.errors:
        say(f"{tally.errors:,} lines could not be judged: their verdict is an `error`")
    if isinstance(out, VerdictFile):
        print(f"verdicts: {out.path}")
        print(f"about:    {out.meta_path}")


# ------------------------------------------------------------------------------------------------ progress
class StreamProgress:
    """Rows so far, rows/s, and the share of the input where its size is known: a bar, or a line every ten seconds.

    Args:
        name: what is going on.
        mode: auto | bar | lines | none.
        share: of the input that was done before.
    """

    def __init__(self, name: str, mode: str, share: float | None) -> None:
        self.name, self.mode = name, resolve_mode(mode)
        self.rows, self.share, self._before = 0, share, share or 0.0
        self._bar: Any = None
        self._started = self._line = time.monotonic()

    def __enter__(self) -> StreamProgress:
        if self.mode == "bar":
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task(self.name, total=None, note="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def part(self, rows: int, till: float | None) -> Callable[[int], None]:
        """What to call with the rows done of the next so many, after which the share of the input is `till`."""

        def show(done: int) -> None:
            share = None if till is None else (self.share or 0.0) + (till - (self.share or 0.0)) * done / rows
            self._show(self.rows + done, share)

        return show

    def done(self, rows: int, till: float | None) -> None:
        """So many more rows are done, and this share of the input."""
        self.rows += rows
        self.share = till
        self._show(self.rows, till)

    def _show(self, rows: int, share: float | None) -> None:
        now = time.monotonic()
        rate = rows / max(now - self._started, 1e-9)
        note = f"{rows:,} rows, {rate:,.{0 if rate >= 10 else 1}f} rows/s"
        if self._bar is not None:
            self._bar.update(0, completed=share, total=None if share is None else 1.0, note=note)
        elif self.mode == "lines" and now - self._line >= LINE_S:
            self._line = now
            if share is not None and share > self._before:
                left = (now - self._started) * (1 - share) / (share - self._before)
                note += f", {share:.0%} of the input, {duration(left)} left"
            say(f"{self.name}: {note}")
