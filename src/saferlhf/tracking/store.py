"""Where runs are kept: the address of the store, making it ready once, and the command that shows it.

The default store is a sqlite file under the output root with the artefacts beside it. Creating a sqlite store runs
schema migrations, and creating an experiment is check-then-create: two jobs started together would trip over each
other, so both happen under a file lock.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from saferlhf.config.schema import TrackingConfig
from saferlhf.errors import UserError
from saferlhf.tracking.environment import prepare_environment

if TYPE_CHECKING:
    from mlflow import MlflowClient

Result = TypeVar("Result")

_jitter = random.Random()  # its own: the global generator belongs to the training

REACH_SECONDS = 5.0
"""How long a tracking server may take to answer the first time."""

BUSY = re.compile(r"database is locked|database table is locked|deadlock|could not serialize", re.IGNORECASE)
"""What databases say when another process is writing: worth another try."""


def store_uri(cfg: TrackingConfig, output_root: Path) -> str:
    """The configured address, or the sqlite file under the output root."""
    return cfg.uri or f"sqlite:///{output_root.resolve() / 'mlflow.db'}"


def is_server(uri: str) -> bool:
    """Whether the address is a tracking server's."""
    return uri.startswith(("http://", "https://"))


def without_password(uri: str) -> str:
    """The address without user and password, fit to be printed."""
    return re.sub(r"(?<=://)[^/@]+@", "", uri)


def sqlite_file(uri: str) -> Path | None:
    """The file of a sqlite address; None for any other store."""
    match = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", uri)
    return Path(match[1]).resolve() if match else None


def ui_command(cfg: TrackingConfig, output_root: Path) -> str:
    """What to type to look at the runs: a command, a server's address, or nothing with `tracking=none`."""
    if cfg.name == "none":
        return ""
    uri = store_uri(cfg, output_root)
    if is_server(uri):
        return without_password(uri)
    file = sqlite_file(uri)
    if file is not None:
        uri = f"sqlite:///{_from_here(file)}"
    beside = Path(sys.executable).parent / "mlflow"
    program = _from_here(beside) if beside.exists() else "mlflow"
    return shlex.join([program, "ui", "--backend-store-uri", without_password(uri)])


def _from_here(path: Path) -> str:
    """A path as short as it can be written: relative below the working folder, else absolute."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def prepare_store(uri: str, experiment: str, artifact_root: Path | None = None) -> str:
    """Make the store and the experiment if they are not there yet.

    Args:
        uri: the store's address.
        experiment: the experiment's name.
        artifact_root: where a new experiment of a database keeps its artefacts; a server decides for itself.

    Returns:
        The experiment's id.

    Raises:
        UserError: the store cannot be reached or used.
    """
    prepare_environment()
    _check_reachable(uri)
    try:
        with _one_at_a_time(uri):
            return retry_when_busy(lambda: _experiment_id(uri, experiment, artifact_root))
    except UserError:
        raise
    except Exception as error:
        raise unusable(uri, error) from error


def connect(uri: str) -> MlflowClient:
    """A client of the store, for runs and for the registry."""
    prepare_environment()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def retry_when_busy(action: Callable[[], Result], tries: int = 10, first_wait: float = 0.05) -> Result:
    """Do something with a store, again while the database is busy.

    Waits double, with jitter so that jobs fall out of step. Python's global generator is put back afterwards: what a
    client library draws from it must not change what training draws.
    """
    generator = random.getstate()
    try:
        return _tried(action, tries, first_wait)
    finally:
        random.setstate(generator)


def _tried(action: Callable[[], Result], tries: int, first_wait: float) -> Result:
    for attempt in range(tries):
        try:
            return action()
        except Exception as error:
            if attempt == tries - 1 or not BUSY.search(str(error)):
                raise
            time.sleep(min(first_wait * 2**attempt, 2.0) * _jitter.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


def _experiment_id(uri: str, experiment: str, artifact_root: Path | None) -> str:
    from mlflow.exceptions import MlflowException

    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        location = None if is_server(uri) or artifact_root is None else artifact_root.resolve().as_uri()
        try:
            return str(client.create_experiment(experiment, artifact_location=location))
        except MlflowException as error:
            # another machine was faster
            found = client.get_experiment_by_name(experiment)
            if found is None:
                raise error
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"the experiment {experiment!r} is in the store's trash",
            "tracking.experiment",
            f"restore it with `mlflow experiments restore -x {found.experiment_id}` or choose another name",
        )
    return str(found.experiment_id)


def _check_reachable(uri: str) -> None:
    """Ask a server for any answer at all, so that a wrong address fails in seconds."""
    if not is_server(uri):
        return
    import requests

    try:
        requests.get(uri.rstrip("/") + "/health", timeout=REACH_SECONDS)
    except requests.RequestException as error:
        raise UserError(
            f"the tracking server {without_password(uri)} does not answer ({type(error).__name__})",
            "tracking.uri",
            "check the address, or use tracking=none",
        ) from error


def unusable(uri: str, error: Exception) -> UserError:
    """What to tell the user about a store that fails at the start."""
    shown, said = without_password(uri), without_password(str(error).strip().split("\n")[0][:300])
    if "out-of-date database schema" in str(error):
        mend = f"it was written by an older MLflow: keep a copy, then type `mlflow db upgrade {shown}`"
        return UserError(f"the tracking store {shown} has an old schema", "tracking.uri", mend)
    return UserError(
        f"the tracking store {shown} cannot be used: {said}", "tracking.uri", "check the address, or use tracking=none"
    )


@contextlib.contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Hold the lock beside a sqlite file; other stores look after themselves."""
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock", timeout=120):
        yield
