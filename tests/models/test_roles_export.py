"""A trained actor leaves as any SFT run does, from either kind of roles; packed bases hold all roles too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from role_models import PLAIN, Models, PolicyRoleConfig, build, export, on_one_base, on_sft, response_mask
from tiny_models import NF4, metadata, padded, rows, stir
from tiny_models import tokenizer as make_tokenizer

from saferlhf.models.export import save_export
from saferlhf.models.loading import load_export
from saferlhf.models.roles import Roles

IDS, MASK = padded(rows(5), "right")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return on_one_base(tmp_path_factory.mktemp("export"))


def exported(roles: Roles, folder: Path, merge: bool = False) -> torch.Tensor:
    """Logits of the actor that was written and read again."""
    model, adapter = roles.actor_for_export()
    flags = [p.requires_grad for p in roles.parameters()]
    with roles.using("reference"):  # whichever adapter happens to be in use, the actor's is written
        written = save_export(
            folder, model=model, adapter=adapter, tokenizer=make_tokenizer(), metadata=metadata("sft"), merge=merge
        )
    assert [p.requires_grad for p in roles.parameters()] == flags
    assert written.heads == {}
    assert written.weights in ("full", "adapter", "merged")
    names = {file.name for file in folder.iterdir()}
    assert ("adapter_model.safetensors" in names) is (written.weights == "adapter")
    assert not any(file.is_dir() and file.name != "base" for file in folder.iterdir())
    with torch.no_grad():
        return load_export(str(folder)).model(input_ids=IDS, attention_mask=MASK.long()).logits[MASK]


def actor(roles: Roles) -> torch.Tensor:
    stir(roles, 0.2)  # the reference and its export would show if they were written instead
    with torch.no_grad():
        found = roles.logits("actor", IDS, MASK)[MASK]
        assert (found - roles.logits("reference", IDS, MASK)[MASK]).abs().max() > 1e-2
    return found


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_adapters(models: Models, tmp_path: Path, kind: str, merge: bool) -> None:
    roles = build(kind, models)
    expected = actor(roles)
    torch.testing.assert_close(exported(roles, tmp_path / "actor", merge), expected, atol=2e-5, rtol=0)
    again = build("shared", models, roles={"actor": PolicyRoleConfig(str(tmp_path / "actor"))}) if not merge else None
    if again is not None:
        with torch.no_grad():
            torch.testing.assert_close(again.logits("reference", IDS, MASK)[MASK], expected, atol=2e-5, rtol=0)


def test_whole_weights(models: Models, tmp_path: Path) -> None:
    roles = build("separate", models, adapter=PLAIN)
    expected = actor(roles)
    torch.testing.assert_close(exported(roles, tmp_path / "actor"), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("lora", [True, False])
def test_on_a_base_that_is_the_sft_model(tmp_path: Path, lora: bool) -> None:
    roles = build("shared", on_sft(tmp_path, lora))
    expected = actor(roles)
    torch.testing.assert_close(exported(roles, tmp_path / "actor"), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", [pytest.param("separate", marks=pytest.mark.slow), "shared"])
def test_on_a_base_that_came_with_the_export(tmp_path: Path, kind: str) -> None:
    names = ("sft", "reward", "cost")
    locators = [export(tmp_path / name, name, None, seed=4) for name in names]
    roles = build(kind, Models("", *locators))
    expected = actor(roles)
    torch.testing.assert_close(exported(roles, tmp_path / "actor"), expected, atol=2e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ nf4
def test_all_roles_on_one_packed_base(tmp_path: Path) -> None:
    models = on_one_base(tmp_path, NF4)
    shared, separate = (build(kind, models, quantization=NF4) for kind in ("shared", "separate"))
    packed = {name: p.clone() for name, p in shared.named_parameters() if p.dtype == torch.uint8}
    assert packed
    response = response_mask(MASK)
    for mode in (False, True):  # an eval-mode pass must leave packed weights as they were
        for roles in (shared, separate):
            roles.train(mode)
        with torch.no_grad():
            for name in ("actor", "reference"):
                torch.testing.assert_close(shared.logits(name, IDS, MASK), separate.logits(name, IDS, MASK))
            for name in ("reward", "cost"):
                torch.testing.assert_close(
                    shared.scores(name, IDS, MASK, response), separate.scores(name, IDS, MASK, response)
                )
    for roles in (shared, separate):
        for name in ("reward_critic", "cost_critic"):
            with roles.using(name):
                roles.values(name, IDS, MASK).square().sum().backward()
    for name in ("reward_critic", "cost_critic"):
        for a, b in zip(shared.trainable(name), separate.trainable(name), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(p, packed[name]) for name, p in shared.named_parameters() if name in packed)
    expected = actor(shared)
    torch.testing.assert_close(exported(shared, tmp_path / "actor"), expected, atol=1e-4, rtol=0)
