"""`mode=moderate input=... output=...` in this process: lines in, lines out, on small random moderators."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from command_lines import Answer, call
from test_cli_evaluate import export
from test_cli_moderation import heads_one_by_one, moderator_export, own_answers

from saferlhf.data.toyworld import question_answers
from saferlhf.errors import UserError
from saferlhf.ops.moderation import ModerationLogits
from saferlhf.run import moderate_stream, row_judge, stream_input
from saferlhf.run.stream_input import InputLines
from saferlhf.run.stream_output import VerdictFile, VerdictPipe

ABOUT = 8 * 2  # rows of a chunk in most tests: eval_batch_size=2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "moderator": moderator_export(folder / "moderator"),
        "another": moderator_export(folder / "another", seed=1),
        "of_prompts": moderator_export(folder / "of_prompts", input="prompt"),
        "cost": export(folder / "cost", "cost"),
        "reward": export(folder / "reward", "reward"),
    }


@pytest.fixture
def stream(tmp_path: Path, models: dict[str, Path]) -> Any:
    """Run the command on a model by its name; later words replace earlier ones of the same key."""

    def run(model: str, *words: str) -> Answer:
        root = [
            "trainer.threads=1",
            "tracking=none",
            f"output_root={tmp_path / 'outputs'}",
            "trainer.eval_batch_size=2",
        ]
        keyed = {word.partition("=")[0]: word for word in (*root, "mode=moderate", f"model={models[model]}", *words)}
        return call("evaluate", *keyed.values())

    return run


@contextmanager
def standard_input(data: bytes) -> Iterator[None]:
    with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(data))):
        yield


def parsed(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def without_numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith("p_")}


def assert_alike(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same decisions, and probabilities but for the sixth decimal."""
    assert [without_numbers(line) for line in found] == [without_numbers(line) for line in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.get("p_unsafe") == pytest.approx(b.get("p_unsafe"), abs=2e-6)
        assert a.get("p_severity") == pytest.approx(b.get("p_severity"), abs=2e-6)
        assert a.get("p_category") == pytest.approx(b.get("p_category"), abs=2e-6)


def judges(stops_after: int | None = None) -> Any:
    """Notes the texts that are judged, chunk by chunk; stops like a kill before the chunk with this number."""
    real = row_judge.moderate_rows
    seen: list[list[str]] = []

    def judge(model: Any, data: Any, **options: Any) -> ModerationLogits:
        if len(seen) == stops_after:
            raise KeyboardInterrupt
        seen.append([row.response for row in data.rows])
        return real(model, data, **options)

    return mock.patch.object(row_judge, "moderate_rows", judge), seen


# ------------------------------------------------------------------------------------------------ verdicts
def test_a_stream_says_what_a_data_set_would_be_told(tmp_path: Path, models: dict[str, Path], stream: Any) -> None:
    """The same verdicts as `mode=moderate data=jsonl`; chunks do not matter; no text and no folder of a run is left."""
    rows = own_answers(tmp_path / "rows.jsonl", 45)
    rows = list({row["prompt"] + row["response"]: row for row in rows}.values())
    text = "".join(json.dumps(row | {"id": f"n{i}"}) + "\n" for i, row in enumerate(rows))
    (tmp_path / "rows.jsonl").write_text(text)
    answer = stream("moderator", f"input={tmp_path / 'rows.jsonl'}", f"output={tmp_path / 'out.jsonl'}")
    assert answer.code == 0, answer.err
    found = parsed((tmp_path / "out.jsonl").read_text())
    assert not (tmp_path / "outputs").exists()
    assert str(tmp_path / "out.jsonl") in answer.out and f"{len(rows):,} verdicts" in answer.err
    assert [(line["line"], line["id"]) for line in found] == [(i + 1, f"n{i}") for i in range(len(rows))]
    assert not any(row["response"] in (tmp_path / "out.jsonl").read_text() for row in rows)

    assert stream("moderator", "data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}").code == 0
    ((folder,),) = [list((tmp_path / "outputs" / "evaluate").iterdir())]
    expected = parsed((folder / "verdicts.jsonl").read_text())
    names = ("unsafe", "p_unsafe", "severity", "p_severity", "categories", "p_category")
    assert_alike([{n: line[n] for n in names} for line in found], [{n: line[n] for n in names} for line in expected])
    assert 0 < sum(line["unsafe"] for line in found) < len(found)
    assert all(line["unsafe"] == (line["p_unsafe"] >= line["unsafe_threshold"] == 0.45) for line in found)

    whole = stream("moderator", f"input={tmp_path / 'rows.jsonl'}", "trainer.eval_batch_size=64")  # output: standard
    assert whole.code == 0, whole.err
    assert_alike(parsed(whole.out), found)
    meta = json.loads((tmp_path / "out.jsonl.meta.json").read_text())
    assert meta["finished"] and meta["written"]["rows"] == len(rows) and meta["input"]["lines"] == len(rows)
    assert meta["calibration"]["threshold_unsafe"] == 0.45 and meta["calibration"]["temperature_unsafe"] == 2.0
    assert len(meta["calibration"]["categories"]) == 19 and meta["model"] == str(models["moderator"])


def test_prompts_and_costs(tmp_path: Path, models: dict[str, Path], stream: Any) -> None:
    prompts = [row.prompt[-1].content for row in question_answers(9, split="test", seed=5)]
    with standard_input("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts).encode()):
        answer = stream("of_prompts", "input=-", "output=-")
    assert answer.code == 0, answer.err
    heads = heads_one_by_one(models["of_prompts"], prompts, [None] * len(prompts))
    p = [1 / (1 + 2.718281828459045 ** -(u / 2.0)) for u in heads["unsafe"][:, 0]]
    assert [line["p_unsafe"] for line in parsed(answer.out)] == pytest.approx(p, abs=1e-4)

    rows = own_answers(tmp_path / "rows.jsonl", 9)
    answer = stream("cost", f"input={tmp_path / 'rows.jsonl'}")
    costs = heads_one_by_one(models["cost"], [r["prompt"] for r in rows], [r["response"] for r in rows])["score"][:, 0]
    found = parsed(answer.out)
    assert [line["unsafe"] for line in found] == [cost > 0 for cost in costs]
    assert [line["p_unsafe"] for line in found] == pytest.approx(
        [1 / (1 + 2.718281828459045**-c) for c in costs], abs=1e-4
    )
    assert "severity" not in found[0] and found[0]["unsafe_threshold"] == 0.5

    answer = stream("reward", f"input={tmp_path / 'rows.jsonl'}")
    assert answer.code == 2 and "mode=moderate is for moderator and cost models" in answer.error


def test_other_names_turns_and_layouts(tmp_path: Path, stream: Any) -> None:
    """One record, written in the ways that data files may be written, has one verdict."""
    prompt, response = next((row.prompt[-1].content, row.response) for row in question_answers(1, split="test", seed=5))
    turns = [{"role": "human", "content": prompt}]
    forms: list[tuple[list[str], dict[str, Any]]] = [
        ([], {"prompt": prompt, "response": response, "severity_level": 99}),  # labels are not looked at
        ([], {"prompt": turns, "response": [*turns, {"role": "gpt", "content": response}]}),
        (["data.columns.prompt=q.text", "data.columns.response=a"], {"q": {"text": prompt}, "a": response}),
        ([], {"input": f"Human user:\n{prompt}\n\nAI assistant:\n{response}", "output": "harmful"}),
        (["data=alpaca"], {"instruction": prompt, "input": "", "output": response}),
    ]
    found = []
    for words, record in forms:
        with standard_input(json.dumps(record).encode()):  # no line end at the end
            answer = stream("moderator", "input=-", *words)
        assert answer.code == 0, (words, answer.err)
        found += parsed(answer.out)
    assert len(found) == len(forms)
    assert_alike(found, [found[0]] * len(forms))


def test_lines_that_cannot_be_judged_are_said_and_counted(tmp_path: Path, stream: Any) -> None:
    rows = own_answers(tmp_path / "rows.jsonl", 4)
    secret = "amber lighthouse"
    lines = [
        json.dumps(rows[0]).encode(),
        f"{{{secret}".encode(),
        b"",
        json.dumps([secret]).encode(),
        json.dumps({"id": 5, "prompt": secret, "response": None}).encode(),
        json.dumps({"id": [secret], "prompt": secret}).encode(),
        b'{"prompt": "\xff"}',
        json.dumps(rows[1] | {"id": "\ud800"}).encode(),
        b'{"id": NaN, "prompt": "a", "response": "' + b"a" * 300 + b'"}',
        json.dumps(rows[2]).encode(),
    ]
    with standard_input(b"\xef\xbb\xbf" + b"\r\n".join(lines)), mock.patch.object(stream_input, "LINE_BYTES", 256):
        answer = stream("moderator", "input=-", "trainer.eval_batch_size=1")
    assert answer.code == 0, answer.err
    found = parsed(answer.out)
    assert [line["line"] for line in found] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    faults = {line["line"]: line["error"] for line in found if "error" in line}
    assert list(faults) == [2, 4, 5, 6, 7, 9]
    assert "not JSON" in faults[2] and "is a list" in faults[4] and "holds nothing" in faults[5]
    assert faults[6] == "column 'response' is missing" and "UTF-8" in faults[7] and "more than 256 bytes" in faults[9]
    assert found[3]["id"] == 5 and "id" not in found[4] and found[6]["id"] == "\ud800"
    assert secret not in answer.out and secret not in answer.err
    assert "3 verdicts" in answer.err and "6 lines could not be judged" in answer.err


def test_a_score_that_is_no_number(tmp_path: Path, stream: Any) -> None:
    """JSON has no NaN: a line of it would stop whoever reads the stream."""
    own_answers(tmp_path / "rows.jsonl", 3)
    real = row_judge.moderate_rows

    def broken(model: Any, data: Any, **options: Any) -> ModerationLogits:
        logits = real(model, data, **options)
        logits.unsafe[1] = float("nan")
        return logits

    with mock.patch.object(row_judge, "moderate_rows", broken):
        answer = stream("moderator", f"input={tmp_path / 'rows.jsonl'}")
    assert answer.code == 0, answer.err
    assert ["error" in line for line in parsed(answer.out)] == [False, True, False]
    assert "NaN" not in answer.out


# ------------------------------------------------------------------------------------------------ both ends
def test_packed_files_and_an_empty_one(tmp_path: Path, stream: Any) -> None:
    own_answers(tmp_path / "rows.jsonl", 20)
    data = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "rows.jsonl.xz").write_bytes(lzma.compress(data))
    plain = stream("moderator", f"input={tmp_path / 'rows.jsonl'}")
    assert plain.code == 0 and len(parsed(plain.out)) == 20
    for name in ("rows.jsonl.gz", "rows.jsonl.xz"):
        assert stream("moderator", f"input={tmp_path / name}").out == plain.out
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(data, mtime=0)[:-9])  # checksum and a little more are gone
    cut = stream("moderator", f"input={tmp_path / 'cut.jsonl.gz'}")
    assert cut.code == 2 and "broken archive" in cut.err
    assert plain.out.startswith(cut.out) and len(parsed(cut.out)) >= ABOUT  # what could be read is judged
    with standard_input(b"\n\n"):
        answer = stream("moderator", "input=-")
    assert answer.code == 0 and answer.out == "" and "0 verdicts" in answer.err


def test_progress_goes_to_the_error_stream(tmp_path: Path, stream: Any) -> None:
    own_answers(tmp_path / "rows.jsonl", 40)
    with mock.patch.object(moderate_stream, "LINE_S", 0.0):
        answer = stream("moderator", f"input={tmp_path / 'rows.jsonl'}")
        with standard_input((tmp_path / "rows.jsonl").read_bytes()):
            piped = stream("moderator", "input=-", "output=-")
    assert [line["line"] for line in parsed(answer.out)] == list(range(1, 41))
    said = [line for line in answer.err.splitlines() if line.startswith("judging: ")]
    assert "rows/s" in said[0] and "left" in said[0] and "100% of the input" in said[-1]
    assert said[-1].startswith("judging: 40 rows")
    assert "unsafe from p_unsafe 0.45" in answer.err and "19 categories from p_category 0.4" in answer.err
    assert piped.out == answer.out
    assert "rows/s" in piped.err and "of the input" not in piped.err
    with mock.patch.object(moderate_stream, "LINE_S", 0.0):
        quiet = stream("moderator", f"input={tmp_path / 'rows.jsonl'}", "trainer.progress=none")
    assert "rows/s" not in quiet.err
    bar = stream("moderator", f"input={tmp_path / 'rows.jsonl'}", "trainer.progress=bar")
    assert bar.out == answer.out


def test_memory_is_bounded(tmp_path: Path, stream: Any) -> None:
    """No line is read before those of the chunk before it are judged and written."""
    rows = own_answers(tmp_path / "rows.jsonl", 10)
    read, written, ahead = 0, 0, []

    class Source(io.RawIOBase):
        def readline(self, size: int | None = -1) -> bytes:  # type: ignore[override]
            nonlocal read
            if read == 5 * ABOUT:
                return b""
            read += 1
            ahead.append(read - written)
            return json.dumps(rows[read % 10]).encode() + b"\n"

    real = VerdictPipe.write

    def write(self: Any, lines: Any) -> None:
        nonlocal written
        real(self, lines)
        written += len(lines)

    source = mock.Mock(buffer=Source(), isatty=lambda: False)
    with mock.patch.object(sys, "stdin", source), mock.patch.object(VerdictPipe, "write", write):
        answer = stream("moderator", "input=-")
    assert answer.code == 0, answer.err
    assert written == read == 5 * ABOUT
    assert max(ahead) == ABOUT
    # long lines fill a chunk earlier
    with InputLines(str(tmp_path / "rows.jsonl")) as lines, mock.patch.object(stream_input, "CHUNK_BYTES", 1):
        assert [len(lines.read(100)) for _ in range(11)] == [1] * 10 + [0]


def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path, stream: Any) -> None:
    own_answers(tmp_path / "rows.jsonl", 4)
    with (
        mock.patch.object(VerdictPipe, "write", side_effect=BrokenPipeError),
        mock.patch("os.dup2") as replaced,
        mock.patch.object(io, "StringIO", type("Out", (io.StringIO,), {"fileno": lambda self: 1})),
    ):
        answer = stream("moderator", f"input={tmp_path / 'rows.jsonl'}")
    assert answer.code == 1 and answer.out == "" and replaced.called
    assert "error" not in answer.err and "Traceback" not in answer.err


@pytest.mark.slow
def test_in_a_shell_pipeline(tmp_path: Path, models: dict[str, Path], project_root: Path) -> None:
    """Real pipes: nothing but verdicts on standard output, and a reader that leaves early is no fault."""
    rows = own_answers(tmp_path / "rows.jsonl", 30)
    words = ["mode=moderate", f"model={models['moderator']}", "input=-", "output=-", "trainer.eval_batch_size=1"]
    command = [sys.executable, str(project_root / "evaluate.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "rows.jsonl").open("rb") as source:
        done = subprocess.run(command, stdin=source, capture_output=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert [line["line"] for line in parsed(done.stdout.decode())] == list(range(1, len(rows) + 1))
    (tmp_path / "many.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes() * 40)
    with (
        (tmp_path / "many.jsonl").open("rb") as source,
        subprocess.Popen(
            command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=environment
        ) as process,
    ):
        assert process.stdout and process.stderr
        assert json.loads(process.stdout.readline())["line"] == 1
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 1 and "Traceback" not in said and "error:" not in said
    assert not list(tmp_path.glob("outputs/*"))


# ------------------------------------------------------------------------------------------------ going on
@pytest.mark.parametrize(("batch", "torn"), [(1, 3000), (2, 0), (2, 40), (5, 3000)])
def test_a_stopped_stream_goes_on(tmp_path: Path, stream: Any, torn: int, batch: int) -> None:
    """No line is judged twice but those whose verdicts were lost; the file is that of an undisturbed run."""
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows = own_answers(path, 50)
    text = path.read_text().splitlines()
    text[20] = "{no JSON"
    text.insert(5, "")
    path.write_text("\n".join(text))
    words = [f"input={path}", f"output={out}"]
    assert stream("moderator", *words[:1], f"output={tmp_path / 'whole.jsonl'}").code == 0
    judge, first = judges(stops_after=2)
    with judge:
        answer = stream("moderator", *words)
    assert answer.code == 130 and "the same command goes on" in answer.err
    assert len(out.read_text().splitlines()) == 2 * ABOUT
    if torn:
        out.write_text(out.read_text()[:-torn])
    kept = out.read_text().count("\n")
    judge, second = judges()
    with judge:
        answer = stream("moderator", *words, f"trainer.eval_batch_size={batch}")
    assert answer.code == 0, answer.err
    assert f"behind the {json.loads(out.read_text().splitlines()[kept - 1])['line']:,} lines" in answer.err
    assert_alike(parsed(out.read_text()), parsed((tmp_path / "whole.jsonl").read_text()))
    texts = [json.loads(line)["response"] for line in text if line[1:2] == '"']
    assert list(chain(*first)) == texts[: 2 * ABOUT - 1]
    assert list(chain(*second)) == texts[kept - 1 :]
    assert "49 verdicts" in answer.err and "1 lines could not be judged" in answer.err
    whole, meta = out.read_text(), json.loads(Path(f"{out}.meta.json").read_text())
    assert meta["finished"] and meta["written"]["rows"] == 49

    with mock.patch("saferlhf.models.loading.load_export", side_effect=AssertionError("nothing is left to judge")):
        again = stream("moderator", *words)
    assert again.code == 0 and again.err.startswith("finished before") and str(out) in again.out
    assert out.read_text() == whole and json.loads(Path(f"{out}.meta.json").read_text()) == meta
    with path.open("a") as more:  # a log that has grown
        more.write("\n" + json.dumps(rows[0]) + "\n")
    judge, third = judges()
    with judge:
        assert stream("moderator", *words).code == 0
    assert third == [[rows[0]["response"]]]
    assert out.read_text().startswith(whole) and out.read_text().count("\n") == 51


def test_a_pipe_goes_on_into_a_file(tmp_path: Path, stream: Any) -> None:
    own_answers(tmp_path / "rows.jsonl", 40)
    data = (tmp_path / "rows.jsonl").read_bytes()
    judge, _ = judges(stops_after=1)
    with judge, standard_input(data):
        assert stream("moderator", "input=-", f"output={tmp_path / 'out.jsonl'}").code == 130
    with standard_input(data.replace(b"\n", b"\r\n")):  # other line ends are no other lines
        answer = stream("moderator", "input=-", f"output={tmp_path / 'out.jsonl'}")
    assert answer.code == 0, answer.err
    assert [line["line"] for line in parsed((tmp_path / "out.jsonl").read_text())] == list(range(1, 41))
    judge, _ = judges(stops_after=1)
    with judge, standard_input(data):
        answer = stream("moderator", "input=-", "output=-")
    assert answer.code == 130 and f"interrupted: verdicts up to line {ABOUT} were written" in answer.err


def test_what_was_begun_with_something_else_is_not_continued(
    tmp_path: Path, models: dict[str, Path], stream: Any
) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    own_answers(path, 40)
    words = [f"input={path}", f"output={out}"]
    judge, _ = judges(stops_after=1)
    with judge:
        assert stream("moderator", *words).code == 130
    good, begun = path.read_text(), out.read_text()
    meta = Path(f"{out}.meta.json")
    noted = meta.read_text()

    def refused(model: str = "moderator", *more: str) -> str:
        answer = stream(model, *words, *more)
        assert answer.code == 2, answer.err
        assert answer.out == "" and meta.read_text() == noted
        return answer.error

    lines = good.splitlines(keepends=True)
    for changed in ([lines[0].replace("{", "{ "), *lines[1:]], lines[1:], lines[: ABOUT - 1], ["\n", *lines]):
        path.write_text("".join(changed))
        said = refused()
        assert "the input is not the one whose first" in said and f"remove {out}" in said
    # lines that were read and not yet judged count too, before anything is written about them
    path.write_text("".join([*lines[: ABOUT + 3], "{}\n", *lines[ABOUT + 4 :]]))
    assert "the input is not the one" in refused("moderator", "trainer.eval_batch_size=1")
    path.write_text(good)
    assert "its verdicts are by another model" in refused("another")
    assert "by another precision: 32-true instead of bf16-mixed" in refused("moderator", "trainer.precision=bf16-mixed")
    assert "by another columns" in refused("moderator", "data.columns.prompt=response")
    assert out.read_text() == begun

    out.write_text(begun + begun)
    assert "this is no line of verdicts" in refused()
    out.write_text(begun + "".join(f'{{"line": {n}, "error": "e"}}\n' for n in range(17, 50)))
    assert "more lines than were judged" in refused()
    out.write_text(begun)
    for damage in ("{", "{}", "[]"):
        meta.write_text(damage)
        noted = damage
        assert "damaged file" in refused()
    meta.unlink()
    answer = stream("moderator", *words)
    assert answer.code == 2 and "this file is of something else" in answer.error
    assert out.read_text() == begun
    out.unlink()  # the mend
    assert stream("moderator", *words).code == 0
    assert out.read_text().count("\n") == 40


def test_one_process_at_a_time(tmp_path: Path, stream: Any) -> None:
    own_answers(tmp_path / "rows.jsonl", 3)
    words = [f"input={tmp_path / 'rows.jsonl'}", f"output={tmp_path / 'out.jsonl'}"]
    with VerdictFile(tmp_path / "out.jsonl"):
        assert "another process writes this file" in stream("moderator", *words).error
    assert stream("moderator", *words).code == 0


# ------------------------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["input=rows.json1"], "no such file or folder: rows.json1 (in input); did you mean rows.jsonl or "),
        (["input=nowhere"], "no such file or folder: nowhere"),
        (["input=."], "is a folder"),
        (["input=rows.csv"], "holds no lines of JSON"),
        (["input=rows.jsonl", "output=."], "is a folder"),
        (["input=rows.jsonl", "output=./rows.jsonl"], "input and output are one file"),
        (["input=rows.jsonl", "output=out.jsonl.gz"], "verdicts are not packed"),
        (["input=rows.jsonl", "output=rows.csv/out.jsonl"], "cannot write there"),
        (["output=out.jsonl"], "nothing is read for it"),
        (["input=rows.jsonl", "mode=score"], "add mode=moderate"),
        (["input=rows.jsonl", "data=jsonl", "data.path=rows.jsonl"], "leave out data=, or"),
        (["input=rows.jsonl", "split=test"], "split=null"),
        (["input=rows.jsonl", "evaluation.max_rows=3"], "evaluation.max_rows=null"),
        (["input=rows.jsonl", "data.columns.response=respnse"], "did you mean response?"),
        (["input=rows.jsonl", "data.columns.promt=prompt"], "did you mean prompt?"),
        (
            ["input=texts.jsonl", "output=out.jsonl"],
            "column 'prompt' is missing (in texts.jsonl:1); there are: text; map one of them",
        ),
    ],
)
def test_refusals(tmp_path: Path, stream: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    own_answers(tmp_path / "rows.jsonl", 3)
    (tmp_path / "rows.csv").write_text("prompt,response\na,b\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    answer = stream("moderator", *words)
    assert answer.code == 2 and says in answer.error
    assert answer.out == "" and not list(tmp_path.glob("out*"))


def test_lines_of_an_input(tmp_path: Path) -> None:
    """The hash is that of the lines, in whatever way they end; a broken archive gives its good lines first."""
    path = tmp_path / "lines"
    path.write_bytes(b"one\r\n\ntwo")
    with InputLines(str(path)) as lines:
        assert [(line.number, line.data) for line in lines.read(9)] == [(1, b"one"), (3, b"two")]
        assert lines.read(9) == [] and lines.share == 1.0
        digest = lines.digest
    path.write_bytes(b"one\n\ntwo\n")
    with InputLines(str(path)) as lines:
        assert len(lines.read(1)) == 1 and lines.number == 1 and lines.share == pytest.approx(4 / 9)
        assert lines.digest != digest
        lines.read(9)
        assert lines.digest == digest
    packed = tmp_path / "lines.gz"
    packed.write_bytes(gzip.compress(b"one\n" * 3)[:-4])
    with InputLines(str(packed)) as lines:
        assert len(lines.read(9)) == 3
        with pytest.raises(UserError, match="broken archive"):
            lines.read(9)


def test_lines_of_a_pipe_are_not_waited_for() -> None:
    """Who writes one line and waits for its verdict gets it; lines in pieces are put together."""
    out, into = os.pipe()
    with (
        os.fdopen(out) as reader,
        os.fdopen(into, "wb", buffering=0) as writer,
        mock.patch.object(sys, "stdin", reader),
        InputLines("-") as lines,
    ):
        for sent, said in ((b"a\n", [b"a"]), (b"b\n\nc\nd", [b"b", b"c"]), (b"e\n", [b"de"])):
            writer.write(sent)
            assert [line.data for line in lines.read(9)] == said
        writer.write(b"f\n" * 20)
        assert [len(lines.read(8)) for _ in range(3)] == [8, 8, 4]
        writer.write(b"h")
        writer.close()
        assert [line.data for line in lines.read(9)] == [b"h"]
        assert lines.read(9) == []
        assert lines.number == 26 and lines.share is None


def test_a_named_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    long = b"x" * 200_000
    writer = threading.Thread(target=lambda: path.write_bytes(b"one\n" + long + b"\ntwo"))
    writer.start()
    with InputLines(str(path)) as lines:
        found = []
        while read := lines.read(9):
            found += [line.data for line in read]
    writer.join()
    assert found == [b"one", long, b"two"]
