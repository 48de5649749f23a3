"""Files: every format and compression gives the same records; broken ones are named by place."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from saferlhf.data import files
from saferlhf.errors import UserError

ROWS = [{"prompt": "one", "response": "a, b"}, {"prompt": "zwei ü", "response": 'say "x"\nand more'}]


def write(path: Path) -> Path:
    """ROWS in the format of the file's name."""
    kind = files.format_of(path)
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        return path
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8", newline="") as stream:
        if kind == "jsonl":
            stream.writelines(json.dumps(row) + "\n" for row in ROWS)
        elif kind == "json":
            json.dump(ROWS, stream)
        else:
            writer = csv.DictWriter(stream, ["prompt", "response"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.json.xz", "a.csv.gz", "a.parquet"]
)
def test_every_format_reads_the_same_records(tmp_path: Path, name: str) -> None:
    records = list(files.read_records(write(tmp_path / name)))
    assert [record.values for record in records] == ROWS
    assert all(str(tmp_path / name) in record.place for record in records)


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [record.values for record in files.read_records(path)] == ROWS


def test_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "x"}\n\n{"prompt": "y"}\n')
    assert [(r.values["prompt"], r.place.rsplit(":", 1)[1]) for r in files.read_records(path)] == [
        ("x", "1"),
        ("y", "3"),
    ]


def test_csv_places_are_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,response\nx,"two\nlines"\ny,z\n')
    assert [record.place for record in files.read_records(path)] == [f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "a.jsonl:2"),
        ("a.jsonl", b'{"prompt": "x"}\n[1, 2]\n', "a.jsonl:2"),
        ("a.json", b'[{"prompt": "x"},\n {"prompt" "y"}]', "a.json:2"),
        ("a.json", b'{"data": []}', "list of objects"),
        ("a.csv", b"prompt,response\nx,y,z\n", "a.csv:2"),
        ("a.jsonl", b'{"prompt": "\xff"}\n', "not UTF-8"),
        ("a.jsonl.gz", b"no archive", "broken archive"),
        ("a.jsonl.xz", b"no archive", "broken archive"),
        ("a.parquet", b"no table", "not a readable Parquet file"),
    ],
)
def test_broken_files_are_one_line_with_a_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        faults = [record.fault for record in files.read_records(tmp_path / name) if record.fault]
        raise faults[0]
    assert message in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_suggests_near_names(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(UserError, match=r"no such file.*did you mean .*pairs\.jsonl"):
        files.resolve_path(str(tmp_path / "pair.jsonl"), None, "data.path")
    with pytest.raises(UserError, match=r"data\.path="):
        files.resolve_path(str(tmp_path / "quite-different"), None, "data.path")


def test_root_is_where_relative_paths_start(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    assert files.resolve_path("a.jsonl", str(tmp_path), "data.path") == tmp_path / "a.jsonl"


def test_missing_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(UserError, match=r"did you mean pairs\.jsonl"):
        files.resolve_path("pears.jsonl", None, "data.path")
    with pytest.raises(UserError, match="no such file"):
        files.resolve_path("no/such/folder.jsonl", None, "data.path")


def test_a_folder_keeps_its_splits(tmp_path: Path) -> None:
    for name in (
        "alpaca/train.jsonl",
        "alpaca/test.jsonl",
        "beaver/train-00.jsonl",
        "validation.json",
        ".hidden.jsonl",
        "notes.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = files.find_files(tmp_path)
    names = [[path.relative_to(tmp_path).as_posix() for path in part] for part in (found.train, found.val, found.test)]
    assert names == [["alpaca/train.jsonl", "beaver/train-00.jsonl"], ["validation.json"], ["alpaca/test.jsonl"]]


def test_a_folder_without_train_files_is_one_set(tmp_path: Path) -> None:
    for name in ("test.jsonl", "b.csv"):
        (tmp_path / name).write_text("")
    assert [path.name for path in files.find_files(tmp_path).train] == ["b.csv", "test.jsonl"]


def test_folders_and_files_without_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("")
    for path in (tmp_path, tmp_path / "readme.md"):
        with pytest.raises(UserError, match=r"\.jsonl"):
            files.find_files(path)


def test_content_hash_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "a.jsonl").write_text("1")
        (folder / "b.jsonl").write_text("2")

    def hashed(folder: Path) -> str:
        return files.content_hash(files.find_files(folder).all(), folder)

    assert hashed(first) == hashed(second)
    before = hashed(second)
    (second / "b.jsonl").write_text("longer")
    assert hashed(second) != before
