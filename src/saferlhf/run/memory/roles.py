"""Which models a run keeps in memory, and the shape of each; see `models/roles_separate.py` and `roles_shared.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from saferlhf.config.checks_online import signals_of
from saferlhf.config.online_schema import GaeConfig, PpoConfig
from saferlhf.config.roles_schema import CRITIC
from saferlhf.config.schema import QuantizationConfig, TrainConfig
from saferlhf.config.task_schema import ModerationConfig, ProbeConfig
from saferlhf.errors import UserError
from saferlhf.models.loading import stored_backbone
from saferlhf.models.locator import resolve
from saferlhf.models.metadata import ExportMetadata, read_metadata
from saferlhf.models.shapes import shape_config
from saferlhf.ops.constraint import build_constraint
from saferlhf.run.memory.trace import ModelShape, Weights, weights_of

MODERATOR_HEADS = (("unsafe", 1), ("category", 19), ("severity", 3))
"""Of a moderator; the data decide how many there really are, a matter of kilobytes."""


@dataclass(frozen=True)
class RoleShape:
    """One model, or one role on a model that it shares.

    Attributes:
        name: of the role; "base" for what shared roles have in common, "model" outside of online training.
        shape: of the model that its passes go through.
        weights: of what is its own: of a role on a shared base its adapter and head alone.
        trained: whether it learns.
    """

    name: str
    shape: ModelShape
    weights: Weights
    trained: bool


def role_shapes(config: TrainConfig, vocabulary_size: int | None = None) -> list[RoleShape]:
    """The models of a run, in the order in which they are loaded.

    Args:
        config: checked, defaults filled in.
        vocabulary_size: of the tokenizer, where the architecture leaves it open.

    Raises:
        UserError: a backbone whose configuration cannot be read.
    """
    if not isinstance(config.task, PpoConfig):
        shape = _supervised(config, vocabulary_size)
        return [RoleShape("model", shape, weights_of(shape), not shape.frozen)]
    assert config.roles is not None
    return _shared(config, vocabulary_size) if config.roles.name == "shared" else _separate(config, vocabulary_size)


def critics_of(config: TrainConfig) -> tuple[str, ...]:
    """Signals that have a critic (`OnlineTask.critics`)."""
    if not isinstance(config.advantage, GaeConfig):
        return ()
    names = signals_of(config)
    return names if build_constraint(config.constraint, names[1:]).acts_on == "advantages" else ("reward",)


def _supervised(config: TrainConfig, vocabulary_size: int | None) -> ModelShape:
    task = config.task
    shape = _shape(config, config.init, vocabulary_size)
    if task.name == "sft":
        return shape
    heads = MODERATOR_HEADS if isinstance(task, ModerationConfig) else (("score", 1),)
    layers = tuple(task.layers) if isinstance(getattr(task, "layers", None), list) else None
    if isinstance(task, ProbeConfig):
        return replace(shape, heads=heads, adapter=None, frozen=True)
    span = getattr(task, "span", "all")
    return replace(shape, heads=heads, pooling=task.pooling, layers=layers, span=span)


def _shape(config: TrainConfig, locator: str | None, vocabulary_size: int | None) -> ModelShape:
    """The backbone that a locator names, as this run would load it; the run's own where it is not there yet."""
    folder, metadata = _found(locator, config.output_root)
    backbone = config.backbone
    if folder is not None and metadata is not None and not (folder / "config.json").is_file():
        stored = stored_backbone(metadata)
        backbone = replace(backbone, model=stored.model, architecture=stored.architecture)
    adapter = config.adapter if config.adapter.name == "lora" else None
    found = shape_config(backbone, folder=folder, vocabulary_size=vocabulary_size)
    return ModelShape(found, config.backbone, config.quantization, adapter, config.trainer.precision)


def _found(locator: str | None, output_root: str) -> tuple[Path | None, ExportMetadata | None]:
    if not locator:
        return None, None
    try:
        location = resolve(locator, output_root=output_root)
        if location.folder is None:
            return None, None
        return location.folder, read_metadata(location.folder) if location.kind == "export" else None
    except UserError:  # a plan may come before the models that it starts from
        return None, None


# ------------------------------------------------------------------------------------------------ online
def _score_of(config: TrainConfig, name: str, vocabulary_size: int | None) -> ModelShape | None:
    """The frozen model that gives a score; None where a scorer gives it."""
    assert config.roles is not None
    locator = config.roles.score(name).model
    if not locator:
        return None
    shape = replace(_shape(config, locator, vocabulary_size), heads=((name, 1),), adapter=None, frozen=True)
    shape = replace(shape, backbone=replace(shape.backbone, gradient_checkpointing=False))
    _, metadata = _found(locator, config.output_root)
    if metadata is None:
        return shape
    # an export keeps the dtype and the storage that it was trained with
    quantization = QuantizationConfig(**(metadata.quantization or {"name": "none"}))
    backbone = replace(shape.backbone, dtype=stored_backbone(metadata).dtype)
    return replace(shape, backbone=backbone, quantization=quantization)


def _separate(config: TrainConfig, vocabulary_size: int | None) -> list[RoleShape]:
    assert config.roles is not None
    start = config.roles.actor.model or config.init
    actor = _shape(config, start, vocabulary_size)
    found = [RoleShape("actor", actor, weights_of(actor), True)]
    frozen = replace(actor, adapter=None, frozen=True)
    _, metadata = _found(start, config.output_root)
    goes_on = metadata is not None and metadata.weights == "adapter"
    same = config.roles.reference.model in (None, start)
    if same and config.adapter.name == "lora" and not goes_on:
        # the actor without its adapter
        found.append(RoleShape("reference", frozen, _NOTHING, False))
    else:
        found.append(RoleShape("reference", frozen, weights_of(frozen), False))
    for name in signals_of(config):
        shape = _score_of(config, name, vocabulary_size)
        if shape is not None:
            found.append(RoleShape(name, shape, weights_of(shape), False))
    for name in critics_of(config):
        critic = config.roles.critic(name).model or config.roles.score(name).model or start
        shape = replace(_shape(config, critic, vocabulary_size), heads=(("value", 1),))
        found.append(RoleShape(name + CRITIC, shape, weights_of(shape), True))
    return found


def _shared(config: TrainConfig, vocabulary_size: int | None) -> list[RoleShape]:
    assert config.roles is not None
    start = config.roles.actor.model or config.init
    actor = _shape(config, start, vocabulary_size)
    base = replace(actor, adapter=None, frozen=True)
    whole, adapted = weights_of(base), weights_of(actor)
    found = [RoleShape("base", base, whole, False), RoleShape("actor", actor, _adapter(adapted), True)]
    _, metadata = _found(start, config.output_root)
    learned = metadata is not None and metadata.weights == "adapter"
    own = _frozen(_adapter(adapted)) if learned or config.roles.reference.model else _NOTHING
    found.append(RoleShape("reference", base, own, False))
    critic = replace(actor, heads=(("value", 1),))
    mine = _adapter(weights_of(critic))
    for name in signals_of(config):
        if config.roles.score(name).model:
            found.append(RoleShape(name, replace(critic, frozen=True), _frozen(mine), False))
    found += [RoleShape(name + CRITIC, critic, mine, True) for name in critics_of(config)]
    return found


_NOTHING = Weights(0, 0, 0, 0, 0, 0, 0, 0, 0)


def _adapter(adapted: Weights) -> Weights:
    """What a role has of its own beside the base."""
    return replace(adapted, frozen=0, frozen_count=0, packed=0, block=0, outside=0)


def _frozen(weights: Weights) -> Weights:
    moved = {"frozen": weights.trained, "frozen_count": weights.trained_count}
    return replace(weights, trained=0, trained_count=0, adamw=0, adamw_8bit=0, **moved)
