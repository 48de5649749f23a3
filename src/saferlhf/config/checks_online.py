"""What an online task needs of the other groups, and who gives its scores; see `checks.py`."""

from __future__ import annotations

from saferlhf.config.online_checks import check_online
from saferlhf.config.online_schema import PpoConfig
from saferlhf.config.roles_schema import RESERVED, check_roles
from saferlhf.config.rollout_schema import TruthJudgeConfig, check_rollout
from saferlhf.config.schema import TrainConfig
from saferlhf.errors import UserError

ONLINE_GROUPS = ("constraint", "advantage", "roles", "rollout", "scorers")


def signals_of(config: TrainConfig) -> tuple[str, ...]:
    """Scores of an online run: "reward", then the costs; of a role, or of a scorer."""
    assert config.roles is not None
    costs = [*config.roles.cost_names(), *(name for name in config.scorers or {} if name != "reward")]
    return ("reward", *dict.fromkeys(costs))


def check_online_run(config: TrainConfig) -> None:
    """Refuse online groups without an online task, and an online task without what it needs.

    Raises:
        UserError: one line each.
    """
    if not isinstance(config.task, PpoConfig):
        for group in ONLINE_GROUPS:
            if getattr(config, group) is not None:
                what = f"task={config.task.name} samples nothing"
                raise UserError(what, group, "leave it out, or choose task=ppo or task=ppo_lag")
        return
    for group in ("constraint", "advantage", "roles", "rollout"):
        if getattr(config, group) is None:
            raise UserError(f"task={config.task.name} needs it", group, f"choose one of conf/{group}")
    assert config.roles is not None and config.rollout is not None
    check_roles(config.roles)
    check_rollout(config.rollout)
    check_online(config.task, config.advantage, config.constraint, samples=config.rollout.samples)
    _check_scores(config)
    _check_policy(config)


def _check_scores(config: TrainConfig) -> None:
    roles, scorers = config.roles, config.scorers or {}
    assert roles is not None
    for name, signal in scorers.items():
        if roles.score(name).model:
            what = f"both a role and a scorer give the {name!r}"
            raise UserError(what, f"scorers.{name}", "name one of them")
        if name in RESERVED and name != "reward":
            raise UserError(f"a cost cannot be named {name!r}", "scorers", "another name, as cost")
        if signal.scale == 0:
            raise UserError("a score times zero is no score", f"scorers.{name}.scale", "1, or -1 to turn its sign")
        if isinstance(signal.judge, TruthJudgeConfig) and config.data.source != "toyworld":
            what = f"the truth is known of the toy world only, not of data={config.data.name}"
            raise UserError(what, f"scorers.{name}", "name another scorer")
    if not roles.reward.model and "reward" not in scorers:
        mend = "roles.reward.model=LOCATOR, or 'scorers={reward: {kind: function, ...}}'"
        raise UserError("nobody gives rewards", "roles.reward.model", mend)
    if config.constraint.name != "none" and len(signals_of(config)) < 2:
        mend = "roles.cost.model=LOCATOR, 'scorers={cost: {...}}', or constraint=none"
        raise UserError(f"constraint={config.constraint.name} has no cost to constrain", "roles.cost.model", mend)


def _check_policy(config: TrainConfig) -> None:
    assert config.roles is not None and config.rollout is not None
    if config.backbone.architecture is not None and not (config.init or config.roles.actor.model):
        mend = "init=LOCATOR of a run of task=sft"
        raise UserError("a policy with random weights has nothing to say", "init", mend)
    new, longest = config.rollout.new_tokens, config.backbone.max_length
    if new + (config.rollout.max_prompt_tokens or 1) > longest:
        what = f"prompt and {new} new tokens do not fit into {longest}"
        raise UserError(what, "rollout.max_new_tokens", "a smaller one, or a larger backbone.max_length")
