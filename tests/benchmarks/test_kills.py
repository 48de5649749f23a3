"""Kills: a stand-in for the command shows the bookkeeping, and a small real run is killed twice."""

from __future__ import annotations

import importlib.util
import json
import sys
import textwrap
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from small_runs import small

# what a run leaves, without the run: 40 steps of 20 ms, a state every 5, resumed from the newest
STAND_IN = """
    import json, os, pathlib, subprocess, sys, time
    out = pathlib.Path(dict(word.split("=", 1) for word in sys.argv[1:])["output_root"])
    run = out / "reward" / "abc"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "export").mkdir(exist_ok=True)
    def status(**values):
        (run / "draft").write_text(json.dumps(values))
        (run / "draft").rename(run / "status.json")
    def say(line): open(run / "run.log", "a").write(line + chr(10))
    def note(step): open(run / "curves.jsonl", "a").write(json.dumps({"step": step, "loss": 1 / step}) + chr(10))
    if "finished" in ((run / "status.json").read_text() if (run / "status.json").exists() else ""):
        sys.exit(0)
    status(status="running", phase=None)
    time.sleep(0.1)
    say(f"run {run}")
    say("plan")
    held = sorted(run.glob("checkpoints/step-*.ckpt"))
    begin = int(held[-1].stem.split("-")[1]) if held else 0
    if held:
        say(f"going on from {held[-1]}")
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) if "stays" in sys.argv[0] else None
    for step in range(begin + 1, 41):
        time.sleep(0.02)
        note(step)
        if step % 5 == 0:
            path = run / "checkpoints" / f"step-{step:08d}.ckpt"
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            draft.write_bytes(b"half")
            time.sleep(0.02)
            draft.write_bytes(pathlib.Path(os.environ["STATE"]).with_name(f"{step}.ckpt").read_bytes())
            draft.rename(path)
    status(status="running", phase="evaluating")
    time.sleep(0.1)
    (run / "export" / "model.safetensors").write_bytes(pathlib.Path(os.environ["STATE"]).read_bytes())
    (run / "metrics.json").write_text(json.dumps({"test/loss": 0.5, "train/seconds": time.time()}))
    for left in run.glob("checkpoints/.*"):
        left.unlink()
    status(status="finished", phase=None)
    if other:
        other.kill()
"""


@pytest.fixture(scope="module")
def kills(project_root: Path) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("kills", project_root / "benchmarks" / "kills.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kills"] = module
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def lives_module() -> ModuleType:
    """The part that touches processes, as `kills` has imported it."""
    return sys.modules["kills_lives"]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that leaves the files of a run; its states and weights are real files."""
    from safetensors.torch import save_file

    save_file({"w": torch.arange(3.0)}, tmp_path / "weights")
    for step in range(5, 41, 5):
        torch.save({"global_step": step}, tmp_path / f"{step}.ckpt")
    monkeypatch.setenv("STATE", str(tmp_path / "weights"))
    script = tmp_path / "command.py"
    script.write_text(textwrap.dedent(STAND_IN))
    return script


def lives_of(kills: ModuleType, script: Path, **more: Any) -> Any:
    place = script.parent / "place"
    place.mkdir(exist_ok=True)
    return kills.Lives([sys.executable, str(script)], place, **more)


def comparing(kills: ModuleType, lives: Any) -> Any:
    return lambda life: kills.compared(kills.run_folder(lives.outputs(life)), kills.run_folder(lives.outputs(0)))


# ------------------------------------------------------------------------------------------------ the plan
def test_the_moments_are_spread_and_repeatable(kills: ModuleType) -> None:
    plan = kills.planned(200, 50.0, seed=1)
    assert plan == kills.planned(200, 50.0, seed=1) != kills.planned(200, 50.0, seed=2)
    moments = [start.asked_s for start in plan]
    assert 0 <= min(moments) < 5 and 45 < max(moments) <= 50 and 20 < sum(moments) / len(moments) < 30
    assert [start.aim for start in plan[:8]] == [None, None, None, "saving", None, None, None, "evaluating"]
    assert not any(start.only_first for start in plan)
    assert 60 < sum(start.only_first for start in kills.planned(200, 50.0, seed=1, processes=2)) < 140


# ------------------------------------------------------------------------------------------------ a stand-in
def test_all_kills_are_used_and_every_end_is_compared(kills: ModuleType, stand_in: Path) -> None:
    lives = lives_of(kills, stand_in)
    whole, seen = lives.undisturbed()
    assert (whole.code, whole.step, whole.phase, whole.checkpoints[-1]) == (0, 40, "finished", 40)
    assert {"starting", "training", "saving", "evaluating"} <= seen.keys()
    plan = kills.planned(8, whole.ended_s, seed=0)
    starts, ends = kills.killed_again_and_again(lives, plan, {"evaluating": 0.1}, 0, comparing(kills, lives))
    killed = [start for start in starts if start.killed]
    assert len(killed) == 8 and all(k.asked_s <= p.asked_s for k, p in zip(killed, plan, strict=True))
    assert not starts[-1].killed and starts[-1].code == 0 and sum(end["kills"] for end in ends) == 8
    assert [start.phase for start in killed if start.aim] == ["saving", "evaluating"]
    for one, other in pairwise(starts):
        newest = one.checkpoints[-1] if one.checkpoints and one.life == other.life else 0
        if other.step > other.resumed:  # it had come as far as to say where it goes on
            assert other.resumed == newest
        assert not one.damaged and one.left == 0
    for end in ends:
        assert end["weights"] == {"values": 1, "on_one_side": 0, "largest": 0.0}
        assert (end["metrics"]["values"], end["curves"]["values"]) == (1, 40)
        assert end["metrics"]["largest"] == end["curves"]["largest"] == 0 and end["leftovers"] == []


def test_a_state_that_cannot_be_read_is_told(kills: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save({"global_step": 5}, folder / "step-00000005.ckpt")
    torch.save({"global_step": 5}, folder / "step-00000010.ckpt")
    (folder / "step-00000015.ckpt").write_bytes((folder / "step-00000005.ckpt").read_bytes()[:100])
    (folder / ".step-00000020.ckpt.77").write_bytes(b"half")
    steps, damaged = lives_module().read_checkpoints(tmp_path)
    assert steps == [5, 10, 15] and set(damaged) == {"step-00000010.ckpt", "step-00000015.ckpt"}
    assert damaged["step-00000010.ckpt"] == "holds step 5"
    assert "cannot be read" in damaged["step-00000015.ckpt"]


@pytest.mark.parametrize(("alone", "left"), [(True, 1), (False, 0)])
def test_whoever_outlives_the_first_is_counted_and_ended(
    alone: bool, left: int, kills: ModuleType, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in's second process sleeps on when the first is killed."""
    monkeypatch.setattr(lives_module(), "GONE_S", 0.3)
    started: list[int] = []
    end_group = lives_module()._end_group
    monkeypatch.setattr(lives_module(), "_end_group", lambda leader: (started.append(leader), end_group(leader)))
    lives = lives_of(kills, stand_in.rename(stand_in.with_name("stays.py")), processes=2)
    start = lives.run(kills.Start(1, 0.0, aim="training", only_first=alone))
    assert start.killed and start.phase in ("training", "saving") and start.left == left
    until = time.monotonic() + 10
    while lives_module().group(started[0]):  # the system takes a moment
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_command_that_fails_or_hangs_is_no_result(kills: ModuleType, stand_in: Path) -> None:
    bad = stand_in.with_name("bad.py")
    bad.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="ended with 3"):
        lives_of(kills, bad).undisturbed()
    bad.write_text("import time; time.sleep(60)")
    with pytest.raises(SystemExit, match="still running after 0 s"):
        lives_of(kills, bad, hang_s=0.3).undisturbed()


def test_differences(kills: ModuleType) -> None:
    found = lives_module()._differences({"a": 1.0, "b": 2.0, "c": 0.0}, {"a": 1.5, "b": 2.0, "d": 0.0})
    assert found == {"values": 2, "on_one_side": 2, "largest": 0.5}
    none, one = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])
    assert lives_module()._differences({"a": none}, {"a": none.clone()})["largest"] == 0
    # a number that is none on one side, another dtype, another shape
    for other in (one, none.double(), none[:1]):
        assert lives_module()._differences({"a": none}, {"a": other})["largest"] == float("inf")
    assert lives_module()._differences({}, {})["largest"] == 0


# ------------------------------------------------------------------------------------------------ the page
def a_result(**changes: Any) -> dict[str, Any]:
    """Killed three times: before training, in it, and the first process of two alone while it saved; then let be."""
    start = {"life": 1, "asked_s": 1.0, "aim": None, "only_first": False, "ended_s": 1.0, "killed": True, "code": None,
             "phase": "starting", "resumed": 0, "step": 0, "checkpoints": [], "damaged": {}, "gone_s": 0.1,
             "left": 0}  # fmt: skip
    second = {**start, "phase": "training", "step": 17, "checkpoints": [5, 10]}
    third = {**start, "phase": "saving", "resumed": 10, "step": 15, "checkpoints": [5, 10], "only_first": True}
    last = {**start, "killed": False, "code": 0, "phase": "finished", "resumed": 10, "step": 20}
    part = {"values": 4, "on_one_side": 0, "largest": 0.0}
    end = {"life": 1, "kills": 3, "weights": part, "metrics": {**part, "largest": 2e-7},
           "curves": part, "leftovers": []}  # fmt: skip
    return {"case": "reward", "title": "a reward model", "processes": 2, "undisturbed_s": 20.4, "steps": 20,
            "starts": [start, second, third, last], "ends": [end], **changes}  # fmt: skip


def test_the_page(kills: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "kills.md"
    page.parent.mkdir()
    page.write_text("before\n\n<!-- measured -->\noutdated\n<!-- end -->\nafter\n")
    kills.write_page([a_result()], tmp_path)
    text = page.read_text()
    assert text.startswith("before\n\n<!-- measured -->\n| run |") and text.endswith("<!-- end -->\nafter\n")
    assert "outdated" not in text
    assert "| a reward model; 20 steps, 20 s undisturbed | 3 | 0 of 4 | 1 | 0 (4 compared) | 2.0e-07 | 0 (4 " in text
    assert "| training | 1 |" in text and "| a checkpoint half written | 1 |" in text and "final metrics" not in text
    # 17 - 10 and 15 - 10
    assert "a kill in training cost 6.0 steps on average, 7 at most" in text
    assert "1 of its kills hit the first of the 2 processes alone: the others were gone within 0.1 s" in text
    assert (page.parent / "images" / "kills.png").read_bytes().startswith(b"\x89PNG")
    broken = a_result()
    broken["ends"][0]["weights"] = {**broken["ends"][0]["weights"], "on_one_side": 1}
    broken["starts"][1]["damaged"] = {"step-00000010.ckpt": "why"}
    kills.write_page([broken], tmp_path)
    assert "| 1 of 4 | 1 | other values |" in page.read_text()
    with pytest.raises(SystemExit, match="nothing was measured"):
        kills.write_page([], tmp_path)


# ------------------------------------------------------------------------------------------------ a real run
@pytest.mark.slow
def test_two_kills_of_a_small_run(
    kills: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project_root: Path
) -> None:
    """The second at a checkpoint that is being written."""
    words = tuple(small("task=reward", "trainer.log_every_steps=1", "checkpoint.every_steps=1", "checkpoint.keep=2"))
    monkeypatch.setattr(kills, "TINY", ())
    monkeypatch.setitem(kills.CASES, "small", kills.Case("a small run", words))
    aimed = [kills.Start(0, 0.0, aim="training"), kills.Start(0, 0.0, aim="saving")]
    monkeypatch.setattr(kills, "planned", lambda *_: aimed)
    result = kills.run_case("small", tmp_path, kills=2, seed=0)
    assert result == json.loads((tmp_path / "small.json").read_text())
    killed = [start for start in result["starts"] if start["killed"]]
    assert len(killed) == 2 and killed[1]["phase"] in ("training", "saving")
    assert all(start["checkpoints"] and not start["damaged"] for start in killed)
    assert killed[1]["resumed"] == killed[0]["checkpoints"][-1]
    for end in result["ends"]:
        assert end["weights"]["values"] > 10 and end["curves"]["values"] > 30 and end["metrics"]["values"] > 5
        assert not end["leftovers"]
        for part in ("weights", "metrics", "curves"):
            assert end[part]["largest"] == end[part]["on_one_side"] == 0, part
