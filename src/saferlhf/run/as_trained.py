"""An evaluation computes in the precision its model was trained in, unless another is asked for.

A head that was fitted to hidden states of bfloat16 is measured on such states, as its own run measured it; and what the
cache holds of these states serves the evaluation too.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.run.judged_model import JudgedModel

PLAIN = "32-true"
KNOWN = (PLAIN, "bf16-mixed", "bf16-true")


def as_trained(config: EvaluateConfig, model: JudgedModel) -> EvaluateConfig:
    """The same config, its `trainer.precision` known."""
    if config.trainer.precision is not None:
        return config
    return replace(config, trainer=replace(config.trainer, precision=trained_precision(model)))


def trained_precision(model: JudgedModel) -> str:
    """As the export says, else as the run's config does; float32 for models of others."""
    said = model.metadata.extra.get("precision")
    run = model.location.run_folder
    if said is None and run is not None and (Path(run) / "config.yaml").is_file():
        trainer = (yaml.safe_load((Path(run) / "config.yaml").read_text()) or {}).get("trainer") or {}
        said = trainer.get("precision")
    return said if said in KNOWN else PLAIN
