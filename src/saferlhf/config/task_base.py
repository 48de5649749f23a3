"""What every task's configuration has; see `task_schema.py` for all of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TaskConfig:
    """What every task has: its name and the LightningModule that carries it out."""

    name: str
    _target_: str
