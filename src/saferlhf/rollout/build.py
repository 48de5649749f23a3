"""From the `judge` group of the config to a scorer under its policy for failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saferlhf.config.paths import cache_dir as project_cache
from saferlhf.config.rollout_schema import (
    FunctionJudgeConfig,
    GuardJudgeConfig,
    JudgeConfig,
    ModelJudgeConfig,
    RemoteJudgeConfig,
    TruthJudgeConfig,
    judge_config,
)
from saferlhf.rollout.function_scorer import FunctionScorer
from saferlhf.rollout.guard import FailurePolicy, GuardedScorer
from saferlhf.rollout.remote.judge import RemoteJudge
from saferlhf.rollout.scorers import Scorer
from saferlhf.rollout.truth_scorer import TruthScorer


def build_scorer(
    config: JudgeConfig | Any,
    *,
    output_root: str | Path = "outputs",
    cache_dir: str | None = None,
    device: Any = None,
) -> GuardedScorer:
    """The scorer of one `judge` config.

    Args:
        config: typed, or a mapping as in conf/judge.
        output_root: where relative run folders are looked for.
        cache_dir: the project's cache folder, which keeps a remote judge's answers.
        device: where a model is put; None: the CPU.

    Raises:
        UserError: the config, or what it names, is wrong.
    """
    if not isinstance(config, JudgeConfig):
        config = judge_config(config)
    policy = FailurePolicy(config.on_empty, config.on_failure, config.attempts, config.max_failed_share)
    return GuardedScorer(_scorer(config, output_root, cache_dir, device), policy)


def _scorer(config: JudgeConfig, output_root: str | Path, cache_dir: str | None, device: Any) -> Scorer:
    if isinstance(config, TruthJudgeConfig):
        return TruthScorer(categories=config.categories, name=config.name)
    if isinstance(config, FunctionJudgeConfig):
        found: Scorer = FunctionScorer.by_name(
            config.function, config.outputs, batched=config.batched, name=config.name
        )
        return found
    if isinstance(config, RemoteJudgeConfig):
        return RemoteJudge(config, _answers(config.cache, cache_dir))
    if isinstance(config, GuardJudgeConfig):
        from saferlhf.rollout.chat_guard import load_guard  # heavy

        return load_guard(config, output_root=output_root, cache_dir=cache_dir, device=device)
    assert isinstance(config, ModelJudgeConfig)
    from saferlhf.models.loading import load_export  # heavy
    from saferlhf.rollout.model_scorer import ModelScorer

    loaded = load_export(config.model, output_root=output_root, require_heads=True, cache_dir=cache_dir, device=device)
    return ModelScorer(
        loaded,
        output=config.output,
        how=config.how,
        zero=config.zero,
        categories=config.categories,
        batch_tokens=config.batch_tokens,
        name=config.name,
    )


def _answers(folder: str | None, cache_dir: str | None) -> Path | None:
    if folder == "none":
        return None
    return Path(folder).expanduser() if folder else project_cache(cache_dir) / "judge"
