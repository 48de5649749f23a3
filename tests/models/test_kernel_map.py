"""A kernel between pooled states and heads: equal to the fitted basis, exported to equal scores, damage found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import backbone, metadata, padded, rows, tokenizer

from saferlhf.errors import UserError
from saferlhf.models.export import save_export
from saferlhf.models.kernel_map import KernelMap
from saferlhf.models.loading import load_export
from saferlhf.models.metadata import HEADS_FILE
from saferlhf.models.score_model import ScoreModel
from saferlhf.ops.kernel import KernelBasis
from saferlhf.ops.linear_probe import apply_heads
from saferlhf.tasks.probe import score_heads

IDS, MASK = padded(rows(6), "right")


def fitted() -> tuple[ScoreModel, KernelBasis, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """A model whose heads read the kernel of its own states of some rows."""
    trunk = backbone()
    plain = ScoreModel(trunk, {"unsafe": 1}, pooling="mean", layers=(1, 2))
    with torch.no_grad():
        states = plain.pooled(*padded(rows(40, seed=7), "right")).numpy()
    basis = KernelBasis.of(states, gamma=1.0, axes=16, rank=20)
    heads = {"unsafe": (np.random.default_rng(0).normal(size=(1, 20)), np.array([0.3]))}
    model = ScoreModel(
        trunk.requires_grad_(False),
        score_heads(basis.unfold(heads)),
        pooling="mean",
        layers=(1, 2),
        kernel=KernelMap.of(basis),
    )
    return model.requires_grad_(False).eval(), basis, heads


def test_scores_are_those_of_the_fit() -> None:
    model, basis, heads = fitted()
    with torch.no_grad():
        found = model(IDS, MASK)["unsafe"]
        states = model.pooled(IDS, MASK).numpy()
    expected = apply_heads(heads, basis.project(states))["unsafe"].float()
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_half_precision_is_widened() -> None:
    model, _, _ = fitted()
    with torch.no_grad():
        pooled = model.pooled(IDS, MASK).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            inside = model.scores(pooled)["unsafe"]
        torch.testing.assert_close(inside, model.scores(pooled.float())["unsafe"], atol=0, rtol=0)
    assert inside.dtype == torch.float32


def test_an_export_scores_alike(tmp_path: Path) -> None:
    model, _, _ = fitted()
    written = save_export(tmp_path / "export", model=model, tokenizer=tokenizer(), metadata=metadata("moderator"))
    assert written.kernel == "gaussian"
    loaded = load_export(str(tmp_path / "export"), require_heads=True)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS, MASK)["unsafe"], model(IDS, MASK)["unsafe"], atol=1e-5, rtol=0)
    other = metadata("moderator", heads=written.heads)
    assert other.identity() != metadata("moderator", heads=written.heads, kernel="gaussian").identity()


@pytest.mark.parametrize("damage", ["missing", "shape", "nan"])
def test_a_damaged_kernel_is_refused(tmp_path: Path, damage: str) -> None:
    model, _, _ = fitted()
    save_export(tmp_path / "export", model=model, tokenizer=tokenizer(), metadata=metadata("moderator"))
    file = tmp_path / "export" / HEADS_FILE
    tensors = dict(load_file(file))
    if damage == "missing":
        del tensors["kernel.axes"]
    elif damage == "shape":
        tensors["kernel.landmarks"] = tensors["kernel.landmarks"][:, :-1].contiguous()
    else:
        tensors["kernel.scale"][0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match="kernel"):
        load_export(str(tmp_path / "export"))
