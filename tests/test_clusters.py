"""docs/clusters.md and examples/cluster/: scripts that bash reads, commands that the checks accept.

Nothing is submitted. The slow tests stand for SLURM and for two machines: processes on this one, with the variables
that `srun` and `torchrun` leave.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import FAST, config

from saferlhf.config.hydra_errors import is_trouble
from saferlhf.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "clusters.md"
SCRIPTS = sorted((ROOT / "examples" / "cluster").iterdir())
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)

IN_A_JOB = {
    "SHARED": "/shared/me",
    "TRACKING": "http://tracking-server:5000",
    "SLURM_CPUS_PER_TASK": "8",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_JOB_ID": "4711",
    "SLURM_NNODES": "4",
}


def commands(text: str) -> list[list[str]]:
    """Words behind `train.py` of every command in a script; variables as in a job, of swept values the first."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.lstrip().startswith("#") or "train.py" not in line:
            continue
        filled = re.sub(r"\$\{?(\w+)\}?", lambda name: IN_A_JOB.get(name[1], f"<{name[1]}>"), line)
        words = shlex.split(filled)
        _, *words = words[words.index("train.py") :]
        swept = words[:1] == ["-m"]
        found.append([re.sub(r"=([^\[{,]+),.*", r"=\1", word) for word in words[1:]] if swept else words)
    return found


def directives(text: str) -> dict[str, str]:
    """`#SBATCH --name=value` lines."""
    return {name: value for name, _, value in re.findall(r"^#SBATCH --([\w-]+)(=(\S+))?$", text, re.MULTILINE)}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_the_scripts(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    text = script.read_text()
    if script.suffix == ".sbatch":
        assert text.startswith("#!/bin/bash\n") and "set -euo pipefail" in text
        assert len(directives(text)) == text.count("#SBATCH --"), "an #SBATCH line that this test cannot read"
    assert f"`{script.name}`" in PAGE.read_text(), "the page does not say what it is for"


def test_bash_reads_the_page() -> None:
    assert len(BLOCKS) >= 5
    for block in BLOCKS:
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name != "environment.sh"], ids=lambda path: path.name)
def test_the_commands_of_the_scripts_are_accepted(script: Path) -> None:
    found = commands(script.read_text())
    assert found
    for words in found:
        assert not [word for word in words if "<" in word], f"a variable that this test does not know in {words}"
        checked = config(*words)
        if script.suffix == ".sbatch":
            assert checked.output_root == "/shared/me/outputs"
            assert checked.tracking.uri == IN_A_JOB["TRACKING"]
        given = directives(script.read_text())
        tasks = int(given.get("ntasks-per-node", given.get("ntasks", "1")))
        by_torchrun = re.search(r"--nproc-per-node=(\d+)", script.read_text())
        if script.name != "sweep.sbatch":
            started = int(by_torchrun[1]) if by_torchrun else tasks
            assert checked.trainer.devices == started, "as many processes per machine as trainer.devices"
        if checked.trainer.devices > 1:
            nodes = int(given["nodes"])
            assert checked.trainer.batch_size % (nodes * checked.trainer.devices) == 0
            assert int(given["gpus-per-node"]) == checked.trainer.devices and "gpus-per-task" not in given


def test_the_commands_of_the_page_are_accepted() -> None:
    found = [words for block in BLOCKS for words in commands(block)]
    assert found
    for words in found:
        config(*words)


def test_a_wrong_command_would_be_found() -> None:
    (words,) = commands('srun python train.py task=sft trainer.devices="$SLURM_NNODES" \\\n  strategy=single\n')
    assert words == ["task=sft", "trainer.devices=4", "strategy=single"]
    with pytest.raises(UserError):
        config(*words)
    assert commands("# train.py\npython train.py -m seed=0,1 'data.columns={a: b, c: d}'\n") == [
        ["seed=0", "data.columns={a: b, c: d}"]
    ]
    with pytest.raises(Exception) as error:
        config("task=nonsense")
    assert is_trouble(error.value)


def test_a_job_that_is_queued_again_asks_for_all_it_needs() -> None:
    text = (ROOT / "examples" / "cluster" / "preemptible.sbatch").read_text()
    given = directives(text)
    assert {"requeue", "open-mode", "signal"} <= set(given)
    assert given["signal"] == "USR1@120" and "srun" in text, "without B: the signal goes to what srun started"
    assert all(config(*words).checkpoint.requeue for words in commands(text))


def test_the_environment_is_what_the_program_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run by bash in a folder with a stand-in for the virtual environment."""
    from saferlhf.models.content import cache_root

    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    script = ROOT / "examples" / "cluster" / "environment.sh"
    show = (
        f"set -euo pipefail; source {script}; echo $HF_HOME; echo $SAFERLHF_CACHE; echo $HF_HUB_OFFLINE; echo $TRACKING"
    )

    def told(**given: str) -> subprocess.CompletedProcess[str]:
        there = {"PATH": os.environ["PATH"], **given}
        return subprocess.run(["bash", "-c", show], cwd=tmp_path, env=there, capture_output=True, text=True)

    hub, cache, offline, tracking = told(SHARED="/shared/me", SLURM_JOB_ID="7").stdout.split()
    assert (hub, offline, tracking) == ("/shared/me/huggingface", "1", "sqlite:////shared/me/mlflow-7.db")
    monkeypatch.setenv("SAFERLHF_CACHE", cache)
    assert cache_root() == Path("/shared/me/saferlhf")
    assert told(SHARED="/s", TRACKING="http://x:5000").stdout.split()[-1] == "http://x:5000"
    without = told()
    assert without.returncode != 0 and "set SHARED" in without.stderr


# ------------------------------------------------------------------------------------------------ several machines
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


SMALL = ["task=sft", *FAST, "trainer.accelerator=cpu"]


def last_loss(outputs: Path) -> float:
    (curves,) = outputs.glob("debug/*/curves.jsonl")
    lines = [json.loads(line) for line in curves.read_text().splitlines()]
    return float(next(line["val/loss"] for line in reversed(lines) if "val/loss" in line))


def together(starts: list[tuple[list[str], dict[str, str]]], folder: Path) -> list[str]:
    """Start commands at the same time, each with variables of its own; their output. All must end well."""
    running = []
    for number, (words, variables) in enumerate(starts):
        log = (folder / f"out{number}").open("w")
        environment = {**os.environ, **variables}
        running.append(subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=400) for process in running]
    finally:
        for process in running:
            process.kill()
    told = [(folder / f"out{number}").read_text() for number in range(len(starts))]
    assert codes == [0] * len(starts), "\n".join(told)
    return told


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The validation loss of one process."""
    folder = tmp_path_factory.mktemp("alone")
    together([([sys.executable, "train.py", *SMALL, f"output_root={folder}"], {})], folder)
    return last_loss(folder)


@pytest.mark.slow
def test_two_machines_of_two_tasks_under_slurm(tmp_path: Path, alone: float) -> None:
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    words = [sys.executable, "train.py", *SMALL, "strategy=ddp", "trainer.devices=2", f"output_root={tmp_path}"]
    tasks = [
        {**job, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n % 2), "SLURM_NODEID": str(n // 2)} for n in range(4)
    ]
    first, *others = together([(words, task) for task in tasks], tmp_path)
    assert "metrics:" in first and not any("metrics:" in text for text in others), "the first alone speaks"
    assert last_loss(tmp_path) == pytest.approx(alone, abs=1e-5)


@pytest.mark.slow
def test_two_torchruns_of_two_processes(tmp_path: Path, alone: float) -> None:
    """Inside a SLURM job, whose variables do not matter then."""
    torchrun = Path(sys.executable).with_name("torchrun")
    words = [str(torchrun), "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-id=1"]
    words += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "train.py", *SMALL]
    words += ["strategy=ddp", "trainer.devices=2", f"output_root={tmp_path}"]
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"}
    nodes = [{**job, "SLURM_PROCID": str(n), "SLURM_LOCALID": "0", "SLURM_NODEID": str(n)} for n in range(2)]
    told = together([(words, node) for node in nodes], tmp_path)
    assert sum(text.count("metrics: ") for text in told) == 1, "one of four speaks"
    assert last_loss(tmp_path) == pytest.approx(alone, abs=1e-5)


@pytest.mark.slow
def test_a_job_whose_name_lightning_skips_starts_its_own_processes(tmp_path: Path, alone: float) -> None:
    """What `sweep.sbatch` relies on: one task, a run of two devices."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "1", "SLURM_NNODES": "1"}
    words = [sys.executable, "train.py", *SMALL, "strategy=ddp", "trainer.devices=2", f"output_root={tmp_path}"]
    variables = {**job, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    (told,) = together([(words, variables)], tmp_path)
    assert "2 x cpu" in told
    assert last_loss(tmp_path) == pytest.approx(alone, abs=1e-5)
