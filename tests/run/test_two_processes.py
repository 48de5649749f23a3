"""`evaluate.py trainer.devices=2` says what one process says: same rows, same batches, same numbers, one folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_cli_evaluate as pairs
import test_cli_moderation as moderation
import test_evaluate_policy as policies

ROOT = Path(__file__).resolve().parents[2]
ROWS = ["data.train_rows=64", "data.val_rows=16", "data.test_rows=41", "evaluation.bootstrap_draws=100"]
QUIET = ["trainer.threads=1", "trainer.eval_batch_size=8", "tracking=none"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    heads = {"score": 1}
    return {
        "moderator": moderation.moderator_export(folder / "moderator"),
        "cost": pairs.export(folder / "cost", "cost"),
        "sft": policies.export(folder / "sft", "sft"),
        "ppo": policies.export(folder / "ppo", "ppo", seed=1),
        "judge": policies.export(folder / "judge", "cost", heads=heads, seed=2),
    }


def run(place: Path, devices: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "evaluate.py"), *ROWS, *QUIET, f"trainer.devices={devices}", *words]
    command += [f"output_root={place}", f"cache_dir={place / 'cache'}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def both(tmp_path: Path, *words: str) -> list[Path]:
    """Folders of one process and of two; what is said on the screen is said once."""
    found = []
    for devices in (1, 2):
        place = tmp_path / str(devices)
        done = run(place, devices, *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("metrics:") == 1 and "distributed" not in done.stderr
        (folder,) = (place / "evaluate").iterdir()
        found.append(folder)
    assert found[0].name == found[1].name, "how many processes judged is no part of what was measured"
    return found


def read(folder: Path, name: str = "metrics.json") -> Any:
    return json.loads((folder / name).read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "model"), [("moderation", "moderator"), ("preference", "cost")])
def test_metrics_are_those_of_one(suite: str, model: str, models: dict[str, Path], tmp_path: Path) -> None:
    one, two = both(tmp_path, f"suite={suite}", f"model={models[model]}")
    assert read(one) == read(two)
    assert any(name.endswith("_low") for name in read(two)) and any("baseline_tfidf" in name for name in read(two))


@pytest.mark.slow
def test_policies_write_and_are_judged_as_by_one(models: dict[str, Path], tmp_path: Path) -> None:
    words = ["max_new_tokens=12", "samples=2", f"baseline={models['sft']}", f"judges=[{models['judge']}]"]
    one, two = both(tmp_path, "suite=policy", f"model={models['ppo']}", *words)
    samples = [[_words(line) for line in (f / "samples.jsonl").read_text().splitlines()] for f in (one, two)]
    assert samples[0] == samples[1] and len(samples[0]) >= 41
    assert read(one).keys() == read(two).keys()
    for name, value in read(one).items():
        # a batch of other responses rounds scores otherwise
        assert read(two)[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def _words(line: str) -> Any:
    """Of a line of samples, what was written."""
    return {name: value for name, value in json.loads(line).items() if isinstance(value, str)}


@pytest.mark.slow
def test_verdicts_are_those_of_one(models: dict[str, Path], tmp_path: Path) -> None:
    one, two = both(tmp_path, "mode=moderate", f"model={models['moderator']}")
    assert (one / "verdicts.jsonl").read_text() == (two / "verdicts.jsonl").read_text()


@pytest.mark.slow
def test_trouble_is_one_line_and_no_process_is_left_waiting(models: dict[str, Path], tmp_path: Path) -> None:
    done = run(tmp_path, 2, "suite=policy", f"model={models['ppo']}", "evaluation.max_rows=1")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == ["error: 1 prompts for 2 processes (in trainer.devices); use more prompts or fewer devices"]


def test_a_stream_has_one_process(models: dict[str, Path], tmp_path: Path) -> None:
    answer = pairs.evaluate(tmp_path, "mode=moderate", f"model={models['moderator']}", "input=-", "trainer.devices=2")
    assert answer.code == 2
    assert answer.error == "a stream is judged by one process (in trainer.devices=2); use 1"
