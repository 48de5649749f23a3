"""Stands for a stage's process: finds its run as a real one does, leaves what a finished run leaves, trains nothing.

What it is to do beside that stands in the environment: FAKE_STAGE is a JSON object from task names to
{"code": 2, "say": "..."} (end so), {"wait": true} (until asked to stop) or {"signal": 9} (die so).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from command_lines import config, finish

from saferlhf.config.arguments import folder_flags
from saferlhf.config.run_folder import KILLED
from saferlhf.run.prepare import locate_run


def main(words: list[str]) -> int:
    flags = folder_flags(words)
    run = locate_run(config(*(word for word in words if word not in flags)))
    task = run.config.task.name
    todo = json.loads(os.environ.get("FAKE_STAGE", "{}")).get(task, {})
    print(f"threads {run.config.trainer.threads}")
    print(f"gpus {os.environ.get('CUDA_VISIBLE_DEVICES')}")
    print(f"words {json.dumps(words)}", flush=True)
    if "say" in todo:
        print(todo["say"], flush=True)
    if "signal" in todo:
        os.kill(os.getpid(), todo["signal"])
    if todo.get("wait"):
        run.folder.acquire()
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            run.folder.update_status(status=KILLED)
            return 130
    if todo.get("code"):
        return int(todo["code"])
    finish(run, {f"test/{task}/pair_accuracy": 0.75}, weight=task.encode())
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise SystemExit(main(sys.argv[1:]))
