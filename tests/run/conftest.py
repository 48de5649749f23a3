"""One warm interpreter for all tests that need processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from small_runs import RunServer, make_cheap


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunServer]:
    """Starts commands in processes of their own."""
    server = RunServer(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _cheap_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    make_cheap(monkeypatch.setattr)
