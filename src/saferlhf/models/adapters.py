"""LoRA adapters (peft): adding them, switching between them, counting and collecting what is trained.

`W x + (alpha / rank) B A x` with A random, B zero, W frozen (Hu et al. 2021, arXiv 2106.09685). B = 0 makes a fresh
adapter the identity. Heads stand outside the backbone and are never adapted.

peft's own switches change `requires_grad` behind one's back: `set_adapter` turns it on for the chosen adapter (a frozen
reference too) and off for the others, and leaving `disable_adapter` turns it on again. `using_adapter` and
`adapter_disabled` change the forward pass only: they set the two attributes that it looks at.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from saferlhf.config.schema import AdapterConfig
from saferlhf.errors import UserError
from saferlhf.models.layers import blocks_of


def add_lora(
    model: nn.Module, cfg: AdapterConfig, *, name: str = "default", seed: int = 0, read: int | None = None
) -> Any:
    """A backbone whose weights are frozen and which learns through a LoRA adapter.

    Adapter weights are float32 whatever the dtype of the base; equal seeds give equal adapters.

    Args:
        model: backbone from `load_backbone` (4-bit too), or a model that already has an adapter: `name` is added then.
        cfg: rank, alpha, dropout, target modules.
        name: of the adapter.
        seed: of A's random start.
        read: the highest hidden state that is read, where it is not the last: blocks above it get no adapter.

    Returns:
        A `PeftModel` around (or equal to) `model`, in the mode (train or eval) the model was in.
    """
    if cfg.name != "lora":
        raise UserError(f"unknown adapter {cfg.name!r}", "adapter.name", "one of none, lora")
    from peft import LoraConfig, PeftModel, get_peft_model

    targets = cfg.target_modules if isinstance(cfg.target_modules, str) else [str(t) for t in cfg.target_modules]
    if cfg.blocks is not None or read is not None:
        targets = _targets_in_blocks(model, targets, cfg.blocks, read)
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


def _targets_in_blocks(model: nn.Module, targets: str | list[str], blocks: list[int] | None, read: int | None) -> Any:
    """Full names of the modules to adapt in some blocks only; blocks are numbered from 0."""
    modules = blocks_of(model)
    count = len(modules)
    read = count if read is None else read
    if blocks is None and read >= count:
        return targets
    unread = [block for block in blocks or () if block >= read]
    if unread:
        what = f"block {unread[0]} is not read: the model has {count}, the heads see the first {read}"
        raise UserError(what, "adapter.blocks", f"0 to {read - 1}, or null")
    chosen = {modules[block] for block in (range(read) if blocks is None else blocks)}
    linear: Any = (nn.Linear, *_conv1d())
    names = []
    for path, block in model.named_modules():
        if block not in chosen:
            continue
        for name, module in block.named_modules():
            wanted = isinstance(targets, str) or any(f".{name}".endswith(f".{target}") for target in targets)
            if isinstance(module, linear) and wanted:
                names.append(f"{path}.{name}")
    if isinstance(targets, str) and targets != "all-linear":
        raise UserError(f"{targets!r} names modules by a pattern", "adapter.blocks", "all-linear, or a list of names")
    if not names:
        raise UserError("LoRA fits no layer of these blocks", "adapter.target_modules", "name layers of this backbone")
    return names


def add_saved_lora(model: nn.Module, folder: Path, *, name: str) -> Any:
    """Put the adapter of an export on a model under a new name; several times, under several names, makes copies.

    An adapter trained on a bare trunk fits the causal model around that trunk, and its modules are named one by one, so
    that nothing but what was trained gets one.

    Args:
        model: the base that the adapter was trained on (or the causal model of it), or a `PeftModel` around it.
        folder: holds adapter_config.json and adapter_model.safetensors.
        name: of the adapter from now on.

    Returns:
        A `PeftModel` around (or equal to) `model`, in its mode; the adapter's weights are float32.

    Raises:
        UserError: files missing or damaged, another kind of adapter, or modules that the model does not have.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    try:
        lora = LoraConfig.from_pretrained(str(folder))
        weights = load_file(str(folder / "adapter_model.safetensors"))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"the adapter cannot be read: {first}", str(folder), "export the model again") from error
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    places = _places(weights, base, folder)
    lora.target_modules, lora.inference_mode = sorted(set(places.values())), False
    lora.base_model_name_or_path = getattr(base, "name_or_path", None)  # said already, or peft would warn
    training = model.training
    with torch.random.fork_rng(devices=[]), quiet_peft():
        if isinstance(model, PeftModel):
            model.add_adapter(name, lora)
        else:
            model = get_peft_model(model, lora, adapter_name=name)  # type: ignore[arg-type]
    own = {key: p for key, p in model.named_parameters() if ".lora_" in key and f".{name}." in key}
    state = {
        f"base_model.model.{places[key]}.{_half(key)}.{name}.weight": value for key, value in weights.items()
    }  # fmt: skip
    if own.keys() != state.keys() or any(own[key].shape != state[key].shape for key in own):
        raise UserError("the adapter's weights do not fit its configuration", str(folder), "export the model again")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(state[key])
    return model.train(training)


def _half(key: str) -> str:
    """lora_A or lora_B."""
    return key.removesuffix(".weight").rpartition(".")[2]


def _places(weights: Mapping[str, Tensor], base: Any, folder: Path) -> dict[str, str]:
    """Saved weight -> full name of the module that it adapts, in a causal model or in a trunk."""
    # a module that has an adapter already keeps its name, the layer inside it moves down
    names = {name for name, _ in base.named_modules()}
    places = {}
    for key in weights:
        path, _, half = key.removesuffix(".weight").removeprefix("base_model.model.").rpartition(".")
        if half not in ("lora_A", "lora_B"):
            raise UserError(f"the adapter holds {key}, which is not plain LoRA", str(folder), "train it again")
        fitting = [name for name in (path, f"{base.base_model_prefix}.{path}") if name in names]
        if not fitting:
            raise UserError(f"the model has no module {path!r} to adapt", str(folder), "use the adapter's own base")
        places[key] = fitting[0]
    return places


@contextmanager
def quiet_peft() -> Iterator[None]:
    """No warning about an attribute of transformers that peft still asks for by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def _is_conv1d(model: nn.Module) -> bool:
    """GPT-2 keeps its weights transposed, in modules of their own kind."""
    return any(isinstance(module, _conv1d()) for module in model.modules())


def _conv1d() -> tuple[Any, ...]:
    from transformers.pytorch_utils import Conv1D

    return (Conv1D,)


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
    before = [(layer, layer._disable_adapters, layer._active_adapter) for layer in layers]
    try:
        for layer in layers:
            _switch(layer, name is None, layer._active_adapter if name is None else [name])
        yield
    finally:
        for layer, disabled, active in before:
            _switch(layer, disabled, active)


def adapter_disabled(model: nn.Module) -> Any:
    """Context in which the frozen base runs alone; `requires_grad` flags stay as they were."""
    return using_adapter(model, None)


def has_active_adapter(model: nn.Module) -> bool:
    """Whether the forward pass goes through an adapter just now."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(m, BaseTunerLayer) and not m.disable_adapters for m in model.modules())


def _has(layer: Any, name: str) -> bool:
    return any(name in getattr(layer, kind, {}) for kind in layer.adapter_layer_names)


def _switch(layer: Any, disabled: bool, active: Any) -> None:
    """What peft's own switches set beside `requires_grad`, which they walk over: a tenth of a second for 30 blocks."""
    layer._disable_adapters, layer._active_adapter = disabled, active


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
