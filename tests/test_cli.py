"""The command line as a person meets it: one line per mistake, exit codes, help, sweeps, and answers in seconds."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from command_lines import FAST, Answer, call, composed, config, finish, training_stubbed

from saferlhf.config.paths import conf_dir
from saferlhf.errors import UserError
from saferlhf.pipeline.runner import PipelineFailed
from saferlhf.run.prepare import LocatedRun, locate_run
from saferlhf.run.train import Interrupted

ROOT = Path(__file__).resolve().parents[1]
R = "task=reward"


@pytest.fixture
def stubbed() -> Iterator[list[LocatedRun]]:
    with training_stubbed() as reached:
        yield reached


def failing(error: BaseException) -> Any:
    """Runs end with this error."""

    def train(_: Any) -> None:
        raise error

    return mock.patch("saferlhf.run.train.train", train)


# ------------------------------------------------------------------------------------------------ mistakes
MISTAKES = [
    # keys, groups and choices, with `+` and without
    ([R, "trainer.max_step=2"], "unknown key 'max_step' (in trainer); did you mean 'max_steps'?"),
    ([R, "+trainer.max_step=2"], "unknown key 'max_step' (in trainer.max_step); did you mean 'max_steps'?"),
    ([R, "bakcbone=tiny"], "unknown key 'bakcbone' (in the command line); did you mean 'backbone'?"),
    ([R, "+bakcbone=tiny"], "unknown key 'bakcbone' (in bakcbone); did you mean 'backbone'?"),
    ([R, "backbone=tinny"], "there is no backbone 'tinny' (in backbone=tinny); did you mean 'tiny'?"),
    # values
    ([R, "trainer.max_steps=abc"], "'abc' is not a whole number (in trainer.max_steps)"),
    ([R, "data.policy.empty=dorp"], "'dorp' is no policy for empty rows (in data.policy.empty); use one of"),
    # pairs
    ([R, "quantization=nf4"], "a 4-bit base cannot be trained itself (in quantization=nf4); add adapter=lora"),
    ([R, "quantization=nf4", "adapter=lora"], "a model built from scratch has nothing to quantise"),
    ([R, "adapter=lora"], "LoRA on random weights learns nothing useful (in adapter=lora); give init=LOCATOR"),
    ([R, "data=jsonl", "data.path=x"], "backbone 'tiny' knows only the toy world's words (in data=jsonl); choose"),
    # the same key twice
    ([R, "seed=1", "seed=2"], "'seed' is given twice: seed=1 and seed=2 (in the command line); give it once"),
    ([R, "task=cost"], "'task' is given twice: task=reward and task=cost"),
    # two kinds of work
    ([R, "pipeline=quickstart"], "both a task and a pipeline are named (in the command line); name one"),
    # what is not there
    (
        [R, "data=jsonl", "data.path=nope.jsonl", "backbone=smollm2", "adapter=lora"],
        "no such file or folder: nope.jsonl (in data.path)",
    ),
    ([R, "data=jsonl", "backbone=smollm2"], "a value is missing (in data.path); give it on the command line"),
    ([R, "init=no/such/run"], "no such folder: 'no/such/run'; name a run folder, an export folder"),
    ([R, "resume=no/such/run"], "'no/such/run' is no run folder and no checkpoint in one (in resume)"),
    # flags
    ([R, "--mulitrun"], "unknown flag '--mulitrun' (in the command line); did you mean '--multirun'?"),
    ([R, "--config-dir", "no-such-folder"], "no-such-folder' not found"),
]


@pytest.mark.parametrize(("words", "says"), MISTAKES)
def test_a_mistake_is_one_line(
    words: list[str], says: str, stubbed: list[LocatedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    answer = call("train", *words)
    assert answer.code == 2
    assert says in answer.error
    assert answer.out == ""
    assert not stubbed, "nothing was started"


def test_a_traceback_is_shown_when_asked_for(stubbed: list[LocatedRun]) -> None:
    for mistake in ("trainer.max_step=2", "+trainer.max_step=2", "seed=-1"):
        answer = call("train", R, mistake, "verbose_errors=true")
        assert answer.code == 2
        assert answer.err.startswith("Traceback")
        assert answer.err.strip().splitlines()[-1].startswith("error: ")


def test_a_configured_traceback(tmp_path: Path, stubbed: list[LocatedRun]) -> None:
    """`verbose_errors` may stand in an experiment too, as far as that can be composed."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "loud.yaml").write_text("# @package _global_\nverbose_errors: true\n")
    answer = call("train", R, "experiment=loud", "--config-dir", str(tmp_path), "seed=-1")
    assert answer.code == 2 and answer.err.startswith("Traceback")


def test_a_config_file_that_is_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bad.yaml").write_text("a: [1\n")
    answer = call("train", R, "--config-dir", str(tmp_path), "experiment=bad")
    assert answer.code == 2
    assert f"{tmp_path / 'experiment' / 'bad.yaml'}, line 2" in answer.error


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("what", "where", "mend"), 2, "error: what (in where); mend"),
        (PipelineFailed("stage 'x' failed (log: y)", 7), 7, "error: stage 'x' failed (log: y)"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 2, "error: Permission denied (in /x/y)"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device"),
        (Interrupted("stopped; the same command goes on"), 130, "stopped; the same command goes on"),
        (KeyboardInterrupt(), 130, "interrupted: the same command goes on"),
    ],
)
def test_exit_codes(error: BaseException, code: int, says: str) -> None:
    with failing(error):
        answer = call("train", R)
    assert (answer.code, answer.err.strip()) == (code, says)


def test_a_fault_of_ours_is_a_traceback_and_one(stubbed: list[LocatedRun]) -> None:
    with failing(KeyError("x")):
        answer = call("train", R)
    assert answer.code == 1
    assert answer.err.startswith("Traceback")
    last = answer.err.strip().splitlines()[-1]
    assert last == "error: KeyError: 'x'; this is a fault of ours; the lines above say where"


# ------------------------------------------------------------------------------------------------ what is run
def test_a_run(stubbed: list[LocatedRun], tmp_outputs: Path) -> None:
    answer = call("train", R, "debug=fast", f"output_root={tmp_outputs}")
    assert (answer.code, answer.out, answer.err) == (0, "", "")
    (run,) = stubbed
    assert run.folder.path.parent == tmp_outputs / "debug"
    assert run.config.trainer.max_steps == 4
    assert not list(tmp_outputs.iterdir()), "Hydra writes nothing"


@pytest.mark.parametrize(
    ("words", "prefix"),
    [
        ([], "quickstart"),
        (["debug=fast"], "debug"),
        (["debug=fast", "name=mine", "pipeline=quickstart"], "mine"),
        (["pipeline.parallel=1"], "quickstart"),
        (["+pipeline.definitions.sft.inputs={}"], "quickstart"),
    ],
)
def test_the_name_is_the_prefix_of_a_pipelines_runs(words: list[str], prefix: str) -> None:
    seen: list[Any] = []
    with mock.patch("saferlhf.pipeline.runner.run_pipeline", lambda stages, **_: seen.append(stages)):
        answer = call("train", *words)
    assert answer.code == 0, answer.err
    (stages,) = seen
    assert stages.prefix == prefix
    names = {stage: run.name for stage, run in stages.configs.items()}
    assert names == {stage: f"{prefix}-{stage}" for stage in ("sft", "reward", "cost", "moderator", "ppo", "ppo_lag")}


# ------------------------------------------------------------------------------------------------ sweeps
# what a sweep does is in tests/sweep
def test_a_sweep_is_ours(tmp_outputs: Path) -> None:
    seen: list[Any] = []
    with mock.patch("saferlhf.sweep.runner.run_sweep", seen.append):
        answer = call("train", R, "-m", "seed=0,1", *FAST, "sweep.workers=3", f"output_root={tmp_outputs}")
    assert (answer.code, answer.err) == (0, "")
    (sweep,) = seen
    assert [(d.name, d.values) for d in sweep.space.dimensions] == [("seed", ("0", "1"))]
    assert sweep.space.fixed == (R, *FAST, f"output_root={tmp_outputs}")
    assert (sweep.config.name, sweep.config.workers, sweep.first.task.name) == ("grid", 3, "reward")
    assert sweep.folder.path.parent == tmp_outputs / "sweeps"
    assert not set("=,") & set(sweep.folder.path.name)
    assert not list(tmp_outputs.iterdir()), "Hydra leaves nothing of its own"


def test_hydras_own_sweepers_are_left_to_it(stubbed: list[LocatedRun], tmp_outputs: Path) -> None:
    answer = call("train", R, "-m", "seed=0,1", "hydra/sweeper=basic", *FAST, f"output_root={tmp_outputs}")
    assert answer.code == 0, answer.err
    assert [run.config.seed for run in stubbed] == [0, 1]


def test_a_sweep_with_a_choice_that_is_not_there_starts_nothing(stubbed: list[LocatedRun], tmp_outputs: Path) -> None:
    answer = call("train", "-m", "task=reward,rewrd", f"output_root={tmp_outputs}")
    assert answer.code == 2
    assert "there is no task 'rewrd'" in answer.error
    assert not stubbed


def test_an_interrupt_ends_a_sweep(tmp_outputs: Path) -> None:
    with mock.patch("saferlhf.sweep.runner.run_sweep", side_effect=KeyboardInterrupt):
        answer = call("train", "-m", R, "seed=0,1", f"output_root={tmp_outputs}")
    assert (answer.code, answer.err.strip()) == (130, "interrupted: the same command goes on")


def test_a_sweep_of_pipelines_is_a_pipeline_for_each(tmp_outputs: Path) -> None:
    seen: list[Any] = []
    with mock.patch("saferlhf.pipeline.runner.run_pipeline", lambda stages, **_: seen.append(stages)):
        words = ["pipeline.stages=[sft,reward,cost]", "debug=fast", f"output_root={tmp_outputs}"]
        answer = call("train", "-m", "seed=0,1", *words)
    assert answer.code == 0, answer.err
    assert [[run.seed for run in stages.configs.values()] for stages in seen] == [[0] * 3, [1] * 3]
    answer = call("train", "-m", "seed=0,1", *words, "sweep.workers=2")
    assert answer.error.startswith("pipelines are swept one after the other (in sweep.workers=2)")


# ------------------------------------------------------------------------------------------------ help
def examples(text: str, script: str) -> list[list[str]]:
    """Words of the example commands in a help text; two blanks begin a remark."""
    found = re.findall(rf"^ +python {script}\.py(?: (.*?))?(?:  .*|$)", text, re.MULTILINE)
    return [shlex.split(words) for words in found]


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_is_useful(command: str) -> None:
    answer = call(command, "--help")
    assert answer.code == 0
    text = answer.out
    assert len(text.splitlines()) < 50, "one screen"
    assert max(map(len, text.splitlines())) <= 120
    commands = examples(text, command)
    assert len(commands) >= 5
    for group in ("trainer: as_trained, cpu, default, gpu", "data: alpaca, beavertails, ", "tracking: mlflow, none"):
        assert group in text
    assert "docs/configuration.md" in text
    assert "{" not in text and "$" not in text, "nothing is left unfilled"


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_examples_of_the_help_can_be_composed(command: str) -> None:
    text = yaml.safe_load((conf_dir() / f"{command}.yaml").read_text())["hydra"]["help"]["template"]
    found = list(examples(text, command))
    assert found, "the help has examples"
    for words in found:
        kept = [word for word in words if word not in ("-m", "--cfg", "job")]
        assert composed(*(word if "[" in word else word.partition(",")[0] for word in kept), command=command)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_help_names_the_groups_of_its_command(command: str) -> None:
    entries = yaml.safe_load((conf_dir() / f"{command}.yaml").read_text())["defaults"]
    keys = [key for entry in entries if isinstance(entry, dict) for key in entry if "override" not in key]
    groups = {key.split()[-1].partition("@")[0] for key in keys if list((conf_dir() / key.split()[-1]).glob("*.yaml"))}
    listed = set(re.findall(r"^(\w+): \w", call(command, "--help").out, flags=re.MULTILINE)) - {"More"}
    assert listed == groups


def test_the_composed_configuration_is_shown() -> None:
    shown = yaml.safe_load(call("train", R, "seed=3", "--cfg", "job").out)
    assert (shown["task"]["name"], shown["seed"]) == ("reward", 3)
    assert "hydra" not in shown
    assert yaml.safe_load(call("train", "--cfg", "job").out)["name"] is None
    assert yaml.safe_load(call("evaluate", "--cfg", "job", "model=x").out)["model"] == "x"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_can_be_installed(shell: str) -> None:
    answer = call("train", "-sc", f"install={shell}")
    assert answer.code == 0
    assert "hydra_" in answer.out and len(answer.out.splitlines()) > 10


def test_shell_completion_knows_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "train.py backbone="
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert call("train", "-sc", "query=bash").out.split() == [
        f"backbone={name}" for name in ("hf", "llama3_70b", "llama3_8b", "llama_7b", "smollm2", "tiny")
    ]


# ------------------------------------------------------------------------------------------------ real input
GOOD = {"prompt": "How do I bake bread?", "chosen": "Mix flour and water.", "rejected": "No."}


@pytest.fixture
def own_rows(tmp_path: Path) -> Any:
    """Trains a reward model on rows of one's own, as far as the rows are: the model is never loaded."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def run(text: str, *words: str, name: str = "rows.jsonl") -> Answer:
        (tmp_path / name).write_text(text)
        model = [f"backbone.model={tmp_path / 'model'}", "backbone=hf"]
        place = [f"data.path={tmp_path / name}", f"output_root={tmp_path / 'outputs'}", "tracking=none"]
        answer = call("train", "data=jsonl", *model, *place, *words)
        errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, answer.err
        assert "Traceback" not in answer.err
        return Answer(answer.code, answer.out, errors[0])

    return run


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_rows_of_ones_own_that_will_not_do(own_rows: Any) -> None:
    cases: list[tuple[str, list[str], str]] = [
        ("", [R], "no rows"),
        (lines({"question": "a", "good": "b", "bad": "c"}), [R], "column"),
        (lines(GOOD) + "{broken\n", [R], "rows.jsonl:2"),
        (lines(GOOD, {**GOOD, "chosen": 3}), [R, "data.policy.non_text=error"], "rows.jsonl:2"),
        (lines({**GOOD, "chosen": 3}), [R], "rows.jsonl:1"),
        # preferences alone do not say what is safe
        (lines(GOOD), ["task=cost"], "needs"),
        (lines(GOOD), [R, "data.columns={prompt: question}"], "question"),
    ]
    for text, words, says in cases:
        answer = own_rows(text, *words)
        assert answer.code == 2, answer.err
        assert says in answer.err, answer.err


def test_a_run_of_another_identity_is_not_resumed(tmp_outputs: Path, stubbed: list[LocatedRun]) -> None:
    folder = finish(locate_run(config(R, f"output_root={tmp_outputs}")))
    answer = call("train", R, f"output_root={tmp_outputs}", f"resume={folder}", "seed=5")
    assert answer.code == 2
    assert answer.error.startswith(f"that run had other values of seed (in resume={folder})")


@pytest.mark.parametrize("root", ["a file", "below a file"])
def test_an_output_root_that_cannot_be(tmp_path: Path, root: str) -> None:
    (tmp_path / "file").write_text("x")
    place = tmp_path / "file" if root == "a file" else tmp_path / "file" / "outputs"
    answer = call("train", R, *FAST, f"output_root={place}")
    assert answer.code == 2
    assert "cannot write there: Not a directory" in answer.error


def test_a_device_that_is_not_there(tmp_outputs: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for words, says in {
        ("trainer=gpu",): "PyTorch finds no GPU on this machine (in trainer.accelerator)",
        ("optimizer=adamw_8bit",): "8-bit optimizers need a GPU (in optimizer=adamw_8bit)",
    }.items():
        answer = call("train", R, "plan=on", *FAST, f"output_root={tmp_outputs}", *words)
        assert answer.code == 2
        assert says in answer.err
    assert not list(tmp_outputs.iterdir())


def test_a_plan_writes_nothing(tmp_outputs: Path) -> None:
    words = [R, *(word for word in FAST if word != "tracking=none"), f"output_root={tmp_outputs}"]
    answer = call("train", "plan=on", *words)
    assert answer.code == 0, answer.err
    assert not list(tmp_outputs.iterdir())
    expected = locate_run(config(*words)).folder.path
    assert re.search(rf"results +{re.escape(str(expected))}", answer.out)
    # once it is finished, the plan says so
    finish(locate_run(config(*words)))
    answer = call("train", "plan=on", *words)
    assert f"{expected} (finished)" in answer.out


# ------------------------------------------------------------------------------------------------ processes
def python(*words: str, cwd: Path, script: str = "train.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / script), *words], cwd=cwd, capture_output=True, text=True)


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    started = time.monotonic()
    done = python(R, "+trainer.max_step=2", cwd=tmp_path)
    seconds = time.monotonic() - started
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown key 'max_step' (in trainer.max_step); did you mean 'max_steps'?\n"
    assert seconds < 20
    assert not list(tmp_path.iterdir())


LIGHT = """
import contextlib, io, json, sys
from command_lines import call, config, finish
HEAVY = ("torch", "transformers", "lightning", "mlflow", "peft", "bitsandbytes", "sklearn", "matplotlib", "pandas")
from saferlhf.run.prepare import locate_run
from saferlhf.pipeline import runner
root = f"output_root={sys.argv[1]}"
def light(step, answer, code, says):
    assert answer.code == code, (step, answer)
    assert says in answer.out + answer.err, (step, answer)
    loaded = [name for name in HEAVY if name in sys.modules]
    assert not loaded, f"{step} imports {loaded}"
light("a mistake", call("train", "task=reward", "seed=-1"), 2, "is no seed")
light("help", call("train", "--help"), 0, "Examples")
sft = finish(locate_run(config("task=sft", "name=quickstart-sft", root)))
for task in ("reward", "cost"):
    finish(locate_run(config(f"task={task}", f"name=quickstart-{task}", f"init={sft}", root)))
light("a finished run", call("train", "task=sft", "name=quickstart-sft", root), 0, "finished before")
light("a finished pipeline", call("train", root, "pipeline.stages=[sft,reward,cost]"), 0, "cost: finished before")
light("an evaluation without a model", call("evaluate", "model=no/such/run", root), 2, "no such folder")
light("a model without heads", call("evaluate", f"model={sft}", root), 2, "without score heads")
print("light")
"""


def test_what_needs_no_model_imports_nothing_heavy(tmp_path: Path) -> None:
    """Mistakes, help, finished runs and finished pipelines answer in seconds."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(tmp_path / "outputs")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("light")


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    """`train.py --cfg job | head -1`."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--cfg", "job"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    process.wait()
    assert "Traceback" not in errors and "fault of ours" not in errors


@pytest.mark.slow
def test_a_sweep_that_trains(tmp_path: Path) -> None:
    done = python("-m", R, "seed=0,1", *FAST, "output_root=outputs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = sorted((tmp_path / "outputs" / "debug").iterdir())
    assert len(runs) == 2
    for run in runs:
        assert json.loads((run / "status.json").read_text())["status"] == "finished"
        assert re.fullmatch(r"[0-9a-f]{10}", run.name)
    seeds = {yaml.safe_load((run / "config.yaml").read_text())["seed"] for run in runs}
    assert seeds == {0, 1}
    weights = {(run / "export" / "model.safetensors").read_bytes() for run in runs}
    assert len(weights) == 2, "a seed of its own is another model"
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["debug", "sweeps"]
