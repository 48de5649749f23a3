"""A policy's weights under the names of the model it was made from, adapters added in; the policy stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from saferlhf.errors import UserError
from saferlhf.models.causal import unwrapped


@torch.no_grad()
def merged_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name -> tensor of the plain model, one at a time; where LoRA sits, W + (alpha / r) B A.

    Nothing is merged in place, which would leave rounding behind in the base that all roles share.

    Raises:
        UserError: the base is packed (4-bit): its weights are not numbers that could be handed over.
    """
    from peft.tuners.lora import LoraLayer

    model: Any = unwrapped(policy)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" in name or name.startswith("lora_"):
            continue
        owner, _, leaf = name.rpartition(".")
        inner = owner.removesuffix(".base_layer")
        if "quant_state" in name or ".absmax" in name or tensor.dtype == torch.uint8:
            raise UserError("a packed base cannot be handed to another engine", "rollout.engine", "use rollout=native")
        if inner in layers and leaf == "weight":
            layer: Any = layers[inner]
            # its own dtype at the end: the sum of half-precision parts is taken in float32
            total = tensor.float()
            for adapter in () if layer.disable_adapters else layer.active_adapters:
                if adapter in layer.lora_A:
                    total = total + layer.get_delta_weight(adapter).float()
            yield f"{inner}.{leaf}", total.to(tensor.dtype)
        else:
            yield (f"{inner}.{leaf}" if inner else leaf), tensor.detach()
