"""`evaluate.py`: a trained model measured on any rows by the protocols of a suite, or put to use on them.

Results are a run folder of their own, found again by identity like any run: the model enters by its content, the rows
by theirs.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from saferlhf.config.checks import check_evaluate
from saferlhf.config.files import read_json, write_json, write_text
from saferlhf.config.identity import identity_tree, run_hash
from saferlhf.config.run_folder import FAILED, FINISHED, KILLED, RunFolder
from saferlhf.config.schema import EvaluateConfig
from saferlhf.data.build import data_fingerprint
from saferlhf.data.checks import check_policy
from saferlhf.evaluation.policy_config import check_policy_keys, policy_identity
from saferlhf.models.locator import content_id_of
from saferlhf.run.judged_model import POLICY, JudgedModel, judged_model, protocols_for
from saferlhf.run.measured import Measured
from saferlhf.run.screen import say, say_evaluation


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Measure a model on rows, or judge rows with it; writes metrics and a report.

    Raises:
        UserError: no such model, one that is not for this suite, or rows without the needed labels.
    """
    check_evaluate(config)
    check_policy_keys(config)
    check_policy(config.data.policy)
    root = Path(config.output_root)
    model = judged_model(config)
    protocols = [] if config.mode == "moderate" else protocols_for(config, model)
    identity = _identity(config, protocols, content_id_of(model.location, output_root=root, cache_dir=config.cache_dir))
    folder = RunFolder(root / config.name / run_hash(identity))
    if folder.status().get("status") == FINISHED:
        metrics = read_json(folder.metrics) or {}
        say(f"finished before: {folder.path}")
        _show(config, folder, metrics)
        return metrics
    folder.acquire()
    end = FAILED
    tracker: Any = None
    try:
        tracker = _start_tracking(config, folder, model)
        write_text(folder.path / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
        if config.mode == "moderate":
            metrics = _moderate(config, model, folder)
        else:
            metrics = _score(config, protocols, model, folder)
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
    _show(config, folder, metrics)
    return metrics


def _identity(config: EvaluateConfig, protocols: list[str], model: str) -> dict[str, Any]:
    """What makes the numbers: the model and the rows by content, and how they are measured."""
    tree = {
        "mode": config.mode,
        "protocols": protocols,
        "model": model,
        "data": identity_tree(config.data, lambda key, value: "by fingerprint"),
        "data_fingerprint": data_fingerprint(config.data),
        "split": config.split or ("all" if config.mode == "moderate" else "test"),
        "seed": config.seed,
        "evaluation": asdict(config.evaluation),
        "precision": config.trainer.precision,
    }
    if POLICY in protocols:
        tree["policy"] = policy_identity(config)
    return tree | ({"baselines": [config.baselines, config.baseline_rows]} if protocols else {})


def _start_tracking(config: EvaluateConfig, folder: RunFolder, model: JudgedModel) -> Any:
    from saferlhf.tracking import build_logger

    suite = config.suite.name if config.mode == "score" else config.mode
    tracker = build_logger(
        config.tracking,
        output_root=Path(config.output_root),
        run_folder=folder.path,
        run_name=f"{config.name}/{folder.path.name}",
        identity=folder.path.name,
        tags={"suite": suite, "kind": model.kind, "data": config.data.name, "model": model.locator},
        resume_run_id=folder.status().get("mlflow_run_id"),
    )
    folder.update_status(mlflow_run_id=tracker.run_id)
    tracker.log_hyperparams(asdict(config))
    return tracker


def _track(tracker: Any, folder: RunFolder, metrics: dict[str, float]) -> None:
    tracker.log_metrics(metrics, step=0)
    pictures = sorted(path.name for path in folder.path.glob("*.png"))
    for name in ("config.yaml", "metrics.json", "data_report.json", "report.html", *pictures):
        if (folder.path / name).is_file():
            tracker.log_artifact(folder.path / name)


def _score(config: EvaluateConfig, protocols: list[str], model: JudgedModel, folder: RunFolder) -> dict[str, float]:
    """All protocols, one after the other, into one file of metrics and one report."""
    from saferlhf.evaluation.report import write_report
    from saferlhf.run.evaluate_moderation import measure_moderation
    from saferlhf.run.evaluate_preference import measure_preference

    def of_policy(config: EvaluateConfig, model: JudgedModel) -> Measured:
        from saferlhf.run.evaluate_policy import measure_policy

        return measure_policy(config, model, folder)

    measures = {"preference": measure_preference, "moderation": measure_moderation, POLICY: of_policy}
    found = {name: measures[name](config, model) for name in protocols}
    metrics = {name: value for measured in found.values() for name, value in measured.metrics.items()}
    for number, (name, measured) in enumerate(found.items()):
        ending = f"_{name}" if number else ""
        write_json(folder.path / f"data_report{ending}.json", measured.data_report)
    split = config.split or "test"
    first = found[protocols[0]]
    write_report(
        folder.path / "report.html",
        title=f"{model.kind} model on {config.data.name} ({split})",
        subtitle=model.locator,
        metrics=metrics,
        config=asdict(config),
        data_report=first.data_report,
        histograms=[drawing for measured in found.values() for drawing in measured.drawings],
        lineage={"model": model.locator, **{f"data for {name}": m.fingerprint for name, m in found.items()}},
        confidence=config.evaluation.confidence,
    )
    write_json(folder.metrics, metrics)
    return metrics


def _moderate(config: EvaluateConfig, model: JudgedModel, folder: RunFolder) -> dict[str, float]:
    from saferlhf.run.moderate import moderate

    return moderate(config, model, folder)


def _show(config: EvaluateConfig, folder: RunFolder, metrics: dict[str, float]) -> None:
    if config.mode == "moderate":
        from saferlhf.run.moderate import say_moderated

        say_moderated(folder, metrics)
    elif any(name.startswith(f"{POLICY}/") for name in metrics):
        _show_policy(folder, metrics)
    else:
        say_evaluation(folder, metrics, config.evaluation.confidence)


def _show_policy(folder: RunFolder, metrics: dict[str, float]) -> None:
    """A policy's numbers beside its baseline's; responses may be harmful, so only their file is named."""
    from rich.console import Console

    from saferlhf.evaluation.policy_table import arena_table, evaluation_table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in (evaluation_table(metrics), arena_table(metrics)):
        if table is not None:
            console.print(table)
    print(f"samples: {folder.path / 'samples.jsonl'}")
    print(f"report:  {folder.path / 'report.html'}")
    print(f"metrics: {folder.metrics}")
