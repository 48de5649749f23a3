"""Actor-critic: PPO on sampled responses, with a constraint on their costs and a way to take advantages as plugs.

One `training_step` is one rollout and everything that is learned from it, in numbered stages. PPO, reward shaping and
PPO-Lagrangian (Safe RLHF, arXiv 2310.12773, section 3.3 and algorithm 1) are this one step with another `constraint`;
RLOO and GRPO are it with another `advantage`. Formulas: `ops/shaping.py`, `ops/advantages.py`, `ops/constraint.py`,
`ops/policy_losses.py`; knobs and metrics: docs/ppo.md.

What differs from the reference code: lambda moves once per rollout, on the raw costs of all its responses; mini-batch
epochs; log-probabilities of the old policy are computed anew by the very code that trains, so that the ratio and the
divergence from the reference are exactly 1 and 0 at the first step; metrics are means over the whole update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saferlhf.config.online_schema import GaeConfig
from saferlhf.data.loader import StepBatch, StepLoader
from saferlhf.errors import TrainingDiverged, UserError
from saferlhf.ops.advantages import gae, group_advantages, moments, spread, whiten
from saferlhf.ops.policy_losses import explained_variance, token_logprobs, value_moments
from saferlhf.ops.shaping import clip_scores, kl_estimate, shape_rewards, truncated_scores
from saferlhf.rollout.engines.mismatch import logprob_mismatch, refuse_mismatch
from saferlhf.rollout.experience import Experience, Rollout, minibatch_indices
from saferlhf.rollout.truth_scorer import TruthScorer
from saferlhf.tasks.online_base import OnlineTask
from saferlhf.tasks.online_prompts import PromptBatch
from saferlhf.tasks.online_scores import SignalScores, chunks
from saferlhf.tasks.ppo_losses import UpdateSums, actor_backward, critic_backward, means_of, ptx_backward

TOYWORLD = "toyworld"
"""Source of data whose truth is known."""


class ActorCriticTask(OnlineTask):
    """A LightningModule whose batch is the prompts of one rollout."""

    # -------------------------------------------------------------------------------------------- one rollout
    def training_step(self, batch: StepBatch[Any], batch_idx: int) -> None:
        """Sample responses to a batch of prompts, and learn from them.

        Raises:
            TrainingDiverged: a loss or a gradient is not finite.
            UserError: a scorer failed beyond its policy, or the engine samples from another distribution.
        """
        number = self.rollouts
        # 1. responses of the policy as it is
        rollout = self.sample(batch[0], number)
        # 2. what they are worth
        scores = self.signals.score(rollout, self.device)
        # 3. the multipliers answer to the raw costs of the whole rollout, once
        stats = self.constraint.update(scores.costs, rollout.groups)
        stats |= _described(rollout, scores) | self._truth(rollout)
        # 4. responses that got all their scores; what the old policy and the reference say of every token
        rollout = rollout.select(torch.nonzero(scores.scored).flatten()).to(self.device)
        if not len(rollout):
            raise UserError("no response of this rollout got a score", "scorers", "see the scorer's failures above")
        scores = scores_of(scores, self.device)
        reference = self._logprobs("reference", rollout)
        old = self._logprobs("actor", rollout)
        stats |= self._mismatch(rollout, old)
        rollout = replace(rollout, logprobs=old)
        # 5. and 6. what every token earns and costs, and its advantage
        experience, more = self._advantages(rollout, scores, reference)
        stats |= more
        # 7. several passes over it, each in mini-batches
        sums = UpdateSums()
        stats["passes"] = float(self._passes(experience, number, sums))
        # 8. means over the whole update
        stats |= means_of(sums, self.critics)
        stats["lr"] = self._optimizers()[0].param_groups[0]["lr"]
        for schedule in self._schedules():
            schedule.step()
        stats["kl_coefficient"] = self.kl.value
        self.kl.update(stats["kl"], len(rollout))
        self._finished(stats)

    def sample(self, batch: PromptBatch, number: int) -> Rollout:
        """Responses to the prompts of a batch; the noise belongs to (seed, number of the rollout, row, sample)."""
        config = self.config.rollout
        assert config is not None and self.roles is not None
        with self.roles.causal("actor") as policy:
            self.engine.follow(policy)
        return self.engine.generate(batch.prompts, samples=config.samples, seed=self.config.seed, rollout=number)

    def _advantages(
        self, rollout: Rollout, scores: SignalScores, reference: Tensor
    ) -> tuple[Experience, dict[str, float]]:
        """Scores and divergence become rewards and costs of tokens, those become one advantage per token.

        Args:
            rollout: S responses, its log-probabilities those of the old policy.
            scores: of these responses.
            reference: (S, T) log-probabilities of the reference.
        """
        ppo, constraint, advantage = self.ppo, self.constraint, self.config.advantage
        mask, cut, groups = rollout.response_mask, rollout.truncated, rollout.groups
        kl = kl_estimate(rollout.logprobs, reference, mask, ppo.kl.estimator)  # (S, T)
        # scores, each (S,): bounded, costs taken off where the constraint works on scores, truncation punished
        clipped = {name: clip_scores(value, ppo.clip_score) for name, value in scores.values.items()}
        costs = {name: clipped[name][0] for name in self.names[1:]}
        reward = constraint.shape_scores(clipped["reward"][0], costs)
        reward = truncated_scores(reward, cut, ppo.truncation, ppo.truncation_penalty)
        if ppo.truncation == "bootstrap":
            costs = {name: truncated_scores(cost, cut, "bootstrap") for name, cost in costs.items()}
        beta = self.kl.value if ppo.kl.enters == "reward" else 0.0
        charged = costs if constraint.acts_on == "advantages" else {}
        rewards, charges = shape_rewards(reward, charged, kl, mask, kl_coefficient=beta)  # (S, T) each
        applies = constraint.applies(scores.costs, groups)
        values: dict[str, Tensor] = {}
        returns: dict[str, Tensor] = {}
        stats: dict[str, float] = {}
        if isinstance(advantage, GaeConfig):
            taken: dict[str, Tensor] = {}
            for name, earned in {"reward": rewards, **charges}.items():
                values[name], behind = self._values(name, rollout)
                bootstrap = behind * cut if ppo.truncation == "bootstrap" else None
                taken[name], returns[name] = gae(
                    earned, values[name], mask, gamma=advantage.gamma, lam=advantage.lam, bootstrap=bootstrap
                )
                explained = explained_variance(value_moments(values[name], returns[name], mask))
                stats |= {} if math.isnan(explained) else {f"explained_variance_{name}": explained}
            advantages = constraint.combine(taken["reward"], {name: taken[name] for name in charges}, applies=applies)
        else:
            earned = constraint.combine(
                rewards.sum(dim=1), {name: charge.sum(dim=1) for name, charge in charges.items()}, applies=applies
            )  # (S,)
            advantages = spread(group_advantages(earned, groups.to(earned.device), advantage.name), mask)
        if advantage.whiten != "none":
            advantages = whiten(advantages, mask, advantage.whiten == "standard", total=moments(advantages, mask))
        tokens = max(1, int(mask.sum()))
        stats["kl"] = float(kl_estimate(rollout.logprobs, reference, mask, "k1").double().sum()) / len(rollout)
        stats["kl_per_token"] = stats["kl"] * len(rollout) / tokens
        stats["score_clipped_share"] = float(torch.stack([c for _, c in clipped.values()]).float().mean())
        experience = Experience(
            rollout,
            reference_logprobs=reference,
            rewards=scores.values["reward"],
            costs=scores.costs,
            values=values,
            returns=returns,
            advantages=advantages,
        )
        return experience, stats

    def _passes(self, experience: Experience, number: int, sums: UpdateSums) -> int:
        """Passes over a rollout, each a fresh permutation dealt into optimizer steps; how many were begun."""
        ppo, seed = self.ppo, self.config.seed
        rows = math.ceil(len(experience) / ppo.mini_batches)
        for epoch in range(ppo.epochs):
            steps = minibatch_indices(len(experience), rows, (seed, number, epoch))
            for place, chosen in enumerate(steps):
                step = (number * ppo.epochs + epoch) * ppo.mini_batches + place
                divergence = self._optimizer_step(self._micro_batches(experience, chosen), step, sums)
                if ppo.stop_kl is not None and divergence > ppo.stop_kl:
                    return epoch + 1
        return ppo.epochs

    def _optimizer_step(self, parts: Sequence[Experience], step: int, sums: UpdateSums) -> float:
        """One step of the actor and of every critic; mean divergence from the old policy, in nats per token.

        Args:
            parts: micro-batches of the step.
            step: its number over the whole run.
            sums: what the update's means are made of.
        """
        ppo, roles, config = self.ppo, self.roles, self.config
        assert roles is not None and config.rollout is not None
        optimizers, here = self._optimizers(), UpdateSums()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        learns = self.rollouts >= ppo.critic.warmup_rollouts
        norms: dict[str, Tensor] = {}
        if learns:
            actor_backward(
                roles,
                parts,
                ppo,
                temperature=config.rollout.temperature,
                kl_coefficient=self.kl.value,
                backward=self.manual_backward,
                sums=here,
            )
            if ppo.ptx_coefficient:
                batches = self._supervised(step, sum(map(len, parts)))
                ptx_backward(roles, batches, ppo.ptx_coefficient, backward=self.manual_backward, sums=here)
            norms["actor"] = _clip(roles.trainable("actor"), config.trainer.gradient_clip)
        for name in self.critics:
            critic_backward(roles, name, parts, ppo, backward=self.manual_backward, sums=here)
            norms[f"{name}_critic"] = _clip(roles.trainable(f"{name}_critic"), ppo.critic.gradient_clip)
        for name, norm in norms.items():
            self._check(name, float(norm), parts)
            sums.norm(name, float(norm))
        for optimizer in optimizers if learns else optimizers[1:]:
            optimizer.step()
        sums.add(**here.sums)
        divergence = here.mean("approx_kl")
        return 0.0 if math.isnan(divergence) else divergence

    # -------------------------------------------------------------------------------------------- parts of the step
    @property
    def _rows(self) -> int:
        """Responses per forward pass without gradients: logits of all their tokens have to fit."""
        trainer = self.config.trainer
        return min(trainer.eval_batch_size, trainer.micro_batch_size or trainer.eval_batch_size)

    def _truth(self, rollout: Rollout) -> dict[str, float]:
        """On the toy world, what the responses are really worth: logged, and learned from by nobody."""
        if self.config.data.source != TOYWORLD:
            return {}
        said = TruthScorer().score(rollout.requests()).values
        shown = {"helpfulness": "helpfulness", "harmlessness": "harmlessness", "is_safe": "safe_rate"}
        return {f"truth_{name}": float(said[output].mean()) for output, name in shown.items()}

    @torch.no_grad()
    def _logprobs(self, name: str, rollout: Rollout) -> Tensor:
        """(S, T) log-probabilities of actor or reference, at the sampling temperature, as an update computes them."""
        assert self.roles is not None and self.config.rollout is not None
        found = torch.zeros_like(rollout.logprobs)
        with self.roles.causal(name):
            for at, part in chunks(rollout, self._rows):
                logits = self.roles.logits(name, part.input_ids, part.attention_mask)
                told = token_logprobs(
                    logits, part.input_ids, part.response_mask, temperature=self.config.rollout.temperature
                )
                found[at, : told.shape[1]] = told
        return found

    @torch.no_grad()
    def _values(self, name: str, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(S, T) of a critic, and (S,) the value behind the last token."""
        assert self.roles is not None
        values, behind = torch.zeros_like(rollout.logprobs), torch.zeros_like(rollout.logprobs[:, 0])
        for at, part in chunks(rollout, self._rows):
            told, end = self.roles.values_and_end(f"{name}_critic", part.input_ids, part.attention_mask)
            values[at, : told.shape[1]], behind[at] = told, end
        return values.masked_fill(~rollout.response_mask, 0.0), behind

    def _mismatch(self, rollout: Rollout, policy: Tensor) -> dict[str, float]:
        """How far what the engine says of its tokens is from what the policy says of them."""
        assert self.config.rollout is not None
        found = logprob_mismatch(rollout.logprobs, policy, rollout.response_mask)
        refuse_mismatch(found, self.config.rollout.max_logprob_mismatch, self.engine.name)
        return {"logprob_mismatch": found["mean_abs"]}

    def _micro_batches(self, experience: Experience, chosen: Any) -> list[Experience]:
        """Responses of one optimizer step, of like length together."""
        lengths = experience.rollout.lengths.cpu().numpy()
        order = chosen[np.argsort(-lengths[chosen], kind="stable")]
        size = self.config.trainer.micro_batch_size or len(order)
        return [experience.select(part) for part in np.array_split(order, math.ceil(len(order) / size))]

    def _supervised(self, step: int, responses: int) -> list[Any]:
        """Micro-batches of supervised rows that belong to an optimizer step: a function of seed and step alone."""
        rows = self.ppo.ptx_batch_size or responses
        size = min(rows, self.config.trainer.micro_batch_size or rows)
        loader: StepLoader[Any] = StepLoader(
            self.inputs.supervised, batch_size=rows, micro_batch_size=size, total_steps=step + 1, seed=self.config.seed
        )
        return [batch.to(self.device) for batch in loader.step(step)]

    def _check(self, name: str, norm: float, parts: Sequence[Experience]) -> None:
        if math.isfinite(norm):
            return
        ids = list(dict.fromkeys(row_id for part in parts for row_id in part.rollout.row_ids))
        raise TrainingDiverged(
            f"the gradient's norm of the {name} became {norm} in rollout {self.rollouts + 1}",
            "prompts " + ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else ""),
            "lower optimizer.lr or task.critic.lr",
        )


# ------------------------------------------------------------------------------------------------ helpers
def scores_of(scores: SignalScores, device: torch.device) -> SignalScores:
    """Those of the responses that got all of them, on a device."""
    kept = scores.scored
    return SignalScores({name: value[kept].to(device) for name, value in scores.values.items()}, scores.metrics)


def _described(rollout: Rollout, scores: SignalScores) -> dict[str, float]:
    """What a rollout looks like, unscored responses included."""
    known = scores.values["reward"][scores.values["reward"].isfinite()].double()
    found = {"mean_reward": float(known.mean())} if len(known) else {}
    found["unscored_share"] = float((~scores.scored).double().mean())
    return {**found, **rollout.statistics(), **scores.metrics}


def _clip(parameters: list[nn.Parameter], limit: float | None) -> Tensor:
    return nn.utils.clip_grad_norm_(parameters, limit if limit is not None else math.inf)
