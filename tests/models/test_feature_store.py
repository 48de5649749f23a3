"""Rows found again by content, whatever a killed process, another one or a bad disk did to the files."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from saferlhf.errors import UserError
from saferlhf.models.feature_store import FeatureStore, row_key

SHAPE = (3, 2, 4)
ABOUT = {"model": "m", "layers": [0, 1, 2]}


def store(cache: Path, dtype: str = "float32", **about: object) -> FeatureStore:
    return FeatureStore({**ABOUT, **about}, SHAPE, dtype, cache)


def key(number: int) -> bytes:
    return row_key(np.array([number, 7, 9]), 1)


def numbers(*rows: int) -> np.ndarray:
    return np.stack([np.random.default_rng(row).standard_normal(SHAPE) for row in rows]).astype(np.float32)


def filled(cache: Path, *rows: int) -> FeatureStore:
    made = store(cache)
    with made.writing() as add:
        for row in rows:
            add([key(row)], numbers(row))
    return made


def read(found: FeatureStore, *rows: int) -> np.ndarray:
    return found.states()[found.places([key(row) for row in rows])]


def test_rows_come_back_in_any_order(tmp_path: Path) -> None:
    with (made := store(tmp_path)).writing() as add:
        add([key(1), key(2)], numbers(1, 2))
        add([key(3)], numbers(3))
    for found in (made, store(tmp_path)):
        assert len(found) == 3 and key(4) not in found
        assert np.array_equal(read(found, 3, 1, 3), numbers(3, 1, 3))
        assert found.drop_damaged([key(1), key(2), key(3), key(4)]) == 0
    with pytest.raises(KeyError):
        made.places([key(4)])
    assert made.size_bytes > 3 * made.row_bytes == 3 * 3 * 2 * 4 * 4


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    with (made := store(tmp_path, "float16")).writing() as add:
        add([key(1)], numbers(1))
    assert np.array_equal(read(made, 1), numbers(1).astype(np.float16))
    assert made.row_bytes == 3 * 2 * 4 * 2


def test_a_row_is_its_tokens_and_where_the_response_begins() -> None:
    keys = {row_key(np.array(tokens), prompt) for tokens, prompt in (([1, 2], 1), ([1, 2], 2), ([2, 1], 1), ([1], 1))}
    assert len(keys) == 4
    assert row_key(np.array([1, 2], np.int32), 1) == row_key(np.array([1, 2], np.int64), 1)


def test_whatever_the_numbers_depend_on_has_its_own_folder(tmp_path: Path) -> None:
    folders = {store(tmp_path).folder, store(tmp_path, model="n").folder, store(tmp_path, "float16").folder}
    folders.add(FeatureStore(ABOUT, (4, 2, 4), "float32", tmp_path).folder)
    assert len(folders) == 4


def test_an_empty_store(tmp_path: Path) -> None:
    empty = store(tmp_path)
    assert len(empty) == 0 and empty.states().shape == (0, *SHAPE)
    assert empty.drop_damaged([key(1)]) == 0


@pytest.mark.parametrize(
    ("file", "cut", "left"),
    [
        ("states.bin", 1, [1, 2]),  # killed while it wrote numbers
        ("index.bin", 3, [1, 2]),  # ... or a record
        ("states.bin", 150, [1]),  # the disk lost more than the last row
        ("index.bin", 10_000, []),
    ],
)
def test_what_a_killed_process_left_is_cut_off(tmp_path: Path, file: str, cut: int, left: list[int]) -> None:
    path = filled(tmp_path, 1, 2, 3).folder / file
    path.write_bytes(path.read_bytes()[: max(0, path.stat().st_size - cut)])
    again = store(tmp_path)
    assert [row for row in (1, 2, 3) if key(row) in again] == left
    with again.writing() as add:
        add([key(row) for row in (1, 2, 3) if row not in left], numbers(*(r for r in (1, 2, 3) if r not in left)))
    assert np.array_equal(read(store(tmp_path), 1, 2, 3), numbers(1, 2, 3))
    assert (again.folder / "states.bin").stat().st_size == 3 * again.row_bytes


def test_numbers_without_a_record_are_cut_off(tmp_path: Path) -> None:
    made = filled(tmp_path, 1)
    with open(made.folder / "states.bin", "ab") as file:
        file.write(b"x" * (made.row_bytes + 5))
    assert len(store(tmp_path)) == 1
    with made.writing() as add:
        add([key(2)], numbers(2))
    assert np.array_equal(read(store(tmp_path), 1, 2), numbers(1, 2))


def test_damage_is_found_and_mended(tmp_path: Path) -> None:
    made = filled(tmp_path, 1, 2, 3)
    path = made.folder / "states.bin"
    content = bytearray(path.read_bytes())
    content[made.row_bytes + 17] ^= 1  # one bit of row 2
    path.write_bytes(content)
    again = store(tmp_path)
    keys = [key(row) for row in (1, 2, 3)]
    assert again.drop_damaged(keys) == 1 and key(2) not in again and key(3) in again
    with again.writing() as add:
        assert again.drop_damaged(keys) == 1  # the disk was read again
        add([key(2)], numbers(2))
    found = store(tmp_path)
    assert found.drop_damaged(keys) == 0 and len(found) == 3
    assert np.array_equal(read(found, 1, 2, 3), numbers(1, 2, 3))


def test_a_damaged_record_ends_what_is_believed(tmp_path: Path) -> None:
    path = filled(tmp_path, 1, 2, 3).folder / "index.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 3 + 2] ^= 1
    path.write_bytes(content)
    assert len(store(tmp_path)) == 1


@pytest.mark.parametrize("note", [b"{", b'{"model": "another"}'])
def test_a_folder_of_something_else_is_begun_anew(tmp_path: Path, note: bytes) -> None:
    made = filled(tmp_path, 1)
    (made.folder / "about.json").write_bytes(note)
    with (again := store(tmp_path)).writing() as add:
        assert len(again) == 0
        add([key(2)], numbers(2))
    assert len(store(tmp_path)) == 1


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    large = np.full((1, *SHAPE), 1e5, np.float32)
    with (
        pytest.raises(UserError, match=r"do not fit into float16.*feature_dtype=float32"),
        store(tmp_path, "float16").writing() as add,
    ):
        add([key(1)], large)
    with pytest.raises(UserError, match="not finite"), store(tmp_path).writing() as add:
        add([key(1)], large * np.nan)
    with pytest.raises(ValueError, match="shape"), store(tmp_path).writing() as add:
        add([key(1)], numbers(1, 2))
    assert len(store(tmp_path)) == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache_dir"):
        store(tmp_path / "file")


def test_the_second_of_two_processes_waits_and_finds_the_rows(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:0] = ['tests/models']\n"
        "from pathlib import Path\n"
        "from test_feature_store import key, numbers, store\n"
        "with store(Path(sys.argv[1])).writing() as add:\n"
        "    add([key(1)], numbers(1))\n"
        "    print('holds', flush=True); sys.stdin.readline()\n"
        "    add([key(2)], numbers(2))\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdin is not None and first.stdout is not None
    assert first.stdout.readline() == "holds\n"
    mine, told = store(tmp_path), threading.Event()
    assert key(1) in mine and key(2) not in mine, "readers do not wait"

    def waiting() -> None:
        told.set()
        first.stdin.write("go on\n")
        first.stdin.flush()

    with mine.writing(waiting) as add:
        assert key(2) in mine
        add([key(3)], numbers(3))
    assert told.is_set() and first.wait(30) == 0
    assert np.array_equal(read(store(tmp_path), 1, 2, 3), numbers(1, 2, 3))
