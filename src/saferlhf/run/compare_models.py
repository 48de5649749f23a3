"""Finished evaluations of several models side by side: `python evaluate.py mode=compare models=[A,B]`.

`resolve_models` says what is meant by `models=`: which evaluations there are already, and which models must be
evaluated first. `compare_models` reads what these evaluations left of every row (`judgements/*.npz`, `samples.jsonl`);
no model is loaded. Everything is written into one folder: `metrics.json` (flat), `comparison.json` (the same by
protocol, with where it comes from), `comparison.md`, `report.html` and pictures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from saferlhf.config.files import read_json
from saferlhf.config.run_folder import FINISHED
from saferlhf.errors import UserError
from saferlhf.models.locator import RUN_MARKS, resolve
from saferlhf.run.compared_files import POLICY, Models, show, write
from saferlhf.run.screen import say

if TYPE_CHECKING:
    from saferlhf.evaluation.arena_of_answers import PolicyArena

SAMPLES = "samples.jsonl"

_HASH = re.compile(r"[0-9a-f]{10}(?:-\d+)?")
_SHOWN = 6  # digits of a hash in a heading


# ------------------------------------------------------------------------------------------------ which models
@dataclass(frozen=True)
class ComparedRun:
    """One run of a model.

    Attributes:
        locator: as the user named it.
        folder: of its finished evaluation; None: this is a model, which must be evaluated first.
    """

    locator: str
    folder: Path | None

    @property
    def needs_evaluation(self) -> bool:
        """Whether this is a model and no evaluation."""
        return self.folder is None


def resolve_models(
    models: Sequence[str] | Mapping[str, str | Sequence[str]],
    output_root: Path | str,
    *,
    tracking_uri: str | None = None,
) -> dict[str, list[ComparedRun]]:
    """What `models=` means.

    Args:
        models: locators, or heading -> locator or locators of its runs (seeds). A locator is the folder of an
            evaluation, `runs:/<mlflow id>` of one, or any locator of a model.
        output_root: where run folders and the default MLflow store are.
        tracking_uri: MLflow store of `runs:/`; None: the one under `output_root`.

    Returns:
        heading -> its runs. Headings of a list are made of names, with hashes where names are alike.

    Raises:
        UserError: fewer than two models, one twice, no such model, or an evaluation that is not finished.
    """
    root = Path(output_root)
    if isinstance(models, Mapping):
        given = {str(head): [text] if isinstance(text, str) else list(text) for head, text in models.items()}
        found = {head: [_resolved(text, root, tracking_uri) for text in texts] for head, texts in given.items()}
    else:
        runs = [_resolved(text, root, tracking_uri) for text in models]
        found = {head: [run] for head, run in zip(_headings(runs), runs, strict=True)}
    if len(found) < 2 or not all(found.values()):
        mend = "models=[A,B], or with headings models={ours: A, theirs: [B, C]}"
        raise UserError("a comparison needs two models at least", "models", mend)
    _refuse_alike(found)
    return found


def _resolved(locator: str, root: Path, tracking_uri: str | None) -> ComparedRun:
    text = str(locator).strip()
    folder = _tracked_folder(text, root, tracking_uri) if text.startswith("runs:/") else _folder(text, root)
    if folder is not None and (config := _evaluation_config(folder)) is not None:
        return ComparedRun(text, _finished(text, folder, config))
    resolve(text, output_root=root, tracking_uri=tracking_uri)  # there is such a model
    return ComparedRun(text, None)


def _folder(text: str, root: Path) -> Path | None:
    """The folder of a run that a path names; the folder of a name stands for its one run."""
    for folder in (Path(text).expanduser(), root / text):
        if text and folder.is_dir():
            if not any((folder / mark).is_file() for mark in RUN_MARKS):
                runs = sorted(p for p in folder.iterdir() if any((p / mark).is_file() for mark in RUN_MARKS))
                if len(runs) == 1:
                    return runs[0].resolve()
            return folder.resolve()
    return None


def _tracked_folder(text: str, root: Path, tracking_uri: str | None) -> Path | None:
    """Where a tracked run was written, as long as it is still there."""
    from saferlhf.tracking.environment import prepare_environment

    prepare_environment()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    run_id = text.removeprefix("runs:/").split("/")[0]
    store = root / "mlflow.db"
    uri = tracking_uri or (f"sqlite:///{store.resolve()}" if store.is_file() else None)
    try:
        tags = MlflowClient(tracking_uri=uri).get_run(run_id).data.tags
    except MlflowException as error:
        raise UserError(f"no tracked run {run_id}: {error}", "models", "see its id in `mlflow ui`") from error
    folder = Path(tags.get("run_folder", ""))
    return folder if tags.get("run_folder") and folder.is_dir() else None


def _evaluation_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of an evaluation that measured a model; None: this is no such folder."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) and "suite" in config and "mode" in config else None


def _finished(text: str, folder: Path, config: Mapping[str, Any]) -> Path:
    status = (read_json(folder / "status.json") or {}).get("status", "unknown")
    if config["mode"] != "score":
        raise UserError(f"'{text}' is of mode={config['mode']} and measured nothing", "models", "name an evaluation")
    if status != FINISHED:
        raise UserError(f"the evaluation '{text}' is not finished ({status})", "models", "type its command again")
    if not _judgements(folder) and not _samples(folder):
        what = f"the evaluation '{text}' kept nothing of single rows"
        raise UserError(what, "models", f"remove {folder} and evaluate again")
    return folder


# ------------------------------------------------------------------------------------------------ headings
def _headings(runs: Sequence[ComparedRun]) -> list[str]:
    """A short name for each; where names are alike the hash of the model, then of the evaluation, then a number."""
    models = [_model_of(run) for run in runs]
    evaluations = ["" if run.folder is None else run.folder.name[:_SHOWN] for run in runs]
    names = [name for name, _ in models]
    for more in ([code for _, code in models], evaluations, [str(number) for number in range(1, len(runs) + 1)]):
        alike = [names.count(name) > 1 for name in names]
        names = [
            f"{name} {code}".rstrip() if again else name for name, code, again in zip(names, more, alike, strict=True)
        ]
    return names


def _model_of(run: ComparedRun) -> tuple[str, str]:
    """(name, hash or nothing) of the model behind a run."""
    locator = run.locator
    if run.folder is not None:
        config = _evaluation_config(run.folder) or {}
        judge = config.get("judge") or {}  # of a guard that was held against labels in the place of a model
        locator = str(config.get("model") or judge.get("model") or run.folder)
    if locator.startswith("runs:/"):
        return "run", locator.removeprefix("runs:/")[:_SHOWN]
    parts = [part for part in re.split(r"[/\\]", locator) if part not in ("", ".", "..")]
    if len(parts) > 1 and parts[-1] == "export":
        parts.pop()
    if len(parts) > 1 and _HASH.fullmatch(parts[-1]):
        return parts[-2], parts[-1][:_SHOWN]
    return (parts[-1] if parts else locator), ""


def _refuse_alike(found: Mapping[str, Sequence[ComparedRun]]) -> None:
    """Each run stands under one heading, and headings differ in metric names too."""
    from saferlhf.evaluation.model_comparison import slug

    slugs: dict[str, str] = {}
    for heading in found:
        other = slugs.setdefault(slug(heading), heading)
        if other != heading or not slug(heading):
            what = f"'{other}' and '{heading}' would have the same names in metrics"
            raise UserError(what, "models", "change a letter or a digit of one of them")
    places: dict[str, str] = {}
    for heading, runs in found.items():
        for run in runs:
            key = run.locator if run.folder is None else str(run.folder)
            if key in places:
                raise UserError(f"'{run.locator}' is named twice", f"models.{heading}", "leave one out")
            places[key] = heading


# ------------------------------------------------------------------------------------------------ comparing
def compare_models(
    models: Models,
    *,
    out: Path,
    draws: int,
    confidence: float,
    seed: int,
    baseline: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Hold finished evaluations against each other; prints the table, writes everything into `out`.

    Args:
        models: heading -> folders of its evaluations, one for each run (seed).
        out: folder of the comparison.
        draws, confidence, seed: of the bootstrap and the tests.
        baseline: heading that each other is held against; None: all pairs, earlier minus later.
        config: shown in the report.

    Returns:
        flat metrics (`model_comparison.flat_metrics`); the glossary is docs/compare.md.

    Raises:
        UserError: nothing was measured of two models, or what was cannot be compared.
    """
    from saferlhf.evaluation.compared_policies import policy_flat
    from saferlhf.evaluation.model_comparison import flat_metrics, pairs_of, with_holm

    pairs_of(list(models), baseline)
    places: dict[Path, str] = {}
    for heading, folder in ((heading, folder) for heading, folders in models.items() for folder in folders):
        if (other := places.setdefault(folder.resolve(), heading)) != heading:
            raise UserError(f"'{other}' and '{heading}' are the same model", "models", "leave one out")
    options: dict[str, Any] = {"draws": draws, "confidence": confidence, "seed": seed}
    found, notes = _of_judgements(models, baseline, options)
    policies, in_pairs, arenas, more_notes = _of_samples(models, baseline, options)
    notes += more_notes
    if not found and not policies:
        what = f"{' and '.join(models)} were not measured by a common protocol" + "".join(f"; {n}" for n in notes)
        raise UserError(what, "models", "evaluate them with the same suite= or protocol=")
    comparisons = with_holm([*found, *policies])
    metrics = flat_metrics(comparisons)
    for comparison in policies:
        headlines = [metric.metric for metric in comparison.metrics]
        metrics |= policy_flat(comparison.protocol, in_pairs[comparison.protocol], headlines)
    for name, arena in arenas.items():
        metrics |= arena.metrics(f"compare/{name}/arena")
    show(comparisons, in_pairs, arenas, notes, confidence)
    write(out, models, comparisons, arenas, metrics, notes, options, config)
    return metrics


def _of_judgements(models: Models, baseline: str | None, options: Mapping[str, Any]) -> tuple[list[Any], list[str]]:
    """Protocols that two models at least were measured by, and what is left out."""
    from saferlhf.evaluation.judgements import load
    from saferlhf.evaluation.model_comparison import compare_protocol

    files = {heading: [_judgements(folder) for folder in folders] for heading, folders in models.items()}
    names = dict.fromkeys(name for runs in files.values() for run in runs for name in run)
    found, notes = [], list[str]()
    for name in names:
        there = {heading: runs for heading, runs in files.items() if all(name in run for run in runs)}
        if not _worth(name, models, there, baseline, notes):
            continue
        loaded = {heading: [load(run[name]) for run in runs] for heading, runs in there.items()}
        by_kind: dict[str, dict[str, Any]] = {}
        for heading, runs in loaded.items():
            by_kind.setdefault(runs[0].kind, {})[heading] = runs
        if len(by_kind) > 1:
            kinds = ", ".join(f"{heading} ({runs[0].kind})" for heading, runs in loaded.items())
            notes.append(f"{name}: only models of one kind are compared: {kinds}")
        for kind, some in by_kind.items():
            if len(some) > 1 and (baseline is None or baseline in some):
                say(f"comparing {', '.join(some)} on {name}" + (f" ({kind})" if len(by_kind) > 1 else ""))
                found.append(compare_protocol(some, baseline=baseline, **options))
    return found, notes


def _of_samples(
    models: Models, baseline: str | None, options: Mapping[str, Any]
) -> tuple[list[Any], dict[str, dict[str, dict[str, float]]], dict[str, PolicyArena], list[str]]:
    """The same of policies: (comparisons, protocol -> pair -> all that was found, protocol -> arena, notes)."""
    from saferlhf.evaluation.arena_of_answers import policy_arena
    from saferlhf.evaluation.compared_policies import compare_policies, pooled
    from saferlhf.evaluation.model_comparison import pairs_of
    from saferlhf.evaluation.policy_samples import read_samples

    files = {heading: [_samples(folder) for folder in folders] for heading, folders in models.items()}
    names = dict.fromkeys(name for runs in files.values() for run in runs for name in run)
    arenas: dict[str, PolicyArena] = {}
    found, in_pairs = [], dict[str, dict[str, dict[str, float]]]()
    notes = list[str]()
    for name in names:
        there = {heading: runs for heading, runs in files.items() if all(name in run for run in runs)}
        if not _worth(name, models, there, baseline, notes):
            continue
        read = {heading: [read_samples(run[name]) for run in runs] for heading, runs in there.items()}
        prompts = next(iter(read.values()))[0][0]
        other = [h for h, runs in read.items() if any(asked.ids != prompts.ids for asked, _ in runs)]
        if other:
            first, mend = next(iter(read)), "give them the same data, seed and evaluation.max_rows"
            raise UserError(f"{first} and {other[0]} answered different prompts of {name}", "models", mend)
        if any(POLICY not in policies for runs in read.values() for _, policies in runs):
            raise UserError(f"samples of {name} hold no policy", "models", "name evaluations of suite=policy")
        answers = {heading: [policies[POLICY] for _, policies in runs] for heading, runs in read.items()}
        say(f"comparing {', '.join(answers)} on {name}")
        pairs = pairs_of(list(answers), baseline)
        comparison, in_pairs[name] = compare_policies(name, prompts, answers, pairs, **options)
        found.append(comparison)
        everyone = {heading: pooled(runs) for heading, runs in answers.items()}
        if (arena := policy_arena(prompts, everyone, baseline=baseline, **options)) is not None:
            arenas[name] = arena
    return found, in_pairs, arenas, notes


def _worth(name: str, models: Models, there: Iterable[str], baseline: str | None, notes: list[str]) -> bool:
    """Whether there is a pair to compare; says who is missing."""
    known = list(there)
    missing = [heading for heading in models if heading not in known]
    if missing:
        notes.append(f"{name}: {' and '.join(missing)} {'was' if len(missing) == 1 else 'were'} not measured by it")
    return len(known) > 1 and (baseline is None or baseline in known)


def _judgements(folder: Path) -> dict[str, Path]:
    from saferlhf.evaluation.judgements import list_judgements

    return list_judgements(folder)


def _samples(folder: Path) -> dict[str, Path]:
    """Protocol -> samples of a policy: `policy` for those on `data=`, else the name of the folder they lie in."""
    found = {POLICY: folder / SAMPLES} if (folder / SAMPLES).is_file() else {}
    return found | {path.parent.name: path for path in sorted(folder.glob(f"*/{SAMPLES}"))}


__all__ = ["ComparedRun", "Models", "compare_models", "resolve_models"]
