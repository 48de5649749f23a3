"""`roles=separate`: each role a model of its own.

With adapter=none every trained role trains all its weights; actor and critics start from whole models (adapters are
merged), the reference is a second copy. With adapter=lora a role whose model is an adapter on a base stored the same
way goes on training that adapter; any other model stays frozen under a fresh adapter, and then the actor without its
adapter is the reference: no second copy.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from saferlhf.config.roles_schema import CRITIC
from saferlhf.config.schema import AdapterConfig
from saferlhf.errors import UserError
from saferlhf.models.adapters import add_lora
from saferlhf.models.backbone import load_backbone
from saferlhf.models.causal import unwrapped
from saferlhf.models.heads import ScoreHead, build_heads
from saferlhf.models.layers import blocks_of
from saferlhf.models.loading import load_export
from saferlhf.models.role_sources import RolePlan, RoleSource, head_of, same_quantization
from saferlhf.models.roles import Role, Roles, as_trained
from saferlhf.models.score_model import ScoreModel, feature_width, hidden_size
from saferlhf.models.value_model import check_critic

VALUE_HEAD = "value"


def build_separate(plan: RolePlan) -> Roles:
    """Load every role's model."""
    actor = _actor(plan)
    reference = _reference(plan, actor)
    if reference.adapters is not None:  # the actor without its adapter: so the actor switches too
        actor = replace(actor, adapters=actor.module, adapter="default")
    roles = [actor, reference, *(_score(plan, name) for name in plan.scores)]
    roles += [_critic(plan, name) for name in plan.critics]
    modules = {f"{role.name}_model": role.module for role in roles if role is not reference}
    if reference.adapters is None:
        modules["reference_model"] = reference.module
    return Roles(roles, modules, checkpointing=plan.backbone.gradient_checkpointing)


def role_seed(seed: int, role: str) -> int:
    """The seed of a role's fresh adapter and head: equal in both kinds of roles."""
    return seed if role == "actor" else zlib.crc32(f"{seed} {role}".encode())


def describe_start(source: RoleSource | None, plan: RolePlan) -> str:
    """In words, where a role's weights come from."""
    if source is not None:
        return source.location.locator
    return plan.backbone.model or f"{plan.backbone.name}, random weights"


def value_head(plan: RolePlan, name: str, width: int) -> nn.ModuleDict:
    """The head of a critic: a copy of the score's that it starts from, or a fresh one.

    Args:
        name: of the score.
        width: F, of what the head reads.

    Raises:
        UserError: the copied head reads something else.
    """
    source, chosen = plan.critics[name], plan.heads.get(name + CRITIC)
    if source is None or chosen is None:
        return build_heads(width, {VALUE_HEAD: 1}, role_seed(plan.seed, name + CRITIC))
    weight, bias = head_of(source, chosen)
    if tuple(weight.shape) != (1, width):
        what = f"the head {chosen!r} reads {weight.shape[-1]} numbers, the model gives {width}"
        raise UserError(what, source.where, "export the model again")
    # a critic of a score is a critic of what the role reports: scale and all
    scale = plan.config.score(name).scale if source is plan.scores.get(name) else 1.0
    head = ScoreHead(width, 1)
    head.load_state_dict({"weight": weight * scale, "bias": bias * scale})
    return nn.ModuleDict({VALUE_HEAD: head})


def critic_on(plan: RolePlan, name: str, trunk: nn.Module) -> ScoreModel:
    """A critic that reads of a trunk what the model reads that it starts from."""
    source = plan.critics[name]
    metadata = None if source is None or name + CRITIC not in plan.heads else source.metadata
    layers = None if metadata is None else metadata.layers
    pooling = "last" if metadata is None else metadata.pooling or "last"
    heads = value_head(plan, name, feature_width(hidden_size(trunk), layers, "all"))
    model = ScoreModel(trunk, heads, pooling, layers=layers)
    check_critic(model, "" if source is None else source.where)
    return model


def critic_adapter(cfg: AdapterConfig, read: int | None) -> AdapterConfig:
    """The run's adapter without the blocks that a critic's head does not read.

    Args:
        read: the highest layer that the head reads; None: the last one there is.
    """
    if cfg.blocks is None or read is None:
        return cfg
    blocks = [block for block in cfg.blocks if block < read]
    if not blocks:
        what = f"a critic that reads layer {read} reads none of the blocks {cfg.blocks}"
        raise UserError(what, "adapter.blocks", "name lower blocks, or null")
    return replace(cfg, blocks=blocks)


def read_by(model: ScoreModel, learnt: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Of what a critic could learn with, what its head reads: weights above its highest layer never get a gradient."""
    trunk, layers = unwrapped(model.trunk), model.layers
    blocks = blocks_of(trunk)
    if layers is None or max(layers) >= len(blocks):
        return dict(learnt)
    above = {id(p) for block in list(blocks)[max(layers) :] for p in block.parameters()}
    # the final norm, and whatever else stands behind the blocks, is found by its place: not in them, not embeddings
    inside = {id(p) for block in blocks for p in block.parameters()}
    inside |= {id(p) for module in trunk.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    behind = {id(p) for p in trunk.parameters()} - inside
    return {name: p for name, p in learnt.items() if id(p) not in above | behind}


# ------------------------------------------------------------------------------------------------ the roles
def _goes_on(plan: RolePlan, source: RoleSource | None) -> bool:
    """Whether a role goes on training the adapter it starts from."""
    if plan.adapter.name != "lora" or source is None or not source.adapter:
        return False
    assert source.metadata is not None
    return same_quantization(plan.quantization, source.metadata.quantization)


def _backbone(plan: RolePlan, source: RoleSource | None, lm_head: bool) -> Any:
    init = None if source is None else source.location.locator
    return load_backbone(plan.backbone, init=init, lm_head=lm_head, **plan.loading)


def _saved(plan: RolePlan, source: RoleSource, trained: bool = False, dtype: str | None = None) -> Any:
    """A model as it was saved (its dtype may be another), frozen."""
    return load_export(
        source.location,
        output_root=plan.output_root,
        dtype=dtype,
        attention=plan.backbone.attention,
        cache_dir=plan.cache_dir,
        device=plan.device,
        gradient_checkpointing=trained and plan.backbone.gradient_checkpointing,
    ).model


def _actor(plan: RolePlan) -> Role:
    start = describe_start(plan.actor, plan)
    if _goes_on(plan, plan.actor):
        assert plan.actor is not None
        model = _saved(plan, plan.actor, trained=True, dtype=plan.backbone.dtype)
        return as_trained(Role("actor", model, start=start), _adapter_weights(model))
    model = _backbone(plan, plan.actor, lm_head=True)
    if plan.adapter.name == "lora":
        model = add_lora(model, plan.adapter, seed=role_seed(plan.seed, "actor"))
    return as_trained(Role("actor", model, start=start), _learnt(model))


def _reference(plan: RolePlan, actor: Role) -> Role:
    source = plan.reference or plan.actor
    start = describe_start(source, plan)
    same = plan.reference is None or (plan.actor is not None and plan.reference.content_id == plan.actor.content_id)
    if same and plan.adapter.name == "lora" and not _goes_on(plan, plan.actor):
        return Role("reference", actor.module, adapters=actor.module, adapter=None, start=start)
    # the same way as the actor, to the last bit: otherwise they would differ before the first step
    if source is not None and _goes_on(plan, source):
        model = _saved(plan, source, dtype=plan.backbone.dtype)
    else:
        model = _backbone(plan, source, lm_head=True)
    return Role("reference", model.eval().requires_grad_(False), start=start)


def _score(plan: RolePlan, name: str) -> Role:
    source = plan.scores[name]
    # an export keeps the dtype that it was trained and measured with
    model = _saved(plan, source, dtype=plan.backbone.dtype if source.metadata is None else None)
    return Role(
        name,
        model,
        head=plan.heads[name],
        scale=plan.config.score(name).scale,
        start=f"{source.location.locator}, head {plan.heads[name]}",
    )


def _critic(plan: RolePlan, name: str) -> Role:
    source, role = plan.critics[name], name + CRITIC
    goes_on = _goes_on(plan, source) and role in plan.heads
    if goes_on:
        assert source is not None
        trunk = _saved(plan, source, trained=True, dtype=plan.backbone.dtype).trunk
        trunk.train()
    else:
        trunk = _backbone(plan, source or plan.actor, lm_head=False)
    layers = source.metadata.layers if source is not None and source.metadata is not None else None
    if plan.adapter.name == "lora" and not goes_on:
        read = max(layers) if layers and role in plan.heads else None
        trunk = add_lora(trunk, critic_adapter(plan.adapter, read), seed=role_seed(plan.seed, role), read=read)
    model = critic_on(plan, name, trunk)
    weights = read_by(model, _adapter_weights(trunk) if goes_on else _learnt(trunk))
    trunk.requires_grad_(False)
    learnt = {**weights, **{f"head.{key}": p for key, p in model.heads.named_parameters()}}
    head = f"head {plan.heads[role]}" if role in plan.heads else "fresh head"
    start = f"{describe_start(source or plan.actor, plan)}, {head}"
    return as_trained(Role(role, model, head=VALUE_HEAD, start=start), learnt)


def _learnt(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
