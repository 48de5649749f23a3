"""What an online task has before its first rollout, and between rollouts: roles, optimizers, counting, checkpoints.

Lightning counts one step per rollout here: the optimizers are stepped directly, and the count is moved by hand (trap
22 of docs/architecture.md), so that checkpoints, progress and curves go by rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import nn

from saferlhf.config.checks_online import signals_of
from saferlhf.config.online_schema import GaeConfig, PpoConfig
from saferlhf.config.schema import ScheduleConfig, TrainConfig
from saferlhf.errors import UserError
from saferlhf.evaluation.processes import Processes
from saferlhf.models.role_sources import RolePlan, plan_roles
from saferlhf.models.roles import Roles
from saferlhf.models.roles_build import build_roles, check_plan
from saferlhf.ops.constraint import Constraint, build_constraint
from saferlhf.ops.shaping import KlCoefficient
from saferlhf.rollout.engines.build import build_engine
from saferlhf.tasks.base import TaskInputs
from saferlhf.tasks.online_scores import Signals
from saferlhf.tasks.optimization import build_optimizer, build_schedule


class OnlineTask(L.LightningModule):
    """A LightningModule whose batch is the prompts of one rollout; `training_step` is left to be filled in."""

    def __init__(self, config: TrainConfig, inputs: TaskInputs) -> None:
        super().__init__()
        self.automatic_optimization = False
        # frozen models are not in the checkpoint; `on_load_checkpoint` checks that all trained weights are
        self.strict_loading = False
        self.config, self.inputs = config, inputs
        self.ppo: PpoConfig = config.task
        self.names = signals_of(config)
        self.constraint: Constraint = build_constraint(config.constraint, self.names[1:])
        kl = self.ppo.kl
        self.kl = KlCoefficient(kl.coefficient, kl.target, kl.horizon)
        self.rollouts = 0
        self.roles: Roles | None = None
        self.last_stats: dict[str, float] = {}  # of the last rollout, for display
        self._signals: Signals | None = None
        self._engine: Any = None

    @property
    def critics(self) -> tuple[str, ...]:
        """Signals whose advantages need a critic."""
        if not isinstance(self.config.advantage, GaeConfig):
            return ()
        return self.names if self.constraint.acts_on == "advantages" else ("reward",)

    @property
    def model(self) -> nn.Module | None:
        """All roles."""
        return self.roles

    @property
    def home(self) -> torch.device:
        """Where rows and numbers belong; while weights are sharded Lightning does not know where they are."""
        trainer = self._trainer
        if trainer is not None and trainer.training:
            return trainer.strategy.root_device
        return self.device

    # -------------------------------------------------------------------------------------------- building
    def configure_model(self) -> None:
        """Find, check and load the models of all roles, once; Lightning calls this for every stage."""
        if self.roles is None:
            plan = self.role_plan()
            check_plan(plan)
            self.roles = build_roles(plan)

    def role_plan(self) -> RolePlan:
        """The models of all roles, found and checked.

        Raises:
            UserError: one is missing, or does not fit the others.
        """
        config, critics = self.config, self.critics
        assert config.roles is not None
        plan = plan_roles(
            config.roles,
            backbone=config.backbone,
            quantization=config.quantization,
            adapter=config.adapter,
            tokenizer=self.inputs.tokenizer,
            init=config.init,
            signals=self.names,
            critics=bool(critics),
            seed=config.seed,
            output_root=self.inputs.output_root,
            cache_dir=config.cache_dir,
        )
        return replace(plan, critics={name: start for name, start in plan.critics.items() if name in critics})

    def configure_optimizers(self) -> Any:
        """One optimizer for the actor, one for all critics; their schedules go by rollouts."""
        assert self.roles is not None
        config, critic, total = self.config, self.ppo.critic, self.inputs.total_steps
        actor = build_optimizer(self.roles.trainable("actor"), config.optimizer)
        found = [(actor, build_schedule(actor, total, config.schedule))]
        if self.critics:
            weights = [p for name in self.critics for p in self.roles.trainable(f"{name}_critic")]
            options = replace(config.optimizer, lr=critic.lr, weight_decay=critic.weight_decay)
            critics = build_optimizer(weights, options)
            found.append((critics, build_schedule(critics, total, ScheduleConfig(critic.schedule, warmup_ratio=0.0))))
        return [{"optimizer": o, "lr_scheduler": {"scheduler": s}} for o, s in found]

    @property
    def signals(self) -> Signals:
        """Who scores, built at the first use; what one of several processes cannot build is trouble of all."""
        if self._signals is None:
            Processes.current().each(self._build_signals)
        assert self._signals is not None
        return self._signals

    def _build_signals(self) -> None:
        assert self.roles is not None
        self._signals = Signals(
            self.names,
            self.roles,
            self.config.scorers or {},
            batch_size=self.config.trainer.eval_batch_size,
            output_root=self.inputs.output_root,
            cache_dir=self.config.cache_dir,
            device=self.home,
        )

    @property
    def engine(self) -> Any:
        """Who samples."""
        if self._engine is None:
            roles, config = self.roles, self.config
            assert roles is not None and config.rollout is not None
            self._engine = build_engine(
                config.rollout,
                self.inputs.tokenizer,
                policy=lambda: roles.causal("actor"),
                folder=config.backbone.model,
                max_length=config.backbone.max_length,
            )
        return self._engine

    # -------------------------------------------------------------------------------------------- counting
    def _optimizers(self) -> list[torch.optim.Optimizer]:
        found: Any = self.optimizers(use_pl_optimizer=False)
        return list(found) if isinstance(found, list) else [found]

    def _schedules(self) -> list[Any]:
        found: Any = self.lr_schedulers()
        return list(found) if isinstance(found, list) else [found]

    def _finished(self, stats: dict[str, float]) -> None:
        """Count the rollout and log it."""
        self.rollouts += 1
        loop: Any = self.trainer.fit_loop.epoch_loop.manual_optimization
        loop.optim_step_progress.increment_ready()
        loop.optim_step_progress.increment_completed()
        named = {_metric_name(name, self.names[1:]): value for name, value in stats.items()}
        for logger in self.loggers:
            logger.log_metrics({f"train/{name}": value for name, value in named.items()}, step=self.rollouts)
        self.last_stats = named

    @property
    def note(self) -> str:
        """The last rollout in a few words, for the progress bar."""
        shown = [name for name in self.last_stats if name.split("_")[0] == "lambda" or name.startswith("mean_")]
        return ", ".join(f"{name.removeprefix('mean_')} {self.last_stats[name]:.3f}" for name in shown)

    # -------------------------------------------------------------------------------------------- checkpoint
    def trained_names(self) -> set[str]:
        """Keys of the state dict that training may change."""
        assert self.roles is not None
        return {f"roles.{name}" for name in self.roles.trained_state_dict()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Trained weights of all roles, and what the next rollout depends on beside them."""
        trained = self.trained_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["running"] = {
            "rollouts": self.rollouts,
            "constraint": self.constraint.state_dict(),
            "kl": self.kl.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            UserError: a checkpoint of other roles or another constraint.
        """
        missing = self.trained_names() - set(checkpoint["state_dict"])
        if missing:
            raise UserError(
                f"the checkpoint lacks {len(missing)} trained weights, such as {sorted(missing)[0]}",
                "resume",
                "resume=never starts afresh",
            )
        online = checkpoint["running"]
        self.rollouts = int(online["rollouts"])
        self.constraint.load_state_dict(online["constraint"])
        self.kl.load_state_dict(online["kl"])


def _metric_name(name: str, costs: Sequence[str]) -> str:
    """`violence/mean_cost` -> `mean_cost_violence`; of a cost that is just "cost", `mean_cost`."""
    cost, _, rest = name.partition("/")
    if not rest or cost not in costs:
        return name
    return rest if cost == "cost" else f"{rest}_{cost}"
