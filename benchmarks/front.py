"""The front of cost and reward: a sweep of PPO-Lagrangian over its threshold d and the step of its multiplier.

    python benchmarks/front.py run --threads 1      trains what is not trained yet: SFT, reward, cost, PPO, the sweep
    python benchmarks/front.py write                draws docs/images/front.png, fills the block of docs/sweeps.md

Every policy begins as the same SFT model on the toy world. The constraint is mean cost <= d. The picture has one point
for each run with its 95% intervals over held-out prompts, and a line along d for each `lambda_lr`: on the left by the
learned scores that were trained against, on the right by the world's truth (harm = minus harmlessness), which no run
saw. PPO without a constraint and the SFT model stand beside them. All numbers of the page come from the runs' folders.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from results import replace_block

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs" / "sweeps.md", ROOT / "docs" / "images" / "front.png"
BLOCK = "front"

STAGES = "python train.py pipeline=quickstart pipeline.stages=[sft,reward,cost]"
INPUTS = {"init": "sft", "roles.reward.model": "reward", "roles.cost.model": "cost"}
"""Key of a policy's run -> stage of the quickstart whose run is its value."""
COMMON = "trainer.max_steps=30 rollout.prompts=64"
FREE = f"python train.py experiment=toy_ppo name=front-ppo {COMMON}"
SWEEP = (
    f"python train.py -m experiment=toy_ppo_lag name=front {COMMON} constraint.lambda_min=0.02 "
    "constraint.lambda_max=5 constraint.threshold=-4,-1 constraint.lambda_lr=0.02,0.1,0.5 "
    "sweep.objective=policy/mean_reward sweep.direction=maximize sweep.folder=front"
)
THRESHOLD, STEP = "constraint.threshold", "constraint.lambda_lr"

COST, REWARD, HELP, HARMLESS = (f"policy/mean_{name}" for name in ("cost", "reward", "helpfulness", "harmlessness"))
SAFE = "policy/safe_rate"
BEFORE = "policy/baseline_policy/"


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        threshold: d.
        step: lambda_lr.
        metrics: its `metrics.json`.
        lambdas: of each rollout.
    """

    threshold: float
    step: float
    metrics: Mapping[str, float]
    lambdas: tuple[float, ...]

    @property
    def gap(self) -> float:
        """Mean cost of held-out prompts above the threshold."""
        return self.metrics[COST] - self.threshold


@dataclass(frozen=True)
class Front:
    """What the page needs: the runs of the sweep, and PPO without a constraint, which knows the SFT model's numbers."""

    points: tuple[Point, ...]
    free: Mapping[str, float]

    def along(self, step: float) -> list[Point]:
        """The runs of one `lambda_lr`, by threshold."""
        return sorted((p for p in self.points if p.step == step), key=lambda point: point.threshold)

    @property
    def steps(self) -> list[float]:
        """The values of `lambda_lr`."""
        return sorted({point.step for point in self.points})

    @property
    def thresholds(self) -> list[float]:
        """The values of d."""
        return sorted({point.threshold for point in self.points})


# ------------------------------------------------------------------------------------------------ running
def run(outputs: Path, threads: int | None) -> None:
    """Train what is missing; finished runs answer at once."""
    own = [f"output_root={outputs}", *([] if threads is None else [f"trainer.threads={threads}"])]
    _call([*shlex.split(STAGES), "pipeline.parallel=1", *own])
    inputs = [f"{key}={newest(outputs, f'quickstart-{stage}')}" for key, stage in INPUTS.items()]
    _call([*shlex.split(FREE), *inputs, *own])
    _call([*shlex.split(SWEEP), *inputs, *own, "sweep.workers=1"])


def newest(outputs: Path, name: str) -> Path:
    """The folder of the run of that name which was finished last.

    Raises:
        FileNotFoundError: there is none.
    """
    states = {file.parent: _read(file) for file in (outputs / name).glob("*/status.json")}
    found = [(state.get("finished", 0.0), path) for path, state in states.items() if state.get("status") == "finished"]
    if not found:
        raise FileNotFoundError(f"no finished run in {outputs / name}")
    return max(found)[1]


def _call(words: Sequence[str]) -> None:
    print(f"$ {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)


# ------------------------------------------------------------------------------------------------ reading
def read_front(outputs: Path) -> Front:
    """The sweep's runs that are finished, from `sweep.json` and their folders.

    Raises:
        ValueError: some are not.
    """
    runs = _read(outputs / "sweeps" / "front" / "sweep.json")["runs"]
    waiting = [str(entry["overrides"]) for entry in runs if entry["status"] != "finished"]
    if waiting:
        raise ValueError(f"not finished: {', '.join(waiting)}")
    points = []
    for entry in runs:
        named = Path(entry["folder"])
        folder = outputs / named.parent.name / named.name  # the outputs may have been moved
        lines = map(json.loads, (folder / "curves.jsonl").read_text().splitlines())
        lambdas = tuple(line["train/lambda"] for line in lines if "train/lambda" in line)
        values = entry["overrides"]
        points.append(Point(float(values[THRESHOLD]), float(values[STEP]), _read(folder / "metrics.json"), lambdas))
    return Front(tuple(points), _read(newest(outputs, "front-ppo") / "metrics.json"))


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


# ------------------------------------------------------------------------------------------------ writing
def render(front: Front) -> str:
    """The block of the page: the runs as a table and what they say."""
    head = ["`lambda_lr`", "d", "mean cost", "mean reward", "last lambda", "true helpfulness", "safe"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for step in front.steps:
        for point in front.along(step):
            m = point.metrics
            cells = [f"{step:g}", f"{point.threshold:g}", _cell(m, COST), _cell(m, REWARD)]
            cells += [f"{point.lambdas[-1]:.2f}", _cell(m, HELP), _cell(m, SAFE)]
            rows.append("| " + " | ".join(cells) + " |")
    free, before = front.free, {key.replace(BEFORE, "policy/"): v for key, v in front.free.items() if BEFORE in key}
    for name, m in (("PPO, no constraint", free), ("SFT, the start", before)):
        rows.append(f"| {name} | | {_cell(m, COST)} | {_cell(m, REWARD)} | | {_cell(m, HELP)} | {_cell(m, SAFE)} |")
    return "\n".join(
        [
            *rows,
            "",
            *(f"- {text}" for text in sentences(front)),
            "",
            "Runs: " + SWEEP.replace("python", "`python", 1) + "`",
        ]
    )


def sentences(front: Front) -> list[str]:
    """What is seen, in three sentences; every number is taken from the runs."""
    total, low, high = len(front.points), front.thresholds[0], front.thresholds[-1]
    met = sum(point.gap <= 0 for point in front.points)
    gaps = "; ".join(f"{step:g}: {_span([p.gap for p in front.along(step)])}" for step in front.steps)
    rewards = _changes(front, lambda m: m[REWARD], "{:+.2f}")
    helps = _changes(front, lambda m: m[HELP], "{:+.2f}")
    harms = _changes(front, lambda m: 100 * (1 - m[SAFE]), "{:+.1f}")
    lambdas = "; ".join(
        f"{step:g}: {line[0].lambdas[-1]:.2f} and {line[-1].lambdas[-1]:.2f}"
        for step, line in ((step, front.along(step)) for step in front.steps)
    )
    return [
        f"On held-out prompts {met} of {total} runs have a mean cost of at most d; mean cost minus d lies, by "
        f"`lambda_lr`, at {gaps} (below zero: safer than asked for).",
        f"From d = {low:g} to d = {high:g} the mean reward changes, by `lambda_lr`, by {rewards}, true helpfulness by "
        f"{helps}, and the share of unsafe responses by {harms} points; without a constraint the reward is "
        f"{front.free[REWARD]:.2f}, true helpfulness {front.free[HELP]:.2f} and {100 * (1 - front.free[SAFE]):.1f}% "
        "are unsafe.",
        f"Lambda began at 0.5 and ended, by `lambda_lr` and for d = {low:g} and {high:g}, at {lambdas}; this is one "
        "seed, and the intervals hold the prompts' chance, not that of training.",
    ]


def _changes(front: Front, value: Callable[[Mapping[str, float]], float], form: str) -> str:
    """From the lowest threshold to the highest, for each `lambda_lr`."""
    lines = {step: front.along(step) for step in front.steps}
    changed = {step: value(line[-1].metrics) - value(line[0].metrics) for step, line in lines.items()}
    return ", ".join(f"{form.format(change)} ({step:g})" for step, change in changed.items())


def _span(values: Sequence[float]) -> str:
    return f"{min(values):+.2f} .. {max(values):+.2f}"


def _cell(metrics: Mapping[str, float], name: str) -> str:
    low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
    return f"{metrics[name]:.2f} ({low:.2f} .. {high:.2f})"


# ------------------------------------------------------------------------------------------------ drawing
def draw(front: Front, path: Path) -> None:
    """Two panels: learned cost and reward with the thresholds, and the truth."""
    from matplotlib.figure import Figure

    from saferlhf.evaluation.drawing import GRID, INK, ON_WHITE, SERIES, save_png

    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = [ON_WHITE[mark] for mark in SERIES]
    for axes, (x, y, sign) in ((left, (COST, REWARD, 1.0)), (right, (HARMLESS, HELP, -1.0))):
        for colour, step in zip(colours, front.steps, strict=False):
            points = front.along(step)
            line = [(sign * p.metrics[x], p.metrics[y]) for p in points]
            axes.plot(*zip(*line, strict=True), "-", color=colour, linewidth=0.9, alpha=0.6)
            for point, marker in zip(points, "osD^v<>", strict=False):
                label = f"lambda_lr = {step:g}" if point is points[0] else None
                _mark(axes, point.metrics, (x, y, sign), color=colour, marker=marker, label=label)
        _mark(axes, front.free, (x, y, sign), color=colours[-1], marker="P", label="PPO, no constraint")
        before = {key.replace(BEFORE, "policy/"): value for key, value in front.free.items() if BEFORE in key}
        _mark(axes, before, (x, y, sign), color=ON_WHITE[INK], marker="X", label="SFT, the start")
        axes.grid(color=ON_WHITE[GRID], linewidth=0.5)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for threshold, marker in zip(front.thresholds, "osD^v<>", strict=False):
        left.axvline(threshold, color=ON_WHITE[INK], linewidth=0.8, linestyle=":")
        left.plot([threshold], [1.03], marker, color=ON_WHITE[INK], transform=left.get_xaxis_transform(), clip_on=False)
        text = f"d = {threshold:g}"
        left.text(threshold, 1.06, text, ha="center", fontsize=8, transform=left.get_xaxis_transform())
    left.set(xlabel="mean cost (learned)", ylabel="mean reward (learned)")
    right.set(xlabel="true harm (minus harmlessness)", ylabel="true helpfulness")
    left.legend(frameon=False, fontsize=8, loc="lower left")
    save_png(figure, path)


def _mark(axes: Any, metrics: Mapping[str, float], what: tuple[str, str, float], **style: Any) -> None:
    """One point with its intervals both ways."""
    x, y, sign = what
    ends = sorted(sign * metrics[f"{x}_{end}"] for end in ("low", "high"))
    at = sign * metrics[x]
    reach_x = [[at - ends[0]], [ends[1] - at]]
    reach_y = [[metrics[y] - metrics[f"{y}_low"]], [metrics[f"{y}_high"] - metrics[y]]]
    axes.errorbar(
        [at], [metrics[y]], xerr=reach_x, yerr=reach_y, markersize=5, elinewidth=0.8, linestyle="none", **style
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "write"))
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="where the run folders lie")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of each run")
    arguments = parser.parse_args()
    if arguments.action == "run":
        run(arguments.outputs.resolve(), arguments.threads)
        return 0
    front = read_front(arguments.outputs.resolve())
    draw(front, PICTURE)
    PAGE.write_text(replace_block(PAGE.read_text(), BLOCK, render(front)))
    print(f"{PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
