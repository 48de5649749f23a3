"""The command line: Hydra composes, the runner runs, every error of the user's is one line and exit code 2.

Exit codes: 0 done or finished before; 1 our fault (a traceback); 2 the input is wrong (one line); 130 interrupted. A
pipeline ends with the code of the stage that failed, a sweep with that of its first run that failed. `train.py -m` is
ours (`sweep/command.py`), `evaluate.py -m` is Hydra's.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from saferlhf.config.arguments import folder_flags, is_true, key_of, ordered, refuse_duplicates
from saferlhf.config.hydra_errors import as_user_error, is_trouble
from saferlhf.config.paths import conf_dir
from saferlhf.config.schema import TrainConfig
from saferlhf.config.validate import evaluate_config, pipeline_config, train_config
from saferlhf.errors import UserError
from saferlhf.pipeline.launcher import follow_launcher
from saferlhf.tracking.environment import prepare_environment

if TYPE_CHECKING:
    from saferlhf.sweep.command import SweepWords
    from saferlhf.sweep.elsewhere import Elsewhere

DEFAULT_PIPELINE = "quickstart"
ENVIRONMENT_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""What the machine says no to; not our fault."""

Body = Callable[[DictConfig], Any]


def train() -> None:
    """`train.py`: one run, or a pipeline of runs."""
    _main("train", _train)


def evaluate() -> None:
    """`evaluate.py`: score a trained model."""
    _main("evaluate", _evaluate)


# ------------------------------------------------------------------------------------------------ bodies
def _train(composed: DictConfig) -> Any:
    for word in HydraConfig.get().overrides.task:
        if key_of(word).partition(".")[0] == "sweep":
            raise UserError(f"'{word}' belongs to a sweep", "the command line", "add -m, or leave it out")
    task, pipeline = composed.get("task"), composed.get("pipeline")
    if task is not None and pipeline is not None:
        raise UserError(
            "both a task and a pipeline are named", "the command line", "name one: task=... or pipeline=..."
        )
    if task is not None:
        from saferlhf.run.train import train as run

        return run(train_config(composed)).metrics
    return _run_pipeline(composed)


def _run_pipeline(composed: DictConfig) -> Any:
    from hydra import compose

    from saferlhf.pipeline.runner import run_pipeline
    from saferlhf.pipeline.stages import Stages

    typed = list(HydraConfig.get().overrides.task)
    if "name" not in (composed.get("pipeline") or {}):  # none is named, though keys of it may be
        composed = compose("train", [f"pipeline={DEFAULT_PIPELINE}", *typed])
    config = pipeline_config(composed.pipeline)
    mine = [o for o in typed if key_of(o) not in ("pipeline", "name") and not key_of(o).startswith("pipeline.")]
    prefix = str(composed.get("name") or config.name)
    stages = Stages(config, compose=_compose_run, overrides=mine, prefix=prefix)
    if stages.configs[stages.asked[0].name].plan.only:
        from saferlhf.pipeline.plan import plan_pipeline

        return plan_pipeline(stages)
    return run_pipeline(stages, flags=folder_flags(sys.argv[1:]))


def _compose_tree(overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes of these overrides, its complaints as ours; inside a command alone."""
    from hydra import compose

    try:
        return compose("train", list(overrides))
    except Exception as error:
        if not is_trouble(error):
            raise
        raise as_user_error(error, overrides=overrides) from error


def _compose_run(overrides: Sequence[str]) -> TrainConfig:
    """The checked config of one run."""
    from saferlhf.run.prepare import checked

    tree = _compose_tree(overrides)
    try:
        return checked(train_config(tree))
    except Exception as error:  # an interpolation that leads nowhere shows only now
        if not is_trouble(error):
            raise
        raise as_user_error(error, overrides=overrides) from error


def _evaluate(composed: DictConfig) -> Any:
    from saferlhf.run.evaluate import evaluate as run

    return run(evaluate_config(composed))


# ------------------------------------------------------------------------------------------------ Hydra
def _main(command: str, body: Body) -> None:
    follow_launcher()
    prepare_environment()
    # threads that wait must not spin: on a busy machine that made steps of a small model 10 times slower (docs/log.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # without this Hydra prints errors its own way and exits with 1
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # dependencies' notes to their own developers
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        sys.argv[1:] = ordered(sys.argv[1:])
        code = _compose_and_run(command, body)
    except KeyboardInterrupt as error:
        code = _report_interrupt(error)
    except Exception as error:
        code = _report(error, command)
    if code:
        raise SystemExit(code)


def _compose_and_run(command: str, body: Body) -> int:
    """Exit code of what the command line asks for."""
    if command == "train" and {"-m", "--multirun"}.intersection(sys.argv) and not _wants_help():
        from saferlhf.sweep.command import sweep_words

        words = sweep_words(sys.argv[1:])
        if words is not None:
            return _run_sweep(words, body)
    return _run_hydra(command, body)


def _run_sweep(words: SweepWords, body: Body) -> int:
    """A sweep of ours; what is not is left to Hydra, with the words as they were typed."""
    typed = sys.argv[1:]
    pipelines: list[bool] = []
    elsewhere: list[Elsewhere] = []

    def sweep(_: DictConfig) -> None:
        from saferlhf.sweep.command import sweep_of
        from saferlhf.sweep.elsewhere import Elsewhere
        from saferlhf.sweep.runner import run_sweep

        loader = GlobalHydra.instance().config_loader()
        found = sweep_of(words, compose_tree=_compose_tree, compose=_compose_run, config_loader=loader)
        if found is None:
            pipelines.append(True)
        elif words.launcher:
            elsewhere.append(Elsewhere(found, words))
        else:
            run_sweep(found)

    # Hydra is there to find the configs: the runs are composed one by one
    sys.argv[1:] = words.base
    code = _run_hydra("train", sweep)
    sys.argv[1:] = typed
    if elsewhere:
        return _run_elsewhere(elsewhere[0], body)
    return _run_hydra("train", body) if pipelines else code


def _run_elsewhere(sweep: Elsewhere, body: Body) -> int:
    """A sweep whose runs are started by a launcher of Hydra's."""
    arguments = sweep.begin()
    try:
        if arguments:
            sys.argv[1:] = arguments
            _run_hydra("train", body)  # how the runs ended is read from their folders
    except BaseException as error:
        sweep.abandon(interrupted=isinstance(error, KeyboardInterrupt))
        raise
    sweep.end()
    return 0


def _wants_help() -> bool:
    return bool({"--help", "-h"}.intersection(sys.argv))


def _run_hydra(command: str, body: Body) -> int:
    """Exit code of all the jobs that Hydra makes of the command line; what keeps it from making any is raised."""
    codes: list[int] = []

    def guarded(composed: DictConfig) -> Any:
        # kept from Hydra, which would print its own lines above ours; jobs of a sweep that follow still run
        try:
            refuse_duplicates(HydraConfig.get().overrides.task)
            return body(composed)
        except Exception as error:
            if _is_interrupt(error):
                raise KeyboardInterrupt(str(error)) from None  # no job may follow
            codes.append(_report(error, command, _job(), bool(composed.get("verbose_errors"))))
            return None

    app = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command)(guarded)
    default = f"pipeline={DEFAULT_PIPELINE}"
    if _wants_help():
        _print_help(app, command)
        return 0
    try:
        app()
    except HydraException as error:
        if "Could not override 'pipeline." not in str(error) or default in sys.argv:
            raise
        keys_of_default = True
    else:
        keys_of_default = False
    if keys_of_default:  # keys of the pipeline that runs when none is named
        sys.argv.append(default)
        app()
    return next((code for code in codes if code), 0)


def _print_help(app: Callable[[], Any], command: str) -> None:
    """Hydra's help page with the groups of this command alone, long lists of choices broken into lines."""
    text = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):  # it prints, then leaves
        app()
    own = _groups(command)
    for line in text.getvalue().splitlines():
        group = re.match(r"(\w+)(?:/\w+)*: \w", line)
        if group and (conf_dir() / group[1]).is_dir() and group[1] not in own:
            continue
        print("\n".join(textwrap.wrap(line, 120, subsequent_indent="    ")) if len(line) > 120 else line)


def _groups(command: str) -> set[str]:
    """The config groups that a command chooses from."""
    entries = yaml.safe_load((conf_dir() / f"{command}.yaml").read_text())["defaults"]
    return {str(key).split()[-1].partition("@")[0] for entry in entries if isinstance(entry, dict) for key in entry}


def _job() -> str:
    """Which job of a sweep this is; nothing for a single one."""
    config = HydraConfig.get()
    if config.mode != RunMode.MULTIRUN:
        return ""
    return f"run {config.job.num} of the sweep ({', '.join(config.overrides.task)}): "


# ------------------------------------------------------------------------------------------------ errors
def _report(error: Exception, command: str, job: str = "", verbose: bool = False) -> int:
    """Print what went wrong, in one line where it is not our fault; the exit code."""
    if isinstance(error, BrokenPipeError):  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if is_trouble(error):
        shown, code = as_user_error(error, command, sys.argv[1:]), 2
    elif isinstance(error, UserError):
        shown, code = error, 2
    elif isinstance(error, OSError) and error.errno in ENVIRONMENT_TROUBLE:
        shown, code = UserError(error.strerror or type(error).__name__, str(error.filename or "")), 2
    elif type(error).__name__ in (
        "PipelineFailed",
        "SweepFailed",
    ):  # told by its name, so that nothing heavy is imported here
        shown, code = UserError(str(error)), int(getattr(error, "code", 1))
    else:
        what = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        shown, code, verbose = UserError(what, "", "this is a fault of ours; the lines above say where"), 1, True
    if verbose or is_true(sys.argv[1:], "verbose_errors"):
        traceback.print_exception(error)
    print(f"error: {job}{shown}", file=sys.stderr, flush=True)
    return code


def _is_interrupt(error: Exception) -> bool:
    return type(error).__name__ == "Interrupted"


def _report_interrupt(error: BaseException) -> int:
    print(str(error) or "interrupted: the same command goes on", file=sys.stderr, flush=True)
    return 130


if __name__ == "__main__":
    # `python -m saferlhf.cli train|evaluate ...`: how the launcher starts a stage
    commands = {"train": train, "evaluate": evaluate}
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in commands:
        raise SystemExit("usage: python -m saferlhf.cli train|evaluate [overrides]")
    commands[name]()
