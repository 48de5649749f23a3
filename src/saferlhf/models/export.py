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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from saferlhf.errors import UserError
from saferlhf.models.adapters import adapter_disabled, using_adapter
from saferlhf.models.backbone import (
    Provenance,
    backbone_dict,
    check_pad_token,
    provenance_of,
)
from saferlhf.models.content import apply_umask
from saferlhf.models.heads import head_widths
from saferlhf.models.kernel_map import head_tensors
from saferlhf.models.merge import merged_model
from saferlhf.models.metadata import HEADS_FILE, ExportMetadata
from saferlhf.models.quantization import is_quantized
from saferlhf.models.quiet import quiet_transformers
from saferlhf.models.score_model import ScoreModel

BASE_FOLDER = "base"


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
    adapter: str | None = None,
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
        adapter: which one to write, of a model that has several.

    Returns:
        The metadata as written.
    """
    folder, kernel = Path(folder), None
    if isinstance(model, ScoreModel):
        heads, kernel = model.heads if heads is None else heads, model.kernel
        metadata = _read_by(metadata, model)
        model = model.trunk
    adapter = _only_adapter(model, adapter)
    metadata = _described(metadata, model, heads, merge, base_unchanged, folder, adapter)
    draft = folder.parent / f".{folder.name}.draft-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        _write_weights(draft, model, tokenizer, metadata, adapter)
        tokenizer.save_pretrained(str(draft))
        if heads:
            save_file(head_tensors(heads, kernel), str(draft / HEADS_FILE))
        if card is not None:
            (draft / "README.md").write_text(card if isinstance(card, str) else card(metadata))
        metadata.write(draft)
        apply_umask(draft)
        _replace_folder(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return metadata


def _read_by(metadata: ExportMetadata, model: ScoreModel) -> ExportMetadata:
    """With what the heads of a model read."""
    layers = None if model.layers is None else list(model.layers)
    kernel = None if model.kernel is None else "gaussian"
    return replace(metadata, pooling=model.pooling, layers=layers, span=model.span, kernel=kernel)


def _described(
    metadata: ExportMetadata,
    model: nn.Module,
    heads: nn.ModuleDict | None,
    merge: bool,
    base_unchanged: bool,
    folder: Path,
    adapter: str | None,
) -> ExportMetadata:
    """Fill in what the model itself knows."""
    provenance = provenance_of(model)
    packed = is_quantized(provenance.quantization)
    if base_unchanged and (adapter or not heads or any(p.requires_grad for p in model.parameters())):
        raise ValueError("an unchanged base is frozen and exported with heads")
    if packed and not adapter and not base_unchanged:
        raise UserError(
            "a 4-bit base without an adapter has nothing trained to export", "quantization=nf4", "adapter=lora"
        )
    lora: Any = None if adapter is None else model.peft_config[adapter]  # type: ignore[index, union-attr]
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


def _only_adapter(model: Any, adapter: str | None) -> str | None:
    """The adapter to write; None: the model has none."""
    adapters = sorted(getattr(model, "peft_config", {}))
    if adapter is None and len(adapters) > 1:
        raise ValueError(f"one adapter per export, not {adapters}")
    if adapter is not None and adapter not in adapters:
        raise ValueError(f"no adapter {adapter!r}, only {adapters}")
    return adapter or (adapters[0] if adapters else None)


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


def _write_weights(draft: Path, model: Any, tokenizer: Any, metadata: ExportMetadata, adapter: str | None) -> None:
    if metadata.weights == "adapter":
        assert adapter is not None
        label = metadata.base.get("name") or BASE_FOLDER
        model.peft_config[adapter].base_model_name_or_path = (
            label if metadata.base["kind"] in ("hub", "embedded") else ""
        )
        # embeddings are never trained here, and looking for resized ones would ask the hub
        model.save_pretrained(str(draft), save_embedding_layers=False, selected_adapters=[adapter])
        if (draft / adapter).is_dir():  # all but the one named "default" get a folder of their own
            for file in (draft / adapter).iterdir():
                file.rename(draft / file.name)
            (draft / adapter).rmdir()
        (draft / "README.md").unlink(missing_ok=True)  # peft's empty card
        _in_order(draft / "adapter_config.json")
        if metadata.base["kind"] == "embedded":
            _save_plain(_without_adapters(model), draft / BASE_FOLDER, tokenizer)
        return
    if metadata.weights == "base":
        if metadata.base["kind"] == "embedded":
            _save_plain(model, draft / BASE_FOLDER, tokenizer)
        return
    _save_plain(_merged(model, adapter) if metadata.weights == "merged" else model, draft, tokenizer)


def _merged(model: Any, adapter: str | None) -> Any:
    with using_adapter(model, adapter):
        return merged_model(model)


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
