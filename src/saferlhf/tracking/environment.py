"""Environment variables that have to be set before MLflow (or a hub client) is imported: no telemetry, no chatter.

A variable the user has set stays as it is, except those that would turn telemetry on again.
"""

from __future__ import annotations

import logging
import os

TELEMETRY_OFF = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow reads only the word "true", other programs any true value
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}

QUIET_DEFAULTS = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # a server that does not answer is noticed in seconds; MLflow's own settings wait for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    # a machine without git is no reason for a warning
    "GIT_PYTHON_REFRESH": "quiet",
}

LOG_LEVELS = {
    # schema migrations of a new store, line by line
    "alembic": logging.WARNING,
    # prints a traceback for every busy moment of a database, which we retry
    "mlflow.store.db.utils": logging.CRITICAL,
    # says that a run has no GPU, or that its store is gone: the logger says that once itself
    "mlflow.system_metrics": logging.CRITICAL,
    "mlflow.utils.validation": logging.ERROR,
}


def prepare_environment() -> None:
    """Switch telemetry off and MLflow's output down; safe to call any number of times."""
    os.environ.update(TELEMETRY_OFF)
    for name, value in QUIET_DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
