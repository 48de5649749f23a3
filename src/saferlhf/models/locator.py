"""Locator: one string names any model, one resolver finds it.

    outputs/cost/0123456789        a run folder: its export
    outputs/cost                   the folder of a name, as long as it holds one run
    outputs/cost/0123456789/export an export folder
    some/folder                    a plain Hugging Face folder
    organisation/model[@revision]  a Hugging Face name
    runs:/<mlflow run id>          the export of a tracked run

Resolving reads no weights and, but for `runs:/`, imports nothing heavy.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from saferlhf.errors import UserError
from saferlhf.models.content import folder_hash
from saferlhf.models.metadata import HEADS_FILE, METADATA_FILE, read_metadata

RUN_MARKS = ("status.json", "config.yaml")
HUB_NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+(?:@[\w./-]+)?")
KINDS = "a run folder, an export folder, a Hugging Face name or folder, or runs:/<mlflow id>"


@dataclass(frozen=True)
class Location:
    """Where a model is.

    Attributes:
        locator: the string that was resolved.
        kind: "export" (a folder with saferlhf.json), "folder" (plain Hugging Face folder) or "hub".
        folder: None for the hub.
        name: Hugging Face name; None for folders.
        revision: of the Hugging Face name; None: main.
        run_folder: the run an export belongs to, when it was named by its run.
    """

    locator: str
    kind: str
    folder: Path | None = None
    name: str | None = None
    revision: str | None = None
    run_folder: Path | None = None


def resolve(
    locator: str, *, output_root: Path | str, require_heads: bool = False, tracking_uri: str | None = None
) -> Location:
    """Find the model a locator names; whether a Hugging Face name exists shows only when it is loaded.

    Args:
        locator: see the module's docstring; relative folders are looked for here, then under `output_root`.
        output_root: where run folders and the default MLflow store are.
        require_heads: refuse a model without score heads.
        tracking_uri: MLflow store of `runs:/`; None: the sqlite file under `output_root`, if any, else MLflow's own.

    Raises:
        UserError: no such folder, a run without an export, a folder that is no model, heads required but absent.
    """
    text = str(locator).strip()
    if not text:
        raise UserError("empty locator", "", f"name {KINDS}")
    if text.startswith("runs:/"):
        found = _tracked_run(text, Path(output_root), tracking_uri)
    else:
        found = _folder_or_hub(text, Path(output_root))
    if require_heads and (found.folder is None or not (found.folder / HEADS_FILE).is_file()):
        raise UserError(
            f"{text!r} has no score heads",
            str(found.folder or ""),
            "name a trained reward or cost model's run or export",
        )
    return found


def content_id_of(
    locator: str | Location,
    *,
    output_root: Path | str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    tracking_uri: str | None = None,
) -> str:
    """Identity by content: a hash over weights, configuration and tokenizer, or `name@revision` for the hub."""
    found = (
        locator
        if isinstance(locator, Location)
        else resolve(locator, output_root=output_root, tracking_uri=tracking_uri)
    )
    if found.folder is None:
        return f"{found.name}@{found.revision or revision or 'main'}"
    extra = read_metadata(found.folder).identity() if found.kind == "export" else ""
    return folder_hash(found.folder, extra=extra, cache_dir=cache_dir)


def _folder_or_hub(text: str, output_root: Path) -> Location:
    for folder in (Path(text).expanduser(), output_root / text):
        if folder.is_dir():
            return _folder(text, folder)
        if folder.is_file():
            raise UserError(f"{text!r} is a file, not a model", "", f"name {KINDS}")
    if _looks_like_path(text) or not HUB_NAME.fullmatch(text):
        raise UserError(f"no such folder: {text!r}", "", f"name {KINDS}")
    name, _, revision = text.partition("@")
    return Location(text, "hub", name=name, revision=revision or None)


def _looks_like_path(text: str) -> bool:
    """True for what can only be a path, or starts in a folder that exists here."""
    return text[0] in "./~" or text.endswith("/") or text.count("/") > 1 or ("/" in text and Path(text).parent.is_dir())


def _folder(text: str, folder: Path) -> Location:
    folder = folder.resolve()
    if (folder / METADATA_FILE).is_file():
        run = folder.parent if any((folder.parent / mark).is_file() for mark in RUN_MARKS) else None
        return Location(text, "export", folder=folder, run_folder=run)
    export = folder / "export"
    if (export / METADATA_FILE).is_file():
        return Location(text, "export", folder=export, run_folder=folder)
    if (folder / "config.json").is_file():
        return Location(text, "folder", folder=folder)
    if any((folder / mark).is_file() for mark in RUN_MARKS):
        raise UserError(
            f"the run {text!r} has no export yet{_status(folder)}", "", "finish it: type its command again; then use it"
        )
    runs = sorted(p.name for p in folder.iterdir() if p.is_dir() and any((p / mark).is_file() for mark in RUN_MARKS))
    if len(runs) == 1:  # outputs/<name>, as long as that names one run
        return _folder(text, folder / runs[0])
    if runs:
        shown = ", ".join(runs[:5]) + (", ..." if len(runs) > 5 else "")
        raise UserError(f"{text!r} holds several runs ({shown})", "", f"name one: {text.rstrip('/')}/{runs[0]}")
    raise UserError(
        f"the folder {text!r} is no model: neither saferlhf.json nor config.json in it", "", f"name {KINDS}"
    )


def _status(run_folder: Path) -> str:
    try:
        return f" (status: {json.loads((run_folder / 'status.json').read_text())['status']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _tracked_run(text: str, output_root: Path, tracking_uri: str | None) -> Location:
    """The run's tag `export_folder` where that folder still exists, else its artefacts under `export`."""
    run_id = text.removeprefix("runs:/").split("/")[0]
    try:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError:
        raise UserError(f"{text!r} needs mlflow", "", "pip install mlflow, or name the run folder") from None
    store = output_root / "mlflow.db"
    uri = tracking_uri or (f"sqlite:///{store.resolve()}" if store.is_file() else None)
    client = MlflowClient(tracking_uri=uri)
    try:
        run = client.get_run(run_id)
        folder = Path(run.data.tags.get("export_folder", ""))
        if not run.data.tags.get("export_folder") or not folder.is_dir():
            if not client.list_artifacts(run_id, "export"):
                raise UserError(
                    f"the tracked run {run_id} has no export", uri or "", "name a finished run, or its run folder"
                )
            folder = Path(client.download_artifacts(run_id, "export"))
    except MlflowException as error:
        raise UserError(f"no tracked run {run_id}: {error}", uri or "", "see its id in `mlflow ui`") from error
    found = _folder(text, folder)
    return Location(text, found.kind, folder=found.folder, run_folder=found.run_folder)
