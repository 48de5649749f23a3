"""The model that `evaluate.py` judges or judges with: resolved, checked for what is to be measured, loaded once.

Where no model is named, the judge of `judge=` stands in its place: a guard model of others or a remote judge, whose
verdicts on single answers are then held against the labels like those of any moderator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.identity import identity_tree, run_hash
from saferlhf.config.rollout_schema import GuardJudgeConfig, JudgeConfig, RemoteJudgeConfig, judge_config
from saferlhf.errors import UserError
from saferlhf.models.locator import Location, content_id_of, resolve
from saferlhf.models.metadata import ExportMetadata, read_metadata

POLICY = "policy"
"""The measure for language models without score heads, whatever they were trained as."""

FITS = {"preference": ("reward", "cost"), "moderation": ("moderator", "cost"), POLICY: ()}
"""Measure -> kinds of models with score heads that it is for."""

MODERATES = FITS["moderation"]
"""Kinds of models that give verdicts on single answers."""

VERDICTS = ("p_unsafe", "cost", "is_safe")
"""Outputs of a remote judge that are a verdict on a single answer; the first that it gives counts."""

_TASKS = {"reward": "task=reward", "cost": "task=cost", "moderator": "task=moderator or task=probe"}


@dataclass
class JudgedModel:
    """A trained model with score heads, or for the measure `policy` a language model without.

    Attributes:
        locator: as the user named it.
        location: where it was found.
        metadata: of its export.
        judge: the judge that stands in the place of a model; None: this is one.
    """

    locator: str
    location: Location
    metadata: ExportMetadata
    judge: JudgeConfig | None = None
    _loaded: Any = field(default=None, repr=False)

    @property
    def kind(self) -> str:
        """What it was trained as: reward, cost, moderator, sft, ...; plain: not by this project."""
        return self.metadata.kind

    @property
    def preference(self) -> str:
        """Which label of a pair it was trained on: better | safer | single."""
        return "safer" if self.kind == "cost" else str(self.metadata.extra.get("preference") or "better")

    def content(self, config: EvaluateConfig) -> str:
        """Identity by content; of a judge, its keys and the content of the model that they name."""

        def of(locator: str | Location) -> str:
            return content_id_of(locator, output_root=Path(config.output_root), cache_dir=config.cache_dir)

        if self.judge is None:
            return of(self.location)
        tree = identity_tree(self.judge, lambda key, value: of(str(value)))
        if isinstance(self.judge, RemoteJudgeConfig):
            tree["scales"] = {name: asdict(scale) for name, scale in self.judge.scales.items()}
        return f"judge:{run_hash(tree)}"

    def load(self, config: EvaluateConfig) -> Any:
        """The `LoadedModel`, on the device the config wants; of a judge, its `GuardedScorer`."""
        if self._loaded is None:
            import torch

            from saferlhf.models.loading import load_export
            from saferlhf.run.plan import device_for

            device = device_for(config.trainer.accelerator)
            if config.trainer.threads:
                torch.set_num_threads(config.trainer.threads)
            if self.judge is not None:
                from saferlhf.rollout.build import build_scorer

                places: dict[str, Any] = {"output_root": config.output_root, "cache_dir": config.cache_dir}
                self._loaded = build_scorer(self.judge, **places, device=device)
                return self._loaded
            self._loaded = load_export(
                self.location, output_root=config.output_root, require_heads=True, cache_dir=config.cache_dir
            )
            self._loaded.model.to(device)
        return self._loaded


def judged_model(config: EvaluateConfig) -> JudgedModel:
    """The model of `model=`, or without one the judge of `judge=`.

    Raises:
        UserError: no such model, or one without the heads that are needed; a judge that gives no verdicts.
    """
    if not config.model and config.judge is not None:
        return _as_model(config)
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


def _as_model(config: EvaluateConfig) -> JudgedModel:
    """The judge in the place of a model."""
    from saferlhf.evaluation.policy_config import AskedJudge

    if "moderation" not in _wanted(config):
        raise UserError("no model is named", "model", "give it on the command line: model=LOCATOR")
    if config.mode != "score" or config.judges is not None:
        what = "one judge alone stands in the place of a model, to be held against labels"
        raise UserError(what, "judge", "name a model, or leave out judges= and mode=")
    judge = judge_config(config.judge)
    if isinstance(judge, GuardJudgeConfig):
        from saferlhf.evaluation.policy_judges import check_judges

        location = resolve(judge.model, output_root=Path(config.output_root))
        check_judges([AskedJudge(judge)], output_root=config.output_root)
        return JudgedModel(judge.model, location, ExportMetadata(kind="guard"), judge)
    if isinstance(judge, RemoteJudgeConfig):
        _check_remote(judge)
        place = Location(judge.server.model, "server", name=judge.server.model)
        return JudgedModel(judge.server.model, place, ExportMetadata(kind="remote"), judge)
    what = f"a judge of kind '{judge.kind}' cannot stand in the place of a model"
    raise UserError(what, "judge", "judge=guard or judge=remote; a model of this project is named by model=LOCATOR")


def _check_remote(judge: RemoteJudgeConfig) -> None:
    output = next((name for name in VERDICTS if name in judge.scales), None)
    if output is None:
        what = f"the judge's scales are {', '.join(judge.scales) or 'none'}, and none of them is a verdict"
        raise UserError(what, "judge.scales", f"give one named {' or '.join(VERDICTS)}")
    scale = judge.scales[output]
    if output != "cost" and not (scale.low == 0 and scale.high == 1):
        what = f"a probability from {scale.low:g} to {scale.high:g}"
        raise UserError(what, f"judge.scales.{output}", "let it go from 0 to 1")


def fits(model: JudgedModel, measure: str) -> bool:
    """Whether this is a measure for this kind of model."""
    if model.judge is not None:
        return measure == "moderation"
    return not model.metadata.heads if measure == POLICY else model.kind in FITS[measure]


def kinds_of(measures: Sequence[str]) -> str:
    """Kinds of models that these measures are for, as words."""
    return " and ".join(dict.fromkeys(kind for measure in measures for kind in FITS[measure] or ("language",)))


def refuse_unfit(model: JudgedModel, wanted: str, *measures: str) -> NoReturn:
    """Say that none of these measures is for this kind of model.

    Args:
        wanted: how the user asked for them.
    """
    what = f"'{model.locator}' is a {model.kind} model and {wanted} is for {kinds_of(measures)} models"
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
