"""What a run leaves behind: export with its model card, metrics, data report, samples, report page, tracking."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import yaml

from saferlhf import __version__
from saferlhf.config.files import write_json, write_text
from saferlhf.config.online_schema import PpoConfig
from saferlhf.config.schema import TrainConfig
from saferlhf.config.task_schema import ModerationConfig, ProbeConfig
from saferlhf.data.report_tables import data_markdown
from saferlhf.evaluation.report import write_report
from saferlhf.models.card import model_card
from saferlhf.models.export import save_export
from saferlhf.models.locator import content_id_of, resolve
from saferlhf.models.metadata import ExportMetadata, read_metadata
from saferlhf.run.stages import Evaluation, PreparedRun, policy_start
from saferlhf.tracking.base import TrackingLogger
from saferlhf.training.curves import read_curves


def finish(prepared: PreparedRun, evaluation: Evaluation, tracker: TrackingLogger) -> None:
    """Write everything into the run folder, and copies of the small things into tracking."""
    folder, data_report = prepared.folder, prepared.rows.report.to_dict()
    _export(prepared, evaluation, data_report)
    write_json(folder.path / "data_report.json", data_report)
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in evaluation.samples)
    write_text(folder.path / "samples.jsonl", lines)
    _page(prepared, evaluation, data_report)
    write_json(folder.metrics, evaluation.metrics)
    _track(prepared, evaluation, tracker)


def _metadata(prepared: PreparedRun, evaluation: Evaluation) -> ExportMetadata:
    """What the export says of itself."""
    config = prepared.config
    return ExportMetadata(
        kind=_kind(config),
        template=config.backbone.template,
        max_length=config.backbone.max_length,
        lineage=_lineage(prepared),
        **_moderation(prepared, evaluation),
        extra={
            "run": _run_name(prepared),
            "identity": prepared.run.hash,
            "seed": config.seed,
            "preference": getattr(config.task, "preference", None),
            "data": config.data.name,
            "data_fingerprint": prepared.rows.fingerprint,
            "precision": config.trainer.precision,
            "saferlhf": __version__,
        },
    )


def _export(prepared: PreparedRun, evaluation: Evaluation, data_report: dict[str, Any]) -> None:
    """Weights, tokenizer and model card."""
    config = prepared.config

    def card(completed: ExportMetadata) -> str:
        return model_card(
            completed,
            name=_run_name(prepared),
            metrics=evaluation.metrics,
            data_report=data_markdown(data_report),
            config=yaml.safe_dump(asdict(config), sort_keys=False),
            data_licence=prepared.rows.licence,
            protocol=f"test split of {config.data.name}, intervals {config.evaluation.confidence:.0%} by bootstrap over"
            f" prompts ({config.evaluation.bootstrap_draws:,} draws), seed {config.seed},"
            f" data {prepared.rows.fingerprint}",
        )

    model, adapter = prepared.task.model.cpu(), None
    if isinstance(config.task, PpoConfig):
        model, adapter = prepared.task.roles.actor_for_export()
    save_export(
        prepared.folder.export,
        model=model,
        adapter=adapter,
        tokenizer=prepared.tokenizer,
        metadata=_metadata(prepared, evaluation),
        merge=config.adapter.merge_on_export,
        base_unchanged=isinstance(config.task, ProbeConfig),
        card=card,
    )


def _page(prepared: PreparedRun, evaluation: Evaluation, data_report: dict[str, Any]) -> None:
    """report.html: curves, numbers, data, settings."""
    config, folder = prepared.config, prepared.folder
    write_report(
        folder.path / "report.html",
        title=f"{config.task.name}: {config.backbone.name} on {config.data.name}",
        subtitle=f"run {_run_name(prepared)}, seed {config.seed}",
        metrics=evaluation.metrics,
        config=asdict(config),
        data_report=data_report,
        curves=read_curves(folder.path / "curves.jsonl"),
        step="rollout" if isinstance(config.task, PpoConfig) else "optimizer step",
        histograms=evaluation.histograms,
        lineage={
            "run identity": prepared.run.hash,
            "data": prepared.rows.fingerprint,
            "starts from": _start(config),
            "saferlhf": __version__,
        },
        commands=[reproduce(config)],
        confidence=config.evaluation.confidence,
    )


def _run_name(prepared: PreparedRun) -> str:
    return f"{prepared.config.name}/{prepared.folder.path.name}"


def _kind(config: TrainConfig) -> str:
    """What the export says it is."""
    if isinstance(config.task, PpoConfig):
        return "ppo"  # whatever its constraint
    return "moderator" if isinstance(config.task, ModerationConfig) else config.task.name


def _moderation(prepared: PreparedRun, evaluation: Evaluation) -> dict[str, Any]:
    """What the export of a moderator says beside its weights."""
    task = prepared.config.task
    if not isinstance(task, ModerationConfig) or evaluation.calibration is None:
        return {}
    calibration = evaluation.calibration.to_dict()
    return {"categories": calibration["categories"] or None, "calibration": calibration, "input": task.input}


def reproduce(config: TrainConfig) -> str:
    """A command that composes this config again: the whole of it is in config.yaml."""
    parts = [f"task={config.task.name}", f"data={config.data.name}", f"backbone={config.backbone.name}"]
    parts += [f"adapter={config.adapter.name}"] if config.adapter.name != "none" else []
    parts += [f"quantization={config.quantization.name}"] if config.quantization.name != "none" else []
    parts += [f"init={config.init}"] if config.init else []
    if config.roles is not None:
        parts += [f"constraint={config.constraint.name}", f"advantage={config.advantage.name}"]
        parts += [f"roles={config.roles.name}"]
        parts += [f"roles.{name}.model={model}" for name, model in _parents(config)[1:] if name in ("reward", "cost")]
    where = {key: getattr(config.data, key) for key in ("path", "test_path", "root", "subset", "revision")}
    parts += [f"data.{key}={value}" for key, value in where.items() if value]
    return "python train.py " + " ".join([*parts, f"seed={config.seed}", f"data.seed={config.data.seed}"])


def _lineage(prepared: PreparedRun) -> list[dict[str, Any]]:
    """Parents, oldest first: those of the model we started from, then that model itself."""
    config = prepared.config
    parents: list[dict[str, Any]] = []
    for role, locator in _parents(config):
        location = resolve(locator, output_root=config.output_root)
        own, kind = [], "plain"
        if location.kind == "export" and location.folder is not None:
            metadata = read_metadata(location.folder)
            own, kind = list(metadata.lineage), metadata.kind
        content = content_id_of(location, output_root=config.output_root, cache_dir=config.cache_dir)
        own = [*own, {"role": role or kind, "locator": locator, "content_id": content}]
        parents += [parent for parent in own if parent not in parents]
    return parents


def _parents(config: TrainConfig) -> list[tuple[str, str]]:
    """(role, locator) of the models that a run starts from; the role is empty where the model's kind says it."""
    found = [("", policy_start(config))]
    if config.roles is not None:
        found += [(name, config.roles.score(name).model) for name in ("reward", *config.roles.cost_names())]
    return [(role, locator) for role, locator in found if locator]


def _start(config: TrainConfig) -> str:
    return policy_start(config) or config.backbone.model or "random weights"


def _track(prepared: PreparedRun, evaluation: Evaluation, tracker: TrackingLogger) -> None:
    folder = prepared.folder
    tracker.log_metrics(evaluation.metrics, step=prepared.steps)
    for name in ("config.yaml", "metrics.json", "data_report.json", "report.html"):
        tracker.log_artifact(folder.path / name)
    for picture in sorted(folder.path.glob("*.png")):
        tracker.log_artifact(picture)
    tracker.log_artifact(folder.export / "README.md", "model_card")
    tracker.set_tags({"export_folder": str(folder.export.resolve()), "run_folder": str(folder.path.resolve())})
    tracker.register_model(folder.export)
    tracker.flush()
