"""The store: made once whoever comes first, busy moments waited out, wrong addresses named at once."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from saferlhf.config.schema import TrackingConfig
from saferlhf.errors import UserError
from saferlhf.tracking import store
from saferlhf.tracking.store import prepare_store, retry_when_busy, sqlite_file, ui_command, without_password


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_package_is_cheap_to_import_and_switches_telemetry_off(tmp_path: Path) -> None:
    code = """
        import os, sys
        for name in list(os.environ):
            if "TELEMETRY" in name or name == "DO_NOT_TRACK":
                del os.environ[name]
        os.environ["MLFLOW_LOGGING_LEVEL"] = "ERROR"
        from saferlhf.tracking.environment import prepare_environment
        prepare_environment()
        slow = {"mlflow", "lightning", "torch", "transformers", "matplotlib"} & set(sys.modules)
        print(sorted(slow), os.environ["MLFLOW_LOGGING_LEVEL"])
        from mlflow.telemetry.utils import is_telemetry_disabled
        print(is_telemetry_disabled())
    """
    out, err = python(code).communicate()
    assert out.split("\n")[:2] == ["[] ERROR", "True"], err


def test_two_processes_make_the_same_store(tmp_path: Path) -> None:
    """Migration and experiment creation race; nothing of it is seen on the screen, and nothing lands elsewhere."""
    code = """
        import os, sys
        from pathlib import Path
        from saferlhf.tracking.store import prepare_store
        os.chdir(sys.argv[2])
        print(prepare_store(sys.argv[1], "together", Path("artefacts")))
    """
    uri = f"sqlite:///{tmp_path}/deep/er/mlflow.db"
    (tmp_path / "cwd").mkdir()
    both = [python(code, uri, str(tmp_path / "cwd")) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in both]
    assert [err for _, err in results] == ["", ""]
    assert results[0][0] == results[1][0] and results[0][0].strip().isdigit()
    assert list((tmp_path / "cwd").iterdir()) == []


def test_busy_is_tried_again_and_leaves_the_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def busy_twice() -> str:
        calls.append(random.random())
        if len(calls) < 3:
            raise RuntimeError("(sqlite3.OperationalError) database is locked")
        return "done"

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    state = random.getstate()
    assert retry_when_busy(busy_twice) == "done"
    assert len(calls) == 3
    assert random.getstate() == state

    with pytest.raises(RuntimeError, match="locked"):
        retry_when_busy(lambda: (_ for _ in ()).throw(RuntimeError("database is locked")), tries=3)

    def other() -> None:
        calls.append(0.0)
        raise ValueError("no such column")

    before = len(calls)
    with pytest.raises(ValueError, match="column"):
        retry_when_busy(other)
    assert len(calls) == before + 1


def test_a_server_that_does_not_answer_is_one_line_in_seconds() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(UserError, match="tracking=none") as caught:
        prepare_store(f"http://me:secret@127.0.0.1:{port}", "x")
    assert time.monotonic() - begun < 10
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that takes connections and never answers."""
    monkeypatch.setattr(store, "REACH_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        with pytest.raises(UserError, match="does not answer"):
            prepare_store(f"http://127.0.0.1:{silent.getsockname()[1]}", "x")
        assert time.monotonic() - begun < 5


def test_a_file_store_is_refused_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tracking=none"):
        prepare_store(f"file:{tmp_path}/mlruns", "x")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, and long enough to be read as one " * 20)
    with pytest.raises(UserError, match=r"cannot be used.*tracking\.uri"):
        prepare_store(f"sqlite:///{tmp_path}/mlflow.db", "x")


def test_an_experiment_in_the_trash(empty_store: Path) -> None:
    uri = f"sqlite:///{empty_store}/mlflow.db"
    number = prepare_store(uri, "gone", empty_store / "mlartifacts")
    assert prepare_store(uri, "gone", empty_store / "mlartifacts") == number
    store.connect(uri).delete_experiment(number)
    with pytest.raises(UserError, match=r"experiments restore -x \d+"):
        prepare_store(uri, "gone", empty_store / "mlartifacts")


def test_passwords_are_not_shown() -> None:
    assert without_password("postgresql://me:secret@db.example/runs") == "postgresql://db.example/runs"
    assert without_password("sqlite:///outputs/mlflow.db") == "sqlite:///outputs/mlflow.db"


def test_sqlite_file() -> None:
    assert sqlite_file("sqlite:////tmp/a b/mlflow.db?timeout=3") == Path("/tmp/a b/mlflow.db")
    assert sqlite_file("sqlite+pysqlite:///runs.db") == Path.cwd() / "runs.db"
    assert sqlite_file("postgresql://db.example/runs") is None


def test_ui_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mlflow = TrackingConfig(name="mlflow")
    assert ui_command(mlflow, Path("outputs")).endswith("mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db")
    spaced = ui_command(mlflow, Path("my runs"))
    assert spaced.endswith("--backend-store-uri 'sqlite:///my runs/mlflow.db'")
    elsewhere = ui_command(mlflow, tmp_path.parent / "else where")
    assert elsewhere.endswith(f"'sqlite:///{tmp_path.parent.resolve()}/else where/mlflow.db'")
    server = TrackingConfig(name="mlflow", uri="https://me:secret@runs.example")
    assert ui_command(server, Path("outputs")) == "https://runs.example"
    assert ui_command(TrackingConfig(name="none"), Path("outputs")) == ""


def test_the_ui_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program exists and knows the option."""
    monkeypatch.chdir(tmp_path)
    program = ui_command(TrackingConfig(name="mlflow"), Path("outputs")).split()[0]
    assert shutil.which(program), program
    out = subprocess.run([program, "ui", "--help"], capture_output=True, text=True, env={**os.environ}, check=True)
    assert "--backend-store-uri" in out.stdout
