"""LoRA adapters (peft): adding them, switching between them, counting and collecting what is trained.

`W x + (alpha / rank) B A x` with A random, B zero, W frozen (Hu et al. 2021, arXiv 2106.09685). B = 0 makes a fresh
adapter the identity. Heads stand outside the backbone and are never adapted.

peft's own switches change `requires_grad` behind one's back: `set_adapter` turns it on for the chosen adapter (a frozen
reference too) and off for the others, and leaving `disable_adapter` turns it on again. `using_adapter` and
`adapter_disabled` change the forward pass only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saferlhf.config.schema import AdapterConfig
from saferlhf.errors import UserError


def add_lora(model: nn.Module, cfg: AdapterConfig, *, name: str = "default", seed: int = 0) -> Any:
    """A backbone whose weights are frozen and which learns through a LoRA adapter.

    Adapter weights are float32 whatever the dtype of the base; equal seeds give equal adapters.

    Args:
        model: backbone from `load_backbone` (4-bit too), or a model that already has an adapter: `name` is added then.
        cfg: rank, alpha, dropout, target modules.
        name: of the adapter.
        seed: of A's random start.

    Returns:
        A `PeftModel` around (or equal to) `model`, in the mode (train or eval) the model was in.
    """
    if cfg.name != "lora":
        raise UserError(f"unknown adapter {cfg.name!r}", "adapter.name", "one of none, lora")
    from peft import LoraConfig, PeftModel, get_peft_model

    targets = cfg.target_modules if isinstance(cfg.target_modules, str) else [str(t) for t in cfg.target_modules]
    lora = LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=targets,
        bias="none",
        fan_in_fan_out=_is_conv1d(model),
    )
    training = model.training
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed)
        try:
            if isinstance(model, PeftModel):
                model.add_adapter(name, lora)
            else:
                model = get_peft_model(model, lora, adapter_name=name)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(
                f"LoRA fits no layer: {error}", "adapter.target_modules", "name layers of this backbone, or all-linear"
            ) from error
    return model.train(training)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """No warning about an attribute of transformers that peft still asks for by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def _is_conv1d(model: nn.Module) -> bool:
    """GPT-2 keeps its weights transposed, in modules of their own kind."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


@contextmanager
def using_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Run with adapter `name`, or with none; `requires_grad` of every parameter stays as it was, inside and after.

    Args:
        model: has adapters; anything else is refused, since "off" would silently mean the trained model itself.
        name: adapter to use; None: the frozen base alone. The base is the reference policy only if the supervised
            model was merged into it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError("the model has no adapter to switch")
    if name is not None and not any(name in layer.active_adapters or _has(layer, name) for layer in layers):
        raise ValueError(f"the model has no adapter named {name!r}")
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = [(layer, layer.disable_adapters, list(layer.active_adapters)) for layer in layers]
    try:
        for layer in layers:
            _switch(layer, name is None, None if name is None else [name])
        _restore(flags)
        yield
    finally:
        for layer, disabled, active in before:
            _switch(layer, disabled, active)
        _restore(flags)


def adapter_disabled(model: nn.Module) -> Any:
    """Context in which the frozen base runs alone; `requires_grad` flags stay as they were."""
    return using_adapter(model, None)


def _has(layer: Any, name: str) -> bool:
    return any(name in getattr(layer, kind, {}) for kind in layer.adapter_layer_names)


def _switch(layer: Any, disabled: bool, active: list[str] | None) -> None:
    if active is not None:
        layer.set_adapter(active)
    layer.enable_adapters(not disabled)


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter with `requires_grad`, in the model's own order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, frozen) numbers of weights; a 4-bit weight counts as the weights it stands for, not as bytes."""
    trained = frozen = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else int(torch.Size(state.shape).numel())
        if parameter.requires_grad:
            trained += count
        else:
            frozen += count
    return trained, frozen


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint needs when the frozen base can be loaded again: trained parameters under their own names."""
    return {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}


def load_trainable_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy trained parameters back; a missing, surplus or misshapen one raises KeyError or ValueError."""
    wanted = trainable_parameters(model)
    missing, surplus = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    if missing or surplus:
        raise KeyError(f"trained weights do not match: missing {sorted(missing)[:3]}, surplus {sorted(surplus)[:3]}")
    for name, parameter in wanted.items():
        if parameter.shape != state[name].shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, expected {tuple(parameter.shape)}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])
