"""A store with its tables made once: migrating a new sqlite file takes two seconds, copying it none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from saferlhf.tracking.store import connect


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def empty_store(_template: Path, tmp_outputs: Path) -> Path:
    """An output root whose sqlite store has its tables and no experiment of ours."""
    shutil.copyfile(_template, tmp_outputs / "mlflow.db")
    return tmp_outputs
