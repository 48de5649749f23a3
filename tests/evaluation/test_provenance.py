"""Where numbers come from: files, judges, thresholds and code are named; the command composes the same evaluation."""

from __future__ import annotations

import os
import platform
import re
import shlex
import socket
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from saferlhf.config.arguments import ordered
from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.paths import conf_dir
from saferlhf.config.rollout_schema import (
    FunctionJudgeConfig,
    ModelJudgeConfig,
    RemoteJudgeConfig,
    ServerConfig,
    TruthJudgeConfig,
)
from saferlhf.config.validate import evaluate_config
from saferlhf.evaluation.provenance import (
    Provenance,
    code_commit,
    data_source,
    evaluation_facts,
    judge_line,
    provenance_section,
    repeat_command,
    threshold_source,
    versions,
    without_user,
)
from saferlhf.ops.calibration import Calibration


def config_of(*words: str) -> EvaluateConfig:
    """What `python evaluate.py WORDS` composes."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return evaluate_config(compose("evaluate", ordered(list(words))))


REMOTE = ["judge=remote", "judge.server.model=some/judge", "judge.attempts=3"]


@pytest.mark.parametrize(
    "words",
    [
        ["model=outputs/reward"],
        ["suite=moderation", "model=outputs/a b/c", "data=pku_saferlhf", "data.root=/rows", "split=val", "seed=3"],
        ["suite=all", "model=m", "data.root=../rows", "baseline_rows=null", "evaluation.bootstrap_draws=50"],
        ["protocol=xstest_responses", "model=m", "data.root=/r", "baselines=false", "trainer.precision=32-true"],
        ["protocol=xstest_responses", "model=m", "evaluation.max_rows=7"],
        ["suite=policy", "model=m", "baseline=b", "judges=[outputs/r,outputs/c]", "samples=4", "temperature=0.7"],
        ["suite=policy", "model=m", *REMOTE, "harmful=true", "max_new_tokens=64", "trainer.precision=bf16-mixed"],
        ["suite=policy", "model=m", "judges={mine: {kind: function, function: 'a.b:c', outputs: [reward]}}"],
        ["model=m", "data=jsonl", """data.path='it\\'s "here", and = so.jsonl'""", "data.columns.prompt=question"],
        ["mode=moderate", "model=m", "data=jsonl", "data.path=answers.jsonl", "~data@baseline_data"],
    ],
)
def test_the_command_composes_the_same_evaluation(words: list[str]) -> None:
    config = config_of(*words)
    command = shlex.split(repeat_command(config))
    assert command[:2] == ["python", "evaluate.py"]
    again = config_of(*command[2:])
    assert asdict(again) == asdict(config)
    # keys that nobody changed are not named
    assert len(command) <= 2 + len(words) + 5


def test_no_secret_and_nothing_of_the_machine_is_told() -> None:
    config = config_of("model=m", "tracking.uri=https://me:secret@store/x", "suite=policy", *REMOTE)
    config.judge["server"]["base_url"] = "https://me:secret@judge.example/v1"
    facts = evaluation_facts(config, kind="ppo", content="abc", judges={"https://me:secret@judge.example/v1": ""})
    told = provenance_section(Provenance(facts, (), repeat_command(config)))
    assert "secret" not in told and "judge.example" in told
    assert socket.gethostname() not in told and str(Path.home()) not in told.replace("/r", "")
    for name, value in os.environ.items():
        if len(value) > 12 and not re.search(r"[Ff]alse|true", value):
            assert value not in told, name


def test_addresses_lose_their_user() -> None:
    assert (
        without_user("uri: postgresql://me:pw@host/db and http://a/b@c") == "uri: postgresql://host/db and http://a/b@c"
    )


# ------------------------------------------------------------------------------------------------ facts
def test_where_thresholds_come_from() -> None:
    fitted = Calibration(threshold_unsafe=0.4321, rows=1234, fitted_on="val", objectives={"unsafe": "macro_f1"})
    said = threshold_source("moderator", fitted.to_dict())
    assert said == "fitted on 1,234 held-out rows (val) to maximise unsafe macro_f1; unsafe from p = 0.4321"
    for nothing in (None, Calibration.default().to_dict()):
        assert "defaults" in str(threshold_source("moderator", nothing))
    assert "cost above 0" in str(threshold_source("cost", None))
    assert threshold_source("reward", None) is None and threshold_source("ppo", None) is None


def test_judges_in_words() -> None:
    assert judge_line(TruthJudgeConfig("truth")) == "truth: the toy world's ground truth"
    assert judge_line(ModelJudgeConfig("", model="outputs/r"), "abc") == "model: outputs/r, content abc"
    assert judge_line(FunctionJudgeConfig("mine", function="a:b")) == "mine: function a:b"
    server = ServerConfig("https://me:key@host/v1?token=1", "some/judge")
    assert judge_line(RemoteJudgeConfig("far", server=server)) == "far: some/judge at https://host/v1"


def test_facts_of_an_evaluation() -> None:
    config = config_of("suite=moderation", "model=outputs/m", "seed=5", "data.seed=6")
    facts = evaluation_facts(config, kind="moderator", content="abc", calibration=None)
    assert facts["model"] == "outputs/m (moderator)" and facts["content of the model"] == "abc"
    assert facts["seed"] == "5, of data 6" and facts["measured"] == "suite moderation"
    assert facts["intervals"] == "95%, percentile bootstrap over prompts, 10,000 draws"
    assert "judges" not in facts
    assert f"Python {platform.python_version()}, torch {metadata.version('torch')}" in facts["versions"]
    assert set(versions()) == {"Python", "torch", "transformers", "numpy"}
    judged = evaluation_facts(config, kind="ppo", content="abc", judges={"truth: it": "", "far: that": "xstest"})
    assert judged["judges"] == "truth: it; far: that (xstest)"


def test_the_commit_is_that_of_this_code_alone(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *names, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    file = tmp_path / "code.py"
    file.write_text("1")
    assert code_commit(file) == "unknown"
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "of others")
    assert code_commit(file) == "unknown"  # an installed copy in somebody's repository
    git("add", "code.py")
    git("commit", "-q", "-m", "ours")
    assert code_commit(file) == git("rev-parse", "HEAD")
    file.write_text("2")
    assert code_commit(file) == git("rev-parse", "HEAD") + "-dirty"


# ------------------------------------------------------------------------------------------------ section
def test_data_by_file_hash_and_revision() -> None:
    files = {"test": [{"name": "a/<b>.jsonl", "sha256": "ab" * 32, "rows": 1200}, {"name": "c.jsonl"}]}
    report = {"source": "pku", "revision": "org/name@123", "licence": None, "files": files}
    source = data_source("xstest", report, "f1f2")
    assert source.files == (("test", "a/<b>.jsonl", 1200, "ab" * 32), ("test", "c.jsonl", None, None))
    page = provenance_section(Provenance({"a": "b"}, [source]))
    for piece in ("xstest", "pku, 2 files", "revision org/name@123", "f1f2", "licence unknown", "ab" * 32, "1,200"):
        assert piece in page, piece
    assert "a/&lt;b&gt;.jsonl" in page and "<details open>" in page
    two = provenance_section(Provenance({}, [source, data_source("toy", {"source": "toyworld"}, "0")]))
    assert "<details open>" not in two and "no files: generated rows" in two
