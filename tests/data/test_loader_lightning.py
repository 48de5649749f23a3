"""Under a real Lightning trainer: a resumed run sees exactly the remaining batches, and any precision takes them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from saferlhf.data.batches import TokenBatch
from saferlhf.data.encode import EncodedPairs, Encoder
from saferlhf.data.loader import EvalBatch, EvalLoader, StepBatch, StepLoader

STEPS, BATCH, ROWS = 10, 4, 10  # an epoch of the data is 2.5 steps


class Recorder(L.LightningModule):
    """A weight that depends on every row in its order; remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.automatic_optimization = False
        self.seen: list[tuple[int, tuple[str, ...]]] = []
        self.evaluated: list[int] = []

    def training_step(self, batch: StepBatch[Any], batch_idx: int) -> None:
        assert isinstance(batch, StepBatch) and batch.step == batch_idx
        self.seen.append((batch.step, tuple(name for micro in batch for name in micro.tokens.row_ids)))
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for micro in batch:
            scale = micro.tokens.input_ids.sum() * 1e-3
            self.manual_backward((self.weight.float() * scale - 1.0).square() / len(batch))
        optimizer.step()

    def validation_step(self, batch: EvalBatch[Any], batch_idx: int) -> None:
        assert isinstance(batch, EvalBatch)
        self.evaluated += batch.indices.tolist()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class SaveAfter(L.Callback):
    """Saves after some steps, then stops as a killed process would: without another word."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.step:
            trainer.save_checkpoint(self.path)
            raise ProcessKilled


class ProcessKilled(BaseException):
    """Not an Exception: nothing may catch it and tidy up."""


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest) -> EncodedPairs:
    from saferlhf.data.rows import PreferencePair, as_prompt

    tokenizer = request.getfixturevalue("word_tokenizer")
    rows = [
        PreferencePair(f"row{i}", as_prompt("how to " * (i % 3)), "bake bread", "plant " * i, better_response_id=0)
        for i in range(ROWS)
    ]
    return Encoder.build(tokenizer, "native", 64).pairs(rows)


def fit(
    pairs: EncodedPairs, folder: Path, resume: Path | None = None, *callbacks: L.Callback, **options: Any
) -> Recorder:
    model = Recorder()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        **options,
    )
    train = StepLoader(pairs, batch_size=BATCH, micro_batch_size=3, total_steps=STEPS, seed=0)
    val = EvalLoader(pairs, batch_size=3)
    with suppress(ProcessKilled):
        trainer.fit(model, train, val, ckpt_path=resume, weights_only=True if resume else None)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stop", [1, 5, 9, STEPS])  # 5 steps are two whole epochs of the data
@pytest.mark.parametrize("val_every", [3, 5])
def test_resumed_run_sees_exactly_the_remaining_batches(
    tmp_path: Path, pairs: EncodedPairs, stop: int, val_every: int
) -> None:
    whole = fit(pairs, tmp_path, val_check_interval=val_every)
    assert [step for step, _ in whole.seen] == list(range(STEPS))
    assert sorted(whole.evaluated) == sorted(list(range(ROWS)) * (STEPS // val_every))
    path = tmp_path / "last.ckpt"
    first = fit(pairs, tmp_path, None, SaveAfter(stop, path), val_check_interval=val_every)
    second = fit(pairs, tmp_path, path, val_check_interval=val_every)
    assert first.seen == whole.seen[:stop] and second.seen == whole.seen[stop:]
    assert torch.equal(second.weight, whole.weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_every_precision_takes_the_batches(tmp_path: Path, pairs: EncodedPairs, precision: str) -> None:
    model = fit(pairs, tmp_path, precision=precision)
    assert len(model.seen) == STEPS and sorted(model.evaluated) == list(range(ROWS))


def test_lightning_still_refuses_bare_frozen_dataclasses() -> None:
    """The reason why items of the loaders are plain classes; when this fails, they may become tuples."""
    from lightning.pytorch.plugins.precision import HalfPrecision

    ones = torch.ones(1, 2, dtype=torch.bool)
    batch = TokenBatch(ones.long(), ones, ones, ("a",))
    with pytest.raises(ValueError, match="frozen dataclass"):
        HalfPrecision("bf16-true").convert_input((batch,))
    item = StepBatch(0, (batch,))
    assert HalfPrecision("bf16-true").convert_input(item) is item
    assert np.array_equal(item[0].input_ids, batch.input_ids)
