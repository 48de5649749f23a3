"""What `kills.py` measured, as tables and a picture of docs/kills.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE, PICTURE = Path("docs") / "kills.md", Path("docs") / "images" / "kills.png"
BEGIN, END = "<!-- measured -->", "<!-- end -->"
PHASES = {
    "starting": "starting: interpreter, imports, config",
    "data": "rows and tokenizer",
    "model": "building the model, loading the state",
    "training": "training",
    "saving": "a checkpoint half written",
    "evaluating": "final metrics",
    "exporting": "export and report",
    "finished": "all written, the process not gone yet",
}
Result = Mapping[str, Any]


def write_page(results: Sequence[Result], root: Path) -> None:
    """Put tables and picture into the docs.

    Args:
        results: of the cases, as `kills.py run` wrote them.
        root: of the repository.
    """
    if not results:
        raise SystemExit("nothing was measured yet: kills.py run")
    text = (root / PAGE).read_text()
    before, rest = text.split(BEGIN)
    block = "\n\n".join((_ends(results), _phases(results), _told(results), _picture(results, root)))
    (root / PAGE).write_text(f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}")


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _ends(results: Sequence[Result]) -> str:
    """A line for each case: how often it was killed, and how its ends differ from the undisturbed one."""
    rows = []
    for result in results:
        ends, kills = [end for end in result["ends"] if end["kills"]], _kills(result)
        states = sum(len(start["checkpoints"]) for start in kills)
        damaged = sum(len(start["damaged"]) for start in kills)
        rows.append((
            f"{result['title']}; {result['steps']} steps, {result['undisturbed_s']:.0f} s undisturbed", len(kills),
            f"{damaged} of {states}", len(ends), *(_largest(ends, part) for part in ("weights", "metrics", "curves")),
        ))  # fmt: skip
    head = (
        "run", "kills", "states that could not be read", "ends compared", "weights, largest difference",
        "metrics", "curves",
    )  # fmt: skip
    return _table(head, rows)


def _largest(ends: Sequence[Result], part: str) -> str:
    """The largest difference over all ends, or that something is missing."""
    if any(end[part]["on_one_side"] for end in ends):
        return "other values"
    largest = max(end[part]["largest"] for end in ends)
    return f"0 ({ends[-1][part]['values']} compared)" if largest == 0 else f"{largest:.1e}"


def _phases(results: Sequence[Result]) -> str:
    """What the kills hit."""
    counted = {result["case"]: Counter(start["phase"] for start in _kills(result)) for result in results}
    rows = [
        (said, *(counts[phase] for counts in counted.values()))
        for phase, said in PHASES.items()
        if any(counts[phase] for counts in counted.values())
    ]
    return _table(("kills by what they hit", *(f"`{name}`" for name in counted)), rows)


def _told(results: Sequence[Result]) -> str:
    """Sentences: what was lost, and how soon the other processes were gone."""
    said = []
    for result in results:
        trained = [start for start in _kills(result) if _mark(start) in ("training", "saving")]
        lost = [start["step"] - max([0, *(s for s in start["checkpoints"] if s <= start["step"])]) for start in trained]
        if lost:
            mean = sum(lost) / len(lost)
            said.append(
                f"`{result['case']}`: a kill in training cost {mean:.1f} steps on average, {max(lost)} at most."
            )
        alone = [start for start in _kills(result) if start["only_first"]]
        if alone:
            left = sum(start["left"] for start in alone)
            said.append(
                f"{len(alone)} of its kills hit the first of the {result['processes']} processes alone: the others were"
                f" gone within {max(start['gone_s'] for start in alone):.1f} s, {left or 'none'} had to be ended."
            )
    return " ".join(said)


def _kills(result: Result) -> list[Any]:
    return [start for start in result["starts"] if start["killed"]]


def _picture(results: Sequence[Result], root: Path) -> str:
    """A bar for each start: from the step it went on from to the step it reached."""
    from matplotlib.figure import Figure

    from saferlhf.evaluation.drawing import save_png

    figure = Figure(figsize=(7.2, 2.3 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), squeeze=False)[:, 0]
    for axis, result in zip(axes, results, strict=True):
        _draw(axis, result)
    axes[-1].set_xlabel("start of the command")
    axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    save_png(figure, root / PICTURE)
    shown = f"![for each start, the steps it did and what ended it]({PICTURE.relative_to(PAGE.parent)})"
    return f"{shown}\n\nA bar for each start: the steps that it did, from where it went on. Dotted: the next folder."


MARKS = {
    "before training": ("o", "#999999"),
    "training": ("x", "#d55e00"),
    "saving": ("D", "#aa4499"),
    "after training": ("s", "#0072b2"),
    "its own end": ("*", "#009e73"),
}


def _mark(start: Result) -> str:
    """What ended a start, in a word."""
    if not start["killed"]:
        return "its own end"
    if start["phase"] in ("training", "saving"):
        return str(start["phase"])
    return "before training" if start["phase"] in ("starting", "data", "model") else "after training"


def _height(start: Result, steps: int) -> int:
    """Steps done when it ended, those of the starts before included."""
    if start["phase"] == "finished" or not start["killed"]:
        return steps
    return int(start["step"] or max(start["checkpoints"], default=0))


def _draw(axis: Any, result: Result) -> None:
    starts = result["starts"]
    numbers = range(1, len(starts) + 1)
    reached = [_height(start, result["steps"]) for start in starts]
    axis.bar(
        numbers, [s["step"] - s["resumed"] for s in starts], bottom=[s["resumed"] for s in starts], width=0.7,
        color="#b7cfe3",
    )  # fmt: skip
    for name, (mark, colour) in MARKS.items():
        points = [(n, y) for n, y, s in zip(numbers, reached, starts, strict=True) if _mark(s) == name]
        axis.scatter(*zip(*points, strict=True) if points else ((), ()), marker=mark, color=colour, s=28, label=name)
    for number, start in zip(numbers, starts, strict=True):
        if not start["killed"] and number < len(starts):
            axis.axvline(number + 0.5, color="#888888", linewidth=0.8, linestyle=":")
    axis.set_title(f"{result['case']}: {result['title']}", fontsize=9, loc="left")
    axis.set_ylabel("step", fontsize=9)
    axis.set_ylim(-0.04 * result["steps"], 1.1 * result["steps"])
    axis.set_xlim(0.4, len(starts) + 0.6)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
