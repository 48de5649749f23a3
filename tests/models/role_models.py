"""Tiny exports that roles start from: an SFT model, reward and cost models, on one base or each a model of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models.tiny_models import NONE, backbone_config, folder_of, lora_config, metadata, padded, rows, stir
from models.tiny_models import tokenizer as make_tokenizer

from saferlhf.config.roles_schema import CriticRoleConfig, PolicyRoleConfig, RolesConfig, ScoreRoleConfig
from saferlhf.config.schema import AdapterConfig, QuantizationConfig
from saferlhf.models.adapters import add_lora
from saferlhf.models.backbone import load_backbone
from saferlhf.models.export import save_export
from saferlhf.models.role_sources import RolePlan, plan_roles
from saferlhf.models.roles import Roles
from saferlhf.models.roles_build import build_roles
from saferlhf.models.score_model import ScoreModel

PLAIN = AdapterConfig(name="none")
LORA = lora_config(target_modules=["q_proj", "down_proj"])
POLICIES, SCORES, CRITICS = ("actor", "reference"), ("reward", "cost"), ("reward_critic", "cost_critic")
KINDS = ("separate", "shared")


@dataclass(frozen=True)
class Models:
    """Locators."""

    base: str
    sft: str
    reward: str
    cost: str


def export(
    folder: Path,
    kind: str,
    start: str | None,
    *,
    lora: bool = True,
    adapter: AdapterConfig = LORA,
    seed: int = 1,
    quantization: QuantizationConfig = NONE,
    merge: bool = False,
    heads: dict[str, int] | None = None,
    layers: list[int] | None = None,
    pooling: str = "last",
    span: str = "all",
    scale: float = 0.3,
    template: str = "native",
    **changes: Any,
) -> str:
    """Train (that is, stir) a model of a kind and export it; its locator."""
    tokenizer = make_tokenizer()
    lm_head = kind == "sft"
    trunk = load_backbone(
        backbone_config(**changes), init=start, lm_head=lm_head, quantization=quantization, seed=seed,
        vocabulary_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = add_lora(trunk, adapter, seed=seed) if lora else trunk
    if not lm_head:
        model = ScoreModel(model, heads or {kind: 1}, pooling, seed=seed, layers=layers, span=span)
    stir(model, scale=scale, seed=seed)
    save_export(folder, model=model, tokenizer=tokenizer, metadata=metadata(kind, template=template), merge=merge)
    return str(folder)


def on_one_base(root: Path, quantization: QuantizationConfig = NONE, **score: Any) -> Models:
    """SFT, reward and cost: three adapters on one base."""
    base = folder_of(root / "base")
    return Models(
        base,
        export(root / "sft", "sft", base, seed=1, quantization=quantization),
        export(root / "reward", "reward", base, seed=2, quantization=quantization, **score),
        export(root / "cost", "cost", base, seed=3, quantization=quantization, **score),
    )


def on_sft(root: Path, lora: bool) -> Models:
    """SFT (an adapter or a whole model), and reward and cost adapters trained on init=SFT."""
    base = folder_of(root / "base")
    sft = export(root / "sft", "sft", base, seed=1, lora=lora)
    return Models(base, sft, export(root / "reward", "reward", sft, seed=2), export(root / "cost", "cost", sft, seed=3))


def config(name: str, models: Models | None = None, **changes: Any) -> RolesConfig:
    """`roles`, with the models of all roles."""
    if models is None:
        return RolesConfig(name, **changes)
    values: dict[str, Any] = {
        "actor": PolicyRoleConfig(models.sft),
        "reward": ScoreRoleConfig(models.reward),
        "cost": ScoreRoleConfig(models.cost),
    }
    return RolesConfig(name, **{**values, **changes})


def plan(roles: RolesConfig, **changes: Any) -> RolePlan:
    """A plan for tiny models."""
    arguments: dict[str, Any] = {
        "backbone": backbone_config(),
        "quantization": NONE,
        "adapter": LORA,
        "tokenizer": make_tokenizer(),
        "seed": 5,
    }
    return plan_roles(roles, **{**arguments, **changes})


def build(name: str, models: Models | None = None, *, roles: dict[str, Any] | None = None, **changes: Any) -> Roles:
    """The roles, in train mode."""
    return build_roles(plan(config(name, models, **(roles or {})), **changes))


def critic(model: str | None = None, head: str | None = None) -> CriticRoleConfig:
    return CriticRoleConfig(model, head)


def response_mask(mask: torch.Tensor, prompt: int = 2) -> torch.Tensor:
    """(S, T) True behind the first `prompt` real tokens."""
    return mask & (mask.cumsum(-1) > prompt)


IDS, MASK = padded(rows(5), "right")
RESPONSE = response_mask(MASK)


def outputs(roles: Roles) -> dict[str, torch.Tensor]:
    found = {name: roles.logits(name, IDS, MASK) for name in POLICIES}
    found |= {name: roles.scores(name, IDS, MASK, RESPONSE) for name in SCORES if name in roles}
    return found | {name: roles.values(name, IDS, MASK) for name in CRITICS if name in roles}


def detached(roles: Roles) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return outputs(roles)


def flags(roles: Roles) -> dict[str, tuple[bool, bool]]:
    modes = {name: module.training for name, module in roles.named_modules()}
    return {name: (p.requires_grad, modes[name.rpartition(".")[0]]) for name, p in roles.named_parameters()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].std() > 1e-3, "numbers that are all alike would prove nothing"
        torch.testing.assert_close(left[name], right[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def losses(roles: Roles, scale: float = 1.0) -> dict[str, torch.Tensor]:
    picked = roles.logits("actor", IDS, MASK)[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None]).squeeze(2)
    found = {"actor": -(picked * RESPONSE[:, 1:]).sum() * scale}
    for name in CRITICS:
        found[name] = ((roles.values(name, IDS, MASK) - 1.0).square() * RESPONSE).sum() * scale
    return found


def trained(roles: Roles, steps: int = 3) -> dict[str, list[torch.Tensor]]:
    """Train all three; gradients of the first step."""
    gradients: dict[str, list[torch.Tensor]] = {}
    optimizers = {name: torch.optim.SGD(roles.trainable(name), lr=0.02) for name in ("actor", *CRITICS)}
    for step in range(steps):
        for name, loss in losses(roles, 0.05).items():
            with roles.using(name):
                loss.backward()
            if step == 0:
                gradients[name] = [p.grad.clone() for p in roles.trainable(name)]
            optimizers[name].step()
            optimizers[name].zero_grad()
    return gradients
