"""What processes find is put together by row, each row once; what one of them meets with, all of them raise."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from saferlhf.data.rows import as_prompt
from saferlhf.errors import UserError
from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers, PromptSet, united_answers
from saferlhf.evaluation.processes import ALONE, Processes

WORKER = """
import json, sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch.distributed as dist

from saferlhf.errors import UserError
from saferlhf.evaluation.processes import Processes

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
processes = Processes.current()
batches = [np.array(rows) for rows in ([4, 1], [0, 5], [3], [2])]

def work():
    mine = np.concatenate([np.zeros(0, np.int64), *processes.mine(batches)])
    return mine, {"tenfold": 10.0 * mine, "two": np.stack([mine, -mine], axis=1)}

def fails():
    if processes.rank == 1:
        raise UserError("no more memory", "the second", "buy some")
    return rank

united = processes.united(6, work)
try:
    processes.each(fails)
    error = ""
except UserError as trouble:
    error = str(trouble)
one_batch = processes.united(2, lambda: (np.array([1, 0]), {"x": np.array([1.0, 0.0])}) if rank else (np.zeros(0), {}))
try:
    processes.united(6, lambda: (np.array([1, 2, 3]), {}))
    twice = ""
except ValueError as trouble:
    twice = str(trouble)
found = {"rank": processes.rank, "size": processes.size, "error": error, "twice": twice}
found |= {name: values.tolist() for name, values in (united | one_batch).items()}
(folder / f"found{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What two processes of gloo wrote down."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    words = [sys.executable, str(folder / "worker.py")]
    workers = [subprocess.Popen([*words, str(rank), str(folder)]) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_have_all_rows_in_order(found: list[dict[str, object]]) -> None:
    for rank, one in enumerate(found):
        assert (one["rank"], one["size"]) == (rank, 2)
        assert one["tenfold"] == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]
        assert one["two"] == [[row, -row] for row in range(6)]
        assert one["x"] == [0.0, 1.0], "all rows may be with one process"


@pytest.mark.slow
def test_the_error_of_one_is_the_error_of_all(found: list[dict[str, object]]) -> None:
    assert {one["error"] for one in found} == {"no more memory (in the second); buy some"}


@pytest.mark.slow
def test_a_row_that_two_have_is_refused(found: list[dict[str, object]]) -> None:
    assert {one["twice"] for one in found} == {"6 rows, but 6 numbers of 3 rows came together"}


def test_batches_are_dealt_out_and_all_are_there() -> None:
    batches = list(range(7))
    parts = [Processes(rank, 3).mine(batches) for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]


def test_alone_is_one_process_that_has_everything() -> None:
    assert Processes.current() == ALONE and ALONE.first
    assert ALONE.united(2, lambda: (np.array([1, 0]), {"x": np.array([5.0, 6.0])}))["x"].tolist() == [6.0, 5.0]
    with pytest.raises(UserError, match="as it is"):
        ALONE.each(_raise)


def _raise() -> None:
    raise UserError("as it is")


# ------------------------------------------------------------------------------------------------ answers
class Parts(Processes):
    """Two processes whose parts are known."""

    def each(self, work):  # type: ignore[no-untyped-def]
        return work()


PROMPTS = PromptSet(tuple("abcde"), tuple(as_prompt(c) for c in "abcde"), np.array([0, 1, 0, 1, np.nan]))


def answers(names: str, judge: dict[str, int]) -> PolicyAnswers:
    """Two responses to each, whose numbers are the prompt's place in the alphabet."""
    places = np.array([[ord(c) - 97, 10 + ord(c) - 97] for c in names])
    judged = {"judge": Judged({"reward": places / 2.0}, judge, places == 3)}
    texts = tuple((f"{c}0", f"{c}1") for c in names)
    return PolicyAnswers(texts, places, places % 2 == 1, kl=places * 1.0, judged=judged)


def test_prompts_are_dealt_out_and_answers_come_back_in_their_order() -> None:
    first, second = (PROMPTS.of(Processes(rank, 2)) for rank in range(2))
    assert (first.ids, second.ids) == (("a", "c", "e"), ("b", "d"))
    assert second.harmful.tolist() == [1.0, 1.0]
    parts = [{"policy": answers("ace", {"empty": 1})}, {"policy": answers("bd", {"empty": 2, "timeout": 1})}]
    own, whole = united_answers(Parts(1, 2), 5, lambda: parts)  # type: ignore[arg-type, return-value]
    assert own["policy"] is parts[1]["policy"]
    expected = answers("abcde", {"empty": 3, "timeout": 1})
    found = whole["policy"]
    assert found.texts == expected.texts
    assert found.kl is not None and expected.kl is not None
    pairs = [(found.tokens, expected.tokens), (found.truncated, expected.truncated), (found.kl, expected.kl)]
    one, other = found.judged["judge"], expected.judged["judge"]
    pairs += [(one.values["reward"], other.values["reward"]), (one.rejected, other.rejected)]
    assert all((a == b).all() for a, b in pairs)
    assert one.failures == other.failures


def test_fewer_prompts_than_processes_are_refused() -> None:
    with pytest.raises(UserError, match="5 prompts for 6 processes"):
        PROMPTS.of(Processes(0, 6))
