"""The judges of a policy's evaluation, loaded: those of `rollout/`, guard models of others, and a moderator by its
calibrated verdicts.

In training a moderator's probability may serve as a cost; to measure a policy its decisions count: unsafe by the
threshold it was shipped with, severity and harm categories consistent with that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from saferlhf.config.rollout_schema import FunctionJudgeConfig, GuardJudgeConfig, JudgeConfig, ModelJudgeConfig
from saferlhf.errors import UserError
from saferlhf.evaluation.policy_config import AskedJudge
from saferlhf.evaluation.policy_metrics import CATEGORY
from saferlhf.models.loading import LoadedModel, load_export
from saferlhf.models.locator import resolve
from saferlhf.models.metadata import read_metadata
from saferlhf.models.moderator import logits_of
from saferlhf.ops.calibration import Calibration, decide
from saferlhf.rollout.build import build_scorer
from saferlhf.rollout.function_scorer import find_function
from saferlhf.rollout.guard import FailurePolicy, GuardedScorer
from saferlhf.rollout.model_scorer import ModelScorer


class VerdictJudge(ModelScorer):
    """A moderator's decisions: is_safe, p_unsafe, severity, and one output (0 or 1) per harm category.

    Args:
        loaded: the moderator, on the device it is to run on.
        options: `batch_tokens` and `name` of `ModelScorer`.

    Raises:
        UserError: a model that gives no verdicts, or a moderator of prompts alone.
    """

    def __init__(self, loaded: LoadedModel, **options: Any) -> None:
        super().__init__(loaded, **options)
        if self._calibration is None:
            what = f"a model of kind '{loaded.metadata.kind}' gives no verdicts"
            raise UserError(what, loaded.location.locator, "name a moderator (task=moderator)")
        self._verdicts: Calibration = self._calibration

    @property
    def outputs(self) -> tuple[str, ...]:
        """Those that the moderator has heads for."""
        severity = ("severity",) if "severity" in self._heads else ()
        categories = self._verdicts.categories if "category" in self._heads else ()
        return ("is_safe", "p_unsafe", *severity, *(f"{CATEGORY}{name}" for name in categories))

    def _values(self, heads: Mapping[str, Tensor]) -> dict[str, NDArray[np.float64]]:
        verdicts = decide(logits_of(heads), self._verdicts)
        columns: list[Any] = [~verdicts.unsafe, verdicts.p_unsafe]
        columns += [] if verdicts.severity is None else [verdicts.severity]
        columns += [] if verdicts.category is None else list(verdicts.category.T)
        return {name: np.asarray(c, dtype=np.float64) for name, c in zip(self.outputs, columns, strict=True)}


class _Renamed:
    """A scorer under another name."""

    def __init__(self, scorer: Any, name: str) -> None:
        self._scorer, self.name, self.outputs = scorer, name, scorer.outputs

    def score(self, rows: Sequence[Any]) -> Any:
        return self._scorer.score(rows)


def check_judges(asked: Sequence[AskedJudge], *, output_root: str | Path) -> None:
    """What can be known of judges before anything is loaded, let alone sampled.

    Raises:
        UserError: no such model or function, or a model that judges no responses.
    """
    for one in asked:
        config = one.config
        if isinstance(config, FunctionJudgeConfig):
            find_function(config.function)
        if isinstance(config, GuardJudgeConfig):
            _check_guard(config, output_root)
        if not isinstance(config, ModelJudgeConfig):
            continue
        location = resolve(config.model, output_root=output_root)
        if location.kind == "export" and location.folder is not None:
            metadata = read_metadata(location.folder)
            if not metadata.heads:
                what = f"'{config.model}' is a model of kind '{metadata.kind}' without score heads"
                raise UserError(what, "judges", "name a reward model, a cost model or a moderator")
            if metadata.input == "prompt":
                what = f"'{config.model}' looks at prompts alone, so every response to one would be the same to it"
                raise UserError(what, "judges", "name one with task.input=prompt_and_response")


def _check_guard(config: GuardJudgeConfig, output_root: str | Path) -> None:
    """A guard that writes its verdict must be a language model; other models of ours judge as `kind: model`."""
    location = resolve(config.model, output_root=output_root)
    if location.kind == "export" and location.folder is not None:
        metadata = read_metadata(location.folder)
        if metadata.heads or config.format == "classifier":
            what = f"'{config.model}' is a model of kind '{metadata.kind}' of this project and no guard of others"
            raise UserError(what, "judges", "use kind=model, or judges=[LOCATOR]")


def load_judges(
    asked: Sequence[AskedJudge], *, output_root: str | Path, cache_dir: str | None, device: Any
) -> Iterator[GuardedScorer]:
    """Load the judges one after the other, each under its policy for responses without a score.

    Only one is in memory as long as the caller keeps only one. A model that was named by its locator alone is called by
    its kind (reward, cost, moderator), a second one of a kind `cost_2`.

    Raises:
        UserError: no such model, or one that judges no responses.
    """
    taken: set[str] = set()
    for one in asked:
        judge = _load(one, output_root, cache_dir, device)
        name, number = judge.name, 2
        while name in taken:
            name, number = f"{judge.name}_{number}", number + 1
        taken.add(name)
        yield judge if name == judge.name else GuardedScorer(_Renamed(judge.scorer, name), judge.policy)


def _load(one: AskedJudge, output_root: str | Path, cache_dir: str | None, device: Any) -> GuardedScorer:
    config = one.config
    if not (one.plain and isinstance(config, ModelJudgeConfig)):
        return build_scorer(config, output_root=output_root, cache_dir=cache_dir, device=device)
    loaded = load_export(config.model, output_root=output_root, require_heads=True, cache_dir=cache_dir, device=device)
    kind = VerdictJudge if loaded.metadata.kind == "moderator" else ModelScorer
    scorer = kind(loaded, batch_tokens=config.batch_tokens, name=config.name or None)
    return GuardedScorer(scorer, _policy(config))


def _policy(config: JudgeConfig) -> FailurePolicy:
    return FailurePolicy(config.on_empty, config.on_failure, config.attempts, config.max_failed_share)
