"""Load any model for use, by locator: an export, to scores equal to the saved model's, or a model of somebody else's:
a score model or a plain causal language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saferlhf.config.schema import BackboneConfig, QuantizationConfig
from saferlhf.errors import UserError
from saferlhf.models.adapters import quiet_peft
from saferlhf.models.backbone import (
    load_backbone,
)
from saferlhf.models.export import BASE_FOLDER
from saferlhf.models.foreign_scores import ForeignScores, find_foreign_scores, foreign_heads
from saferlhf.models.heads import build_loaded_heads, read_heads
from saferlhf.models.kernel_map import KernelMap, kernel_names
from saferlhf.models.locator import Location, content_id_of, resolve
from saferlhf.models.metadata import ExportMetadata, read_metadata
from saferlhf.models.score_model import ScoreModel, feature_width, hidden_size
from saferlhf.models.source import Source, gguf_source
from saferlhf.models.tokenizer import load_tokenizer


@dataclass
class LoadedModel:
    """A model that was loaded from a locator.

    Attributes:
        model: `ScoreModel` where there are heads, else a causal LM; in eval mode, without gradients.
        tokenizer: the one it was trained with.
        metadata: of the export; for a model that this project did not write kind "plain", or reward, cost or classifier
            where it gives scores.
        heads: name -> number of scores; empty for a causal LM.
        location: where it was found.
    """

    model: Any
    tokenizer: Any
    metadata: ExportMetadata
    heads: dict[str, int]
    location: Location


def load_export(
    locator: str | Location,
    *,
    output_root: Path | str = "outputs",
    require_heads: bool = False,
    dtype: str | None = None,
    attention: str | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | str | None = None,
    gradient_checkpointing: bool = False,
) -> LoadedModel:
    """Load any model for use: eval mode, no gradients, heads checked one by one.

    Args:
        locator: a string, or what `resolve` made of it. A model without `saferlhf.json` is loaded as a score model
            where it is one (`models/foreign_scores.py`), else as a causal LM.
        output_root: where relative run folders are looked for.
        require_heads: refuse a model without score heads.
        dtype, attention: instead of those it was trained with.
        cache_dir: the project's cache folder.
        device: where to put it; None: the CPU (4-bit: see `load_backbone`).
        gradient_checkpointing: for a model that is trained on: recompute activations in the backward pass.

    Raises:
        UserError: nothing there, a head missing or misshapen, the base of an adapter gone or changed.
    """
    location = locator if isinstance(locator, Location) else resolve(locator, output_root=output_root)
    if location.kind != "export":
        foreign = find_foreign_scores(location)
        if require_heads and foreign is None:
            raise UserError(f"{location.locator!r} has no score heads", "", "name a trained reward or cost model")
        cfg = plain_backbone(location, dtype, attention, gradient_checkpointing)
        model, tokenizer, metadata = _plain_model(location, cfg, foreign, cache_dir, output_root)
        return LoadedModel(_for_use(model, device), tokenizer, metadata, dict(metadata.heads), location)
    assert location.folder is not None
    folder, metadata = location.folder, read_metadata(location.folder)
    if require_heads and not metadata.heads:
        raise UserError(
            f"a {metadata.kind} model has no score heads", str(folder), "name a trained reward or cost model"
        )
    cfg = stored_backbone(metadata)
    cfg = replace(
        cfg,
        dtype=dtype or cfg.dtype,
        attention=attention or cfg.attention,
        gradient_checkpointing=gradient_checkpointing,
    )
    # heads first: small, and what is wrong with them is known before gigabytes are read
    tensors = read_heads(folder, metadata.heads, kernel_names(metadata.kernel))
    if metadata.weights in ("adapter", "base"):
        model = _on_its_base(folder, metadata, cfg, cache_dir, output_root, device)
    else:
        source = Source("export", content_id_of(location, output_root=output_root, cache_dir=cache_dir), location)
        model = load_backbone(cfg, source=source, lm_head=not metadata.heads, cache_dir=cache_dir)
    tokenizer = load_tokenizer(cfg, location=location)
    if metadata.heads:
        model = _with_heads(model, tensors, metadata, folder)
    return LoadedModel(_for_use(model, device), tokenizer, metadata, dict(metadata.heads), location)


def _with_heads(trunk: nn.Module, tensors: Mapping[str, Tensor], metadata: ExportMetadata, folder: Path) -> ScoreModel:
    """The loaded backbone under its loaded heads."""
    span = metadata.span or "all"
    width = feature_width(hidden_size(trunk), metadata.layers, span)
    kernel = KernelMap.load(tensors, width, folder) if metadata.kernel else None
    heads = build_loaded_heads(tensors, metadata.heads, width if kernel is None else kernel.width, folder)
    return ScoreModel(trunk, heads, metadata.pooling or "last", layers=metadata.layers, span=span, kernel=kernel)


def plain_backbone(
    location: Location, dtype: str | None = None, attention: str | None = None, gradient_checkpointing: bool = False
) -> BackboneConfig:
    """The configuration that loads a plain folder or hub name as it is."""
    return BackboneConfig(
        name=location.locator,
        model=str(location.folder) if location.folder is not None else str(location.name),
        revision=location.revision,
        dtype=dtype or "float32",
        attention=attention or "sdpa",
        gradient_checkpointing=gradient_checkpointing,
    )


def _plain_model(
    location: Location,
    cfg: BackboneConfig,
    foreign: ForeignScores | None,
    cache_dir: str | Path | None,
    output_root: str | Path,
) -> tuple[Any, Any, ExportMetadata]:
    base = {"name": cfg.model, "revision": location.revision}
    metadata = ExportMetadata(kind="plain", base=base)
    # heads first: small, and what is wrong with them is known before gigabytes are read
    tensors = {} if foreign is None else foreign_heads(foreign)
    model = load_backbone(cfg, lm_head=foreign is None, cache_dir=cache_dir, output_root=output_root)
    if foreign is not None:
        heads = dict.fromkeys(tensors, 1)
        parts = {f"{name}.weight": weight for name, (weight, _) in tensors.items()}
        parts |= {f"{name}.bias": bias for name, (_, bias) in tensors.items()}
        built = build_loaded_heads(parts, heads, hidden_size(model), Path(location.locator))
        model = ScoreModel(model, built)
        metadata = ExportMetadata(
            kind=foreign.kind, template=foreign.template or "native", pooling="last", heads=heads, base=base
        )
    tokenizer = load_tokenizer(cfg, location=location, cache_dir=cache_dir, output_root=output_root)
    return model, tokenizer, metadata


def _on_its_base(
    folder: Path,
    metadata: ExportMetadata,
    cfg: BackboneConfig,
    cache_dir: str | Path | None,
    output_root: str | Path,
    device: torch.device | str | None,
) -> Any:
    """The base, loaded the way it was for training, with the adapter on it if there is one."""
    source = base_source(folder, metadata, cfg, cache_dir, output_root)
    base = load_backbone(
        cfg,
        quantization=QuantizationConfig(**(metadata.quantization or {"name": "none"})),
        source=source,
        lm_head=not metadata.heads,
        cache_dir=cache_dir,
        output_root=output_root,
        device=device,
    )
    if metadata.weights == "base":
        return base
    from peft import PeftModel

    with quiet_peft():
        return PeftModel.from_pretrained(base, str(folder), is_trainable=False)


def base_source(
    folder: Path,
    metadata: ExportMetadata,
    cfg: BackboneConfig,
    cache_dir: str | Path | None,
    output_root: str | Path,
) -> Source:
    """Where the base of an adapter or of heads alone is now.

    Raises:
        UserError: it is gone, or no longer what it was.
    """
    base = metadata.base
    if base["kind"] == "embedded":
        # named as a folder from here on, also by the export of what is trained further
        location = Location(BASE_FOLDER, "folder", folder=folder / BASE_FOLDER)
        return Source("folder", content_id_of(location, output_root=output_root, cache_dir=cache_dir), location)
    if base["kind"] == "hub":
        name, revision = base["name"], base.get("commit") or base["revision"]
        return Source("hub", base["content_id"], Location(name, "hub", name=name, revision=revision))
    if base["kind"] == "gguf":
        source = gguf_source(cfg, cache_dir)
    else:
        location = resolve(_base_folder(folder, metadata), output_root=output_root)
        content_id = content_id_of(location, output_root=output_root, cache_dir=cache_dir)
        source = Source(location.kind, content_id, location)
    if source.content_id != base["content_id"]:
        raise UserError(
            f"the {_part(metadata)} trained on base {base['content_id']}, but {source.content_id} was found",
            str(folder),
            _base_mend(metadata),
        )
    return source


def _base_folder(folder: Path, metadata: ExportMetadata) -> str:
    for candidate in (folder / metadata.base["folder_from_here"], Path(metadata.base["folder"])):
        if candidate.is_dir():
            return str(candidate.resolve())
    raise UserError(
        f"the {'adapter' if metadata.weights == 'adapter' else 'model'}'s base is gone: {metadata.base['folder']}",
        str(folder),
        _base_mend(metadata),
    )


def _part(metadata: ExportMetadata) -> str:
    return "adapter was" if metadata.weights == "adapter" else "heads were"


def _base_mend(metadata: ExportMetadata) -> str:
    other = "export with adapter.merge_on_export=true" if metadata.weights == "adapter" else "train the heads again"
    return f"bring the base back, or {other}"


def stored_backbone(metadata: ExportMetadata) -> BackboneConfig:
    """How the backbone of an export was configured."""
    known = {f.name for f in fields(BackboneConfig)}
    stored = {key: value for key, value in metadata.base["backbone"].items() if key in known}
    return BackboneConfig(**stored)


def _for_use(model: Any, device: torch.device | str | None) -> Any:
    model = model.eval().requires_grad_(False)
    return model if device is None else model.to(device)
