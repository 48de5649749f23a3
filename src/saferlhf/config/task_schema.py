"""The structured configuration of the tasks: one dataclass per choice of `task=`; see `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from saferlhf.config.marks import OUTSIDE_IDENTITY
from saferlhf.config.online_schema import PpoConfig
from saferlhf.config.task_base import TaskConfig


@dataclass
class SftConfig(TaskConfig):
    """Supervised fine-tuning on responses."""

    train_on_prompt: bool = False


@dataclass
class ScoringConfig(TaskConfig):
    """What models with one score per response have in common: where the score is read, and where its head begins."""

    pooling: str = "last"  # last | mean
    layers: Optional[list[int]] = None  # null: the last one
    head_start: str = "random"  # random | linear_probe
    regularization: float = 0.001  # mu: weight of the mean squared score


@dataclass
class RewardConfig(ScoringConfig):
    """Bradley-Terry reward model."""

    preference: str = "better"  # better | safer | single
    margin: float = 0.0
    centering: float = 0.0


@dataclass
class CostConfig(ScoringConfig):
    """Pairwise + sign cost model; cost > 0 means unsafe."""

    pair_weight: float = 1.0
    safe_sign_weight: float = 1.0
    unsafe_sign_weight: float = 1.0


@dataclass
class HeadWeightsConfig:
    """Weight of each head's term in the moderation loss."""

    unsafe: float = 1.0
    category: float = 1.0
    severity: float = 1.0


@dataclass
class ObjectivesConfig:
    """What the thresholds of each head maximise on held-out rows."""

    unsafe: str = "macro_f1"  # macro_f1 | accuracy | f1 | fpr@0.05
    category: str = "f1"  # f1 | accuracy | exact_match
    severity: str = "accuracy"  # accuracy | kappa


@dataclass
class ModerationConfig(TaskConfig):
    """What every moderator has, however it is fitted: three heads, their loss and their thresholds."""

    input: str = "prompt_and_response"  # prompt_and_response | prompt
    categories: Optional[list[str]] = None  # null: from the data
    severity_link: str = "partial"  # partial | proportional
    unsafe_weight: float = 1.0  # of an unsafe row in the unsafe head's term
    category_weighting: str = "none"  # none | sqrt | balanced
    severity_weighting: Any = "none"  # none | balanced | a list of 4 numbers
    head_weights: HeadWeightsConfig = field(default_factory=HeadWeightsConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)


@dataclass
class ModeratorConfig(ModerationConfig):
    """Moderator trained end to end: LoRA or all weights."""

    pooling: str = "mean"
    layers: Optional[list[int]] = None  # null: the last one
    span: str = "all"  # all | prompt | response | both | all_and_response
    head_start: str = "base_rates"  # base_rates | linear_probe


@dataclass
class KernelConfig:
    """A Gaussian kernel on the chosen layers: heads that are not linear in the hidden states."""

    name: str = "none"  # none | gaussian
    gamma: float = 1.0  # inverse width; 1 compares with the mean squared distance of two rows
    l2: list[float] = field(default_factory=lambda: [3e-4, 1e-4, 3e-5, 1e-5])
    axes: int = 512  # principal axes of the states that distances are taken along
    rank: int = 1500  # coordinates of the kernel
    landmarks: int = 6000  # training rows that it compares with, at most


@dataclass
class ProbeConfig(ModerationConfig):
    """Moderator on a frozen backbone: heads fitted on hidden states that are computed once."""

    pooling: str = "mean"
    layers: Any = "auto"  # auto | all | a list of numbers
    span: str = "all_and_response"  # all | prompt | response | both | all_and_response
    combine: str = "concatenate"  # concatenate | average
    folds: int = 5
    l2: list[float] = field(default_factory=lambda: [1.0, 0.3, 0.1, 0.03, 0.01])
    kernel: KernelConfig = field(default_factory=lambda: KernelConfig())
    feature_dtype: str = "float16"  # float16 | float32
    batch_tokens: int = field(default=4096, metadata=OUTSIDE_IDENTITY)


TASKS: dict[str, type[TaskConfig]] = {
    "sft": SftConfig,
    "reward": RewardConfig,
    "cost": CostConfig,
    "moderator": ModeratorConfig,
    "probe": ProbeConfig,
    "ppo": PpoConfig,
    "ppo_lag": PpoConfig,
}
