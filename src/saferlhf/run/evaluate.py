"""`evaluate.py`: a trained model measured on any rows and by the protocols of a suite, or put to use on rows.

Results are a run folder of their own, found again by identity like any run: the model enters by its content, the rows
by theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from saferlhf.config.checks import check_evaluate
from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.files import read_json, write_json
from saferlhf.config.identity import identity_tree, run_hash
from saferlhf.config.run_folder import FINISHED, RunFolder
from saferlhf.data.build import data_fingerprint
from saferlhf.data.checks import check_policy
from saferlhf.errors import UserError
from saferlhf.evaluation.drift import drift_of
from saferlhf.evaluation.drift_report import drift_html
from saferlhf.evaluation.policy_config import check_policy_keys, policy_identity
from saferlhf.evaluation.processes import Processes
from saferlhf.evaluation.protocol_results import FILE as PROTOCOLS
from saferlhf.evaluation.protocol_results import protocol_result, protocols_html
from saferlhf.evaluation.provenance import Provenance, data_source, evaluation_facts, judge_line, repeat_command
from saferlhf.models.locator import content_id_of
from saferlhf.run.as_trained import as_trained
from saferlhf.run.evaluation_folder import in_folder
from saferlhf.run.judged_model import POLICY, JudgedModel, judged_model
from saferlhf.run.measured import Measured
from saferlhf.run.measurements import LeftOut, Measurement, measurement_identity, measurements_for
from saferlhf.run.screen import say, say_evaluation, say_protocols
from saferlhf.run.together import followed, joined


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Measure a model on rows, judge rows with it, or hold models against each other; writes metrics and a report.

    Raises:
        UserError: no such model, one that is not for this suite, or rows without the needed labels.
    """
    check_evaluate(config)
    check_policy_keys(config)
    check_policy(config.data.policy)
    if config.mode == "compare":
        from saferlhf.run.evaluate_compare import compare

        return compare(config, lambda one: evaluated(one)[0].path)
    if config.mode == "moderate" and config.input is not None:
        from saferlhf.run.moderate_stream import moderate_stream

        return moderate_stream(config)
    folder, metrics = evaluated(config)
    if Processes.current().first:
        _show(config, folder, metrics)
    return metrics


def evaluated(config: EvaluateConfig) -> tuple[RunFolder, dict[str, float]]:
    """The finished folder of an evaluation and its metrics; one that was finished before is found again."""
    root = Path(config.output_root)
    model = judged_model(config)
    config = as_trained(config, model)
    asked: list[Measurement] = []
    left_out: list[LeftOut] = []
    if config.mode != "moderate":
        asked, left_out = measurements_for(config, model)
    identity = _identity(config, asked, model.content(config))
    folder = RunFolder(root / config.name / run_hash(identity))
    if folder.status().get("status") == FINISHED:
        say(f"finished before: {folder.path}")
        return folder, read_json(folder.metrics) or {}

    def work(config: EvaluateConfig, folder: RunFolder) -> dict[str, float]:
        if config.mode == "moderate":
            return _moderate(config, model, folder)
        mine = [replace(one, config=_as_here(one.config, config)) for one in asked]
        return _score(config, mine, left_out, model, folder)

    if not joined(config).first:
        return folder, followed(config, work)
    suite = config.mode if config.mode == "moderate" else config.suite.name
    if config.mode == "score" and config.protocol is not None:
        suite = config.protocol.name
    tags = {"suite": suite, "kind": model.kind, "data": config.data.name, "model": model.locator}
    return folder, in_folder(folder, config, tags, lambda: work(config, folder))


def _as_here(asked: EvaluateConfig, here: EvaluateConfig) -> EvaluateConfig:
    """The config of one measurement with what this process measures of it."""
    kept = {name: getattr(here, name) for name in ("baselines", "evaluation", "tracking", "trainer")}
    return replace(asked, **kept)


def _identity(config: EvaluateConfig, asked: Sequence[Measurement], model: str) -> dict[str, Any]:
    """What makes the numbers: the model and the rows by content, and how they are measured."""
    on_data = [measurement.measure for measurement in asked if measurement.protocol is None]
    tree: dict[str, Any] = {
        "mode": config.mode,
        "protocols": on_data,
        "model": model,
        "seed": config.seed,
        "evaluation": asdict(config.evaluation),
        "precision": config.trainer.precision,
    }
    if on_data or config.mode == "moderate":
        tree |= {
            "data": identity_tree(config.data, lambda key, value: "by fingerprint"),
            "data_fingerprint": data_fingerprint(config.data),
            "split": config.split or ("all" if config.mode == "moderate" else "test"),
        }
    if any(measurement.measure == POLICY for measurement in asked):
        tree["policy"] = policy_identity(next(m.config for m in asked if m.measure == POLICY))
    named = [measurement for measurement in asked if measurement.protocol is not None]
    if named:
        tree["named"] = [measurement_identity(measurement) for measurement in named]
    return tree | ({"baselines": [config.baselines, config.baseline_rows]} if asked else {})


def _score(
    config: EvaluateConfig,
    asked: Sequence[Measurement],
    left_out: Sequence[LeftOut],
    model: JudgedModel,
    folder: RunFolder,
) -> dict[str, float]:
    """All measurements, one after the other, into one file of metrics and one report.

    In a suite that skips what does not fit, a protocol whose rows turn out to be unfit is left out with its reason;
    the others are measured.
    """
    found: list[tuple[Measurement, Measured]] = []
    reasons = list(left_out)
    first: UserError | None = None
    for measurement in asked:
        folder.update_status(phase=measurement.name)
        try:
            found.append((measurement, _measured(measurement, model, folder)))
        except UserError as error:
            if measurement.protocol is None or config.protocol is not None or config.suite.unfit != "skip":
                raise
            first = first or error
            say(f"{measurement.name} is left out: {error}")
            reasons.append(LeftOut(measurement.name, str(error)))
    if not found:
        assert first is not None
        raise first
    for name, reason in left_out:
        say(f"{name} is left out: {reason}")
    metrics = {name: value for _, measured in found for name, value in measured.metrics.items()}
    results = _results(metrics, found, model)
    sections: list[str] = []
    if results or reasons:
        drift = drift_of(results, metrics, model.metadata.extra.get("data"), confidence=config.evaluation.confidence)
        kept = {"results": results, "left_out": [list(reason) for reason in reasons]}
        write_json(folder.path / PROTOCOLS, kept | {"drift": drift and drift.plain()})
        sections = [protocols_html(results, reasons), drift_html(drift) if drift and drift.shown else ""]
    _report(config, model, folder, metrics, found, sections)
    write_json(folder.metrics, metrics)
    return metrics


def _measured(measurement: Measurement, model: JudgedModel, folder: RunFolder) -> Measured:
    from saferlhf.run.evaluate_moderation import measure_moderation
    from saferlhf.run.evaluate_preference import measure_preference

    if measurement.measure == POLICY:
        from saferlhf.run.evaluate_policy import measure_policy

        return measure_policy(measurement, model, folder)
    measure = {"preference": measure_preference, "moderation": measure_moderation}[measurement.measure]
    measured = measure(measurement, model)
    if measured.judgements is not None:
        measured.judgements.save(folder.path)
    return measured


def _results(
    metrics: Mapping[str, float], found: Sequence[tuple[Measurement, Measured]], model: JudgedModel
) -> list[dict[str, Any]]:
    """A line for each protocol that was measured."""
    return [
        protocol_result(
            asked.protocol,
            metrics,
            measure=asked.measure,
            kind=model.kind,
            rows=measured.rows,
            marks=measured.marks,
            files=[file for listed in measured.data_report["files"].values() for file in listed],
            fingerprint=measured.fingerprint,
        )
        for asked, measured in found
        if asked.protocol is not None
    ]


def _report(
    config: EvaluateConfig,
    model: JudgedModel,
    folder: RunFolder,
    metrics: Mapping[str, float],
    found: Sequence[tuple[Measurement, Measured]],
    protocols: Sequence[str],
) -> None:
    from saferlhf.evaluation.report import write_report

    taken: set[str] = set()
    for number, (asked, measured) in enumerate(found):
        name = asked.key if asked.key not in taken else f"{asked.key}_{asked.measure}"
        taken.add(name)
        write_json(folder.path / f"data_report{f'_{name}' if number else ''}.json", measured.data_report)
    what = f"{config.data.name} ({config.split or 'test'})"
    if protocols:
        what = config.protocol.name if config.protocol is not None else f"suite {config.suite.name}"
    write_report(
        folder.path / "report.html",
        title=f"{model.kind} model on {what}",
        subtitle=model.locator,
        metrics=metrics,
        config=asdict(config),
        data_report=found[0][1].data_report if len(found) == 1 or not protocols else None,
        sections=protocols,
        histograms=[
            (asked.name, drawing) if asked.protocol is not None else drawing
            for asked, measured in found
            for drawing in measured.drawings
        ],
        confidence=config.evaluation.confidence,
        figures={"Training": _training(model)} if any(asked.measure == POLICY for asked, _ in found) else None,
        samples=[_samples(asked, folder) for asked, _ in found if asked.measure == POLICY],
        provenance=_provenance(config, model, found),
    )


def _samples(asked: Measurement, folder: RunFolder) -> str:
    """Responses behind a click. They stay on this machine: a page that is sent to a store elsewhere has none."""
    from saferlhf.evaluation.policy_samples import read_samples
    from saferlhf.evaluation.report_samples import samples_section, withheld_section
    from saferlhf.tracking.store import sqlite_file, store_uri

    config = asked.config
    heading = "Samples" if asked.protocol is None else f"Samples of {asked.protocol.name}"
    tracked = config.tracking.name != "none"
    if tracked and sqlite_file(store_uri(config.tracking, Path(config.output_root))) is None:
        return withheld_section(heading)
    place = folder.path if asked.protocol is None else folder.path / asked.protocol.name
    return samples_section(*read_samples(place / "samples.jsonl"), heading=heading)


def _training(model: JudgedModel) -> list[str]:
    """How the policy was trained, as far as its run folder tells."""
    from saferlhf.evaluation.policy_plots import thresholds_of
    from saferlhf.evaluation.report_curves import training_drawings
    from saferlhf.training.curves import read_curves

    run = model.location.run_folder
    return [] if run is None else training_drawings(read_curves(run / "curves.jsonl"), thresholds_of(run))


def _provenance(
    config: EvaluateConfig, model: JudgedModel, found: Sequence[tuple[Measurement, Measured]]
) -> Provenance:
    """Where the numbers come from; a judge that judged some protocols only is told with their names."""
    from saferlhf.evaluation.policy_config import asked_judges

    def content(locator: Any) -> str:
        return content_id_of(locator, output_root=Path(config.output_root), cache_dir=config.cache_dir)

    judges: dict[str, list[str]] = {}
    policies = [asked for asked, _ in found if asked.measure == POLICY]
    for asked in policies:
        for judge in asked_judges(asked.config):
            locator = getattr(judge.config, "model", None)
            line = judge_line(judge.config, "" if locator is None else content(locator))
            judges.setdefault(line, []).append(asked.key)
    facts = evaluation_facts(
        config,
        kind=model.kind,
        content=content(model.location),
        calibration=model.metadata.calibration,
        judges={line: "" if len(of) == len(policies) else ", ".join(of) for line, of in judges.items()},
    )
    data = [data_source(asked.key, measured.data_report, measured.fingerprint) for asked, measured in found]
    return Provenance(facts, data, repeat_command(config))


def _moderate(config: EvaluateConfig, model: JudgedModel, folder: RunFolder) -> dict[str, float]:
    from saferlhf.run.moderate import moderate

    return moderate(config, model, folder)


def _show(config: EvaluateConfig, folder: RunFolder, metrics: dict[str, float]) -> None:
    kept = read_json(folder.path / PROTOCOLS) or {}
    if config.mode == "moderate":
        from saferlhf.run.moderate import say_moderated

        say_moderated(folder, metrics)
    elif any(name.startswith(f"{POLICY}/") for name in metrics):
        _show_policy(folder, metrics)
    elif kept.get("results"):
        say_protocols(folder, kept["results"], kept["left_out"], kept.get("drift"))
    else:
        say_evaluation(folder, metrics, config.evaluation.confidence)


def _show_policy(folder: RunFolder, metrics: dict[str, float]) -> None:
    """A policy's numbers beside its baseline's; responses may be harmful, so only their file is named."""
    from rich.console import Console

    from saferlhf.evaluation.policy_table import arena_table, evaluation_table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in (evaluation_table(metrics), arena_table(metrics)):
        if table is not None:
            console.print(table)
    print(f"samples: {folder.path / 'samples.jsonl'}")
    print(f"report:  {folder.path / 'report.html'}")
    print(f"metrics: {folder.metrics}")
