"""Hold the memory plan against what a run really takes: planned and measured peaks side by side in docs/oom.md.

    python benchmarks/plan_memory.py run          each case in a process of its own, and prints the table
    python benchmarks/plan_memory.py write        the same, and puts the table into docs/oom.md

Measured is the growth of the resident memory (Linux: the highest VmRSS) from before the model is built to the end of a
few training steps of SmolLM2-135M on a CPU with one thread, on made-up rows of known length. It needs the weights
(`make setup`), some 6 GiB of memory, and a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "oom.md"
BEGIN, END = "<!-- measured -->", "<!-- end -->"
GIB = 2**30
ROWS, WORDS = 40, 80
"""Rows of the made-up data, and words of each response."""


@dataclass(frozen=True)
class Case:
    """One measured run."""

    task: str
    rows: int
    words: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """Words of the command line, beside the data."""
        common = [
            f"task={self.task}", "backbone=smollm2", "trainer=cpu", "trainer.threads=1", "trainer.max_steps=2",
            f"trainer.micro_batch_size={self.rows}", f"trainer.batch_size={2 * self.rows}", "trainer.eval_batch_size=4",
            "trainer.progress=none", "tracking=none", "data=jsonl", "data.val_fraction=0.1", "data.test_fraction=0.1",
        ]  # fmt: skip
        if self.task == "ppo_lag":
            scorer = "{kind: function, function: 'plan_memory:letters', outputs: [score]}"
            common += [
                f"scorers={{reward: {scorer}, cost: {scorer}}}", "rollout.max_new_tokens=16", "trainer.max_steps=1",
                f"rollout.prompts={2 * self.rows}", f"rollout.batch_size={2 * self.rows}", "task.mini_batches=1",
                "task.epochs=1",
            ]  # fmt: skip
        return [*common, *self.words]


SHARED = ("adapter=lora", "roles=shared")
CASES = (
    Case("sft", 2),
    Case("sft", 8),
    Case("reward", 2, ("adapter=lora",)),
    Case("reward", 6, ("adapter=lora",)),
    Case("ppo_lag", 4, SHARED),
    Case("ppo_lag", 10, SHARED),
)
"""Two batch sizes of each: all weights, adapters, actor and critics on one base."""


ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "262144"}
"""Of glibc: freed tensors go back to the system. Without it the heap keeps them in pieces, by chance up to as much
again as the activations (docs/oom.md), which says nothing about the run."""


def letters(prompt: str, response: str) -> float:
    """A score that costs no memory: the share of letters."""
    return sum(c.isalpha() for c in response) / max(1, len(response)) - 0.5


def write_rows(folder: Path) -> Path:
    """Made-up pairs of nearly equal length."""
    lines = []
    for n in range(ROWS):
        say = [f"answer {n} {side} " + "word " * (WORDS - n % 5) for side in ("one", "two")]
        lines.append({
            "prompt": f"question {n} " + "please " * (30 - n % 3), "response_0": say[0], "response_1": say[1],
            "better_response_id": n % 2, "safer_response_id": n % 2,
            "is_response_0_safe": n % 2 == 0, "is_response_1_safe": n % 2 == 1,
        })  # fmt: skip
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def prepared_run(case: Case, folder: Path) -> Any:
    """The case's run with its rows and tokenizer, before any weights are there."""
    from hydra import compose, initialize_config_dir

    from saferlhf.config.paths import conf_dir
    from saferlhf.config.validate import train_config
    from saferlhf.run.prepare import checked, locate_run
    from saferlhf.run.stages import prepare

    words = [*case.overrides, f"data.path={write_rows(folder)}", f"output_root={folder}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        run = locate_run(checked(train_config(compose("train", words))))
    return prepare(run)


def memory_status(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def measure(case: Case, folder: Path) -> dict[str, int]:
    """Train a few steps; the growth of the resident memory at its highest, in bytes."""
    import lightning  # noqa: F401 (what a process needs anyhow is there before the baseline is taken)
    import peft  # noqa: F401

    from saferlhf.run.stages import fit

    prepared = prepared_run(case, folder)
    prepared.folder.acquire()
    baseline = memory_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest is counted from here on
    prepared.task.configure_model()
    built = memory_status("VmHWM") - baseline
    kept = memory_status("VmRSS") - baseline
    Path("/proc/self/clear_refs").write_text("5")
    fit(prepared, prepared.start_tracking())
    return {"growth": max(built, memory_status("VmHWM") - baseline), "built": built, "kept": kept}


def plan(case: Case, folder: Path) -> dict[str, Any]:
    """What the plan says of the same run, in bytes."""
    from saferlhf.run.memory.plan import plan_memory
    from saferlhf.run.memory.workload import workload_of

    prepared = prepared_run(case, folder)
    found = plan_memory(prepared.config, workload_of(prepared.config, prepared.encoded, prepared.steps), device="cpu")
    return {"peak": found.peak, "phases": {phase.name: phase.total for phase in found.phases}}


def in_a_process(what: str, number: int) -> dict[str, Any]:
    """Measure or plan one case in a fresh process."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **own, **ALLOCATOR}
    done = subprocess.run(
        [sys.executable, __file__, what, "--case", str(number)], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "write", "measure", "plan"))
    parser.add_argument("--case", type=int, default=None)
    given = parser.parse_args()
    if given.what in ("measure", "plan"):
        with tempfile.TemporaryDirectory() as folder:
            found = (measure if given.what == "measure" else plan)(CASES[given.case], Path(folder))
        print(json.dumps(found), flush=True)
        return
    lines = [
        "| run | rows at once | planned GiB | measured GiB | planned / measured |",
        "| --- | --- | --- | --- | --- |",
    ]
    for number, case in enumerate(CASES):
        planned, measured = in_a_process("plan", number)["peak"], in_a_process("measure", number)["growth"]
        words = " ".join(word for word in ("task=" + case.task, *case.words))
        lines.append(
            f"| `{words}` | {case.rows} | {planned / GIB:.2f} | {measured / GIB:.2f} | {planned / measured:.2f} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    if given.what == "write":
        text = PAGE.read_text()
        before, rest = text.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
