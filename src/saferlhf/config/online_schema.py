"""The structured configuration of what runs online: the PPO step, advantages, constraints; see `schema.py`.

`constraint` and `advantage` are plugs: one dataclass per choice (`CONSTRAINTS`, `ADVANTAGES`), chosen by `name`, so
that a key of another choice is an error. Defaults are those of the Safe RLHF code and paper as far as known; `ours`
marks the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from saferlhf.config.task_base import TaskConfig


# ------------------------------------------------------------------------------------------------ advantages
@dataclass
class AdvantageConfig:
    """What every way to estimate advantages has."""

    name: str
    whiten: str = "none"  # none | scale (divide by the standard deviation) | standard (subtract the mean too)


@dataclass
class GaeConfig(AdvantageConfig):
    """Generalised advantage estimation with one critic per signal."""

    gamma: float = 1.0
    lam: float = 0.95


@dataclass
class RlooConfig(AdvantageConfig):
    """Against the mean of the other responses to the same prompt; no critic."""


@dataclass
class GrpoConfig(AdvantageConfig):
    """Against the mean of the responses to the same prompt, over their standard deviation; no critic."""


ADVANTAGES: dict[str, type[AdvantageConfig]] = {"gae": GaeConfig, "rloo": RlooConfig, "grpo": GrpoConfig}


# ------------------------------------------------------------------------------------------------ constraints
@dataclass
class ConstraintConfig:
    """No constraint: PPO on the reward alone. Costs that are measured are reported, nothing more.

    Where a key takes a number it takes a mapping from cost names to numbers too.
    """

    name: str
    threshold: Any = 0.0  # what the mean cost is to stay below; -d in the paper's notation
    history: int = 20  # rollouts that saturation and oscillation look back on; ours


@dataclass
class FixedConfig(ConstraintConfig):
    """Reward shaping: R - sum of nu_k C_k."""

    weight: Any = 1.0  # nu


@dataclass
class MultiplierConfig(ConstraintConfig):
    """What every learned multiplier has."""

    lambda_init: Any = 1.0
    lambda_min: Any = 0.1  # ours; the reference has none and can get stuck near zero
    lambda_max: Any = 5.0
    delay: int = 0  # rollouts before lambda moves
    window: int = 1  # rollouts averaged; ours: the fresh one only (reference: the last 128 responses)


@dataclass
class LagrangianConfig(MultiplierConfig):
    """Ascent on log lambda."""

    lambda_lr: Any = 0.1
    rule: str = "log_gradient"  # log_gradient (the paper's: step lr * lambda * gap) | multiplicative (step lr * gap)
    max_step: Optional[float] = None  # of log lambda per rollout; null: none


@dataclass
class PidConfig(MultiplierConfig):
    """Proportional, integral and derivative control of lambda; all values ours."""

    lambda_min: Any = 0.0
    proportional: float = 0.5
    integral: float = 0.1
    derivative: float = 0.1
    smoothing: float = 0.5  # weight of the past in the running means behind P and D; 0: none


@dataclass
class RectifiedConfig(LagrangianConfig):
    """The positive part of the cost of each prompt: safe prompts cannot make up for unsafe ones."""

    slack: Any = 0.05  # mean positive part that is allowed; ours


@dataclass
class UpperBoundConfig(LagrangianConfig):
    """Mean cost plus a confidence term, and a safety test on held-out prompts at the end."""

    bound: str = "student"  # student | hoeffding | bernstein
    confidence: float = 0.95  # 1 - the chance of calling an unsafe policy safe
    inflation: float = 2.0  # of the confidence term in training, so that the test is passed; ours
    test_prompts: int = 512  # held-out prompts of the test, which the term is sized for; ours
    cost_range: Optional[list[float]] = None  # [lowest, highest] cost; needed by hoeffding and bernstein


CONSTRAINTS: dict[str, type[ConstraintConfig]] = {
    "none": ConstraintConfig,
    "fixed": FixedConfig,
    "lagrangian": LagrangianConfig,
    "pid": PidConfig,
    "rectified": RectifiedConfig,
    "upper_bound": UpperBoundConfig,
}


# ------------------------------------------------------------------------------------------------ PPO
@dataclass
class KlConfig:
    """How the policy is held near the reference."""

    coefficient: float = 0.02  # beta (Safe RLHF's script: 0.01 with a constraint)
    enters: str = "reward"  # reward (every token's reward and cost) | loss (a term of the policy's loss)
    estimator: str = "k1"  # k1 | k2 | k3
    target: Optional[float] = None  # nats per response; null: the coefficient is fixed
    horizon: float = 10_000.0  # responses


@dataclass
class CriticConfig:
    """The critics' optimizer; what is not here is as the actor's."""

    lr: Optional[float] = None  # null: half the actor's, as in Safe RLHF
    weight_decay: float = 0.0
    schedule: str = "constant"  # constant | cosine | linear
    gradient_clip: Optional[float] = 1.0
    warmup_rollouts: int = 0  # rollouts that train the critics alone


@dataclass
class PpoConfig(TaskConfig):
    """One actor-critic for PPO and PPO-Lagrangian: the knobs of its step."""

    epochs: int = 2  # passes over a rollout; ours (reference: 1)
    mini_batches: int = 4  # optimizer steps per pass; ours (reference: 1)
    clip_ratio: float = 0.2
    clip_ratio_high: Optional[float] = None  # null: as clip_ratio
    dual_clip: Optional[float] = None
    clip_value: Optional[float] = 5.0
    clip_score: Optional[float] = 50.0
    loss_mean: str = "token"  # token (over all tokens of a step) | response (each response the same; reference)
    entropy_coefficient: float = 0.0
    ptx_coefficient: float = 0.0  # Safe RLHF's script: 16
    ptx_batch_size: Optional[int] = None  # supervised rows per optimizer step; null: as many as responses
    truncation: str = "penalty"  # penalty | bootstrap | none
    truncation_penalty: float = 2.0  # ours
    stop_kl: Optional[float] = None  # nats per token; ends the passes over a rollout
    kl: KlConfig = field(default_factory=KlConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
