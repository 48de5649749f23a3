"""Models without weights: the shapes of a backbone from its configuration alone, built on fake tensors.

A plan needs to know how large a model is and what it computes, not what it has learned. The architecture is read from
`backbone.architecture`, from the `config.json` of a folder or an export, from the short list of `KNOWN` models, or from
the hub's cache; of a hub model that none of these knows, its `config.json` alone is fetched.

nf4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): a block of 64 weights takes 64 * 4 bits and one scale, which is a
float32, or with double quantisation 8 bits and one float32 for 256 scales:

    4 + 32 / 64 = 4.5        or        4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits per weight

and a layer's code tables, 16 (and 256) float32. Embeddings, norms, heads and the language-model head are not packed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from saferlhf.config.schema import AdapterConfig, BackboneConfig, QuantizationConfig
from saferlhf.errors import UserError
from saferlhf.models.adapters import add_lora
from saferlhf.models.backbone import architecture_config, auto_class, without_pooler
from saferlhf.models.quantization import is_quantized, torch_dtype

BLOCK, SCALE_BLOCK = 64, 256
"""Weights that share a scale, and scales that share one themselves (bitsandbytes' defaults)."""


def _llama(hidden: int, inside: int, blocks: int, heads: int, kv: int, words: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inside, "num_hidden_layers": blocks}
    return {"model_type": "llama", **sizes, "num_attention_heads": heads, "num_key_value_heads": kv,
            "vocab_size": words, "tie_word_embeddings": False, **more}  # fmt: skip


_LLAMA_7B = _llama(4096, 11008, 32, 32, 32, 32000)
_LLAMA_3_8B = _llama(4096, 14336, 32, 32, 8, 128256)
_LLAMA_3_70B = _llama(8192, 28672, 80, 64, 8, 128256)

KNOWN: dict[str, dict[str, Any]] = {
    "huggyllama/llama-7b": _LLAMA_7B,
    "meta-llama/Llama-2-7b-hf": _LLAMA_7B,
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA_7B,
    "PKU-Alignment/alpaca-7b-reproduced": {**_LLAMA_7B, "vocab_size": 32001},
    "PKU-Alignment/beaver-7b-v1.0": {**_LLAMA_7B, "vocab_size": 32001},
    "meta-llama/Llama-2-13b-hf": _llama(5120, 13824, 40, 40, 40, 32000),
    "meta-llama/Llama-2-70b-hf": _llama(8192, 28672, 80, 64, 8, 32000),
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_3_70B,
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_3_70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_3_70B,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
}
"""Shapes of models that the experiments name, as their configurations give them: a plan of these asks no network."""


# ------------------------------------------------------------------------------------------------ configuration
def shape_config(cfg: BackboneConfig, *, folder: Path | None = None, vocabulary_size: int | None = None) -> Any:
    """The transformers configuration of a backbone; no weights are read, and none are downloaded.

    Args:
        cfg: the backbone.
        folder: where the weights start instead: a Hugging Face folder, an export or its base.
        vocabulary_size: of the tokenizer, for an architecture that does not say.

    Raises:
        UserError: the configuration is nowhere to be found.
    """
    from transformers import AutoConfig

    if folder is not None and (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(str(folder))
    if cfg.architecture is not None:
        return architecture_config(cfg, vocabulary_size)
    name = str(cfg.model)
    if name in KNOWN:
        return architecture_config(replace(cfg, architecture=KNOWN[name]), None)
    arguments: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code, "revision": cfg.revision}
    try:
        try:
            return AutoConfig.from_pretrained(name, local_files_only=True, **arguments)
        except (OSError, ValueError):
            return AutoConfig.from_pretrained(name, **arguments)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        mend = "check backbone.model, or plan with backbone=llama_7b, whose shapes are at hand"
        raise UserError(f"the model's configuration cannot be read: {first}", name, mend) from error


# ------------------------------------------------------------------------------------------------ packed weights
def packed_nbytes(weights: int, double_quant: bool = True) -> int:
    """Bytes of one layer in nf4: packed weights, scales and code tables.

    Args:
        weights: in the layer.
        double_quant: whether the scales are quantised too.
    """
    blocks = math.ceil(weights / BLOCK)
    codes = 16 * 4
    if not double_quant:
        return math.ceil(weights / 2) + 4 * blocks + codes
    # 8 bits a scale, a float32 for 256 of them, their table, and the mean that was taken off
    return math.ceil(weights / 2) + blocks + 4 * math.ceil(blocks / SCALE_BLOCK) + codes + 256 * 4 + 4


class _Unpacked(torch.autograd.Function):
    """`x W'` with W unpacked for the product and thrown away, forward and backward, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, out_features: int) -> Tensor:
        ctx.shape = (out_features, x.shape[-1])
        return nn.functional.linear(x, x.new_empty(ctx.shape))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        gradient = gradients[0]
        return gradient @ gradient.new_empty(ctx.shape), None, None


class PackedLinear(nn.Linear):
    """What a 4-bit layer takes and makes, without its numbers: for fake tensors only."""

    def __init__(self, linear: nn.Linear, cfg: QuantizationConfig) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device=linear.weight.device)
        self.bias = linear.bias
        packed = torch.empty(math.ceil(linear.weight.numel() / 2), 1, dtype=torch.uint8, device=linear.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight.packed_nbytes = packed_nbytes(linear.weight.numel(), cfg.double_quant)  # type: ignore[attr-defined]
        self.weight.packed_numel = linear.weight.numel()  # type: ignore[attr-defined]
        self.compute = torch_dtype(cfg.compute_dtype, "quantization.compute_dtype")

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the input's dtype."""
        found = _Unpacked.apply(input.to(self.compute), self.weight, self.out_features).to(input.dtype)
        return found if self.bias is None else found + self.bias


def pack(model: nn.Module, cfg: QuantizationConfig) -> None:
    """Put a stand-in in the place of every linear layer that bitsandbytes would pack: all but the output layer."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not head:
                setattr(parent, name, PackedLinear(child, cfg))
    model.requires_grad_(False)


# ------------------------------------------------------------------------------------------------ fake models
def faking() -> FakeTensorMode:
    """The context in which tensors have shapes and no content; a model built in one is used in the same one."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_backbone(
    config: Any,
    cfg: BackboneConfig,
    quantization: QuantizationConfig,
    adapter: AdapterConfig | None,
    *,
    lm_head: bool,
    precision: str | None = "32-true",
) -> Any:
    """A backbone as a run would load it, in train mode, to be used inside the `faking()` it was built in.

    It is built on the meta device, where modules may be replaced and cast, and its tensors become fake ones at the end.

    Args:
        config: of `shape_config`.
        cfg: dtype, attention, checkpointing.
        quantization: none or nf4.
        adapter: LoRA, or None: all weights are as the quantisation leaves them (trained, or packed and frozen).
        lm_head: causal language model, or bare trunk.
        precision: of the trainer; bf16-true turns every weight into bfloat16.
    """
    with unset_fake_temporarily(), torch.device("meta"):
        model = _meta_backbone(config, cfg, quantization, adapter, lm_head)
        if precision == "bf16-true":
            model = model.to(torch.bfloat16)
    return as_fake(model.train())


def _meta_backbone(
    config: Any, cfg: BackboneConfig, quantization: QuantizationConfig, adapter: AdapterConfig | None, lm_head: bool
) -> Any:
    dtype = torch_dtype(cfg.dtype, "backbone.dtype")
    built = auto_class(lm_head).from_config(config, dtype=dtype, attn_implementation=_attention(cfg.attention))
    model = without_pooler(built)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    if is_quantized(quantization):
        pack(model, quantization)
    if cfg.gradient_checkpointing:
        # generator states have no content here, and nothing is drawn
        arguments = {"use_reentrant": False, "preserve_rng_state": False}
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    if adapter is not None and adapter.name == "lora":
        model = add_lora(model, adapter)
    return model


def as_fake(model: nn.Module) -> nn.Module:
    """The model with fake tensors in the place of its meta tensors; those that were tied stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # which also keeps the old ones: an id may be given away again
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:
                blank = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad)
                for mark in ("packed_nbytes", "packed_numel"):
                    if hasattr(parameter, mark):
                        setattr(blank, mark, getattr(parameter, mark))
                made[parameter] = blank
            module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def _attention(name: str) -> str:
    """The fused kernels keep the same (queries, keys, values, output, one number per row) for the backward pass."""
    return "sdpa" if name == "flash_attention_2" else name


def count_weights(parameters: Iterable[Tensor]) -> int:
    """Numbers in the parameters; a packed one counts as the weights it stands for."""
    return sum(int(getattr(p, "packed_numel", p.numel())) for p in parameters)


def weight_nbytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of the parameters; a packed one with its scales."""
    return sum(int(getattr(p, "packed_nbytes", p.numel() * p.element_size())) for p in parameters)


def kv_nbytes(config: Any, rows: int, tokens: int, element_size: int) -> int:
    """Bytes of the key-value cache.

    Args:
        config: of the model.
        rows, tokens: responses at once, and tokens of each, prompt and room for the response.
        element_size: bytes of a number.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * int(text.num_hidden_layers) * int(kv) * int(width) * rows * tokens * element_size
