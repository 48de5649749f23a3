"""Runs commands of the project in processes of their own, forked from an interpreter that has imported everything.

A fresh interpreter spends some ten seconds on imports; a fork of a warm one none. Each command is a real process all
the same: it has its own state, takes real signals and leaves a real exit code. Requests and answers are lines of JSON.

`die` makes a process send itself a signal at a chosen moment, which polling from outside cannot hit:

    {"signal": 9, "at": "train_batch_start", "step": 7}

`at` is `train_batch_start` or `train_batch_end` (step = optimizer steps done), `validation` (between two batches),
`saving` (half of the file is written), `saved` (just renamed), `features` (step = rows of features done), `fitted`,
`evaluated`, `exported` (each stage done).
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import sys
import traceback
from typing import Any


def main() -> None:
    from saferlhf.tracking.environment import prepare_environment

    prepare_environment()
    import matplotlib.figure  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import saferlhf

    # all of it, so that every process runs the same code, whatever happens to the files meanwhile
    for module in pkgutil.walk_packages(saferlhf.__path__, "saferlhf."):
        importlib.import_module(module.name)
    from small_runs import make_cheap

    make_cheap()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "start":
            pid = os.fork()
            if pid == 0:
                _child(request)
            answer: Any = pid
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = None if pid == 0 else os.waitstatus_to_exitcode(status)
        print(json.dumps(answer), flush=True)


def _child(request: dict[str, Any]) -> None:
    code = 1
    try:
        with open(request["log"], "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if request["files_at_most"] is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (request["files_at_most"], resource.RLIM_INFINITY))
        os.environ.update(request["environment"])
        from saferlhf import cli

        if request["die"] is not None:
            _arm(request["die"])
        sys.argv = [f"{request['command']}.py", *request["arguments"]]
        getattr(cli, request["command"])()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _arm(die: dict[str, Any]) -> None:
    """Put the signal where it is wanted, from outside of the project's own code."""
    from collections.abc import Callable

    import lightning as L
    import torch

    from saferlhf.run import stages

    at = die["at"]

    def strike() -> None:
        for _ in range(die.get("times", 1)):
            os.kill(os.getpid(), die["signal"])

    class Striker(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if at == "train_batch_start" and trainer.global_step == die["step"]:
                strike()

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if at == "train_batch_end" and trainer.global_step == die["step"]:
                strike()

        def on_validation_batch_end(
            self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int, *_: Any
        ) -> None:
            if at == "validation" and trainer.global_step == die["step"] and index == 0:
                strike()

    build = stages.build_trainer

    def build_trainer(*args: Any, callbacks: list[L.Callback], **kwargs: Any) -> L.Trainer:
        return build(*args, callbacks=[Striker(), *callbacks], **kwargs)

    stages.build_trainer = build_trainer  # type: ignore[assignment]

    def after(owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            strike()
            return result

        setattr(owner, name, wrapped)

    if at == "fitted":
        after(stages, "fit")
    elif at == "evaluated":
        after(stages, "evaluate_run")
    elif at == "exported":
        after(stages, "export_run")
    elif at == "features":
        from saferlhf.training.feature_progress import FeatureProgress

        show = FeatureProgress.__call__

        def shown(self: Any, now: Any) -> None:
            show(self, now)
            if now.rows >= die["step"]:
                strike()

        FeatureProgress.__call__ = shown  # type: ignore[method-assign]
    elif at in ("saving", "saved"):
        from saferlhf.training import checkpoint

        replace, save = os.replace, torch.save

        def replacing(source: Any, target: Any) -> None:
            replace(source, target)
            if at == "saved" and str(target).endswith(f"step-{die['step']:08d}.ckpt"):
                strike()

        def saving(state: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if at == "saving" and isinstance(state, dict) and state.get("global_step") == die["step"]:
                file.write(b"half of it")
                file.flush()
                strike()
            save(state, file, *args, **kwargs)

        checkpoint.os.replace, checkpoint.torch.save = replacing, saving  # type: ignore[assignment]


if __name__ == "__main__":
    main()
