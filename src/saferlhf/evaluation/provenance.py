"""Where the numbers of an evaluation come from: what a reader needs to get them again, and to know what they rest on.

Data by file, hash and revision; the model and its judges by locator and content; where the thresholds were fitted;
seed, intervals, commit of the code, versions, and a command that composes the same evaluation. Nothing of the machine
or of who used it: no environment, no host, no user, no path that the configuration does not hold.
"""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from saferlhf import __version__
from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.paths import conf_dir
from saferlhf.config.rollout_schema import (
    FunctionJudgeConfig,
    GuardJudgeConfig,
    JudgeConfig,
    ModelJudgeConfig,
    RemoteJudgeConfig,
)

UNKNOWN = "unknown"
PACKAGES = ("torch", "transformers", "numpy")
"""Packages whose versions change numbers."""

PROVENANCE_STYLE = """
.provenance td:first-child { white-space: nowrap; } .provenance .hash { overflow-wrap: anywhere; min-width: 12rem; }
"""

_DATA_KEYS = (
    *("path", "test_path", "root", "hub", "revision", "subset", "split", "layout", "answers", "taxonomy", "columns"),
    *("train_rows", "val_rows", "test_rows", "val_fraction", "test_fraction", "shuffle_sides", "policy"),
)
_SIMPLE = re.compile(r"[A-Za-z0-9_./:@+-]+")


@dataclass(frozen=True)
class DataSource:
    """The rows of one measurement.

    Attributes:
        measured: what they were used for: a protocol, or the measure.
        name: of the data set.
        revision: `name@commit`, where it came with one.
        licence: of the rows, if known.
        fingerprint: of the rows as they were used.
        files: (split, name below the data set's folder, records, SHA-256 of the bytes), as far as they are known.
    """

    measured: str
    name: str
    revision: str | None
    licence: str | None
    fingerprint: str
    files: tuple[tuple[str, str, int | None, str | None], ...] = ()


@dataclass(frozen=True)
class Provenance:
    """What stands in the section of a report.

    Attributes:
        facts: name -> text.
        data: of each measurement.
        command: that repeats the evaluation.
    """

    facts: Mapping[str, str]
    data: Sequence[DataSource] = ()
    command: str = ""


# ------------------------------------------------------------------------------------------------ facts
def evaluation_facts(
    config: EvaluateConfig,
    *,
    kind: str,
    content: str,
    calibration: Mapping[str, Any] | None = None,
    judges: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Facts of an evaluation, in the order in which they are shown.

    Args:
        config: of the evaluation.
        kind: of the model.
        content: hash of the model.
        calibration: of a moderator, as its export holds it.
        judges: of a policy, as `judge_line(...)` tells them, each with whom it judged; None: nobody is asked.
    """
    asked = "suite " + config.suite.name if config.protocol is None else "protocol " + config.protocol.name
    evaluation = config.evaluation
    facts = {
        "model": f"{config.model} ({kind})",
        "content of the model": content,
        "measured": asked,
        "thresholds": threshold_source(kind, calibration) or "none: nothing is decided by a threshold of this model's",
        "judges": "; ".join(f"{line}{f' ({of})' if of else ''}" for line, of in (judges or {}).items()),
        "seed": f"{config.seed}, of data {config.data.seed}",
        "intervals": f"{evaluation.confidence:.0%}, percentile bootstrap over prompts, {evaluation.bootstrap_draws:,}"
        " draws"
        if evaluation.bootstrap_draws
        else "none",
        "precision": config.trainer.precision or "as the model was trained",
        "code": f"saferlhf {__version__}, git commit {code_commit()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    return {name: text for name, text in facts.items() if text}


def threshold_source(kind: str, calibration: Mapping[str, Any] | None) -> str | None:
    """What the decisions of a model rest on, in words; None for kinds that decide nothing.

    Args:
        kind: of the model.
        calibration: as its export holds it; None without one.
    """
    if kind == "cost":
        return "cost above 0 is unsafe: the sign itself, nothing was fitted"
    if kind != "moderator":
        return None
    if calibration is None or not calibration.get("rows"):
        return "defaults: probability 0.5 everywhere, temperatures 1; nothing was fitted"
    objectives = ", ".join(f"{head} {goal}" for head, goal in (calibration.get("objectives") or {}).items())
    said = f"fitted on {calibration['rows']:,} held-out rows ({calibration.get('fitted_on')})"
    said += f" to maximise {objectives}" if objectives else ""
    return f"{said}; unsafe from p = {calibration['threshold_unsafe']:.4g}"


def judge_line(judge: JudgeConfig, content: str = "") -> str:
    """A judge in words: who it is, and of which model.

    Args:
        judge: its keys.
        content: hash of its model, where it has one.
    """
    name = judge.name or judge.kind
    if isinstance(judge, RemoteJudgeConfig):
        address = without_user(judge.server.base_url).partition("?")[0]
        return f"{name}: {judge.server.model} at {address}"
    if isinstance(judge, ModelJudgeConfig | GuardJudgeConfig):
        return f"{name}: {judge.model}{f', content {content}' if content else ''}"
    if isinstance(judge, FunctionJudgeConfig):
        return f"{name}: function {judge.function}"
    return f"{name}: the toy world's ground truth"


def data_source(measured: str, report: Mapping[str, Any], fingerprint: str) -> DataSource:
    """The rows of a measurement from its `data_report.json`."""
    files = tuple(
        (str(split), str(file["name"]), file.get("rows"), file.get("sha256"))
        for split, listed in (report.get("files") or {}).items()
        for file in listed
    )
    return DataSource(
        measured, str(report.get("source", "")), report.get("revision"), report.get("licence"), fingerprint, files
    )


def versions() -> dict[str, str]:
    """Python's and the packages' versions; none of them is imported for it."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def code_commit(file: Path | None = None) -> str:
    """The commit of the checkout that this code runs from, `-dirty` with local changes; else "unknown".

    Args:
        file: asked for in the place of this one.
    """
    here = Path(__file__).resolve() if file is None else file.resolve()

    def git(*words: str) -> str:
        command = ["git", *words]
        return subprocess.run(
            command, cwd=here.parent, capture_output=True, check=True, text=True, timeout=30
        ).stdout.strip()

    try:
        # an installed copy inside somebody else's repository must not take that repository's commit for its own
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or UNKNOWN
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN


def without_user(text: str) -> str:
    """The text with every address in it freed from user and password."""
    return re.sub(r"(?<=://)[^/@\s'\"]+@", "", text)


# ------------------------------------------------------------------------------------------------ command
def repeat_command(config: EvaluateConfig) -> str:
    """A command that composes what makes the numbers of this evaluation; the whole of it is in config.yaml.

    Keys are named where they differ from the files of `conf/`; where results go and who tracks them is left out.
    """
    chosen = f"suite={config.suite.name}" if config.protocol is None else f"protocol={config.protocol.name}"
    words = [f"mode={config.mode}"] if config.mode != "score" else [chosen]
    words += [f"model={_hydra(config.model)}", f"data={config.data.name}"]
    words += _changed("data", config.data, _file("data", config.data.name), _DATA_KEYS)
    if config.baseline_data is None:
        words.append("~data@baseline_data")
    elif config.baselines:
        name = config.baseline_data.name
        words += [] if name == "pku_saferlhf" else [f"data@baseline_data={name}"]
        words += _changed("baseline_data", config.baseline_data, _file("data", name), _DATA_KEYS)
    if isinstance(config.judge, Mapping):
        kind = str(config.judge.get("kind"))
        words.append(f"judge={kind}")
        words += _differences("judge", config.judge, _file("judge", kind))
    plain = ("split", "baselines", "baseline_rows", "baseline", "reference", "judges", "harmful", "samples")
    words += _changed("", config, {}, (*plain, "temperature", "max_new_tokens"))
    words += _changed("evaluation", config.evaluation, {}, ("bootstrap_draws", "confidence", "max_rows"))
    # null is "as the model was trained"; what that came to is settled by now, and said whatever the default
    words += [] if config.trainer.precision is None else [f"trainer.precision={config.trainer.precision}"]
    words += [f"seed={config.seed}", f"data.seed={config.data.seed}"]
    return without_user("python evaluate.py " + shlex.join(words))


def _file(group: str, name: str) -> dict[str, Any]:
    """The values that a choice of a group comes with; nothing for a choice of somebody's own."""
    file = conf_dir() / group / f"{name}.yaml"
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}


def _changed(prefix: str, config: Any, chosen: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Words for those keys of a dataclass that neither their file nor the schema gives this value."""
    schema = {field.name: _default(field) for field in fields(config)}
    plain = {key: _plain(getattr(config, key)) for key in keys}
    given = {key: chosen.get(key, schema[key]) for key in keys}
    return _differences(prefix, plain, given)


def _default(field: Any) -> Any:
    return _plain(field.default_factory() if callable(field.default_factory) else field.default)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _differences(prefix: str, values: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """`prefix.key=value` for each value that is not given already; mappings key by key."""
    words = []
    for key, value in values.items():
        name, known = f"{prefix}.{key}" if prefix else str(key), given.get(key)
        if isinstance(value, Mapping) and isinstance(known, Mapping):
            words += _differences(name, value, known)
        elif value != known:
            words.append(f"{name}={_hydra(value)}")
    return words


def _hydra(value: Any) -> str:
    """A value in the grammar of Hydra's overrides: lists, mappings, and texts in quotes where they need some."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_hydra(str(key))}:{_hydra(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_hydra(item) for item in value) + "]"
    text = str(value)
    if _SIMPLE.fullmatch(text) and isinstance(yaml.safe_load(text), str):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# ------------------------------------------------------------------------------------------------ section
def provenance_section(provenance: Provenance) -> str:
    """HTML of the section; all text is escaped."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(without_user(text))}</td></tr>"
        for name, text in provenance.facts.items()
    )
    facts = f'<div class="wide provenance"><table><tbody>{rows}</tbody></table></div>' if rows else ""
    opened = " open" if len(provenance.data) == 1 else ""
    data = "".join(_data_html(source, opened) for source in provenance.data)
    command = ""
    if provenance.command:
        note = '<p class="note">Composes this evaluation again; its whole configuration stands below.</p>'
        command = f'<pre class="command">{escape(provenance.command)}</pre>{note}'
    return f"<section><h2>Provenance</h2>{facts}{data}{command}</section>"


def _data_html(source: DataSource, opened: str) -> str:
    count = (
        f"{len(source.files):,} file{'s' * (len(source.files) != 1)}" if source.files else "no files: generated rows"
    )
    facts = " · ".join(part for part in _told(source))
    rows = "".join(
        f"<tr><td>{escape(split)}</td><td>{escape(name)}</td>"
        f"<td class=number>{'' if records is None else f'{records:,}'}</td>"
        f'<td class="hash">{escape(sha256 or UNKNOWN)}</td></tr>'
        for split, name, records, sha256 in source.files
    )
    head = "<thead><tr><th>split</th><th>file</th><th class=number>records</th><th>SHA-256</th></tr></thead>"
    table = f'<div class="wide provenance"><table>{head}<tbody>{rows}</tbody></table></div>' if rows else ""
    return (
        f"<details{opened}><summary>Data for {escape(source.measured)}: {escape(source.name)}, {count}</summary>"
        f'<p class="note">{escape(facts)}</p>{table}</details>'
    )


def _told(source: DataSource) -> Iterator[str]:
    yield f"revision {source.revision or UNKNOWN}"
    yield f"fingerprint of the rows {source.fingerprint}"
    yield f"licence {source.licence or UNKNOWN}"
