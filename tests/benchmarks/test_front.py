"""The front of the sweeps' page: read from run folders, told in numbers that are theirs, drawn."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from command_lines import config

KEYS = ("mean_cost", "mean_reward", "mean_helpfulness", "mean_harmlessness", "safe_rate")


@pytest.fixture(scope="module")
def front(project_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("front", project_root / "benchmarks" / "front.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["front"] = module
    spec.loader.exec_module(module)
    return module


def metrics(cost: float, reward: float, safe: float) -> dict[str, float]:
    """Numbers of a run, each with an interval of 0.1 both ways, and of the SFT model."""
    values = dict(zip(KEYS, (cost, reward, 2 * reward, -cost, safe), strict=True))
    start = dict(zip(KEYS, (0.0, -0.5, 0.7, -0.5, 0.5), strict=True))
    found = {f"policy/{name}": value for name, value in values.items()}
    found |= {f"policy/baseline_policy/{name}": value for name, value in start.items()}
    return found | {f"{k}_{end}": v + by for k, v in found.items() for end, by in (("low", -0.1), ("high", 0.1))}


def leave(folder: Path, numbers: dict[str, float], lambdas: tuple[float, ...] = (), finished: float = 1.0) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(numbers))
    (folder / "status.json").write_text(json.dumps({"status": "finished", "finished": finished}))
    lines = [{"step": n, "train/lambda": value} for n, value in enumerate(lambdas)]
    (folder / "curves.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 9}]))


RUNS = {
    # (d, lambda_lr): cost, reward, safe, lambdas
    (-4.0, 0.1): (-4.2, 0.5, 1.0, (0.5, 0.9, 1.2, 1.0)),
    (-4.0, 0.5): (-3.0, 0.7, 0.9, (0.5, 3.0, 0.2, 2.0)),
    (-1.0, 0.1): (-1.5, 1.0, 0.6, (0.5, 0.4, 0.3, 0.2)),
    (-1.0, 0.5): (-0.9, 1.2, 0.4, (0.5, 0.1, 0.9, 0.4)),
}


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    runs = []
    for number, ((d, step), (cost, reward, safe, lambdas)) in enumerate(RUNS.items()):
        leave(tmp_path / "front" / f"r{number}", metrics(cost, reward, safe), lambdas)
        overrides = {"constraint.threshold": f"{d:g}", "constraint.lambda_lr": str(step)}
        runs.append({"overrides": overrides, "status": "finished", "folder": f"elsewhere/outputs/front/r{number}"})
    leave(tmp_path / "front-ppo" / "old", metrics(9.0, 9.0, 0.0))
    leave(tmp_path / "front-ppo" / "new", metrics(0.3, 1.5, 0.4), finished=2.0)
    (tmp_path / "sweeps" / "front").mkdir(parents=True)
    (tmp_path / "sweeps" / "front" / "sweep.json").write_text(json.dumps({"runs": runs}))
    return tmp_path


def test_the_runs_are_read_from_their_folders(front: ModuleType, outputs: Path) -> None:
    found = front.read_front(outputs)
    assert found.steps == [0.1, 0.5] and found.thresholds == [-4.0, -1.0]
    assert [point.threshold for point in found.along(0.5)] == [-4.0, -1.0]
    assert found.along(0.1)[1].gap == pytest.approx(-0.5)
    assert found.along(0.5)[0].lambdas == (0.5, 3.0, 0.2, 2.0)
    assert found.free["policy/mean_cost"] == 0.3, "the newest"


def test_a_run_that_is_missing_is_named(front: ModuleType, outputs: Path) -> None:
    file = outputs / "sweeps" / "front" / "sweep.json"
    told = json.loads(file.read_text())
    told["runs"][2]["status"] = "killed"
    file.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"not finished: \{'constraint.threshold': '-1'"):
        front.read_front(outputs)
    with pytest.raises(FileNotFoundError):
        front.newest(outputs, "quickstart-sft")


def test_every_number_of_the_sentences_is_the_runs(front: ModuleType, outputs: Path) -> None:
    first, second, third = front.sentences(front.read_front(outputs))
    # -4.2 and -1.5 are below -4 and -1; -0.9 and -3.0 are not
    assert first.startswith("On held-out prompts 2 of 4 runs")
    assert "0.1: -0.50 .. -0.20; 0.5: +0.10 .. +1.00 (" in first
    assert "From d = -4 to d = -1" in second and "by +0.50 (0.1), +0.50 (0.5), true" in second
    assert "helpfulness by +1.00 (0.1), +1.00 (0.5)" in second and "by +40.0 (0.1), +50.0 (0.5) points" in second
    assert "the reward is 1.50, true helpfulness 3.00 and 60.0% are unsafe" in second
    assert "for d = -4 and -1, at 0.1: 1.00 and 0.20; 0.5: 2.00 and 0.40;" in third


def test_the_block_and_the_picture(front: ModuleType, outputs: Path, tmp_path: Path) -> None:
    found = front.read_front(outputs)
    lines = front.render(found).splitlines()
    assert lines[2].startswith("| 0.1 | -4 | -4.20 (-4.30 .. -4.10) | 0.50 (0.40 .. 0.60) | 1.00 |")
    rows = [line for line in lines if line.startswith("| ")]
    assert len(rows) == 1 + 4 + 2 and rows[-1].startswith("| SFT, the start | | 0.00 (-0.10 .. 0.10) |")
    picture = tmp_path / "front.png"
    front.draw(found, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_page_says_what_the_script_runs(front: ModuleType, project_root: Path) -> None:
    text = front.PAGE.read_text()
    assert front.replace_block(text, front.BLOCK, "x") != text
    (block,) = [b for b in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if "constraint.lambda_min" in b]
    stages, sweep = block.replace("\\\n", " ").splitlines()
    assert shlex.split(stages) == shlex.split(front.STAGES)
    said = set(shlex.split(sweep)) - {"init=SFT", "roles.reward.model=REWARD", "roles.cost.model=COST"}
    assert said == set(shlex.split(front.SWEEP)) - {"name=front", "sweep.folder=front"}
    given = ["init=SFT", "roles.reward.model=REWARD", "roles.cost.model=COST"]
    words = [word.partition(",")[0] for word in shlex.split(front.SWEEP)[3:]]
    made = config(*(word for word in words if not word.startswith("sweep.")), *given)
    assert made.constraint.threshold == -4 and made.constraint.lambda_lr == 0.02
    assert config(*shlex.split(front.FREE)[2:], *given).constraint.name == "none"
