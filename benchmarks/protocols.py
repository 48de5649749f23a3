"""docs/results.md: our numbers on every protocol beside those of others, written from folders of evaluations.

    python benchmarks/protocols.py run       trains and measures the models of `protocols.yaml`; finished runs answer at
                                             once
    python benchmarks/protocols.py write     writes the page

`protocols.yaml` names the models: a heading, the command that trains one (with {seed}), the seeds, the folder of its
runs below the output root, and the command that measures one. Nothing on the page is typed: values, intervals,
baselines, files and hashes come from `protocols.json` of the evaluations, published numbers and label rules from
conf/protocol by way of the same file. With several seeds a value is their mean, followed by the lowest and the highest;
the interval is that of the first. How far a model falls from the data it was trained on is a table and a picture of the
first seed.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from saferlhf.config.schema import BackboneConfig
from saferlhf.evaluation.drift import Drift
from saferlhf.evaluation.drift_report import drift_markdown, drift_png
from saferlhf.evaluation.protocol_results import best_peer, number
from saferlhf.models.gguf import converted_folder
from saferlhf.models.source import find_source

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
FILE = "protocols.json"
EVALUATIONS = "protocols"
"""Folder of the evaluations below the output root."""

_BASELINES = {"constant": "constant", "length": "length", "longer": "longer", "tfidf": "TF-IDF"}

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """One model that is measured.

    Attributes:
        heading: in the tables.
        about: one sentence.
        evaluate: what measures one; its model is added. `{judge}` is replaced by `judge`'s run.
        train: what trains one seed; holds {seed}. None: a backbone as it is.
        seeds: runs of it.
        run: folder of its runs below the output root; they are told apart by their seed.
        backbone: the one that is measured as it is.
        judge: heading of the model that judges what this one writes: its first seed.
    """

    heading: str
    about: str
    evaluate: str
    train: str | None = None
    seeds: tuple[int, ...] = (0,)
    run: str | None = None
    backbone: str | None = None
    judge: str | None = None

    @property
    def commands(self) -> str:
        """What to type."""
        if self.train is None:
            judged = self.evaluate.format(judge=f"RUN_OF_{(self.judge or '').upper()}")
            return f"`{judged} model={_backbone(self).model}`"
        seeds = f"Seed{'s' * (len(self.seeds) > 1)} {', '.join(map(str, self.seeds))}"
        return f"{seeds}: `{self.train}`, then `{self.evaluate}`"


def read_models(file: Path) -> list[Measured]:
    """The entries of `protocols.yaml`."""
    entries = yaml.safe_load(file.read_text())
    return [Measured(**{**entry, "seeds": tuple(entry.get("seeds", (0,)))}) for entry in entries]


def newest(folders: Iterable[Path], **wanted: Any) -> Path | None:
    """The newest finished run of these folders whose config has these values; None without one."""
    found = []
    for folder in folders:
        if not (folder / "status.json").is_file() or not (folder / "config.yaml").is_file():
            continue
        status = json.loads((folder / "status.json").read_text())
        config = yaml.safe_load((folder / "config.yaml").read_text())
        if status.get("status") == "finished" and all(config.get(key) == value for key, value in wanted.items()):
            found.append((status.get("finished", 0.0), folder))
    return max(found)[1] if found else None


def found_model(model: Measured, seed: int, outputs: Path) -> str | None:
    """Locator of what is measured: the run of one seed, or the backbone; None: no finished run."""
    if model.run is None:
        source = find_source(_backbone(model))
        if source.gguf is not None:
            return str(converted_folder(source.gguf))
        return str(_backbone(model).model)
    run = newest((outputs / model.run).glob("*"), seed=seed)
    return None if run is None else str(run)


def _backbone(model: Measured) -> BackboneConfig:
    """`conf/backbone/<its name>.yaml`."""
    return BackboneConfig(**yaml.safe_load((ROOT / "conf" / "backbone" / f"{model.backbone}.yaml").read_text()))


def evaluation(locator: str, outputs: Path) -> dict[str, Any] | None:
    """What the newest evaluation of a model by protocols found."""
    folders = [path.parent for path in (outputs / EVALUATIONS).glob(f"*/{FILE}")]
    found = newest(folders, model=locator)
    if found is None:
        return None
    content: dict[str, Any] = json.loads((found / FILE).read_text())
    return content


# ------------------------------------------------------------------------------------------------ page
def page(models: Sequence[tuple[Measured, Sequence[Mapping[str, Any]]]]) -> str:
    """The whole page.

    Args:
        models: each with its evaluations, one for each seed.
    """
    names = list(dict.fromkeys(r["protocol"] for _, runs in models for run in runs for r in run["results"]))
    lines = [
        "# Results by protocol",
        "",
        "Written by `python benchmarks/protocols.py write` from folders of evaluations; not edited by hand. What the "
        "metrics are: [metrics](metrics.md); how to measure a model of yours: [evaluate](evaluate.md).",
        "",
        "Intervals are 95% bootstrap intervals with prompts as clusters. Where the rows here are fewer than those of "
        "the published test, both counts are given: such numbers are comparable only as far as their intervals tell. "
        "`own run`: measured by the model's authors; `second-hand`: read in a summary, to be checked before quoting.",
        "",
        "## Overview",
        "",
        *_overview(models, names),
        "",
        "## Models",
        "",
    ]
    for model, _ in models:
        lines += [f"- **{model.heading}**: {model.about} {model.commands}"]
    for model, runs in models:
        lines += _drift_section(model, runs)
    for name in names:
        lines += ["", *_section(name, models)]
    left_out = {name: reason for _, runs in models for run in runs for name, reason in run["left_out"]}
    left_out = {name: reason for name, reason in left_out.items() if name not in names}
    if left_out:
        lines += ["", "## Not measured", ""]
        lines += [f"- `{name}`: {_public(reason)}" for name, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def _overview(models: Sequence[tuple[Measured, Sequence[Mapping[str, Any]]]], names: Sequence[str]) -> list[str]:
    headings = [model.heading for model, _ in models]
    lines = [_row(["protocol", "metric", "rows", *headings, "TF-IDF", "best published"]), _rule(5 + len(headings))]
    for name in names:
        everyone = [_results(name, runs) for _, runs in models]
        # some prompts are verdicts for a moderator and questions for a policy
        for metric in dict.fromkeys(r["metric"] for found in everyone for r in found):
            mine = [[r for r in found if r["metric"] == metric] for found in everyone]
            some = next(found[0] for found in mine if found)
            cells = [f"[{name}](#{name})", f"`{metric}`", _rows(some)]
            cells += [_value([r["values"].get(metric, {}) for r in found], bold=True) for found in mine]
            cells.append(number(some["values"].get(metric, {}).get("tfidf")))
            lines.append(_row([*cells, _peer(best_peer(some), some)]))
    return lines


def _section(name: str, models: Sequence[tuple[Measured, Sequence[Mapping[str, Any]]]]) -> list[str]:
    """One protocol: what it is, our numbers with baselines, and everybody's."""
    all_runs = [(model, _results(name, runs)) for model, runs in models]
    some = next(found[0] for _, found in all_runs if found)
    lines = [f"## {name}", "", f"{_sentence(some['about'])} Label: {some['rule']}. Unit: {some['unit']}."]
    lines += [f"{_sentence(some['note'])}"] if some["note"] else []
    marks = dict.fromkeys(mark for _, found in all_runs for r in found for mark in r["marks"])
    lines += [f"**{_sentence(mark)}**" for mark in marks]
    if some["seen_prompt_rate"]:
        alone = some["unseen"]
        text = f"{some['seen_prompt_rate']:.1%} of the rows have a prompt of PKU-SafeRLHF's training rows"
        lines.append(f"{text}; without them `{some['metric']}` is {_value([alone])}." if alone else f"{text}.")
    files = ", ".join(f"`{file['name']}` (sha256 `{file['sha256'][:16]}`)" for file in some["files"])
    lines += [f"Rows: {_rows(some)}, from {files}." if files else f"Rows: {_rows(some)}."]
    shown = [b for b in _BASELINES if any(b in value for value in some["values"].values())]
    lines += ["", _row(["", "metric", "value", *(_BASELINES[b] for b in shown), "source"]), _rule(4 + len(shown))]
    for model, found in all_runs:
        for metric in found[0]["values"] if found else ():
            values = [r["values"].get(metric, {}) for r in found]
            beside = [number(values[0].get(b)) for b in shown]
            lines.append(
                _row([f"**{model.heading}**", f"`{metric}`", _value(values, bold=True), *beside, "measured here"])
            )
    for peer in some["peers"]:
        by = "own run" if peer["ran_by"] == "own" else f"run by {peer['ran_by']}"
        note = f"; {peer['note']}" if peer["note"] else ""
        metric = f"`{peer['metric'] or some['metric']}`"
        source = f"{by}, {peer['source']} ({peer['mark']}){note}"
        lines.append(_row([peer["model"], metric, number(peer["value"]), *("" for _ in shown), source]))
    return lines


def _drift(runs: Sequence[Mapping[str, Any]]) -> Drift | None:
    """Of the first seed; None where it has no two protocols, or was measured before there was such a table."""
    found = Drift.read(runs[0].get("drift"))
    return found if found is not None and found.shown else None


def _picture(model: Measured) -> str:
    """Of its drift, beside the page."""
    return f"images/drift-{re.sub('[^a-z0-9]+', '-', model.heading.lower()).strip('-')}.png"


def _drift_section(model: Measured, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One model over all protocols and languages, with the drop from in-domain."""
    drift = _drift(runs)
    if drift is None:
        return []
    picture = f"![{model.heading}: AUROC by protocol, accuracy by language]({_picture(model)})"
    of = f" Seed {model.seeds[0]}." if len(runs) > 1 else ""
    lead, *table = drift_markdown(drift)
    return ["", f"## Drift of {model.heading}", "", f"{lead}{of}", "", picture, *table]


def _results(name: str, runs: Sequence[Mapping[str, Any]]) -> list[Result]:
    return [result for run in runs for result in run["results"] if result["protocol"] == name]


def _peer(peer: Mapping[str, Any] | None, result: Result) -> str:
    return "" if peer is None else f"{number(peer['value'])} {peer['model']}"


def _rows(result: Result) -> str:
    published = result["published_rows"]
    here = f"{result['rows']:,}"
    return here if not published or published == result["rows"] else f"{here} of {published:,}"


def _value(values: Sequence[Mapping[str, float]], bold: bool = False) -> str:
    """Mean over seeds with the lowest and the highest, or one value with its interval."""
    known = [value for value in values if "value" in value]
    if not known:
        return "-"
    mean = number(statistics.fmean(value["value"] for value in known))
    text = f"**{mean}**" if bold else mean
    if "low" in known[0] and "high" in known[0]:
        text += f" ({known[0]['low']:.3f} .. {known[0]['high']:.3f})"
    if len(known) > 1:
        text += f", seeds {min(v['value'] for v in known):.3f} to {max(v['value'] for v in known):.3f}"
    return text


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _public(reason: str) -> str:
    """A reason without the folders of the machine it was found on."""
    return re.sub(r"(?<![\w.])(?:\.\.?)?/[^\s'\",;)]*", "FOLDER", reason)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: int) -> str:
    return "|" + " --- |" * columns


# ------------------------------------------------------------------------------------------------ command line
def write(models: Sequence[Measured], outputs: Path, target: Path = PAGE) -> bool:
    """Write the page; says which evaluations are missing."""
    found = []
    complete = True
    for model in models:
        locators = {seed: found_model(model, seed, outputs) for seed in model.seeds}
        runs = {seed: evaluation(locator, outputs) if locator else None for seed, locator in locators.items()}
        missing = [str(seed) for seed, run in runs.items() if run is None]
        if missing:
            complete = False
            print(f"{model.heading}: no finished evaluation of seed {', '.join(missing)} in {outputs}")
        there = [run for run in runs.values() if run is not None]
        if there:
            found.append((model, there))
    if not found:
        return False
    target.write_text(page(found))
    for model, there in found:
        drift = _drift(there)
        if drift is not None:
            drift_png(target.parent / _picture(model), drift)
    print(f"written: {target.name}")
    return complete


def _call(command: str, outputs: Path) -> None:
    words = shlex.split(command)
    words[0] = sys.executable if words[0] == "python" else words[0]
    print(f"$ {command}", flush=True)
    subprocess.run([*words, f"output_root={outputs}"], cwd=ROOT, check=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "write"))
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="where the run folders lie")
    arguments = parser.parse_args()
    models = read_models(Path(__file__).with_name("protocols.yaml"))
    if arguments.action == "write":
        return 0 if write(models, arguments.outputs) else 1
    for model in models:
        judges = {other.heading: found_model(other, other.seeds[0], arguments.outputs) for other in models}
        command = model.evaluate.format(judge=judges.get(model.judge or ""))
        for seed in model.seeds:
            if model.train is not None:
                _call(model.train.format(seed=seed), arguments.outputs)
            locator = found_model(model, seed, arguments.outputs)
            if locator is None:
                raise SystemExit(f"{model.heading}: no finished run of seed {seed} in {arguments.outputs}")
            _call(f"{command} model={locator} name={EVALUATIONS}", arguments.outputs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
