"""The command line: Hydra composes, the runner runs, every error of the user's is one line and exit code 2.

Exit codes: 0 done or finished before; 1 our fault (a traceback); 2 the input is wrong (one line); 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import hydra
from omegaconf import DictConfig

from saferlhf.config.hydra_errors import HYDRA_TROUBLE, as_user_error
from saferlhf.config.paths import conf_dir
from saferlhf.config.schema import TrainConfig
from saferlhf.config.validate import evaluate_config, pipeline_config, train_config
from saferlhf.tracking.environment import prepare_environment
from saferlhf.errors import UserError

DEFAULT_PIPELINE = "quickstart"
HANDED_ON = ("--config-dir", "-cd", "--config-path", "-cp")
"""Hydra flags with a value that a pipeline's stages must see too."""


def train() -> None:
    """`train.py`: one run, or a pipeline of runs."""
    _main("train", _train)


def evaluate() -> None:
    """`evaluate.py`: score a trained model."""
    _main("evaluate", _evaluate)


# ------------------------------------------------------------------------------------------------ bodies
def _train(composed: DictConfig) -> Any:
    task, pipeline = composed.get("task"), composed.get("pipeline")
    if task is not None and pipeline is not None:
        raise UserError("both a task and a pipeline are named", "the command line", "name one: task=... or pipeline=...")
    if task is not None:
        from saferlhf.run.train import train as run

        return run(train_config(composed)).metrics
    return _run_pipeline(pipeline)


def _run_pipeline(node: Any) -> Any:
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    from saferlhf.pipeline.runner import run_pipeline
    from saferlhf.run.prepare import checked

    typed = list(HydraConfig.get().overrides.task)
    if node is None:
        typed = [f"pipeline={DEFAULT_PIPELINE}", *typed]
        node = compose("train", typed).pipeline

    def compose_run(overrides: Sequence[str]) -> TrainConfig:
        return checked(train_config(compose("train", list(overrides))))

    mine = [o for o in typed if not o.lstrip("+~").startswith(("pipeline=", "pipeline."))]
    return run_pipeline(pipeline_config(node), compose=compose_run, overrides=mine, flags=_handed_on(sys.argv[1:]))


def _evaluate(composed: DictConfig) -> Any:
    from saferlhf.run.evaluate import evaluate as run

    return run(evaluate_config(composed))


def _handed_on(arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for position, argument in enumerate(arguments):
        if argument in HANDED_ON and position + 1 < len(arguments):
            kept += [argument, os.path.abspath(arguments[position + 1])]
        elif argument.startswith(tuple(f"{flag}=" for flag in HANDED_ON)):
            flag, _, value = argument.partition("=")
            kept += [flag, os.path.abspath(value)]
    return kept


# ------------------------------------------------------------------------------------------------ errors
def _main(command: str, body: Callable[[DictConfig], Any]) -> None:
    prepare_environment()
    # threads that wait must not spin: on a busy machine spinning made steps of a small model 10 times slower (docs/log.md)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # without this Hydra prints errors its own way and exits with 1
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # dependencies' notes to their own developers
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    raised: list[Exception] = []

    def guarded(composed: DictConfig) -> Any:
        # kept from Hydra, which would print its own lines above ours; jobs of a sweep that follow still run
        try:
            return body(composed)
        except Exception as error:
            raised.append(error)
            return None

    app = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=command)(guarded)
    try:
        app()
        if raised:
            raise raised[0]
    except UserError as error:
        _exit(error, 2)
    except HYDRA_TROUBLE as error:
        _exit(as_user_error(error, command), 2, cause=error)
    except KeyboardInterrupt:
        _exit(Exception("interrupted"), 130)
    except Exception as error:
        code = _known_code(error)
        if code is None:
            traceback.print_exc()
            print("error: this is a fault of ours; the lines above say where", file=sys.stderr)
            raise SystemExit(1) from None
        _exit(error, code)


def _known_code(error: Exception) -> int | None:
    """Exit code of the runner's own exceptions, told apart by name so that nothing heavy is imported here."""
    kind = type(error).__name__
    if kind == "Interrupted":
        return 130
    return int(getattr(error, "code", 1)) if kind == "PipelineFailed" else None


def _exit(error: BaseException, code: int, cause: BaseException | None = None) -> None:
    if any(argument.replace(" ", "") == "verbose_errors=true" for argument in sys.argv[1:]):
        traceback.print_exception(cause or error)
    print(f"error: {error}" if code != 130 else str(error), file=sys.stderr, flush=True)
    raise SystemExit(code)


if __name__ == "__main__":
    # `python -m saferlhf.cli train|evaluate ...`: how the launcher starts a stage
    commands = {"train": train, "evaluate": evaluate}
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in commands:
        raise SystemExit("usage: python -m saferlhf.cli train|evaluate [overrides]")
    commands[name]()
