"""The launcher, with processes of milliseconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from saferlhf.errors import UserError
from saferlhf.pipeline import launcher
from saferlhf.pipeline.launcher import DevicePool, Job, JobResult, Known, cpu_share, last_words, launch, visible_gpus
from saferlhf.training import parent

PYTHON = (sys.executable, "-S", "-c")  # -S: no site-packages, starts in milliseconds


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "POLL_S", 0.01)


class Jobs:
    """Jobs of one test; each notes in `order` when its command is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.order: list[str] = []

    def job(self, name: str, code: str | None = "", needs: Sequence[str] = (), **environment: str) -> Job:
        def command() -> list[str] | None:
            self.order.append(name)
            return None if code is None else [*PYTHON, code]

        return Job(name, command, self.folder / f"{name}.log", tuple(needs), environment)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "logs")


def codes(results: dict[str, JobResult]) -> dict[str, int | None]:
    return {name: result.code for name, result in results.items()}


def test_jobs_wait_for_what_they_need(jobs: Jobs) -> None:
    trace = jobs.folder / "trace"
    note = f"open({str(trace)!r}, 'a').write('NAME '); "
    slow = "import time; time.sleep(0.3); "
    done = launch(
        [
            jobs.job("c", note.replace("NAME", "c"), needs=["a", "b"]),
            jobs.job("a", slow + note.replace("NAME", "a")),
            jobs.job("b", note.replace("NAME", "b"), needs=["a"]),
        ],
        at_once=3,
    )
    assert codes(done) == {"a": 0, "b": 0, "c": 0}
    assert jobs.order == ["a", "b", "c"]
    assert trace.read_text().split() == ["a", "b", "c"]
    assert done["a"].seconds >= 0.3


def test_a_failure_stops_only_what_needs_it(jobs: Jobs) -> None:
    done = launch(
        [
            jobs.job("bad", "raise SystemExit(3)"),
            jobs.job("child", needs=["bad"]),
            jobs.job("grandchild", needs=["child"]),
            jobs.job("other", "import time; time.sleep(0.2)"),
            jobs.job("late", needs=["other"]),
        ],
        at_once=2,
    )
    assert codes(done) == {"bad": 3, "child": None, "grandchild": None, "other": 0, "late": 0}
    assert "child" not in jobs.order and "grandchild" not in jobs.order
    assert not (jobs.folder / "child.log").exists()


@pytest.mark.parametrize("at_once", [1, 2])
def test_no_more_at_once_than_allowed(jobs: Jobs, at_once: int) -> None:
    most = 0

    def watch(known: Known) -> None:
        nonlocal most
        most = max(most, sum(result is None for result in known.values()))

    code = "import time; time.sleep(0.15)"
    started = time.monotonic()
    launch([jobs.job(name, code) for name in "abcd"], at_once=at_once, on_poll=watch)
    assert most == at_once
    if at_once == 1:
        assert time.monotonic() - started >= 4 * 0.15
    assert jobs.order == list("abcd"), "in order of preference"


def test_a_job_with_nothing_to_do_is_done(jobs: Jobs) -> None:
    done = launch([jobs.job("a", None), jobs.job("b", needs=["a"])], at_once=1)
    assert codes(done) == {"a": 0, "b": 0}
    assert not (jobs.folder / "a.log").exists(), "nothing was started"


def test_a_command_is_built_when_its_needs_are_done(jobs: Jobs) -> None:
    made = jobs.folder / "made"
    command = [*PYTHON, f"open({str(made)!r}, 'w').write('x')"]
    second = Job("b", lambda: [*PYTHON, f"print({made.read_text()!r})"], jobs.folder / "b.log", ("a",))
    assert codes(launch([second, Job("a", lambda: command, jobs.folder / "a.log")], at_once=2)) == {"a": 0, "b": 0}
    assert last_words(jobs.folder / "b.log") == "x"


def test_a_user_error_of_a_command_is_that_jobs_failure(jobs: Jobs) -> None:
    def refuse() -> list[str]:
        raise UserError("no such file: x", "data.path", "give one")

    done = launch([Job("a", refuse, jobs.folder / "a.log"), jobs.job("b"), jobs.job("c", needs=["a"])], at_once=1)
    assert codes(done) == {"a": 2, "b": 0, "c": None}
    assert last_words(jobs.folder / "a.log") == "no such file: x (in data.path); give one"


def test_another_error_of_a_command_stops_the_jobs_that_run(jobs: Jobs) -> None:
    def fault() -> list[str]:
        raise KeyError("ours")

    pid = jobs.folder / "pid"
    wait = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    started = time.monotonic()

    def when_it_runs(known: Known) -> None:
        if not pid.exists() or not pid.read_text():
            return
        raise KeyError("ours")

    with pytest.raises(KeyError):
        launch([jobs.job("a", wait)], at_once=1, on_poll=when_it_runs)
    assert time.monotonic() - started < 120
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    with pytest.raises(KeyError):
        launch([Job("b", fault, jobs.folder / "b.log")], at_once=1)


def test_jobs_that_wait_for_each_other_are_found_out(jobs: Jobs) -> None:
    with pytest.raises(ValueError, match="wait for each other: a, b"):
        launch([jobs.job("a", needs=["b"]), jobs.job("b", needs=["a"])], at_once=1)
    with pytest.raises(ValueError, match="wait for each other: c"):
        launch([jobs.job("c", needs=["not there"])], at_once=1)
    with pytest.raises(ValueError, match="0 jobs at once"):
        launch([jobs.job("a")], at_once=0)
    assert launch([], at_once=1) == {}


def test_output_goes_to_the_log_and_variables_to_the_job(jobs: Jobs) -> None:
    code = "import os, sys; print(os.environ['WHO']); print('trouble', file=sys.stderr); print(sys.stdin.read() == '')"
    launch([jobs.job("a", code, WHO="me")], at_once=1)
    head, *lines = (jobs.folder / "a.log").read_text().splitlines()
    assert head.startswith("=== a, ")
    assert sorted(lines) == ["True", "me", "trouble"]


def test_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_words(log) == ""
    log.write_text("=== a, 1\nerror: old trouble\n=== a, 2\nloading\n\n")
    assert last_words(log) == "loading", "the trouble of an earlier start is over"
    log.write_text("=== a, 1\nerror: first\nnoise\nerror: second\nmore noise\n")
    assert last_words(log) == "second"
    log.write_text("=== a, 1\n")
    assert last_words(log) == ""


def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [cpu_share(n) for n in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]


# ------------------------------------------------------------------------------------------------ stopping
def interrupt_when(ready: Path, *signals: int, then: Path | None = None) -> threading.Thread:
    """Send this process signals once the file is there, the second once the other one is, if the launcher listens."""

    def send() -> None:
        for number, file in zip(signals, (ready, then or ready), strict=False):
            for _ in range(1000):
                if file.exists() and callable(signal.getsignal(number)):
                    break
                time.sleep(0.01)
            if getattr(signal.getsignal(number), "__func__", None) is launcher._StopRequests._note:
                os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


GRACEFUL = """
import os, signal, sys, time
def stop(number, frame):
    open(sys.argv[1] + '.asked', 'w').close()
    raise SystemExit(130)
signal.signal(signal.SIGINT, stop)
open(sys.argv[1], 'w').close()
time.sleep(30)
"""
STUBBORN = GRACEFUL.replace("    raise SystemExit(130)\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_reaches_the_jobs_once(jobs: Jobs, number: int) -> None:
    ready = jobs.folder / "ready"
    command = [*PYTHON, GRACEFUL, str(ready)]
    before = signal.getsignal(number)
    thread = interrupt_when(ready, number)
    with pytest.raises(KeyboardInterrupt):
        launch([Job("a", lambda: command, jobs.folder / "a.log"), jobs.job("b", needs=["a"])], at_once=2)
    thread.join()
    assert (jobs.folder / "ready.asked").exists(), "asked, not ended"
    assert "b" not in jobs.order
    assert signal.getsignal(number) is before


def test_who_does_not_stop_in_time_is_ended(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "GRACE_S", 0.3)
    ready = jobs.folder / "ready"
    thread = interrupt_when(ready, signal.SIGINT)
    stubborn = STUBBORN.replace("time.sleep(30)", "[time.sleep(1) for _ in range(30)]")
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch([Job("a", lambda: [*PYTHON, stubborn, str(ready)], jobs.folder / "a.log")], at_once=1)
    thread.join()
    assert time.monotonic() - started < 15
    assert "did not stop by itself and was ended" in capfd.readouterr().err


def test_a_second_request_ends_at_once_with_all_that_was_started(jobs: Jobs) -> None:
    ready = jobs.folder / "ready"
    # a child of its own, as a data loader's worker is one
    family = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        "open(sys.argv[1] + '.child', 'w').write(str(child.pid))\n"
    )
    stubborn = STUBBORN.replace("open(sys.argv[1], 'w')", family + "open(sys.argv[1], 'w')")
    stubborn = stubborn.replace("time.sleep(30)", "[time.sleep(1) for _ in range(60)]")
    thread = interrupt_when(ready, signal.SIGINT, signal.SIGINT, then=jobs.folder / "ready.asked")
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch([Job("a", lambda: [*PYTHON, stubborn, str(ready)], jobs.folder / "a.log")], at_once=1)
    thread.join()
    assert time.monotonic() - started < 15, "long before the grace is over"
    grandchild = int((jobs.folder / "ready.child").read_text())
    for _ in range(200):
        if not Path(f"/proc/{grandchild}").exists() or "zombie" in Path(f"/proc/{grandchild}/status").read_text():
            break
        time.sleep(0.01)
    else:
        os.kill(grandchild, signal.SIGKILL)
        raise AssertionError("the job's own child lives on")


def test_ignored_signals_stay_ignored(jobs: Jobs) -> None:
    """`nohup` means that a closed terminal is no reason to stop."""
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from saferlhf.pipeline import launcher\n"
        "with launcher._StopRequests() as stop:\n"
        "    signal.raise_signal(signal.SIGHUP); signal.raise_signal(signal.SIGINT); print(stop.count)\n"
        "    signal.raise_signal(signal.SIGTERM); print(stop.count)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]


# ------------------------------------------------------------------------------------------------ GPUs
SHOWS = "import os; print('sees', os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('CUDA_DEVICE_ORDER'))"


def test_gpus_are_dealt_and_given_back() -> None:
    pool = DevicePool(["0", "3", "5"])
    assert pool.take(2) == ("0", "3")
    assert pool.take(2) is None and pool.free == ("5",)
    assert pool.take(1) == ("5",) and pool.take(0) == ()
    pool.give_back(("5",))
    pool.give_back(("0", "3"))
    assert pool.free == ("0", "3", "5")
    pool.check(3)
    with pytest.raises(UserError, match="4 GPUs for one run, this machine has 3 GPUs"):
        pool.check(4)
    nothing = DevicePool(())
    nothing.check(4)
    assert nothing.take(4) == (), "without GPUs nobody waits for one"


def test_each_job_sees_its_own_gpus(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs: at no time do two jobs see the same one, and a job that wants two has both."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    log = jobs.folder / "trace"
    jobs.folder.mkdir()
    code = (
        "import os, time; mine = os.environ['CUDA_VISIBLE_DEVICES']\n"
        f"open({str(log)!r}, 'a').write('+' + mine + '\\n'); time.sleep(0.1)\n"
        f"open({str(log)!r}, 'a').write('-' + mine + '\\n')\n"
    )
    wanted = {"a": 1, "b": 1, "c": 2, "d": 1, "e": 0}
    batch = [replace(jobs.job(name, code), devices=count) for name, count in wanted.items()]
    pool = DevicePool(["0", "1"])
    assert set(codes(launch(batch, at_once=4, pool=pool)).values()) == {0}
    taken: set[str] = set()
    for line in log.read_text().split():
        gpus = set(filter(None, line[1:].split(",")))
        if line[0] == "+":
            assert not taken & gpus
            taken |= gpus
        else:
            taken -= gpus
    lines = log.read_text().split()
    assert lines.count("+0,1") == 1 and lines.count("+") == 1
    assert jobs.order.index("d") > jobs.order.index("c"), "smaller jobs do not overtake the one that wants two"
    assert pool.free == ("0", "1")


def test_gpus_come_back_from_jobs_that_did_not_run(jobs: Jobs) -> None:
    def refuse() -> list[str]:
        raise UserError("no")

    pool = DevicePool(["0"])
    batch = [
        Job("bad", refuse, jobs.folder / "bad.log", devices=1),
        replace(jobs.job("cached", None), devices=1),
        replace(jobs.job("fails", "raise SystemExit(4)"), devices=1),
        replace(jobs.job("good", SHOWS), devices=1),
    ]
    assert codes(launch(batch, at_once=4, pool=pool)) == {"bad": 2, "cached": 0, "fails": 4, "good": 0}
    assert pool.free == ("0",)


def test_what_a_job_sees_of_the_machine(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    launch([replace(jobs.job("a", SHOWS), devices=1)], at_once=1, pool=DevicePool(["2"]))
    assert last_words(jobs.folder / "a.log") == "sees 2 PCI_BUS_ID"
    launch([jobs.job("b", SHOWS)], at_once=1)
    assert last_words(jobs.folder / "b.log") == "sees None None", "without a pool a job sees what we see"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    launch([replace(jobs.job("c", SHOWS), devices=2)], at_once=1, pool=DevicePool())
    assert last_words(jobs.folder / "c.log") == "sees GPU-a,GPU-b None"


@pytest.mark.parametrize(
    ("listed", "names"),
    [("0,1", ("0", "1")), ("", ()), ("-1", ()), ("2, GPU-7a", ("2", "GPU-7a")), ("1,-1,0", ("1",))],
)
def test_gpus_that_may_be_used(listed: str, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert visible_gpus() == names


def test_gpus_are_counted_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 3)
    assert visible_gpus() == ("0", "1", "2")

    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert visible_gpus() == ()


# ------------------------------------------------------------------------------------------------ jobs as they come
def test_more_jobs_are_asked_for_when_there_is_room(jobs: Jobs) -> None:
    """The next job may depend on what the ones before it did: asked for only once somebody has ended."""
    ended: list[int] = []

    def watch(known: Known) -> None:
        ended.append(sum(result is not None for result in known.values()))

    asked: list[int] = []

    def more() -> Job | None:
        if len(asked) == 5:
            return None
        asked.append(ended[-1] if ended else 0)
        return jobs.job(f"j{len(asked)}", "import time; time.sleep(0.1)")

    done = launch([], at_once=2, on_poll=watch, more=more)
    assert len(done) == 5 and set(codes(done).values()) == {0}
    assert asked[:2] == [0, 0]
    assert all(known >= number - 1 for number, known in enumerate(asked)), "at most two were on their way"


def test_a_job_that_is_not_ready_waits_and_holds_up_no_other(jobs: Jobs) -> None:
    flag = jobs.folder / "flag"
    jobs.folder.mkdir()
    late = replace(jobs.job("late"), ready=flag.exists)
    done = launch([late, jobs.job("maker", f"open({str(flag)!r}, 'w')")], at_once=1)
    assert codes(done) == {"late": 0, "maker": 0}
    assert jobs.order == ["maker", "late"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's own way, Linux")
def test_jobs_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "told"
    job = (
        "import signal, time\n"
        "from saferlhf.pipeline.launcher import follow_launcher\n"
        f"def told(*_):\n    open({str(told)!r}, 'w').write('asked'); raise SystemExit(0)\n"
        "signal.signal(signal.SIGTERM, told)\n"
        "follow_launcher()\n"
        f"open({str(tmp_path / 'ready')!r}, 'w').close(); time.sleep(60)\n"
    )
    script = (
        "import sys\nfrom pathlib import Path\nfrom saferlhf.pipeline.launcher import Job, launch\n"
        f"launch([Job('a', lambda: [sys.executable, '-c', {job!r}], Path({str(tmp_path / 'a.log')!r}))], at_once=1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    wait_for((tmp_path / "ready").exists)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(told.exists)


def test_who_was_not_started_by_a_launcher_follows_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent.ctypes, "CDLL", lambda _: pytest.fail("asked the kernel"))
    monkeypatch.delenv(launcher.LAUNCHER_PID, raising=False)
    launcher.follow_launcher()
    monkeypatch.setenv(launcher.LAUNCHER_PID, "1")
    launcher.follow_launcher()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
