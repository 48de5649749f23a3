"""The structured configuration of `roles=`: who plays the six roles of online training; see `schema.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Optional

from saferlhf.config.marks import CONTENT
from saferlhf.errors import UserError

CRITIC = "_critic"
"""The critic of the score role `x` is the role `x_critic`."""

RESERVED = ("actor", "reference", "reward")

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass
class PolicyRoleConfig:
    """A language model: the actor or the reference."""

    # any Locator; actor: null = init=, reference: null = the actor's
    model: Optional[str] = field(default=None, metadata=CONTENT)


@dataclass
class ScoreRoleConfig:
    """A frozen model that scores whole responses: the reward, or one of the costs."""

    # any Locator; null: this score comes from a scorer, not from a model of ours
    model: Optional[str] = field(default=None, metadata=CONTENT)
    head: Optional[str] = None  # which score of the model; null: the only one, or the one of that name
    scale: float = 1.0  # the score is multiplied by it; -1 turns a sign


@dataclass
class CriticRoleConfig:
    """A trained value function of one score."""

    # any Locator; null: starts from the model it is the critic of, and from the actor's where that is none
    model: Optional[str] = field(default=None, metadata=CONTENT)
    head: Optional[str] = None  # which score of the model the value head starts from; null: as for the score


@dataclass
class RolesConfig:
    """separate: each role a model of its own | shared: one frozen base with an adapter and a head for each role."""

    name: str
    actor: PolicyRoleConfig = field(default_factory=PolicyRoleConfig)
    reference: PolicyRoleConfig = field(default_factory=PolicyRoleConfig)
    reward: ScoreRoleConfig = field(default_factory=ScoreRoleConfig)
    cost: ScoreRoleConfig = field(default_factory=ScoreRoleConfig)
    reward_critic: CriticRoleConfig = field(default_factory=CriticRoleConfig)
    cost_critic: CriticRoleConfig = field(default_factory=CriticRoleConfig)
    # several named costs instead of `cost`: name -> model, and name -> where its critic starts
    costs: dict[str, ScoreRoleConfig] = field(default_factory=dict)
    cost_critics: dict[str, CriticRoleConfig] = field(default_factory=dict)

    def cost_names(self) -> tuple[str, ...]:
        """Names of the costs that models score: those of `costs`, else `cost` where it has a model."""
        return tuple(self.costs) or (("cost",) if self.cost.model else ())

    def score(self, name: str) -> ScoreRoleConfig:
        """Of `reward` or of the cost of that name; empty for a score that no model gives."""
        if name == "reward":
            return self.reward
        return self.costs.get(name, self.cost if name == "cost" else ScoreRoleConfig())

    def critic(self, name: str) -> CriticRoleConfig:
        """Of the critic of `reward` or of the cost of that name."""
        if name == "reward":
            return self.reward_critic
        return self.cost_critics.get(name, self.cost_critic if name == "cost" else CriticRoleConfig())


def check_roles(config: RolesConfig) -> None:
    """Refuse what cannot be meant, before anything loads.

    Raises:
        UserError: an unknown kind, an impossible name, `cost` beside `costs`, or a scale of zero.
    """
    if config.name not in ("separate", "shared"):
        raise UserError(f"'{config.name}' is not possible", "roles.name", "choose one of: separate | shared")
    if config.costs and (config.cost.model or config.cost_critic.model):
        what = "roles.cost and roles.costs exclude each other"
        raise UserError(what, "roles", "name all costs in roles.costs, and their critics in roles.cost_critics")
    for name in config.costs:
        # adapters are named after roles, and peft tells its own parts by "lora_"
        own = name in RESERVED or name.endswith(CRITIC) or "lora_" in name or name in "lora_"
        if own or not _NAME.fullmatch(name):
            mend = "letters, digits and _; not actor, reference, reward, ..._critic or lora_..."
            raise UserError(f"a cost cannot be named {name!r}", "roles.costs", mend)
        if not config.costs[name].model:
            raise UserError(f"the cost {name!r} has no model", f"roles.costs.{name}.model", "name a cost model")
    for name in ("reward", "cost", *config.costs):
        if config.score(name).scale == 0:
            where = f"roles.{name}.scale" if name in ("reward", "cost") else f"roles.costs.{name}.scale"
            raise UserError("a score times zero is no score", where, "1, or -1 to turn its sign")
