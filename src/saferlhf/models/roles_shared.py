"""`roles=shared`: one frozen base for all roles, each a LoRA adapter (and a head) on it.

Which base? The one that the reward and cost adapters were trained on:

    SFT run           reward and cost trained on     base                  reference       actor starts as
    adapter on B      B                              B                     SFT adapter     a copy of it
    adapter on B      the SFT run (init=)            B with SFT merged     no adapter      a fresh adapter
    whole model F     F                              F                     no adapter      a fresh adapter

Adapters of different bases cannot be told from their shapes, and one on a wrong base still gives numbers; so every
adapter's base is compared by content, and its storage (nf4 or not), and refused where it differs. "No adapter" is the
reference only where the supervised model is what the base holds (trap 21 of docs/architecture.md).

Critics start from copies of the reward's and costs' adapters and heads. Six roles of a 7B model in 4 bit are one base
and some adapters: what lets PPO-Lagrangian fit one GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from saferlhf.config.roles_schema import CRITIC
from saferlhf.config.schema import AdapterConfig, QuantizationConfig
from saferlhf.errors import UserError
from saferlhf.models.adapters import add_lora, add_saved_lora
from saferlhf.models.backbone import load_backbone
from saferlhf.models.causal import unwrapped
from saferlhf.models.heads import build_loaded_heads, read_heads
from saferlhf.models.kernel_map import KernelMap, kernel_names
from saferlhf.models.layers import blocks_of
from saferlhf.models.loading import base_source, stored_backbone
from saferlhf.models.role_sources import RolePlan, RoleSource, base_id, embedded_id, same_quantization
from saferlhf.models.roles import Role, Roles, as_trained
from saferlhf.models.roles_separate import VALUE_HEAD, critic_adapter, critic_on, describe_start, read_by, role_seed
from saferlhf.models.score_model import ScoreModel, feature_width, hidden_size
from saferlhf.models.source import Source, find_source


@dataclass(frozen=True)
class Base:
    """The base that all roles share.

    Attributes:
        source: where it is.
        identity: by content, comparable with `base_id`.
        merged: True where it is the actor's model itself; False where the actor starts as an adapter on it.
    """

    source: Source
    identity: str
    merged: bool


def build_shared(plan: RolePlan) -> Roles:
    """Load the base, then every role's adapter and head.

    Raises:
        UserError: no adapters asked for, or a model that is not an adapter on this base.
    """
    if plan.adapter.name != "lora":
        raise UserError("shared roles are adapters on one base", f"adapter={plan.adapter.name}", "use adapter=lora")
    base, prefix = choose_base(plan)
    check_on_base(plan, base, prefix)
    return _Builder(plan, base).roles()


def choose_base(plan: RolePlan) -> tuple[Base, str]:
    """The base, and the causal model's `base_model_prefix`, which trunks leave out of their weights' names."""
    prefix = _prefix(plan)
    others = [source for source in _others(plan) if source.on_base]
    wanted = base_id(others[0], prefix) if others else None
    actor, backbone = plan.actor, plan.backbone
    if actor is not None and actor.adapter:
        below = base_id(actor, prefix)
        if wanted in (None, below):
            assert actor.metadata is not None
            cfg = stored_backbone(actor.metadata)
            found = base_source(actor.folder, actor.metadata, cfg, plan.cache_dir, plan.output_root)
            return Base(found, below, merged=False), prefix
    init = None if actor is None else actor.location.locator
    source = find_source(backbone, init=init, output_root=plan.output_root, cache_dir=plan.cache_dir, seed=plan.seed)
    identity = source.content_id
    if wanted is not None and wanted.startswith("embedded-") and source.kind == "folder":
        # an adapter that brought its base along: the same weights may lie here
        assert source.location is not None and source.location.folder is not None
        identity = embedded_id(source.location.folder, prefix)
    return Base(source, identity, True), prefix


def check_on_base(plan: RolePlan, base: Base, prefix: str) -> None:
    """Refuse every model that is not an adapter on the base, stored the way the run stores it."""
    actor = [] if plan.actor is None or base.merged else [plan.actor]
    for source in [*actor, *_others(plan)]:
        name = source.location.locator
        if base.merged and plan.actor is not None and source.content_id == plan.actor.content_id:
            continue  # the base itself
        if not source.on_base:
            raise UserError(
                f"{name!r} is a whole model of its own, not an adapter on the base that shared roles have",
                source.where,
                "train it with adapter=lora on that base, or use roles=separate",
            )
        found = base_id(source, prefix)
        if found != base.identity:
            raise UserError(
                f"{name!r} was trained on another base ({found}) than the shared one ({base.identity})",
                source.where,
                "train all on the same backbone, or on init=<the same SFT run>; or use roles=separate",
            )
        assert source.metadata is not None
        if not same_quantization(plan.quantization, source.metadata.quantization):
            stored = QuantizationConfig(**(source.metadata.quantization or {"name": "none"}))
            raise UserError(
                f"{name!r} was trained on a base stored as {_storage(stored)}, this run stores it as"
                f" {_storage(plan.quantization)}",
                source.where,
                f"use quantization={stored.name}, or train it again",
            )


def _storage(cfg: QuantizationConfig) -> str:
    return cfg.name if cfg.name == "none" else f"{cfg.name} (double_quant={str(cfg.double_quant).lower()})"


def _others(plan: RolePlan) -> list[RoleSource]:
    """All models but the actor's, scores first."""
    own = [plan.reference, *plan.critics.values()]
    return [*plan.scores.values(), *(source for source in own if source is not None)]


def _prefix(plan: RolePlan) -> str:
    """`base_model_prefix` of the base's architecture, from its configuration alone."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    for source in [plan.actor, *_others(plan)]:
        embedded = source is not None and source.metadata is not None and source.metadata.base["kind"] == "embedded"
        if source is None or not embedded:
            continue
        folder = source.folder / "base" if source.on_base else source.folder
        config = AutoConfig.from_pretrained(str(folder))
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            return str(causal.base_model_prefix)
    return "model"


# ------------------------------------------------------------------------------------------------ building
class _Builder:
    """Puts adapters on the base one by one."""

    def __init__(self, plan: RolePlan, base: Base) -> None:
        self.plan, self.base = plan, base
        cfg = plan.backbone
        if plan.actor is not None and plan.actor.metadata is not None and not base.merged:
            # where the base is found and how it is read are the adapter's business, the rest is the run's
            stored = stored_backbone(plan.actor.metadata)
            cfg = replace(stored, dtype=cfg.dtype, attention=cfg.attention, max_length=cfg.max_length,
                          gradient_checkpointing=cfg.gradient_checkpointing)  # fmt: skip
        self.plain = load_backbone(cfg, source=base.source, lm_head=True, **plan.loading)
        self.trunk = unwrapped(self.plain).base_model
        self.linear = linear_names(self.plain)
        self.peft: Any = self.plain
        self.modules: dict[str, nn.Module] = {}

    def roles(self) -> Roles:
        """All roles of the plan."""
        plan = self.plan
        actor = self._policy("actor", plan.actor)
        roles = [actor, self._policy("reference", plan.reference or plan.actor)]
        roles += [self._score(name) for name in plan.scores]
        roles += [self._critic(name) for name in plan.critics]
        self.peft.requires_grad_(False)
        trained = []
        for role in roles:
            if role.name == "actor" or role.name.endswith(CRITIC):
                learnt = {n: p for n, p in self.peft.named_parameters() if _belongs(n, role.name)}
                if isinstance(role.module, ScoreModel):
                    learnt = read_by(role.module, learnt)
                    learnt |= {f"heads.{n}": p for n, p in role.module.heads.named_parameters()}
                role = as_trained(role, learnt)
            trained.append(replace(role, adapters=self.peft))
        self.modules = {"base": self.peft, **self.modules}
        return Roles(trained, self.modules, checkpointing=plan.backbone.gradient_checkpointing)

    def _is_base(self, source: RoleSource | None) -> bool:
        """Whether a model is the base itself."""
        if source is None or not self.base.merged:
            return False
        return self.plan.actor is not None and source.content_id == self.plan.actor.content_id

    def _put(self, role: str, source: RoleSource | None, fresh: bool, read: int | None = None) -> str | None:
        """Put a role's adapter on the base; its name, or None where the role runs on the base alone.

        Args:
            source: where the role starts; None: where the actor starts.
            fresh: a role that learns gets a fresh adapter where it starts without one.
            read: see `add_lora`.
        """
        source = source or self.plan.actor
        if source is not None and source.adapter and not self._is_base(source):
            self.peft = add_saved_lora(self.peft, source.folder, name=role)
            return role
        if not fresh:
            return None
        cfg = self._fresh_config(read)
        self.peft = add_lora(self.peft, cfg, name=role, seed=role_seed(self.plan.seed, role))
        return role

    def _fresh_config(self, read: int | None) -> AdapterConfig:
        """The run's adapter, its modules named one by one where not all blocks get one."""
        cfg = critic_adapter(self.plan.adapter, read)
        if cfg.blocks is None and read is None:
            return cfg
        if isinstance(cfg.target_modules, str) and cfg.target_modules != "all-linear":
            what = f"{cfg.target_modules!r} names modules by a pattern"
            raise UserError(what, "adapter.target_modules", "all-linear, or a list of names")
        count = len(blocks_of(self.trunk))
        chosen = cfg.blocks if cfg.blocks is not None else range(count if read is None else read)
        wanted = None if isinstance(cfg.target_modules, str) else [f".{target}" for target in cfg.target_modules]
        names = [
            name
            for block in chosen
            for name in self.linear.get(block, ())
            if wanted is None or any(f".{name}".endswith(target) for target in wanted)
        ]
        if not names:
            raise UserError("LoRA fits no layer of these blocks", "adapter", "name blocks and layers of this backbone")
        return replace(cfg, target_modules=names, blocks=None)

    def _policy(self, role: str, source: RoleSource | None) -> Role:
        adapter = self._put(role, source, fresh=role == "actor")
        return Role(role, self.peft, adapter=adapter, start=self._start(source, adapter, role))

    def _score(self, name: str) -> Role:
        source, head = self.plan.scores[name], self.plan.heads[name]
        metadata = source.metadata
        assert metadata is not None
        adapter = self._put(name, source, fresh=False)
        tensors = read_heads(source.folder, metadata.heads, kernel_names(metadata.kernel))
        span = metadata.span or "all"
        width = feature_width(hidden_size(self.trunk), metadata.layers, span)
        kernel = KernelMap.load(tensors, width, source.folder) if metadata.kernel else None
        sizes = width if kernel is None else kernel.width
        heads = build_loaded_heads(tensors, metadata.heads, sizes, source.folder).requires_grad_(False)
        view = ScoreModel(
            self.trunk, heads, metadata.pooling or "last", layers=metadata.layers, span=span, kernel=kernel
        )
        self.modules[f"{name}_heads"] = heads
        if kernel is not None:
            self.modules[f"{name}_kernel"] = kernel
        scale, start = self.plan.config.score(name).scale, self._start(source, adapter, name, head)
        return Role(name, view, adapter=adapter, head=head, scale=scale, start=start)

    def _critic(self, name: str) -> Role:
        role, source = name + CRITIC, self.plan.critics[name]
        layers = source.metadata.layers if source is not None and source.metadata is not None else None
        read = max(layers) if layers and role in self.plan.heads else None
        adapter = self._put(role, source, fresh=True, read=read)
        view = critic_on(self.plan, name, self.trunk)
        self.modules[f"{role}_heads"] = view.heads
        start = self._start(source, adapter, role, self.plan.heads.get(role, "fresh"))
        return Role(role, view, adapter=adapter, head=VALUE_HEAD, start=start)

    def _start(self, source: RoleSource | None, adapter: str | None, role: str, head: str | None = None) -> str:
        start = describe_start(source or self.plan.actor, self.plan)
        saved = source if source is not None else self.plan.actor
        copied = saved is not None and saved.adapter and not self._is_base(saved)
        how = "no adapter" if adapter is None else "its adapter" if copied else "fresh adapter"
        return f"{start}, {how}" + (f", head {head}" if head else "")


def _belongs(name: str, adapter: str) -> bool:
    return ".lora_" in name and f".{adapter}." in name


def linear_names(model: nn.Module) -> dict[int, Sequence[str]]:
    """Block number -> full names of its linear layers, before any adapter is there."""
    from transformers.pytorch_utils import Conv1D

    numbers = {id(block): number for number, block in enumerate(blocks_of(unwrapped(model).base_model))}
    return {
        numbers[id(block)]: [
            f"{path}.{name}" for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))
        ]
        for path, block in model.named_modules()
        if id(block) in numbers
    }
