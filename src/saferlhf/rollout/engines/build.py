"""From the `rollout` group of the config to an engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from saferlhf.config.rollout_schema import ENGINES, RolloutConfig
from saferlhf.config.validate import suggestion
from saferlhf.errors import UserError
from saferlhf.rollout.engines.base import Engine


def build_engine(
    config: RolloutConfig,
    tokenizer: Any,
    *,
    policy: Callable[[], AbstractContextManager[nn.Module]] | None = None,
    folder: Path | str | None = None,
    max_length: int = 512,
) -> Engine:
    """The engine of a `rollout` config.

    Args:
        tokenizer: of the policy.
        policy: of engine=native: gives the causal module, as `lambda: roles.causal("actor")`.
        folder: of engine=vllm: a Hugging Face folder with the policy's architecture.
        max_length: of engine=vllm: tokens of prompt + response.

    Raises:
        UserError: no such engine, or what it needs is not there.
    """
    if config.engine == "native":
        from saferlhf.rollout.engines.native import NativeEngine

        if policy is None:
            raise ValueError("engine=native needs the policy")
        return NativeEngine(policy, tokenizer, config)
    if config.engine == "vllm":
        from saferlhf.rollout.engines.vllm import VllmEngine

        if folder is None:
            raise ValueError("engine=vllm needs a folder")
        return VllmEngine(config, tokenizer, folder, max_length)
    if config.engine == "openai":
        from saferlhf.rollout.engines.server import ServerEngine

        return ServerEngine(config, tokenizer)
    raise UserError(f"unknown engine '{config.engine}'", "rollout.engine", suggestion(config.engine, ENGINES))
