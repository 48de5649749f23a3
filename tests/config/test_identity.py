"""Run identity: what changes a result changes the hash; where and how it is computed does not."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from command_lines import NEEDED, config, finish

from saferlhf.config.identity import HASH_LENGTH, identity_tree, run_hash
from saferlhf.config.schema import TrainConfig
from saferlhf.config.task_schema import TASKS
from saferlhf.errors import UserError
from saferlhf.run.prepare import locate_run


def leaves(node: Any, inside: bool = True, prefix: str = "") -> Iterator[tuple[str, bool, bool]]:
    """(dotted key, enters the hash, by content) of every leaf; a mark on a group holds for all below it."""
    for field in dataclasses.fields(node):
        enters = inside and field.metadata.get("identity", True) is not False
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, enters, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", enters, bool(field.metadata.get("content"))


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [*value, value[0] if value else "x"]
    if isinstance(value, dict):
        return {**value, "x": "y"}
    return "changed" if value is None else f"{value}-changed"


def with_key(base: TrainConfig, dotted: str, value: Any) -> TrainConfig:
    changed: Any = deepcopy(base)
    node = changed
    *parents, leaf = dotted.split(".")
    for parent in parents:
        node = getattr(node, parent)
    setattr(node, leaf, value)
    return changed


def as_given(key: str, value: str) -> str:
    return f"content of {value}"


def hash_of(run: TrainConfig) -> str:
    return run_hash(identity_tree(run, as_given))


BASE = {task: config(f"task={task}", *NEEDED.get(task, [])) for task in TASKS}
ALL = [(task, *leaf) for task in TASKS for leaf in leaves(BASE[task])]
LEAVES = [leaf for leaf in ALL if leaf[0] == "reward" or leaf[1].startswith("task.")]


def test_the_walk_sees_the_whole_config() -> None:
    keys = {key for _, key, _, _ in LEAVES}
    assert {"seed", "data.policy.overlap", "task.pair_weight", "trainer.devices", "tracking.uri"} <= keys
    assert len(keys) > 80


@pytest.mark.parametrize(("task", "key", "enters", "content"), LEAVES, ids=lambda value: str(value))
def test_a_key_changes_the_hash_unless_it_is_marked(task: str, key: str, enters: bool, content: bool) -> None:
    base = BASE[task]
    node: Any = base
    for part in key.split("."):
        node = getattr(node, part)
    changed = with_key(base, key, other(node))
    assert (hash_of(changed) != hash_of(base)) is enters


def test_what_stays_outside() -> None:
    """The promise of the documentation: not paths, devices, tracking, checkpoints and display."""
    outside = {key for _, key, enters, _ in LEAVES if not enters}
    for key in ("name", "output_root", "cache_dir", "resume", "data.root", "trainer.devices", "trainer.accelerator"):
        assert key in outside
    for group in ("tracking", "checkpoint", "strategy", "plan"):
        assert all(key in outside for _, key, _, _ in LEAVES if key.startswith(f"{group}."))
    inside = {key for _, key, enters, _ in LEAVES if enters}
    assert {"seed", "data.seed", "trainer.precision", "trainer.batch_size", "optimizer.lr"} <= inside
    by_content = {key for _, key, _, content in LEAVES if content}
    assert by_content == {"init", "backbone.model", "data.path", "data.test_path", "data.parts"}


def test_a_path_enters_by_its_content() -> None:
    base = BASE["reward"]
    one, two = with_key(base, "init", "here"), with_key(base, "init", "there")
    assert run_hash(identity_tree(one, lambda *_: "same")) == run_hash(identity_tree(two, lambda *_: "same"))
    assert run_hash(identity_tree(one, lambda *_: "same")) != hash_of(base)
    asked: list[tuple[str, str]] = []
    identity_tree(one, lambda key, value: asked.append((key, value)) or "id")
    assert asked == [("init", "here")], "null is no path"


def test_the_hash_is_short_and_canonical() -> None:
    assert run_hash({"a": 1, "b": [1, {"c": None}]}) == run_hash({"b": [1, {"c": None}], "a": 1})
    assert run_hash({"a": 1}) != run_hash({"a": 1.5}) != run_hash({"a": "1"})
    assert len(run_hash({})) == HASH_LENGTH == 10
    assert set(run_hash({})) <= set("0123456789abcdef")


def test_the_same_command_finds_the_same_folder_from_another_process_and_place(tmp_path: Path) -> None:
    """Neither Python's hash seed nor the folder one stands in nor the device's preset enters."""
    here = locate_run(config("task=reward", "output_root=x")).folder.path
    code = (
        "from command_lines import config; from saferlhf.run.prepare import locate_run\n"
        "print(locate_run(config('task=reward', 'output_root=x', 'trainer=cpu', 'tracking=none')).folder.path)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4321", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == here
    assert here.parent == Path("x/reward")


# ------------------------------------------------------------------------------------------------ content
ROWS = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "d", "chosen": "e", "rejected": "f"}\n'


def model_folder(path: Path, weight: bytes = b"weights") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weight)
    return path


def file_run(tmp_path: Path, rows: Path, *overrides: str) -> str:
    model = tmp_path / "model"
    if not model.exists():
        model_folder(model)
    words = ["task=reward", "data=jsonl", f"data.path={rows}", "backbone=hf", f"backbone.model={model}"]
    return locate_run(config(*words, f"output_root={tmp_path / 'outputs'}", *overrides)).hash


def test_moving_a_data_file_does_not_change_the_hash_and_a_byte_does(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROWS)
    first = file_run(tmp_path, rows)
    moved = tmp_path / "elsewhere" / "other-name.jsonl"
    moved.parent.mkdir()
    rows.rename(moved)
    assert file_run(tmp_path, moved) == first
    assert file_run(tmp_path, Path("other-name.jsonl"), f"data.root={moved.parent}") == first
    moved.write_text(ROWS.replace('"b"', '"B"'))
    assert file_run(tmp_path, moved) != first
    moved.write_text(ROWS)
    assert file_run(tmp_path, moved) == first


def test_moving_a_model_does_not_change_the_hash_and_a_byte_does(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(ROWS)
    first = file_run(tmp_path, rows)
    (tmp_path / "model").rename(tmp_path / "moved")
    words = ["task=reward", "data=jsonl", f"data.path={rows}", "backbone=hf", f"backbone.model={tmp_path / 'moved'}"]
    assert locate_run(config(*words)).hash == first
    (tmp_path / "moved" / "model.safetensors").write_bytes(b"Weights")
    assert locate_run(config(*words)).hash != first


def test_a_start_enters_by_its_weights(tmp_path: Path) -> None:
    """`init` names a run, its export, or a copy of that elsewhere: one identity."""
    root = f"output_root={tmp_path / 'outputs'}"
    sft = finish(locate_run(config("task=sft", root)))
    by_run = locate_run(config("task=reward", f"init={sft}", root)).hash
    assert by_run == locate_run(config("task=reward", f"init={sft / 'export'}", root)).hash
    assert by_run == locate_run(config("task=reward", f"init=sft/{sft.name}", root)).hash, "below the output root"
    copy = tmp_path / "copy"
    (sft / "export").rename(copy)
    assert by_run == locate_run(config("task=reward", f"init={copy}", root)).hash
    (copy / "model.safetensors").write_bytes(b"other")
    assert by_run != locate_run(config("task=reward", f"init={copy}", root)).hash
    assert by_run != locate_run(config("task=reward", root)).hash


def test_the_seed_of_the_toy_world_is_part_of_the_data() -> None:
    first = locate_run(config("task=reward")).identity
    second = locate_run(config("task=reward", "data.seed=1")).identity
    assert first["data_fingerprint"] != second["data_fingerprint"]


# ------------------------------------------------------------------------------------------------ resume
def test_resume_chooses_the_folder(tmp_path: Path) -> None:
    words = ["task=reward", f"output_root={tmp_path}"]
    first = locate_run(config(*words)).folder.path
    assert locate_run(config(*words, "resume=never")).folder.path == first, "nothing is there yet"
    finish(locate_run(config(*words)))
    again = locate_run(config(*words, "resume=never"))
    assert again.folder.path == first.with_name(f"{first.name}-2")
    finish(again)
    assert locate_run(config(*words)).folder.path == again.folder.path, "auto: the newest"
    assert locate_run(config(*words, f"resume={first}")).folder.path == first
    checkpoint = first / "checkpoints" / "step-000003.ckpt"
    with pytest.raises(UserError, match="no run folder and no checkpoint"):
        locate_run(config(*words, f"resume={checkpoint}"))
    checkpoint.parent.mkdir()
    checkpoint.touch()
    assert locate_run(config(*words, f"resume={checkpoint}")).folder.path == first


def test_a_run_of_another_identity_cannot_be_resumed(tmp_path: Path) -> None:
    words = ["task=reward", f"output_root={tmp_path}"]
    finish(locate_run(config(*words)))
    folder = locate_run(config(*words)).folder.path
    with pytest.raises(UserError, match=r"that run had other values of optimizer.lr, seed .*resume=never"):
        locate_run(config(*words, f"resume={folder}", "seed=1", "optimizer.lr=0.1"))
    with pytest.raises(UserError, match="no run folder"):
        locate_run(config(*words, f"resume={tmp_path}"))
    # what does not enter the hash may differ
    assert locate_run(config(*words, f"resume={folder}", "name=other", "trainer=cpu")).folder.path == folder
