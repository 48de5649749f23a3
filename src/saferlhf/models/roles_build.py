"""Build the roles of a run: find and check their models, then load them."""

from __future__ import annotations

from saferlhf.errors import UserError
from saferlhf.models.role_sources import RolePlan
from saferlhf.models.roles import Roles
from saferlhf.models.roles_separate import build_separate
from saferlhf.models.roles_shared import build_shared, check_on_base, choose_base


def build_roles(plan: RolePlan) -> Roles:
    """All roles of a plan (`plan_roles`), in train mode.

    Raises:
        UserError: see `plan_roles`, `build_shared` and `load_backbone`.
    """
    return build_shared(plan) if plan.config.name == "shared" else build_separate(plan)


def check_plan(plan: RolePlan) -> None:
    """Refuse, before anything heavy loads, models that cannot share one base."""
    if plan.config.name == "shared":
        if plan.adapter.name != "lora":
            raise UserError("shared roles are adapters on one base", f"adapter={plan.adapter.name}", "use adapter=lora")
        base, prefix = choose_base(plan)
        check_on_base(plan, base, prefix)
