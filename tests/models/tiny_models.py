"""Tiny random models of three families, and helpers that pad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saferlhf.config.schema import AdapterConfig, BackboneConfig, QuantizationConfig
from saferlhf.models.adapters import add_lora, trainable_parameters
from saferlhf.models.backbone import load_backbone
from saferlhf.models.metadata import ExportMetadata
from saferlhf.models.score_model import ScoreModel
from saferlhf.models.tokenizer import load_tokenizer

WORDS = tuple(f"w{number}" for number in range(59))  # 64 tokens with the specials

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bert": {
        "model_type": "bert",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "roberta": {
        "model_type": "roberta",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}

NONE = QuantizationConfig(name="none")
NF4 = QuantizationConfig(name="nf4", compute_dtype="float32")


def backbone_config(family: str = "llama", **changes: Any) -> BackboneConfig:
    values: dict[str, Any] = {"name": "tiny", "architecture": dict(ARCHITECTURES[family]), "tokenizer": "toyworld"}
    return BackboneConfig(**{**values, **changes})


def lora_config(**changes: Any) -> AdapterConfig:
    return AdapterConfig(**{"name": "lora", "rank": 4, "alpha": 8, **changes})


def tokenizer() -> Any:
    return load_tokenizer(backbone_config(), vocabulary=WORDS)


def backbone(family: str = "llama", *, lm_head: bool = False, seed: int = 0, **changes: Any) -> Any:
    return load_backbone(
        backbone_config(family, **changes),
        lm_head=lm_head,
        vocabulary_size=5 + len(WORDS),
        pad_token_id=0,
        eos_token_id=2,
        seed=seed,
    )


def stir(model: torch.nn.Module, scale: float = 0.3, seed: int = 1) -> None:
    """Give trained parameters (LoRA's B and biases among them) values that show when they are lost."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter += scale * torch.randn(parameter.shape, generator=stream) / parameter.shape[-1] ** 0.5


def score_model(family: str = "llama", *, lora: bool = False, pooling: str = "last", seed: int = 0) -> ScoreModel:
    trunk = backbone(family, seed=seed)
    model = ScoreModel(add_lora(trunk, lora_config()) if lora else trunk, {"cost": 1, "moderation": 3}, pooling)
    stir(model)
    return model.eval()


def folder_of(path: Path, *, lm_head: bool = True, **architecture: Any) -> str:
    """A plain Hugging Face folder with a tiny Llama and the toy world's tokenizer, to be loaded as pretrained."""
    shape = {**ARCHITECTURES["llama"], **architecture}
    model = backbone(architecture=shape, lm_head=lm_head)
    # weights of a real model's size: fresh ones are so small that any two scores look alike
    with torch.no_grad():
        stream = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=stream) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def rows(count: int = 5, longest: int = 12, seed: int = 0, first: int = 5) -> list[Tensor]:
    """Token rows of different lengths, the end-of-sequence token at their ends."""
    stream = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (count,), generator=stream).tolist()
    return [torch.cat([torch.randint(first, 64, (n - 1,), generator=stream), torch.tensor([2])]) for n in lengths]


def padded(sequences: list[Tensor], side: str, pad: int = 0, extra: int = 0) -> tuple[Tensor, Tensor]:
    """(S, T) ids and mask, padded to the longest row plus `extra`."""
    width = max(map(len, sequences)) + extra
    ids, mask = torch.full((len(sequences), width), pad), torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        room = width - len(sequence)
        start = {"right": 0, "left": room, "both": room // 2}[side]
        ids[row, start : start + len(sequence)] = sequence
        mask[row, start : start + len(sequence)] = True
    return ids, mask


def metadata(kind: str = "cost", **changes: Any) -> ExportMetadata:
    return ExportMetadata(kind=kind, **changes)
