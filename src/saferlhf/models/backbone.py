"""Backbones: a causal language model or the bare trunk of one (or of an encoder), ready to be trained.

From scratch (a small architecture, seeded), from the hub, from a folder, from an export of this project, or from a
GGUF package; optionally packed to 4 bit. Always with an explicit dtype, in train mode (Hugging Face hands models over
in eval mode, and trainers keep it: dropout and gradient checkpointing would be off without a word), without a cache of
keys and values, and with every weight found in the files: a missing weight is an error, never a fresh random one.
"""

from __future__ import annotations

import difflib
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saferlhf.config.schema import BackboneConfig, QuantizationConfig
from saferlhf.errors import UserError
from saferlhf.models.content import cache_root
from saferlhf.models.quantization import (
    check_packed_layout,
    is_quantized,
    load_arguments,
    protect_packed_weights,
    torch_dtype,
)
from saferlhf.models.quiet import quiet_transformers
from saferlhf.models.saving import save_in_this_process
from saferlhf.models.score_model import first_position
from saferlhf.models.source import Source, find_source, plain

ATTENTIONS = ("sdpa", "eager", "flash_attention_2")


@dataclass(frozen=True)
class Provenance:
    """How a backbone was loaded, kept on the model so that an export can say what its adapter sits on."""

    backbone: BackboneConfig
    quantization: QuantizationConfig
    source: Source
    lm_head: bool
    commit: str | None = None  # of a hub model


def provenance_of(model: nn.Module) -> Provenance:
    """How the model (or the model under its adapters) was loaded by `load_backbone`."""
    base = getattr(model, "get_base_model", None)
    found = getattr(base() if base is not None else model, "_saferlhf_provenance", None)
    if found is None:
        raise ValueError("the model was not loaded by load_backbone")
    return found


def load_backbone(
    cfg: BackboneConfig,
    *,
    quantization: QuantizationConfig | None = None,
    init: str | None = None,
    lm_head: bool = False,
    vocabulary_size: int | None = None,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    output_root: str | Path = "outputs",
    device: torch.device | str | None = None,
    source: Source | None = None,
) -> Any:
    """Load or build a backbone.

    Args:
        cfg: which one, and how.
        quantization: none or nf4; None: none.
        init: locator to take the weights from instead of `cfg.model` or `cfg.architecture` (adapters are merged, score
            heads ignored).
        lm_head: True: causal LM; False: trunk, whose output is the last hidden states (encoders too).
        vocabulary_size: of the tokenizer: the size of a model from scratch, the least size of any other.
        pad_token_id, eos_token_id: of the tokenizer, written into the model's configuration.
        seed: of the weights of a model from scratch.
        cache_dir: the project's cache folder.
        output_root: where relative run folders are looked for.
        device: where 4-bit weights are placed; all others are loaded on the CPU and moved by the trainer.
        source: where the weights come from, when that is known already; None: `find_source` decides.

    Returns:
        A `PreTrainedModel` in train mode, all weights with gradients (4-bit: none), use_cache off.

    Raises:
        UserError: whatever is wrong with the names, files or combination.
    """
    quantization = quantization or QuantizationConfig(name="none")
    if cfg.attention not in ATTENTIONS:
        raise UserError(f"unknown attention {cfg.attention!r}", "backbone.attention", f"one of {', '.join(ATTENTIONS)}")
    if source is None:
        source = find_source(cfg, init=init, output_root=output_root, cache_dir=cache_dir, seed=seed)
    if source.kind == "scratch":
        model = _from_scratch(cfg, quantization, lm_head, vocabulary_size, pad_token_id, seed)
    elif source.kind == "export":
        model = _from_export(cfg, quantization, source, lm_head, cache_dir, output_root, device)
    else:
        name, revision = source.pretrained(cache_dir)
        model = load_pretrained(name, cfg, quantization, lm_head=lm_head, revision=revision, device=device)
    _finish(model, cfg, vocabulary_size, pad_token_id, eos_token_id)
    commit = getattr(model.config, "_commit_hash", None) if source.kind == "hub" else None
    model._saferlhf_provenance = Provenance(cfg, quantization, source, lm_head, commit)
    return model


def _from_scratch(
    cfg: BackboneConfig,
    quantization: QuantizationConfig,
    lm_head: bool,
    vocabulary_size: int | None,
    pad_token_id: int | None,
    seed: int,
) -> Any:
    """Random weights, equal for equal seed, whatever was drawn before; the global stream stays where it was."""
    if is_quantized(quantization):
        raise UserError(
            "a backbone built from scratch cannot be stored in 4 bit: random weights packed for good would never learn",
            f"backbone={cfg.name} quantization=nf4",
            "use quantization=none, or start from trained weights with init=",
        )
    config = architecture_config(cfg, vocabulary_size)
    if pad_token_id is not None:
        config.pad_token_id = pad_token_id
    _refuse_encoder(config, lm_head, cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = auto_class(lm_head).from_config(
            config, dtype=torch_dtype(cfg.dtype, "backbone.dtype"), attn_implementation=cfg.attention
        )
    return without_pooler(built)


def architecture_config(cfg: BackboneConfig, vocabulary_size: int | None) -> Any:
    """The transformers configuration of `backbone.architecture`; an unknown or impossible key is a UserError."""
    from transformers import AutoConfig

    keys = dict(plain(cfg.architecture))
    where = f"backbone.architecture of backbone={cfg.name}"
    model_type = keys.pop("model_type", None)
    if model_type is None:
        raise UserError("no model_type", where, "say which architecture, for example model_type: llama")
    if vocabulary_size is not None:
        keys.setdefault("vocab_size", vocabulary_size)
    try:
        known = AutoConfig.for_model(model_type).to_dict().keys()
    except ValueError as error:
        raise UserError(f"unknown model_type {model_type!r}", where, "use one that transformers knows") from error
    names = known | set(type(AutoConfig.for_model(model_type)).attribute_map) | {"num_key_value_heads", "head_dim"}
    for key in keys.keys() - names:
        near = difflib.get_close_matches(key, names, n=1)
        raise UserError(f"{model_type} has no {key!r}", where, f"did you mean {near[0]!r}?" if near else "remove it")
    try:
        return AutoConfig.for_model(model_type, **keys)
    except Exception as error:  # transformers validates with exception classes of its own
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"impossible architecture: {reason}", where, "change it") from error


def load_pretrained(
    name: str,
    cfg: BackboneConfig,
    quantization: QuantizationConfig,
    *,
    lm_head: bool,
    revision: str | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Weights from a folder or hub name, packed when asked; every weight must be in the files."""
    from transformers import AutoConfig

    arguments: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
    if revision is not None:
        arguments["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(name, **arguments)
        _refuse_encoder(config, lm_head, cfg)
        with quiet_transformers():
            model, report = auto_class(lm_head).from_pretrained(
                name,
                config=config,
                dtype=torch_dtype(cfg.dtype, "backbone.dtype"),
                attn_implementation=cfg.attention,
                use_safetensors=True,
                output_loading_info=True,
                **arguments,
                **load_arguments(quantization, device),
            )
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load the model: {first}", name, "check backbone.model, its revision and its files"
        ) from error
    model = without_pooler(model)
    own = {key for key, _ in model.named_parameters()}
    missing = sorted(own & set(report["missing_keys"])) + [str(item[0]) for item in report["mismatched_keys"]]
    if missing:
        raise UserError(
            f"{len(missing)} weights are missing or misshapen, {missing[0]} among them",
            name,
            "use a complete model; a trunk has no language-model head" if lm_head else "use a complete model",
        )
    protect_packed_weights(model)
    check_packed_layout(model, name)
    return model


def _from_export(
    cfg: BackboneConfig,
    quantization: QuantizationConfig,
    source: Source,
    lm_head: bool,
    cache_dir: str | Path | None,
    output_root: str | Path,
    device: torch.device | str | None,
) -> Any:
    """Weights of an export; adapters are merged in full precision first, then packed again when asked."""
    from saferlhf.models.metadata import read_metadata

    assert source.location is not None and source.location.folder is not None
    folder, metadata = source.location.folder, read_metadata(source.location.folder)
    if lm_head and metadata.heads:
        raise UserError(
            f"a {metadata.kind} export has no language-model head", str(folder), "start from a run of task=sft"
        )
    if metadata.weights not in ("adapter", "base"):
        return load_pretrained(str(folder), cfg, quantization, lm_head=lm_head, device=device)
    from saferlhf.models.loading import load_export
    from saferlhf.models.merge import merged_model

    loaded = load_export(source.location, output_root=output_root, cache_dir=cache_dir)
    trained = getattr(loaded.model, "trunk", loaded.model)
    # merged in float32 and written as float32: the dtype asked for is applied at load, as for any other folder
    merged = merged_model(trained, torch.float32)
    root = cache_root(cache_dir)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="merged-", dir=root) as draft:
        save_in_this_process(merged, draft)  # of several each loads what it merged itself
        return load_pretrained(draft, cfg, quantization, lm_head=lm_head, device=device)


def _finish(
    model: Any, cfg: BackboneConfig, vocabulary_size: int | None, pad_token_id: int | None, eos_token_id: int | None
) -> None:
    embedding = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if vocabulary_size is not None and vocabulary_size > rows:
        raise UserError(
            f"the tokenizer has {vocabulary_size} tokens, the model's embedding only {rows} rows",
            f"backbone={cfg.name}",
            "use the tokenizer that belongs to the model",
        )
    # a padding_idx row takes no gradient; where the pad token is also the end-of-sequence token, that row must learn
    embedding.padding_idx = None
    if pad_token_id is not None:
        check_pad_token(model, pad_token_id)
    for key, value in (("pad_token_id", pad_token_id), ("eos_token_id", eos_token_id)):
        if value is not None:
            setattr(model.config, key, value)
            if getattr(model, "generation_config", None) is not None:
                setattr(model.generation_config, key, value)
    model.config.use_cache = False
    if cfg.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError("this architecture has no gradient checkpointing", f"backbone={cfg.name}", "switch it off")
        checkpoint_activations(model)
    model.train()


def check_pad_token(model: Any, pad_token_id: int) -> None:
    """Refuse another pad token where it would move every position: the RoBERTa family counts positions from it."""
    first = first_position(model)
    if first not in (0, pad_token_id + 1):
        raise UserError(
            f"the tokenizer pads with token {pad_token_id}, the model was built for {first - 1}, from which it counts"
            " its positions",
            type(model).__name__,
            "use the tokenizer that belongs to the model",
        )


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in backward; the reentrant kind would lose gradients of adapters on a frozen embedding."""
    if hasattr(model, "activation_checkpointing_enable"):  # the name from transformers 5.23 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def auto_class(lm_head: bool) -> Any:
    """The transformers auto class for a causal LM or a trunk."""
    from transformers import AutoModel, AutoModelForCausalLM

    return AutoModelForCausalLM if lm_head else AutoModel


def without_pooler(model: Any) -> Any:
    """Drop an encoder's pooling layer: nothing here uses it, and unused parameters upset data parallelism."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _refuse_encoder(config: Any, lm_head: bool, cfg: BackboneConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    kind = config.model_type
    if lm_head and (kind not in CAUSAL or (kind in MASKED and not getattr(config, "is_decoder", False))):
        raise UserError(f"{kind} does not generate text", f"backbone={cfg.name}", "use a causal language model")


def backbone_dict(cfg: BackboneConfig) -> dict[str, Any]:
    """The configuration as plain JSON."""
    return plain(asdict(cfg) if isinstance(cfg, BackboneConfig) else cfg)
