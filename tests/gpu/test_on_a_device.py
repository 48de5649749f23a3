"""What only a GPU can show, and the same on the CPU where it can be shown there too.

`make test-gpu` runs the halves that need CUDA; without a device they are skipped, visibly. The other halves run with
`make test`, so that what a GPU will run is code that runs.

- nf4: what is packed and unpacked, against the definition of NormalFloat (Dettmers et al. 2023, QLoRA, section 3 and
  appendix E), and scores and gradients against a model of plain weights that hold the unpacked values;
- FSDP2 on one device, where every shard is the whole, against a plain run;
- a policy that samples and learns in bfloat16: the log-probabilities of sampling are those of training;
- the highest memory of a training against its plan.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from models.tiny_models import backbone_config, folder_of, lora_config, padded, rows, stir
from small_runs import curves, online, policy_folder, prepared, small

from saferlhf.config.schema import QuantizationConfig
from saferlhf.models.adapters import add_lora, trainable_parameters
from saferlhf.models.backbone import load_backbone
from saferlhf.models.live_bytes import LiveBytes
from saferlhf.models.quantization import packed_layers, unpacked
from saferlhf.models.score_model import ScoreModel
from saferlhf.run.memory.plan import plan_memory
from saferlhf.run.memory.workload import workload_of
from saferlhf.run.stages import fit
from saferlhf.tracking.base import NullLogger

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])]
both = pytest.mark.parametrize("device", DEVICES)
ACCELERATOR = {"cpu": "trainer.accelerator=cpu", "cuda": "trainer.accelerator=gpu"}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Variables that Lightning leaves, and memory of the device."""
    with mock.patch.dict(os.environ):
        yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------ nf4
CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NormalFloat, of the paper's appendix E."""
BLOCK = 64


def normal_float(weight: torch.Tensor) -> torch.Tensor:
    """A weight packed and unpacked, without double quantisation: nearest code times the block's largest value."""
    values = weight.detach().cpu().double().numpy().reshape(-1, BLOCK)
    largest = np.abs(values).max(axis=1, keepdims=True)  # (blocks, 1)
    nearest = np.abs(values[..., None] / largest[..., None] - np.array(CODES)).argmin(axis=-1)  # (blocks, BLOCK)
    return torch.from_numpy((np.array(CODES)[nearest] * largest).reshape(weight.shape))


def packed_model(folder: str, device: str, **quantization: Any) -> ScoreModel:
    given = QuantizationConfig(**{"name": "nf4", "compute_dtype": "float32", **quantization})
    trunk = load_backbone(backbone_config(architecture=None, model=folder), quantization=given, device=device)
    model = ScoreModel(add_lora(trunk, lora_config()), {"cost": 1})
    stir(model)
    return model.to(device)


def scores_and_gradients(model: ScoreModel, device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train().zero_grad()
    ids, mask = padded(rows(4), "right")
    scores = model(ids.to(device), mask.to(device))["cost"]
    scores.square().sum().backward()
    found = {name: p.grad.detach().cpu() for name, p in trainable_parameters(model).items() if p.grad is not None}
    return scores.detach().cpu(), found


@both
def test_what_is_unpacked_is_normal_float(tmp_path: Path, device: str) -> None:
    pytest.importorskip("bitsandbytes")
    folder = folder_of(tmp_path / "model")
    plain = load_backbone(backbone_config(architecture=None, model=folder))
    once = packed_layers(packed_model(folder, device, double_quant=False))
    twice = packed_layers(packed_model(folder, device, double_quant=True))
    assert len(once) == 14
    names = {name: name.removeprefix("trunk.").removeprefix("base_model.model.") for name in once}
    for name, layer in once.items():
        original = plain.get_submodule(names[name].removesuffix(".base_layer")).weight
        found = unpacked(layer.weight).detach().cpu().double()
        # float32 divides before it compares: a value in the middle of two codes may go to either
        wrong = (found - normal_float(original)).abs() > 1e-5
        assert wrong.double().mean() < 1e-3, name
        # 8 bits for the blocks' scales change little
        error = (unpacked(twice[name].weight).detach().cpu().double() - found).abs().max()
        assert 0 < error < 0.05 * original.abs().max(), name


@both
def test_a_packed_model_is_the_model_of_its_unpacked_weights(tmp_path: Path, device: str) -> None:
    pytest.importorskip("bitsandbytes")
    folder = folder_of(tmp_path / "model")
    packed = packed_model(folder, device)
    trunk = load_backbone(backbone_config(architecture=None, model=folder))
    plain = ScoreModel(add_lora(trunk, lora_config()), {"cost": 1})
    stir(plain)
    with torch.no_grad():
        for name, layer in packed_layers(packed).items():
            plain.get_submodule(name).weight.copy_(unpacked(layer.weight).cpu())
    found, expected = scores_and_gradients(packed, device), scores_and_gradients(plain, "cpu")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert found[1].keys() == expected[1].keys() and len(found[1]) == 2 * 14 + 2
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-6)


@both
def test_an_evaluation_in_between_leaves_packed_training_as_it_was(tmp_path: Path, device: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = packed_model(folder_of(tmp_path / "model"), device, compute_dtype="bfloat16")
    stored = {name: layer.weight.data.clone() for name, layer in packed_layers(model).items()}
    _, before = scores_and_gradients(model, device)
    model.eval()
    with torch.no_grad():
        ids, mask = padded(rows(1), "left")  # one row: CUDA has a kernel of its own for it
        model(ids.to(device), mask.to(device))
    _, after = scores_and_gradients(model, device)
    assert all(torch.equal(stored[name], layer.weight.data) for name, layer in packed_layers(model).items())
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=0, atol=1e-6 * float(gradient.abs().max()))


# ------------------------------------------------------------------------------------------------ training
def trained(place: Path, device: str, *overrides: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A run after its training, and its weights."""
    run = prepared(small(ACCELERATOR[device], *overrides, f"output_root={place}"))
    fit(run, NullLogger())
    return run, {name: value.detach().float().cpu() for name, value in run.task.model.state_dict().items()}


def last(run: Any, name: str) -> float:
    return curves(run.folder.path)[name][-1][1]


# moments are magnified where a gradient is nearly zero: sgd shows what adds up differently, and no more
PLAIN = ("optimizer=sgd", "optimizer.lr=0.1", "schedule=constant")


@both
@pytest.mark.parametrize("task", ["sft", "cost"])
def test_fsdp_on_one_device_is_one_device(tmp_path: Path, device: str, task: str) -> None:
    sharded, found = trained(tmp_path / "fsdp", device, f"task={task}", "strategy=fsdp", *PLAIN)
    plain, expected = trained(tmp_path / "single", device, f"task={task}", *PLAIN)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    assert last(sharded, "val/loss") == pytest.approx(last(plain, "val/loss"), abs=1e-5)


@pytest.mark.gpu
@NEEDS_CUDA
def test_a_gpu_learns_what_the_cpu_learns(tmp_path: Path) -> None:
    """In float32: the same losses but for the order of additions."""
    gpu, _ = trained(tmp_path / "gpu", "cuda", "task=reward", *PLAIN)
    cpu, _ = trained(tmp_path / "cpu", "cpu", "task=reward", *PLAIN)
    assert last(gpu, "val/loss") == pytest.approx(last(cpu, "val/loss"), abs=1e-3)


@both
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_sampling_and_training_agree_in_half_precision(tmp_path: Path, device: str, precision: str) -> None:
    """The policy samples through a cache and token by token, and is trained on whole rows."""
    policy = policy_folder(tmp_path / "policy")
    place = f"output_root={tmp_path}"
    run = prepared(online(policy, ACCELERATOR[device], f"trainer.precision={precision}", place))
    fit(run, NullLogger())
    found = curves(run.folder.path)
    mismatch = [value for _, value in found["train/logprob_mismatch"]]
    assert len(mismatch) == run.steps
    most = 1e-4 if precision == "32-true" else run.config.rollout.max_logprob_mismatch
    assert max(mismatch) < most, "nats per token"
    # the policy and its frozen copy are run by the same code on the same rows
    assert found["train/kl"][0][1] == pytest.approx(0.0, abs=1e-6)
    assert all(np.isfinite(value) for name in ("train/kl", "train/policy_loss") for _, value in found[name])


# ------------------------------------------------------------------------------------------------ memory
LARGER = (
    "backbone.architecture.num_hidden_layers=4",
    "backbone.architecture.hidden_size=128",
    "backbone.architecture.intermediate_size=256",
    "data.train_rows=64",
    "trainer.batch_size=64",
    "trainer.micro_batch_size=32",
    "trainer.max_steps=3",
    "trainer.val_every_steps=3",
)


def highest_bytes(run: Any, device: str) -> int:
    """Of a training, its model built in it: by CUDA's own count, or of live tensors."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fit(run, NullLogger())
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as live:
        fit(run, NullLogger())
    return live.highest().total


@both
@pytest.mark.parametrize("words", [("task=sft",), ("task=reward", "backbone.gradient_checkpointing=true")])
def test_memory_is_what_was_planned(tmp_path: Path, device: str, words: tuple[str, ...], record_property: Any) -> None:
    run = prepared(small(ACCELERATOR[device], *words, *LARGER, f"output_root={tmp_path}"))
    work = workload_of(run.config, run.encoded, run.steps)
    vocabulary = len(run.encoded.encoder.tokenizer)
    # what tensors take, without a device's own
    asked = plan_memory(run.config, work, device="cpu", vocabulary_size=vocabulary)
    measured = highest_bytes(run, device)
    record_property("planned_bytes", asked.peak)
    record_property("measured_bytes", measured)
    print(f"{' '.join(words)} on {device}: planned {asked.peak / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB")
    assert 0.85 < asked.peak / measured < 1.3
    if device == "cuda":  # with what the allocator keeps and CUDA takes
        whole = plan_memory(run.config, work, device="gpu", vocabulary_size=vocabulary)
        assert torch.cuda.max_memory_reserved() <= whole.peak
