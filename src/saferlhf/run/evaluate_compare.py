"""`evaluate.py mode=compare models=[A,B]`: models held against each other, row by row.

Evaluations that are named are read; models that are named are evaluated first, as `suite=` or `protocol=` says, and
found again when they were before. A comparison is a run folder of its own, told by the evaluations that went into it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.files import read_json
from saferlhf.config.identity import run_hash
from saferlhf.config.run_folder import FINISHED, RunFolder
from saferlhf.evaluation.processes import Processes
from saferlhf.run.compare_models import Models, compare_models, resolve_models
from saferlhf.run.evaluation_folder import in_folder
from saferlhf.run.judged_model import judged_model
from saferlhf.run.measurements import measurements_for
from saferlhf.run.screen import say


def compare(config: EvaluateConfig, evaluated: Callable[[EvaluateConfig], Path]) -> dict[str, float]:
    """Hold the models of `models=` against each other.

    Args:
        config: `baseline` is the heading that each other is held against; null: all pairs.
        evaluated: from the config of one evaluation to its finished folder.

    Raises:
        UserError: fewer than two models, one that cannot be evaluated, or nothing that two of them were measured by.
    """
    found = resolve_models(config.models, config.output_root, tracking_uri=config.tracking.uri)
    baseline = None if config.baseline is None else str(config.baseline)
    alone = replace(config, mode="score", models=None, baseline=None)
    for run in (run for runs in found.values() for run in runs if run.needs_evaluation):
        measurements_for(alone, judged_model(replace(alone, model=run.locator)))  # refused before anything is measured
    models: dict[str, list[Path]] = {}
    for heading, runs in found.items():
        for run in runs:
            models.setdefault(heading, []).append(run.folder or evaluated(replace(alone, model=run.locator)))
    if not Processes.current().first:  # there is nothing to judge any more
        return {}
    folder = RunFolder(Path(config.output_root) / config.name / run_hash(_identity(config, models)))
    if folder.status().get("status") == FINISHED:
        say(f"finished before: {folder.path}")
        print((folder.path / "comparison.md").read_text())
        return read_json(folder.metrics) or {}
    tags = {"suite": "compare", "kind": "compare", "model": ", ".join(models)}

    def work() -> dict[str, float]:
        return compare_models(
            models,
            out=folder.path,
            draws=config.evaluation.bootstrap_draws,
            confidence=config.evaluation.confidence,
            seed=config.seed,
            baseline=baseline,
            config=asdict(config),
        )

    metrics = in_folder(folder, config, tags, work)
    print(f"report:  {folder.path / 'report.html'}")
    print(f"metrics: {folder.metrics}")
    return metrics


def _identity(config: EvaluateConfig, models: Models) -> dict[str, object]:
    """The evaluations by their own hashes."""
    return {
        "mode": "compare",
        "models": {heading: [folder.name for folder in folders] for heading, folders in models.items()},
        "baseline": config.baseline,
        "evaluation": asdict(config.evaluation),
        "seed": config.seed,
    }
