"""Actor-critic: PPO on sampled responses, with a constraint on their costs and a way to take advantages as plugs.

One `training_step` is one rollout and everything that is learned from it, in numbered stages. PPO, reward shaping and
PPO-Lagrangian (Safe RLHF, arXiv 2310.12773, section 3.3 and algorithm 1) are this one step with another `constraint`;
RLOO and GRPO are it with another `advantage`. Formulas: `ops/shaping.py`, `ops/advantages.py`, `ops/constraint.py`,
`ops/policy_losses.py`; knobs and metrics: docs/ppo.md.

What differs from the reference code: lambda moves once per rollout, on the raw costs of all its responses; mini-batch
epochs; log-probabilities of the old policy are computed anew by the very code that trains, so that the ratio and the
divergence from the reference are exactly 1 and 0 at the first step; metrics are means over the whole update.

Several processes share the work of every stage (`shares.py`): each holds the whole rollout and runs models on its part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saferlhf.config.online_schema import GaeConfig
from saferlhf.data.loader import StepBatch, StepLoader
from saferlhf.data.templates import pad_id
from saferlhf.errors import TrainingDiverged, UserError
from saferlhf.evaluation.processes import Processes
from saferlhf.ops.advantages import gae, group_advantages, moments, spread, whiten
from saferlhf.ops.policy_losses import explained_variance, token_logprobs, value_moments
from saferlhf.ops.shaping import clip_scores, kl_estimate, shape_rewards, truncated_scores
from saferlhf.rollout.engines.mismatch import logprob_mismatch, refuse_mismatch
from saferlhf.rollout.experience import Experience, Rollout, minibatch_indices
from saferlhf.rollout.prompts import PromptTokens
from saferlhf.rollout.truth_scorer import TruthScorer
from saferlhf.tasks.online_base import OnlineTask
from saferlhf.tasks.online_prompts import PromptBatch
from saferlhf.tasks.online_scores import SignalScores
from saferlhf.tasks.optimization import clip_gradients
from saferlhf.tasks.ppo_losses import UpdateSums, actor_backward, critic_backward, means_of, ptx_backward, row_weights
from saferlhf.tasks.shares import deal, sampled_by_all, told_of_all

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
        scores = self.signals.score(rollout, self.home)
        # 3. the multipliers answer to the raw costs of the whole rollout, once
        stats = self.constraint.update(scores.costs, rollout.groups)
        stats |= _described(rollout, scores) | self._truth(rollout)
        # 4. responses that got all their scores; what the old policy and the reference say of every token
        rollout = rollout.select(torch.nonzero(scores.scored).flatten()).to(self.home)
        if not len(rollout):
            raise UserError("no response of this rollout got a score", "scorers", "see the scorer's failures above")
        scores = scores_of(scores, self.home)
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
        stats |= means_of(sums.over_all_processes(), self.critics)
        stats["lr"] = self._optimizers()[0].param_groups[0]["lr"]
        for schedule in self._schedules():
            schedule.step()
        stats["kl_coefficient"] = self.kl.value
        self.kl.update(stats["kl"], len(rollout))
        self._finished(stats)

    def sample(self, batch: PromptBatch, number: int) -> Rollout:
        """Responses to the prompts of a batch; the noise belongs to (seed, number of the rollout, row, sample)."""
        config, roles = self.config.rollout, self.roles
        assert config is not None and roles is not None

        def responses(prompts: Sequence[PromptTokens]) -> Rollout:
            return self.engine.generate(prompts, samples=config.samples, seed=self.config.seed, rollout=number)

        def sampled() -> Rollout:
            with roles.causal("actor") as policy:
                self.engine.follow(policy)
            pad = pad_id(self.inputs.tokenizer)
            return sampled_by_all(batch.prompts, config.samples, responses, pad_token_id=pad)

        found: Rollout = roles.with_whole_weights(sampled)
        return found

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
                divergence = self._optimizer_step(experience.select(chosen), step, sums)
                if ppo.stop_kl is not None and divergence > ppo.stop_kl:
                    return epoch + 1
        return ppo.epochs

    def _optimizer_step(self, experience: Experience, step: int, sums: UpdateSums) -> float:
        """One step of the actor and of every critic; mean divergence from the old policy, in nats per token.

        Args:
            experience: the responses of the step.
            step: its number over the whole run.
            sums: what the update's means are made of.

        Returns:
            0 where nobody asks for the divergence.
        """
        ppo, roles, config = self.ppo, self.roles, self.config
        assert roles is not None and config.rollout is not None
        optimizers, here = self._optimizers(), UpdateSums()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        learns = self.rollouts >= ppo.critic.warmup_rollouts
        parts = self._micro_batches(experience)
        learnt: list[Any] = []
        total = 0
        if learns and ppo.ptx_coefficient:
            learnt, total = self._supervised(step, len(experience))
        passes = len(parts) * (learns + len(self.critics)) + len(learnt)
        backward = Backpropagation(self, passes)
        limits: dict[str, float | None] = {}
        if learns:
            temperature, beta = config.rollout.temperature, self.kl.value
            actor_backward(
                roles, parts, ppo, temperature=temperature, kl_coefficient=beta, backward=backward, sums=here
            )
            ptx_backward(roles, learnt, total, ppo.ptx_coefficient, backward=backward, sums=here)
            limits["actor"] = config.trainer.gradient_clip
        for name in self.critics:
            critic_backward(roles, name, parts, ppo, backward=backward, sums=here)
            limits[f"{name}_critic"] = ppo.critic.gradient_clip
        for name, limit in limits.items():
            norm = float(clip_gradients(roles.trainable(name), limit))
            self._check(name, norm, experience.rollout.row_ids)
            sums.norm(name, norm)
        for optimizer in optimizers if learns else optimizers[1:]:
            optimizer.step()
        sums.add(**here.sums)
        if ppo.stop_kl is None:
            return 0.0
        divergence = here.over_all_processes().mean("approx_kl")
        return 0.0 if math.isnan(divergence) else divergence

    # -------------------------------------------------------------------------------------------- parts of the step
    @property
    def _rows(self) -> int:
        """Responses per forward pass without gradients: logits of all their tokens have to fit."""
        trainer = self.config.trainer
        return min(trainer.eval_batch_size, trainer.micro_batch_size or trainer.eval_batch_size)

    def _truth(self, rollout: Rollout) -> dict[str, float]:
        """On the toy world, what the responses are really worth: logged, and learned from by nobody."""
        if self.config.data.source != TOYWORLD or not Processes.current().first:
            return {}
        said = TruthScorer().score(rollout.requests()).values
        shown = {"helpfulness": "helpfulness", "harmlessness": "harmlessness", "is_safe": "safe_rate"}
        return {f"truth_{name}": float(said[output].mean()) for output, name in shown.items()}

    @torch.no_grad()
    def _logprobs(self, name: str, rollout: Rollout) -> Tensor:
        """(S, T) log-probabilities of actor or reference, at the sampling temperature, as an update computes them."""
        roles, config = self.roles, self.config.rollout
        assert roles is not None and config is not None

        def logprobs_of(part: Rollout) -> list[Tensor]:
            logits = roles.logits(name, part.input_ids, part.attention_mask)
            return [token_logprobs(logits, part.input_ids, part.response_mask, temperature=config.temperature)]

        with roles.causal(name):
            (found,) = told_of_all(rollout, self._rows, logprobs_of, self.home)
        return found

    @torch.no_grad()
    def _values(self, name: str, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """(S, T) of a critic, and (S,) the value behind the last token."""
        roles = self.roles
        assert roles is not None

        def values_of(part: Rollout) -> Sequence[Tensor]:
            return roles.values_and_end(f"{name}_critic", part.input_ids, part.attention_mask)

        values, behind = told_of_all(rollout, self._rows, values_of, self.home)
        return values.masked_fill(~rollout.response_mask, 0.0), behind

    def _mismatch(self, rollout: Rollout, policy: Tensor) -> dict[str, float]:
        """How far what the engine says of its tokens is from what the policy says of them."""
        assert self.config.rollout is not None
        found = logprob_mismatch(rollout.logprobs, policy, rollout.response_mask)
        refuse_mismatch(found, self.config.rollout.max_logprob_mismatch, self.engine.name)
        return {"logprob_mismatch": found["mean_abs"]}

    def _micro_batches(self, experience: Experience) -> list[Experience]:
        """This process's responses of one optimizer step, of like length together, weighed by the whole step's."""
        rollout = experience.rollout
        weighed = replace(experience, weights=row_weights(rollout.response_lengths, self.ppo.loss_mean))
        size = self.config.trainer.micro_batch_size or len(experience)
        found = []
        for part in deal(rollout.lengths.cpu().numpy(), size, Processes.current()):
            some = weighed.select(part.places)
            mask = some.rollout.response_mask & part.counted.to(rollout.response_mask.device)[:, None]
            found.append(replace(some, rollout=replace(some.rollout, response_mask=mask)))
        return found

    def _supervised(self, step: int, responses: int) -> tuple[list[Any], int]:
        """Supervised rows that belong to an optimizer step: a function of seed and step alone.

        Returns:
            this process's micro-batches, and the tokens that all processes predict.
        """
        rows, data = self.ppo.ptx_batch_size or responses, self.inputs.supervised
        loader: StepLoader[Any] = StepLoader(data, batch_size=rows, total_steps=step + 1, seed=self.config.seed)
        chosen = loader.step_indices(step)
        size = min(rows, self.config.trainer.micro_batch_size or rows)
        found, total = [], torch.zeros((), dtype=torch.int64, device=self.home)
        for part in deal(data.lengths[chosen], size, Processes.current()):
            batch = data.collate(chosen[part.places.numpy()])
            batch = replace(batch, response_mask=batch.response_mask & part.counted[:, None]).to(self.home)
            total += batch.response_mask[:, 1:].sum()
            found.append(batch)
        if Processes.current().size > 1:
            torch.distributed.all_reduce(total)
        return found, int(total)

    def _check(self, name: str, norm: float, row_ids: Sequence[str]) -> None:
        if math.isfinite(norm):
            return
        ids = list(dict.fromkeys(row_ids))
        raise TrainingDiverged(
            f"the gradient's norm of the {name} became {norm} in rollout {self.rollouts + 1}",
            "prompts " + ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else ""),
            "lower optimizer.lr or task.critic.lr",
        )


# ------------------------------------------------------------------------------------------------ helpers
class Backpropagation:
    """The backward passes of one optimizer step; under ddp the last one of all sends the gradients of all of them.

    Processes average their gradients, so each gives its sum times their number.
    """

    def __init__(self, task: OnlineTask, passes: int) -> None:
        self.task, self.left = task, passes

    def __call__(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        self.left -= 1
        no_sync = getattr(self.task.trainer.strategy.model, "no_sync", None)
        with nullcontext() if no_sync is None or not self.left else no_sync():
            self.task.manual_backward(loss * self.task.trainer.world_size)


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
