"""What all tests share: one thread per process, no network, no telemetry, real rows where there are any."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

# before torch is imported: several test processes share few cores, and one thread makes sums repeatable
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from saferlhf.tracking.environment import prepare_environment

prepare_environment()


def _hear_signals() -> None:
    """Whoever starts the tests in the background (`nohup`, a shell's `&`) lets them inherit ignored signals."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


_hear_signals()

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The repository."""
    return PROJECT


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets (SAFERLHF_DATA, default ../shared/data); skips where there is none."""
    root = Path(os.environ.get("SAFERLHF_DATA", PROJECT.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real rows: {root} is not there; set SAFERLHF_DATA")
    return root


@pytest.fixture
def tmp_outputs(tmp_path: Path) -> Path:
    """An empty output root."""
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    return outputs


@pytest.fixture(autouse=True)
def _no_hydra_left_over() -> Iterator[None]:
    """Hydra keeps one global state per process; a test that leaves it set would break the next."""
    yield
    module = sys.modules.get("hydra.core.global_hydra")
    if module is not None:
        module.GlobalHydra.instance().clear()
