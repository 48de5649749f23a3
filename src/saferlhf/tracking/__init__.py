"""Tracking: what MLflow keeps of a run, through a thin logger of our own (`mlflow_logger.build_logger`).

Importing this package is cheap: MLflow and Lightning are imported with the first name taken from it. `environment` has
to be called before those imports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saferlhf.tracking.base import NullLogger, SplitInfo, Status, TrackingLogger
    from saferlhf.tracking.mlflow_logger import build_logger
    from saferlhf.tracking.store import prepare_store, ui_command

__all__ = ["NullLogger", "SplitInfo", "Status", "TrackingLogger", "build_logger", "prepare_store", "ui_command"]

_HOMES = {"build_logger": "mlflow_logger", "prepare_store": "store", "ui_command": "store"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'base')}"), name)
