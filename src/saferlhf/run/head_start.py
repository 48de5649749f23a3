"""Where the heads begin under `head_start=linear_probe`: at the best linear heads on the backbone as it is.

Hidden states of all training rows by the bare backbone (cached on disk, `models/feature_store.py`), then an exact fit
of the task's own loss on them. Fine-tuning goes on from there: a random head would first distort what the backbone
knows (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution").
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saferlhf.config.files import write_json
from saferlhf.config.task_schema import ModeratorConfig, ProbeConfig
from saferlhf.data.encode import EncodedAnswers, EncodedPairs
from saferlhf.evaluation.features import RowFeatures
from saferlhf.models.adapters import adapter_disabled
from saferlhf.models.heads import install_heads
from saferlhf.models.layers import layer_count
from saferlhf.models.moderator import head_sizes
from saferlhf.models.score_model import ScoreModel
from saferlhf.ops.linear_probe import Basis, HeadWeights, Targets
from saferlhf.ops.score_probe import Rows, fit_score_probe
from saferlhf.run.features import computed_features
from saferlhf.run.plan import device_for
from saferlhf.run.rows import prompt_folds
from saferlhf.run.screen import say
from saferlhf.run.stages import PreparedRun
from saferlhf.tasks.moderator import loss_weights
from saferlhf.tasks.probe_fit import FLOOR, fit_probe
from saferlhf.tasks.scoring import PairScoringTask
from saferlhf.training.display import duration

FOLDS = 5
"""Of the cross-validation that chooses penalties; all answers to a prompt are in one fold."""

PENALTIES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
"""Of the squared weights on standardised features."""


def begin_at_probe(prepared: PreparedRun) -> None:
    """Build the task's model and give it heads fitted on the bare backbone.

    Raises:
        UserError: fewer prompts than folds.
    """
    prepared.task.configure_model()
    model = prepared.task.model
    assert isinstance(model, ScoreModel)
    lora = prepared.config.adapter.name == "lora"
    with adapter_disabled(model.trunk) if lora else nullcontext():
        install_heads(model.heads, fitted_start(prepared, model.trunk))


def fitted_start(prepared: PreparedRun, trunk: nn.Module) -> HeadWeights:
    """Heads fitted on a backbone's hidden states of the training rows.

    Raises:
        UserError: fewer prompts than folds.
    """
    config, task = prepared.config, prepared.config.task
    train = prepared.encoded.train
    mend = "use more rows, or begin with another head"
    folds = prompt_folds(train.rows, FOLDS, config.seed, "task.head_start=linear_probe", mend)
    model = ScoreModel(trunk, {}, pooling=task.pooling).to(device_for(config.trainer.accelerator))
    layers = tuple(task.layers or (layer_count(trunk),))
    data = train.answers() if isinstance(train, EncodedPairs) else train
    assert isinstance(data, EncodedAnswers)
    features = computed_features(prepared, model, data, "features of train rows", layers, task.pooling)
    trunk.to("cpu")
    prepared.folder.update_status(phase="fitting the heads to begin with")
    started = time.monotonic()
    fit = _moderator_heads if isinstance(task, ModeratorConfig) else _score_head
    heads, record = fit(prepared, features, folds)
    seconds = time.monotonic() - started
    write_json(prepared.folder.path / "head_start.json", {"layers": list(layers), "seconds": seconds, **record})
    say(f"heads begin at a linear probe of layers {', '.join(map(str, layers))}, fitted in {duration(seconds)}")
    return heads


def _moderator_heads(prepared: PreparedRun, features: RowFeatures, folds: Rows) -> tuple[HeadWeights, dict[str, Any]]:
    """Linear heads by the probe's own fit."""
    task: ModeratorConfig = prepared.config.task
    labels = prepared.encoded.labels(prepared.encoded.train)
    targets = Targets.of(labels, loss_weights(task, labels), tied=task.severity_link == "proportional")
    probe = ProbeConfig("probe", "", layers=list(features.layers), span=task.span, l2=list(PENALTIES[1:]))
    fit = fit_probe(features, targets, head_sizes(labels), probe, folds)
    return fit.heads, {"l2": fit.chosen.l2, "out_of_fold_loss": fit.chosen.loss}


def _score_head(prepared: PreparedRun, features: RowFeatures, folds: Rows) -> tuple[HeadWeights, dict[str, Any]]:
    """One linear score by the task's own loss on N pairs; sequences i and N + i are the responses of pair i."""
    task, train = prepared.task, prepared.encoded.train
    assert isinstance(task, PairScoringTask) and isinstance(train, EncodedPairs)

    def loss(scores: Tensor, rows: Rows) -> Tensor:
        pairs = rows[: len(rows) // 2]  # rows hold both responses of a pair, response 0 of all pairs first
        return task.losses(scores.view(2, -1).T, train.labels_alone(pairs)).mean()

    x = features.matrix(features.layers, "all")
    basis = Basis.of(x, floor=FLOOR * min(PENALTIES))
    probe = fit_score_probe(basis.project(x), basis.energy, loss, np.concatenate([folds, folds]), PENALTIES)
    heads = basis.unfold({task.head_name: (probe.weight[None], np.array([probe.bias]))})
    batch = train.labels_alone(np.arange(len(train)))
    found = task.statistics(torch.from_numpy(probe.out_of_fold).view(2, -1).T, batch)
    shares = {name: float(total) / len(train) for name, total in found.items()}
    losses = {f"{l2:g}": value for l2, value in probe.path.items()}
    return heads, {"l2": probe.l2, "out_of_fold_loss": losses, "out_of_fold": shares}
