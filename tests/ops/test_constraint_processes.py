"""lambda over two real processes: costs gathered by gloo, each process updating its own constraint from all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from saferlhf.config.online_schema import CONSTRAINTS
from saferlhf.ops.constraint import build_constraint

ROLLOUTS, ROWS = 8, 24

WORKER = """
import json, sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from saferlhf.config.online_schema import CONSTRAINTS
from saferlhf.ops.constraint import build_constraint

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
kind, rollouts = json.loads((folder / "work.json").read_text())
constraint = build_constraint(CONSTRAINTS[kind](name=kind), ("cost",))
path = []
for costs, groups in rollouts:
    mine = [(costs[row], groups[row]) for row in range(rank, len(costs), 2)][:: -1 if rank else 1]
    parts = [None, None]
    dist.all_gather_object(parts, mine)
    rows = [row for part in parts for row in part]
    constraint.update({"cost": [cost for cost, _ in rows]}, [group for _, group in rows])
    path.append(constraint.lambdas["cost"])
(folder / f"path{rank}.json").write_text(json.dumps(path))
dist.destroy_process_group()
"""


def rollouts() -> list[tuple[list[float], list[int]]]:
    """Costs of very different size, whose plain sums would depend on their order."""
    groups = [row // 2 for row in range(ROWS)]
    sizes = [10.0 ** -(row % 6) for row in range(ROWS)]
    return [([((7 * r + 3 * n) % 11 - 4.0) * sizes[r] for r in range(ROWS)], groups) for n in range(ROLLOUTS)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lagrangian", "pid", "rectified"])
def test_two_processes_walk_the_path_of_one(kind: str, tmp_path: Path) -> None:
    (tmp_path / "work.json").write_text(json.dumps([kind, rollouts()]))
    (tmp_path / "worker.py").write_text(WORKER)
    words = [sys.executable, str(tmp_path / "worker.py")]
    processes = [subprocess.Popen([*words, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    constraint = build_constraint(CONSTRAINTS[kind](name=kind), ("cost",))
    path = []
    for costs, groups in rollouts():
        constraint.update({"cost": costs}, groups)
        path.append(constraint.lambdas["cost"])
    assert len(set(path)) == ROLLOUTS
    for rank in range(2):
        assert json.loads((tmp_path / f"path{rank}.json").read_text()) == path
