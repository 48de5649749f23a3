"""4-bit storage of a frozen base (nf4, bitsandbytes), on GPUs and on CPUs.

Packed at load by a `BitsAndBytesConfig`. On CPUs with avx512_bf16, bitsandbytes 0.50 rewrites the packed weights in
place at the first forward in eval mode without a gradient: block scales are rounded to bfloat16, double quantisation is
dropped, the layout changes, and a later training forward reads it as if it had not (wrong gradients, no error; layers
whose out_features are no multiple of 32 stop with an assertion). `protect_packed_weights` switches that off, layer by
layer; it must run after every load and before the first forward.

The same release unpacks a layer wrongly on CPUs when its in_features are no multiple of the block size, 64: blocks run
over row ends when packing, but not when unpacking (no message, and an error of 0.15 to 0.5 of the weights' standard
deviation instead of 0.09). `check_packed_layout` refuses such models there.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor, nn

from saferlhf.config.schema import QuantizationConfig
from saferlhf.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str, where: str) -> torch.dtype:
    """The torch dtype of that name; UserError names the key `where`."""
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}", where, f"one of {', '.join(DTYPES)}")
    return DTYPES[name]


def is_quantized(cfg: QuantizationConfig) -> bool:
    """True for nf4, False for none; UserError for any other name."""
    if cfg.name not in ("none", "nf4"):
        raise UserError(f"unknown quantization {cfg.name!r}", "quantization.name", "one of none, nf4")
    return cfg.name == "nf4"


def load_arguments(cfg: QuantizationConfig, device: torch.device | str | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` that pack the weights at load: empty for `none`.

    A packed model cannot be cast and should not be moved, so it is placed where it will stay.

    Args:
        cfg: the quantisation.
        device: where the weights go; None: the current GPU, or the CPU without one.
    """
    if not is_quantized(cfg):
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("quantization=nf4 needs bitsandbytes", "", "pip install bitsandbytes, or quantization=none")
    from transformers import BitsAndBytesConfig

    packed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=cfg.double_quant,
        bnb_4bit_compute_dtype=torch_dtype(cfg.compute_dtype, "quantization.compute_dtype"),
    )
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    return {"quantization_config": packed, "device_map": {"": torch.device(device)}}


def packed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> 4-bit linear layer; empty for a model that is not quantised."""
    # a quantised model cannot exist unless bitsandbytes was imported; spare everybody else its import
    if "bitsandbytes" not in sys.modules:
        return {}
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def protect_packed_weights(model: nn.Module) -> int:
    """Keep 4-bit weights as they were packed, also in eval mode on CPUs with avx512_bf16.

    Returns:
        The number of 4-bit layers.
    """
    layers = packed_layers(model)
    for name, layer in layers.items():
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise RuntimeError(f"{name} was run in eval mode before protect_packed_weights; load the model again")
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return len(layers)


def check_packed_layout(model: nn.Module, where: str) -> None:
    """Refuse 4-bit layers on a CPU whose in_features are no multiple of the block size: they compute nonsense."""
    for name, layer in packed_layers(model).items():
        weight: Any = layer.weight
        inputs, block = int(weight.quant_state.shape[-1]), int(weight.quant_state.blocksize)
        if weight.device.type == "cpu" and inputs % block:
            raise UserError(
                f"layer {name} has {inputs} inputs, no multiple of {block}: bitsandbytes unpacks it wrongly on a CPU",
                where,
                "use quantization=none, or a GPU",
            )


def unpacked(weight: Tensor) -> Tensor:
    """The weight a 4-bit parameter stands for, (out, in) in float32; any other weight unchanged."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    if getattr(state, "packing_format_for_cpu", False):
        raise RuntimeError("packed weights were rewritten by an eval-mode forward; load the model again")
    from bitsandbytes.functional import dequantize_4bit

    # the state says in which dtype to multiply code by scale: float32 keeps every digit
    kept, state.dtype = state.dtype, torch.float32
    try:
        return dequantize_4bit(weight.data, state)
    finally:
        state.dtype = kept
