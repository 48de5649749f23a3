"""Who writes the responses: the policy itself, vLLM in this process, or a server; one interface for all."""

from saferlhf.rollout.engines.base import Engine
from saferlhf.rollout.engines.build import build_engine

__all__ = ["Engine", "build_engine"]
