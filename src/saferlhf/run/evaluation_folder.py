"""One evaluation in its run folder: locked, tracked, with a status that says how it ended."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.files import read_json, write_text
from saferlhf.config.run_folder import FAILED, FINISHED, KILLED, RunFolder
from saferlhf.evaluation.protocol_results import FILE as PROTOCOLS

ARTIFACTS = ("config.yaml", "metrics.json", "protocols.json", "comparison.json", "comparison.md", "data_report.json")
"""Files that the tracker is given, besides the report and the pictures; responses stay on this machine."""


_BREAKDOWN = re.compile(
    r"/baseline_|/by_|/unseen/|/category/(?:f1|precision|recall|support)_|_n$"
    r"|arena/.*_over_.*_(?:tie_rate(?:_low|_high)?|p|p_holm)$"
)


def in_folder(
    folder: RunFolder, config: EvaluateConfig, tags: Mapping[str, str], work: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """What `work` found, done while the folder is locked; its metrics and files reach the tracker.

    Args:
        folder: of the evaluation.
        config: written into it.
        tags: of the tracked run.
        work: measures, and leaves its files in the folder.
    """
    folder.acquire()
    end = FAILED
    tracker: Any = None
    try:
        tracker = _start_tracking(config, folder, tags)
        write_text(folder.path / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        metrics = work()
        _track(tracker, folder, metrics)
        tracker.finish("FINISHED")
        end = FINISHED
    except KeyboardInterrupt:
        end = KILLED
        raise
    except BaseException as error:
        folder.update_status(error=str(error)[:2000])
        raise
    finally:
        folder.update_status(status=end, **({"finished": time.time()} if end == FINISHED else {}))
        folder.release()
        if tracker is not None:
            tracker.finish({KILLED: "KILLED", FAILED: "FAILED"}.get(end, "FINISHED"))
    return metrics


def _start_tracking(config: EvaluateConfig, folder: RunFolder, tags: Mapping[str, str]) -> Any:
    from saferlhf.tracking import build_logger

    tracker = build_logger(
        config.tracking,
        output_root=Path(config.output_root),
        run_folder=folder.path,
        run_name=f"{config.name}/{folder.path.name}",
        identity=folder.path.name,
        tags=dict(tags),
        resume_run_id=folder.status().get("mlflow_run_id"),
    )
    folder.update_status(mlflow_run_id=tracker.run_id)
    tracker.log_hyperparams(asdict(config))
    return tracker


def tracked_metrics(metrics: Mapping[str, float], protocols: Mapping[str, Any] | None = None) -> dict[str, float]:
    """What the tracker is given of thousands of metrics: MLflow draws a chart of each, side by side for all runs.

    Left out are break-downs, which stay in `metrics.json` and the report: baselines, groups, harm categories one by
    one, rows of unseen prompts, tests of pairs of policies, and counts. Added is the headline of every protocol as
    `all_protocols/<protocol>`, which MLflow shows first.

    Args:
        metrics: all.
        protocols: content of `protocols.json`; None: nothing was measured by protocol.
    """
    kept = {name: value for name, value in metrics.items() if not _BREAKDOWN.search(name)}
    for result in (protocols or {}).get("results", ()):
        headline = result["values"].get(result["metric"])
        if headline is not None:
            kept[f"all_protocols/{result['protocol']}"] = headline["value"]
    return kept


def _track(tracker: Any, folder: RunFolder, metrics: Mapping[str, float]) -> None:
    tracker.log_metrics(tracked_metrics(metrics, read_json(folder.path / PROTOCOLS)), step=0)
    pictures = sorted(path.name for path in folder.path.glob("*.png"))
    for name in (*ARTIFACTS, "report.html", *pictures):
        if (folder.path / name).is_file():
            tracker.log_artifact(folder.path / name)
