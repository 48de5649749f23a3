"""Result tables of the docs: runs are found by seed, blocks are replaced, and every table has its place."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from command_lines import call


@pytest.fixture(scope="module")
def results(project_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("results", project_root / "benchmarks" / "results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["results"] = module
    spec.loader.exec_module(module)
    return module


def a_run(
    outputs: Path, name: str, seed: int, metrics: dict[str, float], status: str = "finished", at: float = 1.0
) -> None:
    folder = outputs / "reward" / name
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"status": status, "finished": at}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "data": {"name": "toyworld"}}))
    (folder / "metrics.json").write_text(json.dumps(metrics))


def a_table(results: ModuleType, **changes: object) -> object:
    fields = {
        "name": "t",
        "page": "docs/x.md",
        "command": "python train.py seed={seed}",
        "seeds": (1, 2, 3),
        "run": "reward",
        "metrics": ("test/a", "test/none"),
        "where": {},
    }
    return results.Table(**(fields | changes))


def test_the_newest_finished_run_of_a_seed(results: ModuleType, tmp_path: Path) -> None:
    a_run(tmp_path, "a", 1, {"test/a": 0.1})
    a_run(tmp_path, "b", 1, {"test/a": 0.2}, at=2.0)
    a_run(tmp_path, "c", 1, {"test/a": 0.3}, status="running", at=3.0)
    a_run(tmp_path, "d", 2, {"test/a": 0.4}, at=4.0)
    table = a_table(results)
    assert results.find_run(table, 1, tmp_path) == {"test/a": 0.2}
    assert results.find_run(table, 3, tmp_path) is None
    other = a_table(results, where={"data.name": "pku_saferlhf"})
    assert results.find_run(other, 1, tmp_path) is None


def test_a_table_with_intervals_mean_and_spread(results: ModuleType) -> None:
    by_seed = {
        1: {"test/a": 0.5, "test/a_low": 0.4, "test/a_high": 0.6},
        2: {"test/a": 0.6},
        3: {"test/a": 0.7},
    }
    lines = results.render(a_table(results), by_seed).splitlines()
    assert lines[0] == "`python train.py seed=S` for S = 1, 2, 3"
    assert lines[2] == "| metric | seed 1 | seed 2 | seed 3 | mean |"
    assert lines[4] == "| `test/a` | 0.5000 (0.400 .. 0.600) | 0.6000 | 0.7000 | **0.6000** ± 0.1000 |"
    assert len(lines) == 5  # a metric that no run has makes no row


def test_a_block_is_replaced_and_a_missing_one_refused(results: ModuleType) -> None:
    page = "a\n<!-- results: t -->\nold\n<!-- end -->\nb\n<!-- results: u -->\nkept\n<!-- end -->\n"
    assert results.replace_block(page, "t", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="0 blocks"):
        results.replace_block(page, "v", "new")


def test_every_table_has_its_place_and_its_command_composes(results: ModuleType, project_root: Path) -> None:
    for table in results.read_tables(project_root / "benchmarks" / "results.yaml").values():
        text = (project_root / table.page).read_text()
        assert results.replace_block(text, table.name, "x") != text
        program, script, *words = table.command.format(seed=1).split()
        assert (program, script) == ("python", "train.py")
        answer = call("train", "--cfg", "job", *words)
        assert answer.code == 0, answer.err


# ------------------------------------------------------------------------------------------------ grids
def a_pipeline(outputs: Path, name: str, seed: int, metrics: dict[str, float], status: str = "finished") -> None:
    folder, stage = outputs / "paper" / name, outputs / "paper-sft" / name
    for path in (folder, stage):
        path.mkdir(parents=True)
    stages = {"sft": f"elsewhere/paper-sft/{name}"}
    (folder / "status.json").write_text(json.dumps({"status": status, "updated": 1.0, "stages": stages}))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (stage / "config.yaml").write_text(yaml.safe_dump({"seed": seed}))


def test_parts_of_a_pipeline_side_by_side(results: ModuleType, tmp_path: Path) -> None:
    a_pipeline(tmp_path, "a", 7, {"ppo/x": 0.5, "ppo/x_low": 0.4, "ppo/x_high": 0.6, "dual/x": 2.0})
    a_pipeline(tmp_path, "b", 8, {"ppo/x": 0.75}, status="running")
    lines = {"PPO": "ppo", "dual": "dual"}
    grid = results.Grid("g", "docs/x.md", "run seed={seed}", (7,), "paper", lines, {"what": "x", "none": "y"})
    found = results.find_pipeline(grid, 7, tmp_path)
    assert found is not None and results.find_pipeline(grid, 8, tmp_path) is None
    text = results.render_grid(grid, {7: found, 9: {"ppo/x": 1.0}})
    assert "`run seed=S` for S = 7, 9" in text
    assert "| PPO | 0.500 (0.400 .. 0.600)<br>1.000 | <br> |" in text
    assert "| dual | 2.000<br> | <br> |" in text
