"""docs/refused.md: every row is refused in the row's words, and every refusal of a pair has a row."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from command_lines import composed, config
from hydra import initialize_config_dir

from saferlhf.config import (
    checks,
    checks_online,
    checks_strategy,
    checks_stream,
    checks_task,
    online_checks,
    roles_schema,
    rollout_schema,
)
from saferlhf.config.paths import conf_dir
from saferlhf.config.validate import evaluate_config
from saferlhf.errors import UserError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "refused.md"
ROW = re.compile(r"^\| (?P<pair>.+?) \| (?P<what>.+?) \| (?P<mend>.+?) \| `(?P<command>python \w+\.py .+?)` \|$", re.M)
ROWS = [match.groupdict() for match in ROW.finditer(PAGE.read_text().replace("\\|", "\x00"))]

PAIRS: dict[ModuleType, set[str]] = {
    checks: {"_check_models", "_check_adapter", "_check_model", "_check_lengths", "_check_mix", "_check_data"},
    checks_online: {"check_online_run", "_check_scores", "_check_policy"},
    checks_stream: {"check_stream"},
    online_checks: {"check_online"},
    checks_strategy: {"*"},
}
"""Functions that refuse pairs; "*": all of the module."""

SINGLE = {
    "empty locator",  # a value alone
    "needs it",  # online groups that no choice of conf/ leaves out
    "a cost cannot be named",
}
"""What these functions say of one value alone."""


def refusal(command: str) -> tuple[UserError, set[tuple[str, int]]]:
    """The error of a command line, and the places in the code that it came through."""
    _, script, *words = shlex.split(command)
    try:
        if script == "train.py":
            config(*words)
        else:
            checks.check_evaluate(evaluate_config(composed(*words, command="evaluate")))
    except UserError as error:
        places, trace = set(), error.__traceback__
        while trace is not None:
            places.add((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
            trace = trace.tb_next
        return error, places
    raise AssertionError(f"this is not refused any more: {command}")


@pytest.fixture(scope="module")
def refusals() -> Iterator[dict[str, tuple[UserError, set[tuple[str, int]]]]]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield {row["command"]: refusal(row["command"]) for row in ROWS}


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\x00")


def test_the_page_has_its_rows() -> None:
    lines = [
        line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| together")
    ]
    assert len(ROWS) == len(lines) > 60, "a line of the tables that this test cannot read"
    assert len({row["command"] for row in ROWS}) == len(ROWS)


def test_every_row_is_refused_in_its_words(
    refusals: dict[str, tuple[UserError, set[tuple[str, int]]]], subtests: pytest.Subtests
) -> None:
    for row in ROWS:
        with subtests.test(row["pair"].replace("\x00", "|")):
            error, _ = refusals[row["command"]]
            said = (cell(error.what), cell(error.mend))
            assert (row["what"], row["mend"]) == said, f"the row should say: {' | '.join(said)}"


def raises(module: ModuleType, functions: set[str]) -> Iterator[tuple[int, int, str]]:
    """First and last line and text of every `raise UserError` in these functions."""
    source = inspect.getsource(module)
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and (functions == {"*"} or function.name in functions):
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    assert node.end_lineno is not None
                    above = "\n".join(source.splitlines()[node.lineno - 2 : node.end_lineno])
                    yield node.lineno, node.end_lineno, above


def test_every_refusal_of_a_pair_has_a_row(refusals: dict[str, tuple[UserError, set[tuple[str, int]]]]) -> None:
    reached = set().union(*(places for _, places in refusals.values()))
    missing, seen = [], 0
    for module, functions in PAIRS.items():
        file = str(module.__file__)
        for first, last, text in raises(module, functions):
            seen += 1
            shown = any((file, line) in reached for line in range(first, last + 1))
            if not shown and not any(words in text for words in SINGLE):
                missing.append(f"{Path(file).name}:{first}\n{text}")
    assert seen > 40, "the checks were not found"
    assert not missing, "not in docs/refused.md:\n" + "\n".join(missing)
    # judges and roles refuse pairs among much else: the ones the page names are refused there
    for module in (roles_schema, rollout_schema, checks_task):
        assert any(file == module.__file__ for file, _ in reached)
