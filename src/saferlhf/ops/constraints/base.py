"""What every constraint does: measure the costs of a rollout, and remember enough to say how the run is going."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from saferlhf.errors import UserError
from saferlhf.ops.constraints.costs import Floats, by_prompt, sample, vector

ActsOn = Literal["nothing", "scores", "advantages"]


class Constraint:
    """How costs enter the update of the policy; this class itself is `none`: they do not.

    In a rollout, in this order: `update` with the costs of all processes, `shape_scores`, advantages of the reward and,
    where `acts_on` is "advantages", of each cost, then `combine`. `acts_on` says which of `shape_scores` and `combine`
    changes anything; calling both is always right.

    Args:
        names: the costs, in a fixed order; empty where none is measured.
        threshold: cost -> what its mean is to stay at or below.
        history: rollouts that saturation and oscillation look back on.
    """

    kind = "none"
    acts_on: ActsOn = "nothing"

    def __init__(self, names: Sequence[str], threshold: Mapping[str, float], history: int = 20) -> None:
        self.names = tuple(names)
        self.threshold = {name: float(threshold[name]) for name in self.names}
        self.history = history
        self.rollouts = 0
        self._gaps: dict[str, list[float]] = {name: [] for name in self.names}

    # -------------------------------------------------------------------------------------------- in the update
    def shape_scores(self, rewards: Tensor, costs: Mapping[str, Tensor]) -> Tensor:
        """The score of each response that the reward's advantage is taken of: (S,) and name -> (S,) to (S,)."""
        return rewards

    def applies(
        self, costs: Mapping[str, Any], groups: Sequence[Any] | Tensor | None = None
    ) -> dict[str, Tensor] | None:
        """On which responses each cost presses, for constraints that look at single prompts; None: on all.

        Args:
            costs: name -> (S,) raw costs; all responses of a prompt must be among them.
            groups: (S,) prompt of each response; None: every response is a prompt of its own.

        Returns:
            name -> (S,) float32 of 0 and 1, to be handed to `combine`.
        """
        return None

    def combine(
        self, rewards: Tensor, costs: Mapping[str, Tensor], *, applies: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """One advantage from that of the reward and those of the costs.

        Linear in its arguments with weights that sum to one in absolute value, so a term that enters the reward as
        -x and every cost as +x comes out as -x, whatever lambda. Scores (S,) may stand in for advantages.

        Args:
            rewards: (S, T) or (S,).
            costs: name -> the same shape; not looked at unless `acts_on` is "advantages".
            applies: what `applies` returned, for the same rows.
        """
        return rewards

    # -------------------------------------------------------------------------------------------- once per rollout
    def update(self, costs: Mapping[str, Any], groups: Sequence[Any] | Tensor | None = None) -> dict[str, float]:
        """Look at the fresh costs of the whole rollout and move the multipliers, once.

        A function of the costs of all processes together, whatever their order and however they were split: gather
        them first, without repeating any. A response without a score (NaN) is left out and counted.

        Args:
            costs: name -> (N,) raw costs, one per response; not clipped, not normalised, without KL.
            groups: (N,) prompt of each response; None: every response is a prompt of its own.

        Returns:
            `<cost>/<name>` -> number: `mean_cost`; `gap` (what is compared less what it is compared with: above 0 =
            violated); `oscillation` (share of neighbouring rollouts between which the gap changed sign, of those
            looked back on: near 1 = swings every time); `violating_prompts` (share of prompts whose mean cost is above
            the threshold); `unscored` (responses); and of a learned multiplier `lambda`, `at_bound` (-1 lower, 1 upper,
            0 between), `saturation` (share of rollouts at a bound), `swing` (largest less smallest). What
            cannot be said, as nothing was scored, is left out.
        """
        if set(costs) != set(self.names):
            raise ValueError(f"costs {sorted(costs)} are given, {sorted(self.names)} are constrained")
        diagnostics: dict[str, float] = {}
        for name in self.names:
            numbers = vector(costs[name], name)
            found = self._measure(name, numbers, by_prompt(numbers, groups))
            diagnostics |= {f"{name}/{key}": value for key, value in found.items()}
        self.rollouts += 1
        return diagnostics

    def _measure(self, name: str, numbers: Floats, prompts: Mapping[Any, float]) -> dict[str, float]:
        """Diagnostics of one cost; `_move` first, so that they describe the state after the update."""
        scored = [cost for cost in numbers.tolist() if not math.isnan(cost)]
        found: dict[str, float] = {"unscored": float(len(numbers) - len(scored))}
        gap = math.nan
        if scored:
            found["mean_cost"] = sample(scored).mean
            threshold = self.threshold[name]
            found["violating_prompts"] = sum(cost > threshold for cost in prompts.values()) / len(prompts)
            gap = self._gap(name, scored, prompts)
        if not math.isnan(gap):
            found["gap"] = gap
            self._gaps[name] = [*self._gaps[name], gap][-self.history :]
        self._move(name, gap)
        found["oscillation"] = sign_changes(self._gaps[name])
        return found | self._multiplier_diagnostics(name)

    def _gap(self, name: str, scored: Sequence[float], prompts: Mapping[Any, float]) -> float:
        """How far the fresh costs are above what is allowed; NaN where they do not say."""
        return sample(scored).mean - self.threshold[name]

    def _move(self, name: str, gap: float) -> None:
        """Answer to the gap; NaN: nothing is known of this rollout."""

    def _multiplier_diagnostics(self, name: str) -> dict[str, float]:
        return {}

    @property
    def lambdas(self) -> dict[str, float]:
        """The multiplier of each cost; 0 where it has none."""
        return dict.fromkeys(self.names, 0.0)

    # -------------------------------------------------------------------------------------------- checkpoint
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain JSON, exact (a float's repr holds all its digits)."""
        return {
            "kind": self.kind,
            "rollouts": self.rollouts,
            "costs": {name: self._cost_state(name) for name in self.names},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a checkpoint stopped.

        Raises:
            UserError: it was written by another kind or for other costs.
        """
        mend = "resume with the constraint it was trained with, or start afresh with resume=never"
        if state.get("kind") != self.kind:
            raise UserError(f"the constraint was '{state.get('kind')}' and is '{self.kind}'", "checkpoint", mend)
        if set(state["costs"]) != set(self.names):
            costs = ", ".join(state["costs"]) or "none"
            raise UserError(f"its costs were {costs} and are {', '.join(self.names) or 'none'}", "checkpoint", mend)
        self.rollouts = int(state["rollouts"])
        for name in self.names:
            self._load_cost_state(name, state["costs"][name])

    def _cost_state(self, name: str) -> dict[str, Any]:
        return {"gaps": list(self._gaps[name])}

    def _load_cost_state(self, name: str, state: Mapping[str, Any]) -> None:
        self._gaps[name] = [float(gap) for gap in state["gaps"]]


class FixedWeights(Constraint):
    """Reward shaping (Safe RLHF, arXiv 2310.12773, section 4.2.3): one score R - sum of nu_k C_k, one critic.

    As in the reference the sum is not divided by 1 + nu, so the KL term weighs the less the larger nu is.

    Args:
        weight: cost -> nu.
        names, threshold, history: as `Constraint`; the threshold is for the diagnostics alone.
    """

    kind = "fixed"
    acts_on: ActsOn = "scores"

    def __init__(
        self, names: Sequence[str], threshold: Mapping[str, float], weight: Mapping[str, float], history: int = 20
    ) -> None:
        super().__init__(names, threshold, history)
        self.weight = {name: float(weight[name]) for name in self.names}

    def shape_scores(self, rewards: Tensor, costs: Mapping[str, Tensor]) -> Tensor:
        """R - sum of nu_k C_k, (S,)."""
        return rewards - torch.stack([self.weight[name] * costs[name].to(rewards) for name in self.names]).sum(dim=0)

    @property
    def lambdas(self) -> dict[str, float]:
        """The weight nu of each cost."""
        return dict(self.weight)


def sign_changes(values: Sequence[float]) -> float:
    """Share of neighbours with opposite sign; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    return sum(left * right < 0 for left, right in pairwise(values)) / (len(values) - 1)
