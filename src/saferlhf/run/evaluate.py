"""`evaluate.py`: a trained reward or cost model on any rows.

Results are a run folder of their own, found again by identity like any run: the model enters by its content, the rows
by theirs.
"""

from __future__ import annotations

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
from saferlhf.data.build import build_data, data_fingerprint
from saferlhf.data.checks import check_policy
from saferlhf.data.rows import PreferencePair
from saferlhf.errors import UserError
from saferlhf.models.locator import Location, content_id_of, resolve
from saferlhf.models.metadata import ExportMetadata, read_metadata
from saferlhf.run.screen import say, say_evaluation

SCORED = ("reward", "cost")
"""Kinds of models that score pairs."""


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Score rows with a model and write metrics and a report.

    Raises:
        UserError: no such model, a model without the needed head, or rows without the needed labels.
    """
    check_evaluate(config)
    check_policy(config.data.policy)
    root = Path(config.output_root)
    location = resolve(str(config.model), output_root=root)
    if location.kind != "export" or location.folder is None:
        raise UserError(f"'{config.model}' has no score heads", "model", "name a run of task=reward or task=cost")
    metadata = read_metadata(location.folder)
    if metadata.kind not in SCORED:
        what = f"'{config.model}' is a model of kind '{metadata.kind}' without score heads"
        raise UserError(what, "model", "name a run of task=reward or task=cost")
    identity = _identity(config, content_id_of(location, output_root=root, cache_dir=config.cache_dir))
    folder = RunFolder(root / config.name / run_hash(identity))
    if folder.status().get("status") == FINISHED:
        metrics = read_json(folder.metrics) or {}
        say(f"finished before: {folder.path}")
        say_evaluation(folder, metrics, config.evaluation.confidence)
        return metrics
    folder.acquire()
    end = FAILED
    tracker: Any = None
    try:
        tracker = _start_tracking(config, folder, metadata)
        metrics = _score(config, location, metadata, folder)
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
    say_evaluation(folder, metrics, config.evaluation.confidence)
    return metrics


def _identity(config: EvaluateConfig, model: str) -> dict[str, Any]:
    """What makes the numbers: the model and the rows by content, and how they are measured."""
    return {
        "evaluate": asdict(config.suite),
        "model": model,
        "data": identity_tree(config.data, lambda key, value: "by fingerprint"),
        "data_fingerprint": data_fingerprint(config.data),
        "split": config.split,
        "seed": config.seed,
        "evaluation": asdict(config.evaluation),
        "precision": config.trainer.precision,
    }


def _start_tracking(config: EvaluateConfig, folder: RunFolder, metadata: ExportMetadata) -> Any:
    from saferlhf.tracking import build_logger

    tracker = build_logger(
        config.tracking,
        output_root=Path(config.output_root),
        run_folder=folder.path,
        run_name=f"{config.name}/{folder.path.name}",
        identity=folder.path.name,
        tags={"suite": config.suite.name, "kind": metadata.kind, "data": config.data.name, "model": config.model},
        resume_run_id=folder.status().get("mlflow_run_id"),
    )
    folder.update_status(mlflow_run_id=tracker.run_id)
    tracker.log_hyperparams(asdict(config))
    return tracker


def _track(tracker: Any, folder: RunFolder, metrics: dict[str, float]) -> None:
    tracker.log_metrics(metrics, step=0)
    for name in ("config.yaml", "metrics.json", "data_report.json", "report.html"):
        tracker.log_artifact(folder.path / name)


def _score(config: EvaluateConfig, location: Location, metadata: ExportMetadata, folder: RunFolder) -> dict[str, float]:
    import torch

    from saferlhf.data.encode import Encoder
    from saferlhf.evaluation.plots import score_histograms
    from saferlhf.evaluation.report import write_report
    from saferlhf.evaluation.score import score_rows
    from saferlhf.models.export import load_export
    from saferlhf.run.measure import pair_metrics
    from saferlhf.run.plan import device_kind

    device = torch.device("cuda" if device_kind(config.trainer.accelerator) == "gpu" else "cpu")
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    kind = metadata.kind
    preference = "safer" if kind == "cost" else str(metadata.extra.get("preference", "better"))
    rows = build_data(config.data, PreferencePair, (f"{preference}_response_id",))
    part: list[Any] = getattr(rows, config.split)
    if not part:
        raise UserError(
            f"the split '{config.split}' has no rows", "split", "choose another, or change data.test_fraction"
        )
    if config.evaluation.max_rows:
        part = part[: config.evaluation.max_rows]
    loaded = load_export(location, output_root=config.output_root, require_heads=True, cache_dir=config.cache_dir)
    encoder = Encoder.build(loaded.tokenizer, loaded.metadata.template, loaded.metadata.max_length or 512)
    encoded = encoder.pairs(part, config.split, rows.report, config.data.policy)
    model = loaded.model.to(device)
    say(f"scoring {len(encoded):,} pairs with {config.model}")
    autocast = config.trainer.precision != "32-true"
    scores = score_rows(model, encoded, batch_size=config.trainer.eval_batch_size, autocast=autocast)
    metrics = pair_metrics(
        list(encoded.rows),
        scores,
        kind=kind,
        preference=preference,
        prefix=config.split,
        evaluation=config.evaluation,
        seed=config.seed,
        toyworld=config.data.source == "toyworld",
    )
    write_text(folder.path / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False))
    write_json(folder.path / "data_report.json", rows.report.to_dict())
    write_report(
        folder.path / "report.html",
        title=f"{kind} model on {config.data.name} ({config.split})",
        subtitle=str(config.model),
        metrics=metrics,
        config=asdict(config),
        data_report=rows.report.to_dict(),
        histograms=score_histograms(list(encoded.rows), scores, kind=kind, preference=preference),  # type: ignore[arg-type]
        lineage={"model": str(config.model), "data": rows.fingerprint},
        confidence=config.evaluation.confidence,
    )
    write_json(folder.metrics, metrics)
    return metrics
