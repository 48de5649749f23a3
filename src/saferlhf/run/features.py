"""Hidden states of a run's rows by its backbone, with progress on screen and in `status.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saferlhf.data.encode import EncodedAnswers
from saferlhf.evaluation.features import RowFeatures, row_features
from saferlhf.models.score_model import ScoreModel
from saferlhf.run.screen import say
from saferlhf.run.stages import PreparedRun
from saferlhf.training.feature_progress import FeatureProgress


def computed_features(
    prepared: PreparedRun,
    model: ScoreModel,
    data: EncodedAnswers,
    name: str,
    layers: Sequence[int],
    pooling: str,
    **options: Any,
) -> RowFeatures:
    """Features of these rows, from the cache as far as they are there.

    Args:
        model: on the device it is to run on.
        name: what is shown meanwhile.
        layers, pooling, options: as `row_features` takes them.
    """
    config, folder = prepared.config, prepared.folder
    folder.update_status(phase=name)
    with FeatureProgress(folder, name, config.trainer.progress) as progress:
        return row_features(
            model,
            data,
            layers=layers,
            pooling=pooling,
            autocast=config.trainer.precision != "32-true",
            cache_dir=config.cache_dir,
            progress=progress,
            say=say,
            **options,
        )
