"""`evaluate.py`: a trained reward or cost model on any rows.

Results are a run folder of their own, found again by identity like any run: the model enters by its content, the rows by
theirs.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from saferlhf.config.files import read_json, write_json, write_text
from saferlhf.config.identity import run_hash
from saferlhf.config.run_folder import FAILED, FINISHED, RunFolder
from saferlhf.config.schema import EvaluateConfig
from saferlhf.data.build import build_data, data_fingerprint
from saferlhf.data.rows import PreferencePair
from saferlhf.errors import UserError
from saferlhf.models.locator import content_id_of, resolve
from saferlhf.models.metadata import read_metadata
from saferlhf.run.screen import say, say_evaluation

SCORED = {"reward": ("better_response_id",), "cost": ("safer_response_id",)}
"""Kinds of models that score pairs, and the label each is held against."""


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Score rows with a model and write metrics and a report.

    Raises:
        UserError: no such model, a model without the needed head, or rows without the needed labels.
    """
    if config.mode != "score":
        raise UserError(f"mode '{config.mode}' is not possible", "mode", "mode=score")
    if config.split not in ("train", "val", "test"):
        raise UserError(f"there is no split '{config.split}'", "split", "choose train, val or test")
    root = Path(config.output_root)
    assert config.model is not None
    location = resolve(config.model, output_root=root)
    if location.kind != "export" or location.folder is None:
        raise UserError(f"'{config.model}' has no score heads", "model", "name a run of task=reward or task=cost")
    kind = read_metadata(location.folder).kind
    if kind not in SCORED:
        raise UserError(f"'{config.model}' is a model of kind '{kind}'", "model", "suite=preference needs reward or cost")
    identity = {
        "evaluate": config.suite.name,
        "model": content_id_of(location, output_root=root),
        "data": {**asdict(config.data), "path": None, "test_path": None, "root": None},
        "data_fingerprint": data_fingerprint(config.data),
        "split": config.split,
        "seed": config.seed,
        "evaluation": asdict(config.evaluation),
    }
    folder = RunFolder(root / config.name / run_hash(identity))
    if folder.status().get("status") == FINISHED:
        metrics = read_json(folder.metrics) or {}
        say(f"finished before: {folder.path}")
        say_evaluation(folder, metrics, config.evaluation.confidence)
        return metrics
    folder.acquire()
    try:
        metrics = _score(config, kind, folder)
        folder.update_status(status=FINISHED, finished=time.time())
    except BaseException as error:
        folder.update_status(status=FAILED, error=str(error)[:2000])
        raise
    finally:
        folder.release()
    say_evaluation(folder, metrics, config.evaluation.confidence)
    return metrics


def _score(config: EvaluateConfig, kind: str, folder: RunFolder) -> dict[str, float]:
    from saferlhf.data.encode import Encoder
    from saferlhf.evaluation.plots import score_histograms
    from saferlhf.evaluation.report import write_report
    from saferlhf.evaluation.score import score_rows
    from saferlhf.models.export import load_export
    from saferlhf.run.measure import device_for, pair_metrics

    rows = build_data(config.data, PreferencePair, SCORED[kind])
    part: list[Any] = getattr(rows, config.split)
    if not part:
        raise UserError(f"the split '{config.split}' has no rows", "split", "choose another, or change data.test_fraction")
    if config.evaluation.max_rows:
        part = part[: config.evaluation.max_rows]
    loaded = load_export(str(config.model), output_root=config.output_root, cache_dir=config.cache_dir)
    encoder = Encoder.build(loaded.tokenizer, loaded.metadata.template, loaded.metadata.max_length or 512)
    encoded = encoder.pairs(part, config.split, rows.report, config.data.policy)
    model = loaded.model.to(device_for(config.trainer.accelerator))
    say(f"scoring {len(encoded):,} pairs with {config.model}")
    autocast = config.trainer.precision != "32-true"
    scores = score_rows(model, encoded, batch_size=config.trainer.eval_batch_size, autocast=autocast)
    preference = "safer" if kind == "cost" else "better"
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
