"""The run folder: status, lock, the newest folder of an identity, and files that are never half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saferlhf.config.files import read_json, write_json, write_text
from saferlhf.config.run_folder import FINISHED, KILLED, RUNNING, RunFolder, fresh_folder, latest_folder
from saferlhf.errors import UserError


def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "reward" / "0123456789")
    assert folder.status() == {}
    assert not folder.path.exists(), "asking makes nothing"
    folder.acquire()
    assert folder.status()["status"] == RUNNING
    assert folder.status()["pid"] == os.getpid()
    folder.update_status(step=3)
    assert RunFolder(folder.path).status() | {"step": 3, "status": RUNNING} == RunFolder(folder.path).status()
    folder.update_status(status=FINISHED)
    folder.release()
    assert RunFolder(folder.path).status()["status"] == FINISHED
    assert RunFolder(folder.path).status()["step"] == 3


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.acquire()
    with pytest.raises(UserError, match=f"in progress in process {os.getpid()}"):
        second.acquire()
    assert second.status()["status"] == RUNNING, "told by the lock, not by the file"
    first.release()
    second.acquire()
    second.release()


def test_a_process_that_died_is_told_as_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from saferlhf.config.run_folder import RunFolder\n"
        "RunFolder(Path(sys.argv[1])).acquire(); os.kill(os.getpid(), 9)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")])
    assert died.returncode == -9
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == RUNNING
    folder = RunFolder(tmp_path / "run")
    assert folder.status()["status"] == KILLED
    folder.acquire()
    assert folder.status()["status"] == RUNNING
    folder.release()


def test_an_error_of_an_earlier_start_is_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.acquire()
    folder.update_status(status="failed", error="boom")
    folder.release()
    folder.acquire()
    assert folder.status()["error"] is None
    folder.release()


def test_fresh_and_latest(tmp_path: Path) -> None:
    base = tmp_path / "0123456789"
    assert latest_folder(base) == fresh_folder(base) == base
    base.mkdir()
    assert latest_folder(base) == base
    second = fresh_folder(base)
    assert second.name == "0123456789-2"
    second.mkdir()
    assert latest_folder(base) == second
    assert fresh_folder(base).name == "0123456789-3"


@pytest.mark.parametrize("root", ["a file", "/proc"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, root: str) -> None:
    if root == "a file":
        (tmp_path / "a file").write_text("x")
        root = str(tmp_path / "a file")
    folder = RunFolder(Path(root) / "reward" / "0123456789")
    assert folder.status() == {}
    with pytest.raises(UserError, match=r"cannot write there: .*output_root=FOLDER"):
        folder.acquire()


def test_files_are_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file.json"
    write_json(file, {"a": "ü"})
    assert read_json(file) == {"a": "ü"}
    assert read_json(tmp_path / "none.json") is None
    assert oct(file.stat().st_mode & 0o777) == "0o644"

    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    with pytest.raises(TypeError):
        write_text(file, 3)  # type: ignore[arg-type]
    assert read_json(file) == {"a": "ü"}, "the old file stays"
    assert [f.name for f in file.parent.iterdir()] == ["file.json"], "no draft is left"


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.acquire()
    folder.release()
    (folder.path / "status.json").write_text('{"status": "fin')
    with pytest.raises(UserError, match="damaged file") as caught:
        folder.status()
    assert caught.value.where == str(folder.path / "status.json")
