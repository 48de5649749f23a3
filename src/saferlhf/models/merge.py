"""Merging: a plain model whose weights are `W + (alpha / rank) B A`, without adapters and without 4-bit storage.

Computed from the pieces instead of by the adapter library's own merge, which packs a 4-bit layer again afterwards and
loses digits each time. Packed weights are unpacked exactly (float32), so a merged model differs from the trained one by
rounding only when that one multiplied in float32; if it multiplied unpacked weights in bfloat16, scores differ by that.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from saferlhf.models.backbone import without_pooler
from saferlhf.models.quantization import packed_layers, unpacked


def merged_model(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A plain model of the same class with adapters (if any) merged and packed weights unpacked; `model` is untouched.

    Args:
        model: a backbone, with or without adapters; the active adapters are merged, disabled ones are not.
        dtype: of the result; None: the model's own.

    Returns:
        A `PreTrainedModel` in eval mode on the CPU, meant to be saved.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dtype = dtype or base.dtype
    config = type(base.config).from_dict(
        {key: value for key, value in base.config.to_dict().items() if key != "quantization_config"}
    )
    with torch.device("meta"):
        plain = without_pooler(type(base)(config))
    state = {name: value.to("cpu", dtype) for name, value in _merged_state(base).items()}
    for name in _transposed(base, plain):
        state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
    surplus = plain.load_state_dict(state, strict=False, assign=True).unexpected_keys
    if surplus:
        raise RuntimeError(f"merging made {len(surplus)} weights that the plain model lacks, {surplus[0]} among them")
    plain.tie_weights()
    hollow = [name for name, parameter in plain.named_parameters() if parameter.is_meta]
    if hollow:
        raise RuntimeError(f"merging left {len(hollow)} weights empty, {hollow[0]} among them")
    plain.config.dtype = dtype
    if getattr(base, "generation_config", None) is not None:
        plain.generation_config = base.generation_config
    return plain.eval()


def _transposed(base: Any, plain: Any) -> list[str]:
    """Layers that the plain model keeps as (in, out), as GPT-2 does, and that were turned (out, in) to be packed."""
    from transformers.pytorch_utils import Conv1D

    layers = packed_layers(base)
    return [
        name
        for name, module in plain.named_modules()
        if isinstance(module, Conv1D) and (name in layers or f"{name}.base_layer" in layers)
    ]


@torch.no_grad()
def _merged_state(base: Any) -> dict[str, Tensor]:
    from peft.tuners.lora import LoraLayer

    modules = dict(base.named_modules())
    persistent = base.state_dict().keys()
    state: dict[str, Tensor] = {}
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        if ".lora_" in name or name not in persistent:
            continue
        owner, _, leaf = name.rpartition(".")
        value = unpacked(tensor)
        layer = modules.get(owner.removesuffix(".base_layer"))
        if leaf == "weight" and owner.endswith(".base_layer") and isinstance(layer, LoraLayer):
            value = value.float()
            for adapter in [] if layer.disable_adapters else layer.active_adapters:
                if adapter in layer.lora_A:
                    value = value + cast(Any, layer).get_delta_weight(adapter).float()
        state[name.replace(".base_layer.", ".")] = value
    return state
