"""One optimizer step: the same loss, gradient and clipping however it is cut and padded; the right modes throughout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small_runs import ALL_TASKS, TASKS, curves, own, prepared, small
from torch import Tensor
from torch.nn import functional as F

from saferlhf.data.batches import TokenBatch
from saferlhf.data.loader import StepBatch
from saferlhf.run.stages import _loaders, fit
from saferlhf.run.trainer import build_trainer
from saferlhf.tracking.base import NullLogger
from saferlhf.training.curves import CurveLogger


@dataclass
class Step:
    """What one step did: gradients before and after clipping, and the logged numbers."""

    gradients: dict[str, Tensor]
    clipped: dict[str, Tensor]
    stats: dict[str, float]


class Once:
    """A loader of one step; Lightning takes a list for several loaders."""

    def __init__(self, batch: StepBatch[Any]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[StepBatch[Any]]:
        yield self.batch


def one_step(run: Any, batch: StepBatch[Any]) -> Step:
    """Lightning takes one step on this batch."""
    task, found = run.task, Step({}, {}, {})
    task.configure_model()
    clip = task._clip

    def watched(optimizer: Any) -> Tensor:
        found.gradients = gradients(task)
        norm = clip(optimizer)
        found.clipped = gradients(task)
        return norm

    task._clip = watched
    trainer = build_trainer(run.config, folder=run.folder, steps=1, callbacks=[], loggers=[], plugins=[])
    trainer.fit(task, Once(batch))
    del task._clip
    assert trainer.global_step == 1
    found.stats = task.last_stats
    return found


def gradients(task: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


def cut(run: Any, micro_batch_size: int) -> StepBatch[Any]:
    """The first step of the run in micro-batches of another size."""
    run.config.trainer.micro_batch_size = micro_batch_size
    return _loaders(run)[0].step(0)


def assert_equal_steps(one: Step, other: Step, tolerance: float = 1e-6) -> None:
    assert one.gradients.keys() == other.gradients.keys() and one.gradients
    largest = max(float(g.abs().max()) for g in one.gradients.values())
    assert largest > 1e-3
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(gradient, other.gradients[name], atol=tolerance * max(1.0, largest), rtol=0)
    assert one.stats.keys() == other.stats.keys()
    for name, value in one.stats.items():
        assert value == pytest.approx(other.stats[name], abs=tolerance * max(1.0, abs(value))), name


# ------------------------------------------------------------------------------------------------ cuts and padding
@pytest.mark.parametrize("task", ALL_TASKS)
def test_micro_batches_do_not_matter(task: str, tmp_path: Path) -> None:
    overrides = small(f"task={task}", "trainer.micro_batch_size=8", f"output_root={tmp_path}")
    whole = one_step(run := prepared(overrides), cut(run, 8))
    assert len(cut(run, 8)) == 1
    for size, parts in ((1, 8), (3, 3)):
        other = prepared(overrides)
        batch = cut(other, size)
        assert len(batch) == parts
        assert_equal_steps(whole, one_step(other, batch))


@pytest.mark.parametrize("task", ALL_TASKS)
def test_padding_does_not_matter(task: str, tmp_path: Path) -> None:
    overrides = small(f"task={task}", f"output_root={tmp_path}")
    run = prepared(overrides)
    batch = cut(run, 8)
    whole = one_step(run, batch)
    for left, right in ((0, 5), (4, 0), (3, 2)):
        moved = StepBatch(0, tuple(padded(micro, left, right) for micro in batch))
        assert_equal_steps(whole, one_step(prepared(overrides), moved))


def padded(batch: Any, left: int, right: int) -> Any:
    """More padding, filled with a token that means something."""
    if not isinstance(batch, TokenBatch):
        return replace(batch, tokens=padded(batch.tokens, left, right))
    masks = {name: F.pad(getattr(batch, name), (left, right)) for name in ("attention_mask", "response_mask")}
    return replace(batch, input_ids=F.pad(batch.input_ids, (left, right), value=7), **masks)


def test_a_micro_batch_without_a_response_token_weighs_nothing(tmp_path: Path) -> None:
    """Counted as one token it would make the loss depend on how the step is cut."""
    overrides = small("task=sft", "trainer.micro_batch_size=8", f"output_root={tmp_path}")
    (batch,) = cut(run := prepared(overrides), 8)
    mask = batch.response_mask.clone()
    mask[0] = mask[3] = False
    silent = replace(batch, response_mask=mask)
    whole = one_step(run, StepBatch(0, (silent,)))
    alone = StepBatch(0, tuple(rows_of(silent, [row]) for row in range(len(silent))))
    assert_equal_steps(whole, one_step(prepared(overrides), alone))
    nothing = one_step(prepared(overrides), StepBatch(0, (replace(batch, response_mask=torch.zeros_like(mask)),)))
    assert nothing.stats["loss"] == 0 and nothing.stats["grad_norm"] == 0


def rows_of(batch: TokenBatch, rows: Sequence[int]) -> TokenBatch:
    ids = tuple(batch.row_ids[row] for row in rows)
    return TokenBatch(batch.input_ids[rows], batch.attention_mask[rows], batch.response_mask[rows], ids)


# ------------------------------------------------------------------------------------------------ second opinions
def test_the_sft_loss_is_the_mean_over_response_tokens(tmp_path: Path) -> None:
    """Token by token, row by row, unpadded, from the model's own logits."""
    run = prepared(small("task=sft", f"output_root={tmp_path}"))
    batch = cut(run, 3)
    run.task.configure_model()
    nll, count = 0.0, 0
    for micro in batch:
        for row in range(len(micro)):
            ids = micro.input_ids[row][micro.attention_mask[row]]
            logp = run.task.model(input_ids=ids[None]).logits[0].log_softmax(-1)
            first = int(micro.response_mask[row].int().argmax())
            for at in range(first, len(ids)):
                nll, count = nll - float(logp[at - 1, ids[at]]), count + 1
    assert one_step(run, batch).stats["loss"] == pytest.approx(nll / count, abs=1e-5)


def test_the_pair_losses_are_means_over_pairs(tmp_path: Path) -> None:
    for task in ("reward", "cost"):
        run = prepared(small(f"task={task}", "task.regularization=0.1", f"output_root={tmp_path}"))
        batch = cut(run, 3)
        run.task.configure_model()
        losses, right = [], []
        for micro in batch:
            pairs = len(micro)
            for row in range(pairs):
                scores = []
                for side in (row, pairs + row):
                    ids = micro.tokens.input_ids[side][micro.tokens.attention_mask[side]]
                    scores.append(run.task.model(ids[None], torch.ones_like(ids[None]))["score"].double().squeeze())
                if task == "reward":
                    won, lost = (scores[i] for i in (int(micro.better[row]), 1 - int(micro.better[row])))
                    loss = -(won - lost).sigmoid().log()
                    right.append(float(won > lost))
                else:
                    safer, other = (scores[i] for i in (int(micro.safer[row]), 1 - int(micro.safer[row])))
                    signs = [1 if int(micro.unsafe[row, side]) else -1 for side in (0, 1)]
                    loss = -(other - safer).sigmoid().log()
                    loss = loss - sum((z * c).sigmoid().log() for z, c in zip(signs, scores, strict=True))
                    right += [float(z * c > 0) for z, c in zip(signs, scores, strict=True)]
                losses.append(float(loss + 0.1 * (scores[0] ** 2 + scores[1] ** 2) / 2))
        stats = one_step(run, batch).stats
        assert stats["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        name = {"reward": "pair_accuracy", "cost": "sign_accuracy"}[task]
        assert stats[name] == pytest.approx(sum(right) / len(right))


# ------------------------------------------------------------------------------------------------ clipping, schedule
@pytest.mark.parametrize("size", [1, 8])
def test_clipping_acts_on_the_whole_step(size: int, tmp_path: Path) -> None:
    overrides = small("task=cost", "trainer.gradient_clip=0.05", f"output_root={tmp_path}")
    step = one_step(run := prepared(overrides), cut(run, size))
    norm = torch.cat([g.flatten() for g in step.gradients.values()]).norm()
    assert norm > 0.5 and step.stats["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert torch.cat([g.flatten() for g in step.clipped.values()]).norm() == pytest.approx(0.05, rel=1e-4)
    for name, gradient in step.gradients.items():
        torch.testing.assert_close(step.clipped[name], gradient * (0.05 / norm), atol=1e-7, rtol=1e-4)


def test_no_clipping(tmp_path: Path) -> None:
    overrides = small("task=cost", "trainer.gradient_clip=null", f"output_root={tmp_path}")
    step = one_step(run := prepared(overrides), cut(run, 3))
    assert all(torch.equal(step.clipped[name], gradient) for name, gradient in step.gradients.items())


def test_curves_hold_means_since_the_last_point_and_the_rate_of_the_step(tmp_path: Path) -> None:
    overrides = small("task=reward", "schedule=linear", "schedule.warmup_ratio=0.2", f"output_root={tmp_path}")
    run = prepared([*overrides, "optimizer.lr=0.01"])
    each: list[dict[str, float]] = []
    run.task.configure_model()
    step_stats = run.task._step_stats
    run.task._step_stats = lambda *a: each.append(dict(step_stats(*a))) or each[-1]
    fit(run, NullLogger())
    found = curves(run.folder.path)
    for name in ("loss", "grad_norm", "pair_accuracy"):
        means = [(at, sum(s[name] for s in each[at - 3 : at]) / 3) for at in (3, 6, 9, 12)]
        assert found[f"train/{name}"] == [(at, pytest.approx(value, rel=1e-9)) for at, value in means]
    # warm-up takes three of twelve steps: 1/4, 2/4, 3/4; then nine equal steps down
    rates = [0.01 * factor for factor in (1 / 4, 2 / 4, 3 / 4, *((9 - k) / 9 for k in range(9)))]
    assert found["train/lr"] == [(at, pytest.approx(rates[at - 1])) for at in (3, 6, 9, 12)]


# ------------------------------------------------------------------------------------------------ modes
def test_training_mode_is_on_in_every_step_and_off_in_validation(tmp_path: Path) -> None:
    run = prepared(own(tmp_path, "task=reward", "trainer.max_steps=6", f"output_root={tmp_path}"))
    run.task.configure_model()
    seen: dict[str, list[bool]] = {"step": [], "validation": []}
    for kind, name in (("step", "loss_sum"), ("validation", "outputs")):
        function = getattr(run.task, name)

        def watched(batch: Any, kind: str = kind, function: Any = function) -> Any:
            modes = {module.training for module in run.task.modules()}
            assert len(modes) == 1
            seen[kind].append(modes.pop())
            return function(batch)

        setattr(run.task, name, watched)
    fit(run, NullLogger())
    assert seen["step"] and all(seen["step"])
    assert seen["validation"] and not any(seen["validation"])
    assert [step for step, _ in curves(run.folder.path)["val/loss"]] == [4]


def test_dropout_is_active_in_training_and_silent_in_validation(tmp_path: Path) -> None:
    run = prepared(own(tmp_path, "task=cost", f"output_root={tmp_path}"))
    run.task.configure_model()
    with torch.no_grad():  # a fresh adapter adds nothing, with or without dropout
        for name, parameter in run.task.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    train_loader, val_loader = _loaders(run)
    (micro, *_), item = train_loader.step(0), next(iter(val_loader))
    with torch.no_grad():
        assert not torch.equal(run.task.pair_scores(micro), run.task.pair_scores(micro))
        run.task.eval()
        assert torch.equal(run.task.pair_scores(item.batch), run.task.pair_scores(item.batch))


@pytest.mark.parametrize("task", ["sft", "reward"])
@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_is_active_and_changes_nothing(task: str, lora: bool, tmp_path: Path) -> None:
    """With it every layer runs twice per step; dropout draws the same numbers both times."""
    steps = {}
    for on in (False, True):
        more = (f"task={task}", f"backbone.gradient_checkpointing={on}", f"output_root={tmp_path}")
        run = prepared(own(tmp_path, *more) if lora else small(*more))
        run.task.configure_model()
        layers = [m for m in run.task.modules() if type(m).__name__ == "LlamaDecoderLayer"]
        calls: list[int] = []
        for layer in layers:
            layer.input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        batch = cut(run, 8)
        L.seed_everything(1, verbose=False)
        steps[on] = one_step(run, batch)
        assert len(calls) == len(layers) * (2 if on else 1)
    assert_equal_steps(steps[False], steps[True])


def test_4_bit_base_trains_alike_before_and_after_an_evaluation(tmp_path: Path) -> None:
    """An eval pass repacks 4-bit weights on some CPUs, and training after that is silently wrong."""
    from saferlhf.evaluation.score import score_rows

    nf4 = ("quantization=nf4", "quantization.compute_dtype=float32", "adapter.dropout=0")
    overrides = own(tmp_path, "task=reward", *nf4, f"output_root={tmp_path}")
    untouched = one_step(run := prepared(overrides), cut(run, 3))
    run = prepared(overrides)
    run.task.configure_model()
    packed = {name: p.clone() for name, p in run.task.named_parameters() if p.dtype == torch.uint8}
    assert packed
    score_rows(run.task.model, run.encoded.val, batch_size=4)
    assert all(module.training for module in run.task.modules())
    evaluated = one_step(run, cut(run, 3))
    assert_equal_steps(untouched, evaluated, tolerance=0)
    for name, parameter in run.task.named_parameters():
        assert name not in packed or torch.equal(parameter, packed[name])


# ------------------------------------------------------------------------------------------------ the whole way
def test_every_task_learns(tmp_path: Path) -> None:
    for task in TASKS:
        lr = ("optimizer.lr=0.02", "trainer.max_steps=40", "trainer.log_every_steps=5", "trainer.val_every_steps=40")
        run = prepared(small(f"task={task}", *lr, "schedule=constant", f"output_root={tmp_path}"))
        fit(run, NullLogger())
        losses = [value for _, value in curves(run.folder.path)["train/loss"]]
        assert losses[-1] < 0.5 * losses[0], (task, losses)


def test_curves_of_a_killed_process_go_on_on_a_new_line(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    CurveLogger(path).log_metrics({"train/loss": 1.0}, step=1)
    with open(path, "a") as file:
        file.write('{"step": 2, "train/lo')
    logger = CurveLogger(path)
    logger.log_metrics({"train/loss": 0.5}, step=2)
    logger.log_metrics({"train/loss": 0.25}, step=2)
    from saferlhf.training.curves import read_curves

    assert read_curves(path) == {"train/loss": [(1, 1.0), (2, 0.25)]}
