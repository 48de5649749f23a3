"""A SLURM job that has to leave its machine is put back into the queue, where it goes on from what was saved.

`sbatch --signal=USR1@300` has SLURM send SIGUSR1 five minutes before the job's time is over; pre-emption sends SIGTERM.
Once the state is on disk, `checkpoint.requeue=true` has the job started again: `scontrol requeue ID`. The same command
in the same job script finds the run's folder and goes on. Ctrl-C is a person's wish and requeues nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import Any

from saferlhf.training.stop import FROM_SYSTEM

WAIT_S = 60.0
"""How long a busy controller may take to answer."""


def slurm_job() -> str | None:
    """What `scontrol` calls the job this process is in; None outside of SLURM.

    A task of a job array has to be named as a part of the array: its own number can be that of the whole array too.
    """
    job = os.environ.get("SLURM_JOB_ID")
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if job and array and task else job or None


def requeue(job: str) -> str:
    """Ask SLURM to start the job again.

    SLURM then ends what is left of the job, with SIGTERM first. That is ignored from here on, so that this process can
    still say what it has done; it ends by itself.

    Returns:
        One line that says how it went.
    """
    before = _deafened()
    why = _asked(job)
    if why is None:
        return f"SLURM will start job {job} again, and the run goes on from there"
    for number, handler in before.items():
        signal.signal(number, handler)
    mend = "submit it once more; --requeue in its script allows this"
    return f"SLURM does not start job {job} again, {why}: {mend}"


def _asked(job: str) -> str | None:
    """`scontrol requeue`; None, or why SLURM does not do it."""
    try:
        asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=WAIT_S)
    except FileNotFoundError:
        return "there is no scontrol on this machine"
    except subprocess.TimeoutExpired:
        return f"scontrol did not answer within {WAIT_S:.0f} s"
    except OSError as error:
        return f"scontrol cannot be run ({error.strerror})"
    if asked.returncode == 0:
        return None
    lines = (asked.stderr.strip() or asked.stdout.strip()).splitlines()
    return f"it said '{lines[0].strip()}'" if lines else f"scontrol ended with code {asked.returncode}"


def _deafened() -> dict[int, Any]:
    """Ignore what the system sends, the command that is asked now included; the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, signal.SIG_IGN) for number in FROM_SYSTEM}
