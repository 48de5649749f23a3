"""Heads that begin at a linear probe: the fit is where training starts, and what is kept of the blocks below serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import config, only_run, own, prepared, small

from saferlhf.errors import UserError
from saferlhf.run.head_start import begin_at_probe, fitted_start
from saferlhf.run.train import train

ROWS = ("data.train_rows=400", "data.val_rows=20", "data.test_rows=40")


def start(tmp_path: Path, *overrides: str) -> list[str]:
    deeper = "backbone.architecture.num_hidden_layers=2"
    return small(
        deeper, "task.head_start=linear_probe", *ROWS, *overrides, f"output_root={tmp_path}", f"cache_dir={tmp_path}"
    )


@pytest.mark.parametrize("task", ["reward", "cost"])
def test_the_fit_minimises_the_tasks_own_loss(task: str, tmp_path: Path) -> None:
    run = prepared(start(tmp_path, f"task={task}", "task.pooling=mean", "task.layers=[1,2]"))
    run.task.configure_model()
    model: Any = run.task.model
    heads = fitted_start(run, model.trunk)
    weight, bias = heads["score"]
    assert weight.shape == (1, model.heads["score"].in_features) and bias.shape == (1,)
    batch = run.encoded.train.collate(np.arange(len(run.encoded.train)))

    def loss(scale: float) -> float:
        with torch.no_grad():
            model.heads["score"].weight.copy_(torch.from_numpy(weight) * scale)
            model.heads["score"].bias.copy_(torch.from_numpy(bias))
            model.eval()
            return float(run.task.loss_sum(batch)[0])

    assert loss(1.0) < loss(0.0) and loss(1.0) < loss(-1.0)
    record = json.loads((run.folder.path / "head_start.json").read_text())
    assert record["layers"] == [1, 2] and record["l2"] in (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
    measure = "pair_accuracy" if task == "reward" else "sign_accuracy"
    assert 0.55 < record["out_of_fold"][measure] <= 1.0


@pytest.mark.parametrize("task", ["reward", "cost"])
def test_training_goes_on_from_the_probe(task: str, tmp_path: Path) -> None:
    """With a learning rate of next to nothing the exported heads are the fitted ones, and the adapter does nothing."""
    frozen = ("adapter.blocks=[1]", "adapter.cache_frozen=true", "task.layers=[1,2]", "task.pooling=mean")
    tiny_steps = ("trainer.max_steps=2", "optimizer.lr=1e-12")
    places = (f"output_root={tmp_path / 'outputs'}", f"cache_dir={tmp_path / 'cache'}")
    overrides = own(tmp_path, f"task={task}", "task.head_start=linear_probe", *frozen, *tiny_steps, *places)
    train(config(overrides))
    exported = load_file(only_run(tmp_path / "outputs") / "export" / "heads.safetensors")
    run = prepared([*overrides, "resume=never"])
    begin_at_probe(run)
    heads: Any = run.task.model.heads
    for name, value in heads.state_dict().items():
        assert value.abs().max() > 1e-3 or "bias" in name
        assert torch.allclose(exported[name], value, atol=1e-6), name
    assert list((tmp_path / "cache" / "states").glob("*.sqlite"))


def test_too_few_prompts_are_refused(tmp_path: Path) -> None:
    run = prepared(start(tmp_path, "task=reward", "data.train_rows=4", "data.val_rows=4", "data.test_rows=4"))
    with pytest.raises(UserError, match="cannot be dealt to 5 folds"):
        fitted_start(run, torch.nn.Linear(1, 1))
