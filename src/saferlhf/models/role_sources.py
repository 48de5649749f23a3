"""Who plays which role: from the configuration to models that are found, checked against each other, not yet loaded.

Everything that can be refused is refused here, before gigabytes are read: a tokenizer or chat format that is not the
actor's, a cost model in the reward's place, a score that a model does not have, a critic that cannot be read token by
token. Roles read the actor's token ids as they are; a model with another tokenizer can still judge, as a scorer that
reads text, but it cannot be a role.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from saferlhf.config.roles_schema import CRITIC, RolesConfig, check_roles
from saferlhf.config.schema import AdapterConfig, BackboneConfig, QuantizationConfig
from saferlhf.errors import UserError
from saferlhf.models.export import BASE_FOLDER
from saferlhf.models.foreign_scores import ForeignScores, find_foreign_scores, foreign_heads
from saferlhf.models.heads import read_heads
from saferlhf.models.kernel_map import kernel_names
from saferlhf.models.loading import plain_backbone, stored_backbone
from saferlhf.models.locator import Location, content_id_of, resolve
from saferlhf.models.metadata import ExportMetadata, read_metadata
from saferlhf.models.tokenizer import load_tokenizer

AS_SCORER = "use a model of the actor's family, or let it judge as a scorer"


@dataclass(frozen=True)
class RoleSource:
    """A model that a role starts from.

    Attributes:
        where: the configuration key that named it, for messages.
        location: where it is.
        content_id: its identity by content.
        metadata: of an export; None for any other model.
        foreign: where the scores of a score model of somebody else's are; None for any other.
    """

    where: str
    location: Location
    content_id: str
    metadata: ExportMetadata | None = None
    foreign: ForeignScores | None = None

    @property
    def adapter(self) -> bool:
        """True for an export that holds an adapter, to be loaded on its base."""
        return self.metadata is not None and self.metadata.weights == "adapter"

    @property
    def on_base(self) -> bool:
        """True for an export that is nothing without its base: an adapter, or heads alone."""
        return self.metadata is not None and self.metadata.weights in ("adapter", "base")

    @property
    def folder(self) -> Path:
        """Of an export."""
        assert self.location.folder is not None
        return self.location.folder

    def head_names(self) -> list[str]:
        """Names of its scores; empty for a language model."""
        if self.foreign is not None:
            return list(foreign_heads(self.foreign))
        return [] if self.metadata is None else list(self.metadata.heads)


@dataclass(frozen=True)
class RolePlan:
    """All that is needed to build the roles.

    Attributes:
        config: `roles`.
        backbone, quantization, adapter: of the run.
        tokenizer: the actor's.
        actor: where it starts; None: from `backbone` itself.
        reference: None: where the actor starts.
        scores: name -> model, for the scores that a model gives.
        critics: score name -> model that its critic starts from; None: where the actor starts.
        heads: role name -> head of its model; absent: a fresh value head.
        seed, output_root, cache_dir, device: see `load_backbone`.
    """

    config: RolesConfig
    backbone: BackboneConfig
    quantization: QuantizationConfig
    adapter: AdapterConfig
    tokenizer: Any
    actor: RoleSource | None
    reference: RoleSource | None
    scores: dict[str, RoleSource]
    critics: dict[str, RoleSource | None]
    heads: dict[str, str]
    seed: int = 0
    output_root: Path | str = "outputs"
    cache_dir: Path | str | None = None
    device: torch.device | str | None = None

    @property
    def loading(self) -> dict[str, Any]:
        """What `load_backbone` is told for every role alike."""
        return {
            "quantization": self.quantization,
            "vocabulary_size": len(self.tokenizer),
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "seed": self.seed,
            "cache_dir": self.cache_dir,
            "output_root": self.output_root,
            "device": self.device,
        }


def plan_roles(
    config: RolesConfig,
    *,
    backbone: BackboneConfig,
    quantization: QuantizationConfig,
    adapter: AdapterConfig,
    tokenizer: Any,
    init: str | None = None,
    signals: Sequence[str] = ("reward", "cost"),
    critics: bool = True,
    seed: int = 0,
    output_root: Path | str = "outputs",
    cache_dir: Path | str | None = None,
    device: torch.device | str | None = None,
) -> RolePlan:
    """Find and check the models of all roles; loads tokenizers and heads, but no backbones.

    Args:
        config: `roles`.
        backbone, quantization, adapter: of the run; the actor's.
        tokenizer: the actor's.
        init: where the actor starts, if `roles.actor.model` does not say.
        signals: the scores in use: "reward", "cost" or names of several costs. One without a model comes from a scorer.
        critics: whether each signal has a critic.
        seed: of fresh adapters and heads.
        output_root, cache_dir, device: see `load_backbone`.

    Raises:
        UserError: see the module.
    """
    check_roles(config)
    for name in (*config.costs, *config.cost_critics):
        if name not in signals:
            raise UserError(f"the cost {name!r} is not in use", "roles", f"in use: {', '.join(signals)}")
    if init and config.actor.model and init != config.actor.model:
        raise UserError("init and roles.actor.model differ", "roles.actor.model", "give one of them")

    def found(where: str, locator: str | None) -> RoleSource | None:
        return None if not locator else find_role(where, locator, output_root=output_root, cache_dir=cache_dir)

    actor = found("roles.actor.model" if config.actor.model else "init", config.actor.model or init)
    reference = found("roles.reference.model", config.reference.model)
    scores: dict[str, RoleSource] = {}
    starts: dict[str, RoleSource | None] = {}
    heads: dict[str, str] = {}
    for name in signals:
        model, critic = config.score(name), config.critic(name)
        source = found(_key(name), model.model)
        if source is not None:
            scores[name], heads[name] = source, choose_head(source, name, model.head)
        if critics:
            own = found(_key(name, critic=True), critic.model)
            starts[name] = start = own or source
            wanted = critic.head or (model.head if own is None else None)
            if start is not None and start.head_names():
                heads[name + CRITIC] = choose_head(start, name, wanted)
                _check_readable(start)
    for source in (actor, reference):
        if source is not None and source.head_names():
            kind = source.metadata.kind if source.metadata is not None else "score"
            raise UserError(f"a {kind} model writes no text", source.where, "name a run of task=sft or a causal LM")
    for source in {s.where: s for s in (reference, *scores.values(), *starts.values()) if s is not None}.values():
        _check_text(source, backbone, tokenizer, output_root, cache_dir)
    return RolePlan(
        config, backbone, quantization, adapter, tokenizer, actor, reference, scores, starts, heads,
        seed, output_root, cache_dir, device,
    )  # fmt: skip


def _key(name: str, critic: bool = False) -> str:
    if name in ("reward", "cost"):
        return f"roles.{name}{CRITIC if critic else ''}.model"
    return f"roles.cost{'_critics' if critic else 's'}.{name}.model"


def find_role(
    where: str, locator: str, *, output_root: Path | str = "outputs", cache_dir: Path | str | None = None
) -> RoleSource:
    """Find the model that a role names."""
    location = resolve(locator, output_root=output_root)
    content_id = content_id_of(location, output_root=output_root, cache_dir=cache_dir)
    if location.kind == "export":
        assert location.folder is not None
        return RoleSource(where, location, content_id, metadata=read_metadata(location.folder))
    return RoleSource(where, location, content_id, foreign=find_foreign_scores(location))


def choose_head(source: RoleSource, name: str, wanted: str | None) -> str:
    """Which of a model's scores plays the reward or a cost.

    Args:
        source: the model.
        name: "reward", or the name of a cost.
        wanted: the configured head; None: the only one, else the one named for the role (for costs: unsafe too).

    Raises:
        UserError: no scores, no such score, several without a choice, a vector, or a cost in the reward's place (and
            the other way round) that was not asked for by name.
    """
    names = source.head_names()
    sizes = {} if source.metadata is None else source.metadata.heads
    single = [head for head in names if sizes.get(head, 1) == 1]
    where = source.where
    if not names:
        raise UserError(f"{source.location.locator!r} gives no scores", where, "name a reward or cost model")
    key = where.removesuffix("model") + "head"
    if wanted is not None:
        if wanted not in single:
            what = f"the model has no single score {wanted!r}"
            raise UserError(what, key, f"choose one of: {' | '.join(single)}" if single else "name another model")
        return wanted
    kind = source.metadata.kind if source.metadata is not None else source.foreign.kind if source.foreign else ""
    role = "reward" if name == "reward" else "cost"
    if {kind, role} == {"reward", "cost"}:
        what = f"a {kind} model in the place of a {role} model: its sign is the other way round"
        raise UserError(what, where, f"name a {role} model; if it is meant: {key}={names[0]} and scale -1")
    own = ("reward",) if role == "reward" else (name, "cost", "unsafe")
    fitting = [head for head in own if head in single] or (single if len(single) == 1 else [])
    if not fitting:
        mend = f"say which: {key}={'|'.join(single)}" if single else "name another model"
        raise UserError(f"the model has several scores: {', '.join(names)}", where, mend)
    if role == "reward" and kind == "moderator":
        what = "a moderator's scores rise with harm: none of them is a reward"
        raise UserError(what, where, f"name a reward model; if it is meant: {key}={fitting[0]} and scale -1")
    return fitting[0]


def head_of(source: RoleSource, head: str) -> tuple[Tensor, Tensor]:
    """(weight (1, F), bias (1,)) of one score, read without the backbone."""
    if source.foreign is not None:
        return foreign_heads(source.foreign)[head]
    assert source.metadata is not None
    tensors = read_heads(source.folder, source.metadata.heads, kernel_names(source.metadata.kernel))
    return tensors[f"{head}.weight"].float(), tensors[f"{head}.bias"].float()


def _check_readable(source: RoleSource) -> None:
    metadata = source.metadata
    if metadata is not None and (metadata.kernel is not None or metadata.span not in (None, "all")):
        what = "its head is not linear in hidden states" if metadata.kernel else f"it pools the {metadata.span}"
        mend = "start the critic from another model, such as the SFT run"
        raise UserError(f"a critic cannot start from this model: {what}", source.where, mend)


# ------------------------------------------------------------------------------------------------ text
def _check_text(
    source: RoleSource, backbone: BackboneConfig, tokenizer: Any, output_root: Path | str, cache_dir: Path | str | None
) -> None:
    """Refuse a model that reads other token ids, or was trained in another chat format."""
    template = source.metadata.template if source.metadata is not None else None
    if source.foreign is not None:
        template = source.foreign.template
    if template is not None and template != backbone.template:
        what = f"the model was trained in the template {template!r}, the actor writes {backbone.template!r}"
        raise UserError(what, source.where, f"use backbone.template={template} from SFT on, or another model")
    cfg = stored_backbone(source.metadata) if source.metadata is not None else plain_backbone(source.location)
    other = load_tokenizer(cfg, location=source.location, cache_dir=cache_dir, output_root=output_root)
    difference = tokenizer_difference(tokenizer, other)
    if difference:
        raise UserError(f"its tokenizer is not the actor's: {difference}", source.where, AS_SCORER)


def tokenizer_difference(one: Any, other: Any) -> str:
    """What makes two tokenizers write different ids; empty: nothing. The pad token does not count: masks decide."""
    left, right = one.get_vocab(), other.get_vocab()
    pads = {one.pad_token, other.pad_token} - {one.eos_token, other.eos_token}
    differing = {token for token in left.keys() | right.keys() if left.get(token) != right.get(token)} - pads
    if differing:
        return f"{len(differing)} tokens have other ids, such as {min(differing)!r}"
    if one.eos_token_id != other.eos_token_id:
        return f"it ends responses with {other.eos_token!r}, not with {one.eos_token!r}"
    return ""


# ------------------------------------------------------------------------------------------------ bases
def base_id(source: RoleSource, prefix: str) -> str:
    """Identity of what an adapter, or heads alone, were trained on: the same for trunks and causal models of it.

    Args:
        source: an export that is `on_base`.
        prefix: `base_model_prefix` of the causal model, which trunks leave out of their weights' names.
    """
    assert source.metadata is not None
    base = source.metadata.base
    if base["kind"] == "embedded":
        return embedded_id(source.folder / BASE_FOLDER, prefix)
    return str(base["content_id"])


def embedded_id(folder: Path, prefix: str) -> str:
    """Identity of the trunk's weights in a folder, whether they were saved with a language-model head or without."""
    digest = hashlib.sha256()
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                if not name.startswith("lm_head."):
                    found[name.removeprefix(f"{prefix}.")] = tensors.get_tensor(name)
    for name, value in sorted(found.items()):
        digest.update(f"\x00{name}\x00{tuple(value.shape)}\x00{value.dtype}\x00".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return f"embedded-{digest.hexdigest()[:16]}"


def same_quantization(one: QuantizationConfig, other: dict[str, Any] | None) -> bool:
    """Whether weights are stored alike: in which dtype they multiply is not part of it."""
    stored = QuantizationConfig(**(other or {"name": "none"}))
    if one.name == stored.name == "none":
        return True
    return (one.name, one.double_quant) == (stored.name, stored.double_quant)
