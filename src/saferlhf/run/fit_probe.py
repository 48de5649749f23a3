"""The middle of a probe's run: features, cross-validation, heads; no trainer, no checkpoints.

What takes minutes is the features, and they are kept row by row as they come (`models/feature_store.py`): a run that is
killed goes on where it was, and another run on the same rows, with other layers or penalties, takes seconds.
"""

from __future__ import annotations

import time
from typing import Any

from saferlhf.config.files import write_json
from saferlhf.config.schema import TrainConfig
from saferlhf.config.task_schema import ProbeConfig
from saferlhf.data.encode import EncodedAnswers
from saferlhf.evaluation.features import RowFeatures, feature_store, row_keys
from saferlhf.models.features import PARTS
from saferlhf.models.moderator import head_sizes
from saferlhf.models.score_model import hidden_size
from saferlhf.ops.linear_probe import Targets
from saferlhf.run.features import computed_features
from saferlhf.run.plan import device_for
from saferlhf.run.rows import EncodedSplits, prompt_folds
from saferlhf.run.screen import say
from saferlhf.run.stages import PreparedRun
from saferlhf.tasks.base import SupervisedTask
from saferlhf.tasks.moderator import loss_weights
from saferlhf.tasks.probe import ProbeTask
from saferlhf.tasks.probe_fit import ProbeFit, fit_probe
from saferlhf.tracking.base import TrackingLogger
from saferlhf.training.display import duration

MIB = 2**20


def run_probe(prepared: PreparedRun, tracker: TrackingLogger) -> None:
    """Compute features, choose layers and penalties, fit the heads and give them to the task's model.

    Raises:
        UserError: fewer prompts than folds, or a cache folder that cannot be written.
    """
    config, task = prepared.config, probe_task(prepared)
    settings: ProbeConfig = config.task
    task.configure_model()
    task.score_model.to(device_for(config.trainer.accelerator))
    encoded = prepared.encoded
    labels = encoded.labels(encoded.train)
    features = split_features(prepared, "train", task.candidates())
    say(f"features: {_size(features)}")
    prepared.folder.update_status(phase="fitting")
    started = time.monotonic()
    targets = Targets.of(labels, loss_weights(settings, labels), tied=settings.severity_link == "proportional")
    folds = prompt_folds(encoded.train.rows, settings.folds, config.seed, "task.folds", "use fewer folds or more rows")
    fit = fit_probe(features, targets, head_sizes(labels), settings, folds, say)
    task.install(fit)
    seconds = time.monotonic() - started
    penalties = ", ".join(f"{head} {value:g}" for head, value in fit.chosen.l2.items())
    layers = ", ".join(map(str, fit.layers))
    say(f"probe: layers {layers}; l2 {penalties}; fitted in {duration(seconds)}")
    write_json(prepared.folder.path / "probe.json", _record(fit, features, seconds))
    tracker.log_metrics({f"cv/{head}/loss": value for head, value in fit.chosen.loss.items()}, step=0)


def split_features(prepared: PreparedRun, split: str, layers: tuple[int, ...]) -> RowFeatures:
    """Features of the train, val or test rows, from the cache as far as they are there.

    Any layers will do whose states were kept for the training rows: those are what is computed.
    """
    task, data = probe_task(prepared), getattr(prepared.encoded, split)
    assert isinstance(data, EncodedAnswers)
    settings: ProbeConfig = prepared.config.task
    options = {"dtype": settings.feature_dtype, "batch_tokens": settings.batch_tokens}
    name = f"features of {split} rows"
    return computed_features(prepared, task.score_model, data, name, layers, settings.pooling, **options)


def probe_task(prepared: PreparedRun) -> ProbeTask:
    """The run's task, which is a probe."""
    assert isinstance(prepared.task, ProbeTask)
    return prepared.task


def probe_plan_rows(config: TrainConfig, encoded: EncodedSplits, task: SupervisedTask) -> list[tuple[str, str]]:
    """Lines of the plan in the place of a training's: what is computed, what of it is there, what is fitted."""
    settings: ProbeConfig = config.task
    assert isinstance(task, ProbeTask)
    layers = task.candidates()
    store = feature_store(
        task.score_model,
        layers=layers,
        pooling=settings.pooling,
        autocast=config.trainer.precision != "32-true",
        dtype=settings.feature_dtype,
        cache_dir=config.cache_dir,
    )
    keys = {key for split in ("train", "val", "test") for key in row_keys(getattr(encoded, split))}
    cached = sum(key in store for key in keys)
    tokens = sum(int(getattr(encoded, split).lengths.sum()) for split in ("train", "val", "test"))
    shape = f"{len(layers)} layers x {PARTS} x {hidden_size(task.score_model.trunk)} {settings.feature_dtype}"
    chosen = {"auto": "chosen by cross-validation", "all": "all"}.get(str(settings.layers), f"{settings.layers}")
    return [
        ("features", f"{len(keys):,} rows ({tokens:,} tokens), {shape}: {len(keys) * store.row_bytes / MIB:,.0f} MiB"),
        ("", f"{cached:,} of them cached in {store.folder}"),
        ("probe", f"layers {chosen}; {settings.pooling} over {settings.span}; {settings.combine}"),
        ("", f"{settings.folds} folds by prompt, l2 of {', '.join(f'{value:g}' for value in settings.l2)}"),
    ]


def _size(features: RowFeatures) -> str:
    states, store = features.store.states(), features.store
    shape = " x ".join(str(n) for n in states.shape[1:])
    size = len(features) * store.row_bytes / MIB
    return f"{len(features):,} rows of {shape} {store.dtype.name}, {size:,.0f} MiB in {store.folder}"


def _record(fit: ProbeFit, features: RowFeatures, seconds: float) -> dict[str, Any]:
    """What was tried, for whoever asks why these layers."""
    return {
        "layers": list(fit.layers),
        "l2": fit.chosen.l2,
        "relative_loss": fit.chosen.relative,
        "loss": fit.chosen.loss,
        "seconds": round(seconds, 1),
        "features": str(features.store.folder),
        "ridge_regression": {",".join(map(str, layers)): errors for layers, errors in fit.rough.items()},
        "kernel_ridge_regression": {",".join(map(str, layers)): errors for layers, errors in fit.rough_kernel.items()},
        "tried": [tried.to_dict() for tried in fit.tried],
    }
