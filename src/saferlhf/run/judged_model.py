"""The model that `evaluate.py` judges or judges with: resolved, checked for what is to be measured, loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.errors import UserError
from saferlhf.models.locator import Location, resolve
from saferlhf.models.metadata import ExportMetadata, read_metadata

POLICY = "policy"
"""The measure for language models without score heads, whatever they were trained as."""

FITS = {"preference": ("reward", "cost"), "moderation": ("moderator", "cost"), POLICY: ()}
"""Measure -> kinds of models with score heads that it is for."""

MODERATES = FITS["moderation"]
"""Kinds of models that give verdicts on single answers."""

_TASKS = {"reward": "task=reward", "cost": "task=cost", "moderator": "task=moderator or task=probe"}


@dataclass
class JudgedModel:
    """A trained model with score heads, or for the measure `policy` a language model without.

    Attributes:
        locator: as the user named it.
        location: where it was found.
        metadata: of its export.
    """

    locator: str
    location: Location
    metadata: ExportMetadata
    _loaded: Any = field(default=None, repr=False)

    @property
    def kind(self) -> str:
        """What it was trained as: reward, cost, moderator, sft, ...; plain: not by this project."""
        return self.metadata.kind

    @property
    def preference(self) -> str:
        """Which label of a pair it was trained on: better | safer | single."""
        return "safer" if self.kind == "cost" else str(self.metadata.extra.get("preference") or "better")

    def load(self, config: EvaluateConfig) -> Any:
        """The `LoadedModel`, on the device the config wants."""
        if self._loaded is None:
            import torch

            from saferlhf.models.loading import load_export
            from saferlhf.run.plan import device_for

            device = device_for(config.trainer.accelerator)
            if config.trainer.threads:
                torch.set_num_threads(config.trainer.threads)
            self._loaded = load_export(
                self.location, output_root=config.output_root, require_heads=True, cache_dir=config.cache_dir
            )
            self._loaded.model.to(device)
        return self._loaded


def judged_model(config: EvaluateConfig) -> JudgedModel:
    """The model of `model=`.

    Raises:
        UserError: no such model, or one without the heads that are needed.
    """
    kinds = tuple(dict.fromkeys(kind for measure in _wanted(config) for kind in FITS[measure]))
    location = resolve(str(config.model), output_root=Path(config.output_root))
    if POLICY in _wanted(config) and (policy := _as_policy(config, location)) is not None:
        return policy
    mend = "name a run of " + " or ".join(_TASKS[kind] for kind in kinds) if kinds else "name a language model"
    if location.kind != "export" or location.folder is None:
        raise UserError(f"'{config.model}' has no score heads", "model", mend)
    metadata = read_metadata(location.folder)
    if metadata.kind not in _TASKS:
        what = f"'{config.model}' is a model of kind '{metadata.kind}' without score heads"
        raise UserError(what, "model", mend)
    model = JudgedModel(str(config.model), location, metadata)
    if config.mode == "moderate" and model.kind not in MODERATES:
        refuse_unfit(model, "mode=moderate", "moderation")
    return model


def _as_policy(config: EvaluateConfig, location: Location) -> JudgedModel | None:
    """The model if it is a language model without score heads."""
    metadata = ExportMetadata(kind="plain")
    if location.kind == "export" and location.folder is not None:
        metadata = read_metadata(location.folder)
    return None if metadata.heads else JudgedModel(str(config.model), location, metadata)


def fits(model: JudgedModel, measure: str) -> bool:
    """Whether this is a measure for this kind of model."""
    return not model.metadata.heads if measure == POLICY else model.kind in FITS[measure]


def refuse_unfit(model: JudgedModel, wanted: str, *measures: str) -> NoReturn:
    """Say that none of these measures is for this kind of model.

    Args:
        wanted: how the user asked for them.
    """
    kinds = list(dict.fromkeys(kind for measure in measures for kind in FITS[measure] or ("language",)))
    what = f"'{model.locator}' is a {model.kind} model and {wanted} is for {' and '.join(kinds)} models"
    suites = [f"suite={name}" for name in FITS if fits(model, name)]
    raise UserError(what, "model", f"for this model: {' or '.join(suites)}")


def _wanted(config: EvaluateConfig) -> Sequence[str]:
    """Measures that may be made of the model."""
    if config.mode == "moderate":
        return ("moderation",)
    if config.protocol is not None:
        return config.protocol.measures
    named = [measure for protocol in config.suite.protocols.values() for measure in protocol.measures]
    return list(dict.fromkeys([*config.suite.measures, *named]))
