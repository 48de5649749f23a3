"""The memory plan as lines of the plan's table."""

from __future__ import annotations

from collections.abc import Sequence

from saferlhf.config.schema import TrainConfig
from saferlhf.run.memory.plan import GIB, MemoryPlan
from saferlhf.run.memory.remedies import in_gib, remedies_for

Lines = list[tuple[str, str]]


def memory_rows(config: TrainConfig, plan: MemoryPlan, *, vocabulary_size: int | None = None) -> Lines:
    """Parameters, bytes of each role and of each phase, tokens, and whether a GPU of `plan.gpu` GiB is enough."""
    return [
        *_parameters(plan),
        *_roles(plan),
        *_phases(plan),
        *_tokens(plan),
        *_verdict(config, plan, vocabulary_size),
    ]


def _parameters(plan: MemoryPlan) -> Lines:
    trained = sum(role.trained_count for role in plan.roles)
    return [("parameters", f"{trained:,} trained, {sum(role.count for role in plan.roles) - trained:,} frozen")]


def _roles(plan: MemoryPlan) -> Lines:
    spread = "" if plan.devices == 1 else f" of {plan.devices}, strategy {plan.strategy}"
    lines = [("memory", f"GiB on one {plan.device}{spread}")]
    lines.append(("", _line(("weights", "gradients", "optimizer"))))
    for role in plan.roles:
        lines.append((f"  {role.name}", _line([in_gib(n) for n in (role.weights, role.gradients, role.optimizer)])))
    return lines


def _phases(plan: MemoryPlan) -> Lines:
    heads = ("weights+opt", "gradients", "activations", "logits", "KV cache", "other", "sum")
    lines = [("", _line(heads))]
    for phase in plan.phases:
        sizes = (
            phase.resident,
            phase.gradients,
            phase.activations,
            phase.logits,
            phase.cache,
            phase.other,
            phase.total,
        )
        lines.append((f"  {phase.name}", _line([in_gib(n) for n in sizes])))
    before = sum(role.weights + role.gradients + role.optimizer for role in plan.roles)
    text = f"{in_gib(plan.peak)} GiB, in the {plan.highest.name} phase; {in_gib(before)} GiB of it before activations"
    if plan.host:
        text += f"; {in_gib(plan.host)} GiB of optimizer states in the host's memory"
    lines.append(("peak", text))
    if plan.published is not None:
        lines.append(("", f"published scheme (float32 master weights): {plan.published / 1e9:.0f} GB"
                          f" ({plan.published / GIB:.0f} GiB) before activations, over all devices"))  # fmt: skip
    return lines


def _tokens(plan: MemoryPlan) -> Lines:
    work = plan.workload
    if work.steps is None or work.tokens_per_step is None:
        return []
    each = work.tokens_per_step
    return [("tokens", f"{each:,.0f} per step, {each * work.steps:,.0f} in {work.steps:,} steps")]


def _verdict(config: TrainConfig, plan: MemoryPlan, vocabulary_size: int | None) -> Lines:
    """Whether it fits, and if not, what to do about it."""
    gib = config.plan.gpu
    if gib is None:
        return []
    left = gib - plan.peak / GIB
    if plan.fits(gib):
        return [(f"{gib:g} GiB", f"fits: {left:.1f} GiB are left")]
    lines = [(f"{gib:g} GiB", f"does not fit: {-left:.1f} GiB too much. In this order, each with those before it:")]
    found = remedies_for(config, plan, gib, workload=plan.workload, vocabulary_size=vocabulary_size)
    for number, remedy in enumerate(found, 1):
        lines.append(("", f"{number}. {remedy.words}: {in_gib(remedy.peak)} GiB{', fits' if remedy.fits else ''}"))
    if not any(remedy.fits for remedy in found):
        lines.append(("", "that is not enough: fewer tokens (backbone.max_length) or a smaller backbone"))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>12}" for cell in cells)
