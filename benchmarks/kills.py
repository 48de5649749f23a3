"""Kill -9 at random moments, the same command again, and the end of an undisturbed run: docs/kills.md, measured.

    python benchmarks/kills.py run                     all cases, some twelve minutes each, into outputs/kills
    python benchmarks/kills.py run reward --kills 5    one of them, shorter
    python benchmarks/kills.py write                   docs/kills.md and its picture, from what the runs left

A case is one command on the toy world. It runs undisturbed once, which takes T seconds. Then it is started again and
again, and each start is killed u ~ Uniform(0, T) seconds later, until all kills are used; the last start is left alone.
A run that reaches its end before its next kill is compared, and begun again in an empty folder, with the kills that are
left. As phases that take moments are seldom met by chance, every fourth kill is aimed: it waits from u on until a
checkpoint is being written (or until evaluation, or the export, has begun), and strikes then. A kill that comes too
late for a whole run strikes at half its time in the next.

A kill is SIGKILL to the whole process group, as when a machine dies. Of several processes half of the kills, by lot,
hit the first alone: the others must be gone soon after, by themselves. After each kill every checkpoint is read by the
run's own reader. At the end weights, curves and metrics are held against those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from kills_lives import PHASES, Lives, Start, compared, run_folder
from kills_page import write_page

ROOT = Path(__file__).resolve().parents[1]
AIMS = ("saving", "evaluating", "saving", "exporting")
"""What every fourth kill waits for, in turns."""

TINY = (
    "backbone.architecture.hidden_size=64", "backbone.architecture.intermediate_size=128",
    "backbone.architecture.num_hidden_layers=2", "backbone.architecture.num_attention_heads=2",
    "backbone.architecture.num_key_value_heads=2", "data.train_rows=400", "data.val_rows=40", "data.test_rows=40",
    "trainer.accelerator=cpu", "trainer.threads=1", "trainer.progress=none", "trainer.log_every_steps=1",
    "trainer.eval_batch_size=40", "evaluation.bootstrap_draws=200", "tracking=none",
)  # fmt: skip
REWARD = ("task=reward", "trainer.batch_size=16", "trainer.epochs=100", "trainer.val_every_steps=40")
SAVED = ("checkpoint.every_minutes=null", "checkpoint.keep=2")


@dataclass(frozen=True)
class Case:
    """One command.

    Attributes:
        title: for the page.
        words: overrides of `train.py`; {sft}, {reward}, {cost} are runs made before.
        before: runs whose models the command starts from.
        processes: how many there are of it.
    """

    title: str
    words: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()
    processes: int = 1


BEFORE = tuple(
    (f"task={task}", f"name={task}", "trainer.max_steps=60", "trainer.batch_size=16", "trainer.epochs=100")
    for task in ("sft", "reward", "cost")
)
CASES = {
    "reward": Case(
        "a reward model, one process", (*REWARD, *SAVED, "trainer.max_steps=160", "checkpoint.every_steps=8")
    ),
    "ppo_lag": Case(
        "PPO-Lagrangian with learned scores and critics, one process",
        (
            "task=ppo_lag", "init={sft}", "roles.reward.model={reward}", "roles.cost.model={cost}",
            "rollout.prompts=8", "rollout.samples=2", "rollout.max_new_tokens=12", "trainer.max_steps=30",
            "trainer.epochs=100", "trainer.micro_batch_size=16", *SAVED, "checkpoint.every_steps=2",
        ),
        BEFORE,
    ),
    "fsdp": Case(
        "the reward model by FSDP2, two processes",
        (*REWARD, *SAVED, "trainer.max_steps=160", "checkpoint.every_steps=8", "strategy=fsdp", "trainer.devices=2"),
        processes=2,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the plan of the kills
def planned(kills: int, seconds: float, seed: int, processes: int = 1) -> list[Start]:
    """The moments of the kills.

    Args:
        kills: how many.
        seconds: T, what the undisturbed run takes.
        seed: of the draw.
        processes: with several, half of the kills, by lot, hit the first alone.
    """
    draw = random.Random(seed)
    starts = []
    for number in range(kills):
        aim = AIMS[number // 4 % len(AIMS)] if number % 4 == 3 else None
        alone = processes > 1 and draw.random() < 0.5
        starts.append(Start(0, round(draw.uniform(0.0, seconds), 2), aim, alone))
    return starts


def killed_again_and_again(
    lives: Lives,
    plan: Sequence[Start],
    durations: Mapping[str, float],
    seed: int,
    compare: Callable[[int], dict[str, Any]],
    tell: Callable[[Start], None] = lambda _: None,
    keep: Callable[[list[Start], list[dict[str, Any]]], None] = lambda *_: None,
) -> tuple[list[Start], list[dict[str, Any]]]:
    """Use up the kills, then let the last run come to its end.

    Args:
        lives: of the command.
        plan: the kills.
        durations: seconds of each phase of the undisturbed run: an aimed kill strikes somewhere within it.
        seed: of that draw.
        compare: what a life's end is like, beside the undisturbed run.
        tell: told of each start.
        keep: given all starts and ends so far whenever a life has come to its end.

    Returns:
        All starts, and the ends.
    """
    draw, waiting = random.Random(seed + 1), list(plan)
    done: list[Start] = []
    ends: list[dict[str, Any]] = []
    life = 1
    while True:
        start = replace(waiting[0] if waiting else Start(0, None), life=life, checkpoints=[], damaged={})
        within = 0.0 if start.aim in (None, "saving") else draw.uniform(0.0, durations.get(str(start.aim), 0.0))
        done.append(lives.run(start, within_s=within))
        tell(start)
        if start.killed:
            waiting.pop(0)
            continue
        if start.code != 0:
            raise SystemExit(f"a start ended with {start.code}: see {lives.place / 'output.log'}")
        ends.append({"life": life, "kills": sum(s.killed for s in done if s.life == life), **compare(life)})
        keep(done, ends)
        if not waiting:
            return done, ends
        # the kill that came too late is kept for the next life; too late for a whole one, it strikes earlier there
        if all(other.life < life for other in done[:-1]):
            waiting[0] = replace(waiting[0], asked_s=round((waiting[0].asked_s or 0.0) / 2, 2))
        life += 1


# ------------------------------------------------------------------------------------------------ a case
def prepared_words(case: Case, outputs: Path) -> list[str]:
    """The command's overrides; makes the models that it starts from."""
    found: dict[str, str] = {}
    if case.before:
        shutil.rmtree(outputs / "models", ignore_errors=True)
    for words in case.before:
        command = [sys.executable, "train.py", *TINY, *words, f"output_root={outputs / 'models'}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        name = words[0].partition("=")[2]
        (found[name],) = map(str, (outputs / "models" / name).glob("*"))
    return [word.format(**found) if found else word for word in (*TINY, *case.words)]


def run_case(name: str, outputs: Path, kills: int, seed: int) -> dict[str, Any]:
    """All of one case; the result goes into a file as well."""
    case, place = CASES[name], outputs / name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    words = prepared_words(case, outputs)
    lives = Lives([sys.executable, "train.py", *words], place, processes=case.processes)
    whole, seen = lives.undisturbed()
    phases = [phase for phase in PHASES if phase in seen and phase != "saving"]
    until = [*(seen[phase] for phase in phases[1:]), whole.ended_s]
    durations = {phase: round(end - seen[phase], 2) for phase, end in zip(phases, until, strict=True)}
    print(f"{name}: undisturbed {whole.ended_s:.1f} s, {durations}", file=sys.stderr, flush=True)
    reference = run_folder(lives.outputs(0))
    assert reference is not None

    def compare(life: int) -> dict[str, Any]:
        folder = run_folder(lives.outputs(life))
        assert folder is not None
        return compared(folder, reference)

    started = time.monotonic()
    result: dict[str, Any] = {}

    def keep(starts: list[Start], ends: list[dict[str, Any]]) -> None:
        """Whoever stops the script has what was measured so far."""
        result.update({
            "case": name, "title": case.title, "processes": case.processes, "words": [*TINY, *case.words], "seed": seed,
            "undisturbed_s": whole.ended_s, "phases_s": durations, "steps": whole.step, "kills_planned": kills,
            "took_s": round(time.monotonic() - started, 1), "starts": [asdict(start) for start in starts],
            "ends": ends,
        })  # fmt: skip
        (outputs / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")

    plan = planned(kills, whole.ended_s, seed, case.processes)
    killed_again_and_again(lives, plan, durations, seed, compare, tell=lambda s: _tell(name, s), keep=keep)
    return result


def _tell(name: str, start: Start) -> None:
    how = f"killed in {start.phase}" if start.killed else f"ended with {start.code}"
    print(
        f"{name}: life {start.life}, from step {start.resumed} to {start.step}, {how} after {start.ended_s:.1f} s"
        f"{f' (aimed at {start.aim})' if start.aim else ''}{', the first alone' if start.only_first else ''};"
        f" checkpoints {start.checkpoints}{f', DAMAGED {start.damaged}' if start.damaged else ''}"
        f"{f', LEFT {start.left}' if start.left else ''}, gone after {start.gone_s:.2f} s",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "write"))
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; none: all")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs" / "kills")
    parser.add_argument("--kills", type=int, default=20, help="of each case")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    unknown = set(given.cases) - set(CASES)
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    names = given.cases or list(CASES)
    if given.what == "run":
        for name in names:
            result = run_case(name, given.outputs.resolve(), given.kills, given.seed)
            print(f"{name}: {json.dumps(result['ends'])}")
        return
    found = [given.outputs / f"{name}.json" for name in names]
    write_page([json.loads(file.read_text()) for file in found if file.exists()], ROOT)


if __name__ == "__main__":
    main()
