"""The project as a wheel, in an environment of its own: commands run from any folder, with the user's own configs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("src", "conf", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build folder in the repository would be in the way of later builds."""
    source = tmp_path_factory.mktemp("source")
    for part in PARTS:
        whole = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        whole(ROOT / part, source / part)
    for leftover in source.rglob("*.egg-info"):
        shutil.rmtree(leftover)
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", cwd=source)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a fresh environment that holds the wheel and borrows everything else from this one."""
    home = tmp_path_factory.mktemp("home")
    assert run(sys.executable, "-m", "venv", "--without-pip", home / "env", cwd=home).returncode == 0
    programs = home / "env" / "bin"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(programs / "python", "-c", ask, cwd=home).stdout.strip())
    pip = [sys.executable, "-m", "pip", "--python", programs / "python"]
    installed = run(*pip, "install", "-qq", "--no-deps", "--no-index", wheel, cwd=home)
    assert installed.returncode == 0, installed.stderr
    # a path file is searched after the folder it lies in, and its own .pth files (the editable install) are not read
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def test_the_wheel_holds_every_config_and_the_type_marker(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"saferlhf/conf/{file.relative_to(ROOT / 'conf')}" for file in (ROOT / "conf").rglob("*.yaml")}
    assert len(configs) > 10
    assert configs <= names
    modules = {f"saferlhf/{file.relative_to(ROOT / 'src' / 'saferlhf')}" for file in (ROOT / "src").rglob("*.py")}
    assert modules <= names
    assert "saferlhf/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "conf/", "setup"))]


def test_the_commands_run_from_any_folder(programs: Path, tmp_path: Path) -> None:
    where = run(programs / "python", "-c", "import saferlhf; print(saferlhf.__file__)", cwd=tmp_path).stdout
    assert str(programs.parent) in where, "the editable install is in front of the wheel"
    for command in ("saferlhf-train", "saferlhf-evaluate"):
        shown = run(programs / command, "--help", cwd=tmp_path)
        assert shown.returncode == 0, shown.stderr
        assert "tracking" in shown.stdout and "toyworld" in shown.stdout


def test_a_plan_with_a_config_of_ones_own(programs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    own = "# @package _global_\n# saferlhf-train task=reward experiment=own\n\nname: my_very_own\n"
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(own)
    plan = ["task=reward", "experiment=own", "plan=on"]
    done = run(programs / "saferlhf-train", "--config-dir", tmp_path / "mine", *plan, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "my_very_own" in done.stdout
    without = run(programs / "saferlhf-train", *plan, cwd=tmp_path)
    assert without.returncode == 2
    assert "Traceback" not in without.stderr


def test_a_run_of_a_few_steps(programs: Path, tmp_path: Path) -> None:
    done = run(programs / "saferlhf-train", "task=reward", "debug=fast", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (export,) = (tmp_path / "outputs").glob("*/*/export/saferlhf.json")
    evaluate = ["suite=preference", f"model={export.parents[1]}", "data.test_rows=40"]
    scored = run(programs / "saferlhf-evaluate", *evaluate, cwd=tmp_path)
    assert scored.returncode == 0, scored.stdout[-2000:] + scored.stderr[-2000:]
