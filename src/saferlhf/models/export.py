"""Export: a trained model as a folder that stands on its own, and back again to equal scores.

    config.json, model.safetensors          the backbone (whole, or merged) ...
    adapter_config.json, adapter_model...   ... or its LoRA adapter, or neither where only heads were trained; base/
                                            where the base can be had nowhere else
    tokenizer.json, ...                     with the chat template
    heads.safetensors                       every head, weight and bias
    saferlhf.json                           what the files above do not say
    README.md                               the model card

Backbone, adapter and tokenizer are plain Hugging Face files. Written to a draft folder that is renamed when complete,
so a folder of that name is whole or absent. Safetensors only.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from saferlhf.config.schema import BackboneConfig, QuantizationConfig
from saferlhf.errors import UserError
from saferlhf.models.adapters import adapter_disabled, quiet_peft
from saferlhf.models.backbone import (
    Provenance,
    backbone_dict,
    check_pad_token,
    load_backbone,
    provenance_of,
    quiet_transformers,
)
from saferlhf.models.content import apply_umask
from saferlhf.models.heads import build_loaded_heads, head_widths, read_heads
from saferlhf.models.locator import Location, content_id_of, resolve
from saferlhf.models.merge import merged_model
from saferlhf.models.metadata import HEADS_FILE, ExportMetadata, read_metadata
from saferlhf.models.quantization import is_quantized
from saferlhf.models.score_model import ScoreModel, feature_width, hidden_size
from saferlhf.models.source import Source, gguf_source
from saferlhf.models.tokenizer import load_tokenizer

BASE_FOLDER = "base"


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


# ------------------------------------------------------------------------------------------------ save
def save_export(
    folder: Path | str,
    *,
    model: nn.Module,
    tokenizer: Any,
    metadata: ExportMetadata,
    heads: nn.ModuleDict | None = None,
    merge: bool = False,
    base_unchanged: bool = False,
    card: str | Callable[[ExportMetadata], str] | None = None,
) -> ExportMetadata:
    """Write an export folder in one step; an older one of that name is replaced.

    Args:
        folder: to write.
        model: `ScoreModel`, trunk or causal LM from `load_backbone`, with or without adapter.
        tokenizer: saved along; its pad token enters the model's configuration.
        metadata: kind, template, lineage and what else the caller knows; the rest is filled in here.
        heads: None: those of a `ScoreModel`, or none.
        merge: write an adapter merged into its base, in the base's dtype. A 4-bit base is unpacked for it: the result
            is no longer 4-bit, and its scores equal the trained model's only up to the dtype that multiplied
            (`quantization.compute_dtype`); the metadata says so.
        base_unchanged: only the heads were trained: the base is named, not written (unless it can be had nowhere else).
        card: text of README.md, or what makes it from the completed metadata.

    Returns:
        The metadata as written.
    """
    folder = Path(folder)
    if isinstance(model, ScoreModel):
        heads = model.heads if heads is None else heads
        layers = None if model.layers is None else list(model.layers)
        metadata = replace(metadata, pooling=model.pooling, layers=layers, span=model.span)
        model = model.trunk
    metadata = _described(metadata, model, heads, merge, base_unchanged, folder)
    draft = folder.parent / f".{folder.name}.draft-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        _write_weights(draft, model, tokenizer, metadata)
        tokenizer.save_pretrained(str(draft))
        if heads:
            state = {name: value.detach().cpu().float().contiguous() for name, value in heads.state_dict().items()}
            save_file(state, str(draft / HEADS_FILE))
        if card is not None:
            (draft / "README.md").write_text(card if isinstance(card, str) else card(metadata))
        metadata.write(draft)
        apply_umask(draft)
        _replace_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return metadata


def _described(
    metadata: ExportMetadata,
    model: nn.Module,
    heads: nn.ModuleDict | None,
    merge: bool,
    base_unchanged: bool,
    folder: Path,
) -> ExportMetadata:
    """Fill in what the model itself knows."""
    provenance = provenance_of(model)
    packed = is_quantized(provenance.quantization)
    adapters = getattr(model, "peft_config", {})
    if len(adapters) > 1:
        raise ValueError(f"one adapter per export, not {sorted(adapters)}")
    if base_unchanged and (adapters or not heads or any(p.requires_grad for p in model.parameters())):
        raise ValueError("an unchanged base is frozen and exported with heads")
    if packed and not adapters and not base_unchanged:
        raise UserError(
            "a 4-bit base without an adapter has nothing trained to export", "quantization=nf4", "adapter=lora"
        )
    lora = next(iter(adapters.values()), None)
    merged = merge and lora is not None
    return replace(
        metadata,
        heads=head_widths(heads) if heads else {},
        weights="base" if base_unchanged else "merged" if merged else "adapter" if lora is not None else "full",
        base=_base(provenance, folder),
        quantization=asdict(provenance.quantization) if packed else None,
        adapter=None
        if lora is None
        else {
            "name": "lora",
            "rank": lora.r,
            "alpha": lora.lora_alpha,
            "dropout": lora.lora_dropout,
            "target_modules": sorted(lora.target_modules),
        },
        merge_exact=None if not merged else not packed or provenance.quantization.compute_dtype == "float32",
        max_length=metadata.max_length or provenance.backbone.max_length,
    )


def _base(provenance: Provenance, folder: Path) -> dict[str, Any]:
    """How the base was loaded. Folders are noted from here and from the root, since outputs are moved as a whole."""
    source = provenance.source
    base: dict[str, Any] = {
        "kind": "embedded" if source.kind == "scratch" else source.kind,
        "content_id": source.content_id,
        "backbone": backbone_dict(provenance.backbone),
    }
    if source.location is not None and source.location.folder is not None:
        base["folder"] = str(source.location.folder)
        base["folder_from_here"] = os.path.relpath(source.location.folder, folder.resolve())
    elif source.location is not None:
        base["name"], base["revision"] = source.location.name, source.location.revision
        base["commit"] = provenance.commit
    return base


def _write_weights(draft: Path, model: Any, tokenizer: Any, metadata: ExportMetadata) -> None:
    if metadata.weights == "adapter":
        label = metadata.base.get("name") or BASE_FOLDER
        for config in model.peft_config.values():
            config.base_model_name_or_path = label if metadata.base["kind"] in ("hub", "embedded") else ""
        # embeddings are never trained here, and looking for resized ones would ask the hub
        model.save_pretrained(str(draft), save_embedding_layers=False)
        (draft / "README.md").unlink(missing_ok=True)  # peft's empty card
        _in_order(draft / "adapter_config.json")
        if metadata.base["kind"] == "embedded":
            _save_plain(_without_adapters(model), draft / BASE_FOLDER, tokenizer)
        return
    if metadata.weights == "base":
        if metadata.base["kind"] == "embedded":
            _save_plain(model, draft / BASE_FOLDER, tokenizer)
        return
    _save_plain(merged_model(model) if metadata.weights == "merged" else model, draft, tokenizer)


def _in_order(config_file: Path) -> None:
    """Sort what peft writes from sets: the order changes from process to process, and with it the export's identity."""
    config = {
        key: sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
        for key, value in json.loads(config_file.read_text()).items()
    }
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _without_adapters(model: Any) -> Any:
    """The frozen base as a plain model."""
    with adapter_disabled(model):
        return merged_model(model)


def _save_plain(model: Any, folder: Path, tokenizer: Any) -> None:
    """`save_pretrained` with a configuration fit for use: pad and end tokens set, cache on, no local path."""
    config = model.config
    kept = (config.use_cache, config.pad_token_id) if hasattr(config, "use_cache") else None
    name, config._name_or_path = config._name_or_path, ""
    check_pad_token(model, tokenizer.pad_token_id)
    try:
        config.pad_token_id = tokenizer.pad_token_id
        if kept is not None:
            config.use_cache = True
        with quiet_transformers():
            model.save_pretrained(str(folder))
    finally:
        config._name_or_path = name
        if kept is not None:
            config.use_cache, config.pad_token_id = kept


def _replace_folder(draft: Path, folder: Path) -> None:
    """Rename the draft into place; an older folder steps aside first and is deleted last."""
    old = folder.parent / f".{folder.name}.old-{os.getpid()}"
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ load
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
    tensors = read_heads(folder, metadata.heads)
    if metadata.weights in ("adapter", "base"):
        model = _on_its_base(folder, metadata, cfg, cache_dir, output_root, device)
    else:
        source = Source("export", content_id_of(location, output_root=output_root, cache_dir=cache_dir), location)
        model = load_backbone(cfg, source=source, lm_head=not metadata.heads, cache_dir=cache_dir)
    tokenizer = load_tokenizer(cfg, location=location)
    if metadata.heads:
        span = metadata.span or "all"
        width = feature_width(hidden_size(model), metadata.layers, span)
        heads = build_loaded_heads(tensors, metadata.heads, width, folder)
        model = ScoreModel(model, heads, metadata.pooling or "last", layers=metadata.layers, span=span)
    return LoadedModel(_for_use(model, device), tokenizer, metadata, dict(metadata.heads), location)


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
