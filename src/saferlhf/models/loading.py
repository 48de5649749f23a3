"""Load any model for use, by locator: an export, to scores equal to the saved model's, or a plain model."""

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
        metadata: of the export; kind "plain" for a model that this project did not write.
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
) -> LoadedModel:
    """Load any model for use: eval mode, no gradients, heads checked one by one.

    Args:
        locator: a string, or what `resolve` made of it. A model without `saferlhf.json` is loaded as a causal LM.
        output_root: where relative run folders are looked for.
        require_heads: refuse a model without score heads.
        dtype, attention: instead of those it was trained with.
        cache_dir: the project's cache folder.
        device: where to put it; None: the CPU (4-bit: see `load_backbone`).

    Raises:
        UserError: nothing there, a head missing or misshapen, the base of an adapter gone or changed.
    """
    location = locator if isinstance(locator, Location) else resolve(locator, output_root=output_root)
    if location.kind != "export":
        if require_heads:
            raise UserError(f"{location.locator!r} has no score heads", "", "name a trained reward or cost model")
        model, tokenizer, metadata = _plain_model(location, dtype, attention, cache_dir, output_root)
        return LoadedModel(_for_use(model, device), tokenizer, metadata, {}, location)
    assert location.folder is not None
    folder, metadata = location.folder, read_metadata(location.folder)
    if require_heads and not metadata.heads:
        raise UserError(
            f"a {metadata.kind} model has no score heads", str(folder), "name a trained reward or cost model"
        )
    cfg = _stored_backbone(metadata)
    cfg = replace(cfg, dtype=dtype or cfg.dtype, attention=attention or cfg.attention, gradient_checkpointing=False)
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


def _plain_model(
    location: Location,
    dtype: str | None,
    attention: str | None,
    cache_dir: str | Path | None,
    output_root: str | Path,
) -> tuple[Any, Any, ExportMetadata]:
    name = str(location.folder) if location.folder is not None else str(location.name)
    cfg = BackboneConfig(
        name=location.locator,
        model=name,
        revision=location.revision,
        dtype=dtype or "float32",
        attention=attention or "sdpa",
    )
    model = load_backbone(cfg, lm_head=True, cache_dir=cache_dir, output_root=output_root)
    tokenizer = load_tokenizer(cfg, location=location, cache_dir=cache_dir, output_root=output_root)
    return model, tokenizer, ExportMetadata(kind="plain", base={"name": name, "revision": location.revision})


def _on_its_base(
    folder: Path,
    metadata: ExportMetadata,
    cfg: BackboneConfig,
    cache_dir: str | Path | None,
    output_root: str | Path,
    device: torch.device | str | None,
) -> Any:
    """The base, loaded the way it was for training, with the adapter on it if there is one."""
    source = _base_source(folder, metadata, cfg, cache_dir, output_root)
    if source.kind != "hub" and source.content_id != metadata.base["content_id"]:
        raise UserError(
            f"the {_part(metadata)} trained on base {metadata.base['content_id']}, but {source.content_id} was found",
            str(folder),
            _base_mend(metadata),
        )
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


def _base_source(
    folder: Path,
    metadata: ExportMetadata,
    cfg: BackboneConfig,
    cache_dir: str | Path | None,
    output_root: str | Path,
) -> Source:
    """Where the base of an adapter or of heads alone is now."""
    base = metadata.base
    if base["kind"] == "embedded":
        return Source("folder", base["content_id"], Location(BASE_FOLDER, "folder", folder=folder / BASE_FOLDER))
    if base["kind"] == "hub":
        name, revision = base["name"], base.get("commit") or base["revision"]
        return Source("hub", base["content_id"], Location(name, "hub", name=name, revision=revision))
    if base["kind"] == "gguf":
        return gguf_source(cfg, cache_dir)
    location = resolve(_base_folder(folder, metadata), output_root=output_root)
    return Source(location.kind, content_id_of(location, output_root=output_root, cache_dir=cache_dir), location)


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


def _stored_backbone(metadata: ExportMetadata) -> BackboneConfig:
    known = {f.name for f in fields(BackboneConfig)}
    stored = {key: value for key, value in metadata.base["backbone"].items() if key in known}
    return BackboneConfig(**stored)


def _for_use(model: Any, device: torch.device | str | None) -> Any:
    model = model.eval().requires_grad_(False)
    return model if device is None else model.to(device)
