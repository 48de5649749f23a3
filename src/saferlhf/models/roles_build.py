"""Build the roles of a run: find and check their models, then load them."""

from __future__ import annotations

from saferlhf.config.roles_schema import CRITIC
from saferlhf.errors import UserError
from saferlhf.models.role_sources import RolePlan
from saferlhf.models.roles import Roles
from saferlhf.models.roles_separate import build_separate, describe_start
from saferlhf.models.roles_shared import build_shared, check_on_base, choose_base


def build_roles(plan: RolePlan) -> Roles:
    """All roles of a plan (`plan_roles`), in train mode.

    Raises:
        UserError: see `plan_roles`, `build_shared` and `load_backbone`.
    """
    return build_shared(plan) if plan.config.name == "shared" else build_separate(plan)


def planned_starts(plan: RolePlan) -> list[tuple[str, str]]:
    """Each role and where its weights will come from, in words; loads nothing."""
    scores = [(name, describe_start(source, plan)) for name, source in plan.scores.items()]
    critics = [(name + CRITIC, describe_start(source or plan.actor, plan)) for name, source in plan.critics.items()]
    return [
        ("actor", f"trained, {describe_start(plan.actor, plan)}"),
        ("reference", describe_start(plan.reference or plan.actor, plan)),
        *scores,
        *((name, f"trained, {start}") for name, start in critics),
    ]


def check_plan(plan: RolePlan) -> None:
    """Refuse, before anything heavy loads, models that cannot share one base."""
    if plan.config.name == "shared":
        if plan.adapter.name != "lora":
            raise UserError("shared roles are adapters on one base", f"adapter={plan.adapter.name}", "use adapter=lora")
        base, prefix = choose_base(plan)
        check_on_base(plan, base, prefix)
