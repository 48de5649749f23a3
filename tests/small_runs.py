"""The smallest runs that still have everything: several epochs, micro-batches, validation, test, checkpoints."""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from saferlhf.config.paths import conf_dir
from saferlhf.config.schema import TrainConfig
from saferlhf.config.validate import train_config
from saferlhf.run.prepare import checked, locate_run

TASKS = ("sft", "reward", "cost")
ALL_TASKS = (*TASKS, "moderator")

# 20 rows in batches of 8: an epoch ends in the middle of a step, and at the end of every fifth
SMALL = [
    "backbone.architecture.num_hidden_layers=1",
    "backbone.architecture.hidden_size=32",
    "backbone.architecture.intermediate_size=64",
    "backbone.architecture.num_attention_heads=2",
    "backbone.architecture.num_key_value_heads=2",
    "data.train_rows=20",
    "data.val_rows=10",
    "data.test_rows=10",
    "trainer.batch_size=8",
    "trainer.micro_batch_size=3",
    "trainer.eval_batch_size=8",
    "trainer.epochs=20",
    "trainer.max_steps=12",
    "trainer.val_every_steps=4",
    "trainer.log_every_steps=3",
    "trainer.threads=1",
    "trainer.progress=none",
    "checkpoint.every_steps=3",
    "checkpoint.every_minutes=null",
    "checkpoint.keep_when_finished=true",
    "evaluation.bootstrap_draws=50",
    "tracking=none",
]
STEPS = 12


def small(*overrides: str) -> list[str]:
    """The overrides of a small run, with these instead of or beside them."""
    keyed = {override.partition("=")[0]: override for override in (*SMALL, *overrides)}
    return list(keyed.values())


def online(policy: Path, *overrides: str) -> list[str]:
    """The overrides of a small PPO-Lagrangian run: a small policy, and plain functions as reward and cost."""
    scorers = (
        "{reward: {kind: function, function: 'toy_scores:reward', on_empty: score},"
        " cost: {kind: function, function: 'toy_scores:cost', outputs: [cost], on_empty: score}}"
    )
    return small(
        "task=ppo_lag",
        f"init={policy}",
        f"scorers={scorers}",
        "rollout.prompts=6",
        "rollout.samples=2",
        "rollout.max_new_tokens=8",
        "data.train_rows=16",
        "trainer.epochs=20",
        "trainer.max_steps=4",
        "trainer.micro_batch_size=5",
        "checkpoint.every_steps=2",
        *overrides,
    )


def policy_folder(path: Path) -> Path:
    """An export of a small policy of the toy world's words, with random weights."""
    from saferlhf.models.backbone import load_backbone
    from saferlhf.models.export import save_export
    from saferlhf.models.metadata import ExportMetadata
    from saferlhf.models.tokenizer import load_tokenizer
    from saferlhf.run.stages import vocabulary_of

    made = config(small("task=sft", f"output_root={path.parent}"))
    tokenizer = load_tokenizer(made.backbone, vocabulary=vocabulary_of(made), output_root=path.parent)
    model = load_backbone(
        made.backbone,
        quantization=made.quantization,
        init=None,
        lm_head=True,
        vocabulary_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        seed=0,
        output_root=path.parent,
    )
    save_export(
        path, model=model, tokenizer=tokenizer, metadata=ExportMetadata(kind="sft", template="native", max_length=128)
    )
    return path


def config(overrides: list[str]) -> TrainConfig:
    """A checked config from the whole list of overrides."""
    # where the outputs lie changes from test to test and nothing else with it: composing takes its time
    root = [override.partition("=")[2] for override in overrides if override.startswith("output_root=")]
    found = copy.deepcopy(_composed(tuple(o for o in overrides if not o.startswith("output_root="))))
    found.output_root = root[-1]
    return found


@functools.cache
def _composed(overrides: tuple[str, ...]) -> TrainConfig:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return checked(train_config(compose("train", list(overrides))))


def prepared(overrides: list[str]) -> Any:
    """A run in this process, ready to be trained; each call makes new objects."""
    from saferlhf.run.stages import prepare

    run = locate_run(config(overrides))
    run.folder.path.mkdir(parents=True, exist_ok=True)
    return prepare(run)


def make_cheap(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Leave out of a run what takes most of a small one's time: the report's drawings, and most damaged replies."""
    from saferlhf.evaluation import moderation_plots, plots
    from saferlhf.run import measure

    for module in (plots, moderation_plots):
        replace(module, "to_svg", lambda figure, title: f'<svg aria-label="{title}"/>')
    replace(measure, "DAMAGED_PROMPTS", 5)


# ------------------------------------------------------------------------------------------------ what a run leaves
def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every exported tensor, by file and name."""
    from safetensors.torch import load_file

    files = sorted((folder / "export").rglob("*.safetensors"))
    assert files
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(str(file)).items()}


def state(folder: Path) -> dict[str, Any]:
    """The newest checkpoint."""
    newest = sorted((folder / "checkpoints").glob("step-*.ckpt"))[-1]
    return torch.load(newest, weights_only=True)


def metrics(folder: Path) -> dict[str, float]:
    """Final metrics without the time they took."""
    found = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in found.items() if name != "train/seconds"}


def status(folder: Path) -> dict[str, Any]:
    """The status file as it is."""
    return json.loads((folder / "status.json").read_text())


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The training curves."""
    from saferlhf.training.curves import read_curves

    return read_curves(folder / "curves.jsonl")


def assert_same(one: Any, other: Any, at: str = "") -> None:
    """Equal to the last bit, whatever the nesting."""
    assert type(one) is type(other), f"{at}: {type(one)} and {type(other)}"
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), f"{at} differs"
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), f"{at}: {sorted(map(str, one.keys() ^ other.keys()))}"
        for key in one:
            assert_same(one[key], other[key], f"{at}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), f"{at}: {len(one)} and {len(other)} items"
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{at}/{number}")
    else:
        assert one == other, f"{at}: {one} and {other}"


def assert_alike_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], close: float) -> None:
    """The same names, and numbers that differ by `close` at most."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=close, msg=lambda text, key=key: f"{key}: {text}")


def assert_alike_curves(
    found: dict[str, list[tuple[int, float]]], expected: dict[str, list[tuple[int, float]]], close: float
) -> None:
    """The same curves at the same steps; norms and perplexities are large numbers, so `close` is relative too."""
    assert found.keys() == expected.keys()
    for key, points in expected.items():
        assert [step for step, _ in found[key]] == [step for step, _ in points], key
        assert [v for _, v in found[key]] == pytest.approx([v for _, v in points], rel=close, abs=close), key


def assert_same_end(one: Path, other: Path) -> None:
    """Two run folders hold the same model, optimizer, schedule, generators, curves and metrics, bit by bit."""
    assert_same(weights(one), weights(other), "export")
    first, second = state(one), state(other)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "running", "callbacks"):
        assert_same(first[key], second[key], key)
    assert_same(curves(one), curves(other), "curves")
    assert_same(metrics(one), metrics(other), "metrics")
    assert status(one)["status"] == status(other)["status"] == "finished"


# ------------------------------------------------------------------------------------------------ processes
@dataclass
class Ended:
    """A process that ended: its exit code (negative: the signal that killed it) and what it printed."""

    code: int
    output: str

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()


class RunServer:
    """Starts commands in processes of their own (see `run_server.py`); `arguments` are the whole command line."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._count = 0
        self._process: subprocess.Popen[str] | None = None

    def start(
        self,
        *arguments: str,
        die: dict[str, Any] | None = None,
        command: str = "train",
        files_at_most: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> tuple[int, Path]:
        """Start a command; its process id and log file."""
        self._count += 1
        log = self.logs / f"{self._count}.log"
        request = {
            "do": "start",
            "command": command,
            "arguments": list(arguments),
            "die": die,
            "log": str(log),
            "files_at_most": files_at_most,
            "environment": environment or {},
        }
        return self._ask(request), log

    def wait(self, pid: int, log: Path, seconds: float = 120) -> Ended:
        """Wait until a process is gone."""
        until = time.monotonic() + seconds
        while (code := self._ask({"do": "poll", "pid": pid})) is None:
            if time.monotonic() > until:
                os.kill(pid, 9)
                raise AssertionError(f"still running after {seconds} s:\n{log.read_text()}")
            time.sleep(0.02)
        return Ended(code, log.read_text())

    def run(self, *arguments: str, **options: Any) -> Ended:
        """Start a command and wait for its end."""
        return self.wait(*self.start(*arguments, **options))

    def close(self) -> None:
        """End the server."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(10)

    def _ask(self, request: dict[str, Any]) -> Any:
        if self._process is None:
            server = Path(__file__).with_name("run_server.py")
            self._process = subprocess.Popen(
                [sys.executable, str(server)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def only_run(outputs: Path) -> Path:
    """The one run folder under an output root."""
    (folder,) = [path.parent for path in outputs.glob("*/*/status.json")]
    return folder


# ------------------------------------------------------------------------------------------------ own files and models
def hf_folder(path: Path) -> str:
    """A small Llama in a folder, as a user would have it: 2 layers, 64 words."""
    from models.tiny_models import folder_of

    return folder_of(path, max_position_embeddings=128)


def own_rows(path: Path, count: int = 60, seed: int = 0) -> str:
    """A JSONL file with the labels of PKU-SafeRLHF, and a `response` beside its pairs, in words the model knows."""
    draw = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{draw.randrange(59)}" for _ in range(draw.randint(least, most)))

    rows = []
    for _ in range(count):
        safe = [draw.random() < 0.5, draw.random() < 0.5]
        safer = safe.index(True) if safe[0] != safe[1] else draw.randrange(2)
        row = {"prompt": words(3, 9), "response": words(4, 14), "response_0": words(4, 14), "response_1": words(4, 14)}
        row |= {"better_response_id": draw.randrange(2), "safer_response_id": safer}
        row |= {f"is_response_{side}_safe": safe[side] for side in (0, 1)}
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def own(tmp_path: Path, *overrides: str) -> list[str]:
    """Overrides of a small LoRA run, dropout included, on a file of one's own and a model from a folder."""
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    found = [
        o for o in small("data=jsonl", "backbone=hf", "adapter=lora") if not o.startswith("backbone.architecture.")
    ]
    mine = [
        f"backbone.model={hf_folder(model) if not model.exists() else model}",
        f"data.path={own_rows(rows) if not rows.exists() else rows}",
        "adapter.rank=4",
        "adapter.dropout=0.3",
        "data.train_rows=null",
        "data.val_rows=null",
        "data.test_rows=null",
        "data.val_fraction=0.2",
        "data.test_fraction=0.2",
        "optimizer.lr=0.01",
    ]
    keyed = {override.partition("=")[0]: override for override in (*found, *mine, *overrides)}
    return list(keyed.values())
